"""How far a curve rises above the line between its ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def rises(at: Sequence[float], costs: Sequence[float]) -> tuple[float, ...]:
    """How far costs at λ = `at` are above the straight line between their ends."""
    return tuple(c - ((1 - t) * costs[0] + t * costs[-1]) for t, c in zip(at, costs, strict=True))


def highest(values: Sequence[float]) -> float:
    """The highest; NaN where one of them is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def mean_over(at: Sequence[float], values: Sequence[float]) -> float:
    """∫₀¹ over λ by the trapezoid rule."""
    points = zip(at, values, strict=True)
    return sum((t - s) * (x + y) / 2 for (s, x), (t, y) in pairwise(points))


def halfway(at: Sequence[float]) -> int:
    """The number of the point nearest to λ = ½, the first of equals."""
    return min(range(len(at)), key=lambda i: abs(at[i] - 0.5))
