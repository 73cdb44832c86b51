"""Infer the table of a model that no spec file describes, from its own forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..patterns import DIAGONAL, READER, Leaf, Node, Product, Sum, format_pattern
from ..table import Table
from .larger_groups import KeyResolver, find_larger_groups
from .naming import Origin, choose_names
from .nesting import find_nesting
from .tracing import InitialBlocks, Trace, missing_blocks, trace_module
from .unification import Atom, Axis, axis_size, flat_atoms, leaf_atoms, summands

RESERVED_NAMES = ("vocab", "label")  # axes that are matched by string; no symmetry may have these names


@dataclass(frozen=True, kw_only=True)
class InferredTable:
    """A table inferred from a forward pass, and the reasons for it.

    Args:
        table: rows for every tensor of the module, by the given keys.
        pins: `{key: for each axis the reason why it is held, or None}`, for tensors with held axes.
        activations: `{module: pattern of its output}`, for outputs that carry a symmetry.
        unused: keys of floating-point tensors with axes that the forward pass did not use.
    """

    table: Table
    pins: Mapping[str, tuple[str | None, ...]]
    activations: Mapping[str, str]
    unused: tuple[str, ...]


def infer_table(
    module: nn.Module, inputs: Any, keys: Mapping[str, str], ties: Mapping[str, str] | None = None
) -> InferredTable:
    """Infer which axes of which tensors may move, and how.

    Args:
        module: any module; it is not changed, and its weights are not read.
        inputs: inputs of its forward pass: a tensor, positional arguments or keyword arguments.
        keys: `{module key: key in the table}`, for the tensors that are stored.
        ties: `{key that is not stored: key of the tensor it shares}`, both as in the table.

    Raises:
        SpecError: the forward pass cannot be run without weights.
    """
    blocks: InitialBlocks = {}
    while True:
        trace = trace_module(module, inputs, set(keys), blocks)
        missing = missing_blocks(trace, blocks)
        if not missing:
            break
        blocks |= missing
    contexts = find_nesting(trace.record.relations, trace.parameters.values())
    parameters = {key: trace.parameters[name] for name, key in keys.items()}
    used: dict[Atom, None] = {}
    for axes in parameters.values():
        for axis in axes:
            for atom in leaf_atoms(axis):
                if atom.pin is None:
                    used.update(dict.fromkeys([*contexts[atom], atom]))
    origins = _find_origins(list(used), trace, keys, contexts)
    names = dict(zip(used, choose_names(origins, RESERVED_NAMES), strict=True))
    outer = {context for atom in names for context in contexts[atom]}
    larger = find_larger_groups(trace, names, contexts, _key_resolver(trace, keys, ties or {}))
    marks = _find_marks(trace, keys)
    ids = {name: i for i, name in trace.names.items()}

    def marks_of(name: str, key: str, d: int, axis: Axis) -> Iterator[str]:
        """Iterate over the marks of the named leaves of an axis, in order."""
        for n, atom in enumerate(leaf_atoms(axis)):
            if atom in larger.kinds:
                yield larger.marks[ids[name], None, d, n]
            elif atom in names:
                yield "" if atom in outer else marks.get((key, d), "")

    rows = {}
    for name, key in keys.items():
        by_dim = enumerate(parameters[key])
        rows[key] = format_pattern(
            tuple(_axis_pattern(axis, names, marks_of(name, key, d, axis)) for d, axis in by_dim)
        )
    groups = {}
    for atom, name in names.items():
        inside = [names[context] for context in contexts[atom] if context in names]
        kind = larger.kinds.get(atom, "permutation") if atom.pin is None else "held"
        groups[name] = f"{kind} in {' '.join(inside)}" if inside else kind
    sizes = {name: atom.size for atom, name in names.items()}
    return InferredTable(
        table=Table(rows=rows, groups=groups, sizes=sizes, norms=larger.norms),
        pins={key: reasons for key, axes in parameters.items() if any(reasons := tuple(map(_pin_reason, axes)))},
        activations=dict(_activation_patterns(trace, names)),
        unused=tuple(key for name, key in keys.items() if name in trace.unused),
    )


def _pin_reason(axis: Axis) -> str | None:
    """The reason why an axis, or a part of it, is held; None for one that moves or has size one."""
    reason = next((atom.pin for atom in leaf_atoms(axis) if atom.pin is not None), None)
    return reason or (None if not axis or any(leaf_atoms(axis)) else "its indices are used one by one")


def _activation_patterns(trace: Trace, names: Mapping[Atom, str]) -> Iterator[tuple[str, str]]:
    """Iterate over (module, pattern of its output), where the output carries a symmetry."""
    for module, axes in trace.outputs.items():
        if any(atom in names and atom.pin is None for axis in axes for atom in leaf_atoms(axis)):
            yield module, format_pattern(tuple(_axis_pattern(axis, names, itertools.repeat("")) for axis in axes))


def _axis_pattern(axis: Axis, names: Mapping[Atom, str], marks: Iterator[str]) -> Node:
    """An axis as a pattern: adjacent held factors are one number, an axis that is held as a whole is `_`."""
    if not any(atom in names for atom in leaf_atoms(axis)):
        return Leaf(None)
    items: list[Node] = []
    for atom in flat_atoms(axis):
        if atom in names:
            items.append(Leaf(names[atom], next(marks)))
        elif atom.parts is not None and any(leaf in names for leaf in leaf_atoms((atom,))):
            items.append(_sum_pattern([_part_pattern(part, names, marks) for part in summands(atom)]))
        elif items and isinstance(items[-1], Leaf) and items[-1].size is not None:
            items[-1] = Leaf(None, size=items[-1].size * atom.size)
        else:
            items.append(Leaf(None, size=atom.size))
    return items[0] if len(items) == 1 else Product(tuple(items))


def _part_pattern(part: Axis, names: Mapping[Atom, str], marks: Iterator[str]) -> Node:
    """A term of a sum as a pattern, with its size if it is held."""
    node = _axis_pattern(part, names, marks)
    return Leaf(None, size=axis_size(part)) if node == Leaf(None) else node


def _sum_pattern(terms: list[Node]) -> Sum:
    """A sum as a pattern: adjacent held terms are merged."""
    merged: list[Node] = []
    for term in terms:
        last = merged[-1] if merged else None
        if isinstance(last, Leaf) and isinstance(term, Leaf) and last.size is not None and term.size is not None:
            merged[-1] = Leaf(None, size=last.size + term.size)
        else:
            merged.append(term)
    return Sum(tuple(merged))


def _key_resolver(trace: Trace, keys: Mapping[str, str], ties: Mapping[str, str]) -> KeyResolver:
    """Make the function that finds the key of a parameter for the module that reads it.

    A table whose rows are looked up may be read under another key, too: the tied one of the module that reads it.
    """

    def key_of(parameter: int, where: str) -> str | None:
        key = keys[trace.names[parameter]]
        if parameter not in trace.record.looked_up:
            return key
        read_as = f".{where}.weight"
        targets = [target for target, source in ties.items() if source == key and read_as.endswith(f".{target}")]
        return targets[0] if len(targets) == 1 else None

    return key_of


def _find_marks(trace: Trace, keys: Mapping[str, str]) -> dict[tuple[str, int], str]:
    """Find the marks of (key, axis): READER where a linear map reads the axis of its weight, DIAGONAL for gains."""
    marks: dict[tuple[str, int], str] = {}
    for parameter, axis in trace.record.readers:
        key, axes = keys.get(trace.names[parameter]), trace.record.axes[parameter]
        same = [d for d, other in enumerate(axes) if other is axis] or [
            d for d, other in enumerate(axes) if flat_atoms(other) == flat_atoms(axis)
        ]
        if key is not None and same and parameter not in trace.record.looked_up:
            marks[key, same[-1]] = READER
    for parameter in trace.record.gains:
        key, axes = keys.get(trace.names[parameter]), trace.record.axes[parameter]
        if key is not None:
            marks |= {(key, d): DIAGONAL for d in range(len(axes))}
    return marks


def _find_origins(
    atoms: list[Atom], trace: Trace, keys: Mapping[str, str], contexts: Mapping[Atom, list[Atom]]
) -> list[Origin]:
    """Find the role and the writers of each atom."""
    roles: dict[Atom, dict[str, None]] = {}
    for role, axis in trace.record.roles:
        for atom in leaf_atoms(axis):
            roles.setdefault(atom, {})[role] = None
    outer = {context for atom in atoms for context in contexts[atom]}
    read = {(trace.names[parameter], tuple(map(id, flat_atoms(axis)))) for parameter, axis in trace.record.readers}
    writers: dict[Atom, list[str]] = {atom: [] for atom in atoms}
    first_users: dict[Atom, str] = {}
    for name, axes in trace.parameters.items():
        for axis in axes if name in keys else ():
            reads = (name, tuple(map(id, flat_atoms(axis)))) in read
            for atom in leaf_atoms(axis):
                first_users.setdefault(atom, keys[name])
                if atom in writers and not reads and len(axes) > 1:
                    writers[atom].append(keys[name])
    origins = []
    for atom in atoms:
        possible = roles.get(atom, {})
        chosen: str | None = next((role for role in ("head", "qk", "ov") if role in possible), None)
        if chosen is None and "residual" in possible and len({key.rpartition(".")[0] for key in writers[atom]}) > 1:
            chosen = "residual"
        if (atom in outer and chosen != "head") or (chosen == "head" and contexts[atom]):
            chosen = "group"
        origins.append(Origin(chosen, writers[atom] or [first_users[atom]]))
    return origins
