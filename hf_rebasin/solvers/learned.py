"""Learned matching: rotations, bases and scales by gradients, from where another solver ended; permutations are kept.

Generalized linear mode connectivity for transformers (2025, arXiv 2506.22712), section 4.2. Moving both ends adds
nothing that moving one could not reach, as all groups act linearly, but is found more easily.
"""

from dataclasses import dataclass
from typing import Literal

from ..descent import Descent
from ..relaxing import Permuting


@dataclass(frozen=True)
class Solver(Descent):
    """Knobs of learned matching: those of `Descent`."""

    permuting: Permuting = "kept"
    steps: int = 1000
    smooth_lr: float = 1e-2
    optimizer: Literal["adamw", "adam", "sgd"] = "adam"
    schedule: Literal["constant", "cosine"] = "cosine"
    both_ends: bool = True
