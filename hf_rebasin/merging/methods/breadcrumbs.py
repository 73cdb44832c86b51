"""Model Breadcrumbs: drop the largest and the smallest changes, add up (Davari and Belilovsky 2023, arXiv 2312.06795).

The largest changes are outliers and the smallest ones noise. Of the n entries of |δᵢ|, the ⌊γᵢn⌋ largest are dropped
and the next ⌊ρᵢn⌋ are kept; y = b + λ Σ wᵢ δ̂ᵢ. If ρᵢ + γᵢ > 1, fewer outliers are dropped, so that ⌊ρᵢn⌋ entries
remain. At ρᵢ = 1, the default, this rule would keep all of them (as mergekit does): instead, a density of 1 keeps all
but the outliers, unless `outliers` is `keep`. Of equal magnitudes the first ones count as larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ._deltas import check_number, fill_in, keep_where, l1_factors, sum_weighted
from ._selection import Cutoff, select_largest

if TYPE_CHECKING:
    from ..pieces import Pieces

BASE = "required"
PIECES = "elements"
KEEPS = {"normalize": True, "outliers": "keep"}
MERGEKIT = {"outliers": "keep"}
GAMMA = 0.01

Outliers = Literal["drop", "keep"]


def count_entries(n: int, density: float, gamma: float, outliers: Outliers) -> tuple[int, int]:
    """Return how many entries are outliers, and how many are outliers or kept.

    Example: of 10 entries with density 0.6 and gamma 0.1, 1 is dropped as an outlier and the next 6 are kept: (1, 7).
    """
    largest = int(min(gamma, 1) * n) if gamma > 0 else 0
    if density >= 1:
        return (largest if outliers == "drop" else 0), n
    kept = int(density * n) if density > 0 else 0
    smallest = max(0, n - kept - largest)
    return n - smallest - kept, n - smallest


@dataclass(frozen=True)
class Crumbs:
    """Which entries of each model are kept, and the factors that restore the L1 norms (1 without `rescale`).

    Args:
        cutoffs: for every model, the cutoff of the outliers, and the cutoff of outliers and kept entries.
        factors: for every model.
    """

    cutoffs: Sequence[Sequence[Cutoff]]
    factors: Sequence[float]

    def sparsify(self, tensors: Sequence[Tensor], offset: int) -> list[Tensor]:
        """Return a piece of every δ̂ᵢ, without the factors."""
        kept = []
        for tensor, (of_outliers, of_kept) in zip(tensors, self.cutoffs, strict=True):
            magnitudes = tensor.abs()
            mask = of_kept.select(magnitudes, offset) & ~of_outliers.select(magnitudes, offset)
            kept.append(keep_where(mask, tensor))
        return kept


def prepare(
    pieces: Pieces,
    *,
    densities: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    rescale: bool = False,
    outliers: Outliers = "drop",
) -> Crumbs:
    """Find the magnitudes of every task vector between which entries are kept.

    Args:
        pieces: the pieces of the whole tensors.
        densities: ρᵢ.
        gammas: γᵢ.
        rescale: restore the L1 norms.
        outliers: whether a density of 1 drops outliers.
    """
    if not pieces.numel:
        return Crumbs([], [])
    models = len(next(iter(pieces)).tensors)
    densities = fill_in("breadcrumbs", "density", densities, models, default=1.0)
    gammas = fill_in("breadcrumbs", "gamma", gammas, models, default=GAMMA)
    counts = [count_entries(pieces.numel, *pair, outliers) for pair in zip(densities, gammas, strict=True)]
    cutoffs = select_largest(pieces, lambda piece: [tensor.abs() for tensor in piece.tensors], counts)
    crumbs = Crumbs(cutoffs, [1.0] * models)
    if not rescale:
        return crumbs
    return Crumbs(cutoffs, l1_factors(pieces, lambda piece: crumbs.sparsify(piece.tensors, piece.offset)))


def merge(
    tensors: Sequence[Tensor],
    *,
    whole: Crumbs,
    offset: int = 0,
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: bool = False,
    outliers: Outliers = "drop",
    lambda_: float = 1.0,
) -> Tensor:
    """Return λ Σ wᵢ δ̂ᵢ, divided by Σ wᵢ if `normalize`.

    Args:
        tensors: δᵢ of every model.
        whole: what `prepare` returned.
        offset: flat position of the piece's first entry.
        weights: wᵢ; by default 1.
        densities: ρᵢ, the share of entries that is kept; by default 1, all but the outliers.
        gammas: γᵢ, the share of entries that are outliers; by default 0.01.
        normalize: divide by the sum of the weights; weights that cancel are not divided by.
        rescale: multiply each δ̂ᵢ by ‖δᵢ‖₁ / ‖δ̂ᵢ‖₁.
        outliers: `drop` them if the density is 1, or `keep` them (as mergekit does).
        lambda_: λ.

    Raises:
        OptionError: numbers that are not one per model or not finite, or shares outside of 0 to 1.

    Example: the delta (1, 2, 3, 9) with density 0.5 and gamma 0.25 loses 9 and 1 and becomes (0, 2, 3, 0).
    """
    weights = fill_in("breadcrumbs", "weight", weights, len(tensors), default=1.0)
    fill_in("breadcrumbs", "density", densities, len(tensors), default=1.0, low=0, high=1)
    fill_in("breadcrumbs", "gamma", gammas, len(tensors), default=GAMMA, low=0, high=1)
    check_number("breadcrumbs", "lambda", lambda_)
    kept = whole.sparsify(tensors, offset)
    return sum_weighted(kept, weights, whole.factors, normalize=normalize, lambda_=lambda_)
