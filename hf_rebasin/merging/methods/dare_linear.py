"""DARE: drop entries of task vectors at random, rescale the rest, add up (Yu et al. 2023, arXiv 2311.03099).

δ̂ᵢ keeps every entry with probability ρᵢ and is multiplied by a factor; y = b + λ Σ wᵢ δ̂ᵢ. The factor may be

- `l1`: ‖δᵢ‖₁ / ‖kept‖₁ of the whole tensor (mergekit's); the norm is that of δᵢ, whatever was drawn;
- `density`: 1/ρᵢ (the paper's); the only one for which the mean of δ̂ᵢ over the draws is δᵢ;
- `none`: 1; then the mean of δ̂ᵢ is ρᵢ δᵢ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ._deltas import Rescale, check_number, fill_in, keep_where, l1_factors, resolve_rescale, sum_weighted

if TYPE_CHECKING:
    from ..pieces import Pieces

BASE = "required"
PIECES = "elements"
KEEPS = {"normalize": True}


def drop_entries(tensors: Sequence[Tensor], uniforms: Sequence[Tensor], densities: Sequence[float]) -> list[Tensor]:
    """Drop every entry of the deltas with probability 1 − ρᵢ.

    Args:
        tensors: δᵢ of every model.
        uniforms: random numbers in [0, 1) of the same shapes; an entry is kept if its number is below ρᵢ.
        densities: ρᵢ.

    Example: with ρ = 0.5 and the random numbers (0.2, 0.7) the delta (3, 4) becomes (3, 0).
    """
    return [
        tensor if density >= 1 else keep_where(numbers < density, tensor)
        for tensor, numbers, density in zip(tensors, uniforms, densities, strict=True)
    ]


def prepare(
    pieces: Pieces, *, densities: Sequence[float] | None = None, rescale: Rescale = "l1"
) -> Sequence[float] | None:
    """Return the factor of every model.

    Args:
        pieces: the pieces of the whole tensors.
        densities: ρᵢ.
        rescale: `l1` (or true), `density`, or `none` (or false).

    Returns:
        None if all factors are 1.
    """
    way = resolve_rescale(rescale)
    densities = fill_in("dare_linear", "density", densities, len(densities or []), default=1.0)
    if way == "none" or all(density >= 1 for density in densities):
        return None
    if way == "density":
        return [1 / density if 0 < density < 1 else 1.0 for density in densities]
    return l1_factors(pieces, lambda piece: drop_entries(piece.tensors, piece.uniforms, densities))


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
    """Return λ Σ wᵢ δ̂ᵢ, divided by Σ wᵢ if `normalize`.

    Args:
        tensors: δᵢ of every model.
        uniforms: random numbers in [0, 1) for every model.
        whole: what `prepare` returned.
        weights: wᵢ; by default 1.
        densities: ρᵢ, the probability that an entry is kept; by default 1.
        normalize: divide by the sum of the weights; weights that cancel are not divided by.
        rescale: factor of the kept entries: `l1` (or true), `density`, or `none` (or false).
        lambda_: λ.

    Raises:
        OptionError: numbers that are not one per model or not finite, or a density outside of 0 to 1.

    Example: the delta (3, 1) that loses its last entry at ρ = 0.5 is rescaled by (3 + 1) / 3 to (4, 0), or by 1 / 0.5
    to (6, 0) with `density`.
    """
    weights = fill_in("dare_linear", "weight", weights, len(tensors), default=1.0)
    densities = fill_in("dare_linear", "density", densities, len(tensors), default=1.0, low=0, high=1)
    check_number("dare_linear", "lambda", lambda_)
    kept = drop_entries(tensors, uniforms, densities)
    return sum_weighted(kept, weights, whole, normalize=normalize, lambda_=lambda_)
