"""What solvers return, and the coordinate loop that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Protocol, TypeAlias

import torch
from tqdm import tqdm

from ..alignment.alignment import Alignment, identity_of
from ..alignment.groups import Element
from ..symmetries.spec import Spec, Unit
from .problem import Problem, all_equal, bound, matched_tensors, objective
from .solution import Clock, Solution, Status
from .units import Elements, Nested, Similarity, solve, value


class Measure(Protocol):
    """The similarity of two models along a unit, everything outside the unit moved by `elements`.

    With `known` given, only what involves no open symmetry outside `known` and the unit counts. The second value tells
    whether the similarity is exact; it is not where a symmetry occurs twice in a tensor.
    """

    def __call__(
        self, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
    ) -> tuple[Similarity, bool]: ...


Score: TypeAlias = Callable[[Elements], float]


# A gain below this share of a unit's value is taken for rounding, as the similarities are float32 products; it also
# keeps near-dead neurons of two fine-tunes where they are.
ROUNDING = 1e-6

# A stream that is rotated can always be rotated a little better; a sweep that gains a smaller share than this is the
# last. On transformers trained apart the objective goes on rising for tens of sweeps, and the merge gets worse.
SETTLED = 1e-3


def coordinate_ascent(
    problem: Problem, measure: Measure, starts: int, max_sweeps: int, score: Score | None = None
) -> Solution:
    """Improve one unit at a time until none can be improved; the best of several starts.

    The first start goes outwards from what cannot move (embeddings, inputs, outputs): at each step it takes the unit
    of whose tensors the largest share is known already, and looks at that share alone. The others begin at the
    identity and take the units in random order, so they never end below it. There are no others where the first ends
    with equal models, as for a planted alignment, or with the identity, as for two models of one base.

    `score` is what rises, where that is not Σ ⟨fixed, g · moving⟩ of the weights.
    """
    clock = Clock()
    spec = problem.spec
    if not spec.units:
        return Solution(Alignment(spec, {}), objective(problem, {}), (), Status.IDENTITY, clock.seconds)
    enough = bound(problem) * (1 - ROUNDING) if score is None else math.inf
    best = _Ascent(problem, measure, score, clock, "start 1", enough).anchored().swept(max_sweeps)
    start = 2
    # one more than asked for where the first ends below the identity, from which the second starts
    while start <= starts or (start == 2 and best.history[-1] < best.history[0]):
        if best.history[-1] >= best.history[0] and (best.is_identity or best.history[-1] >= enough):
            break
        other = _Ascent(problem, measure, score, clock, f"start {start}", enough).swept(max_sweeps)
        best = max(best, other, key=lambda ascent: ascent.history[-1])  # the first of equals
        start += 1
    if best.history[-1] < best.history[0]:  # by rounding
        best = _Ascent(problem, measure, score, clock, "identity", enough)
    status = best.status
    if best.is_identity:
        status = Status.IDENTITY
    elif (score is not None or best.history[-1] >= enough) and all_equal(problem, best.elements):
        status = Status.EQUAL
    alignment = Alignment(spec, best.elements)
    return Solution(alignment, best.history[-1], tuple(best.history), status, clock.seconds)


class _Ascent:
    """One start of the coordinate loop; `enough` is an objective that only equal models reach."""

    def __init__(
        self, problem: Problem, measure: Measure, score: Score | None, clock: Clock, name: str, enough: float
    ):
        self.problem, self.measure, self.score = problem, measure, score
        self.clock, self.name, self.enough = clock, name, enough
        self.spec, self.status = problem.spec, Status.CONVERGED
        self.elements: Elements = dict(Alignment.identity(self.spec).elements)
        self.stale = {unit.outer for unit in self.spec.units}
        self.history = [self.objective()]

    def objective(self) -> float:
        with self.clock("objective"):
            return objective(self.problem, self.elements) if self.score is None else self.score(self.elements)

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
