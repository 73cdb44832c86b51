"""A mean of fine-tuned models, moved towards their base the more the less they agree (Jang et al. 2024, 2403.19522).

y = b + t Σ δᵢ / T with t = T cos θ / (1 + (T − 1) cos θ), where cos θ is the mean of the cosines between the
differences δᵢ of T models. t = 1 if all of them are equal, and 0 if they are at right angles. Cosines of differences
that are zero count as 0. We clip t to [0, 1]: differences that point away from each other would move the result beyond
the base. mergekit does not, and raises products of norms to 1e-6 (`floor`), so t shrinks where differences are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import OptionError
from ._deltas import check_number
from ._inner_products import combine, gram_matrix

if TYPE_CHECKING:
    from ..pieces import Pieces

BASE = "required"
PIECES = "rows"
MERGEKIT = {"clip": False, "floor": 1e-6}
LEAST_DIVISOR = 1e-6  # of t; below it t is 0


def prepare(pieces: Pieces, *, filter_wise: bool = False, clip: bool = True, floor: float = 0.0) -> Tensor | None:
    """Return t of the whole tensors, or None if every row has its own; see `merge` for the parameters."""
    if filter_wise or not pieces.numel:
        return None
    return _ratio(gram_matrix(piece.tensors for piece in pieces), clip, floor)


def merge(
    tensors: Sequence[Tensor],
    *,
    whole: Tensor | None = None,
    filter_wise: bool = False,
    clip: bool = True,
    floor: float = 0.0,
) -> Tensor:
    """Return t Σ δᵢ / T, the difference of the merge from the base.

    Args:
        tensors: the differences of two or more models from the base, or whole rows of them.
        whole: t from `prepare`; by default the one that follows from `tensors`.
        filter_wise: give every row (last axis) its own angle and t.
        clip: clip t to [0, 1].
        floor: products of norms are raised to it.

    Raises:
        OptionError: fewer than two models beside the base, or a negative floor.

    Example: (1, 0) and (1, 1) are at 45°: t = 2 * 0.7071 / 1.7071 = 0.8284, so the result is (0.8284, 0.4142).
    """
    if len(tensors) < 2:
        raise OptionError(f"model_stock merges 2 models or more beside the base, got {len(tensors)}; add one")
    check_number("model_stock", "floor", floor, low=0)
    if filter_wise:
        rows = [tensor.double() for tensor in tensors]
        products = [[(x * y).sum(-1, keepdim=True) for y in rows] for x in rows]
        ratio = _ratio(torch.stack([torch.stack(row) for row in products]), clip, floor)
    else:
        ratio = _ratio(gram_matrix([tensors]), clip, floor) if whole is None else whole
    mean = combine(tensors, [1 / len(tensors)] * len(tensors))
    return mean.mul_(ratio.to(mean.dtype))


def _ratio(gram: Tensor, clip: bool, floor: float) -> Tensor:
    """Return t, given the inner products of the differences, (models, models, …)."""
    models = len(gram)
    cosines = torch.zeros_like(gram[0, 0])
    for i, j in itertools.combinations(range(models), 2):
        norms = (gram[i, i].sqrt() * gram[j, j].sqrt()).clamp_(min=floor)
        cosines += (gram[i, j] / norms).nan_to_num_(0.0).clamp_(-1, 1)  # 0/0 of differences that are zero
    cosine = cosines / (models * (models - 1) / 2)
    divisor = 1 + (models - 1) * cosine
    ratio = torch.where(divisor.abs() < LEAST_DIVISOR, 0.0, models * cosine / divisor)
    return ratio.clamp_(0, 1) if clip else ratio
