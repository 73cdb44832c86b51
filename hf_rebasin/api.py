"""The thin top: here, and nowhere else, names become objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .binding import bind_to, untied
from .checkpoint import Checkpoint, Source
from .comparing import Comparison, compared
from .describing import inferred, spec_of
from .errors import OptionError
from .inputs import Inputs, refuse_read_once
from .lazy import Tensors
from .limits import Groups, Limits, kept_apart
from .merging import combine, finish_with, lined_state, lined_up, untied_like
from .objective import Device, Forward, Problem
from .pairing import Assumption, paired
from .solving import Solution, Solver, solver_with
from .spec import Spec
from .table import Table


def spec_for(source: Source, table: Table | None = None, inputs: Inputs | None = None) -> Spec:
    """The symmetries of a model: by the table of its family, or inferred where `hf_rebasin/specs/` has none.

    Args:
        source: a folder, Hub id, module, state dict or checkpoint.
        table: to be used instead.
        inputs: of the forward pass that is looked at where there is no table; see `infer_spec`.

    Raises:
        MismatchError: there is neither a table nor a module with inputs.
        SpecError: the table does not fit (names the key, its shape and the row), or nothing can be inferred.

    Example:
        >>> spec = spec_for("google-bert/bert-base-uncased")
        >>> spec.symmetries["head.0"]
        Symmetry(name='head.0', kind='permutation', size=12, contexts=())
    """
    checkpoint = Checkpoint.open(source)
    return spec_of(checkpoint, inputs) if table is None else bind_to(table, checkpoint)


def infer_spec(model: Source, inputs: Inputs | None = None) -> Spec:
    """The symmetries of any module, read off its own forward pass.

    The forward pass is run once on shapes alone, without weights and in milliseconds; every operation says which axes
    move together, which are composed of others, and which hang on an order. What an operation without a rule touches
    is held: a symmetry may be missed, but none is made up. All that is found are permutations.

    Args:
        model: a module, neither changed nor read; or a folder or Hub id of a transformers model.
        inputs: of its forward pass: a tensor, a tuple of positional or a dictionary of keyword arguments. For a
            transformers model random tokens or images are made up. A branch that these inputs do not take is not seen,
            and what it alone uses is held.

    Returns:
        A `Spec` whose `pins` say for every axis that is held which operation pinned it, and whose `activations` say
        which modules' outputs carry which symmetry.

    Raises:
        MismatchError: no inputs are known.
        SpecError: the forward pass fails, or asks for values that hang on the weights.

    Example: the hidden units of two linear layers.

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> spec = infer_spec(model, torch.zeros(1, 8))
        >>> spec.table.rows
        {'0.weight': 'hidden.0, _', '0.bias': 'hidden.0', '2.weight': "_, hidden.0'", '2.bias': '_'}
        >>> spec.pins["2.bias"]
        ('an output of the model',)
        >>> spec.activations["1"]
        '_, hidden.0'
    """
    return inferred(Checkpoint.open(model), inputs)


def align(
    fixed: Source,
    moving: Source,
    *,
    solver: str | Solver = "weight_matching",
    spec: Spec | Table | None = None,
    inputs: Inputs | None = None,
    seed: int = 0,
    assume: Iterable[Assumption] = (),
    backbone_only: bool = False,
    groups: Groups = "full",
    keep_tied: bool = False,
    hold: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    device: Device = None,
    progress: bool = False,
    **knobs: Any,
) -> Solution:
    """Find the change of coordinates that brings one model closest to another.

    Args:
        fixed: the model that stays: a folder, Hub id, module, state dict or checkpoint.
        moving: the model that is to be moved; neither is changed.
        solver: a file of `hf_rebasin/solvers/`, or a solver object.
        spec: the symmetries; by default those of the table of the fixed model's family, or else those that the forward
            pass of either of the two shows.
        inputs: for that forward pass; see `infer_spec`.
        seed: of everything random in the solver; the same seed gives the same alignment.
        assume: what to take for the same without looking: "config", "labels", "vocabulary".
        backbone_only: match base models alone, whatever their heads are.
        groups: "full" for the largest groups under which the function stays: rotations of the residual stream, of
            bases inside heads, scales. "permutation" for the permutations in them: no value changes but its place.
        keep_tied: only permute a stream where rotating it would store a head apart from the embedding it is tied to.
        hold: names of symmetries, or patterns as `ff.*`, that stay as they are.
        data: batches that can be read several times, such as a list or a DataLoader, for solvers that descend a loss
            or compare activations. Under `accelerate launch` every process takes its share.
        loss: gives the loss, one number, for (module, batch); the module is a copy of the fixed one with merged
            tensors in it. By default what a transformers model says for a batch with labels in it; without labels,
            how far what it says is from what the two models say (KL, `hf_rebasin.divergence`).
        device: where similarities and losses are computed, such as `accelerator.device`; by default where the tensors
            are. What is read from disk goes there block by block.
        progress: show a progress bar (on a terminal).
        knobs: of the solver, such as `starts=1`.

    Returns:
        A `Solution`; `solution.apply(moving)` is the moved model, with exactly the same function: bit for bit the same
        values in other places where there were only permutations, else up to the rounding of their dtype.

    Raises:
        MismatchError: the two cannot mean the same; says what differs.
        CheckpointError: NaN or Inf in one of them.
        UnknownNameError, OptionError: the solver or a knob.

    Example: a model against itself with its 12 × 64 = 768 query rows, and all else that may move, in another order.

        >>> g = Alignment.random(spec_for(model), torch.Generator().manual_seed(0))
        >>> solution = align(model, g.apply(model))
        >>> solution.status
        <Status.EQUAL: 'the moved model equals the fixed one, tensor by tensor'>

    Two language models, by the loss of the model halfway between them, on batches with labels in them:

        >>> solution = align(fixed, moving, solver="learned", data=loader, device=accelerator.device, progress=True)
        >>> [-value for value in solution.history[:2]]  # with nothing moved, and by weight matching
    """
    chosen = solver_with(solver, knobs) if isinstance(solver, str) else solver
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    for checkpoint in (a, b):
        checkpoint.refuse_quantised()
    b = paired(a, b, assume, backbone_only=backbone_only)
    if isinstance(spec, Table):
        spec = bind_to(spec, a)
    if spec is None:
        bare = a.template is None and a.config is None  # a state dict, whose symmetries the other may know
        spec = spec_of(b if bare else a, inputs)
    for checkpoint in (a, b):
        checkpoint.refuse_broken()
    limits = Limits(groups, keep_tied, tuple(hold))
    if data is not None and not getattr(chosen, "TAKES_DATA", False):
        raise OptionError(f"solver {solver!r} looks at weights alone, and takes no data")
    if loss is not None and data is None:
        raise OptionError("a loss, but no data for it; give data=")
    if data is not None:
        refuse_read_once(data)
    return solved(
        chosen,
        spec,
        a,
        b,
        limits,
        seed=seed,
        device=device,
        backbone_only=backbone_only,
        progress=progress,
        data=data,
        loss=loss,
    )


def solved(
    solver: Solver,
    spec: Spec,
    fixed: Checkpoint,
    moving: Checkpoint,
    limits: Limits,
    *,
    seed: int,
    device: Device,
    backbone_only: bool = False,
    progress: bool = False,
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Solution:
    """Align two checkpoints that are known to be sound and to mean the same."""
    prefix = spec.table.prefix
    if (apart := untied_like(fixed, [moving])) is not fixed:
        fixed, spec = apart, untied(spec, [key for key in apart.canonical(prefix) if key in spec.ties])
    here = fixed.state(prefix)
    there = lined_state(fixed, lined_up(fixed, moving, prefix, backbone_only=backbone_only), prefix)
    spec, notes = limits.on(spec, there)
    streams = {norm.stream for norm in spec.gauged}
    tied = [key for key in spec.untied_by(streams) if spec.ties[key] in there]
    whole = untied(spec, tied)
    here, there = (Tensors(s.parts | {key: s.parts[spec.ties[key]] for key in tied}) for s in (here, there))
    matched = whole.within(there)  # heads that are not merged do not say either which features are alike
    generator = torch.Generator().manual_seed(seed)
    forward = None
    if data is not None:
        own = fixed.untied(tied, spec.ties, prefix) if tied else fixed
        forward = Forward(partial(own.computing, prefix, fixed.wide), data, loss)
    solution = solver.solve(Problem(matched, here, there, generator, device, progress, forward))
    found = solution.alignment
    kinds = {name: symmetry.kind for name, symmetry in found.spec.symmetries.items()}
    rotated = streams & set(found.moved) if found.gauge else set()
    if rotated and (said := kept_apart(spec, rotated)):
        notes.append(said)
    whole = (whole if rotated else spec).limited(kinds)
    return replace(solution, alignment=replace(found, spec=whole), notes=(*solution.notes, *notes))


def merge(
    models: Sequence[Source],
    method: str = "linear",
    *,
    dtype: torch.dtype | None = None,
    assume: Iterable[Assumption] = (),
    backbone_only: bool = False,
    data: Iterable[Any] | None = None,
    device: Device = None,
    progress: bool = False,
    **knobs: Any,
) -> Checkpoint:
    """Merge models that share their coordinates already (align them first).

    Args:
        models: folders, Hub ids, modules, state dicts or checkpoints; the first gives keys, shapes, dtypes,
            configuration and tokenizer.
        method: a file of `hf_rebasin/merge_methods/`: "linear", "lerp", "slerp", "refit", "distil".
        dtype: of the floating-point tensors of the result, by default what the first model has.
        assume: what to take for the same without looking: "config", "labels", "vocabulary".
        backbone_only: keep the first model's head; the others may have another, or none.
        data: unlabelled batches that can be read several times, for "refit" and "distil".
        device: where that computes.
        progress: whether it shows a progress bar (on a terminal).
        knobs: of the method, such as `t=0.3`. A number may be another one for other tensors: `t=[0, 0.5, 1]` from the
            first layer to the last, `t=[{"filter": "mlp", "value": 0.3}, {"value": 0.5}]` by what is in a name.

    Returns:
        A `Checkpoint`: `.save(out)` writes a folder that `from_pretrained` loads, `.model()` makes a module. What is
        merged from folders and Hub ids is computed then, as it is written; what involves a module or a state dict,
        which may change, is computed now.

    Raises:
        MismatchError: tensors that are missing, left over or of another shape, or models that cannot mean the same.
        CheckpointError: a quantised model; NaN or Inf, as soon as they are read.
        UnknownNameError, OptionError: the method or a knob.

    Example: `merge([a, b])` of weights 2 and 6 has (2 + 6) / 2 = 4; `merge([a, b], "lerp", t=0.25)` has 3.
    """
    if not models:
        raise OptionError("nothing to merge: give at least one model")
    first, *others = (Checkpoint.open(model) for model in models)
    for checkpoint in (first, *others):
        checkpoint.refuse_quantised()
    moved = [paired(first, other, assume, backbone_only=backbone_only) for other in others]
    merged = combine([first, *moved], method, knobs, dtype=dtype, backbone_only=backbone_only)
    finish = finish_with(method, knobs)
    if (finish is None) != (data is None):
        said = "looks at no data" if finish is None else "looks at data, and there are none"
        raise OptionError(f"merge method {method!r} {said}; {'leave out' if finish is None else 'give'} data=")
    if finish is None or data is None:
        return merged
    refuse_read_once(data)
    if backbone_only:
        raise OptionError(f"merge method {method!r} computes with whole models, so backbone_only cannot go with it")
    return finish(merged, [first, *moved], data, device=device, progress=progress)


def compare(fixed: Source, moving: Source, *, device: Device = None, progress: bool = False) -> Comparison:
    """Look at two models side by side: are they of one base, trained apart, or different things?

    Every tensor is read once, and for some symmetries of every family it is counted how many units are most alike to
    the unit in the same place. In fine-tunes of one base nearly all are, and aligning could only harm; in models that
    were trained apart as few as chance gives.

    Args:
        fixed: a folder, Hub id, module, state dict or checkpoint.
        moving: the other.
        device: where similarities are computed, such as `accelerator.device`.
        progress: show progress bars (on a terminal).

    Returns:
        A `Comparison`: `.verdict`, `.advice` (the verdict in a sentence), and the numbers it rests on.

    Raises:
        CheckpointError: one of them cannot be read, is quantised, or has NaN or Inf in it.

    Example: a model, and the same model moved. The function is the same, and still none of it is in its place.

        >>> g = Alignment.random(spec_for(model), torch.Generator().manual_seed(0))
        >>> compare(model, g.apply(model)).verdict
        <Verdict.TRAINED_APART: 'trained apart: align before merging'>
        >>> compare(model, model).verdict
        <Verdict.EQUAL: 'equal: nothing to align, nothing to merge'>
    """
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    for checkpoint in (a, b):
        checkpoint.refuse_quantised()
    return compared(a, b, device=device, progress=progress)
