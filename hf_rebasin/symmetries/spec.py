"""Specs: a model as a bag of tensors, cut into blocks whose dimensions are labelled by symmetries.

Everything below the tables works on blocks alone, so there is no code per architecture. `binding` makes specs
from tables.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import MismatchError, SpecError, nearest
from .patterns import DIAGONAL, Node, leaves
from .table import KINDS, ROTATING, SCALING, Table

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
        """Whether its group has more than the identity."""
        return self.kind != "held" and (self.size > 1 or self.kind in SCALING)

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

    `table` is bound: its keys and names are literal, so it fits this model and says all that `bind` was told. Where it
    was inferred, `pins` says for every axis of a tensor that is held which operation pinned it, and `activations`
    gives the pattern of every module's output that carries a symmetry, by module name.
    """

    table: Table
    tensors: tuple[Labelled, ...]
    symmetries: Mapping[str, Symmetry]
    norms: tuple[Norm, ...]
    shapes: Mapping[str, Shape]
    ties: Mapping[str, str]
    pins: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{len(self.shapes)} tensors, {len(self.symmetries)} symmetries, {len(self.free)} of them can move"

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The symmetries that can move, grouped with what is nested in them."""

        def top(name: str) -> str:
            contexts = self.symmetries[name].contexts
            for inner, outer in itertools.pairwise(reversed(contexts)):
                if outer not in self.symmetries[inner].contexts and self.symmetries[inner].kind != "held":
                    raise SpecError(f"{name!r} moves in {contexts}, but {inner!r} is not nested in {outer!r}")
            return top(contexts[0]) if contexts else name

        members: dict[str, list[str]] = {}
        for name, symmetry in self.symmetries.items():
            if symmetry.moves:
                unit = members.setdefault(top(name), [])
                unit += [n for n in (*symmetry.contexts, name) if n not in unit]
        return tuple(Unit(tuple(n for n in self.symmetries if n in unit)) for unit in members.values())

    def within(self, keys: Container[str]) -> Spec:
        """The same symmetries, with the tensors alone whose keys are among those given."""
        return replace(self, tensors=tuple(t for t in self.tensors if all(key in keys for key in t.keys.values())))

    def limited(self, kinds: Mapping[str, str]) -> Spec:
        """The same with other kinds of group for some symmetries, by name."""
        symmetries = {n: replace(s, kind=kinds.get(n, s.kind)) for n, s in self.symmetries.items()}
        groups = {name: symmetry.group for name, symmetry in symmetries.items()}
        return replace(self, symmetries=symmetries, table=replace(self.table, groups=groups))

    def restricted(self, names: Iterable[str] | None = None) -> Spec:
        """The same with the permutations alone inside the group of every symmetry, or of those named."""
        chosen = self.symmetries if names is None else names
        return self.limited({name: KINDS[self.symmetries[name].kind] for name in chosen})

    @cached_property
    def gauged(self) -> tuple[Norm, ...]:
        """The norms that stand between a stream that can be rotated and its readers."""
        return tuple(norm for norm in self.norms if self.symmetries[norm.stream].kind in ROTATING)

    def untied_by(self, streams: Container[str]) -> list[str]:
        """The tied tensors that read one of these streams behind a norm: rotated, they are no longer what they share.

        The gain of the norm goes into the reader, and not into the embedding that it was.
        """
        return [
            reader
            for norm in self.gauged
            if norm.stream in streams
            for reader in norm.readers
            if reader in self.ties and reader not in self.shapes
        ]

    @cached_property
    def free(self) -> frozenset[str]:
        """The names of the symmetries that can move."""
        return frozenset(name for name, symmetry in self.symmetries.items() if symmetry.moves)

    def refuse_unless_within(self, other: Spec, name: str) -> None:
        """Raise MismatchError that names the first symmetry of this spec that an alignment's lacks or has otherwise.

        What is held here and unknown there, or the other way round held there, is no matter: nothing would move it.
        Nor is the size of what is held in both, such as the rows of another head.
        """
        for symmetry in self.symmetries.values():
            theirs = other.symmetries.get(symmetry.name)
            said = f"symmetry {symmetry.name!r} is {symmetry.group} of size {symmetry.size} in {name}"
            if theirs is None and symmetry.moves:
                raise MismatchError(f"{said}, and unknown to the alignment{nearest(symmetry.name, other.symmetries)}")
            if (
                theirs is not None
                and theirs != symmetry
                and (theirs.moves or (symmetry.moves and theirs.size != symmetry.size))
            ):
                raise MismatchError(f"{said}, {theirs.group} of size {theirs.size} in the alignment")

    def to_json(self) -> str:
        """The bound table with its shapes and ties as text; `binding.read_spec` binds it again."""
        return json.dumps({"table": asdict(self.table), "shapes": self.shapes, "ties": self.ties})
