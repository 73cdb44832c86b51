"""Rebuilding models from their records: one function per verb, given its settings and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..alignment.alignment import Alignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import PROVENANCE
from ..checkpoints.provenance import Provenance
from ..data.batches import Batches, DataSettings, open_data
from ..errors import CheckpointError, RebasinError
from ..evaluation.interpolation import between
from ..merging.recalibration import recalibrate, repair
from ..modules.functional import Device
from ..recipes.recipe import Recipe
from ..recipes.runner import open_models, recalibrate_checkpoint, run_merge
from ..solving.align import align
from .record import alignment_files


@dataclass(frozen=True, kw_only=True)
class RebuildContext:
    """Settings and inputs for rebuilding a model.

    Args:
        settings: recorded settings of the verb.
        models: models that it reads.
        alignments: stored alignments; None to solve for them anew.
        data: place of the data, instead of a recorded dataset that is not on the Hub.
        device: device to compute on.
        progress: whether to show progress bars.
    """

    settings: Mapping[str, Any]
    models: Sequence[Checkpoint]
    alignments: Sequence[Alignment] | None = None
    data: str | None = None
    device: Device = None
    progress: bool = False

    def data_settings(self, key: str) -> dict[str, Any] | None:
        """Return recorded data settings, with the place where the data are now."""
        recorded = self.settings.get(key)
        if recorded is None or self.data is None or recorded.get("revision") is not None:
            return None if recorded is None else dict(recorded)
        return {**recorded, "dataset": self.data, "files": None}

    def open_batches(self, key: str = "data") -> Batches | None:
        """Open recorded data; None where there are none."""
        settings = self.data_settings(key)
        return None if settings is None else open_data(DataSettings.model_validate(settings), self.models[0])

    def stored_alignment(self) -> Alignment:
        """Return the first stored alignment; raise CheckpointError where there is none."""
        if not self.alignments:
            raise CheckpointError("the alignment that moved it is not stored beside it")
        return self.alignments[0]


def rebuild_model(
    provenance: Provenance,
    models: Sequence[Checkpoint],
    folder: Path,
    out: Path,
    *,
    resolve: bool = False,
    data: str | None = None,
    device: Device = None,
    progress: bool = False,
) -> None:
    """Rebuild a model from its record and write it into another folder.

    Args:
        provenance: record of the model.
        models: its inputs, in order.
        folder: folder with its stored alignments.
        out: folder to write.
        resolve: whether to solve for the alignments anew, and write them, too.
        data: place of the data, if they are not on the Hub.
        device: device to compute on.
        progress: whether to show progress bars.

    Raises:
        CheckpointError: the verb is unknown, its settings are invalid, or an alignment is missing.
    """
    if provenance.verb not in REBUILDERS:
        raise CheckpointError(f"{PROVENANCE} names an unknown verb, {provenance.verb!r}, so it cannot be rebuilt")
    number = sum(name.startswith("alignment") for name in provenance.outputs)
    stored = [Alignment.load(folder / name) for name in alignment_files(number)]
    context = RebuildContext(
        settings=provenance.recipe,
        models=models,
        alignments=None if resolve else stored,
        data=data,
        device=device,
        progress=progress,
    )
    try:
        checkpoint, alignments = REBUILDERS[provenance.verb](context)
    except RebasinError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a record that was edited by hand
        raise CheckpointError(f"{PROVENANCE} has settings that cannot be used: {error!r}") from error
    checkpoint.save(out, max_shard_size=provenance.shard, progress=progress)
    for name, alignment in zip(alignment_files(len(alignments)), alignments, strict=True):
        alignment.save(out / name)


Rebuilt = tuple[Checkpoint, Sequence[Alignment]]


def _rebuild_merge(context: RebuildContext) -> Rebuilt:
    content = dict(context.settings)
    places = [
        {"model": model.name.rpartition("@")[0] or model.name, "revision": model.commit}
        if model.commit
        else {"model": str(model.folder)}
        for model in context.models
    ]
    content["models"] = [
        {**place, "parameters": entry.get("parameters", {})}
        for place, entry in zip(places, content["models"], strict=True)
    ]
    if "data" in content:
        content["data"] = context.data_settings("data")
    if "base_model" in content:
        content["base_model"] = places[0]["model"]
    recipe = Recipe.from_dict(content, name="the recipe of the record")
    opened = open_models(recipe, with_evaluation=False, progress=context.progress)
    alignments, device = context.alignments, context.device
    merged = run_merge(recipe, opened=opened, alignments=alignments, device=device, progress=context.progress)
    return merged.checkpoint, [solution.alignment for solution in merged.solutions]


def _rebuild_aligned(context: RebuildContext) -> Rebuilt:
    fixed, moving = context.models
    if context.alignments is not None:
        return context.stored_alignment().apply(moving), ()
    settings = {key: value for key, value in context.settings.items() if key != "data"}
    data = context.open_batches()
    solution = align(fixed, moving, data=data, device=context.device, progress=context.progress, **settings)
    return solution.apply(moving), [solution.alignment]


def _rebuild_applied(context: RebuildContext) -> Rebuilt:
    (moving,) = context.models
    return context.stored_alignment().apply(moving), ()


def _rebuild_recalibrated(context: RebuildContext) -> Rebuilt:
    model, *like = context.models
    data = context.open_batches()
    if data is None:
        raise CheckpointError("the record does not say on which data the statistics were computed")
    if like:
        return repair(model, like, data, device=context.device, progress=context.progress), ()
    exact = bool(context.settings.get("exact"))
    return recalibrate_checkpoint(model, data, exact=exact, device=context.device, progress=context.progress), ()


def _rebuild_interpolated(context: RebuildContext) -> Rebuilt:
    data = context.open_batches("recalibrate")
    prepare = None if data is None else partial(recalibrate, batches=data, device=context.device)
    fixed, moving = context.models
    return between(fixed, moving, float(context.settings["at"]), prepare=prepare, device=context.device), ()


REBUILDERS: Mapping[str, Callable[[RebuildContext], Rebuilt]] = {
    "merge": _rebuild_merge,
    "align": _rebuild_aligned,
    "apply": _rebuild_applied,
    "recalibrate": _rebuild_recalibrated,
    "interpolate": _rebuild_interpolated,
}
