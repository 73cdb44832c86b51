"""Permutations with non-zero scales: exact for the up and down projections of a gated MLP, act(gate) · up.

The gate only takes the permutation, so its pattern is marked `~`.
"""

from ..elements.monomial import Monomial


class Element(Monomial):
    """Permutations with a non-zero scale for every item."""

    SIGNED, SCALED = True, True
