"""Rotations and reflections: exact for the residual stream of RMSNorm networks once gains are folded.

Ashkboos et al. 2024 (SliceGPT, arXiv 2401.15024), section 3: RMSNorm(x Q) = RMSNorm(x) Q.
"""

from ..elements.matrices import Matrices


class Element(Matrices):
    """Orthogonal matrices."""

    ISOMETRIC = True
    ROTATES = True
