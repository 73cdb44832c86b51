"""Which symmetries are larger than permutations.

*Invertible*: an axis along which everything is linear, so that whatever one side writes through a matrix, the other
reads through its inverse. *Orthogonal* and *centred*: a stream that is only added to, and read only through norms, so
that it can be rotated once the gains of the norms are folded into their readers. Everything else, and every case in
doubt, stays a permutation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..patterns import DIAGONAL, READER
from .linearity import LinearityAnalysis
from .norms import CENTRED, AxisNorm
from .record import Snapshot
from .sides import AtomPlace
from .tracing import Trace
from .unification import Atom, flat_atoms

# The table key of a parameter (by id), as the given module calls it that reads it.
KeyResolver = Callable[[int, str], str | None]


@dataclass
class LargerGroups:
    """Atoms with the kinds of their groups, the marks of their places in parameters, and the readers of each norm."""

    kinds: dict[Atom, str] = field(default_factory=dict)
    marks: dict[AtomPlace, str] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)


def find_larger_groups(
    trace: Trace, atoms: Iterable[Atom], contexts: Mapping[Atom, list[Atom]], key_of: KeyResolver
) -> LargerGroups:
    """Find the symmetries of a forward pass whose groups are larger than permutations.

    Args:
        trace: the forward pass.
        atoms: the symmetries that get names.
        contexts: the atoms each of them is nested in; these stay permutations.
        key_of: resolves a parameter and the module that reads it to a key; None where there is no unique key.
    """
    search = _Search(trace, key_of)
    outer = {context for atom in atoms for context in contexts[atom]}
    candidates = [a for a in atoms if a.pin is None and a not in outer and a not in search.sides.bent]
    normed = {norm.atom for norm in search.analysis.norms.recognised}
    for atom in candidates:
        if atom in normed and not contexts[atom]:
            search.try_stream(atom)
    for in_table, in_rows in search.analysis.looked_up_rows:  # from here on all uses of a table are linked
        search.sides.link(in_table, in_rows)
    for atom in candidates:
        if atom not in normed | search.analysis.norms.squared_atoms:
            search.try_invertible(atom)
    return search.result


class _Search:
    """A search for larger groups in the operations of a forward pass."""

    def __init__(self, trace: Trace, key_of: KeyResolver):
        self.record, self.key_of = trace.record, key_of
        self.keys = {key_of(i, "") for i in trace.names}
        self.analysis, self.result = LinearityAnalysis(), LargerGroups()
        for step in trace.record.steps:
            self.analysis.read(step)
        self.sides = self.analysis.sides
        self.parameters: dict[Atom, dict[AtomPlace, int]] = {}  # {atom: {place in a parameter: id of the parameter}}
        self.axes = {i: tuple(trace.parameters[name]) for i, name in trace.names.items()}
        for i, axes in self.axes.items():
            for atom, place in self.sides.all_places(Snapshot(tensor=i, shape=tuple(1 for _ in axes), axes=axes)):
                self.parameters.setdefault(atom, {})[place] = i

    def try_invertible(self, atom: Atom) -> None:
        """Make an atom invertible if all its places are linked.

        The first contracted activation's side has no mark.
        """
        roots = {self.sides.root(place)[0] for place in self.sides.places[atom]}
        contractions = self.analysis.contractions.get(atom)
        if len(roots) > 1 or roots & self.sides.inconsistent or not contractions:
            return
        first, second = contractions[0].places
        first_parameter, second_parameter = contractions[0].parameters
        is_weight_first = first_parameter is not None and second_parameter is None
        _, unmarked = self.sides.root(second if is_weight_first else first)
        self.result.kinds[atom] = "invertible"
        for place in self.parameters[atom]:
            self.result.marks[place] = "" if self.sides.root(place)[1] == unmarked else READER

    def try_stream(self, atom: Atom) -> None:
        """Make an atom a rotating stream if only norms of one kind read it, and only weights read their outputs."""
        norms = [norm for norm in self.analysis.norms.recognised if norm.atom is atom]
        kinds = {norm.kind for norm in norms}
        readers = self._norm_readers(atom, norms)
        marks = self._stream_marks(atom, norms)
        squared = CENTRED in kinds and atom in self.analysis.norms.squared_atoms
        if readers is None or marks is None or len(kinds) > 1 or squared:
            return
        self.result.kinds[atom] = kinds.pop()
        self.result.marks |= marks
        self.result.norms |= readers

    def _stream_marks(self, atom: Atom, norms: list[AxisNorm]) -> dict[AtomPlace, str] | None:
        """The marks of the parameters of a stream, or None where it cannot rotate.

        It cannot where a parameter belongs neither to the stream nor to a reader of a norm, or where the stream, the
        outputs of norms, gains and biases are linked to each other.
        """
        roots = {place: self.sides.root(place)[0] for place in self.sides.places[atom]}
        streams = {roots[norm.before] for norm in norms}
        normed = {roots[norm.after]: norm for norm in norms}
        affine = {roots[place]: i for norm in norms for place, i in zip(norm.affine, norm.parameters, strict=True)}
        distinct = {*streams, *normed, *affine}
        if len(distinct) < len(streams) + len(normed) + len(affine) or self.sides.inconsistent & set(roots.values()):
            return None
        if any(normed[roots[norm.after]].parameters != norm.parameters for norm in norms):
            return None  # a weight that reads two norms has no gauge
        if any(roots[in_rows] not in streams for _, in_rows in self.analysis.looked_up_rows if in_rows in roots):
            return None
        marks = {norm.affine[0]: DIAGONAL for norm in norms}
        for place, parameter in self.parameters[atom].items():
            root, looked_up = roots[place], parameter in self.record.looked_up
            if root in normed:
                if self.sides.root(place)[1] == self.sides.root(normed[root].after)[1]:
                    return None  # it writes to the output of a norm
                marks[place] = "" if looked_up else READER  # a tied table has the mark of a writer
            elif root in affine:
                if affine[root] != parameter:
                    return None
            elif root not in streams and not looked_up:
                return None
            marks.setdefault(place, "")
        return marks

    def _norm_readers(self, atom: Atom, norms: list[AxisNorm]) -> dict[str, list[str]] | None:
        """The weights that read each norm; None where something else reads one, or one of them has no name."""
        names = {self.sides.root(norm.after)[0]: self._norm_name(norm) for norm in norms}
        readers: dict[str, list[str]] = {name: [] for name in names.values() if name is not None}
        for contraction in self.analysis.contractions.get(atom, ()):
            name = names.get(self.sides.root(contraction.places[0])[0])
            weights = [i for i in contraction.parameters if i is not None]
            key = self.key_of(weights[0], contraction.where) if len(weights) == 1 else None
            if name is None or key is None or not key.endswith(".weight"):
                return None
            if [flat_atoms(axis) for axis in self.axes[weights[0]]].count([atom]) != 1:
                return None  # no gain can be folded into a part of a flattened axis
            if contraction.scaled and weights[0] in self.record.looked_up:
                return None  # transformers would drop a scale that depends on the tie (as in T5) with the tie
            if key.removesuffix(".weight") not in readers[name]:
                readers[name].append(key.removesuffix(".weight"))
        every = list(itertools.chain.from_iterable(readers.values()))
        complete = None not in names.values() and all(readers.values()) and len(set(every)) == len(every)
        return readers if complete else None

    def _norm_name(self, norm: AxisNorm) -> str | None:
        """The name of a norm: `ln` for one with `ln.weight` and `ln.bias`; None where its parameters do not fit."""
        keys = [self.key_of(i, "") for i in norm.parameters]
        name = (keys[0] or "").removesuffix(".weight")
        bias = [f"{name}.bias"] if f"{name}.bias" in self.keys else []
        return name if keys == [f"{name}.weight", *bias] else None
