"""Units: deciding a symmetry together with all that is nested in it.

What a unit needs to know of two models is their *similarity* along its symmetries: for every combination of them that
occurs together, a tensor whose first half of dimensions runs over the fixed model and whose second half over the
moving one. `{("head", "qk"): S}` with S[h, q, h', q'] says how alike unit q of fixed head h and unit q' of moving head
h' are. What signs do not reach (`~`) of a symmetry with signs is kept apart, as "ff~". Where it all came from, weights
or activations, makes no difference here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..alignment.alignment import group_of
from ..alignment.groups import Element
from ..symmetries.patterns import DIAGONAL
from ..symmetries.spec import Spec, Unit

Similarity: TypeAlias = dict[tuple[str, ...], Tensor]
Elements: TypeAlias = dict[str, Element]


@dataclass(frozen=True)
class Nested:
    """The symmetries of a unit that are still open at some depth, with the contexts that are still open."""

    spec: Spec
    contexts: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(spec: Spec, unit: Unit) -> Nested:
        contexts = {name: spec.symmetries[name].contexts for name in unit.names}
        for name in unit.names:
            for i, context in enumerate(contexts[name]):  # what is held may be seen as nested in what comes before it
                if spec.symmetries[context].kind == "held" and len(contexts[context]) < i:
                    contexts[context] = contexts[name][:i]
        return Nested(spec, contexts)

    def identity(self, name: str) -> Element:
        """The element that moves nothing, for the contexts that are still open."""
        batch = tuple(self.spec.symmetries[context].size for context in self.contexts[name])
        return group_of(self.spec, name).identity(batch, self.spec.symmetries[name].size)

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
        own = {names: s for names, s in similarity.items() if family.issuperset(map(_name, names))}
        elements |= _solve_family(nested.only(family), own, top)
    if all(any(family.issuperset(map(_name, names)) for family in families.values()) for names in similarity):
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
    alone, diagonal = similarity.get((top,)), similarity.get((f"{top}{DIAGONAL}",))
    if not inside.contexts:
        if alone is None and diagonal is not None:
            alone = torch.zeros_like(diagonal)
        if not symmetry.moves or alone is None:
            return {top: group.identity((), n)}
        return {top: group.project(alone, *_given(diagonal))}
    if not symmetry.moves and len(inside.contexts) == 1 and similarity.keys() == {(top, *inside.contexts)}:
        (inner_name,), (both,) = inside.contexts, similarity.values()  # all places at once
        each = both.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return {top: group.identity((), n), inner_name: group_of(nested.spec, inner_name).project(each)}
    values = torch.zeros(n, n, dtype=torch.float64) if alone is None else alone.double().clone()
    if symmetry.moves and not any(inside.contexts.values()) and all(len(names) <= 2 for names in similarity):
        return _solve_side_by_side(nested, similarity, top, values)
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


def _solve_side_by_side(nested: Nested, similarity: Similarity, top: str, values: Tensor) -> Elements:
    """A top whose inner symmetries have nothing to do with each other, as the units of queries and of values.

    How well two places match is known from `best`; elements are needed of those alone that end up together.
    """
    along: dict[str, list[Tensor]] = {}
    for names, tensor in similarity.items():
        inner = next((name for name in names if name != top), None)
        if inner is not None and inner == _name(inner):
            first = names.index(top)
            diagonal = similarity.get((top, inner + DIAGONAL))
            along[inner] = [each.movedim([first, 2 + first], [0, 1]) for each in (tensor, *_given(diagonal))]
    for name, both in along.items():
        values += group_of(nested.spec, name).best(*both)
    outer = group_of(nested.spec, top).project(values)
    order = outer.act(torch.arange(len(values)))
    elements: Elements = {top: outer}
    for name in nested.contexts:
        if name in along:
            ours = torch.arange(len(order)), order
            elements[name] = group_of(nested.spec, name).project(*(each[ours] for each in along[name]))
        elif name != top:
            elements[name] = nested.identity(name)
    return elements


def _reduced(nested: Nested, similarity: Similarity, elements: Mapping[str, Element], family: set[str]) -> Similarity:
    """The similarity along one family, with everything else contracted by its present elements."""
    reduced: Similarity = {}
    for names, tensor in similarity.items():
        if family.isdisjoint(map(_name, names)):
            continue
        others = {_name(name): elements[_name(name)] for name in names if _name(name) not in family}
        left = tuple(name for name in names if _name(name) in family)
        part = _contract(nested, names, tensor, others)
        reduced[left] = reduced[left] + part if left in reduced else part
    return reduced


def _contract(nested: Nested, names: tuple[str, ...], tensor: Tensor, elements: Mapping[str, Element]) -> Tensor:
    """Contract the dimensions of some symmetries with their elements, innermost first."""
    left = list(names)
    for name in reversed(names):
        if _name(name) in elements:
            contexts = [c for c in nested.contexts[_name(name)] if c in left]
            batch = [left.index(c) for c in contexts]
            at = left.index(name)
            front = [*batch, at, len(left) + at]
            moved = elements[_name(name)].contract(tensor.movedim(front, list(range(len(front)))), name != _name(name))
            left.remove(name)
            # the contexts were brought to the front; put them back where they are in `left`
            tensor = moved.movedim(list(range(len(batch))), [left.index(c) for c in contexts])
    return tensor


def _given(diagonal: Tensor | None) -> list[Tensor]:
    """The further argument of a group with signs, where there is one."""
    return [] if diagonal is None else [diagonal]


def _name(label: str) -> str:
    return label.removesuffix(DIAGONAL)
