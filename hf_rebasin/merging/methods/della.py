"""DELLA: drop entries at random, small ones more often, elect a sign (Deep et al. 2024, arXiv 2406.11617).

δ̂ᵢ is as in `della_linear`, which describes the probabilities and the ways to rescale. y = b + λ Σ wᵢ δ̂ᵢ / Σ wᵢ, with
both sums over the models whose wᵢ δ̂ᵢ has the sign of the sum over all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import della_linear
from ._deltas import Rescale, check_number, fill_in, resolve_rescale, sum_elected

BASE = "required"
PIECES = "rows"

prepare = della_linear.prepare


def merge(
    tensors: Sequence[Tensor],
    *,
    uniforms: Sequence[Tensor],
    whole: Sequence[float] | None,
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    normalize: bool = True,
    rescale: Rescale = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """Return λ times the mean (or sum) of the kept entries that agree with the elected sign.

    Args:
        tensors: δᵢ of every model, (rows, n).
        uniforms: random numbers in [0, 1) for every model.
        whole: what `prepare` returned.
        weights: wᵢ; by default 1.
        densities: ρᵢ, the mean probability that an entry of a row is kept; by default 1.
        epsilons: εᵢ, by which the probability rises and falls; by default 0.15. Unused where the density is 0 or 1.
        normalize: divide by the sum of the weights that agree, where they do not cancel.
        rescale: factor of the kept entries: `l1` (or true), `density` (1/p), or `none` (or false).
        lambda_: λ.

    Raises:
        OptionError: numbers that are not one per model or not finite, or probabilities ρᵢ ± εᵢ that are not between
            0 and 1.

    Example: the deltas 3 and −2 give 3, since 3 − 2 > 0; if the 3 is dropped they give −2.
    """
    weights = fill_in("della", "weight", weights, len(tensors), default=1.0)
    densities, epsilons = della_linear.fill_in_probabilities("della", densities, epsilons, len(tensors))
    check_number("della", "lambda", lambda_)
    unbiased = resolve_rescale(rescale) == "density"
    kept = della_linear.drop_by_rank(tensors, uniforms, densities, epsilons, unbiased=unbiased)
    return sum_elected(kept, weights, whole, normalize=normalize, lambda_=lambda_)
