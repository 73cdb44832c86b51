"""MagMax: at every entry, take the change of the model that changed it most (Marczak et al. 2024, arXiv 2407.06322).

y = b + λ δⱼ, where j is the model with the largest |δⱼ| at that entry; of equal magnitudes the last model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._deltas import check_number

BASE = "required"
PIECES = "elements"
KEEPS = {"lambda": 1.0}
SYMMETRIC = False  # of equal magnitudes with different signs, the last one counts


def merge(tensors: Sequence[Tensor], *, lambda_: float = 0.5) -> Tensor:
    """Return λ times the delta of the largest magnitude.

    Args:
        tensors: δᵢ of every model.
        lambda_: λ.

    Raises:
        OptionError: a λ that is not finite.

    Example: the deltas 2 and −3 give 0.5 * −3 = −1.5.
    """
    check_number("magmax", "lambda", lambda_)
    largest = tensors[0]
    for tensor in tensors[1:]:
        largest = torch.where(tensor.abs() >= largest.abs(), tensor, largest)
    return largest * lambda_
