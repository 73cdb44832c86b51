"""Precision: which dtype values are computed and summed in, and how they are rounded to the one they are stored in.

There are two rules. Whatever runs a model computes in at least float32 (`compute_dtype`). Whatever writes a tensor
sums in float64, for half precision in float32 (`sum_dtype`), and rounds once (`rounded`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return what to compute with such values in: float32, or a wider dtype among them."""
    return max(
        (torch.promote_types(kind, torch.float32) for kind in dtypes),
        key=lambda kind: kind.itemsize,
        default=torch.float32,
    )


def sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return what to sum such values in before one rounding: float32 if all are half precision, else float64."""
    return torch.float32 if all(kind.itemsize < 4 for kind in dtypes) else torch.float64


def widen(x: Tensor) -> Tensor:
    """Return floating-point values in their `compute_dtype`, anything else as it is."""
    return x.to(compute_dtype(x.dtype)) if x.is_floating_point() else x


def all_finite(values: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf, seen in one pass without a mask of its size."""
    if not values.numel() or math.isfinite(values.sum().item()):  # a sum is quick, and never loses either
        return True
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values to the nearest ones of a dtype, ties to even.

    torch converts float64 to half precision by way of float32, and so rounds twice. Rounding to odd on the way (of the
    two float32 neighbours of a value, taking the one whose last bit is odd) keeps what decides a tie (Boldo and
    Melquiond 2008).
    """
    if values.dtype is not torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    near = values.float()
    if dtype is torch.bfloat16:  # two roundings differ from one only where the first ends halfway between two results
        halfway = near.view(torch.int32).bitwise_and(0xFFFF).eq_(0x8000)
        if not halfway.any():
            return near.to(dtype)
        out, places = near.to(dtype), halfway.bool().nonzero(as_tuple=True)
        out[places] = _to_odd(values[places], near[places]).to(dtype)
        return out
    return _to_odd(values, near).to(dtype)


def _to_odd(values: Tensor, near: Tensor) -> Tensor:
    """Return float32 values, given the nearest ones, of the two neighbours of every inexact value the odd one."""
    beyond = values - near
    even = near.view(torch.int32) & 1 == 0
    odd = torch.nextafter(near, torch.copysign(torch.full_like(near, torch.inf), beyond.float()))
    return torch.where((beyond != 0) & even & near.isfinite(), odd, near)


def in_torch_layout(x: Tensor) -> Tensor:
    """Return a tensor contiguous and at a 64-byte boundary, as torch allocates it.

    Where a tensor begins in memory decides how products of it are rounded.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute on one thread: chunks are small, and several threads on one would mostly wait for each other.

    Reading and computing one chunk while another is hashed keeps two cores busy, and sums do not depend on the number
    of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
