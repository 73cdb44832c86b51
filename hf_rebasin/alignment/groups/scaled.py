"""Permutations with positive scales: exact for units under ReLU, f(s x) = s f(x) for s > 0."""

from ..elements.monomial import Monomial


class Element(Monomial):
    """Permutations with a positive scale for every item."""

    SIGNED, SCALED = False, True
