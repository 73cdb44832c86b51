"""The table of a model nobody described, from its own forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..patterns import DIAGONAL, READER, Leaf, Node, Product, Sum, show
from ..table import Table
from .larger_groups import Named, larger
from .naming import Origin, names_for
from .nesting import nested
from .tracing import Blocks, Traced, trace, wanted_blocks
from .unification import Atom, Axis, flat, leaves, parts_of, size_of

HELD = ("vocab", "label")  # rows that are matched by string; no symmetry is called so


@dataclass(frozen=True)
class Inferred:
    """What a forward pass says.

    Args:
        table: rows for every tensor of the module, by the keys that were asked for.
        pins: `{key: for each axis why it is held, or None}`, for what is held.
        activations: `{module: pattern of its output}`, for outputs that carry a symmetry.
        unused: keys of floating-point tensors with axes that the forward pass did not look at.
    """

    table: Table
    pins: Mapping[str, tuple[str | None, ...]]
    activations: Mapping[str, str]
    unused: tuple[str, ...]


def infer(module: nn.Module, inputs: Any, keys: Mapping[str, str], ties: Mapping[str, str] | None = None) -> Inferred:
    """Infer which axes of which tensors may move, and how.

    Args:
        module: any module; it is neither changed nor are its weights read.
        inputs: of its forward pass: a tensor, positional arguments or keyword arguments.
        keys: `{module key: key in the table}`, for the tensors that are stored.
        ties: `{key that is not stored: the key whose tensor it shares}`, both as the table has them.

    Raises:
        SpecError: the forward pass cannot be run without weights.
    """
    blocks: Blocks = {}
    while True:
        traced = trace(module, inputs, set(keys), blocks)
        more = wanted_blocks(traced, blocks)
        if not more:
            break
        blocks |= more
    contexts = nested(traced.record.relations, traced.parameters.values())
    parameters = {key: traced.parameters[name] for name, key in keys.items()}
    used: dict[Atom, None] = {}
    for axes in parameters.values():
        for axis in axes:
            for atom in leaves(axis):
                if atom.pin is None:
                    used.update(dict.fromkeys([*contexts[atom], atom]))
    names = dict(zip(used, names_for(_origins(list(used), traced, keys, contexts), HELD), strict=True))
    outer = {context for atom in names for context in contexts[atom]}
    beyond = larger(traced, names, contexts, _named(traced, keys, ties or {}))
    marks = _marks(traced, keys)
    ids = {name: i for i, name in traced.names.items()}

    def marked(name: str, key: str, d: int, axis: Axis) -> Iterator[str]:
        """The marks of the named leaves of an axis, in order."""
        for n, atom in enumerate(leaves(axis)):
            if atom in beyond.kinds:
                yield beyond.marks[ids[name], None, d, n]
            elif atom in names:
                yield "" if atom in outer else marks.get((key, d), "")

    rows = {
        key: show(tuple(_node(axis, names, marked(name, key, d, axis)) for d, axis in enumerate(parameters[key])))
        for name, key in keys.items()
    }
    groups = {}
    for atom, name in names.items():
        inside = [names[context] for context in contexts[atom] if context in names]
        kind = beyond.kinds.get(atom, "permutation") if atom.pin is None else "held"
        groups[name] = f"{kind} in {' '.join(inside)}" if inside else kind
    sizes = {name: atom.size for atom, name in names.items()}
    return Inferred(
        Table(rows, groups, sizes, beyond.norms),
        {key: reasons for key, axes in parameters.items() if any(reasons := tuple(map(_reason, axes)))},
        dict(_activations(traced, names)),
        tuple(key for name, key in keys.items() if name in traced.unused),
    )


def _reason(axis: Axis) -> str | None:
    reason = next((atom.pin for atom in leaves(axis) if atom.pin is not None), None)
    return reason or (None if not axis or any(leaves(axis)) else "its places are taken one by one")


def _activations(traced: Traced, names: Mapping[Atom, str]) -> Iterator[tuple[str, str]]:
    for module, axes in traced.outputs.items():
        if any(atom in names and atom.pin is None for axis in axes for atom in leaves(axis)):
            yield module, show(tuple(_node(axis, names, itertools.repeat("")) for axis in axes))


def _node(axis: Axis, names: Mapping[Atom, str], marks: Iterator[str]) -> Node:
    """An axis as a pattern; held neighbours are one number, a wholly held axis is `_`."""
    if not any(atom in names for atom in leaves(axis)):
        return Leaf(None)
    items: list[Node] = []
    for atom in flat(axis):
        if atom in names:
            items.append(Leaf(names[atom], next(marks)))
        elif atom.parts is not None and any(leaf in names for leaf in leaves((atom,))):
            items.append(_sum([_part(part, names, marks) for part in parts_of(atom)]))
        elif items and isinstance(items[-1], Leaf) and items[-1].size is not None:
            items[-1] = Leaf(None, size=items[-1].size * atom.size)
        else:
            items.append(Leaf(None, size=atom.size))
    return items[0] if len(items) == 1 else Product(tuple(items))


def _part(part: Axis, names: Mapping[Atom, str], marks: Iterator[str]) -> Node:
    node = _node(part, names, marks)
    return Leaf(None, size=size_of(part)) if node == Leaf(None) else node


def _sum(terms: list[Node]) -> Sum:
    """Terms end to end; held neighbours are one."""
    merged: list[Node] = []
    for term in terms:
        last = merged[-1] if merged else None
        if isinstance(last, Leaf) and isinstance(term, Leaf) and last.size is not None and term.size is not None:
            merged[-1] = Leaf(None, size=last.size + term.size)
        else:
            merged.append(term)
    return Sum(tuple(merged))


def _named(traced: Traced, keys: Mapping[str, str], ties: Mapping[str, str]) -> Named:
    """A tensor that is looked up has another name where it is read: that of the tie whose module reads it."""

    def key_of(parameter: int, where: str) -> str | None:
        key = keys[traced.names[parameter]]
        if parameter not in traced.record.looked_up:
            return key
        said = f".{where}.weight"
        mine = [target for target, kept in ties.items() if kept == key and said.endswith(f".{target}")]
        return mine[0] if len(mine) == 1 else None

    return key_of


def _marks(traced: Traced, keys: Mapping[str, str]) -> dict[tuple[str, int], str]:
    """Which axes of which tensors are read by the map they are the weight of, and which tensors only scale."""
    marks: dict[tuple[str, int], str] = {}
    for parameter, axis in traced.record.readers:
        key, axes = keys.get(traced.names[parameter]), traced.record.axes[parameter]
        same = [d for d, one in enumerate(axes) if one is axis] or [
            d for d, one in enumerate(axes) if flat(one) == flat(axis)
        ]
        if key is not None and same and parameter not in traced.record.looked_up:
            marks[key, same[-1]] = READER
    for parameter in traced.record.gains:
        key, axes = keys.get(traced.names[parameter]), traced.record.axes[parameter]
        if key is not None:
            marks |= {(key, d): DIAGONAL for d in range(len(axes))}
    return marks


def _origins(
    atoms: list[Atom], traced: Traced, keys: Mapping[str, str], contexts: Mapping[Atom, list[Atom]]
) -> list[Origin]:
    roles: dict[Atom, dict[str, None]] = {}
    for part, axis in traced.record.roles:
        for atom in leaves(axis):
            roles.setdefault(atom, {})[part] = None
    outer = {context for atom in atoms for context in contexts[atom]}
    read = {(traced.names[parameter], tuple(map(id, flat(axis)))) for parameter, axis in traced.record.readers}
    written: dict[Atom, list[str]] = {atom: [] for atom in atoms}
    seen: dict[Atom, str] = {}
    for name, axes in traced.parameters.items():
        for axis in axes if name in keys else ():
            reads = (name, tuple(map(id, flat(axis)))) in read
            for atom in leaves(axis):
                seen.setdefault(atom, keys[name])
                if atom in written and not reads and len(axes) > 1:
                    written[atom].append(keys[name])
    origins = []
    for atom in atoms:
        mine = roles.get(atom, {})
        role: str | None = next((r for r in ("head", "qk", "ov") if r in mine), None)
        if role is None and "residual" in mine and len({key.rpartition(".")[0] for key in written[atom]}) > 1:
            role = "residual"
        if (atom in outer and role != "head") or (role == "head" and contexts[atom]):
            role = "group"
        origins.append(Origin(role, written[atom] or [seen[atom]]))
    return origins
