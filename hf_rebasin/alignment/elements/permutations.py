"""Permutations as orders: `order[i]` is the old index of the item that moves to index i."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# torch cannot index tensors of these unsigned types; viewed as signed, their bytes stay the same
SIGNED_DTYPES = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Return x[..., order[...], ...] for `order` of shape (*batch, n) and x of shape (*batch, n, *rest)."""
    if x.dtype in SIGNED_DTYPES:
        return permute(x.view(SIGNED_DTYPES[x.dtype]), order).view(x.dtype)
    *batch, n = order.shape
    count = math.prod(batch)
    flat = (order.reshape(count, n) + n * torch.arange(count)[:, None]).reshape(-1).to(x.device)
    return x.reshape(count * n, *x.shape[len(batch) + 1 :]).index_select(0, flat).reshape(x.shape)


def read_order(tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Tensor:
    """Return the stored permutations of n items; raise ValueError if they are not permutations."""
    order = tensors.get("order")
    if order is None or order.shape != (*batch, n) or order.dtype != torch.int64:
        stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        raise ValueError(f"expected an order of shape {(*batch, n)}, got {stored}")
    if not torch.equal(order.sort(-1).values, torch.arange(n).expand(*batch, n)):
        raise ValueError(f"the order is not a permutation of {n} items")
    return order


def random_orders(batch: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
    """Draw a uniform permutation of n items for every index of `batch`."""
    orders = [torch.randperm(n, generator=generator) for _ in range(math.prod(batch))]
    return torch.stack(orders).reshape(*batch, n)


def solve_assignment(similarity: Tensor) -> Tensor:
    """Solve the linear assignment problem: the orders that maximise Σᵢ similarity[..., i, order[i]].

    Rows and columns are first shifted to a minimum of 0. This does not change the assignment, and keeps the numbers
    small that scipy's shortest augmenting paths compare.
    """
    from scipy.optimize import linear_sum_assignment  # merging models that are already aligned needs no scipy

    *batch, n, _ = similarity.shape
    orders = []
    for matrix in similarity.to("cpu", torch.float64).reshape(-1, n, n):
        cost = -matrix
        cost -= cost.amin(1, keepdim=True)
        cost -= cost.amin(0, keepdim=True)
        orders.append(torch.from_numpy(linear_sum_assignment(cost.numpy())[1]))
    return torch.stack(orders).reshape(*batch, n)


def gather_matched(similarity: Tensor, order: Tensor) -> Tensor:
    """Return similarity[..., i, order[..., i], *rest] for all i, of shape (*batch, n, *rest)."""
    dim = order.dim()
    rest = similarity.shape[dim + 1 :]
    index = order.reshape(*order.shape, 1, *[1] * len(rest)).expand(*order.shape, 1, *rest)
    return similarity.gather(dim, index).squeeze(dim)
