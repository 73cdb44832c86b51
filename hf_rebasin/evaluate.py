"""Measuring a merge: losses along the line between two models, and the barrier on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .checkpoint import Checkpoint
from .merging import combine

Evaluate = Callable[[nn.Module], tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy on even points of the line from one model to another, both ends included.

    Args:
        loss: mean loss at λ = 0 … 1.
        accuracy: the same points.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """max over λ of C((1−λ)θ_A + λθ_B) − [(1−λ)C(θ_A) + λC(θ_B)]; 0 where the line never rises above its ends."""
        return _highest_rise(self.loss)

    @property
    def error_barrier(self) -> float:
        """The same of the error rate, 1 − accuracy."""
        return _highest_rise([1 - accuracy for accuracy in self.accuracy])

    @property
    def middle(self) -> tuple[float, float]:
        """(loss, accuracy) halfway."""
        return self.loss[len(self.loss) // 2], self.accuracy[len(self.accuracy) // 2]


def _highest_rise(costs: Sequence[float]) -> float:
    """Above the straight line between its ends."""
    n = len(costs) - 1
    return max(c - (costs[0] * (n - i) + costs[n] * i) / n for i, c in enumerate(costs))


def curve(
    fixed: nn.Module,
    moving: nn.Module,
    evaluate: Evaluate,
    *,
    points: int = 25,
    prepare: Callable[[nn.Module], object] = lambda model: None,
) -> Curve:
    """Evaluate on the line between two models of one class.

    Args:
        fixed: the model at λ = 0; neither model is changed.
        moving: the model at λ = 1.
        evaluate: gives (loss, accuracy) of a model.
        points: how many, ends included; an odd number has the midpoint among them.
        prepare: what is done to every model first, ends included, such as recomputing BatchNorm statistics.
    """
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    results = []
    for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        model = combine([a, b], "lerp", {"t": t}).model()
        prepare(model)
        results.append(evaluate(model))
    return Curve(tuple(loss for loss, _ in results), tuple(accuracy for _, accuracy in results))
