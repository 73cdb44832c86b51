"""Task arithmetic: add weighted task vectors to the base (Ilharco et al. 2022, arXiv 2212.04089).

A task vector δᵢ = xᵢ − b is what training changed. y = b + λ Σ wᵢ δᵢ; a negative weight makes the merge
unlearn a task.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._deltas import check_number, fill_in, sum_weighted

BASE = "required"
PIECES = "elements"
KEEPS = {"normalize": True}


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Return λ Σ wᵢ δᵢ, divided by Σ wᵢ if `normalize`.

    Args:
        tensors: δᵢ of every model.
        weights: wᵢ; by default 1.
        normalize: divide by the sum of the weights; weights that cancel are not divided by.
        lambda_: λ.

    Raises:
        OptionError: weights that are not one per model, or a number that is not finite.

    Example: weights 1 and 0.5 of the deltas 2 and −6 give 1 * 2 + 0.5 * −6 = −1.
    """
    weights = fill_in("task_arithmetic", "weight", weights, len(tensors), default=1.0)
    check_number("task_arithmetic", "lambda", lambda_)
    return sum_weighted(tensors, weights, normalize=normalize, lambda_=lambda_)
