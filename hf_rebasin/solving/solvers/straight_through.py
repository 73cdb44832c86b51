"""Straight-through matching: the forward pass uses the best assignment, the gradient passes unchanged.

Git Re-Basin (Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836), section 3.3, with latent matrices in place of
latent weights.
"""

from dataclasses import dataclass
from typing import Literal

from ...alignment.elements.relaxation import Permuting
from ..gradient_descent import Descent


@dataclass(frozen=True, kw_only=True)
class Solver(Descent):
    """Options of straight-through matching: those of `Descent`, with other defaults."""

    permuting: Permuting = "straight_through"
    steps: int = 1000
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float | None = 0.0
    patience: int = 100
