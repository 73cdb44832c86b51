"""Turns with a scale, the complex numbers without 0: exact for a pair of query-key units that RoPE turns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..elements import TINY, Matrices


class Element(Matrices):
    """Matrices [[a, -b], [b, a]], which commute with every turn; always of size 2."""

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        """Any angle, and scales between ½ and 2."""
        angle = torch.empty(batch, dtype=torch.float64).uniform_(-torch.pi, torch.pi, generator=generator)
        scale = torch.empty(batch, dtype=torch.float64).uniform_(-1, 1, generator=generator).exp2_()
        return cls(_matrices(scale * angle.cos(), scale * angle.sin()))

    @classmethod
    def project(cls, similarity: Tensor, diagonal: Tensor | None = None) -> Element:
        """The best turn: the angle of the part of the similarity that is such a matrix."""
        whole = (similarity if diagonal is None else similarity + diagonal).to("cpu", torch.float64)
        a = whole[..., 0, 0] + whole[..., 1, 1]
        b = whole[..., 1, 0] - whole[..., 0, 1]
        length = torch.hypot(a, b)
        none = length <= TINY
        return cls(_matrices(torch.where(none, 1.0, a / length), torch.where(none, 0.0, b / length)))

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Element:
        """The scale that makes queries as large as keys."""
        x, y = (gram.diagonal(dim1=-2, dim2=-1).sum(-1).to("cpu", torch.float64) for gram in (writers, readers))
        scale = torch.where((x > TINY) & (y > TINY), y / x.clamp_min(TINY), 1.0) ** 0.25
        return cls(_matrices(scale, torch.zeros_like(scale)))

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        a, b = matrix[..., 0, 0], matrix[..., 1, 0]
        far = (matrix - _matrices(a, b)).abs() > 1e-9 * torch.hypot(a, b)[..., None, None]
        if far.any() or not torch.hypot(a, b).all():
            raise ValueError("the matrix is not a turn with a scale")


def _matrices(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
