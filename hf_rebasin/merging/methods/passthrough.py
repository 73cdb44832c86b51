"""One model as it is, or scaled: what stacks of layers from several models are made of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import OptionError
from ._deltas import fill_in

PIECES = "elements"


def merge(tensors: Sequence[Tensor], *, scales: Sequence[float] | None = None) -> Tensor:
    """Return s θ, of one model.

    Args:
        tensors: the model's tensor.
        scales: its factor s; by default 1.

    Raises:
        OptionError: more than one model, or a scale that is not finite.

    Example: scale 0.5 of the value 6 is 3.
    """
    if len(tensors) != 1:
        raise OptionError(f"passthrough takes 1 model, got {len(tensors)}; use linear to average them")
    (scale,) = fill_in("passthrough", "scale", scales, 1, default=1.0)
    return tensors[0] if scale == 1 else tensors[0] * scale
