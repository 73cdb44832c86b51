"""Spherical interpolation of two models, or of their differences from a base, by weights (mergekit's nuslerp).

Either the whole tensors are vectors with one angle between them, or every row (last axis) is, or every column (all
elements along the first axis). The result is sin((1 − t)Ω)/sin Ω · x₁ + sin(tΩ)/sin Ω · x₂ with t = w₂ / (w₁ + w₂).

Where |cos Ω| is above `collinear`, or a vector is zero, the result is on the straight line (1 − t) x₁ + t x₂: between
opposite vectors there is no arc, and near them rounding decides which arc it is. mergekit leaves the arc only where
sin Ω is below 1e-8, and divides by norms raised to `eps`, so that a zero vector is at right angles to all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import OptionError
from ._deltas import check_number, fill_in
from ._inner_products import BLOCK, blocks, gram_matrix

if TYPE_CHECKING:
    from ..pieces import Pieces

BASE = "optional"
PIECES = "rows"
MERGEKIT = {"collinear": 1.0, "eps": 1e-8}
CANCELLED = 1e-6  # weights whose sum is below this share of the larger one count as equal
LEAST_SQUARED_SINE = 1e-16  # below it the arc is the straight line, whatever `collinear` is


def prepare(pieces: Pieces, *, flatten: bool = True, row_wise: bool = False) -> Tensor | None:
    """Return (‖x₁‖², ⟨x₁, x₂⟩, ‖x₂‖²) in float64: (3,) of whole tensors, (3, columns) of columns, None for rows."""
    return _products((piece.tensors for piece in pieces), pieces.shape, flatten, row_wise) if pieces.numel else None


def merge(
    tensors: Sequence[Tensor],
    *,
    shape: tuple[int, ...] | None = None,
    offset: int = 0,
    whole: Tensor | None = None,
    weights: Sequence[float] | None = None,
    flatten: bool = True,
    row_wise: bool = False,
    collinear: float = 0.9995,
    eps: float = 0.0,
) -> Tensor:
    """Interpolate between two tensors on the arc between them.

    Args:
        tensors: the two models' tensors, or their differences from the base, or whole rows of them.
        shape: shape of the whole tensors; by default that of `tensors`.
        offset: index of the first element in the whole tensors.
        whole: inner products of the whole tensors, from `prepare`; by default those of `tensors`.
        weights: one weight per model, by default equal; weights that cancel count as equal.
        flatten: take every tensor as one vector.
        row_wise: without `flatten`, take vectors along the first axis; by default they are along the last one.
        collinear: vectors whose cosine is above it, or below its negative, are interpolated linearly.
        eps: norms are raised to it; 0 to interpolate linearly where a vector is zero.

    Raises:
        OptionError: more or fewer than two models, weights that are not one per model, a `collinear` that is not from
            0 to 1, or a negative eps.

    Example: weights 1 and 3 of (1, 0) and (0, 1) give t = 0.75, so sin 22.5° = 0.3827 and sin 67.5° = 0.9239.
    """
    a, b = _pair(tensors)
    check_number("nuslerp", "collinear", collinear, low=0, high=1)
    check_number("nuslerp", "eps", eps, low=0)
    first, second = fill_in("nuslerp", "weight", weights, 2, default=1.0)
    total = first + second
    t = second / total if abs(total) > CANCELLED * max(abs(first), abs(second)) else 0.5
    if t in (0, 1) or not a.numel():
        return tensors[int(t == 1)]
    shape = tuple(a.shape) if shape is None else shape
    if whole is None:
        whole = _products([tensors], shape, flatten, row_wise)
    if whole is None:
        x, y = a.double(), b.double()
        whole = torch.stack([(u * v).sum(-1, keepdim=True) for u, v in ((x, x), (x, y), (y, y))])
    elif whole.ndim == 2:
        whole = _columns_of(whole, shape, offset, tuple(a.shape))
    total_share, share_of_b = (share.to(a.dtype) for share in _shares(whole, t, collinear, eps))
    return (b - a).mul_(share_of_b).add_(a * total_share)  # equal tensors on a straight line stay what they are


def _pair(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(tensors) != 2:
        raise OptionError(f"nuslerp merges 2 models, got {len(tensors)}; use multislerp or karcher for more")
    return tensors


def _products(
    parts: Iterable[Sequence[Tensor]], shape: tuple[int, ...], flatten: bool, row_wise: bool
) -> Tensor | None:
    """Return the inner products of whole tensors or of their columns; None if they are those of rows."""
    if flatten or len(shape) < 2:
        gram = gram_matrix(_pair(part) for part in parts)
        return gram[[0, 0, 1], [0, 1, 1]]
    if not row_wise:
        return None
    width = math.prod(shape[1:])
    sums = torch.zeros(3, width, dtype=torch.float64)
    for block in blocks((_pair(part) for part in parts), max(1, BLOCK // max(width, 1)) * max(width, 1)):
        x, y = (tensor.double().reshape(-1, width) for tensor in block)
        sums += torch.stack([(u * v).sum(0) for u, v in ((x, x), (x, y), (y, y))]).cpu()
    return sums


def _columns_of(products: Tensor, shape: tuple[int, ...], offset: int, piece: tuple[int, ...]) -> Tensor:
    """Return the products (3, columns) of the columns that a piece of whole rows has its elements in."""
    width = shape[-1]
    if len(shape) == 2:
        return products.unsqueeze(1)
    by_row = products.reshape(3, -1, width)
    rows = (offset // width + torch.arange(math.prod(piece) // width)) % by_row.shape[1]
    return by_row[:, rows].reshape(3, *piece)


def _shares(products: Tensor, t: float, collinear: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the coefficients of x₁ and x₂, which is 1 on a straight line, and the second of them."""
    norms = products[[0, 2]].sqrt().clamp_(min=eps)
    cosine = (products[1] / (norms[0] * norms[1])).clamp_(-1, 1)
    arc = (cosine.abs() <= collinear) & (1 - cosine * cosine > LEAST_SQUARED_SINE)  # false for 0/0, too
    angle = torch.where(arc, cosine, 0.0).acos()
    first, second = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
    return torch.where(arc, first + second, 1.0), torch.where(arc, second, t)
