"""Recognise the norms of an axis: a square, its mean along the axis, a division by that length, and a gain."""

from __future__ import annotations

from dataclasses import dataclass, field

from .record import Snapshot, TracedStep
from .sides import AtomPlace, Sides
from .unification import Atom

ORTHOGONAL, CENTRED = "orthogonal", "centred"


@dataclass(frozen=True, kw_only=True)
class AxisNorm:
    """One norm along one axis: its input, its output and its parameters."""

    kind: str  # ORTHOGONAL or CENTRED
    atom: Atom
    before: AtomPlace
    after: AtomPlace
    affine: tuple[AtomPlace, ...]  # in its gain, and in its bias if it has one
    parameters: tuple[int, ...]  # the ids of gain and bias


@dataclass(kw_only=True)
class Norms:
    """The norms recognised so far, and the tensors that may become part of one."""

    sides: Sides
    recognised: list[AxisNorm] = field(default_factory=list)
    squared_atoms: set[Atom] = field(default_factory=set)
    squares: set[int] = field(default_factory=set)  # tensors that are the squares of others
    lengths: set[int] = field(default_factory=set)  # means of squares along the last axis, and functions of them
    normalised: set[int] = field(default_factory=set)  # tensors divided by such a length

    def note_square(self, step: TracedStep) -> bool:
        """Record a square whose mean would be a length, and return whether this operation is one."""
        x, last = step.inputs[0], len(step.out.shape) - 1
        has_one_atom = x.stack is None and last >= 0 and len(self.sides.leaves(x.axis(None, last))) == 1
        if not has_one_atom or step.out.tensor == x.tensor or step.arguments.get("exponent", 2) != 2:
            return False
        self.sides.bend(x, range(last))
        self.sides.bend(step.out, range(last))
        self.squared_atoms.update(self.sides.leaves(x.axis(None, last)))
        self.squares.add(step.out.tensor)
        return True

    def note_fused(self, step: TracedStep) -> bool:
        """Record a fused norm of a single axis with a gain, and return whether this operation is one."""
        x, kind = step["input"], ORTHOGONAL if "rms" in step.name else CENTRED
        gain = step["weight"]
        if gain is None or len(step["normalized_shape"]) > 1 or not self._note(step, kind, x, gain, step["bias"]):
            return False
        other_axes = range(len(x.shape) - 1)
        self.sides.bend(x, other_axes)
        self.sides.bend(step.out, other_axes)
        return True

    def note_gain(self, step: TracedStep, gain: Snapshot, x: Snapshot) -> bool:
        """Record the product of a normalised tensor and the gain of its norm; return whether this operation is one."""
        if x.tensor not in self.normalised or not self._note(step, ORTHOGONAL, x, gain, None):
            return False
        for d in range(len(x.shape) - 1):
            self.sides.link_axes(x, d, step.out, d)
        return True

    def _note(self, step: TracedStep, kind: str, x: Snapshot, gain: Snapshot, bias: Snapshot | None) -> bool:
        """Record a norm along the last axis if it can be named, by a gain that is a parameter with that axis alone."""
        affine = [gain] if bias is None else [gain, bias]
        if x.stack is not None or any(t.origin is None or len(t.shape) != 1 or not t.has(0) for t in affine):
            return False
        ends = [self.sides.places_at(t, len(t.shape) - 1) for t in (x, step.out, *affine)]
        if len(self.sides.leaves(x.axis(None, len(x.shape) - 1))) != 1 or len(ends[0]) != 1:
            return False
        if any([atom for atom, _ in end] != [atom for atom, _ in ends[0]] for end in ends):
            return False
        atom, places = ends[0][0][0], [end[0][1] for end in ends]
        origins = tuple(t.origin for t in affine if t.origin is not None)
        norm = AxisNorm(
            kind=kind,
            atom=atom,
            before=places[0],
            after=places[1],
            affine=tuple(places[2:]),
            parameters=origins,
        )
        self.recognised.append(norm)
        return True
