"""Run a recipe: open its models and data, then align, merge, fit and recalibrate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from .. import registry
from ..alignment.alignment import Alignment
from ..alignment.compatibility import match_models
from ..alignment.correspondence import match_keys, match_submodels, untie_for_merge
from ..alignment.rows import absent_in
from ..checkpoints import hub
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layer_settings import config_of_layers
from ..checkpoints.lazy import Absent, Tensors
from ..data.batches import Batches, open_data, takes_data
from ..errors import MismatchError, OptionError, RebasinError
from ..evaluation.comparison import Cosines, matrix_cosines
from ..merging.fitting import load_modules, refuse_submodels, with_module_values
from ..merging.merge import averaged_keys, keep_own_rows
from ..merging.methods import refit
from ..merging.parameters import has_filters, is_gradient, refuse_unmatched_filters
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
from ..solving.solution import Clock, Solution, Status, make_solver
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec
from ..symmetries.table import canonical_view
from ..tokenizers.chat_template import resolve_chat_template, write_chat_template
from .composition import MergePart, compose, join
from .mistakes import solvers_in
from .recipe import ModelEntry, Recipe

SAMPLE = 1 << 16  # elements of every matrix by which models are told to be fine-tunes of one base
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
    entries = recipe.in_order()
    with hub.pin_commits():
        models = [
            Checkpoint.open(entry.model, revision=entry.revision, values=values, progress=progress)
            for entry in entries
        ]
    for checkpoint in models:
        checkpoint.refuse_quantised()
    first, *others = models
    assume = [*recipe.assume, *(f"config:{key}" for key in _settings_of_depth(recipe, models))]
    first, matched = match_models(
        first, others, assume, vocabulary=recipe.vocabulary, backbone_only=recipe.backbone_only
    )
    if recipe.models:
        first = untie_for_merge(first, matched)
    _check_parts(recipe, compose(recipe, [first, *matched]))
    find_chat_template(recipe, models)
    if recipe.fits or recipe.recalibrate == "repair":
        refuse_submodels(models)
    data = None if recipe.data is None else open_data(recipe.data, first)
    evaluation = None
    if recipe.evaluate is not None and with_evaluation:
        evaluation = open_data(recipe.evaluate, first, needs_labels=True)
    if data is not None and recipe.evaluate is None and not _uses_data(recipe, first):
        raise OptionError("nothing in this merge uses the data; leave out data, or add evaluate")
    return OpenedRecipe(models=(first, *others), matched=tuple(matched), data=data, evaluation=evaluation)


def find_chat_template(recipe: Recipe, models: Sequence[Checkpoint]) -> str | None:
    """Return the chat template that a recipe asks for; None if the merge has the first model's.

    Raises:
        OptionError: there is no such template, or it is not valid Jinja.
    """
    return None if recipe.chat_template is None else resolve_chat_template(recipe.chat_template, models)


def _settings_of_depth(recipe: Recipe, models: Sequence[Checkpoint]) -> list[str]:
    """Return the settings that may differ between models whose layers are cut out: those that follow the depth."""
    if not recipe.slices:
        return []
    keys: set[str] = set()
    for model in models:
        written = dict(model.written)
        keys |= {key for key, value in config_of_layers(written, [0]).items() if written.get(key) != value}
    return sorted(keys)


def _check_parts(recipe: Recipe, parts: Sequence[MergePart]) -> None:
    """Refuse models of a part that do not match, and parameters that do not fit, before values are read.

    Raises:
        MismatchError: tensors that are missing, left over or of another shape.
        OptionError: parameters of a tensor that do not fit; a filter that no tensor has in its name.
    """
    filtered = any(has_filters(part.resolved.values) for part in parts)
    names = {name for part in parts for name in part.names()} if filtered else ()
    for part in parts:
        keys: Collection[str] = part.first.parts
        first = untie_for_merge(part.first, part.models) if recipe.slices else part.first
        for other in (*part.models, *(part.origins or ())):
            keys = match_keys(first, other, backbone_only=recipe.backbone_only)
            if not recipe.backbone_only:
                match_submodels(first, other)
        if filtered:
            refuse_unmatched_filters(part.resolved.values, names, recipe.convention)
        averaged = averaged_keys(first, keys, backbone_only=recipe.backbone_only)
        part.resolved.functions_by_key(len(part.models), averaged, part.own_names)


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


def remark_on_merge(recipe: Recipe, opened: OpenedRecipe) -> Iterator[str]:
    """Say what is not to be seen in a recipe: where gradients put what is outside of layers, averaged statistics."""
    parts = compose(recipe, [opened.models[0], *opened.matched])
    if any(is_gradient(value) for part in parts for value in part.resolved.values.values()):
        yield (
            "gradients over the layers: embeddings, the last norm and the head take the first number, as in mergekit "
            "(convention: own gives what comes after the layers the last one)"
            if recipe.convention == "mergekit"
            else "gradients over the layers: what comes before the layers takes the first number, what comes after "
            "them the last one (convention: mergekit gives both the first)"
        )
    yield from remark_on_statistics(recipe, opened)


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
    remarks = tuple(remark_on_merge(recipe, opened))
    if recipe.align is not None and alignments is None:
        decision = decide_alignment(recipe, opened)
        remarks = (*decision.remarks, *remarks)
        if decision.spec is not None:
            with clock("aligning"):
                solutions = tuple(_align_models(recipe, opened, decision, device, progress))
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


@dataclass(frozen=True, kw_only=True)
class AlignmentDecision:
    """Which models a merge aligns, and by which symmetries.

    Args:
        spec: the symmetries of the first model; None if no model is aligned.
        leaders: for every model but the first the number, among these, of the model whose alignment moves it: its own,
            that of the base it was tuned from, or None if it stays as it is.
        remarks: what stays as it is, and why.
    """

    spec: Spec | None
    leaders: tuple[int | None, ...]
    remarks: tuple[str, ...] = ()


AS_THEY_ARE = "the models are fine-tunes of one base, so they are merged as they are"


def decide_alignment(recipe: Recipe, opened: OpenedRecipe) -> AlignmentDecision:
    """Decide for every model whether it is aligned to the first one.

    Fine-tunes of one base need no alignment; they are known by the cosines between their matrices. A model with a base
    of its own moves as that base does.

    Raises:
        MismatchError: a model that was not fine-tuned from the base that its difference is taken from.
        RebasinError: the models are not of one base, and their symmetries are not known.
    """
    first, entries = opened.models[0], recipe.in_order()
    ids = [(entry.model, entry.revision) for entry in entries]
    own = [None if entry.base is None else ModelEntry.model_validate(entry.base) for entry in entries]
    bases = [None if base is None else ids.index((base.model, base.revision)) for base in own]
    unlike_depth = {i for i, other in enumerate(opened.matched, 1) if recipe.slices and not _same_shapes(first, other)}
    followed = [i for i in range(1, len(ids)) if bases[i] in (None, 0) and i not in unlike_depth]
    cosines = {i: _find_cosines(recipe, first, opened.matched[i - 1]) for i in followed}
    remarks = [
        f"{entries[i].model} has other layers than {entries[0].model}, so it is not aligned" for i in unlike_depth
    ]
    if recipe.merges_differences:
        merged = {(entry.model, entry.revision) for entry in recipe.merged()}
        for i, base in enumerate(bases[1:], 1):
            if base:
                likeness = _find_cosines(recipe, opened.matched[base - 1], opened.matched[i - 1])
            else:  # bases are aligned, and have no difference unless they are merged as well
                likeness = cosines.get(i) if i not in bases or ids[i] in merged else None
            if likeness is not None and likeness.median < ALIKE:
                _refuse_foreign(recipe, entries[i].model, entries[base or 0].model, likeness)
    apart = [i for i in followed if (measured := cosines[i]) is None or measured.lowest < ALIKE]
    kept = AlignmentDecision(spec=None, leaders=(None,) * len(opened.matched), remarks=(*remarks, AS_THEY_ARE))
    if not apart:
        return kept if followed and not remarks else replace(kept, remarks=tuple(remarks))
    known = [measured for i in apart if (measured := cosines[i]) is not None]
    try:
        spec = detect_spec(first)
    except RebasinError as error:
        if len(known) == len(apart) and all(measured.median >= ALIKE for measured in known):
            return replace(kept, remarks=(*remarks, f"{AS_THEY_ARE}; otherwise: {error}"))
        if len(known) < len(apart):
            unknown = (
                "the models are merged as they are if they are fine-tunes of one base, which only the weights show, "
                f"and those are not downloaded; otherwise: {error}"
            )
            return replace(kept, remarks=(*remarks, unknown))
        if "--no-align" in str(error):
            raise
        raise type(error)(f"{error}. To merge the models as they are, do not align them (--no-align)") from error
    leaders = [i if i in apart else None for i in range(1, len(ids))]
    for i, base in enumerate(bases):
        if base is not None and base in apart:
            leaders[i - 1] = base
            remarks.append(f"{entries[i].model} moves as {entries[base].model}, which it was tuned from")
    remarks += [
        f"{entries[i].model} is a fine-tune of the base of {entries[0].model}, so it stays as it is"
        for i in followed
        if i not in apart
    ]
    return AlignmentDecision(spec=spec, leaders=tuple(leaders), remarks=tuple(remarks))


def _same_shapes(first: Checkpoint, other: Checkpoint) -> bool:
    return first.shapes() == other.shapes()


def _refuse_foreign(recipe: Recipe, model: str, base: str, cosines: Cosines) -> None:
    raise MismatchError(
        f"{model} was not fine-tuned from {base}: the median cosine between their matrices is {cosines.median:.2f}, "
        f"so their difference mixes two trainings, and {recipe.merge_method} makes no sense of it. Name the base that "
        "it was tuned from (base: of the model), which is aligned to base_model then, or average the models (linear)"
    )


def _find_cosines(recipe: Recipe, first: Checkpoint, other: Checkpoint) -> Cosines | None:
    """Measure how alike another model is to the first one where it is; None if values are not downloaded."""
    matched = match_keys(first, other, backbone_only=recipe.backbone_only)
    if any(isinstance(part, Absent) for part in (*matched.values(), *first.parts.values())):
        return None
    return matrix_cosines(first.parts, matched, SAMPLE)


def _align_models(
    recipe: Recipe, opened: OpenedRecipe, decision: AlignmentDecision, device: Device, progress: bool
) -> list[Solution]:
    """Return a solution for every model but the first; of models that stay as they are, one that moves nothing."""
    assert recipe.align is not None
    assert decision.spec is not None
    for checkpoint in opened.models:
        checkpoint.refuse_broken()
    first, solver = opened.models[0], make_solver(recipe.align.solver, recipe.align.options())
    solve = partial(
        align_checkpoints,
        solver,
        decision.spec,
        first,
        limits=recipe.align.limits(),
        seed=recipe.align.seed,
        device=device,
    )
    data = opened.data if solvers_with_data(recipe) else None
    solve = partial(solve, backbone_only=recipe.backbone_only, data=data, progress=progress)
    solved = {
        leader: solve(moving=opened.matched[leader - 1]) for leader in sorted({i for i in decision.leaders if i})
    }
    stays = Solution(alignment=Alignment(decision.spec, {}), objective=0.0, history=(), status=Status.IDENTITY)
    return [stays if leader is None else solved[leader] for leader in decision.leaders]


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
    parts = compose(recipe, models)
    dtypes = {"dtype": recipe.result_dtype, "input_dtype": recipe.input_dtype}
    results = [part.combine(**dtypes, backbone_only=recipe.backbone_only) for part in parts]
    merged = join(recipe, parts, results, models[0])
    template = find_chat_template(recipe, models)
    if template is not None:
        merged = replace(merged, complete=partial(write_chat_template, template=template))
    if data is None:
        return merged
    merging = parts[0].models
    shares = model_shares(recipe, len(merging))
    for (phase, _), finish in _finishing_steps(recipe, parts[0], shares):
        with clock(phase):
            merged = finish(merged, merging, data, device=device, progress=progress)
    with clock("recalibrating"):
        if recipe.recalibrate == "repair":
            merged = repair(merged, merging, data, weights=shares, device=device, progress=progress)
        elif recipe.recalibrate == "statistics":
            merged = recalibrate_checkpoint(merged, data, device=device, progress=progress)
    return keep_own_rows(merged, models, backbone_only=recipe.backbone_only)


def _finishing_steps(
    recipe: Recipe, part: MergePart | None, shares: list[float] | None
) -> Iterator[tuple[tuple[str, str], Callable[..., Checkpoint]]]:
    """Yield what is done to the whole merge: the words for it (while it runs, and afterwards) and the function."""
    if recipe.refit is not None:
        yield refit.VERB, partial(refit.finish, weights=shares, ridge=recipe.refit.ridge)
        if recipe.merge_method == "refit":  # named twice
            return
    if recipe.method.finish is not None:
        finish = None if part is None else part.resolved.finish(part.models, part.base, part.origins)
        yield recipe.method.verb, finish or recipe.method.finish


def describe_finishing(recipe: Recipe) -> str:
    """Return in words what is done to a merge after averaging: "refitted and repaired"; empty if nothing is."""
    words = [done for (_, done), _ in _finishing_steps(recipe, None, None)] + ["repaired"] * (
        recipe.recalibrate == "repair"
    )
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def model_shares(recipe: Recipe, count: int) -> list[float] | None:
    """Return the share of every model in a merge, if its method has weights or one number t; None for equal shares.

    Shares are also equal if the numbers vary by tensor: then only the controls are fitted.
    """
    if not recipe.models:
        return None
    resolved = recipe.resolved_method()
    values = resolved.constants(count)
    if resolved.varying or recipe.merges_differences:
        return None
    if "t" in values and count == 2:
        return [1 - values["t"], values["t"]]
    weights: list[float | None] | None = values.get("weights")
    return None if weights is None else [1.0 if weight is None else weight for weight in weights]


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
