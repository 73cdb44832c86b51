"""Norms of one axis: a square, its mean along the axis, what is divided by that length, and the gain it is times."""

from __future__ import annotations

from dataclasses import dataclass, field

from .record import Seen, Step
from .sides import Place, Sides
from .unification import Atom

ORTHOGONAL, CENTRED = "orthogonal", "centred"


@dataclass(frozen=True)
class Normed:
    """One norm of one axis: what it reads, what it gives, and the parameters in it."""

    kind: str
    atom: Atom
    before: Place
    after: Place
    affine: tuple[Place, ...]  # of its gain, and of its bias if it has one
    parameters: tuple[int, ...]  # their ids


@dataclass
class Norms:
    """The norms that were seen, and what may yet become one."""

    sides: Sides
    found: list[Normed] = field(default_factory=list)
    squared: set[Atom] = field(default_factory=set)
    squares: set[int] = field(default_factory=set)  # tensors that are squares of others
    lengths: set[int] = field(default_factory=set)  # means of squares along the last axis, and what is made of them
    normalised: set[int] = field(default_factory=set)  # what was divided by such a length

    def square(self, step: Step) -> bool:
        """Whether this is x², of which a length can be made."""
        x, last = step.seen[0], len(step.out.shape) - 1
        alone = x.stack is None and last >= 0 and len(self.sides.leaves(x.axis(None, last))) == 1
        if not alone or step.out.tensor == x.tensor or step.arguments.get("exponent", 2) != 2:
            return False
        self.sides.bend(x, range(last))
        self.sides.bend(step.out, range(last))
        self.squared.update(self.sides.leaves(x.axis(None, last)))
        self.squares.add(step.out.tensor)
        return True

    def fused(self, step: Step) -> bool:
        """Whether this norm, all of it in one operation, is one of a single axis with a gain."""
        x, kind = step["input"], ORTHOGONAL if "rms" in step.name else CENTRED
        gain = step["weight"]
        if gain is None or len(step["normalized_shape"]) > 1 or not self._noted(step, kind, x, gain, step["bias"]):
            return False
        others = range(len(x.shape) - 1)
        self.sides.bend(x, others)
        self.sides.bend(step.out, others)
        return True

    def gained(self, step: Step, gain: Seen, x: Seen) -> bool:
        """Whether this is a normalised tensor times the gain of its norm."""
        if x.tensor not in self.normalised or not self._noted(step, ORTHOGONAL, x, gain, None):
            return False
        for d in range(len(x.shape) - 1):
            self.sides.same(x, d, step.out, d)
        return True

    def _noted(self, step: Step, kind: str, x: Seen, gain: Seen, bias: Seen | None) -> bool:
        """Note a norm along the last axis, if it can be named: by its gain, a parameter with that axis alone."""
        affine = [gain] if bias is None else [gain, bias]
        if x.stack is not None or any(t.origin is None or len(t.shape) != 1 or not t.has(0) for t in affine):
            return False
        ends = [self.sides.at(t, len(t.shape) - 1) for t in (x, step.out, *affine)]
        if len(self.sides.leaves(x.axis(None, len(x.shape) - 1))) != 1 or len(ends[0]) != 1:
            return False
        if any([atom for atom, _ in end] != [atom for atom, _ in ends[0]] for end in ends):
            return False
        atom, places = ends[0][0][0], [end[0][1] for end in ends]
        origins = tuple(t.origin for t in affine if t.origin is not None)
        self.found.append(Normed(kind, atom, places[0], places[1], tuple(places[2:]), origins))
        return True
