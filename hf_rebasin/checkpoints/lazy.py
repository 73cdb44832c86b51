"""Tensors that are not here yet: shape and dtype are known, values are read or computed when they are asked for.

What streams through a merge are *chunks*: the elements `start` to `stop` of a tensor, flat. A chunk of a stored tensor
is one read, a chunk of an elementwise sum is the sum of chunks, so a merge of any size needs a few chunks of memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError

CHUNK = 1 << 18  # elements; some of them, in float32, fit into a core's cache


@dataclass(frozen=True)
class Lazy(ABC):
    """A tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    @abstractmethod
    def lasting(self) -> bool:
        """Whether it will be the same later on: a file is, a tensor that somebody else holds may be changed."""

    @abstractmethod
    def ready(self) -> Lazy:
        """The same, so that chunks of it cost no more than their share."""

    @abstractmethod
    def chunk(self, start: int, stop: int) -> Tensor:
        """The elements start to stop of the flat tensor; of one that is `ready`."""

    def chunks(self) -> Iterator[Tensor]:
        """All elements in order."""
        ready = self.ready()
        for start in range(0, self.numel, CHUNK):
            yield ready.chunk(start, min(start + CHUNK, self.numel))

    def read(self) -> Tensor:
        """The whole tensor, contiguous."""
        return self.ready().chunk(0, self.numel).reshape(self.shape)


@dataclass(frozen=True)
class Here(Lazy):
    """A tensor in memory."""

    tensor: Tensor
    own: bool = False

    @staticmethod
    def of(tensor: Tensor, own: bool = False) -> Here:
        return Here(tuple(tensor.shape), tensor.dtype, tensor, own)

    @property
    def lasting(self) -> bool:
        return self.own

    def ready(self) -> Lazy:
        plain = self.tensor.detach().resolve_conj().resolve_neg().contiguous()
        return Here(self.shape, self.dtype, plain, self.own)

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.tensor.reshape(-1)[start:stop]

    def kept(self) -> Here:
        """A copy of its own."""
        return Here.of(self.tensor.detach().clone(), own=True)

    def read(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Computed(Lazy):
    """`compute` of other tensors: of all of each at once, or chunk by chunk where it is elementwise.

    With `prepare`, which may look at all chunks of the inputs, it is elementwise only afterwards: `prepare` gives what
    is then computed.
    """

    inputs: Sequence[Lazy]
    compute: Callable[[Sequence[Tensor]], Tensor]
    elementwise: bool = False
    prepare: Callable[[Sequence[Lazy]], Callable[[Sequence[Tensor]], Tensor]] | None = None

    @property
    def lasting(self) -> bool:
        return all(one.lasting for one in self.inputs)

    def ready(self) -> Lazy:
        if self.elementwise:
            inputs = [one.ready() for one in self.inputs]
            compute = self.compute if self.prepare is None else self.prepare(inputs)
            return Computed(self.shape, self.dtype, inputs, compute, True)
        return Here.of(self.compute([one.read() for one in self.inputs]), own=True)

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.compute([one.chunk(start, stop) for one in self.inputs])

    def read(self) -> Tensor:
        if not self.elementwise:
            return self.ready().read()
        whole, at = torch.empty(self.numel, dtype=self.dtype), 0
        for chunk in self.chunks():
            whole[at : at + len(chunk)] = chunk
            at += len(chunk)
        return whole.reshape(self.shape)


@dataclass(frozen=True)
class Absent(Lazy):
    """A tensor whose shape and dtype are known, and whose values are elsewhere."""

    where: str

    @property
    def lasting(self) -> bool:
        return True

    def ready(self) -> Lazy:
        raise CheckpointError(
            f"only shapes of {self.where} are here, as it was opened to plan with, and values are needed; open it "
            f"with them, or fetch it first (hf download {self.where})"
        )

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.ready().chunk(start, stop)


class Tensors(Mapping[str, Tensor]):
    """`{name: tensor}` whose tensors are read or computed each time they are asked for; `parts` are what they are."""

    def __init__(self, parts: Mapping[str, Lazy]):
        self.parts = dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def __repr__(self) -> str:
        return f"Tensors({len(self)} of them)"


def parts_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Lazy]:
    """What the values of a mapping are, without asking for any."""
    return tensors.parts if isinstance(tensors, Tensors) else {name: Here.of(t) for name, t in tensors.items()}


def composed(parts: Mapping[str, Lazy]) -> Tensors:
    """The mapping of tensors to come; what hangs on a tensor that may change is computed now."""

    def settled(part: Lazy) -> Lazy:
        return part if part.lasting or isinstance(part, Here) else Here.of(part.read(), own=True)

    return Tensors({name: settled(part) for name, part in parts.items()})
