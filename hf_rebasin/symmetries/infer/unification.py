"""The algebra of axes: unification finds what must move together. Knows nothing of tensors or operations.

An axis is a tuple of *atoms*, outer first: `(a, b)` is the composite axis with index a·|b| + b, `()` an axis of size
one. Every atom stands for one symmetry, until it turns out to be a product of atoms (a `view` splits it), a sum of
axes (a slice cuts it), the same as another atom (an operation reads both with one index), or pinned (something depends
on its order). All four only ever *restrict* what may move. So whatever is free at the end is a symmetry, regardless of
the order of the operations; where two axes cannot be unified, both are pinned.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

GIVEN = "an input or a constant"
MAX_SUM_DEPTH = 50  # of nested sums: `x[1:] - x[:-1]` would cut an axis into single indices, one by one


class Atom:
    """A factor of an axis. At most one of `same`, `factors` and `parts` is set."""

    __slots__ = ("factors", "numbers", "parts", "pin", "same", "size")

    def __init__(self, size: int, pin: str | None = None, numbers: bool = False):
        self.size = size
        self.pin = pin  # the reason why it may not move
        self.numbers = numbers  # it only enumerates copies or blocks, so nothing can be nested in it
        self.same: Atom | None = None
        self.factors: Axis | None = None
        self.parts: tuple[Axis, ...] | None = None


Axis: TypeAlias = tuple[Atom, ...]


def fresh_axis(size: int, pin: str | None = None, numbers: bool = False) -> Axis:
    """A new axis of which nothing is known but perhaps a reason to pin it."""
    return () if size == 1 else (Atom(size, pin, numbers),)


def axis_size(axis: Iterable[Atom]) -> int:
    """The number of indices of an axis."""
    return math.prod(atom.size for atom in axis)


def root(atom: Atom) -> Atom:
    """The atom that represents all those this one is unified with."""
    while atom.same is not None:
        if atom.same.same is not None:
            atom.same = atom.same.same  # path compression
        atom = atom.same
    return atom


def flat_atoms(axis: Iterable[Atom]) -> list[Atom]:
    """The atoms of an axis as far as they are known: products are expanded, leaves and sums are kept."""
    atoms: list[Atom] = []
    for atom in axis:
        atom = root(atom)
        if atom.factors is not None:
            atoms += flat_atoms(atom.factors)
        elif atom.size != 1:
            atoms.append(atom)
    return atoms


def summands(atom: Atom) -> list[Axis]:
    """The parts of a sum, with nested sums expanded; none if the atom is not a sum."""
    parts: list[Axis] = []
    for part in atom.parts or ():
        inside = flat_atoms(part)
        if len(inside) == 1 and inside[0].parts is not None:
            parts += summands(inside[0])
        else:
            parts.append(tuple(inside))
    return parts


def leaf_atoms(axis: Iterable[Atom]) -> Iterator[Atom]:
    """Iterate over the atoms of an axis, replacing each sum by the atoms inside it."""
    for atom in flat_atoms(axis):
        if atom.parts is None:
            yield atom
        for part in summands(atom):
            yield from leaf_atoms(part)


def sum_of(parts: list[Axis]) -> Axis:
    """The axis that consists of the given parts, end to end."""
    if len(parts) == 1:
        return parts[0]
    atom = Atom(sum(map(axis_size, parts)))
    atom.parts = tuple(parts)
    return (atom,)


def pin(axis: Iterable[Atom], why: str) -> None:
    """Forbid any movement in an axis; an earlier reason is kept."""
    for atom in leaf_atoms(axis):
        if atom.pin is None:
            atom.pin = why


def unify(x: Iterable[Atom], y: Iterable[Atom], why: str, depth: int = 0) -> None:
    """Make two axes that share one index move together; pin both where their factors do not fit."""
    left, right = deque(flat_atoms(x)), deque(flat_atoms(y))
    if depth > MAX_SUM_DEPTH:
        pin((*left, *right), f"{why}: shifts an axis against itself")
        return
    while left and right:
        a, b = root(left[0]), root(right[0])
        if a.factors is not None or b.factors is not None:  # refined by an earlier pass of this loop
            queue, atom = (left, a) if a.factors is not None else (right, b)
            queue.popleft()
            queue.extendleft(reversed(flat_atoms((atom,))))
        elif a.size == b.size:
            left.popleft()
            right.popleft()
            _unify_atoms(a, b, why, depth)
        elif not (split_atom(b, a.size, why) if a.size < b.size else split_atom(a, b.size, why)):
            pin((*left, *right), f"{why}: {axis_size(left)} and {axis_size(right)} do not fit into each other")
            return


def _unify_atoms(a: Atom, b: Atom, why: str, depth: int) -> None:
    if a is b:
        return
    if a.parts is None:
        a, b = b, a
    if b.parts is None:  # a leaf takes on the structure of the other atom
        reason = a.pin or b.pin
        b.same = a
        for leaf in leaf_atoms((a,)):
            leaf.numbers |= b.numbers
        if reason is not None:
            pin((a,), reason)
        if a.pin == GIVEN:
            a.pin = f"{why}, with {GIVEN}"
        return
    pairs = _pair_parts(summands(a), summands(b))
    if pairs is None:
        pin((a, b), f"{why}: blocks that do not fit into each other")
        return
    a.parts = tuple(p for p, _ in pairs)
    b.parts, b.same = None, a
    for p, q in pairs:
        unify(p, q, why, depth + 1)


def _pair_parts(first: Iterable[Axis], second: Iterable[Axis]) -> list[tuple[Axis, Axis]] | None:
    """Cut the parts of two sums until they have equal sizes, and pair them; None where that is impossible."""
    pairs: list[tuple[Axis, Axis]] = []
    left, right = deque(first), deque(second)
    while left and right:
        n, m = axis_size(left[0]), axis_size(right[0])
        if n == m:
            pairs.append((left.popleft(), right.popleft()))
            continue
        longer, at = (right, n) if n < m else (left, m)
        pieces = cut_axis(longer.popleft(), at)
        if pieces is None:
            return None
        longer.extendleft(reversed(pieces))
    return pairs


def split_atom(atom: Atom, outer: int, why: str) -> bool:
    """Refine an atom into (outer, inner) and return whether that was possible.

    All parts of a sum get the same inner axis, so that the sum is over the outer one alone: [a b | c b] = [a|c] b.
    """
    atom = root(atom)
    if atom.size % outer:
        return False
    inner = atom.size // outer
    if atom.parts is None:
        atom.factors = (*fresh_axis(outer, atom.pin, atom.numbers), *fresh_axis(inner, atom.pin, atom.numbers))
        return True
    parts = summands(atom)
    halves = [split_axis(part, axis_size(part) // inner, why) for part in parts if not axis_size(part) % inner]
    if len(halves) < len(summands(atom)) or None in halves:
        return False
    outers, inners = zip(*(half for half in halves if half is not None), strict=True)
    for other in inners[1:]:
        unify(inners[0], other, why)
    if all(axis_size(axis) == 1 for axis in outers):
        outside = fresh_axis(outer, f"{why}: takes blocks for rows", numbers=True)
    else:
        outside = sum_of(list(outers))
    atom.parts, atom.factors = None, (*outside, *inners[0])
    return True


def split_axis(axis: Axis, outer: int, why: str) -> tuple[Axis, Axis] | None:
    """Split an axis into (outer, inner), the outer one of the given size; None where that is impossible."""
    atoms, taken = deque(flat_atoms(axis)), []
    while outer > 1:
        atom = atoms.popleft()
        if outer % atom.size == 0:
            taken.append(atom)
            outer //= atom.size
            continue
        common = math.gcd(outer, atom.size)
        if common == 1 or not split_atom(atom, common, why):
            return None
        atoms.extendleft(reversed(flat_atoms((atom,))))
    return tuple(taken), tuple(atoms)


def cut_axis(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Cut an axis into [0, at) and [at, size); None where no boundary can be there.

    A product is cut at its outermost factor: (a b) = [a₀ b | a₁ b].
    """
    if at in (0, axis_size(axis)):
        return (axis, (Atom(0),)) if at else ((Atom(0),), axis)
    first, *rest = flat_atoms(axis)
    inner = axis_size(rest)
    if at % inner:
        return None
    if rest:
        halves = cut_axis((first,), at // inner)
        return None if halves is None else ((*halves[0], *rest), (*halves[1], *rest))
    if first.parts is None:
        left, right = fresh_axis(at, first.pin, first.numbers), fresh_axis(first.size - at, first.pin, first.numbers)
        first.parts = (left, right)
        return left, right
    before: list[Axis] = []
    after = summands(first)
    while at >= axis_size(after[0]):
        at -= axis_size(after[0])
        before.append(after.pop(0))
        if at == 0:
            return sum_of(before), sum_of(after)
    halves = cut_axis(after[0], at)
    if halves is None:
        return None
    first.parts = (*before, *halves, *after[1:])
    return sum_of([*before, halves[0]]), sum_of([halves[1], *after[1:]])


def slice_axis(axis: Axis, start: int, stop: int, why: str) -> Axis:
    """Return the slice [start, stop) of an axis; pin the axis where it cannot be cut there."""
    if (start, stop) == (0, axis_size(axis)):
        return axis
    if start >= stop:
        return (Atom(0),)
    reason = next((atom.pin for atom in leaf_atoms(axis)), None)
    if reason is not None and all(atom.pin is not None for atom in leaf_atoms(axis)):
        return fresh_axis(stop - start, reason)
    halves = (axis, ()) if stop == axis_size(axis) else cut_axis(axis, stop)
    if halves is not None and start > 0:
        halves = cut_axis(halves[0], start)
        halves = None if halves is None else (halves[1], ())
    if halves is None:
        pin(axis, f"{why}: cuts a composite axis")
        return fresh_axis(stop - start, why)
    return halves[0]


def regroup(axes: Iterable[Axis], shape: Iterable[int], why: str) -> list[Axis]:
    """The axes after a row-major `view`: the same atoms in the same order, grouped differently."""
    rest: Axis = tuple(atom for axis in axes for atom in flat_atoms(axis))
    shape = list(shape)
    if 0 in shape:
        return [fresh_axis(n, why) for n in shape]
    regrouped: list[Axis] = []
    for size in shape:
        halves = split_axis(rest, size, why)
        if halves is None:
            pin((*(atom for axis in regrouped for atom in axis), *rest), f"{why}: splits no axis evenly")
            return [fresh_axis(n, why) for n in shape]
        regrouped.append(halves[0])
        rest = halves[1]
    return regrouped
