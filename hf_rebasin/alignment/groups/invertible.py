"""Invertible matrices: exact for what only matrix products touch, as query-key and value-output units in a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..elements.matrices import TINY, Matrices, Sides, random_rotations
from ..elements.relaxation import Relaxed, Softening, relaxed_matrix

STEEP = 1e3  # condition of a basis that a fit may end at: what is nearly singular rounds a model away


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
        x, y = writers, readers
        root, unroot = _powers(x, 0.5, -0.5)
        (middle,) = _powers(root @ y @ root, 0.5)
        (balanced,) = _powers(unroot @ middle @ unroot, 0.5)
        least = [torch.linalg.eigvalsh(gram) for gram in (x, y)]
        sound = torch.stack([e[..., 0] > 1e-10 * e[..., -1].clamp_min(TINY) for e in least]).all(0)
        return cls(torch.where(sound[..., None, None], balanced, torch.eye(n, dtype=torch.float64)))

    @classmethod
    def fit(cls, writers: Sides, readers: Sides) -> Element:
        """The g of least ‖x - g y‖² + ‖u - g⁻ᵀ v‖² that L-BFGS finds from the identity.

        Where it is not better, or too steep, as for heads that do nothing, the identity.
        """
        (_, xy, yy), (_, uv, vv) = writers, readers

        def at(g: Tensor) -> tuple[Tensor, Tensor]:
            """(the losses less what no g changes, their gradient)"""
            dual = torch.linalg.inv(g).mT
            x, u = g @ yy - xy, dual @ vv - uv
            return (g * (x - xy) + dual * (u - uv)).sum((-2, -1)), 2 * (x - dual @ u.mT @ dual)

        start = cls.identity(tuple(xy.shape[:-2]), xy.shape[-1]).matrix
        before = at(start)[0]
        size = before.abs().sum() + torch.stack([yy, vv]).diagonal(dim1=-2, dim2=-1).sum()
        if size <= TINY:
            return cls(start)
        g = start.clone()
        exact: dict[str, Any] = {"tolerance_grad": 1e-12, "tolerance_change": 1e-14}
        search = torch.optim.LBFGS([g], max_iter=200, history_size=20, line_search_fn="strong_wolfe", **exact)

        def closure() -> Tensor:
            losses, slope = at(g)  # by hand: half of the time would be spent in autograd
            g.grad = slope / size
            return losses.sum() / size

        search.step(closure)
        good = (at(g)[0] < before) & (torch.linalg.cond(g) < STEEP)
        return cls(torch.where(good[..., None, None], g, start))

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, softening: Softening) -> Relaxed:
        """The matrix itself, as what is added to the identity."""
        latent, one = softening.zeros(*batch, n, n), torch.eye(n, dtype=torch.float64, device=softening.device)
        return relaxed_matrix(cls, (latent,), lambda: one + latent)

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        if not (torch.linalg.cond(matrix) < 1e12).all():
            raise ValueError("the matrix has no inverse")


def _powers(symmetric: Tensor, *powers: float) -> list[Tensor]:
    """Powers of positive matrices."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
    values = values.clamp_min(TINY)
    return [vectors * values.pow(power).unsqueeze(-2) @ vectors.mT for power in powers]
