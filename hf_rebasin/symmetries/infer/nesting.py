"""Which symmetries are nested: where an inner axis may move differently for every index of an outer one.

Unification gives every atom one group element. An atom may have one for every index of another atom (units of a head,
for every head) if no operation uses it without that outer atom, neither on a parameter nor on an activation, and all
tensors of an operation that share the inner index share the outer one, too. That is read off the relations after the
last unification, when the atoms are known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from .record import Operand
from .unification import Atom, Axis, flat_atoms, leaf_atoms, summands

IndexPlace = tuple[Any, ...]  # index of an operation, position among the atoms there, and the chosen parts of sums
# One block of an operand: the part chosen of each of its sums, and its (atom, place, axis of the operand) triples.
OperandBlock = tuple[dict[IndexPlace, int], list[tuple[Atom, IndexPlace, int]]]
MAX_BLOCK_PAIRS = 4096  # of two operands; beyond that nothing in them is taken to be nested


def find_nesting(relations: Iterable[tuple[Operand, ...]], parameters: Iterable[list[Axis]]) -> dict[Atom, list[Atom]]:
    """For every atom of the parameters, find the atoms it is nested in: outermost first, each nested in those before.

    Args:
        relations: the operands of every operation.
        parameters: the axes of every parameter, in order of first use.
    """
    parameters = list(parameters)
    rank: dict[Atom, int] = {}
    for axes in parameters:
        for axis in axes:
            for atom in leaf_atoms(axis):
                rank.setdefault(atom, len(rank))
    contexts: dict[Atom, set[Atom]] = {}
    single_parameters = [(tuple(((d, axis),) for d, axis in enumerate(axes)),) for axes in parameters]
    done = set()
    for operands in itertools.chain(single_parameters, relations):
        blocks_of_operands = [list(_blocks(operand)) for operand in operands]
        key = tuple(tuple((tuple(c.items()), tuple(a)) for c, a in blocks) for blocks in blocks_of_operands)
        if key not in done:
            done.add(key)
            _narrow(contexts, rank, blocks_of_operands)
    chains: dict[Atom, list[Atom]] = {}
    for atom in rank:  # of two atoms that always occur together, the first is the outer one
        outer = sorted(
            (a for a in contexts[atom] if rank[a] < rank[atom] or atom not in contexts[a]), key=rank.__getitem__
        )
        chain: list[Atom] = []
        for a in sorted(outer, key=lambda a: (len(contexts[a] & set(outer)), rank[a])):
            if all(c in contexts[a] for c in chain):
                chain.append(a)
        chains[atom] = chain
    return chains


def _blocks(operand: Operand) -> Iterator[OperandBlock]:
    """Iterate over the blocks of an operand, one for every choice of a part of every sum."""
    counts: dict[Any, int] = {}
    pieces: list[list[OperandBlock]] = []
    for d, axis in enumerate(operand):
        for label, atoms in axis:
            for atom in flat_atoms(atoms):
                place = (label, counts.setdefault(label, 0))
                counts[label] += 1
                pieces.append(list(_choices(atom, place, d)))
    for combination in itertools.product(*pieces):
        choice: dict[IndexPlace, int] = {}
        for chosen, _ in combination:
            choice |= chosen
        yield choice, [entry for _, atoms in combination for entry in atoms]


def _choices(atom: Atom, place: IndexPlace, axis: int) -> Iterator[OperandBlock]:
    """Iterate over the blocks of one atom: itself or, for a sum, those of each part."""
    parts = summands(atom)
    if not parts:
        yield {}, [(atom, place, axis)]
    for k, part in enumerate(parts):
        inside = [list(_choices(a, (*place, k, i), axis)) for i, a in enumerate(flat_atoms(part))]
        for combination in itertools.product(*inside):
            choice = {place: k}
            for chosen, _ in combination:
                choice |= chosen
            yield choice, [entry for _, atoms in combination for entry in atoms]


def _narrow(contexts: dict[Atom, set[Atom]], rank: dict[Atom, int], operands: list[list[OperandBlock]]) -> None:
    """Remove the contexts that one operation rules out."""
    located = []  # per operand and block: the choice, and the places of the possible contexts of every (atom, place)
    for blocks in operands:
        located.append([(choice, _contexts_in(atoms, rank)) for choice, atoms in blocks])
    for _, possible in itertools.chain.from_iterable(located):
        for (atom, _), places in possible.items():
            contexts[atom] = contexts[atom] & places.keys() if atom in contexts else set(places)
    for first, second in itertools.combinations(located, 2):
        if len(first) * len(second) > MAX_BLOCK_PAIRS:
            for _, possible in (*first, *second):
                contexts.update({atom: set() for atom, _ in possible})
            continue
        for (choice, possible), (other_choice, other_possible) in itertools.product(first, second):
            if any(other_choice.get(place, part) != part for place, part in choice.items()):
                continue
            for key, places in possible.items():
                if key in other_possible:
                    other_places = other_possible[key]
                    contexts[key[0]] &= {a for a, place in places.items() if other_places.get(a) == place}


def _contexts_in(
    atoms: list[tuple[Atom, IndexPlace, int]], rank: dict[Atom, int]
) -> dict[tuple[Atom, IndexPlace], dict[Atom, IndexPlace]]:
    """For every atom in a block, find the place of each other atom in which it could be nested.

    A place on the same axis comes first; an atom with several places on other axes has none.
    """
    atoms = [entry for entry in atoms if entry[0] in rank]
    contexts = {}
    for atom, place, axis in atoms:
        places: dict[Atom, IndexPlace] = {}
        for other in {a for a, _, _ in atoms if a is not atom and not a.numbers}:
            on_axis = [p for a, p, d in atoms if a is other and d == axis]
            anywhere = [p for a, p, _ in atoms if a is other]
            if on_axis or len(anywhere) == 1:
                places[other] = (on_axis or anywhere)[0]
        contexts[atom, place] = places
    return contexts
