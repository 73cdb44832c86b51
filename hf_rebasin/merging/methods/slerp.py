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
    """Return (‖a‖², ‖b‖², ⟨a, b⟩) in float64, summed in pieces to avoid float64 copies of large tensors."""
    total = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(*(tensor.reshape(-1).split(PIECE) for tensor in tensors), strict=True):
        x, y = a.double(), b.double()
        total += torch.stack([x.dot(x), y.dot(y), x.dot(y)]).cpu()
    return total


def merge(tensors: Sequence[Tensor], whole: Tensor | None = None, *, t: float = 0.5) -> Tensor:
    """Return sin((1 − t)Ω)/sin Ω · θ_A + sin(tΩ)/sin Ω · θ_B, with Ω the angle between the tensors as vectors.

    Pieces of tensors are merged by the angle between the whole tensors, which follows from their `sums`. Tensors that
    are zero or collinear are interpolated linearly. t = 0 is A, t = 1 is B.

    Raises:
        OptionError: more or fewer than two models, or a t that is not finite.

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
