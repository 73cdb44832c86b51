"""Iso-C: give all singular directions of the summed differences the same strength (Marczak et al. 2025, 2502.04959).

A sum of differences from the base is strong in a few directions, which belong to the models that moved farthest, and
weak in those that other models need. So, for matrices,

    y = b + λ · mean(S) U Vᵀ,   Σ wᵢ δᵢ = U S Vᵀ.

The sum of the singular values stays, the norm shrinks. λ is usually chosen on validation data, such as 1.5.

As published, directions with singular values near 0 are raised to the mean, too. They are arbitrary, and most of them
are of this kind if models were fine-tuned by LoRA or for few steps; so here they stay 0, and the mean is over the
others. With a tolerance of 0 the published rule holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._deltas import sum_weighted
from ._spectral import TOLERANCE, check_tolerance, merge_matrices, singular_triples

BASE = "required"
KEEPS = None


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    tolerance: float = TOLERANCE,
    lookup: bool = False,
) -> Tensor:
    """Return the polar factor of Σ wᵢ δᵢ times the mean of its singular values, times λ.

    Vectors, embeddings and heads get λ times the mean of the differences; convolutions are (outputs, all else).

    Args:
        tensors: δᵢ of every model.
        weights: wᵢ, 0 or more; by default 1.
        lambda_: λ.
        tolerance: singular values below this share of the largest one stay 0. Differences by LoRA that were rounded
            to bfloat16 need about 0.01; with 0, all directions get the mean.
        lookup: whether the rows of the tensors are those of tokens or classes.

    Raises:
        OptionError: weights that are not one per model, are negative or all 0; a λ that is not finite; a tolerance
            that is not between 0 and 0.5.

    Example: diag(5, 0, 0) and diag(0, 1, 0) sum to diag(5, 1, 0), which becomes diag(3, 3, 0) by the mean of 5 and 1.
    """
    check_tolerance("iso_c", tolerance)

    def merge_matrix(matrices: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
        total = sum_weighted(matrices, weights, normalize=False, lambda_=1.0)
        left, values, right = singular_triples(total, tolerance)
        return left @ right.mT * (values.mean() if len(values) else 0.0)

    return merge_matrices("iso_c", tensors, weights, lambda_, lookup, merge_matrix)
