"""Units: deciding a symmetry together with all that is nested in it.

What a unit needs to know of two models is their *similarity* along its symmetries: for every combination of them that
occurs together, a tensor whose first half of dimensions runs over the fixed model and whose second half over the
moving one. `{("head", "qk"): S}` with S[h, q, h', q'] says how alike unit q of fixed head h and unit q' of moving head
h' are. Where it came from, weights or activations, makes no difference here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .alignment import group_of
from .groups import Element
from .spec import Spec, Unit

Similarity: TypeAlias = dict[tuple[str, ...], Tensor]
Elements: TypeAlias = dict[str, Element]


@dataclass(frozen=True)
class Nested:
    """The symmetries of a unit that are still open at some depth, with the contexts that are still open."""

    spec: Spec
    contexts: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(spec: Spec, unit: Unit) -> Nested:
        return Nested(spec, {name: spec.symmetries[name].contexts for name in unit.names})

    @property
    def tops(self) -> list[str]:
        return [name for name, contexts in self.contexts.items() if not contexts]

    def inside(self, outer: str) -> Nested:
        """What is nested in one of the tops."""
        return Nested(
            self.spec,
            {
                name: tuple(c for c in contexts if c != outer)
                for name, contexts in self.contexts.items()
                if outer in contexts
            },
        )

    def only(self, names: set[str]) -> Nested:
        return Nested(self.spec, {name: contexts for name, contexts in self.contexts.items() if name in names})


def value(nested: Nested, similarity: Similarity, elements: Mapping[str, Element]) -> float:
    """Σ ⟨similarity, g⟩ over all combinations."""
    return sum(_contract(nested, names, tensor, elements).item() for names, tensor in similarity.items())


def solve(nested: Nested, similarity: Similarity) -> Elements:
    """The elements of highest similarity.

    One symmetry: its group's projection. A symmetry with others in it: for every pair of outer places the best inner
    match, then one outer projection of those values; exact. Several side by side that share a combination, as Llama's
    query groups and value units share `o_proj`: a coordinate loop, started from what each has for itself.
    """
    families = {top: {top, *nested.inside(top).contexts} for top in nested.tops}
    elements: Elements = {}
    for top, family in families.items():  # from what does not involve the others
        own = {names: s for names, s in similarity.items() if family.issuperset(names)}
        elements |= _solve_family(nested.only(family), own, top)
    if all(any(family.issuperset(names) for family in families.values()) for names in similarity):
        return elements
    best = value(nested, similarity, elements)
    while True:
        start = best
        for top, family in families.items():
            reduced = _reduced(nested, similarity, elements, family)
            found = elements | _solve_family(nested.only(family), reduced, top)
            now = value(nested, similarity, found)
            if now > best:
                best, elements = now, found
        if best <= start + 1e-9 * abs(start):
            return elements


def _solve_family(nested: Nested, similarity: Similarity, top: str) -> Elements:
    """One top and what is nested in it, from the combinations of these alone."""
    symmetry = nested.spec.symmetries[top]
    group, n = group_of(nested.spec, top), symmetry.size
    inside = nested.inside(top)
    alone = similarity.get((top,))
    if not inside.contexts:
        return {top: group.project(alone) if symmetry.moves and alone is not None else group.identity((), n)}
    values = torch.zeros(n, n, dtype=torch.float64) if alone is None else alone.double().clone()
    inner: dict[tuple[int, int], Elements] = {}
    for i in range(n):
        for j in range(n) if symmetry.moves else [i]:
            pair = {
                tuple(x for x in names if x != top): s.select(names.index(top), i).select(
                    len(names) - 1 + names.index(top), j
                )
                for names, s in similarity.items()
                if len(names) > 1
            }
            inner[i, j] = solve(inside, pair)
            values[i, j] += value(inside, pair, inner[i, j])
    outer = group.project(values) if symmetry.moves else group.identity((), n)
    chosen = outer.act(torch.arange(n)).tolist()
    elements: Elements = {top: outer}
    for name, contexts in nested.contexts.items():
        if name != top:
            place = contexts.index(top)
            parts = [inner[i, j][name].tensors() for i, j in enumerate(chosen)]
            stacked = {part: torch.stack([p[part] for p in parts], place) for part in parts[0]}
            elements[name] = type(inner[0, chosen[0]][name])(**stacked)
    return elements


def _reduced(nested: Nested, similarity: Similarity, elements: Mapping[str, Element], family: set[str]) -> Similarity:
    """The similarity along one family, with everything else contracted by its present elements."""
    reduced: Similarity = {}
    for names, tensor in similarity.items():
        if family.isdisjoint(names):
            continue
        others = {name: elements[name] for name in names if name not in family}
        left = tuple(name for name in names if name in family)
        part = _contract(nested, names, tensor, others)
        reduced[left] = reduced[left] + part if left in reduced else part
    return reduced


def _contract(nested: Nested, names: tuple[str, ...], tensor: Tensor, elements: Mapping[str, Element]) -> Tensor:
    """Contract the dimensions of some symmetries with their elements, innermost first."""
    left = list(names)
    for name in reversed(names):
        if name in elements:
            batch = [left.index(c) for c in nested.contexts[name] if c in left]
            at = left.index(name)
            front = [*batch, at, len(left) + at]
            moved = elements[name].contract(tensor.movedim(front, list(range(len(front)))))
            left.remove(name)
            # the contexts were brought to the front; put them back where they are in `left`
            tensor = moved.movedim(
                list(range(len(batch))), [left.index(c) for c in nested.contexts[name] if c in left]
            )
    return tensor
