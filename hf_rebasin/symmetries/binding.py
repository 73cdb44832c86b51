"""Binding: making a spec from a table and the shapes of a model's tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from .. import registry
from ..checkpoints.checkpoint import Checkpoint
from ..errors import SpecError, nearest
from .patterns import (
    READER,
    Leaf,
    Node,
    Sum,
    compile_key,
    expand_braces,
    fill_axis_stars,
    format_pattern,
    leaves,
    unmarked,
)
from .sizes import Equation, Sizes, solve_sizes
from .spec import Block, Dim, LabelledTensor, Norm, Shape, Spec, Symmetry
from .table import PatternRow, Table, canonical_view


def bind(table: Table, shapes: Mapping[str, Shape], ties: Mapping[str, str] | None = None) -> Spec:
    """Bind a table to the shapes of a model's tensors.

    Args:
        table: rows, groups, sizes and norms of the family.
        shapes: `{canonical key: shape}`.
        ties: `{canonical key the checkpoint lacks: the key whose tensor it shares}`.

    Raises:
        SpecError: a key has no row or several equally good ones, a shape does not fit, a size stays open, or a name
            has no group; the message names the key, its shape and the row.

    Example: the table of `Table`'s docstring, for its two layers; `hidden` = 16 follows from the shapes.

        >>> spec = bind(table, {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)})
        >>> spec.symmetries
        {'hidden': Symmetry(name='hidden', kind='permutation', size=16, contexts=())}
    """
    ties = dict(ties or {})
    unbound = [_label(*match) for match in _match_rows(table, shapes)]
    for target, source in ties.items():
        _check_tie(table, shapes, target, source)
    kinds = _resolve_groups(table, unbound)
    norms = _bind_norms(table, shapes, ties, unbound)
    for norm in norms:
        if not norm.readers and registry.group(kinds[norm.stream][0]).rotates:
            kinds[norm.stream] = ("held", kinds[norm.stream][1])  # no reader: the norm is the model's output
    given = {name: size for name in kinds if (size := table.size_of(name)) is not None}
    sizes = solve_sizes((e for tensor in unbound for e in _equations(tensor)), given)
    symmetries = {
        name: Symmetry(name, kind, sizes.names[name], contexts)
        for name, (kind, contexts) in _sort_contexts_first(kinds).items()
    }
    tensors = tuple(_cut_into_blocks(tensor, sizes, symmetries) for tensor in unbound)
    _check_readers(tensors, symmetries, norms)
    tied = {target: format_pattern(_axes_of(table, target)) for target in ties if target not in shapes}
    bound = Table(
        rows=tied | {tensor.bound: format_pattern(tensor.axes[len(next(iter(tensor.keys))) :]) for tensor in tensors},
        groups={name: symmetry.group for name, symmetry in symmetries.items()},
        sizes={name: symmetry.size for name, symmetry in symmetries.items()},
        norms={norm.gain.removesuffix(".weight"): [r.removesuffix(".weight") for r in norm.readers] for norm in norms},
        prefix=table.prefix,
        reasons=table.reasons,
    )
    return Spec(table=bound, tensors=tensors, symmetries=symmetries, norms=norms, shapes=dict(shapes), ties=ties)


def bind_to(table: Table, checkpoint: Checkpoint) -> Spec:
    """Bind a table to the tensors of a checkpoint."""
    view = canonical_view(checkpoint, table)
    return bind(table, view.shapes, view.ties)


def untie_spec(spec: Spec, keys: Collection[str]) -> Spec:
    """Return the spec of the same model with some tied tensors stored separately."""
    if not keys:
        return spec
    ties = {target: source for target, source in spec.ties.items() if target not in keys}
    return bind(spec.table, {**spec.shapes, **{key: spec.shapes[spec.ties[key]] for key in keys}}, ties)


@dataclass(frozen=True)
class _SavedSpec:
    """The contents of `Spec.to_json`."""

    table: Table
    shapes: Mapping[str, Shape]
    ties: Mapping[str, str]


def read_spec(text: str) -> Spec:
    """Read a spec from its `to_json`.

    Raises:
        SpecError: the text is not a spec.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        saved = TypeAdapter(_SavedSpec).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"not a spec: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if invalid := [key for key, shape in saved.shapes.items() if not all(0 <= n < 2**63 for n in shape)]:
        raise SpecError(f"not a spec: {invalid[0]} has the shape {saved.shapes[invalid[0]]}")
    return bind(saved.table, saved.shapes, saved.ties)


def _match_rows(table: Table, shapes: Mapping[str, Shape]) -> Iterator[tuple[PatternRow, tuple[str, ...], dict]]:
    """Yield (row, stars, {index along the key axes: (key, shape)}) for every labelled tensor."""
    matches: dict[tuple[str, tuple[str, ...]], tuple[PatternRow, dict]] = {}
    for key, shape in shapes.items():
        row = table.row_for(key, shape)
        if len(row.axes) != len(shape):
            raise SpecError(
                f"{key} {tuple(shape)}: row {row.text!r} has {len(row.axes)} axes ({format_pattern(row.axes)!r}), but "
                f"the tensor {len(shape)}"
            )
        stars, index = row.key.match(key) or ((), ())
        matches.setdefault((row.key.text, stars), (row, {}))[1][index] = (key, tuple(shape))
    for (_, stars), (row, keys) in matches.items():
        yield row, stars, keys


