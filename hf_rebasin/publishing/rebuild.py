"""Models made anew from what is recorded of them: one function per verb, of its settings and of what it reads."""

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
from ..recipes.runner import opened, recalibrated, run
from ..solving.align import align
from .record import alignment_files


@dataclass(frozen=True)
class Making:
    """What making a model again has to go by.

    Args:
        settings: of the verb, as they were recorded.
        models: what it reads.
        alignments: that are stored; None to look for them anew.
        data: instead of the dataset that is recorded, where that is not on the Hub.
        device: where it is computed.
        progress: show progress bars.
    """

    settings: Mapping[str, Any]
    models: Sequence[Checkpoint]
    alignments: Sequence[Alignment] | None = None
    data: str | None = None
    device: Device = None
    progress: bool = False

    def described(self, key: str) -> dict[str, Any] | None:
        """What is said of data, with the place where they are now."""
        said = self.settings.get(key)
        if said is None or self.data is None or said.get("revision") is not None:
            return None if said is None else dict(said)
        return {**said, "dataset": self.data, "files": None}

    def batches(self, key: str = "data") -> Batches | None:
        said = self.described(key)
        return None if said is None else open_data(DataSettings.model_validate(said), self.models[0])

    def moving_by(self) -> Alignment:
        if not self.alignments:
            raise CheckpointError("the alignment that moved it is not stored beside it")
        return self.alignments[0]


def made_again(
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
    """Write what a record says into another folder.

    Args:
        provenance: the record.
        models: its inputs, in order.
        folder: where its alignments are.
        out: where it goes.
        resolve: look for the alignments anew, and write them, too.
        data: where the data are, if they are not on the Hub.
        device: where it is computed.
        progress: show progress bars.

    Raises:
        CheckpointError: nothing is known of the verb, its settings are none, or an alignment is missing.
    """
    if provenance.verb not in MAKERS:
        raise CheckpointError(f"nothing is known here of {provenance.verb!r}, so it cannot be made again")
    number = sum(name.startswith("alignment") for name in provenance.outputs)
    stored = [Alignment.load(folder / name) for name in alignment_files(number)]
    making = Making(provenance.recipe, models, None if resolve else stored, data, device, progress)
    try:
        checkpoint, alignments = MAKERS[provenance.verb](making)
    except RebasinError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a record that somebody wrote by hand
        raise CheckpointError(f"{PROVENANCE} says what cannot be done again: {error!r}") from error
    checkpoint.save(out, max_shard_size=provenance.shard, progress=progress)
    for name, alignment in zip(alignment_files(len(alignments)), alignments, strict=True):
        alignment.save(out / name)


Made = tuple[Checkpoint, Sequence[Alignment]]


def _merge(making: Making) -> Made:
    said = dict(making.settings)
    places = [
        {"model": one.name.rpartition("@")[0] or one.name, "revision": one.commit}
        if one.commit
        else {"model": str(one.folder)}
        for one in making.models
    ]
    said["models"] = [
        {**place, "parameters": entry.get("parameters", {})}
        for place, entry in zip(places, said["models"], strict=True)
    ]
    if "data" in said:
        said["data"] = making.described("data")
    if "base_model" in said:
        said["base_model"] = places[0]["model"]
    recipe = Recipe.from_dict(said, name="the recipe of the record")
    models = opened(recipe, measuring=False, progress=making.progress)
    found = run(recipe, found=models, alignments=making.alignments, device=making.device, progress=making.progress)
    return found.checkpoint, [solution.alignment for solution in found.solutions]


def _align(making: Making) -> Made:
    fixed, moving = making.models
    if making.alignments is not None:
        return making.moving_by().apply(moving), ()
    settings = {key: value for key, value in making.settings.items() if key != "data"}
    solution = align(fixed, moving, data=making.batches(), device=making.device, progress=making.progress, **settings)
    return solution.apply(moving), [solution.alignment]


def _apply(making: Making) -> Made:
    (moving,) = making.models
    return making.moving_by().apply(moving), ()


def _recalibrate(making: Making) -> Made:
    model, *like = making.models
    data = making.batches()
    if data is None:
        raise CheckpointError("the record does not say on which data the statistics were taken")
    if like:
        return repair(model, like, data, device=making.device, progress=making.progress), ()
    exact = bool(making.settings.get("exact"))
    return recalibrated(model, data, exact=exact, device=making.device, progress=making.progress), ()


def _interpolate(making: Making) -> Made:
    data = making.batches("recalibrate")
    prepare = None if data is None else partial(recalibrate, batches=data, device=making.device)
    fixed, moving = making.models
    return between(fixed, moving, float(making.settings["at"]), prepare=prepare, device=making.device), ()


MAKERS: Mapping[str, Callable[[Making], Made]] = {
    "merge": _merge,
    "align": _align,
    "apply": _apply,
    "recalibrate": _recalibrate,
    "interpolate": _interpolate,
}
