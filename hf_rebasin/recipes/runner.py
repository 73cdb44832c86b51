"""A recipe, run: models and data are opened, models aligned, merged, fitted and recalibrated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import registry
from ..alignment.alignment import Alignment
from ..alignment.compatibility import paired
from ..alignment.correspondence import lined_state, lined_up, untied_like
from ..checkpoints import hub
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import Tensors
from ..data.batches import Batches, open_data
from ..errors import MismatchError, OptionError
from ..merging.fitting import computing, with_values
from ..merging.merge import averaged, combine, finish_with, methods_with
from ..merging.methods import refit
from ..merging.parameters import varies
from ..merging.recalibration import has_statistics, recalibrate, repair
from ..modules.functional import Device
from ..solving.align import solved
from ..solving.gradient_descent import OF_WEIGHTS
from ..solving.solution import Clock, Solution, Solver, solver_with
from ..symmetries.detection import spec_of
from .recipe import Recipe, solvers_in


@dataclass(frozen=True)
class Opened:
    """What a recipe names.

    Args:
        models: as they are, the fixed one first.
        lined: the others with their rows in the order of the first.
        data: what is looked at while merging.
        evaluation: what the merge is measured on.
    """

    models: tuple[Checkpoint, ...]
    lined: tuple[Checkpoint, ...]
    data: Batches | None = None
    evaluation: Batches | None = None


@dataclass(frozen=True)
class Merged:
    """What a recipe gave.

    Args:
        checkpoint: the merge; what is elementwise in it is computed when it is saved.
        opened: what went into it.
        solutions: one per model that was aligned.
        moved: all models but the first in its coordinates.
        seconds: where the time went.
    """

    checkpoint: Checkpoint
    opened: Opened
    solutions: tuple[Solution, ...] = ()
    moved: tuple[Checkpoint, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        return self.opened.models


def opened(recipe: Recipe, *, values: bool = True, measuring: bool = True, progress: bool = False) -> Opened:
    """Open all that a recipe names; what does not fit is said here, before anything is computed.

    Args:
        recipe: names it.
        values: False is for planning: weights that are on the Hub alone stay there.
        measuring: False where the merge is all that is wanted: what it is measured on is not opened.
        progress: show the progress bars of downloads.
    """
    entries = recipe.in_order()
    methods_with(recipe.merge_method, recipe.method_knobs(), len(entries))
    with hub.once():
        models = [
            Checkpoint.open(entry.model, revision=entry.revision, values=values, progress=progress)
            for entry in entries
        ]
    for checkpoint in models:
        checkpoint.refuse_quantised()
    first, *others = models
    lined = [paired(first, other, recipe.assume, backbone_only=recipe.backbone_only) for other in others]
    first = untied_like(first, lined)
    keys: Collection[str] = first.parts
    for other in lined:
        keys = lined_up(first, other, backbone_only=recipe.backbone_only)
    methods_with(recipe.merge_method, recipe.method_knobs(), len(entries), averaged(first, keys))
    data = None if recipe.data is None else open_data(recipe.data, first)
    evaluation = None if recipe.evaluate is None or not measuring else open_data(recipe.evaluate, first)
    if evaluation is not None and not evaluation.labelled:
        raise OptionError(f"evaluate: {evaluation.describe()}; a loss needs labels, so say which column (labels)")
    if data is not None and recipe.evaluate is None and not _looks(recipe, first):
        raise OptionError("there are data, and nothing of this merge looks at them; leave out data, or add evaluate")
    return Opened((first, *others), tuple(lined), data, evaluation)


def looking(recipe: Recipe) -> list[type[Solver]]:
    """The solvers that look at data where there are any: the one a recipe names, and those it starts from."""
    said = solvers_in(None if recipe.align is None else recipe.align.model_dump())
    found = [(registry.find("solvers", name).Solver, knobs.get("cost")) for _, name, knobs in said]
    return [kind for kind, cost in found if getattr(kind, "TAKES_DATA", False) and cost not in OF_WEIGHTS]


def _looks(recipe: Recipe, first: Checkpoint) -> bool:
    """Whether anything on the way to the merge looks at data."""
    return (
        bool(looking(recipe))
        or recipe.fits
        or recipe.recalibrate == "repair"
        or (recipe.recalibrate is not None and has_statistics(first))
    )


def run(
    recipe: Recipe,
    *,
    found: Opened | None = None,
    alignments: Sequence[Alignment] | None = None,
    device: Device = None,
    progress: bool = False,
) -> Merged:
    """Align all models of a recipe to the first (or to its `base_model`), and merge them.

    Args:
        recipe: says how.
        found: what it names, if that is open already.
        alignments: that are known already, one for every model but the first.
        device: where it is computed.
        progress: show progress bars.
    """
    found, clock = opened(recipe, progress=progress) if found is None else found, Clock()
    first, moved = found.models[0], found.lined
    solutions: tuple[Solution, ...] = ()
    if recipe.align is not None:
        if alignments is None:
            with clock("aligning"):
                solutions = tuple(_solutions(recipe, found, device, progress))
            alignments = [solution.alignment for solution in solutions]
        if len(alignments) != len(moved):
            raise MismatchError(f"{len(alignments)} alignments for {len(moved)} models that are to be moved")
        onto = partial(_moved_onto, first) if recipe.backbone_only else Alignment.apply
        moved = tuple(onto(alignment, other) for alignment, other in zip(alignments, moved, strict=True))
    checkpoint = merged(recipe, [first, *moved], found.data, clock, device=device, progress=progress)
    return Merged(checkpoint, found, solutions, moved, clock.seconds)


def _solutions(recipe: Recipe, found: Opened, device: Device, progress: bool) -> list[Solution]:
    assert recipe.align is not None
    for checkpoint in found.models:
        checkpoint.refuse_broken()
    first = found.models[0]
    solver, spec = solver_with(recipe.align.solver, recipe.align.knobs()), spec_of(first)
    solve = partial(solved, solver, spec, first, limits=recipe.align.limits(), seed=recipe.align.seed, device=device)
    data = found.data if looking(recipe) else None
    solve = partial(solve, backbone_only=recipe.backbone_only, data=data, progress=progress)
    return [solve(moving=other) for other in found.lined]


def merged(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    data: Batches | None,
    clock: Clock,
    *,
    device: Device = None,
    progress: bool = False,
) -> Checkpoint:
    """Merge models as a recipe says, with all that comes after it.

    Args:
        recipe: says how.
        models: in one system of coordinates.
        data: what is looked at.
        clock: gets the seconds.
        device: where it is computed.
        progress: show progress bars.
    """
    knobs = recipe.method_knobs()
    dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
    out = combine(models, recipe.merge_method, knobs, dtype=dtype, backbone_only=recipe.backbone_only)
    if data is None:
        return out
    shares = shares_in(recipe, len(models))
    for (doing, _), finish in _finishing(recipe, shares):
        with clock(doing):
            out = finish(out, models, data, device=device, progress=progress)
    with clock("recalibrating"):
        if recipe.recalibrate == "repair":
            out = repair(out, models, data, weights=shares, device=device, progress=progress)
        elif recipe.recalibrate == "statistics":
            out = recalibrated(out, data, device=device, progress=progress)
    return out


def _finishing(
    recipe: Recipe, shares: list[float] | None
) -> Iterator[tuple[tuple[str, str], Callable[..., Checkpoint]]]:
    """What is done to the whole merge, and the words for it: while it lasts, and after it."""
    if recipe.refit is not None:
        yield refit.WORDS, partial(refit.finish, weights=shares, ridge=recipe.refit.ridge)
        if recipe.merge_method == "refit":  # said twice
            return
    finish = finish_with(recipe.merge_method, recipe.method_knobs())
    if finish is not None:
        yield registry.find("merge_methods", recipe.merge_method).WORDS, finish


def what_was_done(recipe: Recipe) -> str:
    """To a merge after its average, in words; empty where that is what it is."""
    done = [did for (_, did), _ in _finishing(recipe, None)] + ["repaired"] * (recipe.recalibrate == "repair")
    return " and ".join([", ".join(done[:-1]), done[-1]] if len(done) > 1 else done)


def shares_in(recipe: Recipe, count: int) -> list[float] | None:
    """The share of every model in a merge, where its method has weights or one number t; None for equal ones.

    They are equal, too, where the numbers vary from tensor to tensor: nothing but a control is fitted to these then.
    """
    knobs = recipe.method_knobs()
    if varies(registry.find("merge_methods", recipe.merge_method).merge, knobs):
        return None
    if "t" in knobs and count == 2:
        return [1 - float(knobs["t"]), float(knobs["t"])]
    return knobs.get("weights")


def recalibrated(
    checkpoint: Checkpoint, data: Batches, *, exact: bool = False, device: Device = None, progress: bool = False
) -> Checkpoint:
    """The same with BatchNorm statistics of the data; as it is, where there are none."""
    if not has_statistics(checkpoint):
        return checkpoint
    (module,), _ = computing([checkpoint], device)
    recalibrate(module, data, exact=exact, device=device, progress=progress)
    return with_values(checkpoint, module)


def _moved_onto(first: Checkpoint, alignment: Alignment, other: Checkpoint) -> Checkpoint:
    """The backbone of another model as a part of the first: what its own head reads, if it has one, is no matter."""
    spec = alignment.spec
    prefix = spec.table.prefix
    names, there = first.canonical(prefix), lined_state(first, lined_up(first, other, backbone_only=True), prefix)
    moved = alignment.on(spec.within(there), there)
    return Checkpoint(
        Tensors({names[n]: part for n, part in moved.parts.items()}),
        name=other.name,
        sources=other.sources,
        commit=other.commit,
    )
