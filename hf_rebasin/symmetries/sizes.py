"""Sizes of symmetries, solved from one equation per axis: a sum of products equals the length of the axis."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import SpecError
from .patterns import Leaf, Node, Sum, leaves

# A polynomial with integer coefficients: sorted tuple of unknowns -> coefficient. An unknown is a name, or the
# position of a "_", since every "_" has its own size.
Polynomial = dict[tuple[Hashable, ...], int]


@dataclass(frozen=True, kw_only=True)
class Equation:
    """One axis of one tensor: the size of `node` must equal `length`."""

    key: str
    row: str
    axis: int
    node: Node
    length: int

    def describe(self) -> str:
        return f"{self.key} axis {self.axis}: '{self.node}' = {self.length}"

    def position(self, path: tuple[int, ...]) -> tuple[Hashable, ...]:
        """Return the position of a part of the axis, at `path` inside its node."""
        return (self.key, self.axis, path)


@dataclass
class Sizes:
    """Solved sizes of all names, and of every "_" by its position."""

    names: dict[str, int]
    held: dict[Hashable, int]

    def length(self, equation: Equation, node: Node, path: tuple[int, ...]) -> int:
        """Return the length of a part of an axis, once everything is solved."""
        return self.polynomial(equation, node, path).get((), 0)

    def polynomial(self, equation: Equation, node: Node, path: tuple[int, ...] = ()) -> Polynomial:
        """Return the length of a part of an axis in terms of the sizes that are not solved yet."""
        if isinstance(node, Leaf):
            if node.size is not None:
                return {(): node.size}
            if node.name is not None:
                return {(): self.names[node.name]} if node.name in self.names else {(node.name,): 1}
            position = equation.position(path)
            return {(): self.held[position]} if position in self.held else {(position,): 1}
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
    """Solve equations with exactly one linear unknown, one after the other, until all are solved.

    `"(head qk)"` = 768 with head = 12 given makes qk = 64. The order of the equations does not matter.

    Raises:
        SpecError: an equation is false, has no integer solution or stays open; the message names sizes and row.
    """
    sizes = Sizes(dict(given), {})
    pending = list(equations)
    while pending:
        rest = []
        for equation in pending:
            polynomial = sizes.polynomial(equation, equation.node)
            unknown = {u for unknowns in polynomial for u in unknowns}
            constant = polynomial.get((), 0)
            if not unknown:
                if constant != equation.length:
                    used = {leaf.name: sizes.names[leaf.name] for leaf in leaves(equation.node) if leaf.name}
                    given_sizes = f" with {', '.join(f'{k} = {v}' for k, v in used.items())}" if used else ""
                    raise SpecError(
                        f"{equation.key} axis {equation.axis}: '{equation.node}' is {constant}{given_sizes}, but "
                        f"the tensor has {equation.length} there; row {equation.row!r}"
                    )
            elif len(unknown) == 1 and all(len(unknowns) <= 1 for unknowns in polynomial):
                u = unknown.pop()
                remainder, coefficient = equation.length - constant, polynomial[(u,)]
                if remainder < 0 or coefficient == 0 or remainder % coefficient:
                    raise SpecError(
                        f"{equation.describe()} has no integer solution for {u if isinstance(u, str) else '_'}: "
                        f"{equation.length} - {constant} = {remainder} is not a multiple of {coefficient}; "
                        f"row {equation.row!r}"
                    )
                if isinstance(u, str):
                    sizes.names[u] = remainder // coefficient
                else:
                    sizes.held[u] = remainder // coefficient
            else:
                rest.append(equation)
        if len(rest) == len(pending):
            lines = []
            for equation in rest[:4]:
                polynomial = sizes.polynomial(equation, equation.node)
                open_names = sorted({u if isinstance(u, str) else "_" for unknowns in polynomial for u in unknowns})
                lines.append(f"{equation.describe()} leaves {', '.join(open_names)} open; row {equation.row!r}")
            raise SpecError(
                "sizes cannot be solved; give one in sizes(config), or write an integer instead of a '_':\n  "
                + "\n  ".join(lines)
            )
        pending = rest
    return sizes
