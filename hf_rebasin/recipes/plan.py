"""Plan a merge without doing it: no weights are downloaded, and nothing is written.

Memory is estimated from the way things are computed. For streamed merges, weight matching and refits the estimate is
within a factor of three (a slow test in `tests/recipes/test_plan.py` compares it with processes):

- A streamed merge needs little more than the libraries. A method that needs whole tensors holds those of one key.
- An alignment holds the similarities of one symmetry at a time, n × n in float64, five times over while the assignment
  is solved; those of symmetries with vectors throughout; and the two largest tensors. If residual streams are rotated,
  it also holds these tensors folded and in float64.
- Whatever uses data loads whole models, in float32, and so do solvers that use gradients. A refit sums products of the
  inputs of every layer, n × n in float64, twice; training the merge keeps gradients and their moments.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import registry
from ..alignment.correspondence import match_keys
from ..alignment.limits import refuse_moved_outputs, untying_note
from ..checkpoints import hub
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import report_left, select_in
from ..checkpoints.lazy import Absent
from ..checkpoints.licences import DeclaredLicence, Licence, LicenceOutcome, find_licence, merged_licence
from ..checkpoints.provenance import Provenance
from ..checkpoints.target import resolve_target
from ..errors import NoSpaceError
from ..solving.problem import matched_tensors, sole_free_dim
from ..symmetries.spec import Spec
from ..symmetries.table import canonical_view
from .composition import compose
from .recipe import Recipe
from .runner import AlignmentDecision, OpenedRecipe, decide_alignment, open_models, remark_on_merge

LIBRARIES = 400_000_000  # bytes that torch, transformers and this package take before anything is read
SIMILARITIES = 5  # float64 n × n matrices at a time: the product, its sum, and copies that the assignment makes
FOLDED = 4  # float64 copies of the largest tensor when norms are folded around a rotation


@dataclass(frozen=True, kw_only=True)
class PlannedInput:
    """A model that would go into a merge.

    Args:
        name: name as it was given.
        commit: commit on the Hub; None for a local folder.
        tensors: number of tensors.
        size: bytes of its weights.
        to_download: bytes that have yet to be downloaded.
        is_local: whether its values are on this machine; otherwise NaN and Inf are searched for while merging.
        licence: licence that its card declares.
    """

    name: str
    commit: str | None
    tensors: int
    size: int
    to_download: int
    is_local: bool
    licence: DeclaredLicence


@dataclass(frozen=True, kw_only=True)
class PlannedAlignment:
    """An alignment that a merge would compute.

    Args:
        models: names of the models that are aligned.
        solver: name of the solver.
        spec: the symmetries, with the groups that remain after all limits.
        notes: restrictions of the groups and their reasons, by model.
        untied: tensors that would no longer be tied if streams are rotated, in a sentence; None if there are none.
    """

    models: tuple[str, ...]
    solver: str
    spec: Spec
    notes: tuple[str, ...]
    untied: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources, inputs and effects of a merge.

    Args:
        recipe: the recipe.
        out: folder that would be written.
        models: the models, the fixed one first.
        alignment: the alignment; None if the models are merged as they are.
        data: `{use: description}`, where the use is "look at" or "measure on".
        remarks: what the merge may suffer from, and what helps.
        size: bytes of the weights of the result, at most.
        memory: estimated peak memory in bytes.
        memory_free: bytes that are free now; None if the system does not say.
        disk_free: bytes that are free on the disk of the output.
        licence: licence of the result.
        publishing: lines on where the result would be published.
    """

    recipe: Recipe
    out: Path
    models: tuple[PlannedInput, ...]
    alignment: PlannedAlignment | None
    data: Mapping[str, str]
    remarks: tuple[str, ...]
    size: int
    memory: int
    memory_free: int | None
    disk_free: int
    licence: LicenceOutcome
    publishing: tuple[str, ...] = ()


