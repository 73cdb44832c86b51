"""DARE and TIES: drop entries of task vectors at random, elect a sign at every entry.

δ̂ᵢ is as in `dare_linear` (arXiv 2311.03099), which describes the ways to rescale, and the election as in `ties` (arXiv
2306.01708): y = b + λ Σ wᵢ δ̂ᵢ, with the sum over the models whose wᵢ δ̂ᵢ has the sign of the sum over all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dare_linear
from ._deltas import Rescale, check_number, fill_in, sum_elected

BASE = "required"
PIECES = "elements"
KEEPS = {"normalize": True}

prepare = dare_linear.prepare


def merge(
    tensors: Sequence[Tensor],
    *,
    uniforms: Sequence[Tensor],
    whole: Sequence[float] | None,
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """Return λ times the sum (or mean) of the kept entries that agree with the elected sign.

    Args:
        tensors: δᵢ of every model.
        uniforms: random numbers in [0, 1) for every model.
        whole: what `prepare` returned.
        weights: wᵢ; by default 1.
        densities: ρᵢ, the probability that an entry is kept; by default 1.
        normalize: divide by the sum of the weights that agree, where they do not cancel.
        rescale: factor of the kept entries: `l1` (or true), `density`, or `none` (or false).
        lambda_: λ.

    Raises:
        OptionError: numbers that are not one per model or not finite, or a density outside of 0 to 1.

    Example: the deltas 3 and −2 give 3, since 3 − 2 > 0; if the 3 is dropped they give −2.
    """
    weights = fill_in("dare_ties", "weight", weights, len(tensors), default=1.0)
    densities = fill_in("dare_ties", "density", densities, len(tensors), default=1.0, low=0, high=1)
    check_number("dare_ties", "lambda", lambda_)
    kept = dare_linear.drop_entries(tensors, uniforms, densities)
    return sum_elected(kept, weights, whole, normalize=normalize, lambda_=lambda_)
