"""How alike two models are along a unit, from their weights."""

from __future__ import annotations

from collections.abc import Mapping

from ..alignment.alignment import act_on_block
from ..alignment.groups import Element
from ..symmetries.patterns import DIAGONAL
from ..symmetries.spec import Block, Unit
from .problem import Problem, label_of, lone, matched_tensors, product_of, weight_of
from .units import Similarity


def weight_similarity(
    problem: Problem, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
) -> tuple[Similarity, bool]:
    """⟨fixed, moving⟩ along a unit's dimensions, contracted over all others, summed over blocks.

    Blocks that nothing else can move are the same every time, so of those it is computed once (`problem.constant`).

    A symmetry that occurs twice in a block (the square matrix of a tied head) makes the objective quadratic in it: it
    is then taken along one occurrence at a time, the other moved by its present element, and the result is not exact.
    """
    spec = problem.spec
    outside = {n: e for n, e in elements.items() if n not in unit.names and not e.is_identity()}
    total: Similarity = {}
    exact = True
    for name in unit.names:
        for label in (name, name + DIAGONAL):
            if label in problem.constant:
                total[(label,)] = problem.constant[label].clone()
    for tensor in matched_tensors(spec):
        if tensor.names.isdisjoint(unit.names):
            continue
        blocks = [b for b in tensor.blocks if not set(unit.names).isdisjoint(b.names) and all(d.size for d in b.dims)]
        blocks = [b for b in blocks if lone(spec, b) is None]
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
                names = tuple(label_of(spec, block.dims[i]) for i in places)
                product = product_of(a, there, places).mul_(weight_of(spec, block))
                total[names] = total[names].add_(product) if names in total else product
    return total, exact


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
