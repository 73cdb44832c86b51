"""Sinkhorn re-basin: permutations by gradient descent through doubly stochastic matrices, on any cost.

Re-basin via implicit Sinkhorn differentiation (Guerrero Peña, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli
2023, arXiv 2212.12042). Larger groups than permutations descend along with them.
"""

from dataclasses import dataclass

from ..gradient_descent import Descent


@dataclass(frozen=True)
class Solver(Descent):
    """Knobs of Sinkhorn re-basin: those of `Descent`."""
