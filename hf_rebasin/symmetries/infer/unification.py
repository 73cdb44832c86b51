"""The algebra of axes: what must move together, found by unification. Knows no tensor and no operation.

An axis is a tuple of *atoms*, outer first: `(a, b)` is the composite axis with index a·|b| + b, `()` an axis of size
one. Every atom stands for one symmetry that may still turn out to be more: a product of atoms (a `view` splits it), a
sum of axes (a slice cuts it), another atom (an operation reads both with one index), or pinned (something depends on
the order). All four only ever *restrict* what may move. So whatever is free at the end is a symmetry, in whatever
order the operations came, and where two axes cannot be brought together both are pinned.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

GIVEN = "an input or a constant"


DEEPEST = 50  # sums in sums: `x[1:] - x[:-1]` would cut an axis into its places, one by one


class Atom:
    """A factor of an axis. At most one of `same`, `factors` and `parts` is set."""

    __slots__ = ("factors", "numbers", "parts", "pin", "same", "size")

    def __init__(self, size: int, pin: str | None = None, numbers: bool = False):
        self.size = size
        self.pin = pin  # why it may not move
        self.numbers = numbers  # it numbers copies or blocks, each of which is there without it: nothing hangs on it
        self.same: Atom | None = None
        self.factors: Axis | None = None
        self.parts: tuple[Axis, ...] | None = None


Axis: TypeAlias = tuple[Atom, ...]


def fresh(size: int, pin: str | None = None, numbers: bool = False) -> Axis:
    """An axis nothing is known of."""
    return () if size == 1 else (Atom(size, pin, numbers),)


def size_of(axis: Iterable[Atom]) -> int:
    return math.prod(atom.size for atom in axis)


def root(atom: Atom) -> Atom:
    while atom.same is not None:
        if atom.same.same is not None:
            atom.same = atom.same.same  # shorter for whoever asks next
        atom = atom.same
    return atom


def flat(axis: Iterable[Atom]) -> list[Atom]:
    """The atoms of an axis as they are known by now: products multiplied out; leaves and sums remain."""
    found: list[Atom] = []
    for atom in axis:
        atom = root(atom)
        if atom.factors is not None:
            found += flat(atom.factors)
        elif atom.size != 1:
            found.append(atom)
    return found


def parts_of(atom: Atom) -> list[Axis]:
    """The parts of a sum, sums among them laid out."""
    found: list[Axis] = []
    for part in atom.parts or ():
        inside = flat(part)
        if len(inside) == 1 and inside[0].parts is not None:
            found += parts_of(inside[0])
        else:
            found.append(tuple(inside))
    return found


def leaves(axis: Iterable[Atom]) -> Iterator[Atom]:
    """The atoms of an axis, those inside its sums for the sums."""
    for atom in flat(axis):
        if atom.parts is None:
            yield atom
        for part in parts_of(atom):
            yield from leaves(part)


def sum_of(parts: list[Axis]) -> Axis:
    """Parts laid end to end."""
    if len(parts) == 1:
        return parts[0]
    atom = Atom(sum(map(size_of, parts)))
    atom.parts = tuple(parts)
    return (atom,)


def pin(axis: Iterable[Atom], why: str) -> None:
    """Nothing in this axis may move; the first reason is kept."""
    for atom in leaves(axis):
        if atom.pin is None:
            atom.pin = why


def unify(x: Iterable[Atom], y: Iterable[Atom], why: str, depth: int = 0) -> None:
    """Two axes that one index runs over move together; where they do not fit into each other, neither moves."""
    left, right = deque(flat(x)), deque(flat(y))
    if depth > DEEPEST:
        pin((*left, *right), f"{why}: shifts an axis against itself")
        return
    while left and right:
        a, b = root(left[0]), root(right[0])
        if a.factors is not None or b.factors is not None:  # refined by what came before in this loop
            queue, atom = (left, a) if a.factors is not None else (right, b)
            queue.popleft()
            queue.extendleft(reversed(flat((atom,))))
        elif a.size == b.size:
            left.popleft()
            right.popleft()
            _unify_atoms(a, b, why, depth)
        elif not (split(b, a.size, why) if a.size < b.size else split(a, b.size, why)):
            pin((*left, *right), f"{why}: {size_of(left)} and {size_of(right)} do not fit into each other")
            return


def _unify_atoms(a: Atom, b: Atom, why: str, depth: int) -> None:
    if a is b:
        return
    if a.parts is None:
        a, b = b, a
    if b.parts is None:  # a leaf becomes what the other is
        reason = a.pin or b.pin
        b.same = a
        for leaf in leaves((a,)):
            leaf.numbers |= b.numbers
        if reason is not None:
            pin((a,), reason)
        if a.pin == GIVEN:
            a.pin = f"{why}, with {GIVEN}"
        return
    pairs = _lined_up(parts_of(a), parts_of(b))
    if pairs is None:
        pin((a, b), f"{why}: blocks that do not fit into each other")
        return
    a.parts = tuple(p for p, _ in pairs)
    b.parts, b.same = None, a
    for p, q in pairs:
        unify(p, q, why, depth + 1)


def _lined_up(one: Iterable[Axis], other: Iterable[Axis]) -> list[tuple[Axis, Axis]] | None:
    """Two sums with their parts cut so that they are of the same sizes; None where that cannot be done."""
    pairs: list[tuple[Axis, Axis]] = []
    left, right = deque(one), deque(other)
    while left and right:
        n, m = size_of(left[0]), size_of(right[0])
        if n == m:
            pairs.append((left.popleft(), right.popleft()))
            continue
        longer, at = (right, n) if n < m else (left, m)
        pieces = cut(longer.popleft(), at)
        if pieces is None:
            return None
        longer.extendleft(reversed(pieces))
    return pairs


def split(atom: Atom, outer: int, why: str) -> bool:
    """Refine an atom into (outer, inner); False where it cannot be done.

    The blocks of a sum all get the same inner axis, so that the sum is one over the outer one: [a b | c b] = [a|c] b.
    """
    atom = root(atom)
    if atom.size % outer:
        return False
    inner = atom.size // outer
    if atom.parts is None:
        atom.factors = (*fresh(outer, atom.pin, atom.numbers), *fresh(inner, atom.pin, atom.numbers))
        return True
    halves = [split_axis(part, size_of(part) // inner, why) for part in parts_of(atom) if not size_of(part) % inner]
    if len(halves) < len(parts_of(atom)) or None in halves:
        return False
    outers, inners = zip(*(half for half in halves if half is not None), strict=True)
    for other in inners[1:]:
        unify(inners[0], other, why)
    if all(size_of(o) == 1 for o in outers):
        outside = fresh(outer, f"{why}: takes blocks for rows", numbers=True)
    else:
        outside = sum_of(list(outers))
    atom.parts, atom.factors = None, (*outside, *inners[0])
    return True


def split_axis(axis: Axis, outer: int, why: str) -> tuple[Axis, Axis] | None:
    """An axis as (outer, inner) of given sizes, None where it cannot be split there."""
    atoms, taken = deque(flat(axis)), []
    while outer > 1:
        atom = atoms.popleft()
        if outer % atom.size == 0:
            taken.append(atom)
            outer //= atom.size
            continue
        common = math.gcd(outer, atom.size)
        if common == 1 or not split(atom, common, why):
            return None
        atoms.extendleft(reversed(flat((atom,))))
    return tuple(taken), tuple(atoms)


def cut(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """An axis cut into [0, at) and [at, size); None where no boundary can be there. A product is cut at its outermost
    factor: (a b) = [a₀ b | a₁ b]."""
    if at in (0, size_of(axis)):
        return (axis, (Atom(0),)) if at else ((Atom(0),), axis)
    first, *rest = flat(axis)
    inner = size_of(rest)
    if at % inner:
        return None
    if rest:
        halves = cut((first,), at // inner)
        return None if halves is None else ((*halves[0], *rest), (*halves[1], *rest))
    if first.parts is None:
        left, right = fresh(at, first.pin, first.numbers), fresh(first.size - at, first.pin, first.numbers)
        first.parts = (left, right)
        return left, right
    before: list[Axis] = []
    after = parts_of(first)
    while at >= size_of(after[0]):
        at -= size_of(after[0])
        before.append(after.pop(0))
        if at == 0:
            return sum_of(before), sum_of(after)
    halves = cut(after[0], at)
    if halves is None:
        return None
    first.parts = (*before, *halves, *after[1:])
    return sum_of([*before, halves[0]]), sum_of([halves[1], *after[1:]])


def piece(axis: Axis, start: int, stop: int, why: str) -> Axis:
    """The part [start, stop) of an axis; where no boundaries can be there, the axis is pinned."""
    if (start, stop) == (0, size_of(axis)):
        return axis
    if start >= stop:
        return (Atom(0),)
    reason = next((atom.pin for atom in leaves(axis)), None)
    if reason is not None and all(atom.pin is not None for atom in leaves(axis)):
        return fresh(stop - start, reason)
    halves = (axis, ()) if stop == size_of(axis) else cut(axis, stop)
    if halves is not None and start > 0:
        halves = cut(halves[0], start)
        halves = None if halves is None else (halves[1], ())
    if halves is None:
        pin(axis, f"{why}: cuts a composite axis")
        return fresh(stop - start, why)
    return halves[0]


def regroup(axes: Iterable[Axis], shape: Iterable[int], why: str) -> list[Axis]:
    """The axes of a row-major `view`: the same atoms in the same order, otherwise in brackets."""
    rest: Axis = tuple(atom for axis in axes for atom in flat(axis))
    shape = list(shape)
    if 0 in shape:
        return [fresh(n, why) for n in shape]
    found: list[Axis] = []
    for size in shape:
        halves = split_axis(rest, size, why)
        if halves is None:
            pin((*(a for axis in found for a in axis), *rest), f"{why}: splits no axis evenly")
            return [fresh(n, why) for n in shape]
        found.append(halves[0])
        rest = halves[1]
    return found
