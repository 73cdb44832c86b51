"""TIES: trim each task vector, elect a sign at every entry, average what agrees (Yadav et al. 2023, arXiv 2306.01708).

Small changes are noise and changes of opposite sign cancel, so δ̂ᵢ keeps the k = max(1, ⌊ρᵢn⌋) largest of the n entries
of |δᵢ|, and y = b + λ Σ zᵢ / Σ wᵢ, where zᵢ = wᵢ δ̂ᵢ and both sums are over the models whose zᵢ has the sign of Σ zᵢ.

k is counted in each tensor. Of equal magnitudes the first ones are kept, so that results do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ._deltas import check_number, fill_in, keep_where, l1_factors, sum_elected
from ._selection import Cutoff, select_largest

if TYPE_CHECKING:
    from ..pieces import Pieces

BASE = "required"
PIECES = "elements"


@dataclass(frozen=True)
class Trimming:
    """Which entries of each model are kept, and the factors that restore the L1 norms (1 without `rescale`)."""

    cutoffs: Sequence[Cutoff]
    factors: Sequence[float]

    def trim(self, tensors: Sequence[Tensor], offset: int) -> list[Tensor]:
        """Return a piece of every δ̂ᵢ, without the factors."""
        pairs = zip(tensors, self.cutoffs, strict=True)
        return [keep_where(cutoff.select(tensor.abs(), offset), tensor) for tensor, cutoff in pairs]


def prepare(pieces: Pieces, *, densities: Sequence[float] | None = None, rescale: bool = False) -> Trimming | None:
    """Find the k-th largest magnitude of every task vector.

    Args:
        pieces: the pieces of the whole tensors.
        densities: ρᵢ.
        rescale: restore the L1 norms.

    Returns:
        None if all entries are kept.
    """
    n = pieces.numel
    densities = fill_in("ties", "density", densities, len(densities or []), default=1.0)
    if all(density >= 1 for density in densities):
        return None
    counts = [[0 if density <= 0 else max(1, int(density * n))] for density in densities]
    cutoffs = [row[0] for row in select_largest(pieces, lambda piece: [t.abs() for t in piece.tensors], counts)]
    trimming = Trimming(cutoffs, [1.0] * len(cutoffs))
    if not rescale:
        return trimming
    return Trimming(cutoffs, l1_factors(pieces, lambda piece: trimming.trim(piece.tensors, piece.offset)))


def merge(
    tensors: Sequence[Tensor],
    *,
    whole: Trimming | None,
    offset: int = 0,
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Return λ times the mean (or sum) of the trimmed deltas that agree with the elected sign.

    Args:
        tensors: δᵢ of every model.
        whole: what `prepare` returned.
        offset: flat position of the piece's first entry.
        weights: wᵢ; by default 1.
        densities: ρᵢ, the share of entries that is kept; by default 1.
        normalize: divide by the sum of the weights that agree, where they do not cancel.
        rescale: multiply each δ̂ᵢ by ‖δᵢ‖₁ / ‖δ̂ᵢ‖₁.
        lambda_: λ.

    Raises:
        OptionError: numbers that are not one per model or not finite, or a density outside of 0 to 1.

    Example: the deltas (4, 1) and (2, −3) with density 0.5 are trimmed to (4, 0) and (0, −3) and give (4, −3).
    """
    weights = fill_in("ties", "weight", weights, len(tensors), default=1.0)
    fill_in("ties", "density", densities, len(tensors), default=1.0, low=0, high=1)
    check_number("ties", "lambda", lambda_)
    if whole is None:
        return sum_elected(tensors, weights, normalize=normalize, lambda_=lambda_)
    trimmed = whole.trim(tensors, offset)
    return sum_elected(trimmed, weights, whole.factors, normalize=normalize, lambda_=lambda_)
