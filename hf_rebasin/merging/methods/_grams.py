"""Merge linear maps by the Gram matrices of their inputs, for RegMean and RegMean++."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.checkpoint import Checkpoint
from ...errors import OptionError
from ...modules.hooks import LayerCalls
from ...modules.layerwise import Change, LayerStep
from ...modules.linear_maps import Affine
from ..fitting import average_tensors, change_modules, nonnegative_shares, refuse_other_owners

ALPHA = 0.9
RIDGE = 1e-6


def average_weights(tensors: Sequence[Tensor], weights: Sequence[float] | None, alpha: float, ridge: float) -> Tensor:
    """Return the weighted average; OptionError if a parameter does not fit."""
    return average_tensors(tensors, _checked_shares(weights, len(tensors), alpha, ridge))


def solve_grams(
    matrices: Sequence[Tensor], grams: Sequence[Tensor], shares: Sequence[float], *, alpha: float, ridge: float
) -> Tensor:
    """Return W = (Σ wᵢ G'ᵢ)⁻¹ Σ wᵢ G'ᵢ Wᵢ with G' = α G + (1 − α) diag G + r I and r = ridge · tr G / n.

    It is computed as W̄ + (Σ wᵢ G'ᵢ)⁻¹ Σ wᵢ G'ᵢ (Wᵢ − W̄), with the average W̄ of the weights. So equal weights stay
    exactly as they are, and W̄ is the result where all inputs are 0.

    Args:
        matrices: the weight in every model, (groups, in, out) in float64.
        grams: XᵀX / samples of its inputs in every model, (groups, in, in) in float64.
        shares: w, the share of every model.
        alpha: α, how much correlations of inputs count.
        ridge: r, relative to the mean of the diagonal.

    Raises:
        OptionError: matrices that are singular, as the ridge is too small.

    Example: for one input and one output, Gram matrices 1 and 3 of weights 2 and 6 give (1 * 2 + 3 * 6) / 4 = 5.
    """
    mean = average_tensors(matrices, shares)
    total, moved = torch.zeros_like(grams[0]), torch.zeros_like(mean)
    for matrix, gram, share in zip(matrices, grams, shares, strict=True):
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        added = (1 - alpha) * diagonal + ridge * diagonal.mean(-1, keepdim=True)
        metric = share * (alpha * gram + torch.diag_embed(added))
        total += metric
        moved += metric @ (matrix - mean)
    empty = total.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0
    total[empty] = torch.eye(total.shape[-1], dtype=total.dtype, device=total.device)
    root, failures = torch.linalg.cholesky_ex(total)
    if failures.any():
        raise OptionError(f"Gram matrices of inputs are singular with ridge = {ridge}; give a larger one")
    return mean + torch.cholesky_solve(moved, root)


def merge_by_grams(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None,
    alpha: float,
    ridge: float,
    before: Callable[[LayerStep, Sequence[nn.Module]], None] | None = None,
    device: Any = None,
    progress: str = "",
) -> Checkpoint:
    """Replace the linear maps of a merge, in the order of its forward pass, by the solutions of `solve_grams`.

    Args:
        merged: the average of the models.
        models: models that were merged.
        data: `batches` of `change_in_order`, or `OwnBatches`.
        weights: weights of the models.
        alpha: how much correlations of inputs count.
        ridge: ridge relative to the mean of the diagonal.
        before: called before every step with the modules of the merge and of the models, which it may change.
        device: device of the computation.
        progress: label of the progress bar.
    """
    shares = _checked_shares(weights, len(models), alpha, ridge)
    refuse_other_owners(data, len(models))

    def change(step: LayerStep, modules: Sequence[nn.Module]) -> Change | None:
        if before is not None:
            before(step, modules)
        return _GramMerge(step, modules[1:], shares, alpha, ridge) if step.layers else None

    return change_modules(merged, models, data, change, device=device, progress=progress, own=True)


class _GramMerge(Change):
    """Gram matrices of the layers of a step, which read the same input, one for each model."""

    def __init__(
        self, step: LayerStep, models: Sequence[nn.Module], shares: Sequence[float], alpha: float, ridge: float
    ):
        self.layers, self.models, self.shares, self.alpha, self.ridge = step.layers, models, shares, alpha, ridge
        matrix = self.layers[0].matrix
        (groups, width, _), count = matrix.shape, len(models)
        options: dict[str, Any] = {"dtype": torch.float64, "device": matrix.device}
        self.batch_sums = [torch.zeros(count, **options), torch.zeros(count, groups, width, width, **options)]

    def add(self, calls: Sequence[LayerCalls], mask: Tensor | None) -> None:
        counts, squares = self.batch_sums
        for i, model in enumerate(calls[1:]):
            for read, _ in model[self.layers[0].name]:
                for piece in self.layers[0].input_samples(read, mask):
                    x = piece.double()
                    counts[i] += x.shape[1]
                    squares[i] += x.mT @ x

    def write(self) -> Sequence[str]:
        counts, squares = self.batch_sums
        if not squares.any():
            return ()
        grams = squares / counts.clamp_min(1)[:, None, None, None]
        for layer in self.layers:
            own = [Affine(layer.name, model.get_submodule(layer.name)).matrix.double() for model in self.models]
            layer.write(solve_grams(own, list(grams), self.shares, alpha=self.alpha, ridge=self.ridge), None)
        return [layer.name for layer in self.layers]


def _checked_shares(weights: Sequence[float] | None, count: int, alpha: float, ridge: float) -> list[float]:
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha = {alpha}; give a number from 0 to 1, such as {ALPHA}")
    if not 0 < ridge < math.inf:
        raise OptionError(f"ridge = {ridge}; give a number above 0, such as {RIDGE}")
    return nonnegative_shares(weights, count, "Gram matrices are added up")
