"""Permutations with scales other than 0: exact for the up and down projections of a gated MLP, act(gate) · up.

The gate follows the permutation alone, so its pattern is marked `~`.
"""

from ..elements.monomial import Monomial


class Element(Monomial):
    """Permutations with a scale of either sign for every place."""

    SIGNED, SCALED = True, True
