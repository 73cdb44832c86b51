"""Turns with a scale, the complex numbers without 0: exact for a pair of query-key units that RoPE turns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..elements.matrices import TINY, Matrices, Sides
from ..elements.monomial import even, lowest
from ..elements.relaxation import Relaxed, Softening, relaxed_matrix


class Element(Matrices):
    """Matrices [[a, -b], [b, a]], which commute with every turn; always of size 2."""

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        """Any angle, and scales between ½ and 2."""
        angle = torch.empty(batch, dtype=torch.float64).uniform_(-torch.pi, torch.pi, generator=generator)
        scale = torch.empty(batch, dtype=torch.float64).uniform_(-1, 1, generator=generator).exp2_()
        return cls(_matrices(scale * angle.cos(), scale * angle.sin()))

    @classmethod
    def project(cls, similarity: Tensor) -> Element:
        """The best turn: the angle of the part of the similarity that is such a matrix."""
        a, b = _complex(similarity.to("cpu", torch.float64))
        length = torch.hypot(a, b)
        none = length <= TINY
        return cls(_matrices(torch.where(none, 1.0, a / length), torch.where(none, 0.0, b / length)))

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        return torch.hypot(*_complex(similarity.to("cpu", torch.float64)))

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Element:
        """The scale that makes queries as large as keys."""
        x, y = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (writers, readers))
        scale = even(x, y)
        return cls(_matrices(scale, torch.zeros_like(scale)))

    @classmethod
    def fit(cls, writers: Sides, readers: Sides) -> Element:
        """The best turn with a scale: of every scale the best turn is known, (a + i b) ~ s x + u / s."""
        (yy, vv), (a, b), (c, d) = (_squares(writers, readers), _complex(writers[1]), _complex(readers[1]))

        def loss(log: Tensor) -> Tensor:
            s = log.exp()
            return s * s * yy + vv / (s * s) - 2 * torch.hypot(s * a + c / s, s * b + d / s)

        s = lowest(loss, a).exp()
        real, imaginary = s * a + c / s, s * b + d / s
        length = torch.hypot(real, imaginary)
        turned = length > TINY
        return cls(
            _matrices(torch.where(turned, s * real / length, 1.0), torch.where(turned, s * imaginary / length, 0.0))
        )

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, softening: Softening) -> Relaxed:
        """The complex logarithm: of the scale, and the angle."""
        log, angle = softening.zeros(*batch), softening.zeros(*batch)
        return relaxed_matrix(cls, (log, angle), lambda: _matrices(log.exp() * angle.cos(), log.exp() * angle.sin()))

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        a, b = matrix[..., 0, 0], matrix[..., 1, 0]
        far = (matrix - _matrices(a, b)).abs() > 1e-9 * torch.hypot(a, b)[..., None, None]
        if far.any() or not torch.hypot(a, b).all():
            raise ValueError("the matrix is not a turn with a scale")


def _complex(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a matrix that is [[a, -b], [b, a]] / 2."""
    return similarity[..., 0, 0] + similarity[..., 1, 1], similarity[..., 1, 0] - similarity[..., 0, 1]


def _squares(writers: Sides, readers: Sides) -> list[Tensor]:
    return [yy.diagonal(dim1=-2, dim2=-1).sum(-1) for _, _, yy in (writers, readers)]


def _matrices(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
