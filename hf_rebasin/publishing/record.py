"""What a verb leaves beside the weights: recipe, alignments, `rebasin.json`, and of what was measured the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import yaml

from ..alignment.alignment import Alignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import write_whole
from ..checkpoints.licences import Said, licence_of
from ..checkpoints.provenance import Input, Machine, Provenance, hashes
from ..data.batches import Batches, DataSettings
from ..modules.distributed import count
from ..modules.functional import Device
from ..recipes.assessment import looked_at
from ..recipes.recipe import ModelEntry, Recipe
from ..recipes.runner import Merged
from ..reports.charts import png
from ..reports.report import Report
from ..text import without_place

RECIPE, REPORT = "recipe.yaml", "report.json"


@dataclass(frozen=True)
class Record:
    """What is written beside the weights.

    Args:
        provenance: how they came about.
        alignments: that were found, one for every moving model.
        recipe: of a merge, as it is to be read by people.
    """

    provenance: Provenance
    alignments: Sequence[Alignment] = ()
    recipe: Recipe | None = None

    def write(self, folder: Path) -> None:
        """Into a folder that has the weights already."""
        for name, alignment in zip(alignment_files(len(self.alignments)), self.alignments, strict=True):
            alignment.save(folder / name)
        if self.recipe is not None:
            write_whole(folder / RECIPE, self._text(self.recipe).encode())
        self.provenance.save(folder)

    def _text(self, recipe: Recipe) -> str:
        """The recipe with what has to be known to run it again."""
        lines = ["# hf-rebasin merge recipe.yaml -o merged"]
        for one in self.provenance.inputs:
            if one.commit is None:
                lines.append(f"# {one.name} is a folder that is not on the Hub: say where it is.")
        return "\n".join([*lines, _yaml(recipe)])


def _yaml(recipe: Recipe) -> str:
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    if recipe.align is not None:  # what everything random hangs on is said, default or not
        said["align"] = {"solver": recipe.align.solver, "seed": recipe.align.seed, **said.get("align", {})}
    if said.get("refit") == {}:
        said["refit"] = True
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def alignment_files(number: int) -> list[str]:
    """`alignment.safetensors`, or one for every moving model where there are several."""
    return ["alignment.safetensors"] if number == 1 else [f"alignment-{i + 1}.safetensors" for i in range(number)]


def recorded(
    verb: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Input],
    data: Mapping[str, Batches | None] | None = None,
    *,
    notes: Iterable[str] = (),
    max_shard_size: str = "5GB",
    device: Device = None,
) -> Provenance:
    """How something comes about that is about to be written.

    Args:
        verb: what is done.
        settings: how.
        inputs: what is read, the fixed model first.
        data: `{what for: data}`.
        notes: what else is to be said of the result.
        max_shard_size: of a file of weights.
        device: where it is computed.
    """
    machine = Machine("cpu" if device is None else torch.device(device).type, torch.get_num_threads(), count())
    looked = {what: _settled(batches).describe() for what, batches in (data or {}).items() if batches is not None}
    return Provenance(verb, settings, tuple(inputs), looked, machine=machine, notes=tuple(notes), shard=max_shard_size)


def inputs_of(models: Sequence[Checkpoint]) -> list[Input]:
    """Models as a record has them; all their files are hashed."""
    return [reading() for reading in begun(models)]


def begun(models: Sequence[Checkpoint]) -> list[Callable[[], Input]]:
    """The same, model by model, while other things are done: each is hashed in a thread, and calling it waits.

    Raises:
        CheckpointError: the record of a model cannot be read, which is said before anything is computed.
    """
    records = [Provenance.beside(model) for model in models]

    def begin(name: str, model: Checkpoint, record: Provenance | None) -> Callable[[], Input]:
        future: Future[Input] = Future()

        def work() -> None:
            try:
                future.set_result(_input(name, model, record))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, name=f"sha256 {name}", daemon=True).start()  # an interrupt does not wait for it
        return future.result

    return [begin(*one) for one in zip(names_of(models), models, records, strict=True)]


def licences_of(models: Sequence[Checkpoint]) -> dict[str, Said]:
    """What the models say, by their names, as a record will have it unless a file was changed since it was made."""
    return {
        name: _licence(model, Provenance.beside(model)) for name, model in zip(names_of(models), models, strict=True)
    }


def _licence(model: Checkpoint, record: Provenance | None) -> Said:
    return licence_of(model, None if record is None else record.licences)


def _input(name: str, model: Checkpoint, record: Provenance | None) -> Input:
    if model.folder is None:
        return Input(name, model.commit)
    files = hashes(model.folder)
    if record is not None and any(record.outputs.get(file) != digest for file, digest in files.items()):
        record = None  # it is of what was there before
    made = () if record is None else record.inputs
    made_of = tuple(place for one in made for place in (one.made_of or (one.place,)))
    return Input(name, model.commit, _licence(model, record), files, made_of)


def record_of(
    recipe: Recipe, merged: Merged, inputs: Sequence[Input], *, max_shard_size: str = "5GB", device: Device = None
) -> Record:
    """The record of a merge."""
    opened = merged.opened
    whole = settled(recipe, merged)
    said = whole.model_dump(mode="json", exclude_none=True)
    said |= {key: False for key in ("align", "recalibrate") if key not in said}  # what is left out has a default
    provenance = recorded(
        "merge",
        said,
        inputs,
        {"looked at while merging": opened.data, "measured on": opened.evaluation},
        notes=dict.fromkeys(note for solution in merged.solutions for note in solution.notes),
        max_shard_size=max_shard_size,
        device=device,
    )
    return Record(provenance, [solution.alignment for solution in merged.solutions], whole)


def settled(recipe: Recipe, merged: Merged) -> Recipe:
    """A recipe as it was run: branches are commits, and folders are known by their names."""
    opened, entries = merged.opened, recipe.in_order()
    names = names_of(opened.models)
    knobs = recipe.method_knobs() if "weights" in recipe.parameters else dict(recipe.parameters)
    models = tuple(
        ModelEntry(model=name, revision=model.commit, parameters=entry.parameters)
        for name, model, entry in zip(names, opened.models, entries, strict=True)
    )
    return recipe.model_copy(
        update={
            "models": models,
            "publish": None,
            "base_model": None if recipe.base_model is None else names[0],
            "parameters": knobs,
            "data": None if opened.data is None else _settled(opened.data).settings,
            "evaluate": None if opened.evaluation is None else _settled(opened.evaluation).settings,
        }
    )


def names_of(models: Sequence[Checkpoint]) -> list[str]:
    """What models are called where nobody knows the folders of this machine; no two alike."""
    found: list[str] = []
    for model in models:
        name = model.name.rpartition("@")[0] or model.name if model.commit else _bare(model.name)
        alike = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({alike + 1})" if alike and model.commit is None else name)
    return found


def _bare(place: str) -> str:
    return Path(without_place(place)).name or place


def settings_of(batches: Batches) -> dict[str, Any]:
    """How data are described in a record."""
    return _settled(batches).settings.model_dump(mode="json", exclude_none=True)


def _settled(batches: Batches) -> Batches:
    """Data by the commit on the Hub, or by the name of the folder."""
    said, rows = batches.settings, batches.rows
    if rows.repository is not None:
        update: dict[str, Any] = {"dataset": rows.repository, "revision": rows.commit}
    else:
        update = {"dataset": _bare(said.dataset), "files": _bare_files(said)}
    return replace(batches, settings=said.model_copy(update=update))


def _bare_files(said: DataSettings) -> Any:
    def bare(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: bare(those) for split, those in files.items()}
        return files if files is None else _bare(files) if isinstance(files, str) else [_bare(one) for one in files]

    return bare(said.files)


def add_report(folder: Path, report: Report, recipe: Recipe, merged: Merged) -> None:
    """The numbers and curves of a merge go into its folder, without what is different in every run and place."""
    models = merged.models
    names = {model.name: name for model, name in zip(models, names_of(models), strict=True) if model.commit is None}
    recipe_text, looked = _yaml(settled(recipe, merged)), looked_at(merged.opened, _settled)
    shown = replace(report.renamed(names).timeless(), recipe=recipe_text, data=looked)
    for name, pair in shown.images("report").items():
        write_whole(folder / name, png(pair.lines, f"{pair.fixed} and {pair.moving}"))
    write_whole(folder / REPORT, shown.to_json().encode())
    Provenance.load(folder).save(folder)
