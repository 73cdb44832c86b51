"""RAM: where a single model changed, take its change, and the mean where several did (2026, arXiv 2601.13572).

Models trained by reinforcement learning change few entries, and a mean over all models would shrink the changes that
only one of them made. So y = b + the mean of δᵢ over the models with |δᵢ| > ε, and b where there are none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._deltas import check_number, keep_where

BASE = "required"
PIECES = "elements"
KEEPS = {"epsilon": 0.0}


def merge(tensors: Sequence[Tensor], *, epsilon: float = 1e-5) -> Tensor:
    """Return the mean of the deltas whose magnitude is above ε.

    Args:
        tensors: δᵢ of every model.
        epsilon: ε, in units of the weights; smaller changes do not count.

    Raises:
        OptionError: a negative ε, or one that is not finite.

    Example: the deltas 4 and 0 give 4, and 4 and 2 give 3.
    """
    check_number("ram", "epsilon", epsilon, low=0)
    total, count = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for tensor in tensors:
        changed = tensor.abs() > epsilon
        total += keep_where(changed, tensor)
        count += changed
    return total.div_(count.clamp_(min=1))
