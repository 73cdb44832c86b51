"""Alignment as a problem, its solution, and the coordinate loop that solvers share."""

from __future__ import annotations

import enum
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias, cast, overload

import torch
from torch import Tensor
from tqdm import tqdm

from .alignment import Alignment, Module, act_on, identity_of
from .axes import DIAGONAL
from .checkpoint import Checkpoint
from .groups import Element
from .spec import Block, Dim, Labelled, Spec, Unit
from .table import ROTATING, SIGNED
from .units import Elements, Nested, Similarity, solve, value

Device: TypeAlias = torch.device | str | None


class Status(enum.Enum):
    """How an alignment ended; the value says what to make of it."""

    CONVERGED = "converged: no symmetry can be improved by itself"
    EQUAL = "the moved model equals the fixed one, tensor by tensor"
    IDENTITY = "every symmetry is best left as it is, as for models of one base: nothing was moved"
    SWEEP_LIMIT = "stopped at the sweep limit before it converged: raise max_sweeps"


@dataclass(frozen=True)
class Problem:
    """Move one model onto another.

    Args:
        spec: what may move.
        fixed: the model that stays, `{canonical key: tensor}`.
        moving: the model that moves.
        generator: all randomness of a solver comes from here.
        device: where similarities are computed; by default where the tensors are.
        progress: show a progress bar (on a terminal).
    """

    spec: Spec
    fixed: Mapping[str, Tensor]
    moving: Mapping[str, Tensor]
    generator: torch.Generator
    device: Device = None
    progress: bool = False

    def tensors(self, tensor: Labelled) -> tuple[Tensor, Tensor]:
        """The two of one labelled tensor, in their own dtypes, on the device."""
        fixed, moving = tensor.gather(self.fixed), tensor.gather(self.moving)
        place = fixed.device if self.device is None else self.device
        return fixed.to(place), moving.to(place)

    @cached_property
    def constant(self) -> dict[str, Tensor]:
        """{symmetry: ⟨fixed, moving⟩ along it} over the blocks that no other symmetry touches."""
        total: dict[str, Tensor] = {}
        for tensor in matched_tensors(self.spec):
            dims = {block: place for block in tensor.blocks if (place := lone(self.spec, block)) is not None}
            fixed, moving = self.tensors(tensor) if dims else (None, None)
            for block, place in dims.items():
                a, b = block.view(cast(Tensor, fixed)), block.view(cast(Tensor, moving))
                product = product_of(a, b, [place]).mul_(weight_of(self.spec, block))
                label = label_of(self.spec, block.dims[place])
                total[label] = total[label].add_(product) if label in total else product
        return total


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Args:
        alignment: one element per symmetry.
        objective: Σ ⟨fixed, g · moving⟩ over all tensors that a symmetry touches, but gains and running statistics;
            over larger groups than permutations, of the canonical forms of the two, blocks weighted by `weight_of`.
        history: the objective at the start and after every sweep, of the start that won.
        status: how it ended; its value says what to make of it.
        seconds: where the time went.
        notes: what was left out of the groups and why, and what else a user should know.
    """

    alignment: Alignment
    objective: float
    history: tuple[float, ...]
    status: Status
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @overload
    def apply(self, moving: str | os.PathLike[str] | Checkpoint) -> Checkpoint: ...

    @overload
    def apply(self, moving: Module) -> Module: ...

    @overload
    def apply(self, moving: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def apply(self, moving: Any) -> Any:
        """The moving model in the coordinates of the fixed one; see `Alignment.apply`."""
        return self.alignment.apply(moving)


class Solver(Protocol):
    """A frozen dataclass of knobs that solves a problem."""

    def solve(self, problem: Problem) -> Solution: ...


class Measure(Protocol):
    """The similarity of two models along a unit, everything outside the unit moved by `elements`.

    With `known` given, only what involves no open symmetry outside `known` and the unit counts. The second value tells
    whether the similarity is exact; it is not where a symmetry occurs twice in a tensor.
    """

    def __call__(
        self, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
    ) -> tuple[Similarity, bool]: ...


class Clock:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


PIECE = 1 << 24  # elements of a tensor that are widened at a time

# A gain below this share of a unit's value is taken for rounding, as the similarities are float32 products; it also
# keeps near-dead neurons of two fine-tunes where they are.
ROUNDING = 1e-6

# A stream that is rotated can always be rotated a little better; a sweep that gains a smaller share than this is the
# last. On transformers trained apart the objective goes on rising for tens of sweeps, and the merge gets worse.
SETTLED = 1e-3


def coordinate_ascent(problem: Problem, measure: Measure, starts: int, max_sweeps: int) -> Solution:
    """Improve one unit at a time until none can be improved; the best of several starts.

    The first start goes outwards from what cannot move (embeddings, inputs, outputs): at each step it takes the unit
    of whose tensors the largest share is known already, and looks at that share alone. The others begin at the
    identity and take the units in random order, so they never end below it. There are no others where the first ends
    with equal models, as for a planted alignment, or with the identity, as for two models of one base.
    """
    clock = Clock()
    spec = problem.spec
    if not spec.units:
        return Solution(Alignment(spec, {}), objective(problem, {}), (), Status.IDENTITY, clock.seconds)
    enough = _bound(problem) * (1 - ROUNDING)
    best = _Ascent(problem, measure, clock, "start 1", enough).anchored().swept(max_sweeps)
    start = 2
    # one more than asked for where the first ends below the identity, from which the second starts
    while start <= starts or (start == 2 and best.history[-1] < best.history[0]):
        if best.history[-1] >= best.history[0] and (best.is_identity or best.history[-1] >= enough):
            break
        other = _Ascent(problem, measure, clock, f"start {start}", enough).swept(max_sweeps)
        best = max(best, other, key=lambda ascent: ascent.history[-1])  # the first of equals
        start += 1
    if best.history[-1] < best.history[0]:  # by rounding
        best = _Ascent(problem, measure, clock, "identity", enough)
    status = best.status
    if best.is_identity:
        status = Status.IDENTITY
    elif best.history[-1] >= enough and _equal(problem, best.elements):
        status = Status.EQUAL
    alignment = Alignment(spec, best.elements)
    return Solution(alignment, best.history[-1], tuple(best.history), status, clock.seconds)


class _Ascent:
    """One start of the coordinate loop; `enough` is an objective that only equal models reach."""

    def __init__(self, problem: Problem, measure: Measure, clock: Clock, name: str, enough: float):
        self.problem, self.measure, self.clock, self.name, self.enough = problem, measure, clock, name, enough
        self.spec, self.status = problem.spec, Status.CONVERGED
        self.elements: Elements = dict(Alignment.identity(self.spec).elements)
        self.stale = {unit.outer for unit in self.spec.units}
        self.history = [self.objective()]

    def objective(self) -> float:
        with self.clock("objective"):
            return objective(self.problem, self.elements)

    @property
    def is_identity(self) -> bool:
        return all(element.is_identity() for element in self.elements.values())

    def anchored(self) -> _Ascent:
        """One visit of every unit, best known first, looking only at what is known."""
        sizes = {unit: list(_sizes(self.spec, unit)) for unit in self.spec.units}
        known: set[str] = set()
        with self._bar("anchoring", len(sizes)) as bar:
            while sizes:
                shares = {
                    unit: _share(blocks, self.spec.free - known - {*unit.names}) for unit, blocks in sizes.items()
                }
                unit = max(shares, key=lambda unit: shares[unit])  # the first of equals
                del sizes[unit]
                self._visit(unit, known)
                if shares[unit] < 1:  # it has more to look at
                    self.stale.add(unit.outer)
                known |= set(unit.names)
                bar.update()
        self.history.append(self.objective())
        return self

    def swept(self, limit: int) -> _Ascent:
        """Visit all units in random order until none moves."""
        for sweep in range(limit):
            if self.history[-1] >= self.enough:
                return self
            order = torch.randperm(len(self.spec.units), generator=self.problem.generator).tolist()
            moved = False
            with self._bar(f"sweep {sweep + 1}", len(order)) as bar:
                for i in order:
                    unit = self.spec.units[i]
                    if unit.outer in self.stale:
                        moved |= self._visit(unit)
                    bar.update()
            if not moved:
                return self
            self.history.append(self.objective())
            if self.spec.gauged and self.history[-1] - self.history[-2] <= SETTLED * abs(self.history[-1]):
                return self
        self.status = Status.SWEEP_LIMIT
        return self

    def _bar(self, what: str, total: int) -> tqdm:
        quiet = None if self.problem.progress else True
        return tqdm(total=total, desc=f"aligning, {self.name}, {what}", unit="unit", leave=False, disable=quiet)

    def _visit(self, unit: Unit, known: set[str] | None = None) -> bool:
        """Decide one unit; True if it moved: only where that beats both the present element and the identity."""
        self.stale.discard(unit.outer)
        with self.clock("similarity"):
            similarity, exact = self.measure(unit, self.elements, known)
        if not similarity:
            return False
        nested = Nested.of(self.spec, unit)
        present = {name: self.elements[name] for name in unit.names if name in self.elements}
        with self.clock("assignment"):
            found = {name: element for name, element in solve(nested, similarity).items() if name in present}
            found = self._kept(nested, similarity, found, present)
        if all(found[name] is present[name] for name in present):
            return False
        if not exact and known is None:
            with self.clock("objective"):
                tensors = [t for t in matched_tensors(self.spec) if not t.names.isdisjoint(unit.names)]
                now = objective(self.problem, self.elements | found, tensors)
                before = objective(self.problem, self.elements, tensors)
            if now <= before + ROUNDING * abs(before):
                return False
        self.elements |= found
        self.stale |= {u.outer for u in self.spec.units if u is not unit and _adjacent(self.spec, u, unit)}
        if not exact:
            self.stale.add(unit.outer)
        return True

    def _kept(self, nested: Nested, similarity: Similarity, found: Elements, present: Elements) -> Elements:
        """`found`, with the identity, or else the present element, wherever that is as good."""

        def worth(elements: Mapping[str, Element]) -> float:
            everything = {name: elements.get(name) or nested.identity(name) for name in nested.contexts}
            return value(nested, similarity, everything)

        best = worth(found)
        enough = best - ROUNDING * abs(best)
        identity = {name: identity_of(self.spec, name) for name in present}
        for candidate in (identity, present):
            if worth(candidate) >= enough:
                found = dict(candidate)
                break
        else:
            for name in found:
                if worth(found | {name: identity[name]}) >= enough:
                    found[name] = identity[name]
        same = {
            n: e
            for n, e in present.items()
            if all(torch.equal(a, found[n].tensors()[p]) for p, a in e.tensors().items())
        }
        return found | same


def objective(problem: Problem, elements: Mapping[str, Element], tensors: Sequence[Labelled] | None = None) -> float:
    """Σ ⟨fixed, g · moving⟩ over the matched tensors, each once, summed in float64."""
    moving = {name: element for name, element in elements.items() if not element.is_identity()}
    total = 0.0
    for label, similarity in problem.constant.items() if tensors is None else ():
        name = label.removesuffix(DIAGONAL)
        element = elements.get(name) or identity_of(problem.spec, name)
        total += element.contract(similarity, name != label).item()
    for tensor in matched_tensors(problem.spec) if tensors is None else tensors:
        if tensors is None and all(lone(problem.spec, block) is not None for block in tensor.blocks):
            continue
        a, b = problem.tensors(tensor)
        if not tensor.names.isdisjoint(moving):
            b = act_on(problem.spec, moving, tensor, b)
        total += _weighted(problem.spec, tensor, a, b, every=tensors is not None)
    return total


def lone(spec: Spec, block: Block) -> int | None:
    """The place of the one dimension of a block that can move, if it is one and the block is not empty."""
    places = [i for i, dim in enumerate(block.dims) if dim.name in spec.free]
    whole = all(dim.size for dim in block.dims)
    return places[0] if len(places) == 1 and whole and not block.dims[places[0]].contexts else None


def label_of(spec: Spec, dim: Dim) -> str:
    """A dimension's symmetry; what signs do not reach is told apart where there are signs."""
    name = dim.name or ""
    return name + DIAGONAL if dim.mark == DIAGONAL and spec.symmetries[name].kind in SIGNED else name


