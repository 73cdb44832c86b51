"""Alignment of two models, from whatever users pass: paths, names, modules, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.compatibility import Assumption, match_models
from ..alignment.correspondence import match_keys, untie_like
from ..alignment.limits import Groups, Limits, refuse_moved_outputs, untying_note
from ..alignment.rows import Vocabulary
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.lazy import Tensors
from ..errors import OptionError
from ..modules.forward import Inputs, refuse_read_once
from ..modules.functional import Device
from ..symmetries.binding import bind_to, untie_spec
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec
from ..symmetries.table import Table, canonical_view
from .problem import Forward, Problem
from .solution import Solution, Solver, make_solver


def align(
    fixed: Source,
    moving: Source,
    *,
    solver: str | Solver = "weight_matching",
    spec: Spec | Table | None = None,
    inputs: Inputs | None = None,
    seed: int = 0,
    assume: Iterable[Assumption] = (),
    vocabulary: Vocabulary | None = None,
    backbone_only: bool = False,
    groups: Groups = "full",
    keep_tied: bool = False,
    hold: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    device: Device = None,
    progress: bool = False,
    **options: Any,
) -> Solution:
    """Find the change of coordinates that brings one model closest to another.

    Args:
        fixed: model that stays: a folder, Hub id, module, state dict or checkpoint.
        moving: model to move; neither of the two is changed.
        solver: name of a file in `hf_rebasin/solving/solvers/`, or a solver object.
        spec: symmetries of the models; by default those in the table of the fixed model's family, or else those
            inferred from the forward pass of one of the two.
        inputs: inputs of that forward pass; see `infer_spec`.
        seed: seed of all randomness in the solver; the same seed gives the same alignment.
        assume: what to take as equal without checking: "config" ("config:KEY" for one setting), "labels",
            "vocabulary".
        vocabulary: which rows of tokens are compared where the models have other tokens, or other numbers of rows:
            "first" for the fixed model's, of which the moving one may lack some; "common" for those that both have.
            By default such models are refused.
        backbone_only: whether to match base models only, whatever their heads are.
        groups: "full" for the largest groups that preserve the function: rotations of the residual stream, bases
            inside heads, scales. "permutation" for their permutations only, which reorder values without changing
            any.
        keep_tied: whether a stream is only permuted where rotating it would untie the head from the embedding.
        hold: names of symmetries, or patterns such as `ff.*`, that are left as they are.
        data: batches that can be read several times, such as a list or a DataLoader, for solvers that minimise a loss
            or compare activations. Under `accelerate launch` every process takes its share.
        loss: function that returns the loss, one number, for (module, batch); the module is a copy of the fixed one
            with merged tensors in it. By default the loss that a transformers model returns for a batch with labels;
            without labels, the divergence of the module's outputs from those of the two models (KL, see
            `hf_rebasin.modules.divergence`).
        device: device on which similarities and losses are computed, such as `accelerator.device`; by default that of
            the tensors. Tensors on disk are moved to it block by block.
        progress: whether to show a progress bar (on a terminal).
        options: options of the solver, such as `starts=1`.

    Returns:
        A `Solution`; `solution.apply(moving)` is the moved model, which computes the same function. Where only
        permutations were used its values are bit for bit the same, at other positions; otherwise they are equal up to
        the rounding of their dtype.

    Raises:
        MismatchError: the two models cannot be matched; the message says what differs.
        CheckpointError: one of them has NaN or Inf in it.
        UnknownNameError: there is no such solver.
        OptionError: an option of the solver, the data or the loss does not fit.

    Example: a model against itself with its 12 × 64 = 768 query rows, and all else that may move, in another order.

        >>> g = Alignment.random(spec_for(model), torch.Generator().manual_seed(0))
        >>> solution = align(model, g.apply(model))
        >>> solution.status
        <Status.EQUAL: 'the moved model equals the fixed one, tensor by tensor'>

    Two language models, by the loss of the model halfway between them, on batches with labels:

        >>> solution = align(fixed, moving, solver="learned", data=loader, device=accelerator.device, progress=True)
        >>> [-value for value in solution.history[:2]]  # with nothing moved, and by weight matching
    """
    chosen = make_solver(solver, options) if isinstance(solver, str) else solver
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    for checkpoint in (a, b):
        checkpoint.refuse_quantised()
        checkpoint.refuse_unloadable()
    a, (b,) = match_models(a, [b], assume, vocabulary=vocabulary, backbone_only=backbone_only)
    if isinstance(spec, Table):
        spec = bind_to(spec, a)
    if spec is None:
        bare = a.template is None and a.config is None  # a state dict: the other may have a table or a forward pass
        spec = detect_spec(b if bare else a, inputs)
    for checkpoint in (a, b):
        checkpoint.refuse_broken()
    limits = Limits(groups, keep_tied, tuple(hold))
    if data is not None and getattr(chosen, "data", "none") == "none":
        raise OptionError(f"solver {solver!r} uses weights alone and takes no data")
    if loss is not None and data is None:
        raise OptionError("a loss is given, but no data; give data=")
    if data is not None:
        refuse_read_once(data)
    return align_checkpoints(
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


def align_checkpoints(
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
    """Align two checkpoints that were checked already: sound, compatible and described by the spec."""
    if (separate := untie_like(fixed, [moving])) is not fixed:
        keys = canonical_view(separate, spec.table).keys
        fixed, spec = separate, untie_spec(spec, [key for key in keys if key in spec.ties])
    view = canonical_view(fixed, spec.table)
    fixed_state, moving_state = (
        view.state,
        view.select(match_keys(fixed, moving, spec.table, backbone_only=backbone_only)),
    )
    spec, notes = limits.on(spec, moving_state)
    refuse_moved_outputs(moving, spec, spec.free)
    streams = {norm.stream for norm in spec.gauged}
    tied = [key for key in spec.untied_by(streams) if spec.ties[key] in moving_state]
    untied = untie_spec(spec, tied)
    fixed_state, moving_state = (
        Tensors(state.parts | {key: state.parts[spec.ties[key]] for key in tied})
        for state in (fixed_state, moving_state)
    )
    matched = untied.within(moving_state)  # heads without a partner do not tell which features match either
    generator = torch.Generator().manual_seed(seed)
    forward = None
    if data is not None:
        stored_view = canonical_view(view.untied(tied, spec.ties), spec.table) if tied else view
        forward = Forward(module=partial(stored_view.module, fixed.compute_dtype), data=data, loss=loss)
    problem = Problem(matched, fixed_state, moving_state, generator, device=device, progress=progress, forward=forward)
    solution = solver.solve(problem)
    alignment = solution.alignment
    kinds = {name: symmetry.kind for name, symmetry in alignment.spec.symmetries.items()}
    rotated = streams & set(alignment.moved) if alignment.gauge else set()
    if rotated and (note := untying_note(spec, rotated)):
        notes.append(note)
    result_spec = (untied if rotated else spec).limited(kinds)
    return replace(solution, alignment=replace(alignment, spec=result_spec), notes=(*solution.notes, *notes))
