"""Binding: a table and the shapes of a model's tensors make a spec."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from ..checkpoints.checkpoint import Checkpoint
from ..errors import SpecError, nearest
from .patterns import READER, Leaf, Node, Sum, braces, compile_key, leaves, scoped, show, unmarked
from .sizes import Equation, Sizes, solve_sizes
from .spec import Block, Dim, Labelled, Norm, Shape, Spec, Symmetry
from .table import KINDS, ROTATING, Row, Table


def bind(table: Table, shapes: Mapping[str, Shape], ties: Mapping[str, str] | None = None) -> Spec:
    """Bind a table to the shapes of a model's tensors.

    Args:
        table: the rows, groups, sizes and norms of the family.
        shapes: `{canonical key: shape}`.
        ties: `{canonical key the checkpoint lacks: the key whose tensor it shares}`.

    Raises:
        SpecError: a key without a row, a tie of rows, a shape that does not fit, a size that stays open, a name
            without a group; each names the key, its shape and the row.

    Example: the table of `Table`'s docstring on its two layers; solving `hidden` = 16 needs no help.

        >>> spec = bind(table, {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)})
        >>> spec.symmetries
        {'hidden': Symmetry(name='hidden', kind='permutation', size=16, contexts=())}
    """
    ties = dict(ties or {})
    unbound = [_unbound(*found) for found in _rows_of(table, shapes)]
    for target, source in ties.items():
        _check_tie(table, shapes, target, source)
    kinds = _groups(table, unbound)
    norms = _norms(table, shapes, ties, unbound)
    for norm in norms:
        if not norm.readers and kinds[norm.stream][0] in ROTATING:
            kinds[norm.stream] = ("held", kinds[norm.stream][1])  # nothing reads this norm: it is the model's output
    given = {name: size for name in kinds if (size := table.size_of(name)) is not None}
    sizes = solve_sizes((e for tensor in unbound for e in _equations(tensor)), given)
    symmetries = {
        name: Symmetry(name, kind, sizes.names[name], contexts)
        for name, (kind, contexts) in _contexts_first(kinds).items()
    }
    tensors = tuple(_cut(tensor, sizes, symmetries) for tensor in unbound)
    _check_readers(tensors, symmetries, norms)
    tied = {target: show(_axes_of(table, target)) for target in ties if target not in shapes}
    bound = Table(
        rows=tied | {tensor.bound: show(tensor.axes[len(next(iter(tensor.keys))) :]) for tensor in tensors},
        groups={name: symmetry.group for name, symmetry in symmetries.items()},
        sizes={name: symmetry.size for name, symmetry in symmetries.items()},
        norms={norm.gain.removesuffix(".weight"): [r.removesuffix(".weight") for r in norm.readers] for norm in norms},
        prefix=table.prefix,
        reasons=table.reasons,
    )
    return Spec(bound, tensors, symmetries, norms, dict(shapes), ties)


def bind_to(table: Table, checkpoint: Checkpoint) -> Spec:
    """A table bound to a checkpoint."""
    return bind(table, checkpoint.shapes(table.prefix), checkpoint.canonical_ties(table.prefix))


def untied(spec: Spec, keys: Collection[str]) -> Spec:
    """The spec of the same model, where some tied tensors are stored apart; itself where none are."""
    if not keys:
        return spec
    ties = {target: kept for target, kept in spec.ties.items() if target not in keys}
    return bind(spec.table, {**spec.shapes, **{key: spec.shapes[spec.ties[key]] for key in keys}}, ties)


@dataclass(frozen=True)
class _Said:
    """What `Spec.to_json` writes."""

    table: Table
    shapes: Mapping[str, Shape]
    ties: Mapping[str, str]


def read_spec(text: str) -> Spec:
    """The spec whose `to_json` this is.

    Raises:
        SpecError: it is none.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        said = TypeAdapter(_Said).validate_json(text, strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise SpecError(f"this is no spec: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
    if odd := [key for key, shape in said.shapes.items() if not all(0 <= n < 2**63 for n in shape)]:
        raise SpecError(f"this is no spec: {odd[0]} has the shape {said.shapes[odd[0]]}")
    return bind(said.table, said.shapes, said.ties)


def _rows_of(table: Table, shapes: Mapping[str, Shape]) -> Iterator[tuple[Row, tuple[str, ...], dict]]:
    """(row, stars, {index along the key axes: (key, shape)}) for every tensor."""
    found: dict[tuple[str, tuple[str, ...]], tuple[Row, dict]] = {}
    for key, shape in shapes.items():
        row = table.row_for(key, shape)
        if len(row.axes) != len(shape):
            raise SpecError(
                f"{key} {tuple(shape)}: row {row.text!r} says {len(row.axes)} axes ({show(row.axes)!r}), the tensor "
                f"has {len(shape)}"
            )
        stars, index = row.key.match(key) or ((), ())
        found.setdefault((row.key.text, stars), (row, {}))[1][index] = (key, tuple(shape))
    for (_, stars), (row, keys) in found.items():
        yield row, stars, keys


def _unbound(row: Row, stars: tuple[str, ...], keys: dict[tuple[int, ...], tuple[str, Shape]]) -> Labelled:
    """The tensor a row says, not yet cut."""
    shapes = {shape for _, shape in keys.values()}
    if len(shapes) > 1:
        raise SpecError(f"row {row.text!r}: the keys along <{' '.join(row.key.axes)}> have different shapes: {shapes}")
    counts = tuple(max(index[i] for index in keys) + 1 for i in range(len(row.key.axes)))
    for index in itertools.product(*map(range, counts)):
        if index not in keys:
            raise SpecError(f"row {row.text!r}: no key for {dict(zip(row.key.axes, index, strict=True))}")
    try:
        axes = tuple(scoped(axis, stars) for axis in (*map(Leaf, row.key.axes), *row.axes))
    except ValueError as error:
        key, shape = next(iter(keys.values()))
        raise SpecError(f"{key} {shape}: {error}; row {row.text!r}") from None
    return Labelled(
        row.text, row.key.bound(stars), {i: key for i, (key, _) in keys.items()}, counts + shapes.pop(), axes, ()
    )


def _equations(tensor: Labelled) -> Iterator[Equation]:
    for i, (axis, length) in enumerate(zip(tensor.axes, tensor.shape, strict=True)):
        yield Equation(tensor.key, tensor.row, i, axis, length)


def _groups(table: Table, tensors: list[Labelled]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{name: (kind, contexts)} for every name that a row says, in the order it is said."""
    kinds = {}
    for tensor in tensors:
        for name in (leaf.name for axis in tensor.axes for leaf in leaves(axis) if leaf.name):
            if name not in kinds:
                try:
                    kinds[name] = table.group_of(name)
                except (SpecError, ValueError) as error:
                    raise SpecError(f"{tensor.key} {tensor.shape}: {error}; row {tensor.row!r}") from None
    return kinds


def _contexts_first(kinds: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    ordered: dict[str, tuple[str, tuple[str, ...]]] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise SpecError(f"contexts go in a circle: {' in '.join((*path, name))}")
        for context in kinds[name][1]:
            if context not in kinds:
                raise SpecError(f"{name!r} is declared in {context!r}, which no tensor has{nearest(context, kinds)}")
            if KINDS[kinds[context][0]] != kinds[context][0]:
                raise SpecError(
                    f"{name!r} is declared in {context!r}, whose group {kinds[context][0]!r} mixes its members; a "
                    "context must be permuted or held"
                )
            visit(context, (*path, name))
        ordered.setdefault(name, kinds[name])

    for name in kinds:
        visit(name, ())
    return ordered


def _pieces(
    equation: Equation, node: Node, sizes: Sizes, path: tuple[int, ...], count: Iterator[int]
) -> list[tuple[int, list[tuple[Leaf, int, int, int]]]]:
    """[(offset, [(leaf, size, stride, number of the leaf)])] along one axis, in elements of that axis."""
    if isinstance(node, Leaf):
        return [(0, [(node, sizes.length(equation, node, path), 1, next(count))])]
    if isinstance(node, Sum):
        pieces, offset = [], 0
        for i, term in enumerate(node.terms):
            pieces += [(offset + o, dims) for o, dims in _pieces(equation, term, sizes, (*path, i), count)]
            offset += sizes.length(equation, term, (*path, i))
        return pieces
    pieces = [(0, [])]
    for i, item in enumerate(node.items):
        length = sizes.length(equation, item, (*path, i))
        inner = _pieces(equation, item, sizes, (*path, i), count)
        pieces = [
            (offset * length + o, [(leaf, n, stride * length, j) for leaf, n, stride, j in dims] + new)
            for offset, dims in pieces
            for o, new in inner
        ]
    return pieces


def _cut(tensor: Labelled, sizes: Sizes, symmetries: Mapping[str, Symmetry]) -> Labelled:
    """The tensor with its blocks: one for every combination of the terms of its axes."""
    count = itertools.count()
    per_axis = [_pieces(e, e.node, sizes, (), count) for e in _equations(tensor)]
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    blocks = []
    for combination in itertools.product(*per_axis):
        offset = sum(o * stride for (o, _), stride in zip(combination, strides, strict=True))
        dims = [
            Dim(leaf.name, leaf.mark, size, step * stride, axis, number)
            for axis, ((_, pieces), stride) in enumerate(zip(combination, strides, strict=True))
            for leaf, size, step, number in pieces
        ]
        blocks.append(Block(offset, tuple(_with_contexts(dims, i, symmetries, tensor) for i in range(len(dims)))))
    return replace(tensor, blocks=tuple(blocks))


def _with_contexts(dims: list[Dim], at: int, symmetries: Mapping[str, Symmetry], tensor: Labelled) -> Dim:
    """The dimension with the places of its contexts: on its own axis if there, else wherever they are."""
    dim, places = dims[at], []
    for context in symmetries[dim.name].contexts if dim.name else ():
        there = [i for i, d in enumerate(dims) if d.name == context]
        if not there:
            raise SpecError(
                f"{tensor.key} {tensor.shape}: {dim.name!r} is declared in {context!r}, but row {tensor.row!r} says "
                f"it without {context!r}"
            )
        places.append(next((i for i in there if dims[i].axis == dim.axis), there[0]))
    return replace(dim, contexts=tuple(places))


def _check_tie(table: Table, shapes: Mapping[str, Shape], target: str, source: str) -> None:
    """A tied tensor is stored once but used twice: both rows must name the same axes (marks may differ)."""
    if target in shapes or source not in shapes:
        return
    said = {key: show(tuple(map(unmarked, _axes_of(table, key)))) for key in (target, source)}
    if said[target] != said[source]:
        raise SpecError(
            f"{target} is tied to {source} {shapes[source]}, but their rows differ: {said[target]!r} and "
            f"{said[source]!r}"
        )


def _axes_of(table: Table, key: str) -> tuple[Node, ...]:
    row = table.row_for(key)
    stars, _ = row.key.match(key) or ((), ())
    return tuple(scoped(axis, stars) for axis in row.axes)


def _norms(
    table: Table, shapes: Mapping[str, Shape], ties: Mapping[str, str], tensors: list[Labelled]
) -> tuple[Norm, ...]:
    by_key = {key: tensor for tensor in tensors for key in tensor.keys.values()}
    known = [*shapes, *(target for target in ties if target not in shapes)]
    norms = []
    for pattern, readers in table.norms.items():
        glob = compile_key(f"{pattern}.weight")
        for gain in shapes:
            match = glob.match(gain)
            if match is None:
                continue
            streams = by_key[gain].names
            if len(streams) != 1:
                raise SpecError(
                    f"norm {gain} {shapes[gain]}: expected one stream, row {by_key[gain].row!r} says {streams}"
                )
            found: dict[str, None] = {}
            for reader in (
                one for said in ([readers] if isinstance(readers, str) else readers) for one in braces(said)
            ):
                for star in match[0]:  # its first stars are the norm's; further stars are free
                    reader = reader.replace("*", star, 1)
                reads = compile_key(f"{reader}.weight")
                found |= dict.fromkeys(key for key in known if reads.match(key))
            for reader in found:
                said = _axes_of(table, reader)
                if not streams <= {leaf.name for axis in said for leaf in leaves(axis)}:
                    raise SpecError(
                        f"{reader} is said to read {gain}, whose row names {streams}; its own is {show(said)!r}"
                    )
            bias = f"{gain.removesuffix('.weight')}.bias"
            norms.append(Norm(gain, bias if bias in shapes else None, tuple(found), next(iter(streams))))
    return tuple(norms)


def _check_readers(tensors: tuple[Labelled, ...], symmetries: Mapping[str, Symmetry], norms: tuple[Norm, ...]) -> None:
    """A reader of a rotated stream has exactly one norm: that is where the gauge is."""
    claims: dict[str, list[str]] = {}
    for norm in norms:
        for reader in norm.readers:
            claims.setdefault(reader, []).append(norm.gain)
    for tensor in tensors:
        rotated = [
            leaf.name
            for axis in tensor.axes
            for leaf in leaves(axis)
            if leaf.name and leaf.mark == READER and symmetries[leaf.name].kind in ROTATING
        ]
        for key in tensor.keys.values() if rotated else ():
            if len(claims.get(key, [])) != 1:
                raise SpecError(
                    f"{key} {tensor.shape} reads the {symmetries[rotated[0]].kind} stream {rotated[0]!r} (row "
                    f"{tensor.row!r}); exactly one norm must name it as a reader, got {claims.get(key, [])}"
                )
