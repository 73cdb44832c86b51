"""Specs: the tensors of a model, cut into blocks whose dimensions are labelled with symmetries.

All code that consumes specs works on blocks alone, so there is none per architecture. `binding` makes specs from
tables.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from .. import registry
from ..errors import MismatchError, SpecError, nearest
from ..text import family_of, html_overview, overview
from .patterns import DIAGONAL, Node, leaves
from .table import Table

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Symmetry:
    """One way a model may move: a group acting on `size` items, separately for every index of its contexts."""

    name: str
    kind: str
    size: int
    contexts: tuple[str, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether its group has elements besides the identity."""
        return self.kind != "held" and (self.size > 1 or registry.group(self.kind).moves_one)

    @property
    def rotates(self) -> bool:
        """Whether norms stand between it and its readers, so that moving it needs a gauge."""
        return registry.group(self.kind).rotates

    @property
    def group(self) -> str:
        """The group as written in a table: `"permutation in kv.0"`."""
        return f"{self.kind} in {' '.join(self.contexts)}" if self.contexts else self.kind


@dataclass(frozen=True, kw_only=True)
class Dim:
    """One dimension of a block.

    Args:
        name: the symmetry that moves it; None if it is held.
        mark: its reader or diagonal mark.
        size: its length.
        stride: its stride in the tensor.
        axis: the axis of the tensor that it is a part of.
        leaf: the number of its leaf among all leaves of the row.
        contexts: the dimensions of the block that are its contexts.
    """

    name: str | None
    mark: str
    size: int
    stride: int
    axis: int
    leaf: int
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Block:
    """A strided view of a contiguous tensor, one dimension per leaf of its pattern."""

    offset: int
    dims: tuple[Dim, ...]

    @property
    def names(self) -> tuple[str | None, ...]:
        """The symmetries of its dimensions."""
        return tuple(d.name for d in self.dims)

    def view(self, tensor: Tensor) -> Tensor:
        """The block of a contiguous tensor; writing to it writes to the tensor."""
        return tensor.as_strided(
            [d.size for d in self.dims], [d.stride for d in self.dims], tensor.storage_offset() + self.offset
        )


