"""The thin top: here, and nowhere else, names become objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.compatibility import Assumption, paired
from ..alignment.correspondence import lined_state, lined_up, untied_like
from ..alignment.limits import Groups, Limits, kept_apart
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.lazy import Tensors
from ..errors import OptionError
from ..modules.forward import Inputs, refuse_read_once
from ..modules.functional import Device
from ..symmetries.binding import bind_to, untied
from ..symmetries.detection import spec_of
from ..symmetries.spec import Spec
from ..symmetries.table import Table
from .problem import Forward, Problem
from .solution import Solution, Solver, solver_with


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
        solver: a file of `hf_rebasin/solving/solvers/`, or a solver object.
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
            how far what it says is from what the two models say (KL, `hf_rebasin.modules.divergence`).
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
