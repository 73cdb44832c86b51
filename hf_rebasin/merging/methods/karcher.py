"""The Karcher mean of the models' directions on the sphere, with their mean length (arXiv 2603.04972).

m minimises Σ αᵢ θᵢ², where θᵢ is the angle between m and the unit vector ûᵢ = xᵢ/‖xᵢ‖ and α are the weights divided by
their sum; the result is m Σ αᵢ‖xᵢ‖. It is found by steps along τ = Σ αᵢ θᵢ/sin θᵢ (ûᵢ − cos θᵢ m) on the sphere, from
m ∝ Σ αᵢ ûᵢ, until ‖τ‖ is below `tol`. As m is a combination of the ûᵢ all along, only inner products are needed.

Tensors of a norm up to `eps` have no direction, but count in the length. Where directions cancel, the result is the
straight line Σ αᵢ xᵢ: at the start if ‖Σ αᵢ ûᵢ‖² ≤ ½(1 − `collinear`), as in two opposite tensors, and later if m gets
opposite to a tensor, cos θᵢ < −`collinear`. mergekit starts from one of the tensors then, and rounding decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...errors import OptionError
from ._deltas import check_number, fill_in
from ._inner_products import combine, gram_matrix, unit_gram

if TYPE_CHECKING:
    from ..pieces import Pieces

PIECES = "elements"
MERGEKIT = {"collinear": 1.0, "eps": "tol"}
LEAST_SINE = 1e-8  # below it θ / sin θ is 1 up to rounding
SAME = 1e-14  # directions whose cosines differ from 1 by less are equal up to rounding


def prepare(
    pieces: Pieces,
    *,
    weights: Sequence[float] | None = None,
    max_iter: int = 10,
    tol: float = 1e-5,
    collinear: float = 0.9995,
    eps: float | Literal["tol"] = 0.0,
) -> list[float] | None:
    """Return the coefficients of the tensors in their mean; see `merge` for the parameters."""
    if not pieces.numel:
        return None
    gram = gram_matrix(piece.tensors for piece in pieces)
    return _coefficients(gram, weights, max_iter, tol, collinear, eps)


def merge(
    tensors: Sequence[Tensor],
    *,
    whole: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    max_iter: int = 10,
    tol: float = 1e-5,
    collinear: float = 0.9995,
    eps: float | Literal["tol"] = 0.0,
) -> Tensor:
    """Return the mean of the tensors' directions on the sphere, times their mean length.

    Args:
        tensors: one tensor per model, or pieces of them.
        whole: coefficients from `prepare`; by default those that follow from `tensors`.
        weights: one weight per model, none of them negative; by default equal.
        max_iter: how many steps are taken at most.
        tol: length of a step, in radians, below which none is taken.
        collinear: directions cancel if their mean is as short as that of two with this cosine, negated.
        eps: tensors of a norm up to this have no direction; "tol" for the number that is given as `tol`.

    Raises:
        OptionError: weights that are not one per model, are negative or all 0; a negative `max_iter`, `tol` or `eps`,
            or a `collinear` that is not from 0 to 1.

    Example: (1, 0) and (0, 1) with weights 2 and 1: the mean direction is at 30°, so the result is (0.8660, 0.5).
    """
    if whole is None:
        whole = _coefficients(gram_matrix([tensors]), weights, max_iter, tol, collinear, eps)
    return combine(tensors, whole)


def _coefficients(
    gram: Tensor,
    weights: Sequence[float] | None,
    max_iter: int,
    tol: float,
    collinear: float,
    eps: float | Literal["tol"],
) -> list[float]:
    """Return cᵢ such that the mean is Σ cᵢ xᵢ, given the inner products of the tensors."""
    check_number("karcher", "max_iter", max_iter, low=0)
    check_number("karcher", "tol", tol, low=0)
    check_number("karcher", "collinear", collinear, low=0, high=1)
    eps = tol if eps == "tol" else eps
    check_number("karcher", "eps", eps, low=0)
    weights = fill_in("karcher", "weight", weights, len(gram), default=1.0, low=0)
    total = math.fsum(weights)
    if total == 0:
        raise OptionError(f"karcher got weights {weights}, which sum to 0; give one of them a positive weight")
    line = [weight / total for weight in weights]
    alpha, norms = torch.tensor(line, dtype=torch.float64), gram.diagonal().sqrt()
    steering = (norms > eps) & (alpha > 0)
    if not steering.any() or not norms.isfinite().all():
        return line
    cosines, shares = unit_gram(gram)[steering][:, steering], alpha[steering]
    if steering[alpha > 0].all() and (cosines > 1 - SAME).all():
        return line  # the mean of multiples of one vector
    direction = _find_mean(cosines, shares, max_iter, tol, collinear)
    if direction is None:
        return line
    coefficients = torch.zeros_like(alpha)
    coefficients[steering] = direction * (alpha * norms).sum() / norms[steering]
    return coefficients.tolist()


def _find_mean(cosines: Tensor, alpha: Tensor, max_iter: int, tol: float, collinear: float) -> Tensor | None:
    """Return vᵢ such that m = Σ vᵢ ûᵢ is the Karcher mean of unit vectors; None if they cancel.

    Args:
        cosines: their inner products, (vectors, vectors).
        alpha: their weights.
        max_iter: see `merge`, as are the last two.
        tol: length of a step below which none is taken.
        collinear: when directions cancel.
    """
    squared = float(alpha @ cosines @ alpha)
    if squared <= (1 - collinear) / 2 * float(alpha.sum()) ** 2:
        return None
    v = alpha / math.sqrt(squared)
    for _ in range(max_iter):
        to_mean = (cosines @ v).clamp_(-1, 1)
        if (to_mean < -collinear).any():
            return None
        angles = to_mean.acos()
        pulls = alpha * torch.where(angles.sin() > LEAST_SINE, angles / angles.sin(), 1.0)
        step = pulls - (pulls @ to_mean) * v
        length = math.sqrt(max(float(step @ cosines @ step), 0.0))
        if length <= tol:
            break
        v = math.cos(length) * v + math.sin(length) / length * step
        v /= (v @ cosines @ v).sqrt()
    return v
