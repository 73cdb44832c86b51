"""Weight matching: the alignment that maximises Σ ⟨fixed, g · moving⟩, from the weights alone.

Git Re-Basin (Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836), section 3.2: for one symmetry at a time, with all
others held, the objective is linear in g; its matrix is one contraction per block over all other dimensions, and the
best g is its projection to the group (for permutations, a linear assignment). Nested symmetries are decided together,
as for heads in 2403.00986. The objective never falls from sweep to sweep, and never ends below that of the identity.
"""

from dataclasses import dataclass, replace
from functools import partial

from ..canonical import in_full
from ..coordinate_ascent import coordinate_ascent
from ..problem import Problem
from ..similarity import weight_similarity
from ..solution import Solution


@dataclass(frozen=True)
class Solver:
    """Knobs of weight matching.

    Args:
        starts: how many starts are tried; the highest objective wins. The first goes outwards from what cannot move,
            the others begin at the identity and take the units in random order.
        max_sweeps: over all units, for every start.
    """

    starts: int = 2
    max_sweeps: int = 100

    def solve(self, problem: Problem) -> Solution:
        return in_full(problem, self._ascend, replace(self, starts=1, max_sweeps=min(2, self.max_sweeps))._ascend)

    def _ascend(self, problem: Problem) -> Solution:
        return coordinate_ascent(problem, partial(weight_similarity, problem), self.starts, self.max_sweeps)
