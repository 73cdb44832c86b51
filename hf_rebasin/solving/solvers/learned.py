"""Learned matching: rotations, bases and scales by gradients, from another solver's alignment; permutations are kept.

Generalized linear mode connectivity for transformers (2025, arXiv 2506.22712), section 4.2. As all groups act
linearly, moving both ends reaches nothing that moving one could not, but it is easier to optimise.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...alignment.elements.relaxation import Permuting
from ..gradient_descent import Cost, Descent


@dataclass(frozen=True, kw_only=True)
class Solver(Descent):
    """Options of learned matching: those of `Descent`, with other defaults.

    The loss is taken at random points: an alignment learned at the midpoint alone may be bad elsewhere on the line if
    one of the models is much better than the other.
    """

    permuting: Permuting = "kept"
    steps: int = 1000
    smooth_lr: float = 1e-2
    optimizer: Literal["adamw", "adam", "sgd"] = "adam"
    schedule: Literal["constant", "cosine"] = "cosine"
    interval: tuple[float, float] = (0.2, 0.8)
    both_ends: bool = True

    DATA_COST: ClassVar[Cost] = "rnd"
