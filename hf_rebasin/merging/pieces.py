"""Pieces of tensors: what merge methods see of the tensors of one key, and how their results are put together.

A method is called on pieces: on flat ranges of elements, on whole rows, or on whole tensors, as its `PIECES` says. Of
a method with a base model, the tensors are differences from the base. Besides its parameters it may ask for

- `base`: the values of the base model;
- `uniforms`: for every model, random numbers in [0, 1) of the piece's shape, see `hf_rebasin.merging.randomness`;
- `offset`: index of the piece's first element in the flat tensor;
- `shape`: shape of the whole tensor;
- `lookup`: whether the rows of the tensor are those of tokens or classes, as in embeddings and output heads; these are
  merged element by element;
- `transposed`: whether a matrix is stored as (inputs, outputs);
- `whole`: what its `prepare` returned, having seen all pieces.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import lazy
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import InMemory, Lazy
from ..checkpoints.precision import all_finite, rounded, sum_dtype
from ..errors import CheckpointError
from ..registry import MergeMethod, PieceKind
from .randomness import Stream


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of the tensors of one key.

    Args:
        tensors: the piece in every model, or its difference from the base.
        base: the piece in the base model; None without a base.
        offset: index of its first element in the flat tensor.
        streams: random numbers of the tensor in every model.
    """

    tensors: Sequence[Tensor]
    base: Tensor | None = None
    offset: int = 0
    streams: Sequence[Stream] = ()

    @cached_property
    def uniforms(self) -> list[Tensor]:
        """Random numbers in [0, 1) of the piece's shape, for every model."""
        shape, count = self.tensors[0].shape, self.tensors[0].numel()
        return [stream.draw(self.offset, self.offset + count).reshape(shape) for stream in self.streams]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The tensors of one key, piece by piece; they can be iterated any number of times.

    Args:
        shape: shape of the whole tensors.
        ranges: flat range of every piece.
        cut: returns the piece of a range.
    """

    shape: tuple[int, ...]
    ranges: Sequence[tuple[int, int]]
    cut: Callable[[int, int], Piece]

    @property
    def numel(self) -> int:
        """Number of elements of a whole tensor."""
        return math.prod(self.shape)

    def __iter__(self) -> Iterator[Piece]:
        return self.every(1)

    def every(self, step: int) -> Iterator[Piece]:
        """Yield every `step`-th piece, the first one among them, for a look at what the tensors are like."""
        return (self.cut(start, stop) for start, stop in self.ranges[::step])


@dataclass(frozen=True, kw_only=True)
class BoundMethod:
    """A merge method with its parameters for one tensor.

    Args:
        method: the plug-in.
        values: `{parameter: value}`, plain numbers.
    """

    method: MergeMethod
    values: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """Merge whole tensors that are in memory; with a base, the tensors are the models' own, too."""
        inputs = [InMemory.of(tensor) for tensor in tensors]
        origins = None if base is None else [InMemory.of(base)] * len(tensors)
        streams = [Stream(0, "", lambda i=i: bytes([i])) for i in range(len(tensors))]  # type: ignore[misc]
        merged = MergedTensor(
            tuple(tensors[0].shape),
            tensors[0].dtype,
            key="a tensor",
            bound=self,
            inputs=inputs,
            base=None if base is None else InMemory.of(base),
            origins=origins,
            streams=streams,
        )
        return merged.read()


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedTensor(Lazy):
    """The merge of the tensors of one key, computed when it is asked for, piece by piece if its method allows it.

    Args:
        key: name of the tensor, for messages.
        bound: the merge method with its parameters.
        inputs: the tensor in every model.
        base: the tensor in the base model; None if there is none.
        origins: for every model the tensor that its difference is taken from; None if there is no base.
        streams: random numbers of the tensor in every model.
        lookup: whether its rows are those of tokens or classes.
        transposed: whether it is a matrix that is stored as (inputs, outputs), as GPT-2's are.
        input_dtype: dtype that values and differences are rounded to before they are merged; None if they are not.
        models: the models, for messages.
    """

    key: str
    bound: BoundMethod
    inputs: Sequence[Lazy]
    base: Lazy | None = None
    origins: Sequence[Lazy] | None = None
    streams: Sequence[Stream] = ()
    lookup: bool = False
    transposed: bool = False
    input_dtype: torch.dtype | None = None
    models: Sequence[Checkpoint] = ()

    @cached_property
    def _stored(self) -> list[Lazy]:
        """All tensors that are read."""
        return [*self.inputs, *(self.origins or ()), *([] if self.base is None else [self.base])]

    @property
    def lasting(self) -> bool:
        return all(part.lasting for part in self._stored)

    @property
    def kind(self) -> PieceKind:
        """What its pieces hold; methods that ask for `lookup` merge such tensors element by element."""
        method = self.bound.method
        return "elements" if self.lookup and "lookup" in inspect.signature(method.merge).parameters else method.pieces

    @property
    def passes_first(self) -> bool:
        return self.bound.method.prepare is not None and self.kind != "tensors"

    def ready(self) -> Lazy:
        if self.kind == "tensors":
            work = _Work(self, {id(part): InMemory.of(part.read()) for part in self._stored})
            return InMemory.of(work.merge(0, self.numel).reshape(self.shape), owned=True)
        work = _Work(self, {id(part): part.ready() for part in self._stored})
        return _Prepared(self.shape, self.dtype, work)

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.ready().chunk(start, stop)

    def read(self) -> Tensor:
        return self.ready().read() if self.kind == "tensors" else self.assemble()


