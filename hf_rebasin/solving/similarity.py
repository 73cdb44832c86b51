"""Similarity of two models along a unit, computed from their weights."""

from __future__ import annotations

from collections.abc import Mapping

from ..alignment.action import act_on_block
from ..alignment.groups import Element
from ..symmetries.patterns import DIAGONAL
from ..symmetries.spec import Block, Unit
from .problem import Problem, inner_products, label_of, matched_tensors, sole_free_dim, weight_of
from .units import Similarity


def weight_similarity(
    problem: Problem, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
) -> tuple[Similarity, bool]:
    """Compute ⟨fixed, moving⟩ along a unit's dimensions, contracted over all others and summed over blocks.

    Blocks that nothing outside the unit can move never change, so their products are computed once
    (`problem.constant`).

    A symmetry that occurs twice in a block (the square matrix of a tied head) makes the objective quadratic in it. The
    product is then taken along one occurrence at a time, with the other moved by its present element, and the result
    holds only near that element.

    Args:
        problem: problem with the two models.
        unit: symmetries along which the models are compared.
        elements: present elements of all symmetries.
        known: symmetries outside the unit that are already solved; blocks that involve others are then left out.

    Returns:
        The similarity, and whether the objective is linear in the unit's elements, so that it depends on them through
        the similarity alone.
    """
    spec = problem.spec
    outside = {n: e for n, e in elements.items() if n not in unit.names and not e.is_identity()}
    similarity: Similarity = {}
    linear = True
    for name in unit.names:
        for label in (name, name + DIAGONAL):
            if label in problem.constant:
                similarity[(label,)] = problem.constant[label].clone()
    for tensor in matched_tensors(spec):
        if tensor.names.isdisjoint(unit.names):
            continue
        blocks = [b for b in tensor.blocks if not set(unit.names).isdisjoint(b.names) and all(d.size for d in b.dims)]
        blocks = [b for b in blocks if sole_free_dim(spec, b) is None]
        if known is not None:
            blocks = [b for b in blocks if (spec.free - known - {*unit.names}).isdisjoint(b.names)]
        if not blocks:
            continue
        fixed, moving = problem.tensors(tensor)
        for block in blocks:
            a, b = block.view(fixed), act_on_block(spec, outside, block, block.view(moving))
            parts = _linked_dims(block, unit)
            linear &= len(parts) == 1
            for part in parts if len(parts) == 1 or known is None else []:
                inside = {n: e for n, e in elements.items() if n in unit.names and not e.is_identity()}
                moved = b if len(parts) == 1 else act_on_block(spec, inside, block, b, skip=part)
                dims = sorted(part, key=lambda i: unit.names.index(block.dims[i].name or ""))
                labels = tuple(label_of(spec, block.dims[i]) for i in dims)
                product = inner_products(a, moved, dims).mul_(weight_of(spec, block))
                similarity[labels] = similarity[labels].add_(product) if labels in similarity else product
    return similarity, linear


def _linked_dims(block: Block, unit: Unit) -> list[list[int]]:
    """Group the unit's dimensions in a block: all together if every symmetry occurs once, else linked by contexts."""
    dims = [i for i, dim in enumerate(block.dims) if dim.name in unit.names]
    if len({block.dims[i].name for i in dims}) == len(dims):
        return [dims]
    parts: list[set[int]] = []
    for i in dims:
        linked = {i, *block.dims[i].contexts} & set(dims)
        touching = [part for part in parts if part & linked]
        parts = [part for part in parts if not part & linked] + [linked.union(*touching)]
    return [sorted(part) for part in parts]
