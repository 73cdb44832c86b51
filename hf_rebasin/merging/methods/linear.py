"""Weighted average of any number of models (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import OptionError

PIECES = "elements"


def merge(tensors: Sequence[Tensor], *, weights: Sequence[float] | None = None, normalize: bool = True) -> Tensor:
    """Return Σ wᵢ θᵢ, divided by Σ wᵢ if `normalize`.

    Args:
        tensors: one tensor per model, all of one shape.
        weights: one weight per model; by default equal.
        normalize: divide by the sum of the weights.

    Raises:
        OptionError: weights that are not one per model, or that sum to 0 and cannot be normalised.

    Example: weights 3 and 1 of the values 2 and 6 give (3 * 2 + 1 * 6) / 4 = 3.
    """
    weights = [1.0] * len(tensors) if weights is None else [1.0 if w is None else w for w in weights]
    if len(weights) != len(tensors):
        raise OptionError(f"linear got {len(weights)} weights for {len(tensors)} models; give one weight per model")
    total = sum(weights) if normalize else 1.0
    if total == 0:
        raise OptionError(f"linear got weights {weights}, which sum to 0 and cannot be normalised")
    terms = [tensor if weight == 1 else tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
    merged = terms[0] + terms[1] if len(terms) > 1 else terms[0].clone()
    for term in terms[2:]:
        merged += term
    return merged.div_(total)
