"""Specs: a table bound to shapes. Every tensor is cut into blocks whose dimensions are labelled by symmetries.

Everything below the tables works on blocks alone, so there is no code per architecture.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from .axes import DIAGONAL, READER, Leaf, Node, Sum, braces, compile_key, leaves, scoped, show, unmarked
from .errors import MismatchError, SpecError, nearest
from .sizes import Equation, Sizes, solve_sizes
from .table import KINDS, ROTATING, Row, Table

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Symmetry:
    """One way a model may move: a group acting on `size` things, separately for every index of its contexts."""

    name: str
    kind: str
    size: int
    contexts: tuple[str, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether there is anything to permute."""
        return KINDS[self.kind] == "permutation" and self.size > 1

    @property
    def group(self) -> str:
        """The group as a table writes it: `"permutation in kv.0"`."""
        return f"{self.kind} in {' '.join(self.contexts)}" if self.contexts else self.kind


@dataclass(frozen=True)
class Dim:
    """One dimension of a block: its symmetry (None: held), its place in the tensor, and where in the block its
    contexts are."""

    name: str | None
    mark: str
    size: int
    stride: int
    axis: int
    leaf: int
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """A strided view of a contiguous tensor, one dimension per leaf of its pattern."""

    offset: int
    dims: tuple[Dim, ...]

    @property
    def names(self) -> tuple[str | None, ...]:
        return tuple(d.name for d in self.dims)

    def view(self, tensor: Tensor) -> Tensor:
        """The block of a contiguous tensor; writing to it writes to the tensor."""
        return tensor.as_strided(
            [d.size for d in self.dims], [d.stride for d in self.dims], tensor.storage_offset() + self.offset
        )


@dataclass(frozen=True)
class Labelled:
    """One row applied to one tensor; to several where the row has an axis over keys, stacked with those axes first."""

    row: str  # as the table writes it
    bound: str  # its key with this tensor's digits for the stars
    keys: Mapping[tuple[int, ...], str]
    shape: Shape
    axes: tuple[Node, ...]
    blocks: tuple[Block, ...]

    @property
    def key(self) -> str:
        """The first of its keys."""
        return next(iter(self.keys.values()))

    @cached_property
    def names(self) -> frozenset[str]:
        """The symmetries it has an axis for."""
        return frozenset(leaf.name for axis in self.axes for leaf in leaves(axis) if leaf.name)

    @property
    def measures(self) -> bool:
        """Whether it says how much rather than what: one diagonal axis, as of a norm's gain or a running statistic.

        Such vectors move with the others, but they do not tell features apart, and the size of BatchNorm statistics
        would drown the weights that do.
        """
        return len(self.axes) == 1 and all(leaf.mark == DIAGONAL for leaf in leaves(self.axes[0]))

    def gather(self, state: Mapping[str, Tensor]) -> Tensor:
        """The tensor, contiguous; keys that are an axis are stacked."""
        first = state[self.key]
        if () in self.keys:
            return first.contiguous()
        stacked = first.new_empty(self.shape)
        for index, key in self.keys.items():
            stacked[index] = state[key]
        return stacked

    def scatter(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The inverse of `gather`: (key, tensor) pairs."""
        for index, key in self.keys.items():
            yield key, tensor[index].clone() if index else tensor


@dataclass(frozen=True)
class Norm:
    """A norm and the linear maps that read it, by canonical keys."""

    gain: str
    bias: str | None
    readers: tuple[str, ...]
    stream: str


@dataclass(frozen=True)
class Unit:
    """A symmetry with all that is nested in it, outermost first: what one step of a solver decides together."""

    names: tuple[str, ...]

    @property
    def outer(self) -> str:
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Spec:
    """What may move in a model: its labelled tensors and its symmetries (contexts before what is nested in them).

    `table` is bound: its keys and names are literal, so it fits this model and says all that `bind` was told.
    """

    table: Table
    tensors: tuple[Labelled, ...]
    symmetries: Mapping[str, Symmetry]
    norms: tuple[Norm, ...]
    shapes: Mapping[str, Shape]
    ties: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"{len(self.shapes)} tensors, {len(self.symmetries)} symmetries, {len(self.free)} of them can be permuted"
        )

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The symmetries that can move, grouped with what is nested in them."""

        def top(name: str) -> str:
            contexts = self.symmetries[name].contexts
            for inner, outer in itertools.pairwise(reversed(contexts)):
                if outer not in self.symmetries[inner].contexts:
                    raise SpecError(f"{name!r} moves in {contexts}, but {inner!r} is not nested in {outer!r}")
            return top(contexts[0]) if contexts else name

        members: dict[str, list[str]] = {}
        for name, symmetry in self.symmetries.items():
            if symmetry.moves:
                unit = members.setdefault(top(name), [])
                unit += [n for n in (*symmetry.contexts, name) if n not in unit]
        return tuple(Unit(tuple(n for n in self.symmetries if n in unit)) for unit in members.values())

    @cached_property
    def free(self) -> frozenset[str]:
        """The names of the symmetries that can move."""
        return frozenset(name for name, symmetry in self.symmetries.items() if symmetry.moves)

    def refuse_unless_same(self, other: Spec) -> None:
        """Raise MismatchError that names the first symmetry in which two specs differ."""
        for name, symmetry in self.symmetries.items():
            theirs = other.symmetries.get(name)
            if theirs is None:
                raise MismatchError(
                    f"symmetry {name!r} ({symmetry.group}, size {symmetry.size}) is not in the model"
                    f"{nearest(name, other.symmetries)}"
                )
            if theirs != symmetry:
                raise MismatchError(
                    f"symmetry {name!r} is {symmetry.group} of size {symmetry.size}, in the model {theirs.group} of "
                    f"size {theirs.size}"
                )
        more = next((n for n in other.symmetries if n not in self.symmetries), None)
        if more is not None:
            raise MismatchError(f"symmetry {more!r} of the model is unknown here")

    def to_json(self) -> str:
        """The bound table with its shapes and ties as text; `from_json` binds it again."""
        return json.dumps({"table": asdict(self.table), "shapes": self.shapes, "ties": self.ties})

    @staticmethod
    def from_json(text: str) -> Spec:
        said = json.loads(text)
        prefix = said["table"].pop("prefix")
        table = Table(**said["table"], prefix=prefix if isinstance(prefix, str) else tuple(prefix))
        return bind(table, {k: tuple(shape) for k, shape in said["shapes"].items()}, said["ties"])


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
    )
    return Spec(bound, tensors, symmetries, norms, dict(shapes), ties)


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
