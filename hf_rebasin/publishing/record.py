"""Records that a verb writes with the weights: card, recipe, alignments, `rebasin.json`, measurements in a report."""

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
from ..checkpoints.folder import RECIPE, RECORDS, REPORT, write_atomically
from ..checkpoints.licences import DeclaredLicence, find_licence
from ..checkpoints.provenance import InputRecord, Machine, Provenance, hash_files
from ..checkpoints.side_files import holds_weights, is_known_side_file
from ..checkpoints.target import resolve_target
from ..data.batches import Batches
from ..modules.distributed import world_size
from ..modules.functional import Device
from ..recipes.assessment import describe_data
from ..recipes.recipe import Recipe
from ..recipes.runner import MergeResult, recalibrates
from ..reports.charts import render_png
from ..reports.report import Report
from ..text import replace_names, shorten_path
from .card import REPORT_STEM, write_card


@dataclass(frozen=True)
class MergeRecord:
    """Records to be written next to the weights of a merged or otherwise derived model.

    Args:
        provenance: record of how it was made.
        alignments: alignments that were found, one per moving model.
        recipe: recipe of a merge, for people to read.
    """

    provenance: Provenance
    alignments: Sequence[Alignment] = ()
    recipe: Recipe | None = None

    def write(self, folder: Path, name: str) -> None:
        """Write the records and a card into a folder that has the weights already, and will have this name."""
        for file, alignment in zip(alignment_files(len(self.alignments)), self.alignments, strict=True):
            alignment.save(folder / RECORDS / file)
        if self.recipe is not None:
            write_atomically(folder / RECIPE, self._text(self.recipe).encode())
        _write_provenance(folder, self.provenance, name)

    def save(self, checkpoint: Checkpoint, out: Path, **options: Any) -> Path:
        """Write a model with its records; `options` are those of `Checkpoint.save`."""
        name = resolve_target(out).name
        return checkpoint.save(out, beside=lambda folder: self.write(folder, name), **options)

    def _text(self, recipe: Recipe) -> str:
        """Format the recipe with comments on how to run it again."""
        lines = ["# hf-rebasin merge recipe.yaml -o merged"]
        for model in self.provenance.inputs:
            if model.commit is None:
                lines.append(f"# {model.name} is a folder that is not on the Hub: say where it is.")
        return "\n".join([*lines, _recipe_yaml(recipe)])


def _recipe_yaml(recipe: Recipe) -> str:
    content = recipe.model_dump(mode="json", exclude_defaults=True) | {"convention": recipe.convention}
    if recipe.align is not None:  # solver and seed are always written, as everything random depends on them
        content["align"] = {"solver": recipe.align.solver, "seed": recipe.align.seed, **content.get("align", {})}
    if content.get("refit") == {}:
        content["refit"] = True
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _write_provenance(folder: Path, provenance: Provenance, name: str, report: Report | None = None) -> None:
    """Write the record of everything that is in a folder, and the card that tells of it."""
    provenance = provenance.hash_outputs(folder)
    write_card(folder, provenance, name, report)
    provenance.save(folder)


def alignment_files(number: int) -> list[str]:
    """Names of the alignment files for a number of moving models: `alignment.safetensors` if there is only one."""
    return ["alignment.safetensors"] if number == 1 else [f"alignment-{i + 1}.safetensors" for i in range(number)]


def make_provenance(
    verb: str,
    settings: Mapping[str, Any],
    inputs: Sequence[InputRecord],
    data: Mapping[str, Batches | None] | None = None,
    *,
    notes: Iterable[str] = (),
    max_shard_size: str = "5GB",
    device: Device = None,
) -> Provenance:
    """Make the provenance of a model that is about to be written.

    Args:
        verb: command that is run.
        settings: its settings.
        inputs: models that are read, the fixed model first.
        data: `{purpose: data}`.
        notes: remarks on the result.
        max_shard_size: maximum size of a weight file.
        device: device to compute on.
    """
    machine = Machine("cpu" if device is None else torch.device(device).type, torch.get_num_threads(), world_size())
    described = {
        purpose: _pin_data(batches).describe() for purpose, batches in (data or {}).items() if batches is not None
    }
    return Provenance(
        verb=verb,
        recipe=settings,
        inputs=tuple(inputs),
        data=described,
        machine=machine,
        notes=tuple(notes),
        shard=max_shard_size,
    )


def record_inputs(models: Sequence[Checkpoint]) -> list[InputRecord]:
    """Record models as inputs, with the hashes of all their files."""
    return [wait() for wait in start_hashing(models)]


def start_hashing(models: Sequence[Checkpoint]) -> list[Callable[[], InputRecord]]:
    """Start hashing models in background threads, and return one function per model that waits for its record.

    Raises:
        CheckpointError: the existing record of a model cannot be read; raised before anything is computed.
    """
    records = [Provenance.find(model) for model in models]

    def start(name: str, model: Checkpoint, record: Provenance | None) -> Callable[[], InputRecord]:
        future: Future[InputRecord] = Future()

        def work() -> None:
            try:
                future.set_result(_make_input_record(name, model, record))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, name=f"sha256 {name}", daemon=True).start()  # not waited for on an interrupt
        return future.result

    return [start(*arguments) for arguments in zip(public_names(models), models, records, strict=True)]


