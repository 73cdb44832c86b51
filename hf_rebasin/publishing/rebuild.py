"""Rebuild models from their records: one function per verb, the command that made the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..alignment.alignment import Alignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import PROVENANCE, RECORDS
from ..checkpoints.provenance import Provenance
from ..data.batches import Batches, DataSettings, open_data
from ..errors import CheckpointError, RebasinError
from ..evaluation.interpolation import between
from ..merging.recalibration import recalibrate, repair
from ..modules.functional import Device
from ..recipes.recipe import Recipe
from ..recipes.runner import open_models, recalibrate_checkpoint, run_merge
from ..solving.align import align
from .artefacts import ALIGNMENT_PATTERN
from .record import alignment_files


@dataclass(frozen=True, kw_only=True)
class RebuildInputs:
    """What a model is rebuilt from: recorded settings, input models, alignments and data.

    Args:
        settings: recorded settings of the verb.
        models: input models, in the order of the record.
        alignments: stored alignments; None if they are to be found anew.
        data: folder or file that replaces a recorded dataset, unless that is on the Hub.
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
        """Return the recorded settings of a dataset, with its present location; None if none are recorded."""
        recorded = self.settings.get(key)
        if recorded is None or self.data is None or recorded.get("revision") is not None:
            return None if recorded is None else dict(recorded)
        return {**recorded, "dataset": self.data, "files": None}

    def open_batches(self, key: str = "data") -> Batches | None:
        """Open a recorded dataset; None if none is recorded."""
        settings = self.data_settings(key)
        return None if settings is None else open_data(DataSettings.model_validate(settings), self.models[0])

    def stored_alignment(self) -> Alignment:
        """Return the first stored alignment; raise CheckpointError if there is none."""
        if not self.alignments:
            raise CheckpointError("the alignment that moved the model is not stored next to it")
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
        models: input models, in the order of the record.
        folder: folder of the recorded model, with its stored alignments.
        out: folder to write.
        resolve: whether to solve the alignments again instead of loading them; those that are found are written, too.
        data: folder or file with the data, if they are not on the Hub.
        device: device to compute on.
        progress: whether to show progress bars.

    Raises:
        CheckpointError: the verb is unknown, its settings are invalid, or an alignment is missing.
    """
    if provenance.verb not in REBUILDERS:
        raise CheckpointError(
            f"{PROVENANCE} names an unknown verb, {provenance.verb!r}, so the model cannot be rebuilt"
        )
    names = alignment_files(provenance.count_outputs(ALIGNMENT_PATTERN))
    stored = [Alignment.load(folder / (provenance.recorded_path(name) or name)) for name in names]
    inputs = RebuildInputs(
        settings=provenance.recipe,
        models=models,
        alignments=None if resolve else stored,
        data=data,
        device=device,
        progress=progress,
    )
    try:
        checkpoint, solved = REBUILDERS[provenance.verb](inputs)
    except RebasinError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a record that was edited by hand
        raise CheckpointError(f"{PROVENANCE} has settings that cannot be used: {error!r}") from error
    checkpoint.save(out, max_shard_size=provenance.shard, progress=progress)
    for name, alignment in zip(alignment_files(len(solved)), solved, strict=True):
        alignment.save(out / (provenance.recorded_path(name) or f"{RECORDS}/{name}"))


Rebuilt = tuple[Checkpoint, Sequence[Alignment]]  # the model, and the alignments that were found anew for it


def _rebuild_merge(inputs: RebuildInputs) -> Rebuilt:
    """Run the recorded recipe again, with models and data where they are now."""
    recorded = dict(inputs.settings)
    if "data" in recorded:
        recorded["data"] = inputs.data_settings("data")
    recipe = Recipe.from_dict({"convention": "own"} | recorded, name="the recorded recipe")
    locations = [
        (model.name.rpartition("@")[0] or model.name, model.commit) if model.commit else (str(model.folder), None)
        for model in inputs.models
    ]
    ids = [(entry.model, entry.revision) for entry in recipe.in_order()]
    recipe = recipe.renamed(dict(zip(ids, locations, strict=True)))
    opened = open_models(recipe, with_evaluation=False, progress=inputs.progress)
    alignments, device = inputs.alignments, inputs.device
    merged = run_merge(recipe, opened=opened, alignments=alignments, device=device, progress=inputs.progress)
    return merged.checkpoint, [solution.alignment for solution in merged.solutions]


def _rebuild_aligned(inputs: RebuildInputs) -> Rebuilt:
    """Move the second model by the stored alignment, or by one that is found anew."""
    fixed, moving = inputs.models
    if inputs.alignments is not None:
        return inputs.stored_alignment().apply(moving), ()
    settings = {key: value for key, value in inputs.settings.items() if key != "data"}
    data = inputs.open_batches()
    solution = align(fixed, moving, data=data, device=inputs.device, progress=inputs.progress, **settings)
    return solution.apply(moving), [solution.alignment]


def _rebuild_applied(inputs: RebuildInputs) -> Rebuilt:
    """Move the model by the stored alignment."""
    (moving,) = inputs.models
    return inputs.stored_alignment().apply(moving), ()


def _rebuild_recalibrated(inputs: RebuildInputs) -> Rebuilt:
    """Recompute the statistics of the first model or, if others follow, repair it to be like them."""
    model, *like = inputs.models
    data = inputs.open_batches()
    if data is None:
        raise CheckpointError("the record does not say on which data the statistics were computed")
    if like:
        return repair(model, like, data, device=inputs.device, progress=inputs.progress), ()
    exact = bool(inputs.settings.get("exact"))
    return recalibrate_checkpoint(model, data, exact=exact, device=inputs.device, progress=inputs.progress), ()


def _rebuild_interpolated(inputs: RebuildInputs) -> Rebuilt:
    """Take the model at the recorded λ, with BatchNorm statistics recomputed if data for that are recorded."""
    data = inputs.open_batches("recalibrate")
    prepare = None if data is None else partial(recalibrate, batches=data, device=inputs.device)
    fixed, moving = inputs.models
    return between(fixed, moving, float(inputs.settings["at"]), prepare=prepare, device=inputs.device), ()


REBUILDERS: Mapping[str, Callable[[RebuildInputs], Rebuilt]] = {
    "merge": _rebuild_merge,
    "align": _rebuild_aligned,
    "apply": _rebuild_applied,
    "recalibrate": _rebuild_recalibrated,
    "interpolate": _rebuild_interpolated,
}
