"""Units: a symmetry is solved together with all symmetries nested in it.

A unit is solved from the *similarity* of two models along its symmetries. For every combination of symmetries that
occurs in a tensor, this is a tensor whose first half of dimensions runs over the fixed model and whose second half
runs over the moving one: in `{("head", "qk"): S}`, S[h, q, h', q'] is the similarity of unit q of fixed head h to
unit q' of moving head h'. For a symmetry with signs, the part that signs do not reach (`~`) is separate, as "ff~".
It does not matter whether similarities come from weights or from activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..alignment.action import element_class
from ..alignment.groups import Element
from ..symmetries.patterns import DIAGONAL
from ..symmetries.spec import Spec, Unit

Similarity: TypeAlias = dict[tuple[str, ...], Tensor]
Elements: TypeAlias = dict[str, Element]


@dataclass(frozen=True)
class Nested:
    """Symmetries of a unit that are still to be solved at some depth, each with its contexts that are still open."""

    spec: Spec
    contexts: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(spec: Spec, unit: Unit) -> Nested:
        """Return all symmetries of a unit."""
        contexts = {name: spec.symmetries[name].contexts for name in unit.names}
        for name in unit.names:
            for i, context in enumerate(contexts[name]):  # a held symmetry may count as nested in those before it
                if spec.symmetries[context].kind == "held" and len(contexts[context]) < i:
                    contexts[context] = contexts[name][:i]
        return Nested(spec, contexts)

    def identity(self, name: str) -> Element:
        """Return the identity of a symmetry, over the contexts that are still open."""
        batch = tuple(self.spec.symmetries[context].size for context in self.contexts[name])
        return element_class(self.spec, name).identity(batch, self.spec.symmetries[name].size)

    @property
    def tops(self) -> list[str]:
        """Names of the outermost symmetries."""
        return [name for name, contexts in self.contexts.items() if not contexts]

    def inside(self, outer: str) -> Nested:
        """Return the symmetries that are nested in one of the tops."""
        return Nested(
            self.spec,
            {
                name: tuple(c for c in contexts if c != outer)
                for name, contexts in self.contexts.items()
                if outer in contexts
            },
        )

    def only(self, names: set[str]) -> Nested:
        """Return the symmetries of these names."""
        return Nested(self.spec, {name: contexts for name, contexts in self.contexts.items() if name in names})


def total_similarity(nested: Nested, similarity: Similarity, elements: Mapping[str, Element]) -> float:
    """Return Σ ⟨similarity, g⟩ over all combinations of symmetries."""
    return sum(_contract(nested, names, tensor, elements).item() for names, tensor in similarity.items())


def solve_unit(nested: Nested, similarity: Similarity) -> Elements:
    """Find the elements of highest similarity.

    A single symmetry is solved by its group's projection. A symmetry with others nested in it is solved exactly: for
    every pair of outer indices by the best inner match, then by one outer projection of the resulting values. Several
    symmetries side by side that share a combination, as Llama's query groups and value units share `o_proj`, are
    solved by a coordinate loop that starts from the solution of each by itself.
    """
    families = {top: {top, *nested.inside(top).contexts} for top in nested.tops}
    elements: Elements = {}
    for top, family in families.items():  # each by itself
        within = {names: s for names, s in similarity.items() if family.issuperset(map(_symmetry_of, names))}
        elements |= _solve_family(nested.only(family), within, top)
    if all(any(family.issuperset(map(_symmetry_of, names)) for family in families.values()) for names in similarity):
        return elements
    best = total_similarity(nested, similarity, elements)
    while True:
        start = best
        for top, family in families.items():
            reduced = _reduce(nested, similarity, elements, family)
            candidate = elements | _solve_family(nested.only(family), reduced, top)
            now = total_similarity(nested, similarity, candidate)
            if now > best:
                best, elements = now, candidate
        if best <= start + 1e-9 * abs(start):
            return elements


def _solve_family(nested: Nested, similarity: Similarity, top: str) -> Elements:
    """Solve one top and the symmetries nested in it, from combinations of these alone."""
    symmetry = nested.spec.symmetries[top]
    group, n = element_class(nested.spec, top), symmetry.size
    inside = nested.inside(top)
    single, diagonal = similarity.get((top,)), similarity.get((f"{top}{DIAGONAL}",))
    if not inside.contexts:
        if single is None and diagonal is not None:
            single = torch.zeros_like(diagonal)
        if not symmetry.moves or single is None:
            return {top: group.identity((), n)}
        return {top: group.project(single, *_optional(diagonal))}
    if not symmetry.moves and len(inside.contexts) == 1 and similarity.keys() == {(top, *inside.contexts)}:
        (inner_name,), (joint,) = inside.contexts, similarity.values()  # all indices at once
        each = joint.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return {top: group.identity((), n), inner_name: element_class(nested.spec, inner_name).project(each)}
    values = torch.zeros(n, n, dtype=torch.float64) if single is None else single.double().clone()
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
            inner[i, j] = solve_unit(inside, pair)
            values[i, j] += total_similarity(inside, pair, inner[i, j])
    outer = group.project(values) if symmetry.moves else group.identity((), n)
    chosen = outer.act(torch.arange(n)).tolist()
    elements: Elements = {top: outer}
    for name, contexts in nested.contexts.items():
        if name != top:
            dim = contexts.index(top)
            parts = [inner[i, j][name].tensors() for i, j in enumerate(chosen)]
            stacked = {part: torch.stack([p[part] for p in parts], dim) for part in parts[0]}
            elements[name] = type(inner[0, chosen[0]][name])(**stacked)
    return elements


def _solve_side_by_side(nested: Nested, similarity: Similarity, top: str, values: Tensor) -> Elements:
    """Solve a top whose inner symmetries are independent of each other, as query and value units are.

    The group's `best` returns the value of every pair of indices; elements are computed only for the pairs that are
    chosen.
    """
    along: dict[str, list[Tensor]] = {}
    for names, tensor in similarity.items():
        inner = next((name for name in names if name != top), None)
        if inner is not None and inner == _symmetry_of(inner):
            first = names.index(top)
            diagonal = similarity.get((top, inner + DIAGONAL))
            along[inner] = [x.movedim([first, 2 + first], [0, 1]) for x in (tensor, *_optional(diagonal))]
    for name, tensors in along.items():
        values += element_class(nested.spec, name).best(*tensors)
    outer = element_class(nested.spec, top).project(values)
    order = outer.act(torch.arange(len(values)))
    elements: Elements = {top: outer}
    for name in nested.contexts:
        if name in along:
            chosen = torch.arange(len(order)), order
            elements[name] = element_class(nested.spec, name).project(*(tensor[chosen] for tensor in along[name]))
        elif name != top:
            elements[name] = nested.identity(name)
    return elements


def _reduce(nested: Nested, similarity: Similarity, elements: Mapping[str, Element], family: set[str]) -> Similarity:
    """Return the similarity along one family, contracted with the present elements of all others."""
    reduced: Similarity = {}
    for names, tensor in similarity.items():
        if family.isdisjoint(map(_symmetry_of, names)):
            continue
        others = {
            _symmetry_of(name): elements[_symmetry_of(name)] for name in names if _symmetry_of(name) not in family
        }
        kept = tuple(name for name in names if _symmetry_of(name) in family)
        part = _contract(nested, names, tensor, others)
        reduced[kept] = reduced[kept] + part if kept in reduced else part
    return reduced


def _contract(nested: Nested, names: tuple[str, ...], tensor: Tensor, elements: Mapping[str, Element]) -> Tensor:
    """Contract the dimensions of some symmetries with their elements, innermost first."""
    left = list(names)
    for name in reversed(names):
        symmetry = _symmetry_of(name)
        if symmetry in elements:
            contexts = [c for c in nested.contexts[symmetry] if c in left]
            batch = [left.index(c) for c in contexts]
            dim = left.index(name)
            front = [*batch, dim, len(left) + dim]
            moved = elements[symmetry].contract(tensor.movedim(front, list(range(len(front)))), name != symmetry)
            left.remove(name)
            # the contexts are in front now; move them to where they are in `left`
            tensor = moved.movedim(list(range(len(batch))), [left.index(c) for c in contexts])
    return tensor


def _optional(diagonal: Tensor | None) -> list[Tensor]:
    """Return the second argument of a group with signs, if there is one."""
    return [] if diagonal is None else [diagonal]


def _symmetry_of(label: str) -> str:
    """Return the symmetry of a label of `problem.label_of`."""
    return label.removesuffix(DIAGONAL)
