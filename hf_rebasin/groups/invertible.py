"""Invertible matrices: exact for what only matrix products touch, as query-key and value-output units in a head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..elements import TINY, Matrices, random_rotations


class Element(Matrices):
    """Invertible matrices; readers move by the inverse transpose."""

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        """Two rotations, and stretches between ½ and 2 between them."""
        stretch = torch.empty(*batch, n, dtype=torch.float64).uniform_(-1, 1, generator=generator).exp2_()
        left, right = (random_rotations(batch, n, generator) for _ in range(2))
        return cls(left * stretch.unsqueeze(-2) @ right)

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Element:
        """The symmetric g that makes both Gram matrices the same, g X g = g⁻¹ Y g⁻¹.

        g² is their geometric mean X⁻¹ # Y = X^-½ (X^½ Y X^½)^½ X^-½ (Bhatia, Positive Definite Matrices, 4.1). What
        is balanced is determined by the product of the two factors up to a rotation. Where a Gram matrix is singular,
        as in a head that was pruned, nothing is done.
        """
        n = writers.shape[-1]
        x, y = (gram.to("cpu", torch.float64) for gram in (writers, readers))
        root, unroot = _powers(x, 0.5, -0.5)
        (middle,) = _powers(root @ y @ root, 0.5)
        (balanced,) = _powers(unroot @ middle @ unroot, 0.5)
        least = [torch.linalg.eigvalsh(gram) for gram in (x, y)]
        sound = torch.stack([e[..., 0] > 1e-10 * e[..., -1].clamp_min(TINY) for e in least]).all(0)
        return cls(torch.where(sound[..., None, None], balanced, torch.eye(n, dtype=torch.float64)))

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        if matrix.numel() and torch.linalg.cond(matrix).amax() > 1e12:
            raise ValueError("the matrix has no inverse")


def _powers(symmetric: Tensor, *powers: float) -> list[Tensor]:
    """Powers of positive matrices."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
    values = values.clamp_min(TINY)
    return [vectors * values.pow(power).unsqueeze(-2) @ vectors.mT for power in powers]