def make_plan(
    recipe: Recipe, out: Path, *, licence: str | Licence | None = None, publishing: Sequence[str] = ()
) -> Plan:
    """Plan a merge, and check everything that can be checked without downloading weights.

    Args:
        recipe: the recipe.
        out: folder that would be written.
        licence: licence that the publisher names.
        publishing: lines on where the result would be published.

    Raises:
        RebasinError: whatever would stop the merge and is known by now: models that do not fit, a broken tensor in a
            local model, a disk that is too small.
    """
    opened = open_models(recipe, values=False)
    opened.models[0].refuse_unloadable()
    inputs = tuple(_describe_inputs(recipe, opened.models))
    for checkpoint, model in zip(opened.models, inputs, strict=True):
        if model.is_local:
            checkpoint.refuse_broken()
    decision = None if recipe.align is None else decide_alignment(recipe, opened)
    alignment, remarks = None, tuple(remark_on_merge(recipe, opened))
    if decision is not None:
        remarks = (*decision.remarks, *remarks)
        if decision.spec is not None:
            alignment = _plan_alignment(recipe, opened, decision, inputs)
    data = {"look at": opened.data, "measure on": opened.evaluation}
    first = opened.models[0]
    if first.folder is not None:
        report_left(first.name, select_in(first.folder)[1])
    plan = Plan(
        recipe=recipe,
        out=out,
        models=inputs,
        alignment=alignment,
        data={use: batches.describe() for use, batches in data.items() if batches is not None},
        remarks=remarks,
        size=sum(output_size(recipe, model) for model in _written(recipe, opened))
        + (0 if alignment is None else _untied_bytes(alignment.spec, first)),
        memory=peak_memory(recipe, opened, alignment),
        memory_free=_free_memory(),
        disk_free=_free_space(resolve_target(out)),
        licence=merged_licence({model.name: model.licence for model in inputs}, licence),
        publishing=tuple(publishing),
    )
    _refuse_small_disk(plan)
    return plan


def _describe_inputs(recipe: Recipe, models: Sequence[Checkpoint]) -> list[PlannedInput]:
    inputs = []
    for entry, checkpoint in zip(recipe.in_order(), models, strict=True):
        is_local = not any(isinstance(part, Absent) for part in checkpoint.parts.values())
        folder, missing = checkpoint.folder, 0
        if folder is not None and checkpoint.commit is not None and not is_local:
            missing = hub.bytes_to_download(hub.split_revision(entry.model)[0], checkpoint.commit, folder)
        record = Provenance.find(checkpoint)
        inputs.append(
            PlannedInput(
                name=entry.model if entry.revision is None else f"{entry.model}@{entry.revision}",
                commit=checkpoint.commit,
                tensors=len(checkpoint.parts),
                size=sum(part.nbytes for part in checkpoint.parts.values()),
                to_download=missing,
                is_local=is_local,
                licence=find_licence(checkpoint, None if record is None else record.licences),
            )
        )
    return inputs


def _plan_alignment(
    recipe: Recipe, opened: OpenedRecipe, decision: AlignmentDecision, inputs: Sequence[PlannedInput]
) -> PlannedAlignment:
    given = decision.spec
    assert recipe.align is not None
    assert given is not None
    first, spec, notes = opened.models[0], given, []
    for i, (other, model) in enumerate(zip(opened.matched, inputs[1:], strict=True), 1):
        if decision.leaders[i - 1] != i:
            continue
        matched = match_keys(first, other, backbone_only=recipe.backbone_only)
        state = canonical_view(first, given.table).select(matched) if model.is_local else None
        spec, left_out = recipe.align.limits().on(given, state)
        refuse_moved_outputs(other, spec, spec.free)
        if state is None and spec.gauged:
            left_out.append("whether a gain is too small for its stream to be rotated is only known from its values")
        notes += [f"{model.name}: {note}" for note in left_out]
    untied = untying_note(spec, {norm.stream for norm in spec.gauged})
    names = tuple(inputs[i].name for i in sorted({leader for leader in decision.leaders if leader}))
    return PlannedAlignment(models=names, solver=recipe.align.solver, spec=spec, notes=tuple(notes), untied=untied)


