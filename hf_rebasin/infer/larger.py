"""Which symmetries are larger than permutations.

*Invertible*: an axis along which everything is linear, so that whatever one side writes through a matrix, the other
reads through its inverse. *Orthogonal* and *centred*: a stream that is only added to and read through norms, so that
it can be turned once their gains are folded into what reads them. Everything else, and whatever is in doubt, stays a
permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..axes import DIAGONAL, READER
from .linear import CENTRED, Contracted, Normed, Reading
from .record import Seen
from .sides import Place
from .tracing import Traced
from .unification import Atom

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
        key_of: the key of a parameter as the module has it that it is read in; None where it cannot be named.
    """
    reading = Reading()
    for step in traced.record.steps:
        reading.read(step)
    parameters = _parameters(traced, reading)
    outer = {context for atom in atoms for context in contexts[atom]}
    found = Larger()
    open_ = [a for a in atoms if a.pin is None and a not in outer and a not in reading.sides.bent]
    for atom in open_:
        norms = [norm for norm in reading.norms if norm.atom is atom]
        if norms and not contexts[atom]:
            _stream(found, atom, norms, reading, parameters[atom], traced, key_of)
    for row, there in reading.rows:  # from here on a table is one tensor, whatever is done with it
        reading.sides.link(row, there)
    normed = {norm.atom for norm in reading.norms} | reading.squared
    for atom in open_:
        if atom not in normed:
            _invertible(found, atom, reading, parameters[atom])
    return found


def _parameters(traced: Traced, reading: Reading) -> dict[Atom, dict[Place, int]]:
    """For every atom its places in parameters, in the order in which those were first used."""
    found: dict[Atom, dict[Place, int]] = {}
    ids = {name: i for i, name in traced.names.items()}
    for name, axes in traced.parameters.items():
        if name in ids:
            seen = Seen(ids[name], tuple(1 for _ in axes), tuple(axes))
            for atom, place in reading.sides.whole(seen):
                found.setdefault(atom, {})[place] = ids[name]
    return found


def _invertible(found: Larger, atom: Atom, reading: Reading, parameters: Mapping[Place, int]) -> None:
    """All places are linked, on two sides: the unmarked one is that of the first activation that is contracted."""
    sides = reading.sides
    roots = {sides.root(place)[0] for place in sides.places[atom]}
    contracted = reading.contracted.get(atom)
    if len(roots) > 1 or roots & sides.torn or not contracted:
        return
    _, unmarked = sides.root(_written(contracted[0]))
    found.kinds[atom] = "invertible"
    found.marks |= {place: "" if sides.root(place)[1] is unmarked else READER for place in parameters}


def _written(contracted: Contracted) -> Place:
    first, second = contracted.places
    return second if contracted.parameters[0] is not None and contracted.parameters[1] is None else first


def _stream(
    found: Larger,
    atom: Atom,
    norms: list[Normed],
    reading: Reading,
    parameters: Mapping[Place, int],
    traced: Traced,
    key_of: Named,
) -> None:
    """What is written is added up and read by norms alone; what these give is read by weights alone, each of one."""
    sides = reading.sides
    roots = {place: sides.root(place)[0] for place in sides.places[atom]}
    streams = {roots[norm.before] for norm in norms}
    normed = {roots[norm.after]: norm for norm in norms}
    own = {roots[place]: {i} for norm in norms for place, i in zip(norm.affine, norm.parameters, strict=True)}
    marks: dict[Place, str] = {}
    for place, parameter in parameters.items():
        root = roots[place]
        if root in own:
            own[root].add(parameter)
        elif root in normed:
            if sides.root(place)[1] == sides.root(normed[root].after)[1]:
                return  # it writes to what a norm gives
            marks[place] = READER
        elif root not in streams and parameter not in traced.record.looked_up:
            return
    apart = [*streams, *normed, *own]
    if len(set(apart)) < len(streams) + len(normed) + len(own) or any(len(ids) > 1 for ids in own.values()):
        return
    if any(roots[norm.after] in normed and normed[roots[norm.after]].parameters != norm.parameters for norm in norms):
        return  # what reads two norms has no gauge
    kinds = {norm.kind for norm in norms}
    if len(kinds) > 1 or (CENTRED in kinds and atom in reading.squared) or sides.torn & set(roots.values()):
        return
    readers: dict[str, list[str]] = {}
    for norm in norms:
        name = _norm_key(norm, traced, key_of)
        if name is None:
            return
        readers[name] = []
        marks |= dict(zip(norm.affine, (DIAGONAL, ""), strict=False))
    for one in reading.contracted.get(atom, ()):
        root = roots[one.places[0]]
        weight = [i for i in one.parameters if i is not None]
        if root not in normed or len(weight) != 1:
            return
        key, name = key_of(weight[0], one.where), _norm_key(normed[root], traced, key_of)
        if key is None or not key.endswith(".weight") or name is None:
            return
        if key.removesuffix(".weight") not in readers[name]:
            readers[name].append(key.removesuffix(".weight"))
    every = [reader for said in readers.values() for reader in said]
    if len(set(every)) < len(every) or not all(readers.values()):
        return
    found.kinds[atom] = kinds.pop()
    tied = {place for place, i in parameters.items() if i in traced.record.looked_up}
    found.marks |= {place: "" if place in tied else marks.get(place, "") for place in parameters}
    found.norms |= readers


def _norm_key(norm: Normed, traced: Traced, key_of: Named) -> str | None:
    """`ln` for `ln.weight` and `ln.bias`."""
    keys = [key_of(i, "") for i in norm.parameters]
    name = (keys[0] or "").removesuffix(".weight")
    return name if keys in ([f"{name}.weight"], [f"{name}.weight", f"{name}.bias"]) else None