def find_licences(models: Sequence[Checkpoint]) -> dict[str, DeclaredLicence]:
    """Find the licences of models by name, as `record_inputs` does if no file was changed since its record."""
    return {
        name: _find_licence(model, Provenance.find(model))
        for name, model in zip(public_names(models), models, strict=True)
    }


def _find_licence(model: Checkpoint, record: Provenance | None) -> DeclaredLicence:
    return find_licence(model, None if record is None else record.licences)


def _make_input_record(name: str, model: Checkpoint, record: Provenance | None) -> InputRecord:
    if model.folder is None:
        return InputRecord(name=name, commit=model.commit)
    files = hash_files(model.folder, remembered=True)
    if record is not None and any(
        record.outputs.get(file) != digest
        for file, digest in files.items()
        if file in record.outputs or holds_weights(file) or is_known_side_file(Path(file).name)
    ):
        record = None  # the model was changed since
    inputs = () if record is None else record.inputs
    made_of = tuple(reference for entry in inputs for reference in (entry.made_of or (entry.reference,)))
    licence = _find_licence(model, record)
    return InputRecord(name=name, commit=model.commit, licence=licence, files=files, made_of=made_of)


def record_merge(
    recipe: Recipe,
    merged: MergeResult,
    inputs: Sequence[InputRecord],
    *,
    max_shard_size: str = "5GB",
    device: Device = None,
) -> MergeRecord:
    """Make the records of a merge.

    Args:
        recipe: recipe that was run.
        merged: its result.
        inputs: records of the models that were read.
        max_shard_size: maximum size of a weight file.
        device: device it was computed on.
    """
    opened = merged.opened
    pinned = pin_revisions(recipe, merged)
    content = pinned.model_dump(mode="json", exclude_none=True)
    if not recalibrates(recipe, opened):
        content.pop("recalibrate", None)
    content |= {key: False for key in ("align", "recalibrate") if key not in content}  # absent keys have defaults
    provenance = make_provenance(
        "merge",
        content,
        inputs,
        {"looked at while merging": opened.data, "measured on": opened.evaluation},
        notes=[replace_names(note, _local_names(merged.models)) for note in merged.notes],
        max_shard_size=max_shard_size,
        device=device,
    )
    return MergeRecord(provenance, [solution.alignment for solution in merged.solutions], pinned)


def pin_revisions(recipe: Recipe, merged: MergeResult) -> Recipe:
    """Return a recipe as it was run, with commits instead of branches and names instead of local folders."""
    opened, entries = merged.opened, recipe.in_order()
    names = {
        (entry.model, entry.revision): (name, model.commit)
        for entry, name, model in zip(entries, public_names(opened.models), opened.models, strict=True)
    }
    return recipe.renamed(names).model_copy(
        update={
            "publish": None,
            "align": recipe.align if merged.solutions else None,
            "data": None if opened.data is None else _pin_data(opened.data).settings,
            "evaluate": None if opened.evaluation is None else _pin_data(opened.evaluation).settings,
        }
    )


def public_names(models: Sequence[Checkpoint]) -> list[str]:
    """Return unique names of models without local folders: ids on the Hub, or last components of paths."""
    names: list[str] = []
    for model in models:
        name = model.name.rpartition("@")[0] or model.name if model.commit else _bare_name(model.name)
        duplicates = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({duplicates + 1})" if duplicates and model.commit is None else name)
    return names


def _local_names(models: Sequence[Checkpoint]) -> dict[str, str]:
    """Return `{name of a local folder: its name without the path}`."""
    named = zip(models, public_names(models), strict=True)
    return {model.name: name for model, name in named if model.commit is None}


def _bare_name(model: str) -> str:
    return Path(shorten_path(model)).name or model


def pinned_settings(batches: Batches) -> dict[str, Any]:
    """Return the settings of data for a record, with a commit and without local folders."""
    return _pin_data(batches).settings.model_dump(mode="json", exclude_none=True)


def _pin_data(batches: Batches) -> Batches:
    """Return data with settings that name a commit on the Hub, or a local folder by its name."""
    settings, rows = batches.settings, batches.rows
    if rows.repository is not None:
        update: dict[str, Any] = {"dataset": rows.repository, "revision": rows.commit}
    else:
        update = {"dataset": _bare_name(settings.dataset), "files": _bare_files(settings.files)}
    return replace(batches, settings=settings.model_copy(update=update))


def _bare_files(files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _bare_files(entry) for split, entry in files.items()}
    if files is None:
        return None
    return _bare_name(files) if isinstance(files, str) else [_bare_name(file) for file in files]


def add_report(folder: Path, report: Report, recipe: Recipe, merged: MergeResult) -> None:
    """Write the numbers and curves of a merge into its folder, without anything that varies by run or machine."""
    names = _local_names(merged.models)
    recipe_text, data_text = _recipe_yaml(pin_revisions(recipe, merged)), describe_data(merged.opened, _pin_data)
    published = replace(report.renamed(names).timeless(), recipe=recipe_text, data=data_text)
    records = folder / RECORDS
    records.mkdir(exist_ok=True)
    for name, pair in published.images(REPORT_STEM).items():
        write_atomically(records / name, render_png(pair.lines, f"{pair.fixed} and {pair.moving}"))
    write_atomically(records / REPORT, published.to_json().encode())
    _write_provenance(folder, Provenance.load(folder), resolve_target(folder).name, published)