def weight_of(spec: Spec, block: Block) -> float:
    """What a block counts in the objective: 1; where a stream is rotated, 1 / (the size of all but the stream).

    So a matrix with many rows does not outvote one with few, and all blocks of a head or a feed-forward layer count
    the same, as in 2506.22712.
    """
    if not spec.gauged:
        return 1.0
    kinds = {name: spec.symmetries[name].kind for name in block.names if name}
    return 1 / max(math.prod(d.size for d in block.dims if kinds.get(d.name or "") not in ROTATING), 1)


def _weighted(spec: Spec, tensor: Labelled, a: Tensor, b: Tensor, every: bool) -> float:
    """Σ of weight · ⟨a, b⟩ over blocks, over every one or those that are not in `Problem.constant`."""
    if every and not spec.gauged:
        return _dot(a, b)
    blocks = [block for block in tensor.blocks if every or lone(spec, block) is None]
    return sum(weight_of(spec, block) * _dot(block.view(a), block.view(b)) for block in blocks)


def matched_tensors(spec: Spec) -> list[Labelled]:
    """The tensors that say which features are alike: all that a moving symmetry touches but gains and statistics."""
    return [tensor for tensor in spec.tensors if not tensor.names.isdisjoint(spec.free) and not tensor.measures]


def _dot(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ in float64, in pieces, so that no float64 copy of a large tensor is made."""
    pairs = zip(a.reshape(-1).split(1 << 20), b.reshape(-1).split(1 << 20), strict=True)
    return sum(torch.dot(x.double(), y.double()).item() for x, y in pairs)


def _bound(problem: Problem) -> float:
    """½(‖fixed‖² + ‖moving‖²): what the objective reaches when the two become equal, and never exceeds."""
    spec = problem.spec
    return 0.5 * sum(_weighted(spec, t, x, x, every=True) for t in matched_tensors(spec) for x in problem.tensors(t))


def _equal(problem: Problem, elements: Elements) -> bool:
    pairs = ((tensor, *problem.tensors(tensor)) for tensor in problem.spec.tensors)
    return all(torch.equal(a, act_on(problem.spec, elements, tensor, b)) for tensor, a, b in pairs)


def equal_within(problem: Problem, alignment: Alignment, share: float = 1e-5) -> bool:
    """Whether every tensor of the moved model is that of the fixed one, up to a share of its norm."""
    moved = alignment.on(problem.spec, problem.moving)
    pairs = ((problem.fixed[key].double(), moved[key].double()) for key in problem.spec.shapes if key in moved)
    return all((a - b).norm() <= share * a.norm() for a, b in pairs if a.numel())


def _sizes(spec: Spec, unit: Unit) -> Iterator[tuple[int, set[str | None]]]:
    """(number of elements, symmetries) of every block of a unit."""
    for block in (block for tensor in matched_tensors(spec) for block in tensor.blocks):
        if not set(unit.names).isdisjoint(block.names):
            yield math.prod(dim.size for dim in block.dims), set(block.names)


def _share(blocks: Sequence[tuple[int, set[str | None]]], unknown: Set[str]) -> float:
    """The share of a unit's elements in blocks that involve nothing unknown."""
    return sum(n for n, names in blocks if names.isdisjoint(unknown)) / max(sum(n for n, _ in blocks), 1)


def _adjacent(spec: Spec, one: Unit, other: Unit) -> bool:
    return any(not t.names.isdisjoint(one.names) and not t.names.isdisjoint(other.names) for t in spec.tensors)


def product_of(a: Tensor, b: Tensor, places: list[int]) -> Tensor:
    """a (p..., rest) and b (p'..., rest) to (p..., p'...), contracted over the rest.

    Products are taken in float32 (of float64 in float64), of as much of the rest at a time as makes some large but not
    huge matrices, and summed in float64.
    """
    front = list(range(len(places)))
    sizes = [a.shape[i] for i in places]
    n = math.prod(sizes)
    x, y = (t.movedim(places, front).reshape(n, -1) for t in (a, b))
    # vectors are short, count as much as matrices, and what they leave open is known from much smaller numbers
    kind = torch.float64 if x.shape[1] <= 64 else torch.promote_types(a.dtype, torch.float32)
    step = max(PIECE // n, 1)
    total: Tensor | None = None
    for at in range(0, x.shape[1], step):
        product = torch.mm(x[:, at : at + step].to(kind), y[:, at : at + step].to(kind).T)
        total = product.double() if total is None else total.add_(product)
    assert total is not None
    return total.reshape(*sizes, *sizes).cpu()
