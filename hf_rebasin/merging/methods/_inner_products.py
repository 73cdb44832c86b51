"""Inner products of whole tensors, read once in pieces, and sums of tensors whose coefficients follow from them.

A method that depends on lengths and angles needs only the Gram matrix Gᵢⱼ = ⟨xᵢ, xⱼ⟩ of the models' tensors: the
length of Σ cᵢ xᵢ is √(cᵀGc), and its inner product with xⱼ is (Gc)ⱼ. So such a method computes one coefficient per
model from G, and then adds up pieces.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements that are multiplied at once; some float64 copies of so many fit into a core's cache
ALIGNMENT = 64  # bytes; the rounding of dot products depends on where in memory the vectors begin


def gram_matrix(parts: Iterable[Sequence[Tensor]]) -> Tensor:
    """Return Gᵢⱼ = ⟨xᵢ, xⱼ⟩ in float64, (models, models); without parts, (0, 0).

    Sums are taken over blocks that begin at multiples of `BLOCK`, so they do not depend on how tensors are cut.

    Args:
        parts: the tensors of all models, one part after the other.

    Example: x₁ = (3, 4) and x₂ = (1, 0), in one part or in two, give [[25, 3], [3, 1]].
    """
    sums = torch.zeros(0, dtype=torch.float64)
    models = 0
    for block in blocks(parts, BLOCK):
        models = len(block)
        vectors = [_align(tensor.double()) for tensor in block]
        products = torch.stack([vectors[i].dot(vectors[j]) for i in range(models) for j in range(i + 1)]).cpu()
        sums = products if not sums.numel() else sums + products
    gram = torch.zeros(models, models, dtype=torch.float64)
    if sums.numel():
        rows, columns = torch.tril_indices(models, models)
        gram[rows, columns] = sums
        gram[columns, rows] = sums
    return gram


def unit_gram(gram: Tensor) -> Tensor:
    """Return the cosines of the angles between tensors, with 1 on the diagonal; 0 for tensors that are zero.

    Args:
        gram: their inner products.

    Example: the inner products [[25, 3], [3, 1]] give [[1, 0.6], [0.6, 1]].
    """
    norms = gram.diagonal().sqrt()
    products = norms[:, None] * norms
    cosines = torch.where(products > 0, gram / products, 0.0).clamp_(-1, 1)
    return cosines.fill_diagonal_(0).add_(torch.diag(norms > 0))


def blocks(parts: Iterable[Sequence[Tensor]], size: int) -> Iterator[list[Tensor]]:
    """Yield flat tensors of all models, cut at multiples of `size` elements, however they arrive."""
    waiting: list[list[Tensor]] = []  # parts of the block that is not complete yet
    count = 0
    for part in parts:
        flat = [tensor.reshape(-1) for tensor in part]
        start, end = 0, flat[0].numel()
        for stop in (*range(size - count, end, size), end):
            waiting.append([tensor[start:stop] for tensor in flat])
            count += stop - start
            start = stop
            if count == size:
                yield _join(waiting)
                waiting, count = [], 0
    if waiting:
        yield _join(waiting)


def combine(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σ cᵢ xᵢ.

    It is computed as (Σ cᵢ) xₖ + Σ cᵢ (xᵢ − xₖ), with the k of the largest |cᵢ|. So equal tensors whose coefficients
    sum to 1 give exactly that tensor, and so does a tensor of coefficient 1 beside others of 0.

    Example: coefficients 0.75 and 0.25 of 2 and 6 give 2 + 0.25 * (6 - 2) = 3.
    """
    k = max(range(len(tensors)), key=lambda i: abs(coefficients[i]))
    total = math.fsum(coefficients)
    if abs(total - 1) <= len(tensors) * sys.float_info.epsilon:  # that far, it is rounding
        total = 1.0
    merged = tensors[k] * total
    for i, (tensor, coefficient) in enumerate(zip(tensors, coefficients, strict=True)):
        if i != k and coefficient != 0:
            merged.add_(tensor - tensors[k], alpha=coefficient)
    return merged


def _align(vector: Tensor) -> Tensor:
    return vector.clone() if vector.data_ptr() % ALIGNMENT else vector


def _join(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return list(parts[0]) if len(parts) == 1 else [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
