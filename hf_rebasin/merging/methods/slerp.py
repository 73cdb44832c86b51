"""Spherical interpolation between two models (Shoemake 1985), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import OptionError
from ._inner_products import gram_matrix

if TYPE_CHECKING:
    from ..pieces import Pieces

COLLINEAR = 0.9995  # beyond this cosine the sine is too small to divide by, and the arc is a line anyway
PIECES = "elements"
SYMMETRIC = False
MERGEKIT = {"eps": 1e-8}


def prepare(pieces: Pieces) -> Tensor:
    """Return the inner products of the two tensors, (2, 2), in float64."""
    return gram_matrix(piece.tensors for piece in pieces)


def merge(
    tensors: Sequence[Tensor], *, whole: Tensor | None = None, t: float = 0.5, eps: float | None = None
) -> Tensor:
    """Return sin((1 − t)Ω)/sin Ω · θ_A + sin(tΩ)/sin Ω · θ_B, with Ω the angle between the tensors as vectors.

    Tensors that are zero or collinear are interpolated linearly. t = 0 is A, t = 1 is B.

    Args:
        tensors: the two models' tensors, or pieces of them.
        whole: inner products of the whole tensors, from `prepare`; by default those of `tensors`.
        t: where on the arc from the first model to the second.
        eps: tensors of a norm up to this count as perpendicular to all others, as in mergekit; by default there are no
            such tensors, and the arc from zero is a line.

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
    (a2, ab), (_, b2) = (gram_matrix([tensors]) if whole is None else whole).tolist()
    norms = math.sqrt(a2) * math.sqrt(b2)
    cosine = max(-1.0, min(ab / norms, 1.0)) if norms > 0 else 1.0
    if eps is not None and min(a2, b2) <= eps * eps:
        cosine = 0.0
    if abs(cosine) > COLLINEAR:
        return torch.lerp(a, b, t)
    angle = math.acos(cosine)
    return (a * (math.sin((1 - t) * angle) / math.sin(angle))).add_(b, alpha=math.sin(t * angle) / math.sin(angle))
