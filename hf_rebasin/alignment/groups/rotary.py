"""Scaled plane rotations, the non-zero complex numbers: exact for a pair of query-key units that RoPE rotates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..elements.matrices import NEGLIGIBLE, Matrices, Moments
from ..elements.monomial import balance_scales, minimise_log_scale
from ..elements.relaxation import Relaxation, Relaxed, relax_matrix


class Element(Matrices):
    """Matrices [[a, -b], [b, a]], which commute with every plane rotation; always of size 2."""

    PERMUTATIONS = "held"
    SIZE = 2

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        """Draw a uniform angle, and scales between ½ and 2."""
        angle = torch.empty(batch, dtype=torch.float64).uniform_(-torch.pi, torch.pi, generator=generator)
        scale = torch.empty(batch, dtype=torch.float64).uniform_(-1, 1, generator=generator).exp2_()
        return cls(_matrices(scale * angle.cos(), scale * angle.sin()))

    @classmethod
    def project(cls, similarity: Tensor) -> Element:
        """Find the best rotation: the angle of the part of the similarity that is such a matrix."""
        a, b = _complex(similarity.to("cpu", torch.float64))
        length = torch.hypot(a, b)
        negligible = length <= NEGLIGIBLE
        return cls(_matrices(torch.where(negligible, 1.0, a / length), torch.where(negligible, 0.0, b / length)))

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        return torch.hypot(*_complex(similarity.to("cpu", torch.float64)))

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Element:
        """Find the scale that makes queries as large as keys."""
        x, y = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (writers, readers))
        scale = balance_scales(x, y)
        return cls(_matrices(scale, torch.zeros_like(scale)))

    @classmethod
    def fit(cls, writers: Moments, readers: Moments) -> Element:
        """Find the best scaled rotation: given a scale s, its angle is that of s ⟨x, y⟩ + ⟨u, v⟩ / s."""
        (yy, vv), (a, b), (c, d) = (_squares(writers, readers), _complex(writers[1]), _complex(readers[1]))

        def loss(log: Tensor) -> Tensor:
            s = log.exp()
            return s * s * yy + vv / (s * s) - 2 * torch.hypot(s * a + c / s, s * b + d / s)

        s = minimise_log_scale(loss, a).exp()
        real, imaginary = s * a + c / s, s * b + d / s
        length = torch.hypot(real, imaginary)
        usable = length > NEGLIGIBLE
        return cls(
            _matrices(torch.where(usable, s * real / length, 1.0), torch.where(usable, s * imaginary / length, 0.0))
        )

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
        """Relax by the complex logarithm: the logarithm of the scale, and the angle."""
        log, angle = relaxation.zeros(*batch), relaxation.zeros(*batch)
        return relax_matrix(cls, (log, angle), lambda: _matrices(log.exp() * angle.cos(), log.exp() * angle.sin()))

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        a, b = matrix[..., 0, 0], matrix[..., 1, 0]
        differs = (matrix - _matrices(a, b)).abs() > 1e-9 * torch.hypot(a, b)[..., None, None]
        if differs.any() or not torch.hypot(a, b).all():
            raise ValueError("the matrix is not a scaled rotation")


def _complex(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Return twice the (a, b) of the part of a matrix that has the form [[a, -b], [b, a]]."""
    return similarity[..., 0, 0] + similarity[..., 1, 1], similarity[..., 1, 0] - similarity[..., 0, 1]


def _squares(writers: Moments, readers: Moments) -> list[Tensor]:
    return [yy.diagonal(dim1=-2, dim2=-1).sum(-1) for _, _, yy in (writers, readers)]


def _matrices(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
