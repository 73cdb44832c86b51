"""WUDI: the least interference with what each difference acts on (Cheng et al. 2025, arXiv 2503.08099).

The rows of δᵢ = xᵢ − b lie near the inputs that model i was trained on. So without data, the merge Δ should do to the
rows of δᵢ what δᵢ does:

    min over Δ of Σ wᵢ ‖(Δ − δᵢ) δᵢᵀ‖² / ‖δᵢ‖²,   Δ = (Σ wᵢ δᵢ Gᵢ / ‖δᵢ‖²) (Σ wᵢ Gᵢ / ‖δᵢ‖²)⁻¹,   Gᵢ = δᵢᵀ δᵢ.

It is RegMean with Gram matrices of the differences in place of those of inputs. The publication runs 300 steps of Adam
at a rate of 1e-5 from Σ δᵢ, which moves no entry by more than 0.003, so where it stops depends on the size of δ. Here
the minimum is computed: by two steps Δ ← Δ + (right side − Δ A)(A + ρI)⁻¹ from the mean of the differences, where A is
the matrix above and the ridge ρ is relative to its trace. So equal models give that model, and where no difference has
a component, neither has Δ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._deltas import sum_weighted
from ._spectral import RidgeSystem, check_ridge, merge_matrices

BASE = "required"
STEPS = 2  # after n steps, a direction of eigenvalue λ still has (ρ / (λ + ρ))ⁿ of the mean in it
NEGLIGIBLE = 1e-150  # norms below it, relative to the largest entry of all models, are raised to it


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    ridge: float = 1e-8,
    transposed: bool = False,
    lookup: bool = False,
) -> Tensor:
    """Return the difference that interferes least with the models' differences, times λ.

    Vectors, embeddings and heads get λ times the mean of the differences; convolutions are (outputs, all else).

    Args:
        tensors: δᵢ of every model.
        weights: wᵢ, 0 or more; by default 1.
        lambda_: λ; the minimum is at 1.
        ridge: ρ relative to the trace. A larger one draws weak directions to the mean of the differences.
        transposed: whether matrices are stored as inputs × outputs (GPT-2's Conv1D).
        lookup: whether the rows of the tensors are those of tokens or classes.

    Raises:
        OptionError: weights that are not one per model, are negative or all 0; a λ that is not finite; a ridge below
            1e-10.

    Example: diag(2, 0) and diag(1, 1) act on the first input as 2 and 1, with shares 4/4 and 1/2 of ‖δᵢ‖². The minimum
    is (2 · 1 + 1 · 0.5) / 1.5 = 1.67 there; only the second model acts on the second input, so diag(1.67, 1).
    """
    check_ridge("wudi", ridge)

    def merge_matrix(matrices: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
        norms = [max(torch.linalg.norm(matrix).item(), NEGLIGIBLE) for matrix in matrices]
        units = [(weight**0.5 / norm) * matrix for weight, norm, matrix in zip(weights, norms, matrices, strict=True)]
        system = RidgeSystem(units, ridge * sum(weights))
        right = system.combine(matrices, [0.0] * len(units))
        merged = sum_weighted(matrices, weights, normalize=True, lambda_=1.0)
        for _ in range(STEPS):
            merged += system.solve(right - system.multiply(merged))
        return merged

    return merge_matrices("wudi", tensors, weights, lambda_, lookup, merge_matrix, transposed)
