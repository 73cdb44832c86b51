"""Spherical interpolation between two models (Shoemake 1985), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import OptionError

PIECE = 1 << 18
COLLINEAR = 0.9995  # beyond this cosine the sine is too small to divide by, and the arc is a line anyway


def sums(tensors: Sequence[Tensor]) -> Tensor:
    """(‖a‖², ‖b‖², ⟨a, b⟩) in float64, in pieces, so that there is no float64 copy of a large tensor."""
    total = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(*(tensor.reshape(-1).split(PIECE) for tensor in tensors), strict=True):
        x, y = a.double(), b.double()
        total += torch.stack([x.dot(x), y.dot(y), x.dot(y)]).cpu()
    return total


def merge(tensors: Sequence[Tensor], whole: Tensor | None = None, *, t: float = 0.5) -> Tensor:
    """sin((1 − t)Ω)/sin Ω · θ_A + sin(tΩ)/sin Ω · θ_B, with Ω the angle between the two tensors as vectors.

    The angle is that of the whole tensors, given by their `sums`, also where a piece of them is merged. Tensors that
    are zero, or point the same or opposite ways, are interpolated linearly. t = 0 is A, t = 1 is B.

    Raises:
        OptionError: not two models, or a t that is no finite number.

    Example: halfway between (1, 0) and (0, 1), at a right angle: sin 45° / sin 90° = 0.7071 of each.
    """
    if len(tensors) != 2:
        raise OptionError(f"slerp merges 2 models, got {len(tensors)}; use linear for more")
    if not math.isfinite(t):
        raise OptionError(f"slerp got t = {t}; give a number, 0 for the first model and 1 for the second")
    if t in (0, 1):  # arithmetic would lose the sign of a zero
        return tensors[int(t)]
    a, b = tensors
    a2, b2, ab = (sums(tensors) if whole is None else whole).tolist()
    norms = math.sqrt(a2) * math.sqrt(b2)
    cosine = max(-1.0, min(ab / norms, 1.0)) if norms > 0 else 1.0
    if abs(cosine) > COLLINEAR:
        return torch.lerp(a, b, t)
    angle = math.acos(cosine)
    return (a * (math.sin((1 - t) * angle) / math.sin(angle))).add_(b, alpha=math.sin(t * angle) / math.sin(angle))
