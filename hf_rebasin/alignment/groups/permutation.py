"""Permutations: exact for hidden units under any nonlinearity, attention heads, channels and experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...registry import Permutations
from ..elements.matrices import Moments
from ..elements.permutations import gather_matched, permute, random_orders, read_order, solve_assignment
from ..elements.relaxation import Relaxation, Relaxed, relax_monomial


@dataclass(frozen=True)
class Element:
    """Permutations of n items: (g · x)[i] = x[order[i]]; `order` is int64 of shape (*batch, n)."""

    order: Tensor

    EXACT: ClassVar[bool] = True
    PERMUTATIONS: ClassVar[Permutations] = "permutation"
    ROTATES: ClassVar[bool] = False
    SIGNED: ClassVar[bool] = False
    MOVES_ONE: ClassVar[bool] = False
    SIZE: ClassVar[int | None] = None

    @classmethod
    def identity(cls, batch: tuple[int, ...], n: int) -> Element:
        return cls(torch.arange(n).expand(*batch, n).contiguous())

    @classmethod
    def permuting(cls, order: Tensor) -> Element:
        return cls(order)

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        return cls(random_orders(batch, n, generator))

    @classmethod
    def project(cls, similarity: Tensor) -> Element:
        """Solve the linear assignment problem."""
        return cls(solve_assignment(similarity))

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        return cls.project(similarity).contract(similarity)

    @classmethod
    def moments(cls, x: Tensor, y: Tensor) -> Tensor:
        return (x.double() * y.double()).sum(-1).cpu()

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Element:
        """Return the identity: there is nothing to balance."""
        return cls.identity(tuple(writers.shape[:-1]), writers.shape[-1])

    @classmethod
    def fit(cls, writers: Moments, readers: Moments) -> Element:
        """Return the identity: `project` leaves nothing to fit."""
        return cls.balance(writers[0], readers[0])

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
        """Relax permutations to doubly stochastic matrices."""
        return relax_monomial(lambda order, factor: cls(order), batch, n, relaxation)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Element:
        return cls(read_order(tensors, batch, n))

    def contract(self, similarity: Tensor, diagonal: bool = False) -> Tensor:
        """Return Σᵢ similarity[..., i, order[..., i], ...]."""
        return gather_matched(similarity, self.order).sum(self.order.dim() - 1, dtype=torch.float64)

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        """Permute x of shape (*batch, n, *rest); a permutation is its own dual, so marks make no difference."""
        return permute(x, self.order)

    def compose(self, first: Element) -> Element:
        return Element(first.order.gather(-1, self.order))

    def inverse(self) -> Element:
        return Element(self.order.argsort(-1))

    def is_identity(self) -> bool:
        return torch.equal(self.order, torch.arange(self.order.shape[-1]).expand_as(self.order))

    def tensors(self) -> Mapping[str, Tensor]:
        return {"order": self.order}

    def map(self, change: Callable[[Tensor], Tensor]) -> Element:
        return Element(change(self.order))
