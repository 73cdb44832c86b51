"""Sinkhorn re-basin: permutations by gradient descent through doubly stochastic matrices, on any cost.

Re-basin via implicit Sinkhorn differentiation (Guerrero Peña, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli
2023, arXiv 2212.12042). Groups larger than permutations are optimised along with them.
"""

from dataclasses import dataclass

from ..gradient_descent import Descent


@dataclass(frozen=True, kw_only=True)
class Solver(Descent):
    """Options of Sinkhorn re-basin: those of `Descent`."""
