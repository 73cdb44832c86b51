"""Monomial matrices: permutations with a factor for every item."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ...registry import Permutations
from ...symmetries.patterns import DIAGONAL, READER
from .matrices import NEGLIGIBLE, Moments, is_finite_real
from .permutations import gather_matched, permute, random_orders, read_order, solve_assignment
from .relaxation import Relaxation, Relaxed, relax_monomial


def balance_scales(writers: Tensor, readers: Tensor) -> Tensor:
    """Return the scales s with |s x|² = |y / s|², given |x|² and |y|²; 1 where either is negligible."""
    usable = (writers > NEGLIGIBLE) & (readers > NEGLIGIBLE)
    return torch.where(usable, readers / writers.clamp_min(NEGLIGIBLE), 1.0) ** 0.25


def minimise_log_scale(loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Minimise functions of one log scale each between log 1/20 and log 20, by a grid and golden-section search.

    The result is 0 where no other point is better than that.
    """
    step, ratio = 0.05, (5**0.5 - 1) / 2
    grid = torch.arange(-60, 61, dtype=torch.float64) * step
    losses = torch.stack([loss(torch.full_like(like, point.item())) for point in grid])
    low = grid[losses.argmin(0)] - step
    high = low + 2 * step
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left = loss(a) < loss(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    best, zero = (low + high) / 2, torch.zeros_like(like)
    return torch.where(loss(best) < loss(zero), best, zero)


@dataclass(frozen=True)
class Monomial:
    """(g · x)[i] = factor[i] · x[order[i]]; readers divide by the factor, diagonal axes are only permuted.

    `order` is int64 and `factor` float64, both of shape (*batch, n). Subclasses set `SIGNED` and `SCALED`, which say
    what factors are allowed.
    """

    order: Tensor
    factor: Tensor

    SIGNED: ClassVar[bool]
    SCALED: ClassVar[bool]
    EXACT: ClassVar[bool] = False  # not even with signs alone: 0 becomes -0
    PERMUTATIONS: ClassVar[Permutations] = "permutation"
    ROTATES: ClassVar[bool] = False
    MOVES_ONE: ClassVar[bool] = True
    SIZE: ClassVar[int | None] = None

    @classmethod
    def identity(cls, batch: tuple[int, ...], n: int) -> Self:
        return cls(torch.arange(n).expand(*batch, n).contiguous(), torch.ones(*batch, n, dtype=torch.float64))

    @classmethod
    def permuting(cls, order: Tensor) -> Self:
        """Return the element that only permutes."""
        return cls(order, torch.ones(order.shape, dtype=torch.float64))

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Self:
        """Draw a uniform permutation, with scales between ½ and 2 and random signs where the group has them."""
        order, factor = random_orders(batch, n, generator), torch.ones(*batch, n, dtype=torch.float64)
        if cls.SCALED:
            factor.uniform_(-1, 1, generator=generator).exp2_()
        if cls.SIGNED:
            factor *= 1 - 2 * torch.randint(2, factor.shape, generator=generator)
        return cls(order, factor)

    @classmethod
    def project(cls, similarity: Tensor, diagonal: Tensor | None = None) -> Self:
        """Find the best permutation, with signs if the group has them; scales are left to `balance` and `fit`."""
        if diagonal is None:
            diagonal = torch.zeros_like(similarity)
        if not cls.SIGNED:
            order = solve_assignment(similarity + diagonal)
            return cls(order, torch.ones(order.shape, dtype=torch.float64))
        order = solve_assignment(similarity.abs() + diagonal)
        return cls(order, torch.where(gather_matched(similarity, order) < 0, -1.0, 1.0).double().cpu())

    @classmethod
    def best(cls, similarity: Tensor, diagonal: Tensor | None = None) -> Tensor:
        element = cls.project(similarity, diagonal)
        value = element.contract(similarity)
        return value if diagonal is None else value + element.contract(diagonal, True)

    @classmethod
    def moments(cls, x: Tensor, y: Tensor) -> Tensor:
        """Return ⟨xᵢ, yᵢ⟩ for x and y of shape (*batch, n, rest)."""
        return (x.double() * y.double()).sum(-1).cpu()

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Self:
        """Find the scales that make every unit's writers as large as its readers, if the group has scales."""
        order = torch.arange(writers.shape[-1]).expand(writers.shape).contiguous()
        return cls(order, balance_scales(writers, readers) if cls.SCALED else torch.ones_like(writers))

    @classmethod
    def fit(cls, writers: Moments, readers: Moments) -> Self:
        """Find the best scales between 1/20 and 20, if the group has scales."""
        (_, xy, yy), (_, uv, vv) = writers, readers
        order = torch.arange(xy.shape[-1]).expand(xy.shape).contiguous()

        def loss(log: Tensor) -> Tensor:
            s = log.exp()
            return s * s * yy - 2 * s * xy + vv / (s * s) - 2 * uv / s

        return cls(order, minimise_log_scale(loss, xy).exp() if cls.SCALED else torch.ones_like(xy))

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
        return relax_monomial(cls, batch, n, relaxation, signed=cls.SIGNED, scaled=cls.SCALED)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Self:
        order, factor = read_order(tensors, batch, n), tensors.get("factor")
        if factor is None or not is_finite_real(factor, order.shape) or not factor.all():
            raise ValueError(f"expected finite non-zero factors of shape {tuple(order.shape)}")
        if (not cls.SIGNED and (factor < 0).any()) or (not cls.SCALED and (factor.abs() != 1).any()):
            raise ValueError("the factors have signs or scales that this group does not have")
        return cls(order, factor)

    def contract(self, similarity: Tensor, diagonal: bool = False) -> Tensor:
        picked = gather_matched(similarity, self.order).double()
        if not diagonal:
            picked = picked * self.factor.reshape(*self.factor.shape, *[1] * (picked.dim() - self.factor.dim()))
        return picked.sum(self.order.dim() - 1)

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        moved = permute(x, self.order)
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
