"""Helpers of methods on task vectors δᵢ = xᵢ − b: numbers per model, sums of whole tensors, weighted sums, elections.

Sums over whole tensors are taken in blocks that start at fixed positions, so that they do not depend on how a tensor
is cut into pieces. An election (TIES, Yadav et al. 2023, arXiv 2306.01708) is held at every entry: the sign of the sum
of all terms wins (0 counts as +), and terms of the other sign, or equal to 0, leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...errors import OptionError

if TYPE_CHECKING:
    from ..pieces import Piece, Pieces

BLOCK = 1 << 14  # entries; below the size from which torch splits a sum among threads
NEGLIGIBLE = 1e-8  # a sum of weights below this share of the largest one is cancelled, up to rounding
OVERFLOW_SCALE = 2.0**-100  # magnitudes are summed a second time with this factor if the plain sum is infinite

Rescale = bool | Literal["l1", "density", "none"]  # true is "l1" and false "none", as in mergekit's files


def fill_in(
    method: str,
    name: str,
    values: Sequence[float | None] | None,
    models: int,
    *,
    default: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> list[float]:
    """Return one number per model, each of them the default if none are given.

    Args:
        method: the merge method, for messages.
        name: the parameter's name as users write it, such as `density`.
        values: the numbers, or None; a model without a number of its own has None, too.
        models: how many models there are.
        default: the number of every model if `values` is None.
        low: the smallest number that makes sense.
        high: the largest number that makes sense.

    Raises:
        OptionError: numbers that are not one per model, are not finite, or lie outside of the range.

    Example: `fill_in("ties", "density", None, 2, default=1.0)` is [1.0, 1.0].
    """
    numbers = [default] * models if values is None else [default if v is None else v for v in values]
    if len(numbers) != models:
        raise OptionError(f"{method} got {len(numbers)} numbers for {name} and {models} models; give one per model")
    for value in numbers:
        check_number(method, name, value, low=low, high=high)
    return numbers


def check_number(method: str, name: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise OptionError if a parameter is not finite or lies outside of its range."""
    if math.isfinite(value) and low <= value <= high:
        return
    lower, upper = math.isfinite(low), math.isfinite(high)
    limits = f" from {low:g} to {high:g}" if lower and upper else f", {low:g} or more" if lower else ""
    raise OptionError(f"{method} got {name} = {value}; give a finite number{limits}")


def sum_whole(pieces: Pieces, terms: Callable[[Piece], Iterable[Tensor]]) -> list[float]:
    """Return the sums of all entries of tensors that are computed piece by piece, in float64.

    Args:
        pieces: the pieces of the whole tensors.
        terms: returns the piece of every tensor that is to be summed.

    Example: pieces (1, 2) and (3,) of one tensor give [6.0], with the same rounding as one piece (1, 2, 3).
    """
    sums: list[_BlockSum] = []
    for piece in pieces:
        for i, entries in enumerate(terms(piece)):
            if i == len(sums):
                sums.append(_BlockSum())
            sums[i].add(entries)
    return [block_sum.finish() for block_sum in sums]


class _BlockSum:
    """A sum in float64 over blocks that start at multiples of BLOCK, however the entries arrive."""

    def __init__(self) -> None:
        self.total = 0.0
        self.rest: Tensor | None = None  # entries of the block that is not complete yet

    def add(self, entries: Tensor) -> None:
        entries = entries.reshape(-1)
        if self.rest is not None:
            entries = torch.cat([self.rest, entries])
        blocks, rest = divmod(entries.numel(), BLOCK)
        for block in entries[: blocks * BLOCK].reshape(blocks, BLOCK).sum(1, dtype=torch.float64).tolist():
            self.total += block
        self.rest = entries[blocks * BLOCK :].clone() if rest else None

    def finish(self) -> float:
        return self.total if self.rest is None else self.total + float(self.rest.sum(dtype=torch.float64))