class _Work:
    """Tensors of one key that are ready to be read, and what is known of them as a whole."""

    def __init__(self, merged: MergedTensor, ready: Mapping[int, Lazy]):
        self.merged, self.method, self.kind = merged, merged.bound.method, merged.kind
        self.inputs = [ready[id(part)] for part in merged.inputs]
        self.base = None if merged.base is None else ready[id(merged.base)]
        self.origins = None if merged.origins is None else [ready[id(part)] for part in merged.origins]
        self.wide = sum_dtype(merged.dtype, *(part.dtype for part in merged._stored))
        if self.base is not None and merged.input_dtype is None:  # signs of sums that nearly cancel decide
            self.wide = torch.float64
        self.values = merged.bound.values
        self.keywords = self.method.keywords_for(self.method.merge, self.values)
        self.asked_for = inspect.signature(self.method.merge).parameters
        self.whole: Any = None
        self.seen = False  # whether all values are known to be finite
        if self.method.prepare is not None:
            keywords = self.method.keywords_for(self.method.prepare, self.values)
            left = dict.fromkeys(self._ranges())

            def cut(start: int, stop: int) -> Piece:
                piece = self.cut(start, stop)
                left.pop((start, stop), None)
                self.seen = not left
                return piece

            pieces = Pieces(shape=merged.shape, ranges=[*left], cut=cut)
            try:
                self.whole = self.method.prepare(pieces, **keywords)
            except CheckpointError as error:
                raise error if merged.key in str(error) else CheckpointError(f"{merged.key}: {error}") from error

    @cached_property
    def row(self) -> int:
        """Number of elements that belong together."""
        shape = self.merged.shape
        return max(1, shape[-1]) if self.kind == "rows" and shape else 1

    def _ranges(self) -> list[tuple[int, int]]:
        numel = self.merged.numel
        step = max(1, lazy.CHUNK // self.row) * self.row if self.kind != "tensors" else max(numel, 1)
        return [(start, min(start + step, numel)) for start in range(0, numel, step)]

    def _shaped(self, flat: Tensor) -> Tensor:
        if self.kind == "tensors":
            return flat.reshape(self.merged.shape)
        return flat.reshape(-1, self.row) if self.kind == "rows" else flat

    def _read(self, part: Lazy, start: int, stop: int) -> Tensor:
        return self._narrow(self._shaped(part.chunk(start, stop))).to(self.wide)

    def _narrow(self, values: Tensor) -> Tensor:
        """Round values, or differences, to the dtype that they have to be rounded to."""
        narrow = self.merged.input_dtype
        return values if narrow is None or narrow == values.dtype else rounded(values, narrow).to(self.wide)

    def cut(self, start: int, stop: int) -> Piece:
        """Return a piece of the tensors, in a dtype wide enough to compute in; CheckpointError for NaN and Inf."""
        tensors = [self._read(part, start, stop) for part in self.inputs]
        base = None
        if self.base is not None and self.origins is not None:
            base = self._read(self.base, start, stop)
            origins = [base if part is self.base else self._read(part, start, stop) for part in self.origins]
            tensors = [self._narrow(tensor - origin) for tensor, origin in zip(tensors, origins, strict=True)]
        if not self.seen and not all(map(all_finite, (*tensors, *([] if base is None else [base])))):
            self._refuse_inputs()
        return Piece(tensors=tensors, base=base, offset=start, streams=self.merged.streams)

    def merge(self, start: int, stop: int) -> Tensor:
        """Return the merge of a flat range, rounded; CheckpointError if it has NaN or Inf in it."""
        piece, dtype = self.cut(start, stop), self.merged.dtype
        values = self._compute(piece)
        out = rounded(values, dtype)
        if not all_finite(out) and self.wide != torch.float64:  # bfloat16 has float32's range, which sums overflow
            values = self._compute(
                replace(
                    piece,
                    tensors=[tensor.double() for tensor in piece.tensors],
                    base=None if piece.base is None else piece.base.double(),
                )
            )
            out = rounded(values, dtype)
        if not all_finite(out):
            raise CheckpointError(
                f"{self.merged.key} of the merge has values that do not fit {dtype} (up to {values.abs().max():.3g}); "
                "write a wider dtype"
            )
        return out.reshape(-1)

    def _compute(self, piece: Piece) -> Tensor:
        filled_in: dict[str, Any] = {
            "base": lambda: piece.base,
            "uniforms": lambda: piece.uniforms,
            "offset": lambda: piece.offset,
            "shape": lambda: self.merged.shape,
            "lookup": lambda: self.merged.lookup,
            "transposed": lambda: self.merged.transposed,
            "whole": lambda: self.whole,
        }
        asked = {name: make() for name, make in filled_in.items() if name in self.asked_for}
        merged = self.method.merge(piece.tensors, **asked, **self.keywords)
        return merged if piece.base is None else merged + piece.base

    def _refuse_inputs(self) -> None:
        merged = self.merged
        base = [] if merged.base is None else [merged.base]
        in_order = [*base, *merged.inputs, *(part for part in merged.origins or () if part is not merged.base)]
        for part, model in zip(in_order, merged.models, strict=False):
            model.refuse_values(part)
        narrow = self.merged.input_dtype or self.wide
        raise CheckpointError(f"{self.merged.key} has values that do not fit {narrow}; write a wider dtype")


@dataclass(frozen=True, eq=False)
class _Prepared(Lazy):
    """A merged tensor whose chunks cost no more than their share."""

    work: _Work

    @property
    def lasting(self) -> bool:
        return self.work.merged.lasting

    def ready(self) -> Lazy:
        return self

    def chunk(self, start: int, stop: int) -> Tensor:
        row = self.work.row
        first, last = start // row * row, min(-(-stop // row) * row, self.numel)
        return self.work.merge(first, last)[start - first : stop - first]
