"""Signed permutations: exact for units under an odd nonlinearity such as tanh, f(-x) = -f(x)."""

from ..elements.monomial import Monomial


class Element(Monomial):
    """Permutations with a sign for every item."""

    SIGNED, SCALED = True, False
