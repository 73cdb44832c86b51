"""Alignment by gradients: one loop over relaxed elements for every group, every cost and every architecture.

A descent applies the alignment that it starts from to the moving model, relaxes the identity of every group, and
minimises a cost of the relaxed alignment. At regular intervals the nearest exact alignment, one whose elements are in
the groups and not relaxed, is measured by the same cost, and the best of these is returned. Norms between a rotated
stream and its readers are folded away in both models first: then every group acts linearly, and a point between the
two computes the same function as the same point between the models as they are.

Costs are those of Re-basin via implicit Sinkhorn differentiation (Guerrero Peña et al. 2023, arXiv 2212.12042).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..alignment.action import act_on_block
from ..alignment.alignment import Alignment
from ..alignment.elements.relaxation import Permuting, Relaxation, SupportsAct
from ..alignment.gauge import find_gauges, fold_state, gauge_vectors
from ..alignment.relaxed_alignment import RelaxedAlignment, act_with_gradients, split_keys
from ..checkpoints.precision import compute_dtype
from ..errors import OptionError, listed
from ..modules.distributed import all_reduce_gradients, all_reduce_mean, all_reduce_numbers, cycle_batches
from ..modules.divergence import Divergence, StateDict
from ..modules.forward import compute_own_loss, returns_loss
from ..modules.functional import FunctionalCall, move_batch, require_scalar_loss, use_batch_statistics
from ..registry import DataUse
from ..symmetries.spec import LabelledTensor
from .problem import Forward, Problem, equal_within, matched_tensors, weight_of
from .solution import Clock, Solution, Solver, Status, make_solver

Pairs: TypeAlias = "list[tuple[LabelledTensor, Tensor, Tensor]]"  # (tensor, of the fixed model, of the moving one)
Cost: TypeAlias = Literal["l2", "l1", "cosine", "mid", "rnd"]
WEIGHT_COSTS = ("l2", "l1", "cosine")

OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SCHEDULES: dict[
    str, Callable[[int], Callable[[int], float]]
] = {  # {name: steps → (step → factor of the learning rate)}
    "constant": lambda steps: lambda step: 1.0,
    "cosine": lambda steps: lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps),
}
UNLABELLED_NOTE = "aligned without labels, by how far the model in between is from saying what the two say"
EQUALITY_TOLERANCE = 1e-12  # share of ‖fixed‖² within which two models are equal


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Options of all solvers that minimise a cost by gradient descent.

    Args:
        cost: "l2", "l1" or "cosine" of the weights; with data, "mid" for the loss halfway between the models or "rnd"
            for the loss at a random point of `interval`. Without labels the loss is the divergence of the outputs
            there from the two models' outputs (see `hf_rebasin.modules.divergence`). By default "mid" with data
            ("rnd" for `learned`), "l2" without. "l1" is minimised as a mean, as in the paper, to which its `lr` of 10
            belongs: the gradients are below the eps of AdamW.
        start: solver whose alignment is improved, or "identity"; no result is worse than that alignment. Its options
            may be given as `{"solver": name, option: value, …}`.
        starts: number of descents from that start, each with its own batches and noise; the best alignment of all is
            kept.
        steps: greatest number of optimizer steps.
        lr: learning rate of permutations.
        smooth_lr: learning rate of rotations, bases and scales.
        optimizer: "adamw", "adam" or "sgd".
        schedule: schedule of both learning rates: "constant", or "cosine" down to 0.
        weight_decay: weight decay of permutations, with "adamw"; it keeps latent entries within about
            1 / weight_decay. Without it early mistakes saturate, and no gradient is left to correct them. By default
            0.1, or 0.1 / lr where a step would decay by more than a tenth.
        interval: ends of the interval from which λ is drawn uniformly for "rnd".
        check_every: number of steps after which the nearest exact alignment is measured.
        checks: number of batches on which it is measured, the first of the data.
        patience: number of such checks without improvement after which the descent ends.
        both_ends: whether a loss on data moves both models towards each other; the result is then carried over to the
            moving one. Permutations have to stay as they are: permuting="kept".
        permuting: how permutations are relaxed: "sinkhorn", "straight_through", or "kept" as they are.
        temperature: temperature of the Sinkhorn operator.
        iterations: number of iterations of the Sinkhorn operator.
        implicit: whether its gradient comes from the equations of its fixed point, instead of from all iterations.
        noise: standard deviation of the noise that is added to the latent matrices I at the start.
    """

    cost: Cost | None = None
    start: str | dict[str, Any] = "weight_matching"
    starts: int = 1
    steps: int = 300
    lr: float = 0.1
    smooth_lr: float = 3e-3
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    check_every: int = 10
    checks: int = 8
    patience: int = 30
    both_ends: bool = False
    permuting: Permuting = "sinkhorn"
    temperature: float = 1.0
    iterations: int = 20
    implicit: bool = True
    noise: float = 0.0

    data: ClassVar[DataUse] = "optional"
    DATA_COST: ClassVar[Cost] = "mid"  # default with data

    def __post_init__(self) -> None:
        for name in ("starts", "steps", "check_every", "checks", "patience"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; give 1 or more")
        self._make_start_solver()
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise OptionError(f"weight_decay = {self.weight_decay}; give 0 or more")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise OptionError(f"interval = {self.interval}; give two numbers between 0 and 1, the lower one first")
        if self.both_ends and self.permuting != "kept":
            raise OptionError("both_ends needs permuting='kept': permutations cannot move at both ends")

    @staticmethod
    def memory(model: int, *, data: bool) -> int:
        return 4 * model  # both models, the one between them, and gradients

    def solve(self, problem: Problem) -> Solution:
        cost = self.cost or ("l2" if problem.forward is None else self.DATA_COST)
        if cost not in WEIGHT_COSTS and problem.forward is None:
            raise OptionError(
                f"the cost {cost!r} is a loss on data, but no data is given; give data=, or take l2 or l1"
            )
        if cost not in WEIGHT_COSTS:
            _refuse_uncovered(problem)
        if cost in WEIGHT_COSTS and self.starts > 1 and (self.permuting == "kept" or not self.noise):
            raise OptionError(
                f"starts = {self.starts}, but without data or noise all starts are the same; give either"
            )
        clock = Clock()
        with clock("start"):
            start = self._solve_start(problem)
        if start.status in (Status.EQUAL, Status.IDENTITY):
            return start
        return _DescentRun(self, problem, cost, start, clock).run()

    def _solve_start(self, problem: Problem) -> Solution:
        solver = self._make_start_solver()
        if solver is None:
            return Solution(Alignment.identity(problem.spec), 0.0, (), Status.STEP_LIMIT)
        return solver.solve(problem)

    def _make_start_solver(self) -> Solver | None:
        """Create the solver whose alignment is improved; None for the identity."""
        options = {"solver": self.start} if isinstance(self.start, str) else dict(self.start)
        if "solver" not in options:
            raise OptionError(f"start = {self.start}; name a solver: {{'solver': name, option: value, …}}")
        name = str(options.pop("solver"))
        if name == "identity" and options:
            raise OptionError(f"start: the identity has no options, such as {listed(options)}")
        return None if name == "identity" else make_solver(name, options)


class _DescentRun:
    """Descents from one start: both models in a form that groups act on linearly, and latents of all that moves."""

    def __init__(self, options: Descent, problem: Problem, cost: Cost, start: Solution, clock: Clock):
        self.options, self.problem, self.cost, self.start, self.clock = options, problem, cost, start, clock
        self.spec, self.notes = start.alignment.spec, start.notes
        with clock("start"):
            self.fixed = self._to_linear_form(problem.fixed)
            self.moved = start.alignment.on(self.spec, problem.moving)
            moved = self._to_linear_form(self.moved)
            self.pairs = self._pair_tensors(self.fixed, moved)
            self.count = sum(a.numel() for _, a, _ in self.pairs)
            self.squared_norms = [
                sum(self._squared_norm(tensor, a) for tensor, a, _ in self.pairs),
                sum(self._squared_norm(tensor, b) for tensor, _, b in self.pairs),
            ]
        dtype = compute_dtype(*(tensor.dtype for tensor in self.fixed.values()))
        self.relaxation = Relaxation(
            generator=problem.generator,
            permuting=options.permuting,
            temperature=options.temperature,
            iterations=options.iterations,
            implicit=options.implicit,
            noise=options.noise,
            device=problem.device,
            dtype=dtype,
        )
        self.best_ends: list[Alignment] | None = None
        self.ends = self._relax_identity()
        if cost not in WEIGHT_COSTS:
            assert problem.forward is not None
            self.batches = cycle_batches(problem.forward.data)  # after a round, the batches of checks come again
            self.check_batches = list(islice(self.batches, options.checks))
            self.loss = self._make_loss(problem.forward, {**self.fixed, **moved})

    def _relax_identity(self) -> list[RelaxedAlignment]:
        """Create the relaxed alignments that a descent begins with: of the moving model, or of both."""
        count = 2 if self.options.both_ends and self.cost not in WEIGHT_COSTS else 1
        return [RelaxedAlignment.identity(self.spec, self.relaxation) for _ in range(count)]

    def _make_loss(self, forward: Forward, moved: StateDict) -> Callable[[StateDict, float, Any], Tensor]:
        """Make the loss of (the model at λ, λ, a batch)."""
        device = self.problem.device
        module, module_keys = forward.module()
        module = module.to(device).eval().requires_grad_(False)
        if forward.loss is None and not self._returns_loss(module):
            divergence = Divergence(module, module_keys, (self.fixed, moved), device)
            self.notes = (*self.notes, UNLABELLED_NOTE)

            def mean_divergence(state: StateDict, t: float, batch: Any) -> Tensor:
                samples = divergence.per_sample(state, (1 - t, t), batch)
                return samples.sum() / max(len(samples), 1)

            return mean_divergence
        use_batch_statistics(module)
        call = FunctionalCall(module, module_keys, require_scalar_loss(forward.loss or compute_own_loss), device)
        return lambda state, t, batch: call(state, batch)

    def _returns_loss(self, module: nn.Module) -> bool:
        """Tell whether the module returns a loss for the batches of checks; all processes agree."""
        device = next((t.device for t in self.fixed.values()), None)
        with_loss = [returns_loss(module, move_batch(batch, self.problem.device)) for batch in self.check_batches]
        labelled, count = all_reduce_numbers([sum(with_loss), len(with_loss)], device)
        if 0 < labelled < count:
            raise OptionError(
                f"{type(module).__name__} returns a loss for {labelled:.0f} of the first {count:.0f} batches; put "
                "labels in all of them, or in none"
            )
        return labelled > 0

    def _to_linear_form(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a model in the form that groups act on linearly, on the device."""
        return self._to_device(fold_state(self.spec, state))

    def _to_device(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: t.detach().to(self.problem.device).contiguous() for key, t in state.items()}

    def _pair_tensors(self, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor]) -> Pairs:
        """Return the tensors of both models that the cost compares or mixes; others stay the fixed model's."""
        tensors = matched_tensors(self.spec) if self.cost in WEIGHT_COSTS else self.spec.tensors
        shared = (t for t in tensors if all(key in moving for key in t.keys.values()))
        return [(tensor, tensor.gather(fixed), tensor.gather(moving)) for tensor in shared]

    def _unmoved_pairs(self) -> Pairs:
        """Return the tensors of both models before alignment; not folded for data, as a plain average is measured."""
        if self.cost in WEIGHT_COSTS:
            return self._pair_tensors(self.fixed, self._to_linear_form(self.problem.moving))
        return self._pair_tensors(self._to_device(self.problem.fixed), self._to_device(self.problem.moving))

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Solution:
        """Run all descents and return the best exact alignment seen, the start and the identity included."""
        unmoved: list[Mapping[str, SupportsAct]] = [{} for _ in self.ends]
        with self.clock("exact"):
            identity_cost = self._exact_cost(unmoved, self._unmoved_pairs())
            self.start_cost = self.best_cost = self._exact_cost(unmoved, self.pairs)
        if not math.isfinite(self.best_cost):
            raise OptionError(f"the cost {self.cost!r} begins at {self.best_cost}; check the data and both models")
        self.history = [self._objective(identity_cost), self._objective(self.best_cost)]
        status = self.start.status
        for _ in range(self.options.starts if any(end.elements for end in self.ends) else 0):
            status, self.ends = self._descend(), self._relax_identity()
            if self._are_equal:
                break
        alignment = self.start.alignment
        if self.best_ends is not None:
            alignment = self._combine_ends(self.best_ends).compose(alignment)
        if self.best_cost > identity_cost:  # by this cost the start was worse, and nothing near it is better
            self.history.append(self.history[0])
            alignment, status = Alignment.identity(self.problem.spec), Status.IDENTITY
        elif equal_within(self.problem, alignment):
            status = Status.EQUAL
        return replace(
            self.start,
            alignment=alignment,
            objective=self.history[-1],
            history=tuple(self.history),
            status=status,
            notes=self.notes,
            seconds={**self.start.seconds, **self.clock.seconds},
        )

    @property
    def _are_equal(self) -> bool:
        return self.cost in WEIGHT_COSTS and self.best_cost <= EQUALITY_TOLERANCE * self.squared_norms[0]

    def _descend(self) -> Status:
        """Run one descent; keep the lowest cost of an exact alignment in `best_cost`, and its ends in `best_ends`."""
        options, lowest, waited = self.options, self.start_cost, 0
        permuting = [latent for end in self.ends for latent in end.permuting]
        smooth = [latent for end in self.ends for latent in end.smooth]
        decay = 0.1 / max(options.lr, 1) if options.weight_decay is None else options.weight_decay
        groups = [
            {"params": permuting, "lr": options.lr, "weight_decay": decay if options.optimizer == "adamw" else 0.0},
            {"params": smooth, "lr": options.smooth_lr, "weight_decay": 0.0},  # no basis is preferred
        ]
        optimizer = OPTIMIZERS[options.optimizer]([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[options.schedule](options.steps))
        disable = None if self.problem.progress else True
        with tqdm(total=options.steps, desc="aligning by gradients", unit="step", leave=False, disable=disable) as bar:
            for step in range(1, options.steps + 1):
                with self.clock("steps"), torch.enable_grad():
                    optimizer.zero_grad()
                    self._relaxed_cost([end.soft() for end in self.ends]).backward()
                    all_reduce_gradients([*permuting, *smooth])
                    optimizer.step()
                    schedule.step()
                bar.update()
                if step % options.check_every and step != options.steps:
                    continue
                with self.clock("exact"):
                    hard = [end.hard() for end in self.ends]
                    cost = self._exact_cost([alignment.elements for alignment in hard], self.pairs)
                waited += 1
                if cost < lowest:
                    lowest, waited = cost, 0
                if cost < self.best_cost:
                    self.best_cost, self.best_ends = cost, hard
                self.history.append(self._objective(self.best_cost))
                bar.set_postfix(cost=f"{self.best_cost:.4g}")
                if self._are_equal:
                    break
                if waited >= options.patience:
                    return Status.SETTLED
        return Status.STEP_LIMIT

    def _combine_ends(self, hard: Sequence[Alignment]) -> Alignment:
        """Return g or, with h at the fixed end, h⁻¹ g, which keeps the function of every point between the models."""
        norms = find_gauges(self.spec)
        g, *others = hard
        for h in others:
            g = h.inverse().compose(g)
        return replace(g, gauge=gauge_vectors(norms, self.problem.fixed), origin=gauge_vectors(norms, self.moved))

    def _objective(self, cost: float) -> float:
        """Turn a cost into an objective: Σ ⟨fixed, g · moving⟩ for "l2", in groups that keep lengths; else −cost."""
        return 0.5 * (sum(self.squared_norms) - cost) if self.cost == "l2" else -cost

    def _squared_norm(self, tensor: LabelledTensor, x: Tensor) -> float:
        """Return ‖x‖², with blocks weighted as in the cost."""
        squares = ((weight_of(self.spec, b), b.view(x).square().sum(dtype=torch.float64)) for b in tensor.blocks)
        return sum(weight * square.item() for weight, square in squares)

    # --- costs -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _exact_cost(self, elements: Sequence[Mapping[str, SupportsAct]], pairs: Pairs) -> float:
        """Compute the cost of exact elements on the batches of checks, each at another point for "rnd"."""
        if self.cost in WEIGHT_COSTS:
            return float(self._weight_cost(elements, pairs))
        count = len(self.check_batches)
        low, high = self.options.interval
        points = [low + (high - low) * (i + 0.5) / count if self.cost == "rnd" else 0.5 for i in range(count)]
        values = [
            self._data_cost(elements, pairs, t, batch) for t, batch in zip(points, self.check_batches, strict=True)
        ]
        mean = torch.stack(values).double().mean()
        return all_reduce_mean(mean).item()

    def _relaxed_cost(self, elements: Sequence[Mapping[str, SupportsAct]]) -> Tensor:
        """Compute the cost of relaxed elements, on the next batch."""
        if self.cost in WEIGHT_COSTS:
            value = self._weight_cost(elements, self.pairs)
            return value / self.count if self.cost == "l1" else value
        low, high = self.options.interval
        t = 0.5
        if self.cost == "rnd":
            t = low + (high - low) * torch.rand((), generator=self.problem.generator).item()
        return self._data_cost(elements, self.pairs, t, next(self.batches))

    def _weight_cost(self, elements: Sequence[Mapping[str, SupportsAct]], pairs: Pairs) -> Tensor:
        total: Any = 0.0
        squares: Any = 0.0
        for tensor, a, b in pairs:
            for block in tensor.blocks:
                y = act_on_block(self.spec, elements[0], block, block.view(b))
                x = act_on_block(self.spec, elements[1], block, block.view(a)) if len(elements) > 1 else block.view(a)
                weight = weight_of(self.spec, block)
                if self.cost == "cosine":
                    total = total + weight * (x * y).sum(dtype=torch.float64)
                    squares = squares + weight * torch.stack([z.square().sum(dtype=torch.float64) for z in (x, y)])
                else:
                    difference = x - y
                    size = difference.square() if self.cost == "l2" else difference.abs()
                    total = total + weight * size.sum(dtype=torch.float64)
        return 1 - total / squares.prod().sqrt() if self.cost == "cosine" else total

    def _data_cost(self, elements: Sequence[Mapping[str, SupportsAct]], pairs: Pairs, t: float, batch: Any) -> Tensor:
        merged: dict[str, Tensor] = {}
        for tensor, a, b in pairs:
            y = act_with_gradients(self.spec, elements[0], tensor, b)
            x = act_with_gradients(self.spec, elements[1], tensor, a) if len(elements) > 1 else a
            mixed = torch.lerp(x, y, t) if x.is_floating_point() else x
            merged |= split_keys(tensor, mixed)
        return self.loss({**self.fixed, **merged}, t, batch)


def _refuse_uncovered(problem: Problem) -> None:
    """Refuse rotations if the fixed model has tensors without a partner: norms are not folded into such a head."""
    covered = {key for tensor in problem.spec.tensors for key in tensor.keys.values()}
    uncovered = sorted(problem.fixed.keys() - covered)
    if problem.spec.gauged and uncovered:
        raise OptionError(
            f"a cost on data cannot be minimised over rotations, as {listed(uncovered)} of the fixed model has no "
            "partner; take the cost l2, groups='permutation', or a solver without gradients"
        )
