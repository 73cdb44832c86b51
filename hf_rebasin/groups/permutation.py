"""Permutations: exact for hidden units under any nonlinearity, attention heads, channels and experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Element:
    """Permutations of n things: (g · x)[i] = x[order[i]]; `order` is int64 of shape (*batch, n)."""

    order: Tensor

    @classmethod
    def identity(cls, batch: tuple[int, ...], n: int) -> Element:
        return cls(torch.arange(n).expand(*batch, n).contiguous())

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Element:
        many = [torch.randperm(n, generator=generator) for _ in range(math.prod(batch))]
        return cls(torch.stack(many).reshape(*batch, n))

    @classmethod
    def project(cls, similarity: Tensor) -> Element:
        """Linear assignment: maximise Σᵢ similarity[i, order[i]] for a (n, n) matrix.

        Rows and columns are first shifted to a minimum of 0, which changes no assignment and keeps the numbers that
        scipy's shortest augmenting paths compare small.
        """
        from scipy.optimize import linear_sum_assignment  # merging what is aligned needs none of it

        cost = similarity.to(torch.float64).neg()
        cost -= cost.amin(1, keepdim=True)
        cost -= cost.amin(0, keepdim=True)
        _, columns = linear_sum_assignment(cost.cpu().numpy())
        return cls(torch.from_numpy(columns))

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Element:
        order = tensors.get("order")
        if order is None or tensors.keys() != {"order"} or order.shape != (*batch, n):
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"expected an order of shape {(*batch, n)}, found {found}")
        if not torch.equal(order.sort(-1).values, cls.identity(batch, n).order):
            raise ValueError(f"the order is no permutation of {n} things")
        return cls(order)

    def contract(self, similarity: Tensor) -> Tensor:
        """Σᵢ similarity[..., i, order[..., i], ...]."""
        dim = self.order.dim()
        rest = similarity.shape[dim + 1 :]
        index = self.order.reshape(*self.order.shape, 1, *[1] * len(rest)).expand(*self.order.shape, 1, *rest)
        return similarity.gather(dim, index).sum((dim - 1, dim), dtype=torch.float64)

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        """x of shape (*batch, n, *rest); a permutation is its own dual, so marks change nothing."""
        *batch, n = self.order.shape
        many = math.prod(batch)
        flat = (self.order.reshape(many, n) + n * torch.arange(many)[:, None]).reshape(-1).to(x.device)
        return x.reshape(many * n, *x.shape[len(batch) + 1 :]).index_select(0, flat).reshape(x.shape)

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
