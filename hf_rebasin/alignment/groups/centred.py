"""Rotations that fix the ones-vector, Q 1 = 1: exact for the residual stream of pre-LayerNorm networks.

LayerNorm subtracts the mean, so it is an RMSNorm on the hyperplane orthogonal to 1, which O(n - 1) rotates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..elements.matrices import Matrices, polar_factor, random_rotations
from ..elements.relaxation import Relaxation, Relaxed, relax_matrix


class Element(Matrices):
    """Orthogonal matrices Q with Q 1 = 1."""

    ISOMETRIC = True
    ROTATES = True

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        plane = _plane(n)
        return cls(plane @ random_rotations(batch, n - 1, generator) @ plane.mT + 1 / n)

    @classmethod
    def project(cls, similarity: Tensor) -> Element:
        """Find the best Q with Q 1 = 1; the rest of the similarity contributes equally to all of them."""
        plane = _plane(similarity.shape[-1])
        wide = similarity.to("cpu", torch.float64)
        return cls(plane @ polar_factor(plane.mT @ wide @ plane) @ plane.mT + 1 / len(plane))

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        return cls.project(similarity).contract(similarity)

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
        """Relax rotations of the hyperplane orthogonal to the ones-vector."""
        latent, plane = relaxation.zeros(*batch, n - 1, n - 1), _plane(n).to(relaxation.device)
        eye, plane_eye = (torch.eye(m, dtype=torch.float64, device=relaxation.device) for m in (n, n - 1))

        def matrix() -> Tensor:
            # exactly I for a latent of 0
            return eye + plane @ (torch.matrix_exp(latent - latent.mT) - plane_eye) @ plane.mT

        return relax_matrix(cls, (latent,), matrix)

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        super().refuse(matrix)
        error = (matrix.sum(-1) - 1).abs().amax().item()
        if error > 1e-6:
            raise ValueError(f"the matrix does not fix the ones-vector: row sums differ from 1 by up to {error:.2g}")


def _plane(n: int) -> Tensor:
    """Return an orthonormal basis of the complement of the ones-vector, (n, n - 1), by a Householder reflection."""
    normal = torch.full((n,), n**-0.5, dtype=torch.float64)
    normal[0] += 1
    reflection = torch.eye(n, dtype=torch.float64) - torch.outer(normal, normal) / normal[0]
    return reflection[:, 1:]
