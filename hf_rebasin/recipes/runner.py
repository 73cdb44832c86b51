"""Run a recipe: open its models and data, then align, merge, fit and recalibrate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import registry
from ..alignment.alignment import Alignment
from ..alignment.compatibility import match_models
from ..alignment.correspondence import match_keys, match_submodels, untie_for_merge
from ..alignment.rows import absent_in
from ..checkpoints import hub
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import Absent, Tensors
from ..data.batches import Batches, open_data, takes_data
from ..errors import CheckpointError, MismatchError, OptionError, RebasinError
from ..evaluation.comparison import Cosines, matrix_cosines
from ..merging.fitting import load_modules, refuse_submodels, with_module_values
from ..merging.merge import averaged_keys, combine, keep_own_rows
from ..merging.methods import refit
from ..merging.recalibration import (
    describe_averaged_statistics,
    find_statistics,
    has_statistics,
    recalibrate,
    repair,
)
from ..modules.functional import Device
from ..registry import SolverClass
from ..solving.align import align_checkpoints
from ..solving.gradient_descent import WEIGHT_COSTS
from ..solving.solution import Clock, Solution, make_solver
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec
from ..symmetries.table import canonical_view, table_for
from .recipe import Recipe, solvers_in

ALIKE = 0.5  # cosine from which on models count as fine-tunes of one base; that of models trained apart is near zero


@dataclass(frozen=True, kw_only=True)
class OpenedRecipe:
    """The models and data of a recipe, opened.

    Args:
        models: the models as they are, the fixed one first.
        matched: the other models, with labels and vocabulary in the order of the first one's.
        data: data that are used while merging.
        evaluation: data that the merge is measured on.
    """

    models: tuple[Checkpoint, ...]
    matched: tuple[Checkpoint, ...]
    data: Batches | None = None
    evaluation: Batches | None = None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """Result of running a recipe.

    Args:
        checkpoint: the merge; if its method is elementwise, it is computed when it is saved.
        opened: the models and data that went into it.
        solutions: one solution per model that was aligned.
        moved: all models but the first, in the coordinates of the first.
        remarks: what the merge may suffer from, such as statistics that were averaged, and what helps.
        seconds: `{phase: seconds}`.
    """

    checkpoint: Checkpoint
    opened: OpenedRecipe
    solutions: tuple[Solution, ...] = ()
    moved: tuple[Checkpoint, ...] = ()
    remarks: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The models as they are, the fixed one first."""
        return self.opened.models

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say on the alignments and the merge, each once."""
        on_alignments = (note for solution in self.solutions for note in solution.notes)
        return tuple(dict.fromkeys([*on_alignments, *self.remarks]))


def open_models(
    recipe: Recipe, *, values: bool = True, with_evaluation: bool = True, progress: bool = False
) -> OpenedRecipe:
    """Open the models and data of a recipe, and refuse what does not fit before anything is computed.

    Args:
        recipe: the recipe.
        values: download weights; False, for planning, leaves them on the Hub.
        with_evaluation: open the data that the merge is measured on; False if only the merge is wanted.
        progress: show the progress bars of downloads.

    Raises:
        RebasinError: models, parameters or data that do not fit each other.
    """
    entries, method = recipe.in_order(), recipe.resolved_method()
    method.refuse_unfit(len(entries))
    with hub.pin_commits():
        models = [
            Checkpoint.open(entry.model, revision=entry.revision, values=values, progress=progress)
            for entry in entries
        ]
    for checkpoint in models:
        checkpoint.refuse_quantised()
    first, *others = models
    first, matched = match_models(
        first, others, recipe.assume, vocabulary=recipe.vocabulary, backbone_only=recipe.backbone_only
    )
    first = untie_for_merge(first, matched)
    keys: Collection[str] = first.parts
    for other in matched:
        keys = match_keys(first, other, backbone_only=recipe.backbone_only)
        if not recipe.backbone_only:
            match_submodels(first, other)
    method.functions_by_key(len(entries), averaged_keys(first, keys, backbone_only=recipe.backbone_only))
    if recipe.fits or recipe.recalibrate == "repair":
        refuse_submodels(models)
    data = None if recipe.data is None else open_data(recipe.data, first)
    evaluation = None
    if recipe.evaluate is not None and with_evaluation:
        evaluation = open_data(recipe.evaluate, first, needs_labels=True)
    if data is not None and recipe.evaluate is None and not _uses_data(recipe, first):
        raise OptionError("nothing in this merge uses the data; leave out data, or add evaluate")
    return OpenedRecipe(models=(first, *others), matched=tuple(matched), data=data, evaluation=evaluation)


def solvers_with_data(recipe: Recipe) -> list[SolverClass]:
    """Return the solvers of a recipe that use data if there are any: its solver, and those that it starts from."""
    named = solvers_in(None if recipe.align is None else recipe.align.model_dump())
    solvers = [(registry.solver(name), options.get("cost")) for _, name, options in named]
    return [solver for solver, cost in solvers if solver.data != "none" and cost not in WEIGHT_COSTS]


def _uses_data(recipe: Recipe, first: Checkpoint) -> bool:
    """Tell whether anything that a recipe does before it evaluates uses data."""
    return (
        bool(solvers_with_data(recipe))
        or recipe.fits
        or recipe.recalibrate == "repair"
        or (recipe.recalibrate is not None and has_statistics(first))
    )


def recalibrates(recipe: Recipe, opened: OpenedRecipe) -> bool:
    """Tell whether a merge changes statistics by itself, with `recalibrate`, rather than only names it by default."""
    if opened.data is None or recipe.recalibrate is None:
        return False
    return recipe.recalibrate == "repair" or has_statistics(opened.models[0])


def remark_on_statistics(recipe: Recipe, opened: OpenedRecipe) -> Iterator[str]:
    """Say which running statistics a merge averages, and how to get those of the merge itself."""
    models = [opened.models[0], *opened.matched]
    layers = find_statistics(models[0])
    recomputed = opened.data is not None and (recipe.recalibrate is not None or recipe.fits)
    if not recomputed and (averaged := describe_averaged_statistics(models, layers.recomputed)):
        if not takes_data(models[0]):
            yield f"{averaged}; recompute them in Python, hf_rebasin.recalibrate(model, batches)"
        elif opened.data is not None:
            yield f"{averaged}; recompute them on the data, without --recalibrate none"
        else:
            yield (
                f"{averaged}; recompute them on data of the models: merge with --data DATASET, or afterwards "
                "hf-rebasin recalibrate MERGE --data DATASET -o OUT"
            )
    repaired = opened.data is not None and recipe.recalibrate == "repair"
    if not repaired and (averaged := describe_averaged_statistics(models, layers.frozen)):
        fits = takes_data(models[0]) and not recipe.backbone_only
        advice = ", but weights can be fitted to them: --data DATASET --recalibrate repair" if fits else ""
        yield f"{averaged}; they are frozen{advice}"


def run_merge(
    recipe: Recipe,
    *,
    opened: OpenedRecipe | None = None,
    alignments: Sequence[Alignment] | None = None,
    device: Device = None,
    progress: bool = False,
) -> MergeResult:
    """Align all models of a recipe to the first (or to its `base_model`), and merge them.

    Args:
        recipe: the recipe.
        opened: its models and data, if they are open already.
        alignments: known alignments, one for every model but the first; by default they are searched for.
        device: device of the computation.
        progress: show progress bars.
    """
    opened, clock = open_models(recipe, progress=progress) if opened is None else opened, Clock()
    first, moved = opened.models[0], opened.matched
    solutions: tuple[Solution, ...] = ()
    remarks = tuple(remark_on_statistics(recipe, opened))
    if recipe.align is not None and alignments is None:
        symmetries = find_symmetries(recipe, opened)
        if isinstance(symmetries, str):
            remarks = (symmetries, *remarks)
        else:
            with clock("aligning"):
                solutions = tuple(_align_models(recipe, opened, symmetries, device, progress))
            alignments = [solution.alignment for solution in solutions]
    if recipe.align is not None and alignments is not None:
        if len(alignments) != len(moved):
            raise MismatchError(f"got {len(alignments)} alignments for {len(moved)} models that are to be moved")
        move = partial(_move_backbone, first) if recipe.backbone_only else Alignment.apply
        moved = tuple(move(alignment, other) for alignment, other in zip(alignments, moved, strict=True))
    checkpoint = merge_models(recipe, [first, *moved], opened.data, clock, device=device, progress=progress)
    return MergeResult(
        checkpoint=checkpoint,
        opened=opened,
        solutions=solutions,
        moved=moved,
        remarks=remarks,
        seconds=clock.seconds,
    )


def find_symmetries(recipe: Recipe, opened: OpenedRecipe) -> Spec | str:
    """Return the symmetries that a recipe aligns its models by, or why they are merged as they are.

    Fine-tunes of one base need no alignment, so of a class without a table nothing is asked for them.

    Raises:
        RebasinError: the models are not of one base, and their symmetries are not known.
    """
    first = opened.models[0]
    table = None
    with suppress(CheckpointError):  # a configuration that transformers cannot use
        table = table_for(first.config)
    cosines = None if table is not None else _lowest_cosines(recipe, opened)
    if cosines is not None and cosines.lowest >= ALIKE:
        return "the models are fine-tunes of one base, so they are merged as they are"
    try:
        return detect_spec(first)
    except RebasinError as error:
        if table is not None:
            cosines = _lowest_cosines(recipe, opened)
        if cosines is not None and cosines.median >= ALIKE:
            return f"the models are fine-tunes of one base, so they are merged as they are; otherwise: {error}"
        if cosines is None:
            return (
                "the models are merged as they are if they are fine-tunes of one base, which only the weights show, "
                f"and those are not downloaded; otherwise: {error}"
            )
        if "--no-align" in str(error):
            raise
        raise type(error)(f"{error}. To merge the models as they are, do not align them (--no-align)") from error


def _lowest_cosines(recipe: Recipe, opened: OpenedRecipe) -> Cosines | None:
    """Measure how alike the others are to the first model where they are; None if values are not downloaded."""
    first, least = opened.models[0], Cosines(median=1.0, lowest=1.0)
    for other in opened.matched:
        matched = match_keys(first, other, backbone_only=recipe.backbone_only)
        if any(isinstance(part, Absent) for part in (*matched.values(), *first.parts.values())):
            return None
        cosines = matrix_cosines(first.parts, matched)
        least = Cosines(median=min(least.median, cosines.median), lowest=min(least.lowest, cosines.lowest))
    return least


def _align_models(recipe: Recipe, opened: OpenedRecipe, spec: Spec, device: Device, progress: bool) -> list[Solution]:
    assert recipe.align is not None
    for checkpoint in opened.models:
        checkpoint.refuse_broken()
    first, solver = opened.models[0], make_solver(recipe.align.solver, recipe.align.options())
    solve = partial(
        align_checkpoints, solver, spec, first, limits=recipe.align.limits(), seed=recipe.align.seed, device=device
    )
    data = opened.data if solvers_with_data(recipe) else None
    solve = partial(solve, backbone_only=recipe.backbone_only, data=data, progress=progress)
    return [solve(moving=other) for other in opened.matched]


def merge_models(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    data: Batches | None,
    clock: Clock,
    *,
    device: Device = None,
    progress: bool = False,
) -> Checkpoint:
    """Merge models as a recipe says, then fit and recalibrate the merge.

    Args:
        recipe: the recipe.
        models: the models, in the same coordinates.
        data: data for fitting and recalibrating; without them neither is done.
        clock: clock that records the time of each phase.
        device: device of the computation.
        progress: show progress bars.
    """
    method = recipe.resolved_method()
    dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
    merged = combine(models, method, dtype=dtype, backbone_only=recipe.backbone_only)
    if data is None:
        return merged
    shares = model_shares(recipe, len(models))
    for (phase, _), finish in _finishing_steps(recipe, shares):
        with clock(phase):
            merged = finish(merged, models, data, device=device, progress=progress)
    with clock("recalibrating"):
        if recipe.recalibrate == "repair":
            merged = repair(merged, models, data, weights=shares, device=device, progress=progress)
        elif recipe.recalibrate == "statistics":
            merged = recalibrate_checkpoint(merged, data, device=device, progress=progress)
    return keep_own_rows(merged, models, backbone_only=recipe.backbone_only)


def _finishing_steps(
    recipe: Recipe, shares: list[float] | None
) -> Iterator[tuple[tuple[str, str], Callable[..., Checkpoint]]]:
    """Yield what is done to the whole merge: the words for it (while it runs, and afterwards) and the function."""
    if recipe.refit is not None:
        yield refit.VERB, partial(refit.finish, weights=shares, ridge=recipe.refit.ridge)
        if recipe.merge_method == "refit":  # named twice
            return
    resolved = recipe.resolved_method()
    if resolved.finish is not None:
        yield resolved.method.verb, resolved.finish


def describe_finishing(recipe: Recipe) -> str:
    """Return in words what is done to a merge after averaging: "refitted and repaired"; empty if nothing is."""
    words = [done for (_, done), _ in _finishing_steps(recipe, None)] + ["repaired"] * (recipe.recalibrate == "repair")
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def model_shares(recipe: Recipe, count: int) -> list[float] | None:
    """Return the share of every model in a merge, if its method has weights or one number t; None for equal shares.

    Shares are also equal if the numbers vary by tensor: then only the controls are fitted.
    """
    method = recipe.resolved_method()
    if method.varying:
        return None
    if "t" in method.values and count == 2:
        return [1 - method.values["t"], method.values["t"]]
    return method.values.get("weights")


def recalibrate_checkpoint(
    checkpoint: Checkpoint, data: Batches, *, exact: bool = False, device: Device = None, progress: bool = False
) -> Checkpoint:
    """Return a checkpoint with BatchNorm statistics of the data; the same checkpoint if it has no such layers."""
    if not has_statistics(checkpoint):
        return checkpoint
    (module,), _ = load_modules([checkpoint], device)
    recalibrate(module, data, exact=exact, device=device, progress=progress)
    return with_module_values(checkpoint, module)


def _move_backbone(first: Checkpoint, alignment: Alignment, other: Checkpoint) -> Checkpoint:
    """Move the backbone of another model as a part of the first one, whatever the other model's head reads."""
    spec = alignment.spec
    view = canonical_view(first, spec.table)
    matched = match_keys(first, other, backbone_only=True)
    backbone = view.select(matched)
    moved = alignment.on(spec.within(backbone), backbone)
    return Checkpoint(
        Tensors({view.keys[name]: part for name, part in moved.parts.items()}),
        name=other.name,
        sources=other.sources,
        commit=other.commit,
        absent_rows=absent_in(matched, other),
    )
