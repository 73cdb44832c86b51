"""ACE: RegMean with covariances of inputs that are estimated from the differences (arXiv 2603.02945, CVPR 2026).

The rows of δᵢ = xᵢ − b, minus their mean μᵢ, stand for inputs of model i: Dᵢ = δᵢ − 1 μᵢᵀ and Sᵢ = Dᵢᵀ Dᵢ, with a
ridge εᵢ. For matrices (outputs × inputs),

    W = Σ wᵢ Dᵢ (Sᵢ + εᵢ I) A⁻¹,   A = Σ wᵢ (Sᵢ + εᵢ I) + 1 cᵀ,   c the means of the columns of Σ wᵢ Sᵢ.

Where models moved by very different amounts, that is if the variance of log ‖δᵢ‖² over the models exceeds 0.3 times
its squared mean, Sᵢ and εᵢ are divided by tr Sᵢ, and as published c by the mean of ‖δᵢ‖². With M the mean of all Sᵢ,
the ⌊0.3 r⌋ strongest singular directions of W + Σ wᵢ δᵢ (Sᵢ − M) are then added to W, each with the mean of their
singular values; r is the shorter side.

As published, ε = 0.01 whatever the size of the differences. That is far above most Sᵢ of ordinary fine-tunes (root
mean square 3e-4), so the result is near the plain mean of Dᵢ. Here εᵢ is relative to tr Sᵢ, and c, which is in the
unit of Sᵢ, is not divided once more. And what all rows of δᵢ have in common is lost as published; here the mean of μᵢ
over the models is added again. The parameters `relative` and `keep_mean` choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._deltas import sum_weighted
from ._spectral import LEAST_RIDGE, TOLERANCE, RidgeSystem, check_ridge, merge_matrices, singular_triples

BASE = "required"
KEEPS = None
SPREAD = 0.3  # variance of log ‖δ‖² relative to its squared mean from which models count as heterogeneous
STRONGEST = 0.3  # share of the singular directions that are added if they are
SMALLEST = 1e-300  # so that means of squares can be divided by


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    ridge: float = 0.01,
    relative: bool = True,
    keep_mean: bool = True,
    transposed: bool = False,
    lookup: bool = False,
) -> Tensor:
    """Return the mean of the differences, weighted by what is estimated of the models' inputs, times λ.

    Vectors, embeddings and heads get λ times the mean of the differences; convolutions are (outputs, all else).

    Args:
        tensors: δᵢ of every model.
        weights: wᵢ, 0 or more; by default 1.
        lambda_: λ.
        ridge: ε.
        relative: whether εᵢ is ε tr Sᵢ; false is the published rule, with ε itself.
        keep_mean: add the mean over the models of what all rows of δᵢ have in common.
        transposed: whether matrices are stored as inputs × outputs (GPT-2's Conv1D).
        lookup: whether the rows of the tensors are those of tokens or classes.

    Raises:
        OptionError: weights that are not one per model, are negative or all 0; a λ that is not finite; a ridge below
            1e-10.

    Example: one model, ε = 0.01, and rows (2, 0) and (0, 0), whose mean is (1, 0). So D has the rows (1, 0) and
    (−1, 0), S = diag(2, 0), tr S = 2, and c̄ = (1, 0). A has the rows (2.02 + 1, 0) and (1, 0.02), so W has the rows
    (2.02 / 3.02, 0) = (0.669, 0) and (−0.669, 0), and with the mean the result is (1.669, 0) and (0.331, 0).
    """
    check_ridge("ace", ridge)

    def merge_matrix(matrices: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
        size = matrices[0].shape
        means = [matrix.mean(0) for matrix in matrices]
        centred = [matrix - mean for matrix, mean in zip(matrices, means, strict=True)]
        traces = [matrix.square().sum().item() for matrix in centred]
        squares = [matrix.square().sum().item() for matrix in matrices]
        mean = sum_weighted(means, weights, normalize=True, lambda_=1.0) * keep_mean
        moved = [i for i, trace in enumerate(traces) if trace > LEAST_RIDGE * squares[i]]
        if not moved:  # up to rounding, each model added one row to all rows
            return mean.expand(size).clone()
        spread = _is_heterogeneous([squares[i] for i in moved], scale)
        # a term of model i has the factor f = wᵢ or wᵢ / tr Sᵢ, and enters by √f Dᵢ, whose Gram matrix is f Sᵢ
        factors = [weights[i] / (traces[i] if spread else 1.0) for i in moved]
        ridges = [
            ridge * traces[i] if relative else max(ridge / scale / scale, LEAST_RIDGE * traces[i]) for i in moved
        ]
        rows = [factor**0.5 * centred[i] for factor, i in zip(factors, moved, strict=True)]
        system = RidgeSystem(rows, sum(f * r for f, r in zip(factors, ridges, strict=True)))
        right = system.combine([centred[i] for i in moved], [f**0.5 * r for f, r in zip(factors, ridges, strict=True)])
        column = system.hold(system.rows.sum(1)[None] / size[1])
        if spread and not relative:
            column /= max(sum(squares[i] for i in moved) / len(moved) * scale * scale, SMALLEST)
        # A = B + 1 c̄ᵀ, so R A⁻¹ = Y − (Y 1) zᵀ / (1 + zᵀ1) with Y = R B⁻¹ and z = c̄ᵀ B⁻¹ (Sherman–Morrison)
        solved, bent = system.solve(right), system.solve(column)[0]
        merged = solved - torch.outer(solved.sum(1) / (1 + bent.sum()), bent)
        if spread:
            total = torch.stack([matrices[i] for i in moved]).sum(0) / len(moved)
            moves = system.combine([matrices[i] for i in moved], [0.0] * len(moved)) - system.multiply(total)
            target = merged + system.expand(moves)
            limit = max(1, int(STRONGEST * min(size)))
            left, values, far = singular_triples(target, TOLERANCE, limit)
            merged += left @ far.mT * (values.mean() if len(values) else 0.0)
        return merged + mean

    return merge_matrices("ace", tensors, weights, lambda_, lookup, merge_matrix, transposed)


def _is_heterogeneous(squares: Sequence[float], scale: float) -> bool:
    """Tell whether the logarithms of ‖δᵢ‖² vary much, relative to their mean."""
    logs = [math.log(square) + 2 * math.log(scale) for square in squares]
    mean = sum(logs) / len(logs)
    return sum((log - mean) ** 2 for log in logs) / len(logs) > SPREAD * mean**2
