"""TSV-M: give every model singular directions of its own (Gargiulo et al. 2025, arXiv 2412.00081).

Of each difference δᵢ = Uᵢ Sᵢ Vᵢᵀ from the base, the k = max(1, ⌊r/T⌋) largest singular values are kept, where r is the
shorter side of the matrix and T the number of models that moved it. As directions of different models disturb each
other, they are replaced by the nearest ones that are orthonormal, all together:

    y = b + λ · polar([U₁ … U_T]) diag(S₁ … S_T) polar([V₁ … V_T])ᵀ,   polar(M) = U Vᵀ of M = U S Vᵀ.

As published, T > r keeps nothing; at least one direction per model is kept here. Directions with singular values near
0, as most are in differences made by LoRA, are arbitrary, and left out. Directions that models have in common share
one direction of the result. So without truncation, equal models give that model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._spectral import TOLERANCE, check_tolerance, merge_matrices, orthogonalize, singular_triples

BASE = "required"
KEEPS = {"truncate": False}


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    truncate: bool = True,
    tolerance: float = TOLERANCE,
    lookup: bool = False,
) -> Tensor:
    """Return the sum of the models' main singular directions, made orthonormal, times λ.

    Vectors, embeddings and heads get λ times the mean of the differences; convolutions are (outputs, all else).

    Args:
        tensors: δᵢ of every model.
        weights: factors wᵢ of Sᵢ, 0 or more; by default 1. A model of weight 0 takes no part.
        lambda_: λ.
        truncate: keep ⌊r/T⌋ directions of each model, or all.
        tolerance: singular values below this share of a model's largest one count as 0. Differences by LoRA that were
            rounded to bfloat16 need about 0.01; with 0, nothing is left out.
        lookup: whether the rows of the tensors are those of tokens or classes.

    Raises:
        OptionError: weights that are not one per model, are negative or all 0; a λ that is not finite; a tolerance
            that is not between 0 and 0.5.

    Example: 2 models and matrices of rank 2 keep one direction each. Of diag(3, 1) and diag(2, 4) these are 3 along
    the first axis and 4 along the second one, which are orthogonal already: the result is diag(3, 4).
    """
    check_tolerance("tsv_m", tolerance)

    def merge_matrix(matrices: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
        limit = max(1, min(matrices[0].shape) // len(matrices)) if truncate else None
        triples = [singular_triples(matrix, tolerance, limit) for matrix in matrices]
        left, right = (torch.cat([triple[side] for triple in triples], 1) for side in (0, 2))
        values = torch.cat([weight * triple[1] for weight, triple in zip(weights, triples, strict=True)])
        return orthogonalize(left) * values @ orthogonalize(right).mT

    return merge_matrices("tsv_m", tensors, weights, lambda_, lookup, merge_matrix)
