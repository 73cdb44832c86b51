"""Coordinate ascent over units, the loop that weight matching and activation matching share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Protocol, TypeAlias

import torch
from tqdm import tqdm

from ..alignment.action import identity_element
from ..alignment.alignment import Alignment
from ..alignment.groups import Element
from ..symmetries.spec import Spec, Unit
from .problem import Problem, all_tensors_equal, matched_tensors, objective, objective_bound
from .solution import Clock, Solution, Status
from .units import Elements, Nested, Similarity, solve_unit, total_similarity


class SimilarityFunction(Protocol):
    """Computes the similarity of two models along a unit, with everything outside the unit moved by `elements`.

    With `known`, only blocks count whose free symmetries are all in the unit or in `known`. The second value tells
    whether the objective is linear in the unit's elements; it is not where a symmetry occurs twice in a tensor.
    """

    def __call__(
        self, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
    ) -> tuple[Similarity, bool]: ...


ScoreFunction: TypeAlias = Callable[[Elements], float]


# A gain below this share of a unit's value counts as rounding, as similarities are float32 products; so near-dead
# neurons of two fine-tunes stay where they are, too.
ROUNDING = 1e-6

# A rotation can always be improved a little; a sweep that gains a smaller share than this is the last. On transformers
# trained apart the objective would rise for tens of sweeps more, while the merge gets worse.
MIN_SWEEP_GAIN = 1e-3


def coordinate_ascent(
    problem: Problem, measure: SimilarityFunction, starts: int, max_sweeps: int, score: ScoreFunction | None = None
) -> Solution:
    """Improve one unit at a time until none can be improved, and return the best of several starts.

    The first start goes outwards from what cannot move (embeddings, inputs, outputs): at each step it solves the unit
    with the largest known share of its tensors, from that share alone. The others begin at the identity and visit the
    units in random order, so they never end below it. They are skipped if the first ends with equal models, as for a
    planted alignment, or with the identity, as for two models of one base.

    Args:
        problem: problem to solve.
        measure: computes the similarity along a unit.
        starts: number of starts.
        max_sweeps: greatest number of sweeps over all units, for every start.
        score: objective of elements; by default Σ ⟨fixed, g · moving⟩ of the weights.
    """
    clock = Clock()
    spec = problem.spec
    if not spec.units:
        return Solution(Alignment(spec, {}), objective(problem, {}), (), Status.IDENTITY, clock.seconds)
    enough = objective_bound(problem) * (1 - ROUNDING) if score is None else math.inf
    best = _Ascent(problem, measure, score, clock, "start 1", enough).anchor().sweep(max_sweeps)
    start = 2
    # if the first start ends below the identity there is always a second, which begins there
    while start <= starts or (start == 2 and best.history[-1] < best.history[0]):
        if best.history[-1] >= best.history[0] and (best.is_identity or best.history[-1] >= enough):
            break
        other = _Ascent(problem, measure, score, clock, f"start {start}", enough).sweep(max_sweeps)
        best = max(best, other, key=lambda ascent: ascent.history[-1])  # of equals, the first
        start += 1
    if best.history[-1] < best.history[0]:  # by rounding
        best = _Ascent(problem, measure, score, clock, "identity", enough)
    status = best.status
    if best.is_identity:
        status = Status.IDENTITY
    elif (score is not None or best.history[-1] >= enough) and all_tensors_equal(problem, best.elements):
        status = Status.EQUAL
    alignment = Alignment(spec, best.elements)
    return Solution(alignment, best.history[-1], tuple(best.history), status, clock.seconds)


class _Ascent:
    """One start of the coordinate loop; `enough` is an objective that only equal models reach."""

    def __init__(
        self,
        problem: Problem,
        measure: SimilarityFunction,
        score: ScoreFunction | None,
        clock: Clock,
        name: str,
        enough: float,
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

    def anchor(self) -> _Ascent:
        """Visit every unit once, best known first, using only the known blocks."""
        sizes = {unit: list(_block_sizes(self.spec, unit)) for unit in self.spec.units}
        known: set[str] = set()
        with self._progress_bar("anchoring", len(sizes)) as bar:
            while sizes:
                shares = {
                    unit: _known_share(blocks, self.spec.free - known - {*unit.names})
                    for unit, blocks in sizes.items()
                }
                unit = max(shares, key=lambda unit: shares[unit])  # of equals, the first
                del sizes[unit]
                self._visit(unit, known)
                if shares[unit] < 1:  # some blocks were not known yet
                    self.stale.add(unit.outer)
                known |= set(unit.names)
                bar.update()
        self.history.append(self.objective())
        return self

    def sweep(self, limit: int) -> _Ascent:
        """Visit all units in random order until none moves."""
        for sweep in range(limit):
            if self.history[-1] >= self.enough:
                return self
            order = torch.randperm(len(self.spec.units), generator=self.problem.generator).tolist()
            moved = False
            with self._progress_bar(f"sweep {sweep + 1}", len(order)) as bar:
                for i in order:
                    unit = self.spec.units[i]
                    if unit.outer in self.stale:
                        moved |= self._visit(unit)
                    bar.update()
            if not moved:
                return self
            self.history.append(self.objective())
            if self.spec.gauged and self.history[-1] - self.history[-2] <= MIN_SWEEP_GAIN * abs(self.history[-1]):
                return self
        self.status = Status.SWEEP_LIMIT
        return self

    def _progress_bar(self, phase: str, total: int) -> tqdm:
        disable = None if self.problem.progress else True
        return tqdm(total=total, desc=f"aligning, {self.name}, {phase}", unit="unit", leave=False, disable=disable)

    def _visit(self, unit: Unit, known: set[str] | None = None) -> bool:
        """Solve one unit and return whether it moved: only if that beats its present elements and the identity."""
        self.stale.discard(unit.outer)
        with self.clock("similarity"):
            similarity, linear = self.measure(unit, self.elements, known)
        if not similarity:
            return False
        nested = Nested.of(self.spec, unit)
        present = {name: self.elements[name] for name in unit.names if name in self.elements}
        with self.clock("assignment"):
            new = {name: element for name, element in solve_unit(nested, similarity).items() if name in present}
            new = self._prefer_unmoved(nested, similarity, new, present)
        if all(new[name] is present[name] for name in present):
            return False
        if not linear and known is None:  # the similarity holds only near the present elements
            with self.clock("objective"):
                tensors = [t for t in matched_tensors(self.spec) if not t.names.isdisjoint(unit.names)]
                now = objective(self.problem, self.elements | new, tensors)
                before = objective(self.problem, self.elements, tensors)
            if now <= before + ROUNDING * abs(before):
                return False
        self.elements |= new
        self.stale |= {u.outer for u in self.spec.units if u is not unit and _share_tensors(self.spec, u, unit)}
        if not linear:
            self.stale.add(unit.outer)
        return True

    def _prefer_unmoved(self, nested: Nested, similarity: Similarity, new: Elements, present: Elements) -> Elements:
        """Return `new`, with the identity, or else the present elements, wherever these are as good."""

        def evaluate(elements: Mapping[str, Element]) -> float:
            complete = {name: elements.get(name) or nested.identity(name) for name in nested.contexts}
            return total_similarity(nested, similarity, complete)

        best = evaluate(new)
        enough = best - ROUNDING * abs(best)
        identity = {name: identity_element(self.spec, name) for name in present}
        for candidate in (identity, present):
            if evaluate(candidate) >= enough:
                new = dict(candidate)
                break
        else:
            for name in new:
                if evaluate(new | {name: identity[name]}) >= enough:
                    new[name] = identity[name]
        unchanged = {
            name: element
            for name, element in present.items()
            if all(torch.equal(x, new[name].tensors()[part]) for part, x in element.tensors().items())
        }
        return new | unchanged


def _block_sizes(spec: Spec, unit: Unit) -> Iterator[tuple[int, set[str | None]]]:
    """Yield (number of elements, symmetries) of every block of a unit."""
    for block in (block for tensor in matched_tensors(spec) for block in tensor.blocks):
        if not set(unit.names).isdisjoint(block.names):
            yield math.prod(dim.size for dim in block.dims), set(block.names)


def _known_share(blocks: Sequence[tuple[int, set[str | None]]], unknown: Set[str]) -> float:
    """Return the share of a unit's elements in blocks without unknown symmetries."""
    return sum(n for n, names in blocks if names.isdisjoint(unknown)) / max(sum(n for n, _ in blocks), 1)


def _share_tensors(spec: Spec, unit: Unit, other: Unit) -> bool:
    return any(not t.names.isdisjoint(unit.names) and not t.names.isdisjoint(other.names) for t in spec.tensors)
