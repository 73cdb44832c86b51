"""Which symmetries are nested: where an inner axis may move differently for every place of an outer one.

Unification gives every atom one element. It may have one for every place of another atom, as the units of a head for
every head, where no operation ever sees it without that other one, on an activation any less than on a parameter, and
all tensors of an operation that share the inner index share the outer one too. That is read off the relations after
the last unification, when it is known which atoms there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from .record import Operand
from .unification import Atom, Axis, flat, leaves, parts_of

# One block of an operand: the parts chosen of its sums, and (atom, place among the operation's indices, axis).
Place = tuple[Any, ...]
Block = tuple[dict[Place, int], list[tuple[Atom, Place, int]]]
LIMIT = 4096  # pairs of blocks of one relation, beyond which nothing in it is taken to be nested


def nested(relations: Iterable[tuple[Operand, ...]], parameters: Iterable[list[Axis]]) -> dict[Atom, list[Atom]]:
    """`{atom: the atoms it may hang on}` for the atoms of the parameters, outermost first, each nested in those
    before it."""
    parameters = list(parameters)
    rank: dict[Atom, int] = {}
    for axes in parameters:
        for axis in axes:
            for atom in leaves(axis):
                rank.setdefault(atom, len(rank))
    contexts: dict[Atom, set[Atom]] = {}
    alone = [(tuple(((d, axis),) for d, axis in enumerate(axes)),) for axes in parameters]
    seen = set()
    for operands in itertools.chain(alone, relations):
        cut = [list(_blocks(operand)) for operand in operands]
        said = tuple(tuple((tuple(c.items()), tuple(a)) for c, a in blocks) for blocks in cut)
        if said not in seen:
            seen.add(said)
            _narrow(contexts, rank, cut)
    chains: dict[Atom, list[Atom]] = {}
    for atom in rank:  # of two that are always together, the one that comes first is the outer one
        outer = sorted(
            (a for a in contexts[atom] if rank[a] < rank[atom] or atom not in contexts[a]), key=rank.__getitem__
        )
        chain: list[Atom] = []
        for a in sorted(outer, key=lambda a: (len(contexts[a] & set(outer)), rank[a])):
            if all(c in contexts[a] for c in chain):
                chain.append(a)
        chains[atom] = chain
    return chains


def _blocks(operand: Operand) -> Iterator[Block]:
    """One for every choice of a part of every sum."""
    counts: dict[Any, int] = {}
    pieces: list[list[Block]] = []
    for d, axis in enumerate(operand):
        for label, atoms in axis:
            for atom in flat(atoms):
                place = (label, counts.setdefault(label, 0))
                counts[label] += 1
                pieces.append(list(_choices(atom, place, d)))
    for combination in itertools.product(*pieces):
        choice: dict[Place, int] = {}
        for chosen, _ in combination:
            choice |= chosen
        yield choice, [one for _, atoms in combination for one in atoms]


def _choices(atom: Atom, place: Place, axis: int) -> Iterator[Block]:
    parts = parts_of(atom)
    if not parts:
        yield {}, [(atom, place, axis)]
    for k, part in enumerate(parts):
        inside = [list(_choices(a, (*place, k, i), axis)) for i, a in enumerate(flat(part))]
        for combination in itertools.product(*inside):
            choice = {place: k}
            for chosen, _ in combination:
                choice |= chosen
            yield choice, [one for _, atoms in combination for one in atoms]


def _narrow(contexts: dict[Atom, set[Atom]], rank: dict[Atom, int], operands: list[list[Block]]) -> None:
    """What one operation leaves of the contexts."""
    placed = []  # per operand and block: the choice, and for every (atom, place) where its possible contexts are
    for blocks in operands:
        placed.append([(choice, _contexts_in(atoms, rank)) for choice, atoms in blocks])
    for _, where in itertools.chain.from_iterable(placed):
        for (atom, _), there in where.items():
            contexts[atom] = contexts[atom] & there.keys() if atom in contexts else set(there)
    for one, other in itertools.combinations(placed, 2):
        if len(one) * len(other) > LIMIT:
            for _, where in (*one, *other):
                contexts.update({atom: set() for atom, _ in where})
            continue
        for (choice, where), (second, elsewhere) in itertools.product(one, other):
            if any(second.get(place, part) != part for place, part in choice.items()):
                continue
            for key, there in where.items():
                if key in elsewhere:
                    same = elsewhere[key]
                    contexts[key[0]] &= {a for a, place in there.items() if same.get(a) == place}


def _contexts_in(
    atoms: list[tuple[Atom, Place, int]], rank: dict[Atom, int]
) -> dict[tuple[Atom, Place], dict[Atom, Place]]:
    """For every atom in a block: the place of each other atom that it could hang on. On its own axis before any
    other; two equally good places are none."""
    atoms = [one for one in atoms if one[0] in rank]
    found = {}
    for atom, place, axis in atoms:
        there: dict[Atom, Place] = {}
        for other in {a for a, _, _ in atoms if a is not atom and not a.numbers}:
            own = [p for a, p, d in atoms if a is other and d == axis]
            all_ = [p for a, p, _ in atoms if a is other]
            if own or len(all_) == 1:
                there[other] = (own or all_)[0]
        found[atom, place] = there
    return found
