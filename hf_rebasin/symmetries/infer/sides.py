"""Which places of tensors move alike, and which as each other's inverse transpose.

A permutation is its own inverse transpose; a general matrix is not. A *place* is one atom in one axis of one tensor.
Linear operations link places: summands move alike, contracted axes move as each other's inverse transpose. An
operation that is not linear along an axis *bends* its atoms: they can be permuted, but not more than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from .record import Snapshot
from .unification import Atom, Axis, axis_size, flat_atoms, leaf_atoms, summands

AtomPlace: TypeAlias = tuple[int, int | None, int, int]  # tensor, slice of a stack, axis, leaf of that axis
PlainBlock: TypeAlias = tuple[int, tuple[tuple[int, Atom, int], ...]]  # offset; (leaf, atom, stride) of each factor


class Sides:
    """Places, the links between them (a union-find in which every place is on one of two sides), and bent atoms."""

    def __init__(self) -> None:
        self.bent: set[Atom] = set()
        self.places: dict[Atom, dict[AtomPlace, None]] = {}
        self.inconsistent: set[AtomPlace] = set()  # roots of places that would have to be on both sides
        self._parents: dict[AtomPlace, tuple[AtomPlace, bool]] = {}
        self._leaves: dict[Axis, list[Atom]] = {}
        self._plain_blocks: dict[Axis, list[PlainBlock]] = {}
        self._stacks: dict[int, Snapshot] = {}

    # --- places --------------------------------------------------------------------------------------------------

    def leaves(self, axis: Axis) -> list[Atom]:
        """The leaf atoms of an axis, cached."""
        if axis not in self._leaves:
            self._leaves[axis] = list(leaf_atoms(axis))
        return self._leaves[axis]

    def places_at(self, snapshot: Snapshot, d: int, slice_index: int | None = None) -> list[tuple[Atom, AtomPlace]]:
        """The free atoms of an axis with their places."""
        places = []
        for n, atom in enumerate(self.leaves(snapshot.axis(slice_index, d))):
            if atom.pin is None:
                place = (snapshot.tensor, slice_index, d, n)
                self.places.setdefault(atom, {})[place] = None
                places.append((atom, place))
        return places

    def all_places(self, snapshot: Snapshot, slice_index: int | None = None) -> list[tuple[Atom, AtomPlace]]:
        """The free atoms of all axes with their places, in row-major order."""
        return [entry for d in range(len(snapshot.shape)) for entry in self.places_at(snapshot, d, slice_index)]

    def bend(self, snapshot: Snapshot, dims: Iterable[int] | None = None) -> None:
        """Record that an operation is not linear along these dimensions of a tensor, by default along all of them."""
        for slice_index in snapshot.slices:
            for d in range(len(snapshot.shape)) if dims is None else dims:
                self.bent.update(atom for atom, _ in self.places_at(snapshot, d, slice_index))

    # --- links ---------------------------------------------------------------------------------------------------

    def root(self, place: AtomPlace) -> tuple[AtomPlace, bool]:
        """The place that represents all those linked to this one, and whether this one is on the opposite side."""
        path, opposite = [], False
        while place in self._parents:
            path.append(place)
            place = self._parents[place][0]
        for child in reversed(path):  # path compression
            opposite ^= self._parents[child][1]
            self._parents[child] = place, opposite
        return place, opposite

    def link(self, first: AtomPlace, second: AtomPlace, opposite: bool = False) -> None:
        """Link two places: they move alike or, if opposite, as each other's inverse transpose."""
        (a, x), (b, y) = self.root(first), self.root(second)
        if a != b:
            self._parents[a] = b, x ^ y ^ opposite
            if a in self.inconsistent:
                self.inconsistent.add(b)
        elif x ^ y != opposite:
            self.inconsistent.add(a)

    def link_places(
        self, first: list[tuple[Atom, AtomPlace]], second: list[tuple[Atom, AtomPlace]], opposite: bool = False
    ) -> None:
        """Link places pairwise; bend all atoms where they do not match."""
        if [atom for atom, _ in first] != [atom for atom, _ in second]:
            self.bent.update(atom for atom, _ in (*first, *second))
            return
        for (_, a), (_, b) in zip(first, second, strict=True):
            self.link(a, b, opposite)

    def link_axes(self, first: Snapshot, d: int, second: Snapshot, e: int) -> None:
        """Link dimension d of one tensor to dimension e of another, slice by slice where both are stacks."""
        if len(first.slices) != len(second.slices):
            self.bend(first, [d])
            self.bend(second, [e])
            return
        for i, j in zip(first.slices, second.slices, strict=True):
            self.link_places(self.places_at(first, d, i), self.places_at(second, e, j))

    def link_part(self, whole: Snapshot, part: Snapshot, d: int, start: int) -> None:
        """Link dimension d of a slice (or a term of a concatenation) to the whole, in which it begins at `start`."""
        leaves_in_whole = {
            (offset, tuple((atom, stride) for _, atom, stride in items)): [n for n, _, _ in items]
            for offset, items in self.plain_blocks(whole.axis(None, d))
        }
        for offset, items in self.plain_blocks(part.axis(None, d)):
            leaves_there = leaves_in_whole.get((offset + start, tuple((atom, stride) for _, atom, stride in items)))
            if leaves_there is None:
                self.bent.update(atom for _, atom, _ in items if atom.pin is None)
                continue
            for (n, atom, _), m in zip(items, leaves_there, strict=True):
                if atom.pin is None:
                    places = (part.tensor, None, d, n), (whole.tensor, None, d, m)
                    self.places.setdefault(atom, {}).update(dict.fromkeys(places))
                    self.link(*places)

    def link_view(self, first: Snapshot, second: Snapshot) -> None:
        """Link two tensors of which one is a view of the other: they have the same places in the same order."""
        if len(first.slices) == len(second.slices):
            for i, j in zip(first.slices, second.slices, strict=True):
                self.link_places(self.all_places(first, i), self.all_places(second, j))
            return
        stacked, plain = (first, second) if first.stack is not None else (second, first)
        if plain.stack is not None or stacked.stack is None:
            self.bend(first)
            self.bend(second)
            return
        # the plain tensor has [before, block 0, block 1, …, after], slice k of the stack has [before, block k, after]
        every, slices = self.all_places(plain), [self.all_places(stacked, i) for i in stacked.slices]
        before = sum(len(self.places_at(stacked, d, 0)) for d in range(stacked.stack.dim))
        after = (sum(map(len, slices)) - len(every)) // (len(slices) - 1) - before
        start = before
        for places in slices:
            stop = start + len(places) - before - after
            self.link_places([*every[:before], *every[start:stop], *every[len(every) - after :]], places)
            start = stop

    def track_stack(self, snapshot: Snapshot) -> None:
        """Link the slices of a stack that has since collapsed into ordinary axes: they move alike."""
        if snapshot.stack is not None:
            self._stacks[snapshot.tensor] = snapshot
        elif snapshot.axes is not None and snapshot.tensor in self._stacks:
            earlier = self._stacks.pop(snapshot.tensor)
            for slice_index in earlier.slices:
                for d in range(len(snapshot.shape)):
                    if earlier.stack is not None and d != earlier.stack.dim:
                        self.link_places(self.places_at(snapshot, d), self.places_at(earlier, d, slice_index))

    def plain_blocks(self, axis: Axis) -> list[PlainBlock]:
        """The blocks of an axis that have no sums in them, cached."""
        if axis not in self._plain_blocks:
            self._plain_blocks[axis] = _plain_blocks(axis, iter(range(len(self.leaves(axis)))))
        return self._plain_blocks[axis]


def _plain_blocks(axis: Axis, count: Iterator[int]) -> list[PlainBlock]:
    """The blocks of an axis that have no sums in them; `count` numbers its leaves."""
    blocks: list[PlainBlock] = [(0, ())]
    for atom in flat_atoms(axis):
        inside: list[PlainBlock] = []
        start = 0
        for part in summands(atom):
            inside += [(start + offset, items) for offset, items in _plain_blocks(part, count)]
            start += axis_size(part)
        if atom.parts is None:
            inside = [(0, ((next(count), atom, 1),))]
        blocks = [
            (offset * atom.size + more, (*((n, a, stride * atom.size) for n, a, stride in items), *further))
            for offset, items in blocks
            for more, further in inside
        ]
    return blocks
