"""Weight matching: the alignment that maximises Σ ⟨fixed, g · moving⟩, from the weights alone.

Git Re-Basin (Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836), section 3.2. In one symmetry, with all others held,
the objective is linear in g. Its matrix is a sum of one contraction per block over all other dimensions, and the best
g is the projection of that matrix to the group (for permutations, a linear assignment). Nested symmetries are solved
together, as for heads in arXiv 2403.00986. The objective never falls from sweep to sweep, and never ends below the
identity's.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from ...registry import DataUse
from ..canonical import solve_over_full_groups
from ..coordinate_ascent import coordinate_ascent
from ..problem import Problem
from ..similarity import weight_similarity
from ..solution import Solution


@dataclass(frozen=True)
class Solver:
    """Options of weight matching.

    Args:
        starts: number of starts, of which the highest objective wins. The first goes outwards from what cannot move,
            the others begin at the identity and visit the units in random order.
        max_sweeps: greatest number of sweeps over all units, for every start.
    """

    starts: int = 2
    max_sweeps: int = 100

    data: ClassVar[DataUse] = "none"

    @staticmethod
    def memory(model: int, *, data: bool) -> int:
        return 0

    def solve(self, problem: Problem) -> Solution:
        quick = replace(self, starts=1, max_sweeps=min(2, self.max_sweeps))
        return solve_over_full_groups(problem, self._ascend, quick._ascend)

    def _ascend(self, problem: Problem) -> Solution:
        return coordinate_ascent(problem, partial(weight_similarity, problem), self.starts, self.max_sweeps)