@dataclass(frozen=True, kw_only=True)
class LabelledTensor:
    """One row of a table applied to a tensor, or to several stacked along leading key axes, as for experts."""

    row: str  # as written in the table
    bound: str  # the key of the row, with digits for its stars
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
        """The symmetries that label its axes."""
        return frozenset(leaf.name for axis in self.axes for leaf in leaves(axis) if leaf.name)

    @property
    def measures(self) -> bool:
        """Whether it measures magnitudes, with a single diagonal axis: a norm's gain or a running statistic.

        Such vectors move with the other tensors but do not help to match features, and the magnitude of BatchNorm
        statistics would drown out the weights that do.
        """
        return len(self.axes) == 1 and all(leaf.mark == DIAGONAL for leaf in leaves(self.axes[0]))

    def gather(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor from a state, contiguous and stacked along its key axes."""
        first = state[self.key]
        if () in self.keys:
            return first.contiguous()
        stacked = first.new_empty(self.shape)
        for index, key in self.keys.items():
            stacked[index] = state[key]
        return stacked


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of a stream, and the linear maps that read it, by canonical keys."""

    gain: str
    bias: str | None
    readers: tuple[str, ...]
    stream: str


@dataclass(frozen=True)
class Unit:
    """A symmetry and all symmetries nested in it, outermost first, which one step of a solver decides together."""

    names: tuple[str, ...]

    @property
    def outer(self) -> str:
        """The outermost symmetry."""
        return self.names[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Spec:
    """The symmetries of one model, and the tensors that they act on.

    Args:
        table: the bound table; its keys and names are literal, so that binding it again gives the same spec.
        tensors: the labelled tensors.
        symmetries: `{name: symmetry}`, contexts before the symmetries nested in them.
        norms: the norms and their readers.
        shapes: `{canonical key: shape}`.
        ties: `{canonical key of a tied tensor: key of the tensor it shares}`.
        pins: for an inferred spec, the operation that pinned each held axis, by key; None for axes that are not held.
        activations: for an inferred spec, `{module: pattern of its output}`, where the output carries a symmetry.
    """

    table: Table
    tensors: tuple[LabelledTensor, ...]
    symmetries: Mapping[str, Symmetry]
    norms: tuple[Norm, ...]
    shapes: Mapping[str, Shape]
    ties: Mapping[str, str]
    pins: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return overview(f"Spec({self})", self._rows())

    def _repr_html_(self) -> str:
        return html_overview(str(self), ("symmetry", "group", "size", "how many"), self._rows())

    def _rows(self) -> list[tuple[str, str, str, str]]:
        families = self.families().items()
        return [(family, group, f"size {size}", f"× {len(names)}") for (family, group, size), names in families]

    def families(self) -> dict[tuple[str, str, int], list[str]]:
        """Return `{(names with stars, group, size): names}`, one entry for names that differ only in their numbers.

        Example: `{("ff.*", "permutation", 3072): ["ff.0", "ff.1", …]}`.
        """
        families: dict[tuple[str, str, int], list[str]] = {}
        for name, symmetry in self.symmetries.items():
            group = family_of(symmetry.group) if symmetry.moves else "held"
            families.setdefault((family_of(name), group, symmetry.size), []).append(name)
        return families

    def __str__(self) -> str:
        return f"{len(self.shapes)} tensors, {len(self.symmetries)} symmetries, {len(self.free)} of them can move"

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The symmetries that can move, grouped with those nested in them."""

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
        """Return the spec with only those tensors whose keys are among `keys`."""
        return replace(self, tensors=tuple(t for t in self.tensors if all(key in keys for key in t.keys.values())))

    def limited(self, kinds: Mapping[str, str]) -> Spec:
        """Return the spec with other kinds of group for some symmetries, by name."""
        symmetries = {n: replace(s, kind=kinds.get(n, s.kind)) for n, s in self.symmetries.items()}
        groups = {name: symmetry.group for name, symmetry in symmetries.items()}
        return replace(self, symmetries=symmetries, table=replace(self.table, groups=groups))

    def restricted(self, names: Iterable[str] | None = None) -> Spec:
        """Return the spec with the groups of all symmetries, or of those named, reduced to their permutations."""
        names = self.symmetries if names is None else names
        return self.limited({name: registry.group(self.symmetries[name].kind).permutations for name in names})

    @cached_property
    def gauged(self) -> tuple[Norm, ...]:
        """The norms between streams that can be rotated and their readers."""
        return tuple(norm for norm in self.norms if self.symmetries[norm.stream].rotates)

    def untied_by(self, streams: Container[str]) -> list[str]:
        """List the tied tensors that rotating these streams unties: those that read one of them through a norm.

        The gain of the norm is folded into the reader, but not into the embedding that it shared its tensor with.
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
        """Raise MismatchError if a symmetry of this spec is missing or different in the spec of an alignment.

        What the alignment would not move does not matter: a symmetry that this spec holds and the alignment
        lacks, one that the alignment holds, and the size of one that both hold, such as the rows of another head.

        Args:
            other: spec of the alignment.
            name: name of this spec's model, for the message.
        """
        for symmetry in self.symmetries.values():
            aligned = other.symmetries.get(symmetry.name)
            description = f"symmetry {symmetry.name!r} is {symmetry.group} of size {symmetry.size} in {name}"
            if aligned is None and symmetry.moves:
                raise MismatchError(
                    f"{description}, and unknown to the alignment{nearest(symmetry.name, other.symmetries)}"
                )
            if (
                aligned is not None
                and aligned != symmetry
                and (aligned.moves or (symmetry.moves and aligned.size != symmetry.size))
            ):
                raise MismatchError(f"{description}, but {aligned.group} of size {aligned.size} in the alignment")

    def to_json(self) -> str:
        """Return the bound table, the shapes and the ties as JSON; `binding.read_spec` binds them again."""
        return json.dumps({"table": asdict(self.table), "shapes": self.shapes, "ties": self.ties})
