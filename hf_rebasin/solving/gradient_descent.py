"""Alignment by gradients: one loop over relaxed elements for every group, every cost and every architecture.

The loop moves the moving model to where it starts from, relaxes the identity of every group, and descends a cost of
the relaxed alignment; now and then the exact alignment nearest to it is measured by the same cost, and the best exact
one that was seen is returned. Norms between a rotated stream and its readers are folded away in both models first:
there every group acts linearly, and a point between the two is the same function as between the models as they are.

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

from ..alignment.alignment import Alignment, act_on_block
from ..alignment.elements.relaxation import Acting, Permuting, Softening
from ..alignment.gauge import gauges, plain, vectors
from ..alignment.relaxed_alignment import RelaxedAlignment, acted, split
from ..errors import OptionError, some
from ..modules.distributed import averaged, endless, mean_of_all, numbers_of_all
from ..modules.divergence import Divergence, State
from ..modules.forward import own_loss, says_a_loss
from ..modules.functional import Computing, by_batch_statistics, one_number, there
from ..symmetries.spec import Labelled
from .problem import Forward, Problem, equal_within, matched_tensors, weight_of
from .solution import Clock, Solution, Solver, Status, solver_with

Pairs: TypeAlias = "list[tuple[Labelled, Tensor, Tensor]]"  # of tensors that the groups act on linearly
Cost: TypeAlias = Literal["l2", "l1", "cosine", "mid", "rnd"]
OF_WEIGHTS = ("l2", "l1", "cosine")

OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {  # {name: steps to (step to share of the rate)}
    "constant": lambda steps: lambda step: 1.0,
    "cosine": lambda steps: lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps),
}
UNLABELLED = "aligned without labels, by how far the model in between is from saying what the two say"
NOTHING = 1e-12  # of the squared norm of the fixed model: two models as far apart are equal


@dataclass(frozen=True)
class Descent:
    """Knobs of all solvers that descend a cost.

    Args:
        cost: "l2", "l1" or "cosine" of the weights; with data, "mid" for the loss halfway between the models or "rnd"
            for the loss at a random place of `interval`; without labels, for how far the model there is from what
            the two say (see `divergence`). By default "mid" with data ("rnd" for `learned`), "l2" without.
            "l1" is descended as a mean, as in the paper, whose `lr` of 10 belongs to that: its gradients lie below
            the eps of AdamW.
        start: the solver whose alignment is improved, or "identity"; no result is worse than it. With knobs of it,
            `{"solver": name, knob: value, …}`.
        starts: as many descents from there, each with the batches that come then and with noise of its own; the best
            alignment of all is kept.
        steps: of the optimizer, at most.
        lr: learning rate of what permutes.
        smooth_lr: learning rate of rotations, bases and scales.
        optimizer: "adamw", "adam" or "sgd".
        schedule: of both learning rates: "constant", or "cosine" down to 0.
        weight_decay: of what permutes, by "adamw": it keeps latent entries within about 1 / weight_decay. Otherwise
            what was mistaken early becomes so hard that no gradient is left to mend it. By default 0.1; 0.1 / lr where
            a step would take more than a tenth.
        interval: the λ of "rnd" are uniform between its ends.
        check_every: after as many steps the nearest exact alignment is measured.
        checks: on as many batches, the first of the data.
        patience: as many of these measurements without a better one end the descent.
        both_ends: of a loss on data, move both models towards each other; what was found is then carried over to the
            moving one. Only where nothing permutes.
        permuting: how permutations are relaxed: "sinkhorn", "straight_through", or "kept" where they are.
        temperature: of the Sinkhorn operator.
        iterations: of the same.
        implicit: its gradient by the equations of its fixed point, or else through all iterations.
        noise: standard deviation of what is added to the latent matrices I at the start.
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

    TAKES_DATA: ClassVar[bool] = True
    ON_DATA: ClassVar[Cost] = "mid"  # the cost where none is said

    def __post_init__(self) -> None:
        for name in ("starts", "steps", "check_every", "checks", "patience"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; give 1 or more")
        self._starting()
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise OptionError(f"weight_decay = {self.weight_decay}; give 0 or more")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise OptionError(f"interval = {self.interval}; give two places between 0 and 1, the lower one first")
        if self.both_ends and self.permuting != "kept":
            raise OptionError("both_ends needs permuting='kept': only what is no permutation can move at both ends")

    def solve(self, problem: Problem) -> Solution:
        cost = self.cost or ("l2" if problem.forward is None else self.ON_DATA)
        if cost not in OF_WEIGHTS and problem.forward is None:
            raise OptionError(f"the cost {cost!r} is a loss on data, and there are none; give data, or one of l2, l1")
        if cost not in OF_WEIGHTS:
            _refuse_uncovered(problem)
        if cost in OF_WEIGHTS and self.starts > 1 and (self.permuting == "kept" or not self.noise):
            raise OptionError(
                f"starts = {self.starts}, and without data or noise all of them are the same; give either"
            )
        clock = Clock()
        with clock("start"):
            start = self._started(problem)
        if start.status in (Status.EQUAL, Status.IDENTITY):
            return start
        return _Descending(self, problem, cost, start, clock).solution()

    def _started(self, problem: Problem) -> Solution:
        solver = self._starting()
        if solver is None:
            return Solution(Alignment.identity(problem.spec), 0.0, (), Status.STEP_LIMIT)
        return solver.solve(problem)

    def _starting(self) -> Solver | None:
        """The solver whose alignment is improved; None for the identity."""
        knobs = {"solver": self.start} if isinstance(self.start, str) else dict(self.start)
        if "solver" not in knobs:
            raise OptionError(f"start = {self.start}; say which solver: {{'solver': name, knob: value, …}}")
        name = str(knobs.pop("solver"))
        if name == "identity" and knobs:
            raise OptionError(f"start: the identity has no knobs, such as {some(knobs)}")
        return None if name == "identity" else solver_with(name, knobs)


class _Descending:
    """One descent: the two models in a form that groups act on linearly, and latents of all that moves."""

    def __init__(self, knobs: Descent, problem: Problem, cost: Cost, start: Solution, clock: Clock):
        self.knobs, self.problem, self.cost, self.start, self.clock = knobs, problem, cost, start, clock
        self.spec, self.notes = start.alignment.spec, start.notes
        with clock("start"):
            self.fixed = self._linear(problem.fixed)
            self.moved = start.alignment.on(self.spec, problem.moving)
            moved = self._linear(self.moved)
            self.pairs = self._paired(self.fixed, moved)
            self.count = sum(a.numel() for _, a, _ in self.pairs)
            self.sizes = [
                sum(self._size(tensor, a) for tensor, a, _ in self.pairs),
                sum(self._size(tensor, b) for tensor, _, b in self.pairs),
            ]
        dtype = max((t.dtype for t in self.fixed.values()), key=lambda kind: kind.itemsize, default=torch.float32)
        self.softening = Softening(
            problem.generator,
            knobs.permuting,
            knobs.temperature,
            knobs.iterations,
            knobs.implicit,
            knobs.noise,
            problem.device,
            dtype,
        )
        self.found: list[Alignment] | None = None
        self.ends = self._begun()
        if cost not in OF_WEIGHTS:
            assert problem.forward is not None
            self.batches = endless(problem.forward.data)  # the first of it are for measuring, too, once it is round
            self.checked = list(islice(self.batches, knobs.checks))
            self.loss = self._measure(problem.forward, {**self.fixed, **moved})

    def _begun(self) -> list[RelaxedAlignment]:
        """Where a descent begins, of the moving model or of both."""
        count = 2 if self.knobs.both_ends and self.cost not in OF_WEIGHTS else 1
        return [RelaxedAlignment.identity(self.spec, self.softening) for _ in range(count)]

    def _measure(self, forward: Forward, moved: State) -> Callable[[State, float, Any], Tensor]:
        """What is descended of (the model at λ, λ, a batch)."""
        device = self.problem.device
        module, names = forward.module()
        module = module.to(device).eval().requires_grad_(False)
        if forward.loss is None and not self._labelled(module):
            diverging = Divergence(module, names, (self.fixed, moved), device)
            self.notes = (*self.notes, UNLABELLED)

            def apart(state: State, t: float, batch: Any) -> Tensor:
                found = diverging.of(state, (1 - t, t), batch)
                return found.sum() / max(len(found), 1)

            return apart
        by_batch_statistics(module)
        computing = Computing(module, names, one_number(forward.loss or own_loss), device)
        return lambda state, t, batch: computing(state, batch)

    def _labelled(self, module: nn.Module) -> bool:
        """Whether the module says a loss for the batches that are checked, the same in all processes."""
        place = next((t.device for t in self.fixed.values()), None)
        said = [says_a_loss(module, there(batch, self.problem.device)) for batch in self.checked]
        labelled, count = numbers_of_all([sum(said), len(said)], place)
        if 0 < labelled < count:
            raise OptionError(
                f"{type(module).__name__} gives a loss for {labelled:.0f} of the first {count:.0f} batches; put "
                "labels in all of them, or in none"
            )
        return labelled > 0

    def _linear(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model in the form that groups act on linearly, where it is computed with."""
        return self._brought(plain(self.spec, state))

    def _brought(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model where it is computed with."""
        return {key: t.detach().to(self.problem.device).contiguous() for key, t in state.items()}

    def _paired(self, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor]) -> Pairs:
        """What the cost looks at, of both models; what the moving one has not is the fixed one's."""
        tensors = matched_tensors(self.spec) if self.cost in OF_WEIGHTS else self.spec.tensors
        there = (t for t in tensors if all(key in moving for key in t.keys.values()))
        return [(tensor, tensor.gather(fixed), tensor.gather(moving)) for tensor in there]

    def _unmoved(self) -> Pairs:
        """The two models as they are; of data the plain average is measured, and not that of the folded ones."""
        if self.cost in OF_WEIGHTS:
            return self._paired(self.fixed, self._linear(self.problem.moving))
        return self._paired(self._brought(self.problem.fixed), self._brought(self.problem.moving))

    # --- the loop ----------------------------------------------------------------------------------------------------

    def solution(self) -> Solution:
        """The best exact alignment of all that are seen on the way down, the start and the identity among them."""
        still: list[Mapping[str, Acting]] = [{} for _ in self.ends]
        with self.clock("exact"):
            identity = self._exact(still, self._unmoved())
            self.begins = self.best = self._exact(still, self.pairs)
        if not math.isfinite(self.best):
            raise OptionError(f"the cost {self.cost!r} begins at {self.best}; look at the data, and at both models")
        self.history = [self._objective(identity), self._objective(self.best)]
        status = self.start.status
        for _ in range(self.knobs.starts if any(end.elements for end in self.ends) else 0):
            status, self.ends = self._descended(), self._begun()
            if self._are_equal:
                break
        alignment = self.start.alignment
        if self.found is not None:
            alignment = self._between(self.found).compose(alignment)
        if self.best > identity:  # a start that the cost thinks little of, and nothing better near it
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
        return self.cost in OF_WEIGHTS and self.best <= NOTHING * self.sizes[0]

    def _descended(self) -> Status:
        """Step after step, `best` and `found` are the lowest cost of an exact alignment and where it was."""
        knobs, lowest, waited = self.knobs, self.begins, 0
        permuting = [latent for end in self.ends for latent in end.permuting]
        smooth = [latent for end in self.ends for latent in end.smooth]
        decay = 0.1 / max(knobs.lr, 1) if knobs.weight_decay is None else knobs.weight_decay
        groups = [
            {"params": permuting, "lr": knobs.lr, "weight_decay": decay if knobs.optimizer == "adamw" else 0.0},
            {"params": smooth, "lr": knobs.smooth_lr, "weight_decay": 0.0},  # 0 is no better a basis than others
        ]
        optimizer = OPTIMIZERS[knobs.optimizer]([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[knobs.schedule](knobs.steps))
        quiet = None if self.problem.progress else True
        with tqdm(total=knobs.steps, desc="aligning by gradients", unit="step", leave=False, disable=quiet) as bar:
            for step in range(1, knobs.steps + 1):
                with self.clock("steps"), torch.enable_grad():
                    optimizer.zero_grad()
                    self._value([end.soft() for end in self.ends]).backward()
                    averaged([*permuting, *smooth])
                    optimizer.step()
                    schedule.step()
                bar.update()
                if step % knobs.check_every and step != knobs.steps:
                    continue
                with self.clock("exact"):
                    hard = [end.hard() for end in self.ends]
                    cost = self._exact([alignment.elements for alignment in hard], self.pairs)
                waited += 1
                if cost < lowest:
                    lowest, waited = cost, 0
                if cost < self.best:
                    self.best, self.found = cost, hard
                self.history.append(self._objective(self.best))
                bar.set_postfix(cost=f"{self.best:.4g}")
                if self._are_equal:
                    break
                if waited >= knobs.patience:
                    return Status.SETTLED
        return Status.STEP_LIMIT

    def _between(self, hard: Sequence[Alignment]) -> Alignment:
        """g; or with h at the other end, h⁻¹ g: what is between the two models is the same function."""
        norms = gauges(self.spec)
        g, *others = hard
        for h in others:
            g = h.inverse().compose(g)
        return replace(g, gauge=vectors(norms, self.problem.fixed), origin=vectors(norms, self.moved))

    def _objective(self, cost: float) -> float:
        """What rises as the cost falls: Σ ⟨fixed, g · moving⟩ for "l2", in groups that keep lengths; else −cost."""
        return 0.5 * (sum(self.sizes) - cost) if self.cost == "l2" else -cost

    def _size(self, tensor: Labelled, x: Tensor) -> float:
        """‖x‖², blocks weighted as in the cost."""
        squares = ((weight_of(self.spec, b), b.view(x).square().sum(dtype=torch.float64)) for b in tensor.blocks)
        return sum(weight * square.item() for weight, square in squares)

    # --- costs -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _exact(self, elements: Sequence[Mapping[str, Acting]], pairs: Pairs) -> float:
        """The cost of exact elements, on all batches that are checked; each at another place for "rnd"."""
        if self.cost in OF_WEIGHTS:
            return float(self._of_weights(elements, pairs))
        count = len(self.checked)
        low, high = self.knobs.interval
        places = [low + (high - low) * (i + 0.5) / count if self.cost == "rnd" else 0.5 for i in range(count)]
        values = [self._loss(elements, pairs, t, batch) for t, batch in zip(places, self.checked, strict=True)]
        mean = torch.stack(values).double().mean()
        return mean_of_all(mean).item()

    def _value(self, elements: Sequence[Mapping[str, Acting]]) -> Tensor:
        """The cost of relaxed elements, on the next batch."""
        if self.cost in OF_WEIGHTS:
            value = self._of_weights(elements, self.pairs)
            return value / self.count if self.cost == "l1" else value
        low, high = self.knobs.interval
        t = 0.5
        if self.cost == "rnd":
            t = low + (high - low) * torch.rand((), generator=self.problem.generator).item()
        return self._loss(elements, self.pairs, t, next(self.batches))

    def _of_weights(self, elements: Sequence[Mapping[str, Acting]], pairs: Pairs) -> Tensor:
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
                    apart = x - y
                    size = apart.square() if self.cost == "l2" else apart.abs()
                    total = total + weight * size.sum(dtype=torch.float64)
        return 1 - total / squares.prod().sqrt() if self.cost == "cosine" else total

    def _loss(self, elements: Sequence[Mapping[str, Acting]], pairs: Pairs, t: float, batch: Any) -> Tensor:
        merged: dict[str, Tensor] = {}
        for tensor, a, b in pairs:
            y = acted(self.spec, elements[0], tensor, b)
            x = acted(self.spec, elements[1], tensor, a) if len(elements) > 1 else a
            whole = torch.lerp(x, y, t) if x.is_floating_point() else x
            merged |= split(tensor, whole)
        return self.loss({**self.fixed, **merged}, t, batch)


def _refuse_uncovered(problem: Problem) -> None:
    """Norms are folded into what reads them, and a head that the moving model has not is not among it."""
    covered = {key for tensor in problem.spec.tensors for key in tensor.keys.values()}
    left = sorted(problem.fixed.keys() - covered)
    if problem.spec.gauged and left:
        raise OptionError(
            f"what the models say cannot be descended over rotations, as {some(left)} of the fixed one has no "
            "partner; take the cost l2, groups='permutation', or a solver without gradients"
        )
