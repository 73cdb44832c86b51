"""SCE: select where models differ, weigh them by their change, erase minorities (Wan et al. 2024, arXiv 2408.07990).

m is 1 for the ⌊τ · c⌋ entries of the tensor with the largest variance over the models, where c counts the entries
whose variance is not 0 (all entries if τ = 1); of equal variances the first ones. Model i has the weight
vᵢ = mean(δᵢ²) / Σ mean(δⱼ²), where entries with m = 0 count as 0. At every entry the sign of Σ δᵢ is elected, and
y = b + Σ vᵢ δᵢ / max(Σ vᵢ, 10⁻⁶) over the models that agree, where m is 1.

mergekit gives all models the same weight where Σ mean(δⱼ²) < 10⁻⁶, as in most tensors of an ordinary fine-tune, whose
changes are below 10⁻³. `equal_below` is that limit; it is 0 by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._deltas import check_number, keep_where, sum_elected, sum_whole
from ._selection import ALL, Cutoff, select_largest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..pieces import Piece, Pieces

BASE = "required"
PIECES = "elements"
MERGEKIT = {"equal_below": 1e-6}
FLOOR = 1e-6  # of the sum of weights that a sum is divided by
TINY = 1e-200  # smaller sums of squares have lost precision, and may be 0


@dataclass(frozen=True)
class Selection:
    """The weights of the models and the selected entries.

    Args:
        weights: vᵢ.
        cutoff: of the selected entries among the variances.
        scale: deltas are multiplied by it before they are squared, so that squares neither vanish nor overflow.
    """

    weights: Sequence[float]
    cutoff: Cutoff = ALL
    scale: float = 1.0


def spread(tensors: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Return the population variance over the models, times the square of their number; exactly 0 for equal deltas.

    Example: (1, 3) has the mean 2 and the variance 1; the result is 2² * 1 = 4.
    """
    first, *others = tensors
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for tensor in others:
        difference = tensor - first
        if scale != 1:
            difference.mul_(scale)
        total += difference
        squares.addcmul_(difference, difference)
    return squares.mul_(len(tensors)).addcmul_(total, total, value=-1)


def prepare(pieces: Pieces, *, select_topk: float = 1.0, equal_below: float = 0.0) -> Selection:
    """Find the entries with the largest variances, and weigh the models by what is selected.

    Args:
        pieces: the pieces of the whole tensors.
        select_topk: τ.
        equal_below: limit of Σ mean(δᵢ²) below which all weights are the same.
    """
    cutoff, scale = ALL, 1.0
    if select_topk < 1:
        largest, differing = _survey(pieces)
        scale = _scale_for(largest)
        count = int(select_topk * differing) if select_topk > 0 else 0
        ((cutoff,),) = select_largest(pieces, lambda piece: [spread(piece.tensors, scale)], [[count]])
    squares = _sum_squares(pieces, cutoff, scale)
    if not TINY < sum(squares) < math.inf:
        scale = _scale_for(_survey(pieces)[0])
        squares = _sum_squares(pieces, cutoff, scale)
    total = sum(squares)
    equal = total == 0 or total / pieces.numel / scale / scale < equal_below
    weights = [1 / len(squares) if equal else square / total for square in squares]
    return Selection(weights, cutoff, scale)


def _survey(pieces: Pieces) -> tuple[float, int]:
    """Return the largest magnitude, and the number of entries in which the models differ."""
    largest, differing = 0.0, 0
    for piece in pieces:
        first, *others = piece.tensors
        differs = torch.zeros_like(first, dtype=torch.bool)
        for tensor in others:
            differs |= tensor != first
        differing += int(torch.count_nonzero(differs))
        largest = max(largest, *(float(tensor.abs().max()) for tensor in piece.tensors))
    return largest, differing


def _scale_for(largest: float) -> float:
    """Return 1, or a power of 2 that brings an extreme magnitude to 1."""
    return 1.0 if largest == 0 or 1e-90 < largest < 1e90 else math.ldexp(1.0, -math.frexp(largest)[1])


def _sum_squares(pieces: Pieces, cutoff: Cutoff, scale: float) -> list[float]:
    """Return the sum of the squares of the selected entries of every model."""

    def squares(piece: Piece) -> Iterator[Tensor]:
        selected = None if cutoff is ALL else cutoff.select(spread(piece.tensors, scale), piece.offset)
        for tensor in piece.tensors:
            kept = tensor if selected is None else keep_where(selected, tensor)
            yield (kept if scale == 1 else kept * scale).square()

    return sum_whole(pieces, squares)


def merge(
    tensors: Sequence[Tensor],
    *,
    whole: Selection,
    offset: int = 0,
    select_topk: float = 1.0,
    equal_below: float = 0.0,
) -> Tensor:
    """Return the mean, weighted by the models' changes, of the selected deltas that agree with the elected sign.

    Args:
        tensors: δᵢ of every model.
        whole: what `prepare` returned.
        offset: flat position of the piece's first entry.
        select_topk: τ, the share of the entries that is kept, of those in which the models differ.
        equal_below: limit of Σ mean(δᵢ²), in squared units of the weights, below which all models weigh the same.

    Raises:
        OptionError: a share outside of 0 to 1, or a limit that is negative or not finite.

    Example: deltas of mean squares 3 and 1 have the weights 0.75 and 0.25, so 1 and 5 give 0.75 * 1 + 0.25 * 5 = 2,
    and −1 and 5 give 5, since −1 + 5 > 0.
    """
    check_number("sce", "select_topk", select_topk, low=0, high=1)
    check_number("sce", "equal_below", equal_below, low=0)
    votes = torch.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor
    merged = sum_elected(tensors, whole.weights, normalize=True, votes=votes, floor=FLOOR)
    if select_topk >= 1:
        return merged
    return keep_where(whole.cutoff.select(spread(tensors, whole.scale), offset), merged)
