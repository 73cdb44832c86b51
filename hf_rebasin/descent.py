"""Alignment by gradients: one loop over relaxed elements for every group, every cost and every architecture.

The loop moves the moving model to where it starts from, relaxes the identity of every group, and descends a cost of
the relaxed alignment; now and then the exact alignment nearest to it is measured by the same cost, and the best exact
one that was seen is returned. Norms between a rotated stream and its readers are folded away in both models first:
there every group acts linearly, and a point between the two is the same function as between the models as they are.

Costs are those of Re-basin via implicit Sinkhorn differentiation (Guerrero Peña et al. 2023, arXiv 2212.12042).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from . import registry
from .alignment import Alignment, act_on_block
from .errors import OptionError
from .gauge import gauges, plain, vectors
from .objective import Forward, Problem, equal_within, matched_tensors, weight_of
from .relaxed_alignment import RelaxedAlignment, acted, split
from .relaxing import Acting, Permuting, Softening
from .solving import Clock, Solution, Status
from .spec import Labelled

Cost: TypeAlias = Literal["l2", "l1", "cosine", "mid", "rnd"]
OF_WEIGHTS = ("l2", "l1", "cosine")

OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
NOTHING = 1e-12  # of the squared norm of the fixed model: two models as far apart are equal


@dataclass(frozen=True)
class Descent:
    """Knobs of all solvers that descend a cost.

    Args:
        cost: "l2", "l1" or "cosine" of the weights; with data, "mid" for the loss halfway between the models or "rnd"
            for the loss at a random place of `interval`. By default "mid" with data, "l2" without.
        start: the solver whose alignment is improved, or "identity"; no result is worse than it.
        steps: of the optimizer, at most.
        lr: learning rate of what permutes.
        smooth_lr: learning rate of rotations, bases and scales.
        optimizer: "adamw", "adam" or "sgd".
        schedule: of both learning rates: "constant", or "cosine" down to 0.
        weight_decay: of what permutes, by "adamw": it keeps latent entries within about 1 / weight_decay. A matrix that
            was mistaken early else becomes so hard that no gradient is left to mend it. By default 0.1; 0.1 / lr where
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
    start: str = "weight_matching"
    steps: int = 300
    lr: float = 0.1
    smooth_lr: float = 3e-3
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    check_every: int = 10
    checks: int = 4
    patience: int = 10
    both_ends: bool = False
    permuting: Permuting = "sinkhorn"
    temperature: float = 1.0
    iterations: int = 20
    implicit: bool = True
    noise: float = 0.0

    TAKES_DATA: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("steps", "check_every", "checks", "patience"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; give 1 or more")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise OptionError(f"weight_decay = {self.weight_decay}; give 0 or more")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise OptionError(f"interval = {self.interval}; give two places between 0 and 1, the lower one first")
        if self.both_ends and self.permuting != "kept":
            raise OptionError("both_ends needs permuting='kept': only what is no permutation can move at both ends")

    def solve(self, problem: Problem) -> Solution:
        cost = self.cost or ("l2" if problem.forward is None else "mid")
        if cost not in OF_WEIGHTS and problem.forward is None:
            raise OptionError(f"the cost {cost!r} is a loss on data, and there are none; give data, or one of l2, l1")
        clock = Clock()
        with clock("start"):
            start = self._started(problem)
        if start.status in (Status.EQUAL, Status.IDENTITY):
            return start
        descending = _Descending(self, problem, cost, start.alignment, clock)
        return descending.solution(start)

    def _started(self, problem: Problem) -> Solution:
        if self.start == "identity":
            return Solution(Alignment.identity(problem.spec), 0.0, (), Status.STEP_LIMIT)
        solver = registry.find("solvers", self.start).Solver()
        return solver.solve(problem)


class _Descending:
    """One descent: the two models in a form that groups act on linearly, and latents of all that moves."""

    def __init__(self, knobs: Descent, problem: Problem, cost: Cost, start: Alignment, clock: Clock):
        self.knobs, self.problem, self.cost, self.start, self.clock = knobs, problem, cost, start, clock
        self.spec = start.spec
        self.moved = start.on(self.spec, problem.moving)
        with clock("start"):
            self.fixed, self.moving = (
                {
                    key: tensor.detach().to(problem.device).contiguous()
                    for key, tensor in plain(self.spec, state).items()
                }
                for state in (problem.fixed, self.moved)
            )
        dtype = max((t.dtype for t in self.fixed.values()), key=lambda kind: kind.itemsize, default=torch.float32)
        soften = Softening(
            problem.generator,
            knobs.permuting,
            knobs.temperature,
            knobs.iterations,
            knobs.implicit,
            knobs.noise,
            problem.device,
            dtype,
        )
        count = 2 if knobs.both_ends and cost not in OF_WEIGHTS else 1
        self.ends = [RelaxedAlignment.identity(self.spec, soften) for _ in range(count)]
        matched = matched_tensors(self.spec)
        self.pairs = [
            (tensor, tensor.gather(self.fixed), tensor.gather(self.moving))
            for tensor in (matched if cost in OF_WEIGHTS else self.spec.tensors)
            if all(key in self.moving for key in tensor.keys.values())
        ]
        if cost not in OF_WEIGHTS:
            assert problem.forward is not None
            self.loss = _Between(problem.forward, problem.device)
            self.batches = _endless(problem.forward.data)
            self.checked = list(islice(_share(problem.forward.data), knobs.checks))

    # --- the loop ----------------------------------------------------------------------------------------------------

    def solution(self, start: Solution) -> Solution:
        """The best exact alignment of all that are seen on the way down; `start` where none is better."""
        permuting = [latent for end in self.ends for latent in end.permuting]
        smooth = [latent for end in self.ends for latent in end.smooth]
        best, found = self._exact([{} for _ in self.ends]), None
        history = [self._objective(best)]
        if not permuting and not smooth:
            return replace(start, objective=history[-1], history=tuple(history))
        decay = 0.1 / max(self.knobs.lr, 1) if self.knobs.weight_decay is None else self.knobs.weight_decay
        decay = decay if self.knobs.optimizer == "adamw" else 0.0
        groups = [
            {"params": permuting, "lr": self.knobs.lr, "weight_decay": decay},
            {"params": smooth, "lr": self.knobs.smooth_lr, "weight_decay": 0.0},  # 0 is no better basis than any other
        ]
        optimizer = OPTIMIZERS[self.knobs.optimizer]([group for group in groups if group["params"]])
        cosine = self.knobs.schedule == "cosine"
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.knobs.steps) if cosine else None
        status, waited = Status.STEP_LIMIT, 0
        quiet = None if self.problem.progress else True
        with tqdm(
            total=self.knobs.steps, desc="aligning by gradients", unit="step", leave=False, disable=quiet
        ) as bar:
            for step in range(1, self.knobs.steps + 1):
                with self.clock("steps"), torch.enable_grad():
                    optimizer.zero_grad()
                    value = self._value([end.soft() for end in self.ends])
                    value.backward()
                    _averaged([*permuting, *smooth])
                    optimizer.step()
                    if schedule is not None:
                        schedule.step()
                bar.update()
                if step % self.knobs.check_every and step != self.knobs.steps:
                    continue
                with self.clock("exact"):
                    hard = [end.hard() for end in self.ends]
                    now = self._exact([alignment.elements for alignment in hard])
                waited = 0 if now < best else waited + 1
                if now < best:
                    best, found = now, hard
                history.append(self._objective(best))
                bar.set_postfix(cost=f"{best:.4g}")
                if self.cost in OF_WEIGHTS and best <= NOTHING * self._size:
                    break
                if waited >= self.knobs.patience:
                    status = Status.SETTLED
                    break
        seconds = dict(start.seconds) | self.clock.seconds
        if found is None:
            return replace(start, objective=history[-1], history=tuple(history), status=status, seconds=seconds)
        alignment = self._between(found).compose(self.start)
        if equal_within(self.problem, alignment):
            status = Status.EQUAL
        return Solution(alignment, history[-1], tuple(history), status, seconds, start.notes)

    def _between(self, hard: Sequence[Alignment]) -> Alignment:
        """g; or with h at the other end, h⁻¹ g: what is between the two models is the same function."""
        norms = gauges(self.spec)
        g, *others = hard
        for h in others:
            g = h.inverse().compose(g)
        return replace(g, gauge=vectors(norms, self.problem.fixed), origin=vectors(norms, self.moved))

    @property
    def _size(self) -> float:
        return sum(a.double().square().sum().item() for _, a, _ in self.pairs)

    def _objective(self, cost: float) -> float:
        """What rises as the cost falls: Σ ⟨fixed, g · moving⟩ for "l2", in groups that keep lengths; else −cost."""
        if self.cost != "l2":
            return -cost
        both = sum(self._weighted(tensor, a) + self._weighted(tensor, b) for tensor, a, b in self.pairs)
        return 0.5 * (both - cost)

    def _weighted(self, tensor: Labelled, x: Tensor) -> float:
        return sum(
            weight_of(self.spec, block) * block.view(x).double().square().sum().item() for block in tensor.blocks
        )

    # --- costs -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _exact(self, elements: Sequence[Mapping[str, Acting]]) -> float:
        """The cost of exact elements, on all batches that are checked."""
        if self.cost in OF_WEIGHTS:
            return float(self._of_weights(elements))
        places = torch.linspace(*self.knobs.interval, 3).tolist() if self.cost == "rnd" else [0.5]
        values = [self._loss(elements, t, batch) for t in places for batch in self.checked]
        mean = torch.stack(values).double().mean()
        return _mean(mean).item()

    def _value(self, elements: Sequence[Mapping[str, Acting]]) -> Tensor:
        """The cost of relaxed elements, on the next batch."""
        if self.cost in OF_WEIGHTS:
            return self._of_weights(elements)
        low, high = self.knobs.interval
        t = 0.5
        if self.cost == "rnd":
            t = low + (high - low) * torch.rand((), generator=self.problem.generator).item()
        return self._loss(elements, t, next(self.batches))

    def _of_weights(self, elements: Sequence[Mapping[str, Acting]]) -> Tensor:
        total: Any = 0.0
        squares: Any = 0.0
        for tensor, a, b in self.pairs:
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

    def _loss(self, elements: Sequence[Mapping[str, Acting]], t: float, batch: Any) -> Tensor:
        merged: dict[str, Tensor] = {}
        for tensor, a, b in self.pairs:
            y = acted(self.spec, elements[0], tensor, b)
            x = acted(self.spec, elements[1], tensor, a) if len(elements) > 1 else a
            whole = torch.lerp(x, y, t) if x.is_floating_point() else x
            merged |= split(tensor, whole)
        return self.loss({**self.fixed, **merged}, batch)


