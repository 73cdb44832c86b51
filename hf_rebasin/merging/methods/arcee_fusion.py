"""The most important changes of another model, put into a base (arcee_fusion of Arcee's mergekit).

Every element has the importance |δ| KL(p + ε ‖ q + ε), with p the softmax of the model's row (last axis), q the base's
and ε = 1e-8. Elements are the model's if their importance is at least q₂ + 1.5 (q₃ − q₁), the quartiles of the tensor,
and the base's otherwise. Quartiles are exact; of tensors of more than a million elements, mergekit draws a sample.

The softmax of a row of weights is not a probability of anything, least of all in vectors, which are one row, and in
embeddings. It serves as a measure of how much a row has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import OptionError
from ._selection import select_largest

if TYPE_CHECKING:
    from ..pieces import Piece, Pieces

BASE = "required"
PIECES = "rows"
KEEPS = None
QUARTILES = (0.25, 0.5, 0.75)
SPREAD = 1.5  # times the distance of the quartiles, added to the median
EPS = 1e-8  # added to probabilities
FEW = 1 << 10  # so many elements are simply sorted


def prepare(pieces: Pieces) -> float:
    """Return the importance from which elements are the model's.

    The quartile q of n numbers is entry ⌊q (n − 1)⌋ in ascending order, counted from 0.
    """
    n = pieces.numel
    if not n:
        return 0.0
    ranks = [int(quartile * (n - 1)) for quartile in QUARTILES]
    if n < FEW:  # some of the quartiles may be the smallest entry
        scores = torch.cat([_importance_of(piece).reshape(-1) for piece in pieces]).sort().values
        first, median, third = (float(scores[rank]) for rank in ranks)
    else:
        (cutoffs,) = select_largest(pieces, lambda piece: [_importance_of(piece)], [[n - rank for rank in ranks]])
        first, median, third = (cutoff.value for cutoff in cutoffs)
    return median + SPREAD * (third - first)


def merge(tensors: Sequence[Tensor], *, base: Tensor | None = None, whole: float | None = None) -> Tensor:
    """Return the difference from the base where it is important, and 0 elsewhere.

    Args:
        tensors: the difference of the one model beside the base, or whole rows of it.
        base: the base's values.
        whole: importance from which elements are the model's, from `prepare`.

    Raises:
        OptionError: more than one model beside the base.

    Example: of equal rows only |δ| counts, so δ = (1, 1, 1, 1, 9) with the quartiles 1, 1 and 1 changes all five, and
    δ = (1, 2, 3, 4, 9), with 2, 3 and 4, the one of at least 3 + 1.5 * (4 - 2) = 6.
    """
    if len(tensors) != 1:
        raise OptionError(f"arcee_fusion takes 1 model beside the base, got {len(tensors)}; name one")
    if base is None or whole is None:
        raise OptionError("arcee_fusion needs a base and the quartiles of the whole tensor; give base=")
    return torch.where(_importance(tensors[0], base) >= whole, tensors[0], 0.0)


def _importance_of(piece: Piece) -> Tensor:
    if piece.base is None:
        raise OptionError("arcee_fusion needs a base; give base=")
    return _importance(piece.tensors[0], piece.base)


def _importance(delta: Tensor, base: Tensor) -> Tensor:
    """Return |δ| KL(softmax(b + δ) + ε ‖ softmax(b) + ε) of rows, in float64."""
    delta, base = delta.double(), base.double()
    of_base = base.softmax(-1).add_(EPS)
    of_model = (base + delta).softmax(-1).add_(EPS)
    divergence = (of_model / of_base).log_().mul_(of_model).sum(-1, keepdim=True)
    return delta.abs().mul_(divergence.nan_to_num_(0.0).clamp_(min=0))  # below 0 by rounding
