"""What a merge would take and do, found out without doing it: no weights are fetched, and nothing is written.

Memory is estimated from how things are computed. For streams, weight matching and refits it errs by less than a factor
of three (`tests/test_planning.py`, slow, compares it with what processes took):

- A merge streams chunks: what the libraries take, and no more. A method that needs whole tensors takes one key's.
- An alignment holds the similarities of one symmetry at a time, n × n in float64, five times over while the assignment
  is solved, those of the symmetries that have vectors throughout, and the two largest tensors; where streams are
  rotated, these also as they are folded and widened.
- What looks at data loads models whole, in float32, and so do solvers that descend; a refit sums products of the
  inputs of every layer, n × n in float64, twice; what trains the merge keeps gradients and their moments.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import registry
from ..alignment.correspondence import lined_state, lined_up
from ..alignment.limits import kept_apart
from ..checkpoints import hub
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import resolved
from ..checkpoints.lazy import Absent
from ..checkpoints.licences import Licence, Outcome, Said, licence_of, outcome
from ..checkpoints.provenance import Provenance
from ..errors import NoSpaceError
from ..solving.gradient_descent import Descent
from ..solving.problem import lone, matched_tensors
from ..symmetries.detection import spec_of
from ..symmetries.spec import Spec
from .recipe import Recipe
from .runner import Opened, opened

LIBRARIES = 400_000_000  # bytes that torch, transformers and this package take before anything is read
SIMILARITIES = 5  # n × n in float64 at a time: the product, its sum, what the assignment makes of them
FOLDED = 4  # float64 copies of the largest tensor where norms are folded around a rotation


@dataclass(frozen=True)
class Input:
    """A model that would go into a merge.

    Args:
        name: as it was given.
        commit: of the Hub, None for a folder here.
        tensors: how many.
        size: bytes of its weights.
        to_download: bytes that are still to be fetched.
        here: whether its values could be looked at; else NaN and Inf are looked for while merging.
        licence: what its card says.
    """

    name: str
    commit: str | None
    tensors: int
    size: int
    to_download: int
    here: bool
    licence: Said


@dataclass(frozen=True)
class Moves:
    """What an alignment may move.

    Args:
        solver: its name.
        spec: the symmetries with the groups that are left.
        notes: what was left out of the groups and why, by model.
        apart: what would be stored apart from what it is tied to, if streams are rotated.
    """

    solver: str
    spec: Spec
    notes: tuple[str, ...]
    apart: str | None


@dataclass(frozen=True)
class Plan:
    """What a merge would take and do.

    Args:
        recipe: says what is wanted.
        out: the folder that would be written.
        models: what goes in, the fixed one first.
        moves: what an alignment may move; None without one.
        looks: "look at" or "measure on", and what data.
        size: bytes of its weights, at most.
        memory: bytes at the peak, estimated.
        memory_free: bytes that are free now; None where the system does not say.
        disk_free: bytes that are free where the merge goes.
        licence: which one the merge has.
        publishing: lines on where it would go besides.
    """

    recipe: Recipe
    out: Path
    models: tuple[Input, ...]
    moves: Moves | None
    looks: Mapping[str, str]
    size: int
    memory: int
    memory_free: int | None
    disk_free: int
    licence: Outcome
    publishing: tuple[str, ...] = ()


def planned(
    recipe: Recipe, out: Path, *, licence: str | Licence | None = None, publishing: Sequence[str] = ()
) -> Plan:
    """Check all of a recipe that can be known without weights that are elsewhere.

    Args:
        recipe: says what is wanted.
        out: the folder that would be written.
        licence: the one that the publisher names.
        publishing: lines on where the merge would go besides.

    Raises:
        RebasinError: whatever would stop the merge and can be known: models that do not fit, a broken tensor in one
            that is here, a disk that is too small.
    """
    found = opened(recipe, values=False)
    inputs = tuple(_inputs(recipe, found.models))
    for checkpoint, one in zip(found.models, inputs, strict=True):
        if one.here:
            checkpoint.refuse_broken()
    moves = None if recipe.align is None else _moves(recipe, found, inputs)
    looked = {"look at": found.data, "measure on": found.evaluation}
    first = found.models[0]
    plan = Plan(
        recipe,
        out,
        inputs,
        moves,
        {what: batches.describe() for what, batches in looked.items() if batches is not None},
        size_of(recipe, first) + (0 if moves is None else _untied_bytes(moves.spec, first)),
        memory_of(recipe, found, moves),
        _free_memory(),
        _free(resolved(out)),
        outcome({one.name: one.licence for one in inputs}, licence),
        tuple(publishing),
    )
    _refuse_small_disk(plan)
    return plan


def _inputs(recipe: Recipe, models: Sequence[Checkpoint]) -> list[Input]:
    found = []
    for entry, checkpoint in zip(recipe.in_order(), models, strict=True):
        here = not any(isinstance(part, Absent) for part in checkpoint.parts.values())
        folder, missing = checkpoint.folder, 0
        if folder is not None and checkpoint.commit is not None and not here:
            missing = hub.to_download(hub.named(entry.model)[0], checkpoint.commit, folder)
        name = entry.model if entry.revision is None else f"{entry.model}@{entry.revision}"
        size = sum(part.nbytes for part in checkpoint.parts.values())
        record = Provenance.beside(checkpoint)
        licence = licence_of(checkpoint, None if record is None else record.licences)
        found.append(Input(name, checkpoint.commit, len(checkpoint.parts), size, missing, here, licence))
    return found


def _moves(recipe: Recipe, found: Opened, inputs: Sequence[Input]) -> Moves:
    assert recipe.align is not None
    first, notes = found.models[0], []
    given = spec = spec_of(first)
    for other, one in zip(found.lined, inputs[1:], strict=True):
        lined = lined_up(first, other, backbone_only=recipe.backbone_only)
        state = lined_state(first, lined, given.table.prefix) if one.here else None
        spec, left_out = recipe.align.limits().on(given, state)
        if state is None and spec.gauged:
            left_out.append("whether a gain is too small for its stream to be rotated is seen in its values")
        notes += [f"{one.name}: {note}" for note in left_out]
    apart = kept_apart(spec, {norm.stream for norm in spec.gauged})
    return Moves(recipe.align.solver, spec, tuple(notes), apart)


def size_of(recipe: Recipe, first: Checkpoint) -> int:
    """Bytes of the weights of a merge, which are those of the first model, perhaps in another dtype."""
    dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
    return sum(
        part.numel * (part.dtype if dtype is None or not part.dtype.is_floating_point else dtype).itemsize
        for part in first.parts.values()
    )


def _untied_bytes(spec: Spec, first: Checkpoint) -> int:
    """What is stored once more where rotations take a head and its embedding apart."""
    names = first.canonical(spec.table.prefix)
    kept = [spec.ties[target] for target in spec.untied_by({norm.stream for norm in spec.gauged})]
    return sum(first.parts[names[key]].nbytes for key in kept if key in names)


def memory_of(recipe: Recipe, found: Opened, moves: Moves | None) -> int:
    """Bytes at the peak of a run, estimated; the module says how."""
    first, count = found.models[0], len(found.models)
    largest = max(part.numel for part in first.parts.values())
    narrow = max(part.nbytes for part in first.parts.values())
    loaded = 4 * sum(part.numel for part in first.parts.values())
    method = registry.find("merge_methods", recipe.merge_method)
    streams = getattr(method, "ELEMENTWISE", False) or hasattr(method, "sums")
    stages = [0 if streams else (count + 1) * 8 * largest]
    if moves is not None:
        stages.append(_alignment(moves.spec, largest, narrow))
        solver = registry.find("solvers", moves.solver).Solver
        if issubclass(solver, Descent) or (getattr(solver, "TAKES_DATA", False) and found.data is not None):
            stages.append(4 * loaded)  # both models, what is between them, and gradients or the moved copy
    if found.data is not None or found.evaluation is not None:
        maps = [p for key, p in first.parts.items() if key.endswith("weight") and len(p.shape) > 1 and p.numel]
        sums = sum(16 * (p.numel // p.shape[0]) ** 2 for p in maps)
        stages.append((count + 1 + getattr(method, "COPIES", 0)) * loaded + (sums if recipe.fits else 0))
    return LIBRARIES + max(stages)


def _alignment(spec: Spec, largest: int, narrow: int) -> int:
    """Bytes that aligning one model takes."""
    square = {name: 8 * spec.symmetries[name].size ** 2 for name in spec.free}
    vectors = {
        block.dims[place].name
        for tensor in matched_tensors(spec)
        for block in tensor.blocks
        if (place := lone(spec, block)) is not None
    }
    kept = sum(square.get(name or "", 0) for name in vectors)
    folded = FOLDED * 8 * largest if spec.gauged else 0
    return SIMILARITIES * max(square.values(), default=0) + kept + 2 * narrow + folded


def _refuse_small_disk(plan: Plan) -> None:
    fetched = sum(one.to_download for one in plan.models)
    if plan.size > plan.disk_free:
        raise NoSpaceError(
            f"{plan.out} needs {plan.size / 1e9:.2f} GB, and {plan.disk_free / 1e9:.2f} GB are free there"
        )
    if fetched:
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        beside = plan.size if _device(cache) == _device(resolved(plan.out)) else 0
        if fetched + beside > (free := _free(cache)):
            also = f" beside the {beside / 1e9:.2f} GB of the merge" if beside else ""
            raise NoSpaceError(
                f"{fetched / 1e9:.2f} GB are to be downloaded to {cache}{also}, and {free / 1e9:.2f} GB are free "
                "there; make room, or set HF_HOME to a place that has it"
            )


def _there(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def _free(path: Path) -> int:
    return shutil.disk_usage(_there(path)).free


def _device(path: Path) -> int:
    return _there(path).stat().st_dev


def _free_memory() -> int | None:
    """Bytes that programs can still take, where the system says so."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