def _label(row: PatternRow, stars: tuple[str, ...], keys: dict[tuple[int, ...], tuple[str, Shape]]) -> LabelledTensor:
    """Return the labelled tensor of a row, not yet cut into blocks."""
    shapes = {shape for _, shape in keys.values()}
    if len(shapes) > 1:
        raise SpecError(f"row {row.text!r}: the keys along <{' '.join(row.key.axes)}> have different shapes: {shapes}")
    counts = tuple(max(index[i] for index in keys) + 1 for i in range(len(row.key.axes)))
    for index in itertools.product(*map(range, counts)):
        if index not in keys:
            raise SpecError(f"row {row.text!r}: no key for {dict(zip(row.key.axes, index, strict=True))}")
    try:
        axes = tuple(fill_axis_stars(axis, stars) for axis in (*map(Leaf, row.key.axes), *row.axes))
    except ValueError as error:
        key, shape = next(iter(keys.values()))
        raise SpecError(f"{key} {shape}: {error}; row {row.text!r}") from None
    return LabelledTensor(
        row=row.text,
        bound=row.key.bound(stars),
        keys={index: key for index, (key, _) in keys.items()},
        shape=counts + shapes.pop(),
        axes=axes,
        blocks=(),
    )


def _equations(tensor: LabelledTensor) -> Iterator[Equation]:
    for axis, (node, length) in enumerate(zip(tensor.axes, tensor.shape, strict=True)):
        yield Equation(key=tensor.key, row=tensor.row, axis=axis, node=node, length=length)


