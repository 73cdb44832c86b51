"""Permutations: exact for hidden units under any nonlinearity, attention heads, channels and experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..elements.matrices import Sides
from ..elements.permutations import assigned, chosen, order_of, random_orders, taken
from ..elements.relaxation import Relaxed, Softening, relaxed_monomial


@dataclass(frozen=True)
class Element:
    """Permutations of n things: (g · x)[i] = x[order[i]]; `order` is int64 of shape (*batch, n)."""

    order: Tensor

    EXACT: ClassVar[bool] = True

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
        """The best assignment."""
        return cls(assigned(similarity))

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        return cls.project(similarity).contract(similarity)

    @classmethod
    def moments(cls, x: Tensor, y: Tensor) -> Tensor:
        return (x.double() * y.double()).sum(-1).cpu()

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Element:
        """Nothing to balance."""
        return cls.identity(tuple(writers.shape[:-1]), writers.shape[-1])

    @classmethod
    def fit(cls, writers: Sides, readers: Sides) -> Element:
        """Nothing that `project` would have left."""
        return cls.balance(writers[0], readers[0])

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, softening: Softening) -> Relaxed:
        """A doubly stochastic matrix."""
        return relaxed_monomial(lambda order, factor: cls(order), batch, n, softening)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Element:
        return cls(order_of(tensors, batch, n))

    def contract(self, similarity: Tensor, diagonal: bool = False) -> Tensor:
        """Σᵢ similarity[..., i, order[..., i], ...]."""
        return chosen(similarity, self.order).sum(self.order.dim() - 1, dtype=torch.float64)

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        """x of shape (*batch, n, *rest); a permutation is its own dual, so marks change nothing."""
        return taken(x, self.order)

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
