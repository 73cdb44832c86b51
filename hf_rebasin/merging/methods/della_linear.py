"""DELLA without election: drop entries at random, small ones more often, add up (Deep et al. 2024, arXiv 2406.11617).

In every row (the last axis; a vector is one row) of n entries, the entry of rank q = 1 … n in ascending order of |δᵢ|
is kept with probability p = ρᵢ − εᵢ + 2εᵢ (q − 1)/(n − 1), and p = ρᵢ if n = 1. y = b + λ Σ wᵢ δ̂ᵢ. The factor of the
kept entries may be

- `l1`: ‖δᵢ‖₁ / ‖kept‖₁ of the whole tensor (mergekit's); the norm is that of δᵢ, whatever was drawn;
- `density`: 1/p of each entry (the paper's); the only one for which the mean of δ̂ᵢ over the draws is δᵢ;
- `none`: 1; then the mean of δ̂ᵢ is p δᵢ.

Entries that training did not change have ranks, too, the lowest. So in a row with many of them the changed ones are
kept more often than ρᵢ. Of equal magnitudes the first ones have the lower ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import OptionError
from ._deltas import Rescale, check_number, fill_in, keep_where, l1_factors, resolve_rescale, sum_weighted

if TYPE_CHECKING:
    from ..pieces import Pieces

BASE = "required"
PIECES = "rows"
KEEPS = {"normalize": True}
EPSILON = 0.15


def fill_in_probabilities(
    method: str, densities: Sequence[float] | None, epsilons: Sequence[float] | None, models: int
) -> tuple[list[float], list[float]]:
    """Return ρᵢ and εᵢ of every model.

    Raises:
        OptionError: numbers that are not one per model, or probabilities that are not between 0 and 1.
    """
    densities = fill_in(method, "density", densities, models, default=1.0, low=0, high=1)
    epsilons = fill_in(method, "epsilon", epsilons, models, default=EPSILON)
    for density, epsilon in zip(densities, epsilons, strict=True):
        low, high = sorted((density - epsilon, density + epsilon))
        if 0 < density < 1 and not 0 < low <= high < 1:
            raise OptionError(
                f"{method} got density = {density} and epsilon = {epsilon}, so entries would be kept with "
                f"probabilities from {low:g} to {high:g}; give an epsilon below {min(density, 1 - density):g}"
            )
    return densities, epsilons


def keep_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability p of every entry of rows.

    Args:
        delta: δ, (rows, n).
        density: ρ.
        epsilon: ε.

    Example: the row (5, 0, 1) has the ranks 3, 1, 2, so p = (0.6, 0.4, 0.5) for ρ = 0.5 and ε = 0.1.
    """
    n = delta.shape[-1] if delta.dim() else 1
    if n < 2:
        return torch.full_like(delta, density)
    order = torch.argsort(delta.abs(), dim=-1, stable=True)
    ramp = torch.linspace(density - epsilon, density + epsilon, n, dtype=delta.dtype, device=delta.device)
    return torch.empty_like(delta).scatter_(-1, order, ramp.expand_as(delta))


def drop_by_rank(
    tensors: Sequence[Tensor],
    uniforms: Sequence[Tensor],
    densities: Sequence[float],
    epsilons: Sequence[float],
    *,
    unbiased: bool = False,
) -> list[Tensor]:
    """Drop entries of the deltas with the probabilities of their ranks.

    Args:
        tensors: δᵢ of every model, (rows, n).
        uniforms: random numbers in [0, 1) of the same shapes; an entry is kept if its number is below p.
        densities: ρᵢ.
        epsilons: εᵢ.
        unbiased: divide the kept entries by p.

    Example: with p = (0.6, 0.4, 0.5) and the random numbers (0.5, 0.5, 0.1) the row (5, 0, 1) stays as it is.
    """
    kept = []
    for tensor, numbers, density, epsilon in zip(tensors, uniforms, densities, epsilons, strict=True):
        if density >= 1:
            kept.append(tensor)
        elif density <= 0:
            kept.append(torch.zeros_like(tensor))
        else:
            p = keep_probabilities(tensor, density, epsilon)
            kept.append(keep_where(numbers < p, tensor / p if unbiased else tensor))
    return kept


def prepare(
    pieces: Pieces,
    *,
    densities: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    rescale: Rescale = "l1",
) -> Sequence[float] | None:
    """Return the factor ‖δᵢ‖₁ / ‖kept‖₁ of every model.

    Args:
        pieces: the pieces of the whole tensors.
        densities: ρᵢ.
        epsilons: εᵢ.
        rescale: `l1` (or true), `density`, or `none` (or false).

    Returns:
        None if the kept entries of the whole tensor have no factor in common.
    """
    densities = fill_in("della_linear", "density", densities, len(densities or []), default=1.0)
    if resolve_rescale(rescale) != "l1" or all(density >= 1 for density in densities):
        return None
    spreads = fill_in("della_linear", "epsilon", epsilons, len(densities), default=EPSILON)
    return l1_factors(pieces, lambda piece: drop_by_rank(piece.tensors, piece.uniforms, densities, spreads))


def merge(
    tensors: Sequence[Tensor],
    *,
    uniforms: Sequence[Tensor],
    whole: Sequence[float] | None,
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """Return λ Σ wᵢ δ̂ᵢ, divided by Σ wᵢ if `normalize`.

    Args:
        tensors: δᵢ of every model, (rows, n).
        uniforms: random numbers in [0, 1) for every model.
        whole: what `prepare` returned.
        weights: wᵢ; by default 1.
        densities: ρᵢ, the mean probability that an entry of a row is kept; by default 1.
        epsilons: εᵢ, by which the probability rises and falls; by default 0.15. Unused where the density is 0 or 1.
        normalize: divide by the sum of the weights; weights that cancel are not divided by.
        rescale: factor of the kept entries: `l1` (or true), `density` (1/p), or `none` (or false).
        lambda_: λ.

    Raises:
        OptionError: numbers that are not one per model or not finite, or probabilities ρᵢ ± εᵢ that are not between
            0 and 1.

    Example: for ρ = 0.5 and ε = 0.1 the larger entry of the row (3, 1) is kept with probability 0.6; if the other one
    is dropped, (3, 0) is rescaled by (3 + 1) / 3 to (4, 0), or by 1 / 0.6 to (5, 0) with `density`.
    """
    weights = fill_in("della_linear", "weight", weights, len(tensors), default=1.0)
    densities, epsilons = fill_in_probabilities("della_linear", densities, epsilons, len(tensors))
    check_number("della_linear", "lambda", lambda_)
    unbiased = resolve_rescale(rescale) == "density"
    kept = drop_by_rank(tensors, uniforms, densities, epsilons, unbiased=unbiased)
    return sum_weighted(kept, weights, whole, normalize=normalize, lambda_=lambda_)