# --- data ------------------------------------------------------------------------------------------------------------


class _Between:
    """The loss of a copy of the fixed module with other tensors in it, given by canonical keys."""

    def __init__(self, forward: Forward, device: Any):
        module, self.names = forward.module()
        module = module.to(device).eval().requires_grad_(False)
        for norm in module.modules():
            if isinstance(norm, _BatchNorm):  # statistics of one model mean nothing for another
                norm.train()
        self.buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        self.costed, self.device = _Costed(module, forward.loss), device

    def __call__(self, state: Mapping[str, Tensor], batch: Any) -> Tensor:
        from accelerate.utils import send_to_device

        tensors = {}
        for key, name in self.names.items():
            value = state[key]
            tensors[f"module.{name}"] = value.detach().clone() if name in self.buffers else value
        batch = send_to_device(batch, self.device) if self.device is not None else batch
        value = torch.func.functional_call(self.costed, tensors, (batch,))
        if not isinstance(value, Tensor) or value.dim():
            raise OptionError(f"the loss gave {_said(value)}; it has to return one number as a tensor")
        return value


class _Costed(nn.Module):
    def __init__(self, module: nn.Module, loss: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


def _said(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _share(data: Iterable[Any]) -> Iterator[Any]:
    """The batches of this process: what accelerate has prepared is shared out already."""
    batches = iter(data)
    if not _several() or type(data).__module__.startswith("accelerate."):
        return batches
    return islice(batches, torch.distributed.get_rank(), None, torch.distributed.get_world_size())


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        came = False
        for batch in _share(data):
            came = True
            yield batch
        if not came:
            raise OptionError(
                "the data gave no batch, or not for another round; give what can be read several times, such as a "
                "list or a DataLoader"
            )


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _mean(value: Tensor) -> Tensor:
    """Of all processes."""
    if not _several():
        return value
    from accelerate.utils import reduce

    return reduce(value, "mean")


def _averaged(latents: Iterable[Tensor]) -> None:
    """Gradients become their mean over all processes."""
    if _several():
        for latent in latents:
            if latent.grad is not None:
                latent.grad = _mean(latent.grad)
