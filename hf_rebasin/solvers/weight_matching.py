"""Weight matching: the alignment that maximises Σ ⟨fixed, g · moving⟩, from the weights alone.

Git Re-Basin (Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836), section 3.2: for one symmetry at a time, with all
others held, the objective is linear in g; its matrix is one contraction per block over all other dimensions, and the
best g is its projection to the group (for permutations, a linear assignment). Nested symmetries are decided together,
as for heads in 2403.00986. The objective never falls from sweep to sweep, and never ends below that of the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..alignment import act_on_block
from ..axes import DIAGONAL
from ..canonical import in_full
from ..groups import Element
from ..solving import Problem, Solution, coordinate_ascent, matched_tensors, weight_of
from ..spec import Block, Dim, Spec, Unit
from ..table import SIGNED
from ..units import Similarity

PIECE = 1 << 24  # elements of a tensor that are widened to float32 at a time


@dataclass(frozen=True)
class Solver:
    """Knobs of weight matching.

    Args:
        starts: how many starts are tried; the highest objective wins. The first goes outwards from what cannot move,
            the others begin at the identity and take the units in random order.
        max_sweeps: over all units, for every start.
    """

    starts: int = 2
    max_sweeps: int = 100

    def solve(self, problem: Problem) -> Solution:
        return in_full(problem, self._ascend)

    def _ascend(self, problem: Problem) -> Solution:
        def measure(
            unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
        ) -> tuple[Similarity, bool]:
            return weight_similarity(problem, unit, elements, known)

        return coordinate_ascent(problem, measure, self.starts, self.max_sweeps)


def weight_similarity(
    problem: Problem, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
) -> tuple[Similarity, bool]:
    """⟨fixed, moving⟩ along a unit's dimensions, contracted over all others, summed over blocks.

    A symmetry that occurs twice in a block (the square matrix of a tied head) makes the objective quadratic in it: it
    is then taken along one occurrence at a time, the other moved by its present element, and the result is not exact.
    """
    spec = problem.spec
    outside = {n: e for n, e in elements.items() if n not in unit.names and not e.is_identity()}
    total: Similarity = {}
    exact = True
    for tensor in matched_tensors(spec):
        if tensor.names.isdisjoint(unit.names):
            continue
        blocks = [b for b in tensor.blocks if not set(unit.names).isdisjoint(b.names) and all(d.size for d in b.dims)]
        if known is not None:
            blocks = [b for b in blocks if (spec.free - known - {*unit.names}).isdisjoint(b.names)]
        if not blocks:
            continue
        fixed, moving = problem.tensors(tensor)
        for block in blocks:
            a, b = block.view(fixed), act_on_block(spec, outside, block, block.view(moving))
            parts = _parts(block, unit)
            exact &= len(parts) == 1
            for part in parts if len(parts) == 1 or known is None else []:
                inside = {n: e for n, e in elements.items() if n in unit.names and not e.is_identity()}
                there = b if len(parts) == 1 else act_on_block(spec, inside, block, b, still=part)
                places = sorted(part, key=lambda i: unit.names.index(block.dims[i].name or ""))
                names = tuple(_label(spec, block.dims[i]) for i in places)
                product = _product(a, there, places).mul_(weight_of(spec, block))
                total[names] = total[names].add_(product) if names in total else product
    return total, exact


def _label(spec: Spec, dim: Dim) -> str:
    """What signs do not reach is told apart where there are signs."""
    name = dim.name or ""
    return name + DIAGONAL if dim.mark == DIAGONAL and spec.symmetries[name].kind in SIGNED else name


def _parts(block: Block, unit: Unit) -> list[list[int]]:
    """The unit's dimensions in a block, together where every symmetry occurs once, else by what hangs together."""
    places = [i for i, dim in enumerate(block.dims) if dim.name in unit.names]
    if len({block.dims[i].name for i in places}) == len(places):
        return [places]
    parts: list[set[int]] = []
    for i in places:
        linked = {i, *block.dims[i].contexts} & set(places)
        touching = [part for part in parts if part & linked]
        parts = [part for part in parts if not part & linked] + [linked.union(*touching)]
    return [sorted(part) for part in parts]


def _product(a: Tensor, b: Tensor, places: list[int]) -> Tensor:
    """a (p..., rest) and b (p'..., rest) to (p..., p'...), contracted over the rest.

    Products are taken in float32, of as much of the rest at a time as makes some large but not huge matrices, and
    summed in float64.
    """
    front = list(range(len(places)))
    sizes = [a.shape[i] for i in places]
    n = math.prod(sizes)
    x, y = (t.movedim(places, front).reshape(n, -1) for t in (a, b))
    step = max(PIECE // n, 1)
    total: Tensor | None = None
    for at in range(0, x.shape[1], step):
        product = torch.mm(x[:, at : at + step].float(), y[:, at : at + step].float().T)
        total = product.double() if total is None else total.add_(product)
    assert total is not None
    return total.reshape(*sizes, *sizes).cpu()
