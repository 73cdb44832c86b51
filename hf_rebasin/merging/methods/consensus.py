"""Consensus: keep the sum of the task vectors where several models want it (Wang et al. 2024, arXiv 2405.07813).

A model's TALL mask marks the entries in which its own change outweighs all others: |δᵢ| > t · |Σⱼ δⱼ − δᵢ|. What
only one model (or none) marks serves at most one task, at the cost of the others, so y = b + λ Σ δᵢ where at least two
masks are set, and y = b elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import OptionError
from ._deltas import check_number, keep_where

BASE = "required"
PIECES = "elements"
KEEPS = None  # the sum of equal deltas is not their mean


def tall_mask(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return the TALL mask |δ| > t · |Σ − δ| of a model.

    Args:
        delta: δ of the model.
        total: Σ, the sum over all models.
        threshold: t.

    Example: δ = 1 of Σ = 3 is set for t = 0.4, as 1 > 0.4 * 2, and not set for t = 0.6.
    """
    return delta.abs() > (total - delta).abs_().mul_(threshold)


def merge(tensors: Sequence[Tensor], *, threshold: float = 0.4, agreement: int = 2, lambda_: float = 1.0) -> Tensor:
    """Return λ Σ δᵢ where enough TALL masks are set, and 0 elsewhere.

    Args:
        tensors: δᵢ of every model.
        threshold: t; from 0.2 to 0.6 in the paper, chosen by validation.
        agreement: how many masks have to be set.
        lambda_: λ, chosen by validation.

    Raises:
        OptionError: an agreement below 1 or above the number of models, a negative threshold, or a number that is not
            finite.

    Example: the deltas 3 and 2 sum to 5 and both masks are set; of 3 and 1 only the first is, as 1 < 0.4 * 3.
    """
    if not 1 <= agreement <= len(tensors):
        raise OptionError(
            f"consensus got agreement = {agreement} and {len(tensors)} models; give a number from 1 to {len(tensors)}"
        )
    check_number("consensus", "threshold", threshold, low=0)
    check_number("consensus", "lambda", lambda_)
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total += tensor
    masks = torch.zeros_like(total)
    for tensor in tensors:
        masks += tall_mask(tensor, total, threshold)
    return keep_where(masks >= agreement, total).mul_(lambda_)
