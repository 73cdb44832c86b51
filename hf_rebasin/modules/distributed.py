"""Several processes, as `accelerate launch` starts them: each takes a share of the batches, all come to the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import OptionError


@runtime_checkable
class Shared(Protocol):
    """Batches that can leave out those of other processes before they are made."""

    def share(self, rank: int, world: int) -> Iterator[Any]:
        """The batches number `rank`, `rank + world`, …"""


def shared_out(data: Iterable[Any]) -> Iterator[Any]:
    """The batches of this process: what accelerate has prepared is shared out already."""
    if not _several() or type(data).__module__.startswith("accelerate."):
        return iter(data)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return data.share(rank, world) if isinstance(data, Shared) else islice(data, rank, None, world)


def endless(data: Iterable[Any]) -> Iterator[Any]:
    """The same, round after round; OptionError where there is none."""
    while True:
        came = False
        for batch in shared_out(data):
            came = True
            yield batch
        if not came:
            raise OptionError("the data gave no batch to this process")


def mean_of_all(value: Tensor) -> Tensor:
    """The mean over all processes."""
    return _reduced(value, "mean")


def sum_of_all(value: Tensor) -> Tensor:
    """The sum over all processes."""
    return _reduced(value, "sum")


def numbers_of_all(values: Sequence[float], device: Any = None) -> list[float]:
    """Plain numbers, summed over all processes in float64; `device` is one that these can talk from."""
    if not _several():
        return list(values)
    total: list[float] = sum_of_all(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
    return total


def averaged(latents: Iterable[Tensor]) -> None:
    """Gradients become their mean over all processes; what one of them has none of counts as 0 there."""
    for latent in latents:
        if _several():
            latent.grad = mean_of_all(torch.zeros_like(latent) if latent.grad is None else latent.grad)


def count() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _several() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return not _several() or torch.distributed.get_rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if _several():
        torch.distributed.barrier()


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _reduced(value: Tensor, how: str) -> Tensor:
    """By torch, which knows of processes that accelerate was not told of: its own reduce would leave them apart."""
    if not _several():
        return value
    out = value.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(out)
    return out / torch.distributed.get_world_size() if how == "mean" else out


def that_of_the_first(value: Any) -> Any:
    """What the first process has, in all of them."""
    if not _several():
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]
