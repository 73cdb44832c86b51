"""Which dtype values are computed in, and how they are rounded to the one they are stored in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else float64."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf; one pass, without a mask of the size of the tensor."""
    if not values.numel() or math.isfinite(values.sum().item()):  # neither is ever lost in a sum, and sums are quick
        return True
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of a dtype, ties to even.

    torch goes from float64 to half precision by way of float32, and so rounds twice. Rounding to odd on the way keeps
    what decides a tie: of the two float32 around a value that is none itself, the one with an odd last bit (Boldo and
    Melquiond 2008).
    """
    if values.dtype is not torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    near = values.float()
    beyond = values - near
    even = near.view(torch.int32) & 1 == 0
    odd = torch.nextafter(near, torch.copysign(torch.full_like(near, torch.inf), beyond.float()))
    return torch.where((beyond != 0) & even & near.isfinite(), odd, near).to(dtype)


def laid_out(x: Tensor) -> Tensor:
    """The same numbers as torch lays them out: where they begin in memory decides how products are rounded."""
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


@contextmanager
def one_thread() -> Iterator[None]:
    """Chunks are small: the threads that work on one spend their time on waiting for each other.

    Reading and computing one chunk while another is hashed keeps two cores busy, and sums do not hang on how many
    threads there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
