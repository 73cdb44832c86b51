"""Invertible matrices: exact for units between two matrix products, such as query-key and value-output units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..elements.matrices import NEGLIGIBLE, Matrices, Moments, random_rotations
from ..elements.relaxation import Relaxation, Relaxed, relax_matrix

MAX_CONDITION = 1e3  # of a fitted basis: a nearly singular one would amplify rounding errors


class Element(Matrices):
    """Invertible matrices; readers move by the inverse transpose."""

    MOVES_ONE = True

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        """Draw two rotations, and stretches between ½ and 2 between them."""
        stretch = torch.empty(*batch, n, dtype=torch.float64).uniform_(-1, 1, generator=generator).exp2_()
        left, right = (random_rotations(batch, n, generator) for _ in range(2))
        return cls(left * stretch.unsqueeze(-2) @ right)

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Element:
        """Find the symmetric g that makes both Gram matrices equal, g X g = g⁻¹ Y g⁻¹.

        g² is the geometric mean X⁻¹ # Y = X^-½ (X^½ Y X^½)^½ X^-½ (Bhatia, Positive Definite Matrices, 4.1). The
        balanced factors are determined by their product up to a rotation. Where a Gram matrix is singular, as in a
        pruned head, g is the identity.
        """
        n = writers.shape[-1]
        x, y = writers, readers
        root, unroot = _powers(x, 0.5, -0.5)
        (middle,) = _powers(root @ y @ root, 0.5)
        (balanced,) = _powers(unroot @ middle @ unroot, 0.5)
        spectra = [torch.linalg.eigvalsh(gram) for gram in (x, y)]
        regular = torch.stack([e[..., 0] > 1e-10 * e[..., -1].clamp_min(NEGLIGIBLE) for e in spectra]).all(0)
        return cls(torch.where(regular[..., None, None], balanced, torch.eye(n, dtype=torch.float64)))

    @classmethod
    def fit(cls, writers: Moments, readers: Moments) -> Element:
        """Minimise ‖x - g y‖² + ‖u - g⁻ᵀ v‖² by L-BFGS from the identity.

        Where the result is no better than the identity, or ill-conditioned, as for heads that do nothing, the identity
        is returned.
        """
        (_, xy, yy), (_, uv, vv) = writers, readers

        def loss_and_gradient(g: Tensor) -> tuple[Tensor, Tensor]:
            # without the constant terms of the loss
            dual = torch.linalg.inv(g).mT
            x, u = g @ yy - xy, dual @ vv - uv
            return (g * (x - xy) + dual * (u - uv)).sum((-2, -1)), 2 * (x - dual @ u.mT @ dual)

        start = cls.identity(tuple(xy.shape[:-2]), xy.shape[-1]).matrix
        before = loss_and_gradient(start)[0]
        size = before.abs().sum() + torch.stack([yy, vv]).diagonal(dim1=-2, dim2=-1).sum()
        if size <= NEGLIGIBLE:
            return cls(start)
        g = start.clone()
        tolerances: dict[str, Any] = {"tolerance_grad": 1e-12, "tolerance_change": 1e-14}
        optimizer = torch.optim.LBFGS([g], max_iter=200, history_size=20, line_search_fn="strong_wolfe", **tolerances)

        def closure() -> Tensor:
            losses, gradient = loss_and_gradient(g)  # without autograd, which would take half of the time
            g.grad = gradient / size
            return losses.sum() / size

        optimizer.step(closure)
        good = (loss_and_gradient(g)[0] < before) & (torch.linalg.cond(g) < MAX_CONDITION)
        return cls(torch.where(good[..., None, None], g, start))

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
        """Relax the matrix itself, as its difference from the identity."""
        latent, eye = relaxation.zeros(*batch, n, n), torch.eye(n, dtype=torch.float64, device=relaxation.device)
        return relax_matrix(cls, (latent,), lambda: eye + latent)

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        if not (torch.linalg.cond(matrix) < 1e12).all():
            raise ValueError("the matrix has no inverse")


def _powers(symmetric: Tensor, *powers: float) -> list[Tensor]:
    """Return powers of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
    values = values.clamp_min(NEGLIGIBLE)
    return [vectors * values.pow(power).unsqueeze(-2) @ vectors.mT for power in powers]
