"""Loss and metrics along the line between two models, and how far the loss rises above its chord."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..errors import OptionError, listed, nearest


@dataclass(frozen=True)
class Curve:
    """Loss and metrics at points on the line from one model to another, both ends included.

    Args:
        at: λ of the points, ascending from 0 to 1.
        loss: mean loss at every point.
        metrics: `{name: values at the same points}`.

    Raises:
        OptionError: the points do not ascend from 0 to 1, or there are not as many values as points.

    Example:
        >>> curve = Curve(at=(0, 0.5, 1), loss=(0.1, 1.2, 0.3))
        >>> curve.barrier, curve.area, curve.middle
        (1.0, 0.5, {'loss': 1.2})
    """

    at: tuple[float, ...]
    loss: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.at) < 2 or (self.at[0], self.at[-1]) != (0, 1) or list(self.at) != sorted(set(self.at)):
            raise OptionError(f"λ has to ascend from 0 to 1, but is {listed(map(str, self.at), 9)}")
        for name, values in {"loss": self.loss, **self.metrics}.items():
            if len(values) != len(self.at):
                raise OptionError(f"{name} has {len(values)} values at {len(self.at)} points")

    @property
    def accuracy(self) -> tuple[float, ...]:
        """The accuracy at every point; OptionError if it was not measured."""
        return self.of("accuracy")

    def of(self, name: str) -> tuple[float, ...]:
        """The values of a metric or of the loss; OptionError if it was not measured."""
        if name == "loss":
            return self.loss
        if name not in self.metrics:
            raise OptionError(f"{name!r} was not measured on this line{nearest(name, ['loss', *self.metrics])}")
        return self.metrics[name]

    @property
    def rises(self) -> tuple[float, ...]:
        """The height of the loss above the chord, the straight line between its ends, at every point."""
        return rises_above_chord(self.at, self.loss)

    @property
    def barrier(self) -> float:
        """max over λ of C((1−λ)θ_A + λθ_B) − [(1−λ)C(θ_A) + λC(θ_B)]; 0 if the loss never rises above its chord.

        NaN if any of the losses is.
        """
        return nan_max(self.rises)

    @property
    def error_barrier(self) -> float:
        """The barrier of the error rate, 1 − accuracy."""
        return nan_max(rises_above_chord(self.at, [1 - accuracy for accuracy in self.accuracy]))

    @property
    def area(self) -> float:
        """The mean rise over λ, by the trapezoid rule; negative where the loss sags below its chord."""
        return trapezoid_mean(self.at, self.rises)

    @property
    def middle(self) -> dict[str, float]:
        """The loss and every metric at the point nearest to λ = ½."""
        i = midpoint_index(self.at)
        return {"loss": self.loss[i], **{name: values[i] for name, values in self.metrics.items()}}

    @property
    def best(self) -> float:
        """The λ of the lowest loss."""
        return self.best_by("loss")

    def best_by(self, name: str) -> float:
        """The λ of the lowest loss or perplexity, or of the highest value of any other metric; the first of equals.

        Raises:
            OptionError: it was not measured, or is NaN everywhere.
        """
        sign = 1 if name in ("loss", "perplexity") else -1
        values = {t: sign * value for t, value in zip(self.at, self.of(name), strict=True) if not math.isnan(value)}
        if not values:
            raise OptionError(f"{name!r} is NaN on the whole line, so no model on it is the best")
        return min(values, key=lambda t: values[t])


def rises_above_chord(at: Sequence[float], costs: Sequence[float]) -> tuple[float, ...]:
    """The height of costs at λ = `at` above the straight line between the first and the last of them."""
    return tuple(c - ((1 - t) * costs[0] + t * costs[-1]) for t, c in zip(at, costs, strict=True))


def nan_max(values: Sequence[float]) -> float:
    """The highest value; NaN if any of them is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def trapezoid_mean(at: Sequence[float], values: Sequence[float]) -> float:
    """∫₀¹ of the values over λ by the trapezoid rule."""
    points = zip(at, values, strict=True)
    return sum((t - s) * (x + y) / 2 for (s, x), (t, y) in pairwise(points))


def midpoint_index(at: Sequence[float]) -> int:
    """The index of the point nearest to λ = ½; the first of equals."""
    return min(range(len(at)), key=lambda i: abs(at[i] - 0.5))
