"""Rotations that keep the ones-vector, Q 1 = 1: exact for the residual stream of pre-LayerNorm networks.

A LayerNorm takes the mean off, so it is an RMSNorm on the plane at right angles to 1, and O(n - 1) turns that plane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..elements.matrices import Matrices, polar, random_rotations
from ..elements.relaxation import Relaxed, Softening, relaxed_matrix


class Element(Matrices):
    """Orthogonal matrices Q with Q 1 = 1."""

    ISOMETRIC = True

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        plane = _plane(n)
        return cls(plane @ random_rotations(batch, n - 1, generator) @ plane.mT + 1 / n)

    @classmethod
    def project(cls, similarity: Tensor) -> Element:
        """The best Q with Q 1 = 1; what of the similarity is not in the plane is the same for all of them."""
        plane = _plane(similarity.shape[-1])
        whole = similarity.to("cpu", torch.float64)
        return cls(plane @ polar(plane.mT @ whole @ plane) @ plane.mT + 1 / len(plane))

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        return cls.project(similarity).contract(similarity)

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, softening: Softening) -> Relaxed:
        """A rotation of the plane at right angles to the ones-vector."""
        latent, plane = softening.zeros(*batch, n - 1, n - 1), _plane(n).to(softening.device)
        one, still = (torch.eye(m, dtype=torch.float64, device=softening.device) for m in (n, n - 1))

        def matrix() -> Tensor:
            """Exactly I for no turn."""
            return one + plane @ (torch.matrix_exp(latent - latent.mT) - still) @ plane.mT

        return relaxed_matrix(cls, (latent,), matrix)

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        super().refuse(matrix)
        far = (matrix.sum(-1) - 1).abs().amax().item()
        if far > 1e-6:
            raise ValueError(f"the matrix does not keep the ones-vector: a row sums up to {far:.2g} from 1")


def _plane(n: int) -> Tensor:
    """An orthonormal basis of what is at right angles to the ones-vector, (n, n - 1): a Householder reflection."""
    normal = torch.full((n,), n**-0.5, dtype=torch.float64)
    normal[0] += 1
    reflection = torch.eye(n, dtype=torch.float64) - torch.outer(normal, normal) / normal[0]
    return reflection[:, 1:]
