"""Sizes of symmetries: every axis of every tensor is one equation, a sum of products that equals its length."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import SpecError
from .patterns import Leaf, Node, Sum, leaves

# A polynomial with integer coefficients: sorted tuple of unknowns -> coefficient. An unknown is a name, or the place
# of a "_", which has a size of its own wherever it stands.
Polynomial = dict[tuple[Hashable, ...], int]


@dataclass(frozen=True)
class Equation:
    """One axis of one tensor: the length `node` must come to."""

    key: str
    row: str
    axis: int
    node: Node
    length: int

    def describe(self) -> str:
        return f"{self.key} axis {self.axis}: '{self.node}' = {self.length}"

    def place(self, path: tuple[int, ...]) -> tuple[Hashable, ...]:
        return (self.key, self.axis, path)


@dataclass
class Sizes:
    """The solution: sizes of names, and of every "_" by its place."""

    names: dict[str, int]
    held: dict[Hashable, int]

    def length(self, equation: Equation, node: Node, path: tuple[int, ...]) -> int:
        """How long a part of an axis is, once everything is solved."""
        return self.polynomial(equation, node, path).get((), 0)

    def polynomial(self, equation: Equation, node: Node, path: tuple[int, ...] = ()) -> Polynomial:
        if isinstance(node, Leaf):
            if node.size is not None:
                return {(): node.size}
            if node.name is not None:
                return {(): self.names[node.name]} if node.name in self.names else {(node.name,): 1}
            place = equation.place(path)
            return {(): self.held[place]} if place in self.held else {(place,): 1}
        if isinstance(node, Sum):
            total: Polynomial = {}
            for i, term in enumerate(node.terms):
                for unknowns, c in self.polynomial(equation, term, (*path, i)).items():
                    total[unknowns] = total.get(unknowns, 0) + c
            return total
        product: Polynomial = {(): 1}
        for i, item in enumerate(node.items):
            factor = self.polynomial(equation, item, (*path, i))
            expanded: Polynomial = {}
            for (u1, c1), (u2, c2) in itertools.product(product.items(), factor.items()):
                unknowns = tuple(sorted(u1 + u2, key=str))
                expanded[unknowns] = expanded.get(unknowns, 0) + c1 * c2
            product = expanded
        return product


def solve_sizes(equations: Iterable[Equation], given: Mapping[str, int]) -> Sizes:
    """Solve whichever equation has exactly one unknown, and that linearly, until all are solved.

    `"(head qk)"` = 768 with head = 12 given makes qk = 64. The order of the equations does not matter. An axis that
    does not add up, has no whole solution, or stays open raises SpecError with the numbers and the row.
    """
    sizes = Sizes(dict(given), {})
    todo = list(equations)
    while todo:
        rest = []
        for equation in todo:
            polynomial = sizes.polynomial(equation, equation.node)
            unknown = {u for unknowns in polynomial for u in unknowns}
            constant = polynomial.get((), 0)
            if not unknown:
                if constant != equation.length:
                    used = {x.name: sizes.names[x.name] for x in leaves(equation.node) if x.name}
                    where = f" with {', '.join(f'{k} = {v}' for k, v in used.items())}" if used else ""
                    raise SpecError(
                        f"{equation.key} axis {equation.axis}: '{equation.node}' comes to {constant}{where}, but the "
                        f"tensor has {equation.length} there; row {equation.row!r}"
                    )
            elif len(unknown) == 1 and all(len(unknowns) <= 1 for unknowns in polynomial):
                u = unknown.pop()
                free, coefficient = equation.length - constant, polynomial[(u,)]
                if free < 0 or coefficient == 0 or free % coefficient:
                    raise SpecError(
                        f"{equation.describe()} has no whole solution for {u if isinstance(u, str) else '_'}: "
                        f"{equation.length} - {constant} = {free} is no multiple of {coefficient}; row "
                        f"{equation.row!r}"
                    )
                if isinstance(u, str):
                    sizes.names[u] = free // coefficient
                else:
                    sizes.held[u] = free // coefficient
            else:
                rest.append(equation)
        if len(rest) == len(todo):
            lines = []
            for equation in rest[:4]:
                polynomial = sizes.polynomial(equation, equation.node)
                open_ = sorted({u if isinstance(u, str) else "_" for unknowns in polynomial for u in unknowns})
                lines.append(f"{equation.describe()} leaves {', '.join(open_)} open; row {equation.row!r}")
            raise SpecError(
                "sizes cannot be solved; give one in sizes(config), or write an integer for a '_':\n  "
                + "\n  ".join(lines)
            )
        todo = rest
    return sizes
