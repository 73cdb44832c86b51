"""A second reading of the operations: which of them are linear, along which axes.

Every operation has been read once, for the axes that it moves together. Now that all axes are known, it is asked for
more: whether a matrix might act where so far a permutation does. What is not said here to be linear bends all it
touches, so that a larger group may be missed and none is made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from .norms import Norms
from .record import Seen, Step
from .sides import Place, Sides
from .unification import Atom

Terms: TypeAlias = list[tuple[Seen, str]]


@dataclass(frozen=True)
class Contracted:
    """One sum over an axis of two tensors."""

    places: tuple[Place, Place]
    parameters: tuple[int | None, int | None]
    where: str
    scaled: bool  # one of them is times a number


@dataclass
class Reading:
    """What the operations say."""

    sides: Sides = field(default_factory=Sides)
    norms: Norms = field(init=False)
    contracted: dict[Atom, list[Contracted]] = field(default_factory=dict)
    rows: list[tuple[Place, Place]] = field(default_factory=list)  # of a parameter, of its rows found by number
    scaled: set[int] = field(default_factory=set)  # what was multiplied by a number, and what is made of it alone

    def __post_init__(self) -> None:
        self.norms = Norms(self.sides)

    def read(self, step: Step) -> None:
        name = step.name if step.name in READERS else step.name.removesuffix("_")
        reader = READERS.get(name, _bent)
        if name != step.name and reader in (_viewed, _permuted):
            reader = _bent  # its axes are others now
        for one in (*step.seen, *step.outs):
            self.sides.collapsed(one)
            if one.tensor in self.norms.squares and reader not in (_reduced, _copied):
                self.sides.bend(one)
        reader(self, step)
        if len(step.seen) == 1 and (name in ("mul", "div") or step.seen[0].tensor in self.scaled):
            self.scaled |= {out.tensor for out in step.outs}
        alone = len(step.seen) == len(step.outs) == 1 and step.out.shape == step.seen[0].shape
        if alone and step.seen[0].tensor in self.norms.lengths:
            self.norms.lengths.add(step.out.tensor)

    def broadcast(self, step: Step, terms: Sequence[Seen], product: bool) -> None:
        """A sum or a product: linear along an axis that all terms of a sum have, or exactly one factor."""
        for d in range(-len(step.out.shape), 0):
            have = [(t, len(t.shape) + d) for t in terms if len(t.shape) >= -d and t.has(len(t.shape) + d)]
            out = step.out, len(step.out.shape) + d
            if have and len(have) == (1 if product else len(terms)):
                for t, e in have:
                    self.sides.same(t, e, *out)
            else:
                for t, e in (*have, out):
                    self.sides.bend(t, [e])

    def contract(self, step: Step, factors: Terms, out: tuple[Seen, str], added: Terms) -> None:
        """A sum of products over the labels that the output lacks, and what is added to it."""
        for label in dict.fromkeys("".join(labels for _, labels in (*factors, out))):
            have, plus = (
                [(t, s.index(label)) for t, s in terms if label in s and t.has(s.index(label))]
                for terms in (factors, added)
            )
            there = [(out[0], out[1].index(label))] if label in out[1] else []
            if not there and len(have) == 2:
                self._contracted(step, *have)
            elif there and len(have) == 1 and len(plus) == len(added):
                for t, d in (*have, *plus):
                    self.sides.same(t, d, *there[0])
            else:
                for t, d in (*have, *plus, *there):
                    self.sides.bend(t, [d])

    def _contracted(self, step: Step, one: tuple[Seen, int], two: tuple[Seen, int]) -> None:
        a, b = self.sides.at(*one), self.sides.at(*two)
        self.sides.together(a, b, opposite=True)
        for (atom, x), (_, y) in zip(a, b, strict=False):
            origins, scaled = (one[0].origin, two[0].origin), bool({one[0].tensor, two[0].tensor} & self.scaled)
            self.contracted.setdefault(atom, []).append(Contracted((x, y), origins, step.where, scaled))


Reader: TypeAlias = Callable[[Reading, Step], None]
READERS: dict[str, Reader] = {}


def reads(names: str) -> Callable[[Reader], Reader]:
    def register(function: Reader) -> Reader:
        READERS.update(dict.fromkeys(names.split(), function))
        return function

    return register


def _bent(reading: Reading, step: Step) -> None:
    for one in (*step.seen, *step.outs):
        reading.sides.bend(one)


# --- one output element for each input element -----------------------------------------------------------------------


@reads("_to_copy alias clone contiguous detach lift lift_fresh lift_fresh_copy neg zero")
def _copied(reading: Reading, step: Step) -> None:
    """The same numbers, perhaps in another precision, perhaps all of them negative."""
    x, out = step.seen[0], step.out
    if not out.floating:
        return _bent(reading, step)
    for kept in (reading.norms.squares, reading.norms.normalised):
        if x.tensor in kept:
            kept.add(out.tensor)
    for d in range(len(x.shape)):
        reading.sides.same(x, d, out, d)
    return None


@reads("copy")
def _written(reading: Reading, step: Step) -> None:
    reading.broadcast(step, [step["src"]], product=False)


@reads("add sub")
def _added(reading: Reading, step: Step) -> None:
    if len(step.seen) < 2:  # a number to every element
        return _bent(reading, step)
    return reading.broadcast(step, step.seen, product=False)


@reads("mul")
def _multiplied(reading: Reading, step: Step) -> None:
    """By a number, or by a tensor that is the same everywhere along the axis; or a square, or the gain of a norm."""
    factors = step.seen
    if len({t.tensor for t in factors}) < len(factors):
        return _squared(reading, step)
    normalised = any(t.tensor in reading.norms.normalised for t in factors)
    if normalised and len(factors) == 2 and reading.norms.gained(step, *sorted(factors, key=lambda t: len(t.shape))):
        return None
    reading.broadcast(step, factors, product=True)
    if any(t.tensor in reading.norms.lengths for t in factors) or (normalised and len(factors) == 1):
        reading.norms.normalised.add(step.out.tensor)
    return None


@reads("div")
def _divided(reading: Reading, step: Step) -> None:
    """By a number, or by a tensor that is the same everywhere along the axis."""
    if step["rounding_mode"] is not None or not isinstance(step["self"], Seen):
        return _bent(reading, step)
    for by in step.seen[1:]:
        reading.sides.bend(by)
        if by.tensor in reading.norms.lengths:
            reading.norms.normalised.add(step.out.tensor)
    return reading.broadcast(step, step.seen, product=True)


@reads("zeros zeros_like new_zeros")
def _zeros(reading: Reading, step: Step) -> None:
    """Nothing is everywhere zero in any coordinates."""


# --- norms -----------------------------------------------------------------------------------------------------------


@reads("square pow")
def _squared(reading: Reading, step: Step) -> None:
    """Σ x² is what an orthogonal matrix keeps: nothing else may be made of squares."""
    if not reading.norms.square(step):
        _bent(reading, step)


@reads("mean sum")
def _reduced(reading: Reading, step: Step) -> None:
    """Linear along what stays; of squares, along the whole of their axis, it is a length."""
    x, out, n = step.seen[0], step.out, len(step.seen[0].shape)
    dims = step["dim"]
    dims = range(n) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % n for d in dims if n}
    if x.tensor in reading.norms.squares and gone == {n - 1}:
        reading.norms.lengths.add(out.tensor)
    else:
        reading.sides.bend(x, range(n) if x.tensor in reading.norms.squares else sorted(gone))
    kept = [d for d in range(n) if step["keepdim"] or d not in gone]
    for e, d in enumerate(kept):
        if d not in gone:
            reading.sides.same(x, d, out, e)


@reads("native_layer_norm _fused_rms_norm")
def _layer_norm(reading: Reading, step: Step) -> None:
    if not reading.norms.fused(step):
        _bent(reading, step)


# --- contractions ----------------------------------------------------------------------------------------------------


def _product(factors: dict[str, str], out: str, added: str = "") -> Reader:
    """Factors by their names, with their labels; what is added has the last labels of the output."""

    def reader(reading: Reading, step: Step) -> None:
        plus = [(step[added], out[len(out) - len(step[added].shape) :])] if added else []
        reading.contract(step, [(step[name], labels) for name, labels in factors.items()], (step.out, out), plus)

    return reader


READERS |= {
    "mm": _product({"self": "ik", "mat2": "kj"}, "ij"),
    "bmm": _product({"self": "nik", "mat2": "nkj"}, "nij"),
    "mv": _product({"self": "ik", "vec": "k"}, "i"),
    "addmm": _product({"mat1": "ik", "mat2": "kj"}, "ij", "self"),
    "baddbmm": _product({"batch1": "nik", "batch2": "nkj"}, "nij", "self"),
}


@reads("linear")
def _linear(reading: Reading, step: Step) -> None:
    x, bias = step["input"], step["bias"]
    before = "abcdefgh"[: len(x.shape) - 1]
    added = [(bias, "j")] if bias is not None else []
    reading.contract(step, [(x, before + "k"), (step["weight"], "jk")], (step.out, before + "j"), added)


@reads("convolution")
def _convolution(reading: Reading, step: Step) -> None:
    """Channels are contracted; along places and kernels nothing is."""
    if step["groups"] != 1 or step["transposed"]:
        return _bent(reading, step)
    n, bias = len(step["input"].shape) - 2, step["bias"]
    factors = [(step["input"], "ni" + "pqr"[:n]), (step["weight"], "oi" + "uvw"[:n])]
    return reading.contract(step, factors, (step.out, "no" + "xyz"[:n]), [(bias, "o")] if bias is not None else [])


# --- other brackets, other places ------------------------------------------------------------------------------------


@reads("view _unsafe_view reshape _reshape_alias unflatten squeeze unsqueeze")
def _viewed(reading: Reading, step: Step) -> None:
    if math.prod(step["self"].shape) != math.prod(step.out.shape):
        return _bent(reading, step)
    return reading.sides.viewed(step["self"], step.out)


@reads("t transpose permute")
def _permuted(reading: Reading, step: Step) -> None:
    x, n = step["self"], len(step["self"].shape)
    order = list(range(n))
    if step.name == "permute":
        order = [d % n for d in step["dims"]]
    elif n > 1:
        i, j = (0, 1) if step.name == "t" else (step["dim0"], step["dim1"])
        order[i], order[j] = order[j], order[i]
    for e, d in enumerate(order):
        reading.sides.same(x, d, step.out, e)


@reads("expand")
def _expanded(reading: Reading, step: Step) -> None:
    """What is repeated is the same everywhere along the new axis, which a matrix would not keep."""
    x, out = step["self"], step.out
    new = len(out.shape) - len(x.shape)
    for d, size in enumerate(out.shape):
        if d >= new and x.shape[d - new] == size:
            reading.sides.same(x, d - new, out, d)
        else:
            reading.sides.bend(out, [d])


def _cut(reading: Reading, step: Step, dim: int, start: int, out: Seen, gone: bool = False) -> None:
    """A piece of an axis from `start` on; or a slice, whose axis is gone."""
    x, sides = step["self"], reading.sides
    for d in range(len(x.shape)):
        e = d - (gone and d > dim)
        if x.stack is not None and x.stack.dim == dim:
            for face in out.faces:
                if d != dim:
                    sides.together(sides.at(x, d, start + (face or 0)), sides.at(out, e, face))
        elif d != dim:
            sides.same(x, d, out, e)
        elif not gone:
            sides.part(x, out, d, start)


@reads("slice")
def _sliced(reading: Reading, step: Step) -> None:
    dim, start = step["dim"] % len(step["self"].shape), step["start"] or 0
    size = step["self"].shape[dim]
    if step["step"] not in (None, 1):
        return _bent(reading, step)
    return _cut(reading, step, dim, min(max(start + size if start < 0 else start, 0), size), step.out)


@reads("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk")
def _split(reading: Reading, step: Step) -> None:
    dim, start = step["dim"] % len(step["self"].shape), 0
    for out in step.outs:
        _cut(reading, step, dim, start, out)
        start += out.shape[dim]


@reads("select unbind")
def _selected(reading: Reading, step: Step) -> None:
    dim = step["dim"] % len(step["self"].shape)
    size = step["self"].shape[dim]
    for i, out in enumerate(step.outs):
        _cut(reading, step, dim, step["index"] % size if step.name == "select" else i, out, gone=True)


@reads("cat")
def _concatenated(reading: Reading, step: Step) -> None:
    dim, start = step["dim"] % len(step.out.shape), 0
    for t in step["tensors"]:
        if len(t.shape) < len(step.out.shape):  # nothing, as old code says it
            continue
        for d in range(len(t.shape)):
            if d == dim:
                reading.sides.part(step.out, t, d, start)
            else:
                reading.sides.same(t, d, step.out, d)
        start += t.shape[dim]


@reads("stack")
def _stacked(reading: Reading, step: Step) -> None:
    dim = step["dim"] % len(step.out.shape)
    for face, t in zip(step.out.faces, step["tensors"], strict=True):
        for d in range(len(t.shape)):
            reading.sides.together(reading.sides.at(t, d), reading.sides.at(step.out, d + (d >= dim), face))


@reads("embedding")
def _looked_up(reading: Reading, step: Step) -> None:
    """Rows by their number. What else is done with the table is told apart from that: it may be a tied head."""
    weight, out = step["weight"], step.out
    found = zip(reading.sides.at(weight, 1), reading.sides.at(out, len(out.shape) - 1), strict=True)
    reading.rows += [(row, there) for (_, row), (_, there) in found]


@reads("index _unsafe_index index_select")
def _indexed(reading: Reading, step: Step) -> None:
    """Rows by their number; the axes that are not indexed go through."""
    n, indices = len(step["self"].shape), step["indices"]
    if indices is None:
        indices = [None] * (step["dim"] % n) + [step["index"]]
    at = [d for d, i in enumerate(indices) if i is not None]
    new = max(len(indices[d].shape) for d in at)
    place = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    kept = [d for d in range(n) if d not in at]
    for e, d in enumerate(kept):
        reading.sides.same(step["self"], d, step.out, e + (new if e >= place else 0))
