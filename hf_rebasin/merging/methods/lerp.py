"""Linear interpolation between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import OptionError

PIECES = "elements"
SYMMETRIC = False


def merge(tensors: Sequence[Tensor], *, t: float = 0.5) -> Tensor:
    """Interpolate linearly, (1 − t) θ_A + t θ_B; t = 0 is A and t = 1 is B, bit for bit.

    Raises:
        OptionError: more or fewer than two models, or a t that is not finite.

    Example: t = 0.25 between 2 and 6 is 0.75 * 2 + 0.25 * 6 = 3.
    """
    if len(tensors) != 2:
        raise OptionError(f"lerp merges 2 models, got {len(tensors)}; use linear for more")
    if not math.isfinite(t):
        raise OptionError(f"lerp got t = {t}; give a number, 0 for the first model and 1 for the second")
    if t in (0, 1):  # arithmetic would lose the sign of a zero
        return tensors[int(t)]
    return torch.lerp(tensors[0], tensors[1], t)
