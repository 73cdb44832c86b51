"""Learned matching: rotations, bases and scales by gradients, from where another solver ended; permutations are kept.

Generalized linear mode connectivity for transformers (2025, arXiv 2506.22712), section 4.2. Moving both ends adds
nothing that moving one could not reach, as all groups act linearly, but is found more easily.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...alignment.elements.relaxation import Permuting
from ..gradient_descent import Cost, Descent


@dataclass(frozen=True)
class Solver(Descent):
    """Knobs of learned matching: those of `Descent`.

    By the loss at random places: halfway alone, what is found is good there and may be bad beside it, where one of the
    models is much better than the other.
    """

    permuting: Permuting = "kept"
    steps: int = 1000
    smooth_lr: float = 1e-2
    optimizer: Literal["adamw", "adam", "sgd"] = "adam"
    schedule: Literal["constant", "cosine"] = "cosine"
    interval: tuple[float, float] = (0.2, 0.8)
    both_ends: bool = True

    ON_DATA: ClassVar[Cost] = "rnd"
