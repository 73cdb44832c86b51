"""A base that moves towards another model by at most t in every element, so that nearly equal elements are swapped.

y = b + clip(t / |δ|, 0, 1) δ with δ = x − b, so every difference is clamped to [−t, t]. mergekit raises |δ| to 1e-6
before it divides; this changes the result by less than 1e-6, and only where t is smaller than that.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import OptionError
from ._deltas import check_number

BASE = "required"
PIECES = "elements"
KEEPS = {"t": 1e300}


def merge(tensors: Sequence[Tensor], *, t: float = 1e-4) -> Tensor:
    """Return the difference from the base, clamped to [−t, t].

    Args:
        tensors: the difference of the one model beside the base.
        t: how far an element may move away from the base, in units of the weights.

    Raises:
        OptionError: more than one model beside the base, or a t that is negative or not finite.

    Example: for t = 0.01, the differences 0.004 and −0.5 become 0.004 and −0.01.
    """
    if len(tensors) != 1:
        raise OptionError(f"nearswap takes 1 model beside the base, got {len(tensors)}; name one")
    check_number("nearswap", "t", t, low=0)
    return tensors[0].clamp(-t, t)