def _written(recipe: Recipe, opened: OpenedRecipe) -> list[Checkpoint]:
    """Return models that have the tensors of the merge: the first one, or what is cut out of it by slices."""
    if not recipe.slices:
        return [opened.models[0]]
    return [part.first for part in compose(recipe, [opened.models[0], *opened.matched])]


def output_size(recipe: Recipe, first: Checkpoint) -> int:
    """Return the bytes of the weights of a merge: those of the first model, perhaps in another dtype."""
    dtype = recipe.result_dtype
    return sum(
        part.numel * (part.dtype if dtype is None or not part.dtype.is_floating_point else dtype).itemsize
        for checkpoint in (first, *first.submodels.values())
        for part in checkpoint.parts.values()
    )


def _untied_bytes(spec: Spec, first: Checkpoint) -> int:
    """Return the bytes of heads that rotations untie from their embeddings, and that are then stored separately."""
    disk_keys = canonical_view(first, spec.table).keys
    untied = [spec.ties[target] for target in spec.untied_by({norm.stream for norm in spec.gauged})]
    return sum(first.parts[disk_keys[key]].nbytes for key in untied if key in disk_keys)


def peak_memory(recipe: Recipe, opened: OpenedRecipe, alignment: PlannedAlignment | None) -> int:
    """Estimate the peak memory of a run in bytes, as the module describes."""
    first, count = opened.models[0], len(opened.models)
    largest = max(part.numel for part in first.parts.values())
    narrow = max(part.nbytes for part in first.parts.values())
    loaded = 4 * sum(part.numel for part in first.parts.values())
    method = registry.merge_method(recipe.merge_method)
    stages = [0 if method.streams else (count + 1) * 8 * largest]
    if alignment is not None:
        stages.append(_alignment_memory(alignment.spec, largest, narrow))
        stages.append(registry.solver(alignment.solver).memory(loaded, data=opened.data is not None))
    if opened.data is not None or opened.evaluation is not None:
        maps = [p for key, p in first.parts.items() if key.endswith("weight") and len(p.shape) > 1 and p.numel]
        sums = sum(16 * (p.numel // p.shape[0]) ** 2 for p in maps)
        stages.append((count + 1 + method.extra_copies) * loaded + (sums if recipe.fits else 0))
    return LIBRARIES + max(stages)


def _alignment_memory(spec: Spec, largest: int, narrow: int) -> int:
    """Estimate the bytes that aligning one model needs."""
    square = {name: 8 * spec.symmetries[name].size ** 2 for name in spec.free}
    vectors = {
        block.dims[dim].name
        for tensor in matched_tensors(spec)
        for block in tensor.blocks
        if (dim := sole_free_dim(spec, block)) is not None
    }
    with_vectors = sum(square.get(name or "", 0) for name in vectors)
    folded = FOLDED * 8 * largest if spec.gauged else 0
    return SIMILARITIES * max(square.values(), default=0) + with_vectors + 2 * narrow + folded


def _refuse_small_disk(plan: Plan) -> None:
    to_download = sum(model.to_download for model in plan.models)
    if plan.size > plan.disk_free:
        raise NoSpaceError(
            f"{plan.out} needs {plan.size / 1e9:.2f} GB, and {plan.disk_free / 1e9:.2f} GB are free there"
        )
    if to_download:
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        output = plan.size if _filesystem(cache) == _filesystem(resolve_target(plan.out)) else 0
        if to_download + output > (free := _free_space(cache)):
            also = f" in addition to the {output / 1e9:.2f} GB of the merge" if output else ""
            raise NoSpaceError(
                f"{to_download / 1e9:.2f} GB are to be downloaded to {cache}{also}, and {free / 1e9:.2f} GB are free "
                "there; make room, or set HF_HOME to a disk with enough"
            )


def _existing_parent(path: Path) -> Path:
    """Return the nearest folder that exists, the path itself or one above it."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free_space(path: Path) -> int:
    return shutil.disk_usage(_existing_parent(path)).free


def _filesystem(path: Path) -> int:
    return _existing_parent(path).stat().st_dev


def _free_memory() -> int | None:
    """Return the bytes of memory that are available; None if the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
