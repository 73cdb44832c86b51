"""Permutations as orders: order[i] is where what comes to place i came from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# torch moves no unsigned numbers of these widths; their bytes are those of signed ones
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def taken(x: Tensor, order: Tensor) -> Tensor:
    """x[..., order[...], ...]: `order` is (*batch, n), x is (*batch, n, *rest)."""
    if x.dtype in SIGNED:
        return taken(x.view(SIGNED[x.dtype]), order).view(x.dtype)
    *batch, n = order.shape
    many = math.prod(batch)
    flat = (order.reshape(many, n) + n * torch.arange(many)[:, None]).reshape(-1).to(x.device)
    return x.reshape(many * n, *x.shape[len(batch) + 1 :]).index_select(0, flat).reshape(x.shape)


def order_of(tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Tensor:
    """The stored permutations of n things; ValueError if they are none."""
    order = tensors.get("order")
    if order is None or order.shape != (*batch, n) or order.dtype != torch.int64:
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        raise ValueError(f"expected an order of shape {(*batch, n)}, found {found}")
    if not torch.equal(order.sort(-1).values, torch.arange(n).expand(*batch, n)):
        raise ValueError(f"the order is no permutation of {n} things")
    return order


def random_orders(batch: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
    many = [torch.randperm(n, generator=generator) for _ in range(math.prod(batch))]
    return torch.stack(many).reshape(*batch, n)


def assigned(similarity: Tensor) -> Tensor:
    """Linear assignment: the orders that maximise Σᵢ similarity[..., i, order[i]].

    Rows and columns are first shifted to a minimum of 0, which changes no assignment and keeps the numbers that
    scipy's shortest augmenting paths compare small.
    """
    from scipy.optimize import linear_sum_assignment  # merging what is aligned needs none of it

    *batch, n, _ = similarity.shape
    orders = []
    for one in similarity.to("cpu", torch.float64).reshape(-1, n, n):
        cost = -one
        cost -= cost.amin(1, keepdim=True)
        cost -= cost.amin(0, keepdim=True)
        orders.append(torch.from_numpy(linear_sum_assignment(cost.numpy())[1]))
    return torch.stack(orders).reshape(*batch, n)


def chosen(similarity: Tensor, order: Tensor) -> Tensor:
    """similarity[..., i, order[..., i], *rest] for all i: (*batch, n, *rest)."""
    dim = order.dim()
    rest = similarity.shape[dim + 1 :]
    index = order.reshape(*order.shape, 1, *[1] * len(rest)).expand(*order.shape, 1, *rest)
    return similarity.gather(dim, index).squeeze(dim)