def _resolve_groups(table: Table, tensors: list[LabelledTensor]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return {name: (kind, contexts)} for every name in the rows, in the order of the tensors."""
    kinds = {}
    for tensor in tensors:
        for name in (leaf.name for axis in tensor.axes for leaf in leaves(axis) if leaf.name):
            if name not in kinds:
                try:
                    kinds[name] = table.group_of(name)
                except (SpecError, ValueError) as error:
                    raise SpecError(f"{tensor.key} {tensor.shape}: {error}; row {tensor.row!r}") from None
    return kinds


def _sort_contexts_first(kinds: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Sort names so that contexts come before the names nested in them."""
    ordered: dict[str, tuple[str, tuple[str, ...]]] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise SpecError(f"contexts form a cycle: {' in '.join((*path, name))}")
        for context in kinds[name][1]:
            if context not in kinds:
                raise SpecError(f"{name!r} is declared in {context!r}, which no tensor has{nearest(context, kinds)}")
            if registry.group(kinds[context][0]).permutations != kinds[context][0]:
                raise SpecError(
                    f"{name!r} is declared in {context!r}, whose group {kinds[context][0]!r} mixes its items; a "
                    "context must be permuted or held"
                )
            visit(context, (*path, name))
        ordered.setdefault(name, kinds[name])

    for name in kinds:
        visit(name, ())
    return ordered


def _cut_axis(
    equation: Equation, node: Node, sizes: Sizes, path: tuple[int, ...], count: Iterator[int]
) -> list[tuple[int, list[tuple[Leaf, int, int, int]]]]:
    """Return [(offset, [(leaf, size, stride, number of the leaf)])] along one axis, in entries of that axis."""
    if isinstance(node, Leaf):
        return [(0, [(node, sizes.length(equation, node, path), 1, next(count))])]
    if isinstance(node, Sum):
        pieces, offset = [], 0
        for i, term in enumerate(node.terms):
            pieces += [(offset + o, dims) for o, dims in _cut_axis(equation, term, sizes, (*path, i), count)]
            offset += sizes.length(equation, term, (*path, i))
        return pieces
    pieces = [(0, [])]
    for i, item in enumerate(node.items):
        length = sizes.length(equation, item, (*path, i))
        inner = _cut_axis(equation, item, sizes, (*path, i), count)
        pieces = [
            (offset * length + o, [(leaf, n, stride * length, j) for leaf, n, stride, j in dims] + new)
            for offset, dims in pieces
            for o, new in inner
        ]
    return pieces


def _cut_into_blocks(tensor: LabelledTensor, sizes: Sizes, symmetries: Mapping[str, Symmetry]) -> LabelledTensor:
    """Return the tensor with its blocks, one for every combination of the terms of its axes."""
    count = itertools.count()
    per_axis = [_cut_axis(e, e.node, sizes, (), count) for e in _equations(tensor)]
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    blocks = []
    for combination in itertools.product(*per_axis):
        offset = sum(o * stride for (o, _), stride in zip(combination, strides, strict=True))
        dims = [
            Dim(name=leaf.name, mark=leaf.mark, size=size, stride=step * stride, axis=axis, leaf=number)
            for axis, ((_, pieces), stride) in enumerate(zip(combination, strides, strict=True))
            for leaf, size, step, number in pieces
        ]
        with_contexts = tuple(_with_contexts(dims, i, symmetries, tensor) for i in range(len(dims)))
        blocks.append(Block(offset=offset, dims=with_contexts))
    return replace(tensor, blocks=tuple(blocks))


def _with_contexts(dims: list[Dim], i: int, symmetries: Mapping[str, Symmetry], tensor: LabelledTensor) -> Dim:
    """Return dimension i with the positions of its contexts, preferring those on its own axis."""
    dim, positions = dims[i], []
    for context in symmetries[dim.name].contexts if dim.name else ():
        candidates = [k for k, d in enumerate(dims) if d.name == context]
        if not candidates:
            raise SpecError(
                f"{tensor.key} {tensor.shape}: {dim.name!r} is declared in {context!r}, but row {tensor.row!r} has "
                f"it without {context!r}"
            )
        positions.append(next((k for k in candidates if dims[k].axis == dim.axis), candidates[0]))
    return replace(dim, contexts=tuple(positions))


def _check_tie(table: Table, shapes: Mapping[str, Shape], target: str, source: str) -> None:
    """Raise SpecError if the rows of tied tensors differ by more than marks: one tensor is used under both keys."""
    if target in shapes or source not in shapes:
        return
    rows = {key: format_pattern(tuple(map(unmarked, _axes_of(table, key)))) for key in (target, source)}
    if rows[target] != rows[source]:
        raise SpecError(
            f"{target} is tied to {source} {shapes[source]}, but their rows differ: {rows[target]!r} and "
            f"{rows[source]!r}"
        )


def _axes_of(table: Table, key: str) -> tuple[Node, ...]:
    """Return the axes of a key with its stars filled in."""
    row = table.row_for(key)
    stars, _ = row.key.match(key) or ((), ())
    return tuple(fill_axis_stars(axis, stars) for axis in row.axes)


def _bind_norms(
    table: Table, shapes: Mapping[str, Shape], ties: Mapping[str, str], tensors: list[LabelledTensor]
) -> tuple[Norm, ...]:
    """Find the norms of a table and their readers among the keys of a model."""
    by_key = {key: tensor for tensor in tensors for key in tensor.keys.values()}
    known = [*shapes, *(target for target in ties if target not in shapes)]
    norms = []
    for pattern, readers in table.norms.items():
        gain_key = compile_key(f"{pattern}.weight")
        for gain in shapes:
            match = gain_key.match(gain)
            if match is None:
                continue
            streams = by_key[gain].names
            if len(streams) != 1:
                raise SpecError(
                    f"norm {gain} {shapes[gain]}: expected one stream, but row {by_key[gain].row!r} has {set(streams)}"
                )
            reader_keys: dict[str, None] = {}
            for reader in (
                key for text in ([readers] if isinstance(readers, str) else readers) for key in expand_braces(text)
            ):
                for star in match[0]:  # the first stars of a reader are the norm's; further stars match any digits
                    reader = reader.replace("*", star, 1)
                reader_key = compile_key(f"{reader}.weight")
                reader_keys |= dict.fromkeys(key for key in known if reader_key.match(key))
            for reader in reader_keys:
                axes = _axes_of(table, reader)
                if not streams <= {leaf.name for axis in axes for leaf in leaves(axis)}:
                    raise SpecError(
                        f"{reader} is declared to read {gain}, whose stream is {set(streams)}, but its row is "
                        f"{format_pattern(axes)!r}"
                    )
            bias = f"{gain.removesuffix('.weight')}.bias"
            norms.append(
                Norm(
                    gain=gain,
                    bias=bias if bias in shapes else None,
                    readers=tuple(reader_keys),
                    stream=next(iter(streams)),
                )
            )
    return tuple(norms)


def _check_readers(
    tensors: tuple[LabelledTensor, ...], symmetries: Mapping[str, Symmetry], norms: tuple[Norm, ...]
) -> None:
    """Raise SpecError unless every reader of a rotated stream has exactly one norm, which carries the gauge."""
    norms_of: dict[str, list[str]] = {}
    for norm in norms:
        for reader in norm.readers:
            norms_of.setdefault(reader, []).append(norm.gain)
    for tensor in tensors:
        rotated = [
            leaf.name
            for axis in tensor.axes
            for leaf in leaves(axis)
            if leaf.name and leaf.mark == READER and symmetries[leaf.name].rotates
        ]
        for key in tensor.keys.values() if rotated else ():
            if len(norms_of.get(key, [])) != 1:
                raise SpecError(
                    f"{key} {tensor.shape} reads the {symmetries[rotated[0]].kind} stream {rotated[0]!r} (row "
                    f"{tensor.row!r}); exactly one norm must name it as a reader, not {norms_of.get(key, [])}"
                )
