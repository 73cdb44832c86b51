"""RAM+ at the level of tensors: RAM, with larger changes where a single model made them (2026, arXiv 2601.13572).

A mean dilutes what a model shares with others; to make up for it, what it changed alone is multiplied by
1 + r · clip(sharedᵢ / loneᵢ, 0, α), where loneᵢ counts the entries of the tensor with |δᵢ| > ε that no other model
changed, and sharedᵢ those that others changed as well. Several models give their mean, as in RAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._deltas import check_number, keep_where, sum_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..pieces import Piece, Pieces

BASE = "required"
PIECES = "elements"
KEEPS = {"epsilon": 0.0}


def find_changes(tensors: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Return a mask per model of the entries with |δᵢ| > ε, and how many models changed each entry."""
    masks = [tensor.abs() > epsilon for tensor in tensors]
    count = torch.zeros_like(tensors[0])
    for mask in masks:
        count += mask
    return masks, count


def prepare(pieces: Pieces, *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Sequence[float]:
    """Return the factor 1 + r · clip(shared / lone, 0, α) of every model.

    Args:
        pieces: the pieces of the whole tensors.
        epsilon: ε.
        r: r.
        alpha: α.
    """

    def changes(piece: Piece) -> Iterator[Tensor]:
        masks, count = find_changes(piece.tensors, epsilon)
        lone = count == 1
        for mask in masks:
            yield mask
            yield mask & lone

    sums = sum_whole(pieces, changes)
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return [1 + r * min((changed - lone) / lone, alpha) if lone else 1.0 for changed, lone in pairs]


def merge(
    tensors: Sequence[Tensor], *, whole: Sequence[float], epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Tensor:
    """Return the mean of the deltas above ε where there are several, and a rescaled one where it is alone.

    Args:
        tensors: δᵢ of every model.
        whole: what `prepare` returned.
        epsilon: ε, in units of the weights; smaller changes do not count.
        r: how much lone changes grow with the ratio of shared to lone ones.
        alpha: limit of that ratio.

    Raises:
        OptionError: a number that is negative or not finite.

    Example: a model that shares 2 changes and makes 8 alone has the ratio 0.25, limited to α = 0.2; with r = 0.1 its
    lone changes are multiplied by 1 + 0.1 * 0.2 = 1.02.
    """
    for name, number in (("epsilon", epsilon), ("r", r), ("alpha", alpha)):
        check_number("ramplus_tl", name, number, low=0)
    masks, count = find_changes(tensors, epsilon)
    lone = count == 1
    total = torch.zeros_like(tensors[0])
    for tensor, mask, factor in zip(tensors, masks, whole, strict=True):
        kept = keep_where(mask, tensor)
        total += torch.where(lone, kept * factor, kept)
    return total.div_(count.clamp_(min=1))
