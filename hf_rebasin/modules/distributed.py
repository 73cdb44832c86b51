"""Several processes, as `accelerate launch` starts them: each takes its share of the batches, all get one result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import OptionError


@runtime_checkable
class ShardedBatches(Protocol):
    """Batches that can skip those of other processes before they are made."""

    def iter_shard(self, rank: int, world: int) -> Iterator[Any]:
        """Iterate over the batches numbered `rank`, `rank + world`, …"""


@dataclass(frozen=True)
class OwnBatches:
    """Batches of several models, each of which has its own; read as one stream, they come in turns.

    Args:
        of_models: batches for every model, each of which can be read again and again.

    Example: `[*OwnBatches([[1, 2, 3], [10]])]` is `[1, 10, 2, 3]`.
    """

    of_models: Sequence[Iterable[Any]]

    def __post_init__(self) -> None:
        for number, data in enumerate(self.of_models, 1):
            if iter(data) is data:
                raise OptionError(
                    f"data of model {number} is a {type(data).__name__}, which can be read once; give what can be "
                    "read several times, such as a list or a DataLoader"
                )

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.with_owners())

    def with_owners(self) -> Iterator[tuple[int, Any]]:
        """Iterate over pairs of a model's number, from 0, and a batch of it."""
        end = object()
        for batches in zip_longest(*self.of_models, fillvalue=end):
            yield from ((owner, batch) for owner, batch in enumerate(batches) if batch is not end)


def shard_with_owners(data: Iterable[Any]) -> Iterator[tuple[int | None, Any]]:
    """Iterate over the batches of this process, each with the number of its model; None if it belongs to all."""
    if not isinstance(data, OwnBatches):
        return ((None, batch) for batch in shard_batches(data))
    world = world_size()
    return islice(data.with_owners(), torch.distributed.get_rank() if world > 1 else 0, None, world)


def shard_batches(data: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the batches of this process; a DataLoader that accelerate has prepared is sharded already."""
    if not _is_distributed() or type(data).__module__.startswith("accelerate."):
        return iter(data)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return data.iter_shard(rank, world) if isinstance(data, ShardedBatches) else islice(data, rank, None, world)


def cycle_batches(data: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the batches of this process, epoch after epoch; OptionError where there are none."""
    while True:
        empty = True
        for batch in shard_batches(data):
            empty = False
            yield batch
        if empty:
            raise OptionError("the data yielded no batch to this process")


def all_reduce_mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    return _all_reduce(value, "mean")


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    return _all_reduce(value, "sum")


def all_reduce_numbers(values: Sequence[float], device: Any = None) -> list[float]:
    """Sum plain numbers over all processes in float64; `device` is one that the processes can communicate from."""
    if not _is_distributed():
        return list(values)
    total: list[float] = all_reduce_sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
    return total


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over all processes; a missing gradient counts as 0."""
    for parameter in parameters:
        if _is_distributed():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = all_reduce_mean(gradient)


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return not _is_distributed() or torch.distributed.get_rank() == 0


def wait_for_everyone() -> None:
    """Block until all processes have reached this call."""
    if _is_distributed():
        torch.distributed.barrier()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _all_reduce(value: Tensor, reduction: str) -> Tensor:
    """Reduce by torch, as accelerate's own reduce would skip processes that accelerate was not told of."""
    if not _is_distributed():
        return value
    out = value.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(out)
    return out / torch.distributed.get_world_size() if reduction == "mean" else out


def broadcast_object(value: Any) -> Any:
    """Return the main process's value in all processes."""
    if not _is_distributed():
        return value
    objects = [value]
    torch.distributed.broadcast_object_list(objects)
    return objects[0]
