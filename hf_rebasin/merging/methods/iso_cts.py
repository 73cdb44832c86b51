"""Iso-CTS: Iso-C with directions that are reserved for single models (Marczak et al. 2025, arXiv 2502.04959).

Of r directions, s = T · round((r − ⌊f r⌋) / T) are shared out among the T models that moved the matrix, and the
c = r − s strongest directions (U_c, V_c) of Σ wᵢ δᵢ are common. Model i adds the s/T strongest directions (Uᵢ, Vᵢ) of
(I − U_c U_cᵀ) wᵢ δᵢ. Then

    y = b + λ · mean(S) polar([U₁ … U_T, U_c]) polar([V₁ … V_T, V_c])ᵀ,

where S are the singular values of all directions that were kept, and polar(M) = U Vᵀ of M = U S Vᵀ.

As published, r is the smaller side of the matrix, so differences of low rank (by LoRA) would have common directions
only, and arbitrary ones among them. Here r is the rank of all differences side by side, if that is smaller: the same
counts as in the core space of the adapters (2509.17786).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._deltas import check_number, sum_weighted
from ._spectral import TOLERANCE, check_tolerance, merge_matrices, orthogonalize, singular_triples

BASE = "required"
KEEPS = None


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    common_fraction: float = 0.8,
    tolerance: float = TOLERANCE,
    transposed: bool = False,
    lookup: bool = False,
) -> Tensor:
    """Return common and single models' directions, made orthonormal, times the mean of their singular values and λ.

    Vectors, embeddings and heads get λ times the mean of the differences; convolutions are (outputs, all else).

    Args:
        tensors: δᵢ of every model.
        weights: wᵢ, 0 or more; by default 1.
        lambda_: λ.
        common_fraction: f, the share of directions that are common.
        tolerance: singular values below this share of the largest one (of all differences side by side) count as 0.
            Differences by LoRA that were rounded to bfloat16 need about 0.01.
        transposed: whether matrices are stored as inputs × outputs (GPT-2's Conv1D).
        lookup: whether the rows of the tensors are those of tokens or classes.

    Raises:
        OptionError: weights that are not one per model, are negative or all 0; a λ that is not finite; a tolerance
            that is not between 0 and 0.5, or a common_fraction that is not between 0 and 1.

    Example: f = 0.5, r = 4 and T = 2 give s = 2 · round((4 − 2) / 2) = 2 and c = 2. For diag(6, 4, 2, 0) and
    diag(0, 2, 1, 3) the sum is diag(6, 6, 3, 3), whose first two axes are common. The first model adds 2 along the
    third axis, the second one 3 along the fourth. The mean of 6, 6, 2 and 3 is 4.25, on all four axes.
    """
    check_tolerance("iso_cts", tolerance)
    check_number("iso_cts", "common_fraction", common_fraction, low=0, high=1)

    def merge_matrix(matrices: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
        matrices = [weight * matrix for weight, matrix in zip(weights, matrices, strict=True)]
        rank, largest = _joint_rank(matrices, tolerance)
        share = min(round((rank - int(common_fraction * rank)) / len(matrices)), rank // len(matrices))
        common = rank - share * len(matrices)
        total = sum_weighted(matrices, [1.0] * len(matrices), normalize=False, lambda_=1.0)
        left, values, right = singular_triples(total, tolerance, common, largest)
        triples = [
            singular_triples(matrix - left @ (left.mT @ matrix), tolerance, share, largest) for matrix in matrices
        ]
        triples.append((left, values, right))
        strength = torch.cat([triple[1] for triple in triples])
        if not len(strength):
            return torch.zeros_like(total)
        lefts, rights = (torch.cat([triple[side] for triple in triples], 1) for side in (0, 2))
        return orthogonalize(lefts) @ orthogonalize(rights).mT * strength.mean()

    return merge_matrices("iso_cts", tensors, weights, lambda_, lookup, merge_matrix, transposed)


def _joint_rank(matrices: Sequence[Tensor], tolerance: float) -> tuple[int, float]:
    """Return how many directions the matrices span side by side, on their shorter side, and the largest value."""
    rows, columns = matrices[0].shape
    gram = sum(matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix for matrix in matrices)
    values = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()
    largest = values[-1].item()
    return (int((values > tolerance * largest).sum()) if tolerance else len(values)), largest
