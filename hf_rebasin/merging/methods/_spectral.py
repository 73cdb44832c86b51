"""Matrices for the merge methods that work on singular directions, and the linear algebra that these methods share.

A matrix is a tensor of two axes, a convolution as (outputs, all else), or each of the experts of a stack. Vectors,
embeddings, output heads and what has only one row or column get the mean of the differences instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import OptionError
from ._deltas import check_number, fill_in, sum_weighted

TOLERANCE = 1e-5  # singular values below this share of the largest one count as 0
GRAM_TOLERANCE = 1e-5  # from here on, eigenvectors of M Mᵀ are as good as singular vectors, to 1e-6
DEPENDENT = 1e-7  # columns that differ by less, which is the precision of float32, are linearly dependent
LEAST_RIDGE = 1e-10  # of the trace: with less, rounding may leave a Gram matrix without a Cholesky factor


class MergeMatrix(Protocol):
    """Merges the matrices of models that have moved and whose weight is not 0."""

    def __call__(self, matrices: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
        """Return the merged matrix; all are divided by `scale`, a power of two, so that squares do not overflow."""


def merge_matrices(
    method: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None,
    lambda_: float,
    lookup: bool,
    merge_matrix: MergeMatrix,
    transposed: bool = False,
) -> Tensor:
    """Merge the matrices in tensors by a function, and all else by the weighted mean; multiply by λ.

    Args:
        method: name of the method, for messages.
        tensors: differences from the base, one per model.
        weights: weights of the models, 0 or more; by default 1 for each.
        lambda_: factor of the result.
        lookup: whether the rows of the tensors are those of tokens or classes.
        merge_matrix: merges matrices, outputs × inputs.
        transposed: whether matrices are stored as inputs × outputs, as in GPT-2.

    Raises:
        OptionError: weights that are not one per model, are negative, not finite or all 0; a λ that is not finite.
    """
    weights = fill_in(method, "weight", weights, len(tensors), default=1.0, low=0)
    if not any(weights):
        raise OptionError(f"{method} got weights {weights}; give a weight above 0 to at least one model")
    check_number(method, "lambda", lambda_)
    stacks = [tensor if lookup else _as_stack(tensor) for tensor in tensors]
    if lookup or any(stack is None for stack in stacks):
        return sum_weighted(tensors, weights, normalize=True, lambda_=lambda_)
    merged = []
    for matrices in zip(*(stack.unbind() for stack in stacks if stack is not None), strict=True):
        moved = [(m.mT if transposed else m, w) for m, w in zip(matrices, weights, strict=True) if w and m.any()]
        if not moved:
            merged.append(torch.zeros_like(matrices[0]))
            continue
        scale = 2.0 ** (max(math.frexp(matrix.abs().max().item())[1] for matrix, _ in moved) - 1)
        result = merge_matrix([matrix / scale for matrix, _ in moved], [weight for _, weight in moved], scale)
        merged.append((result.mT if transposed else result) * (scale * lambda_))
    return torch.stack(merged).reshape(tensors[0].shape)


def _as_stack(tensor: Tensor) -> Tensor | None:
    """Return the matrices in a tensor as (matrices, rows, columns); None if it has no matrix worth the name.

    Three axes are a stack of experts if the first one is the shorter one of the outer two, and otherwise a convolution
    in one dimension. With a first axis of 1 they are a table of positions or classes.
    """
    if tensor.ndim < 2 or tensor.numel() == 0 or (tensor.ndim == 3 and tensor.shape[0] == 1):
        return None
    stack = tensor if tensor.ndim == 3 and tensor.shape[0] <= tensor.shape[2] else tensor.flatten(1).unsqueeze(0)
    return stack if min(stack.shape[1:]) > 1 else None


def check_tolerance(method: str, tolerance: float) -> None:
    """Raise OptionError for a tolerance that is not a share of the largest singular value."""
    check_number(method, "tolerance", tolerance, low=0, high=0.5)


def check_ridge(method: str, ridge: float) -> None:
    """Raise OptionError for a ridge with which a sum of Gram matrices may stay singular."""
    check_number(method, "ridge", ridge, low=LEAST_RIDGE)


def singular_triples(
    matrix: Tensor, tolerance: float, limit: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, S, V) with U diag(S) Vᵀ near the matrix, from the largest singular value down.

    With a tolerance of 1e-5 or more they come from the eigenvectors of the smaller one of M Mᵀ and MᵀM, which takes
    less than half the time of an SVD; squaring costs half the digits, but only in directions that are cut off.

    Args:
        matrix: (rows, columns).
        tolerance: singular values that are not above this share of `scale` are cut off; 0 keeps all.
        limit: the most singular values to keep.
        scale: by default the largest singular value.

    Returns:
        U (rows, k), S (k), V (columns, k).
    """
    if tolerance < GRAM_TOLERANCE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = _kept(values, tolerance, limit, scale)
        return left[:, :kept], values[:kept], right[:kept].mT
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix)
    values = squares.flip(0).clamp_(min=0).sqrt_()
    kept = _kept(values, tolerance, limit, scale)
    values, near = values[:kept], vectors.flip(1)[:, :kept]
    far = (matrix.mT if wide else matrix) @ near / values
    return (near, values, far) if wide else (far, values, near)


