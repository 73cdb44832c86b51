"""Permutations with a factor for each place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ...symmetries.patterns import DIAGONAL, READER
from .matrices import TINY, Sides, _real
from .permutations import assigned, chosen, order_of, random_orders, taken
from .relaxation import Relaxed, Softening, relaxed_monomial


def even(writers: Tensor, readers: Tensor) -> Tensor:
    """The scales s with |s x|² = |y / s|², given |x|² and |y|²; 1 where one of them is nothing."""
    sound = (writers > TINY) & (readers > TINY)
    return torch.where(sound, readers / writers.clamp_min(TINY), 1.0) ** 0.25


def lowest(loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Where functions of one variable each are lowest between log 1/20 and log 20, by a grid and golden sections.

    0 where nothing is lower than there.
    """
    step, ratio = 0.05, (5**0.5 - 1) / 2
    grid = torch.arange(-60, 61, dtype=torch.float64) * step
    found = torch.stack([loss(torch.full_like(like, at.item())) for at in grid])
    low = grid[found.argmin(0)] - step
    high = low + 2 * step
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left = loss(a) < loss(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    best, zero = (low + high) / 2, torch.zeros_like(like)
    return torch.where(loss(best) < loss(zero), best, zero)


@dataclass(frozen=True)
class Monomial:
    """(g · x)[i] = factor[i] · x[order[i]]; readers divide, and what is diagonal is permuted only.

    `order` is int64, `factor` float64, both of shape (*batch, n). Subclasses say by `SIGNED` and `SCALED` which
    factors there are.
    """

    order: Tensor
    factor: Tensor

    SIGNED: ClassVar[bool]
    SCALED: ClassVar[bool]
    EXACT: ClassVar[bool] = False  # with signs alone, too: 0 becomes -0

    @classmethod
    def identity(cls, batch: tuple[int, ...], n: int) -> Self:
        return cls(torch.arange(n).expand(*batch, n).contiguous(), torch.ones(*batch, n, dtype=torch.float64))

    @classmethod
    def permuting(cls, order: Tensor) -> Self:
        """The element that only permutes."""
        return cls(order, torch.ones(order.shape, dtype=torch.float64))

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Self:
        """A uniform permutation; factors between ½ and 2, of either sign where there are signs."""
        order, factor = random_orders(batch, n, generator), torch.ones(*batch, n, dtype=torch.float64)
        if cls.SCALED:
            factor.uniform_(-1, 1, generator=generator).exp2_()
        if cls.SIGNED:
            factor *= 1 - 2 * torch.randint(2, factor.shape, generator=generator)
        return cls(order, factor)

    @classmethod
    def project(cls, similarity: Tensor, diagonal: Tensor | None = None) -> Self:
        """The best permutation with signs, if there are signs; scales are left to `balance` and `fit`."""
        if diagonal is None:
            diagonal = torch.zeros_like(similarity)
        if not cls.SIGNED:
            order = assigned(similarity + diagonal)
            return cls(order, torch.ones(order.shape, dtype=torch.float64))
        order = assigned(similarity.abs() + diagonal)
        return cls(order, torch.where(chosen(similarity, order) < 0, -1.0, 1.0).double().cpu())

    @classmethod
    def best(cls, similarity: Tensor, diagonal: Tensor | None = None) -> Tensor:
        found = cls.project(similarity, diagonal)
        value = found.contract(similarity)
        return value if diagonal is None else value + found.contract(diagonal, True)

    @classmethod
    def moments(cls, x: Tensor, y: Tensor) -> Tensor:
        """⟨xᵢ, yᵢ⟩ of x and y of shape (*batch, n, rest)."""
        return (x.double() * y.double()).sum(-1).cpu()

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Self:
        """Scales that make every unit's writers as large as its readers, if there are scales."""
        order = torch.arange(writers.shape[-1]).expand(writers.shape).contiguous()
        return cls(order, even(writers, readers) if cls.SCALED else torch.ones_like(writers))

    @classmethod
    def fit(cls, writers: Sides, readers: Sides) -> Self:
        """The best scales between 1/20 and 20, if there are scales."""
        (_, xy, yy), (_, uv, vv) = writers, readers
        order = torch.arange(xy.shape[-1]).expand(xy.shape).contiguous()

        def loss(log: Tensor) -> Tensor:
            s = log.exp()
            return s * s * yy - 2 * s * xy + vv / (s * s) - 2 * uv / s

        return cls(order, lowest(loss, xy).exp() if cls.SCALED else torch.ones_like(xy))

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, softening: Softening) -> Relaxed:
        return relaxed_monomial(cls, batch, n, softening, signed=cls.SIGNED, scaled=cls.SCALED)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Self:
        order, factor = order_of(tensors, batch, n), tensors.get("factor")
        if factor is None or not _real(factor, order.shape) or not factor.all():
            raise ValueError(f"expected {order.shape} finite factors other than 0")
        if (not cls.SIGNED and (factor < 0).any()) or (not cls.SCALED and (factor.abs() != 1).any()):
            raise ValueError("the factors have signs or scales that this group has not")
        return cls(order, factor)

    def contract(self, similarity: Tensor, diagonal: bool = False) -> Tensor:
        picked = chosen(similarity, self.order).double()
        if not diagonal:
            picked = picked * self.factor.reshape(*self.factor.shape, *[1] * (picked.dim() - self.factor.dim()))
        return picked.sum(self.order.dim() - 1)

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        moved = taken(x, self.order)
        if mark == DIAGONAL:
            return moved
        factor = self.factor.to(x.device, x.dtype).reshape(*self.factor.shape, *[1] * (x.dim() - self.factor.dim()))
        return moved / factor if mark == READER else moved * factor

    def compose(self, first: Self) -> Self:
        return type(self)(first.order.gather(-1, self.order), self.factor * first.factor.gather(-1, self.order))

    def inverse(self) -> Self:
        back = self.order.argsort(-1)
        return type(self)(back, 1 / self.factor.gather(-1, back))

    def is_identity(self) -> bool:
        return bool((self.factor == 1).all()) and torch.equal(
            self.order, torch.arange(self.order.shape[-1]).expand_as(self.order)
        )

    def tensors(self) -> Mapping[str, Tensor]:
        return {"order": self.order, "factor": self.factor}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(change(self.order), change(self.factor))
