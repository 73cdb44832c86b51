"""The weighted mean direction of any number of models, with their weighted mean length (mergekit's multislerp).

y = m̂ Σ wᵢ‖xᵢ‖ with m = Σ wᵢ xᵢ/‖xᵢ‖ and m̂ = m/‖m‖, of tensors or of their differences from a base. It is computed
from the inner products of the tensors.

Where the mean direction is unsettled, the result is Σ wᵢ xᵢ, the straight line: if a tensor of nonzero weight is zero;
if all pairs have |cos| > `collinear`; if directions cancel, ‖m‖² < ½(1 − `collinear`) (Σ|wᵢ|)², as in two opposite
tensors of equal weights. So tensors that no model moved stay the base's. mergekit adds `eps` to the norms instead;
where ‖m‖ < `eps` it takes the straight line for two models and stops for more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import CheckpointError, OptionError
from ._deltas import NEGLIGIBLE, check_number, fill_in
from ._inner_products import combine, gram_matrix, unit_gram

if TYPE_CHECKING:
    from ..pieces import Pieces

BASE = "optional"
PIECES = "elements"
MERGEKIT = {"collinear": 1.0, "eps": 1e-8}


def prepare(
    pieces: Pieces,
    *,
    weights: Sequence[float] | None = None,
    normalize_weights: bool = True,
    collinear: float = 0.9995,
    eps: float = 0.0,
) -> list[float] | None:
    """Return the coefficients of the tensors in their merge; see `merge` for the parameters."""
    if not pieces.numel:
        return None
    gram = gram_matrix(piece.tensors for piece in pieces)
    return _coefficients(gram, weights, normalize_weights, collinear, eps, scalar=not pieces.shape)


def merge(
    tensors: Sequence[Tensor],
    *,
    whole: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    normalize_weights: bool = True,
    collinear: float = 0.9995,
    eps: float = 0.0,
) -> Tensor:
    """Return m̂ Σ wᵢ‖xᵢ‖, the mean direction with the mean length.

    Args:
        tensors: one tensor per model, or its difference from the base, or pieces of them.
        whole: coefficients from `prepare`; by default those that follow from `tensors`.
        weights: one weight per model; by default equal.
        normalize_weights: divide the weights by their sum.
        collinear: take the straight line if all cosines are above it or below its negative, or directions cancel.
        eps: number added to the norms, and length of m below which directions cancel; 0 for the rule of `collinear`.

    Raises:
        OptionError: weights that are not one per model, or that sum to 0 and cannot be normalised; a `collinear` that
            is not from 0 to 1, or a negative eps.
        CheckpointError: with eps above 0, directions of three or more models that cancel.

    Example: (2, 0) and (0, 4), equal weights: m = (½, ½), the mean length is 3, so the result is (2.1213, 2.1213).
    """
    if whole is None:
        scalar = tensors[0].ndim == 0
        whole = _coefficients(gram_matrix([tensors]), weights, normalize_weights, collinear, eps, scalar=scalar)
    return combine(tensors, whole)


def _coefficients(
    gram: Tensor,
    weights: Sequence[float] | None,
    normalize_weights: bool,
    collinear: float,
    eps: float,
    *,
    scalar: bool,
) -> list[float]:
    """Return cᵢ such that the merge is Σ cᵢ xᵢ, given the inner products of the tensors.

    Tensors without axes (`scalar`) have only two directions, so they may cancel.
    """
    check_number("multislerp", "collinear", collinear, low=0, high=1)
    check_number("multislerp", "eps", eps, low=0)
    weights = fill_in("multislerp", "weight", weights, len(gram), default=1.0)
    if normalize_weights:
        total = math.fsum(weights)
        if abs(total) <= NEGLIGIBLE * max(map(abs, weights)):
            raise OptionError(f"multislerp got weights {weights}, which sum to 0 and cannot be normalised")
        weights = [weight / total for weight in weights]
    if eps > 0 and len(weights) == 1:
        return [1.0]
    shares, norms = torch.tensor(weights, dtype=torch.float64), gram.diagonal().sqrt()
    if not norms.isfinite().all():
        return weights
    shares_by_norm = torch.where(norms + eps > 0, shares / (norms + eps), 0.0)
    resultant = float((norms * shares_by_norm) @ unit_gram(gram) @ (norms * shares_by_norm))  # ‖m‖²
    if eps > 0 and resultant <= eps**2:
        if len(weights) > 2 and not scalar:
            raise CheckpointError(
                f"multislerp: the directions of a tensor in {len(weights)} models cancel (their weighted sum has "
                f"length {math.sqrt(max(resultant, 0)):.3g}, below eps = {eps:g}); with eps = 0 they are added up"
            )
        return weights
    if eps == 0 and _on_a_line(gram, shares, resultant, collinear):
        return weights
    return (shares_by_norm * ((shares * norms).sum() / math.sqrt(resultant))).tolist()


def _on_a_line(gram: Tensor, shares: Tensor, resultant: float, collinear: float) -> bool:
    """Whether tensors of nonzero weight are zero, all collinear, or of directions that cancel."""
    units = unit_gram(gram)[shares != 0][:, shares != 0]
    return (
        bool((units.diagonal() == 0).any())
        or bool((units.abs() > collinear).all())
        or resultant <= (1 - collinear) / 2 * float(shares.abs().sum()) ** 2
    )
