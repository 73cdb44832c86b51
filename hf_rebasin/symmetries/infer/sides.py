"""Which places of tensors move alike, and which as each other's inverse transpose.

A permutation is its own inverse transpose; a matrix is not. A *place* is one atom in one axis of one tensor. Linear
operations link places: what is added moves alike, what is contracted moves as the inverse transpose. What an operation
does that is not linear along an axis bends its atoms: they can be permuted, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from .record import Seen
from .unification import Atom, Axis, flat, leaves, parts_of, size_of

Place: TypeAlias = tuple[int, int | None, int, int]  # tensor, slice of a stack, axis, leaf of that axis
Piece: TypeAlias = tuple[int, tuple[tuple[int, Atom, int], ...]]  # offset; (leaf, atom, stride) of each factor


class Sides:
    """Places with the side they are on: links between them, and what is bent."""

    def __init__(self) -> None:
        self.bent: set[Atom] = set()
        self.places: dict[Atom, dict[Place, None]] = {}
        self.torn: set[Place] = set()  # roots of places that would have to be on both sides
        self._above: dict[Place, tuple[Place, bool]] = {}
        self._leaves: dict[Axis, list[Atom]] = {}
        self._pieces: dict[Axis, list[Piece]] = {}
        self._stacked: dict[int, Seen] = {}

    # --- places --------------------------------------------------------------------------------------------------

    def leaves(self, axis: Axis) -> list[Atom]:
        if axis not in self._leaves:
            self._leaves[axis] = list(leaves(axis))
        return self._leaves[axis]

    def at(self, seen: Seen, d: int, face: int | None = None) -> list[tuple[Atom, Place]]:
        """The free atoms of an axis with their places."""
        found = []
        for n, atom in enumerate(self.leaves(seen.axis(face, d))):
            if atom.pin is None:
                place = (seen.tensor, face, d, n)
                self.places.setdefault(atom, {})[place] = None
                found.append((atom, place))
        return found

    def whole(self, seen: Seen, face: int | None = None) -> list[tuple[Atom, Place]]:
        """The same of all axes, in row-major order."""
        return [one for d in range(len(seen.shape)) for one in self.at(seen, d, face)]

    def bend(self, seen: Seen, dims: Iterable[int] | None = None) -> None:
        for face in seen.faces:
            for d in range(len(seen.shape)) if dims is None else dims:
                self.bent.update(atom for atom, _ in self.at(seen, d, face))

    # --- links ---------------------------------------------------------------------------------------------------

    def root(self, place: Place) -> tuple[Place, bool]:
        """The place that stands for all that this one is linked with, and whether this one is on its other side."""
        path, other = [], False
        while place in self._above:
            path.append(place)
            place = self._above[place][0]
        for step in reversed(path):  # shorter for whoever asks next
            other ^= self._above[step][1]
            self._above[step] = place, other
        return place, other

    def link(self, one: Place, two: Place, opposite: bool = False) -> None:
        (a, x), (b, y) = self.root(one), self.root(two)
        if a != b:
            self._above[a] = b, x ^ y ^ opposite
            if a in self.torn:
                self.torn.add(b)
        elif x ^ y != opposite:
            self.torn.add(a)

    def together(self, one: list[tuple[Atom, Place]], two: list[tuple[Atom, Place]], opposite: bool = False) -> None:
        """Link places one by one; what does not fit is bent."""
        if [atom for atom, _ in one] != [atom for atom, _ in two]:
            self.bent.update(atom for atom, _ in (*one, *two))
            return
        for (_, a), (_, b) in zip(one, two, strict=True):
            self.link(a, b, opposite)

    def same(self, one: Seen, d: int, two: Seen, e: int) -> None:
        """An axis of one tensor is that of another, slice by slice where both are stacks."""
        if len(one.faces) != len(two.faces):
            self.bend(one, [d])
            self.bend(two, [e])
            return
        for f, g in zip(one.faces, two.faces, strict=True):
            self.together(self.at(one, d, f), self.at(two, e, g))

    def part(self, whole: Seen, part: Seen, d: int, start: int) -> None:
        """A part of an axis begins at `start` of it: a slice, or a term of a concatenation."""
        there = {
            (offset, tuple((atom, stride) for _, atom, stride in items)): [n for n, _, _ in items]
            for offset, items in self.pieces(whole.axis(None, d))
        }
        for offset, items in self.pieces(part.axis(None, d)):
            found = there.get((offset + start, tuple((atom, stride) for _, atom, stride in items)))
            if found is None:
                self.bent.update(atom for _, atom, _ in items if atom.pin is None)
                continue
            for (n, atom, _), m in zip(items, found, strict=True):
                if atom.pin is None:
                    places = (part.tensor, None, d, n), (whole.tensor, None, d, m)
                    self.places.setdefault(atom, {}).update(dict.fromkeys(places))
                    self.link(*places)

    def viewed(self, one: Seen, two: Seen) -> None:
        """The same numbers in other brackets: the same places in the same order."""
        if len(one.faces) == len(two.faces):
            for f, g in zip(one.faces, two.faces, strict=True):
                self.together(self.whole(one, f), self.whole(two, g))
            return
        stacked, plain = (one, two) if one.stack is not None else (two, one)
        if plain.stack is not None or stacked.stack is None:
            self.bend(one)
            self.bend(two)
            return
        # [before, block 0, block 1, …, after] of one are [before, block k, after] of every slice of the other
        every, faces = self.whole(plain), [self.whole(stacked, f) for f in stacked.faces]
        before = sum(len(self.at(stacked, d, 0)) for d in range(stacked.stack.dim))
        after = (sum(map(len, faces)) - len(every)) // (len(faces) - 1) - before
        first = before
        for face in faces:
            last = first + len(face) - before - after
            self.together([*every[:before], *every[first:last], *every[len(every) - after :]], face)
            first = last

    def collapsed(self, seen: Seen) -> None:
        """A stack whose slices have become one: those move alike."""
        if seen.stack is not None:
            self._stacked[seen.tensor] = seen
        elif seen.axes is not None and seen.tensor in self._stacked:
            was = self._stacked.pop(seen.tensor)
            for face in was.faces:
                for d in range(len(seen.shape)):
                    if was.stack is not None and d != was.stack.dim:
                        self.together(self.at(seen, d), self.at(was, d, face))

    def pieces(self, axis: Axis) -> list[Piece]:
        """An axis as blocks that have no sums in them."""
        if axis not in self._pieces:
            self._pieces[axis] = _pieces(axis, iter(range(len(self.leaves(axis)))))
        return self._pieces[axis]


def _pieces(axis: Axis, count: Iterator[int]) -> list[Piece]:
    found: list[Piece] = [(0, ())]
    for atom in flat(axis):
        inside: list[Piece] = []
        start = 0
        for part in parts_of(atom):
            inside += [(start + offset, items) for offset, items in _pieces(part, count)]
            start += size_of(part)
        if atom.parts is None:
            inside = [(0, ((next(count), atom, 1),))]
        found = [
            (offset * atom.size + more, (*((n, a, stride * atom.size) for n, a, stride in items), *further))
            for offset, items in found
            for more, further in inside
        ]
    return found