def l1_factors(pieces: Pieces, sparsify: Callable[[Piece], Sequence[Tensor]]) -> list[float]:
    """Return ‖δᵢ‖₁ / ‖δ̂ᵢ‖₁ of every model, over the whole tensor; 1 where nothing is kept.

    Args:
        pieces: the pieces of the whole tensors.
        sparsify: returns the piece δ̂ᵢ of every model, with zeros in place of dropped entries.

    Example: if (3, 1) loses its last entry, the factor is (3 + 1) / 3 = 1.3333.
    """
    for scale in (1.0, OVERFLOW_SCALE):

        def magnitudes(piece: Piece, scale: float = scale) -> Iterable[Tensor]:
            for tensor in (*piece.tensors, *sparsify(piece)):
                yield tensor.abs() if scale == 1 else tensor.abs().mul_(scale)

        norms = sum_whole(pieces, magnitudes)
        if all(map(math.isfinite, norms)):
            break
    models = len(norms) // 2
    pairs = zip(norms[:models], norms[models:], strict=True)
    return [whole / kept if kept > 0 and whole / kept < math.inf else 1.0 for whole, kept in pairs]


def resolve_rescale(rescale: Rescale) -> Literal["l1", "density", "none"]:
    """Return the name of a way to rescale that may be written as true or false."""
    if isinstance(rescale, bool):
        return "l1" if rescale else "none"
    return rescale


def keep_where(mask: Tensor, delta: Tensor) -> Tensor:
    """Return a delta with zeros where a mask is false.

    A product with the mask takes an eighth of the time that `torch.where` does, which branches at every entry.
    """
    return mask.to(delta.dtype).mul_(delta)


def sum_weighted(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    factors: Sequence[float] | None = None,
    *,
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """Return λ Σ wᵢ cᵢ δᵢ, divided by Σ wᵢ if `normalize`; weights that cancel are not divided by.

    Args:
        deltas: one tensor per model.
        weights: wᵢ.
        factors: cᵢ, which undo what was dropped and do not count as weights; 1 by default.
        normalize: divide by the sum of the weights.
        lambda_: factor of the result.

    Example: weights 3 and 1 of the deltas 2 and 6 sum to 12, and to 12 / 4 = 3 if normalised.
    """
    scale, total = lambda_, sum(weights)
    if normalize and abs(total) > NEGLIGIBLE * max(map(abs, weights)):
        scale /= total
    factors = [1.0] * len(deltas) if factors is None else factors
    first, *others = (weight * factor * scale for weight, factor in zip(weights, factors, strict=True))
    merged = deltas[0] * first
    for delta, coefficient in zip(deltas[1:], others, strict=True):
        merged.add_(delta, alpha=coefficient)
    return merged


def _choose(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the entries of a where a mask is true, and of b elsewhere; both are overwritten."""
    chosen = mask.to(a.dtype)
    return a.mul_(chosen).add_(b.addcmul_(b, chosen, value=-1))


def sum_elected(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    factors: Sequence[float] | None = None,
    *,
    normalize: bool,
    lambda_: float = 1.0,
    votes: Tensor | None = None,
    floor: float = 0.0,
) -> Tensor:
    """Return λ Σ of the terms wᵢ cᵢ δᵢ that stay in an election, divided by Σ wᵢ of these terms if `normalize`.

    Args:
        deltas: one tensor per model.
        weights: wᵢ.
        factors: cᵢ, which undo what was dropped and do not count as weights; 1 by default.
        normalize: divide by the sum of the weights that stayed, where they do not cancel.
        lambda_: factor of the result.
        votes: tensor whose sign decides; by default the sum of the terms.
        floor: the divisor is raised to this number.

    Example: the terms 3, −1 and 1 sum to 3, so + wins, and the mean of those that stay is (3 + 1) / 2 = 2.
    """
    factors = [1.0] * len(deltas) if factors is None else factors
    positive, negative, positive_share, negative_share = (torch.zeros_like(deltas[0]) for _ in range(4))
    for delta, weight, factor in zip(deltas, weights, factors, strict=True):
        coefficient = weight * factor
        term = delta if coefficient == 1 else delta * coefficient
        positive += term.clamp(min=0)
        negative += term.clamp(max=0)
        if normalize:
            sign = term.sign()
            positive_share.add_(sign.clamp(min=0), alpha=weight)
            negative_share.add_(sign.clamp_(max=0), alpha=-weight)
    plus = positive >= -negative if votes is None else votes >= 0
    merged = _choose(plus, positive, negative)
    if normalize:
        divisor = _choose(plus, positive_share, negative_share)
        if floor:
            divisor.clamp_(min=floor)
        else:
            cancelled = (divisor.abs() <= NEGLIGIBLE * max(map(abs, weights))).to(divisor.dtype)
            divisor.mul_(1 - cancelled).add_(cancelled)
        merged.div_(divisor)
    return merged if lambda_ == 1 else merged.mul_(lambda_)
