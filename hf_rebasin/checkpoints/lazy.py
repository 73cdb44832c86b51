"""Lazy tensors: shape and dtype are known, values are read or computed when they are asked for.

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
    """A tensor whose values are read or computed when they are asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def passes_first(self) -> bool:
        """Whether `ready` passes over all values, but keeps little of them; it is worth doing in advance then."""
        return False

    @property
    @abstractmethod
    def lasting(self) -> bool:
        """Whether its values stay the same: a file's do, a tensor that somebody else holds may change."""

    @abstractmethod
    def ready(self) -> Lazy:
        """Return the tensor in a form whose chunks cost no more than their share."""

    @abstractmethod
    def chunk(self, start: int, stop: int) -> Tensor:
        """Return the elements `start` to `stop` of the flat tensor; call it on what `ready` returned."""

    def chunks(self) -> Iterator[Tensor]:
        """Yield all elements in order, chunk by chunk."""
        ready = self.ready()
        for start in range(0, self.numel, CHUNK):
            yield ready.chunk(start, min(start + CHUNK, self.numel))

    def read(self) -> Tensor:
        """Return the whole tensor, contiguous."""
        return self.ready().chunk(0, self.numel).reshape(self.shape)

    def assemble(self) -> Tensor:
        """Return the whole tensor, computed chunk by chunk."""
        flat, at = torch.empty(self.numel, dtype=self.dtype), 0
        for chunk in self.chunks():
            flat[at : at + len(chunk)] = chunk
            at += len(chunk)
        return flat.reshape(self.shape)


@dataclass(frozen=True)
class InMemory(Lazy):
    """A tensor in memory."""

    tensor: Tensor
    owned: bool = False  # whether nobody else can change it

    @staticmethod
    def of(tensor: Tensor, owned: bool = False) -> InMemory:
        """Wrap a tensor; `owned` promises that nobody else changes it."""
        return InMemory(tuple(tensor.shape), tensor.dtype, tensor, owned)

    @property
    def lasting(self) -> bool:
        return self.owned

    def ready(self) -> Lazy:
        plain = self.tensor.detach().resolve_conj().resolve_neg().contiguous()
        return InMemory(self.shape, self.dtype, plain, self.owned)

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.tensor.reshape(-1)[start:stop]

    def owned_copy(self) -> InMemory:
        """Return a copy that nobody else can change."""
        return InMemory.of(self.tensor.detach().clone(), owned=True)

    def read(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Computed(Lazy):
    """A tensor computed from others, all of each at once, or chunk by chunk where the computation is elementwise."""

    inputs: Sequence[Lazy]
    compute: Callable[[Sequence[Tensor]], Tensor]
    elementwise: bool = False

    @property
    def lasting(self) -> bool:
        return all(part.lasting for part in self.inputs)

    def ready(self) -> Lazy:
        if self.elementwise:
            return Computed(self.shape, self.dtype, [part.ready() for part in self.inputs], self.compute, True)
        return InMemory.of(self.compute([part.read() for part in self.inputs]), owned=True)

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.compute([part.chunk(start, stop) for part in self.inputs])

    def read(self) -> Tensor:
        return self.assemble() if self.elementwise else self.ready().read()


@dataclass(frozen=True)
class Absent(Lazy):
    """A tensor whose shape and dtype are known, but whose values were not fetched."""

    where: str

    @property
    def lasting(self) -> bool:
        return True

    def ready(self) -> Lazy:
        raise CheckpointError(
            f"{self.where} was opened for planning, with shapes alone, but its values are needed; open it with "
            f"values, or download it first (hf download {self.where})"
        )

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.ready().chunk(start, stop)


class Tensors(Mapping[str, Tensor]):
    """`{name: tensor}`, each read or computed when it is asked for; `parts` holds the lazy tensors themselves."""

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


def lazy_parts(tensors: Mapping[str, Tensor]) -> Mapping[str, Lazy]:
    """Return the lazy tensors of a mapping, without reading any."""
    return tensors.parts if isinstance(tensors, Tensors) else {name: InMemory.of(t) for name, t in tensors.items()}


def pin_parts(parts: Mapping[str, Lazy]) -> Tensors:
    """Return lazy tensors as a mapping; whatever depends on a tensor that may change is computed now."""

    def pin(part: Lazy) -> Lazy:
        return part if part.lasting or isinstance(part, InMemory) else InMemory.of(part.read(), owned=True)

    return Tensors({name: pin(part) for name, part in parts.items()})