def _kept(values: Tensor, tolerance: float, limit: int | None, scale: float | None) -> int:
    """Return how many of the descending singular values are kept."""
    count = len(values)
    if tolerance > 0:
        count = int((values > tolerance * (values[0] if scale is None else scale)).sum())
    return count if limit is None else min(count, limit)


def orthogonalize(columns: Tensor) -> Tensor:
    """Return the polar factor U Vᵀ of M = U S Vᵀ: the nearest matrix whose columns (or rows, if wide) are orthonormal.

    Directions with singular values near 0 are arbitrary and left out, so equal columns share one direction: (1, 0) and
    (1, 0) become (0.71, 0) and (0.71, 0). As in `singular_triples`, eigenvectors replace the SVD where they are as
    good.
    """
    tall = columns.shape[0] >= columns.shape[1]
    squares, vectors = torch.linalg.eigh(columns.mT @ columns if tall else columns @ columns.mT)
    if len(squares) and squares[0] > GRAM_TOLERANCE**2 * squares[-1]:
        root = (vectors / squares.sqrt()) @ vectors.mT
        return columns @ root if tall else root @ columns
    left, _, right = singular_triples(columns, DEPENDENT)
    return left @ right.mT


class RidgeSystem:
    """Solves X (Σ DᵢᵀDᵢ + ρI) = R for X, by the smaller one of two Cholesky factors.

    With D, the blocks Dᵢ on top of each other, R is L D for some L, and X = R (DᵀD + ρI)⁻¹ = L (D Dᵀ + ρI)⁻¹ D. If D
    has fewer rows than columns, right sides are held as L, and otherwise as R.

    Args:
        blocks: Dᵢ, of one shape.
        ridge: ρ, above 0.
    """

    def __init__(self, blocks: Sequence[Tensor], ridge: float):
        self.blocks, self.rows = blocks, torch.cat(list(blocks))
        self.dual = self.rows.shape[0] < self.rows.shape[1]
        self.gram = self.rows @ self.rows.mT if self.dual else self.rows.mT @ self.rows
        ridged = self.gram.clone()
        ridged.diagonal().add_(ridge)
        self.root = torch.linalg.cholesky(ridged)

    def hold(self, left: Tensor) -> Tensor:
        """Return L D as a right side."""
        return left if self.dual else left @ self.rows

    def multiply(self, matrix: Tensor) -> Tensor:
        """Return M DᵀD as a right side."""
        return matrix @ self.rows.mT if self.dual else matrix @ self.gram

    def combine(self, matrices: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        """Return Σ Mᵢ DᵢᵀDᵢ + Σ cᵢ Dᵢ as a right side, for shares cᵢ."""
        pairs = list(zip(matrices, self.blocks, shares, strict=True))
        if not self.dual:
            terms = (torch.linalg.multi_dot([m, block.mT, block]).add_(block, alpha=c) for m, block, c in pairs)
            return functools.reduce(Tensor.add_, terms)
        coefficients = [matrix @ block.mT for matrix, block, _ in pairs]
        for coefficient, share in zip(coefficients, shares, strict=True):
            coefficient.diagonal().add_(share)
        return torch.cat(coefficients, 1)

    def expand(self, right: Tensor) -> Tensor:
        """Return a right side as a matrix."""
        return right @ self.rows if self.dual else right

    def solve(self, right: Tensor) -> Tensor:
        """Return X for a right side."""
        solved = torch.cholesky_solve(right.mT, self.root).mT
        return solved @ self.rows if self.dual else solved
