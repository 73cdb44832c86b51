"""Breadcrumbs and TIES: drop the largest and the smallest changes, elect a sign at every entry.

δ̂ᵢ is as in `breadcrumbs` (arXiv 2312.06795), the election as in `ties` (arXiv 2306.01708): y = b + λ Σ wᵢ δ̂ᵢ, with the
sum over the models whose wᵢ δ̂ᵢ has the sign of the sum over all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import breadcrumbs
from ._deltas import check_number, fill_in, sum_elected
from .breadcrumbs import GAMMA, Crumbs, Outliers

BASE = "required"
PIECES = "elements"
KEEPS = {"normalize": True, "outliers": "keep"}
MERGEKIT = {"outliers": "keep"}

prepare = breadcrumbs.prepare


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
    """Return λ times the sum (or mean) of the kept entries that agree with the elected sign.

    Args:
        tensors: δᵢ of every model.
        whole: what `prepare` returned.
        offset: flat position of the piece's first entry.
        weights: wᵢ; by default 1.
        densities: ρᵢ, the share of entries that is kept; by default 1, all but the outliers.
        gammas: γᵢ, the share of entries that are outliers; by default 0.01.
        normalize: divide by the sum of the weights that agree, where they do not cancel.
        rescale: multiply each δ̂ᵢ by ‖δᵢ‖₁ / ‖δ̂ᵢ‖₁.
        outliers: `drop` them if the density is 1, or `keep` them (as mergekit does).
        lambda_: λ.

    Raises:
        OptionError: numbers that are not one per model or not finite, or shares outside of 0 to 1.

    Example: the deltas (1, 2, 3, 9) and (1, −3, 2, 9) with density 0.5 and gamma 0.25 lose their first and last
    entries; −3 wins over 2, and 3 and 2 agree: (0, −3, 5, 0).
    """
    weights = fill_in("breadcrumbs_ties", "weight", weights, len(tensors), default=1.0)
    fill_in("breadcrumbs_ties", "density", densities, len(tensors), default=1.0, low=0, high=1)
    fill_in("breadcrumbs_ties", "gamma", gammas, len(tensors), default=GAMMA, low=0, high=1)
    check_number("breadcrumbs_ties", "lambda", lambda_)
    kept = whole.sparsify(tensors, offset)
    return sum_elected(kept, weights, whole.factors, normalize=normalize, lambda_=lambda_)
