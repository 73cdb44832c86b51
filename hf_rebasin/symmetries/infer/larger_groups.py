"""Which symmetries are larger than permutations.

*Invertible*: an axis along which everything is linear, so that whatever one side writes through a matrix, the other
reads through its inverse. *Orthogonal* and *centred*: a stream that is only added to and read through norms, so that
it can be turned once their gains are folded into what reads them. Everything else, and whatever is in doubt, stays a
permutation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..patterns import DIAGONAL, READER
from .linearity import Reading
from .norms import CENTRED, Normed
from .record import Seen
from .sides import Place
from .tracing import Traced
from .unification import Atom, flat

Named = Callable[[int, str], str | None]  # a parameter's key in the table, as the module says it that reads it


@dataclass
class Larger:
    """Atoms with the kind of their group, the marks of their places in parameters, and which maps read which norm."""

    kinds: dict[Atom, str] = field(default_factory=dict)
    marks: dict[Place, str] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)


def larger(traced: Traced, atoms: Iterable[Atom], contexts: Mapping[Atom, list[Atom]], key_of: Named) -> Larger:
    """The larger groups among the symmetries of a forward pass.

    Args:
        traced: the forward pass.
        atoms: the symmetries that are to have names.
        contexts: what each of them is nested in; what others are nested in stays a permutation.
        key_of: the key of a parameter as the module has it that reads it; None where it cannot be named.
    """
    search = _Search(traced, key_of)
    outer = {context for atom in atoms for context in contexts[atom]}
    open_ = [a for a in atoms if a.pin is None and a not in outer and a not in search.sides.bent]
    normed = {norm.atom for norm in search.reading.norms.found}
    for atom in open_:
        if atom in normed and not contexts[atom]:
            search.stream(atom)
    for row, there in search.reading.rows:  # from here on a table is one tensor, whatever is done with it
        search.sides.link(row, there)
    for atom in open_:
        if atom not in normed | search.reading.norms.squared:
            search.invertible(atom)
    return search.found


class _Search:
    """The operations, read, and what was found in them so far."""

    def __init__(self, traced: Traced, key_of: Named):
        self.record, self.key_of = traced.record, key_of
        self.keys = {key_of(i, "") for i in traced.names}
        self.reading, self.found = Reading(), Larger()
        for step in traced.record.steps:
            self.reading.read(step)
        self.sides = self.reading.sides
        # for every atom its places in parameters
        self.parameters: dict[Atom, dict[Place, int]] = {}
        self.axes = {i: tuple(traced.parameters[name]) for i, name in traced.names.items()}
        for i, axes in self.axes.items():
            for atom, place in self.sides.whole(Seen(i, tuple(1 for _ in axes), axes)):
                self.parameters.setdefault(atom, {})[place] = i

    def invertible(self, atom: Atom) -> None:
        """All places are linked, on two sides: the unmarked one is that of the first activation that is contracted."""
        roots = {self.sides.root(place)[0] for place in self.sides.places[atom]}
        contracted = self.reading.contracted.get(atom)
        if len(roots) > 1 or roots & self.sides.torn or not contracted:
            return
        first, second = contracted[0].places
        weight, other = contracted[0].parameters
        _, unmarked = self.sides.root(second if weight is not None and other is None else first)
        self.found.kinds[atom] = "invertible"
        for place in self.parameters[atom]:
            self.found.marks[place] = "" if self.sides.root(place)[1] == unmarked else READER

    def stream(self, atom: Atom) -> None:
        """What is written is added up and read by norms alone; what these give is read by weights alone."""
        norms = [norm for norm in self.reading.norms.found if norm.atom is atom]
        kinds = {norm.kind for norm in norms}
        readers = self._readers(atom, norms)
        marks = self._stream_marks(atom, norms)
        squared = CENTRED in kinds and atom in self.reading.norms.squared
        if readers is None or marks is None or len(kinds) > 1 or squared:
            return
        self.found.kinds[atom] = kinds.pop()
        self.found.marks |= marks
        self.found.norms |= readers

    def _stream_marks(self, atom: Atom, norms: list[Normed]) -> dict[Place, str] | None:
        """The marks of a stream's parameters; None where one of them is neither of the stream nor a reader of a norm,
        or where stream, what a norm gives, gains and biases are not apart."""
        roots = {place: self.sides.root(place)[0] for place in self.sides.places[atom]}
        streams = {roots[norm.before] for norm in norms}
        normed = {roots[norm.after]: norm for norm in norms}
        own = {roots[place]: i for norm in norms for place, i in zip(norm.affine, norm.parameters, strict=True)}
        apart = {*streams, *normed, *own}
        if len(apart) < len(streams) + len(normed) + len(own) or self.sides.torn & set(roots.values()):
            return None
        if any(normed[roots[norm.after]].parameters != norm.parameters for norm in norms):
            return None  # what reads two norms has no gauge
        if any(roots[there] not in streams for row, there in self.reading.rows if there in roots):
            return None
        marks = {norm.affine[0]: DIAGONAL for norm in norms}
        for place, parameter in self.parameters[atom].items():
            root, looked_up = roots[place], parameter in self.record.looked_up
            if root in normed:
                if self.sides.root(place)[1] == self.sides.root(normed[root].after)[1]:
                    return None  # it writes to what a norm gives
                marks[place] = "" if looked_up else READER  # a tied table is marked as what it writes
            elif root in own:
                if own[root] != parameter:
                    return None
            elif root not in streams and not looked_up:
                return None
            marks.setdefault(place, "")
        return marks

    def _readers(self, atom: Atom, norms: list[Normed]) -> dict[str, list[str]] | None:
        """For every norm the weights that read it; None where something else does, or one of them has no name."""
        names = {self.sides.root(norm.after)[0]: self._name(norm) for norm in norms}
        readers: dict[str, list[str]] = {name: [] for name in names.values() if name is not None}
        for one in self.reading.contracted.get(atom, ()):
            name = names.get(self.sides.root(one.places[0])[0])
            weights = [i for i in one.parameters if i is not None]
            key = self.key_of(weights[0], one.where) if len(weights) == 1 else None
            if name is None or key is None or not key.endswith(".weight"):
                return None
            if [flat(axis) for axis in self.axes[weights[0]]].count([atom]) != 1:
                return None  # a part of a flattened axis: no gain is folded into that
            if one.scaled and weights[0] in self.record.looked_up:
                return None  # a scale that goes with the tie (T5) would be lost where the two are told apart
            if key.removesuffix(".weight") not in readers[name]:
                readers[name].append(key.removesuffix(".weight"))
        every = list(itertools.chain.from_iterable(readers.values()))
        whole = None not in names.values() and all(readers.values()) and len(set(every)) == len(every)
        return readers if whole else None

    def _name(self, norm: Normed) -> str | None:
        """`ln` for `ln.weight` and `ln.bias`."""
        keys = [self.key_of(i, "") for i in norm.parameters]
        name = (keys[0] or "").removesuffix(".weight")
        bias = [f"{name}.bias"] if f"{name}.bias" in self.keys else []
        return name if keys == [f"{name}.weight", *bias] else None
