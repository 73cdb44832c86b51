"""Differentiable group elements, for solvers that minimise a loss, and their projection to elements of the group.

Every relaxed element starts at the identity, since a solver first moves the model to its starting point. Permutations
are relaxed to doubly stochastic matrices (Sinkhorn), or used as they are with a straight-through gradient. Rotations
are exponentials of skew-symmetric matrices, RoPE turns exponentials of complex logarithms, and scales exponentials;
bases are parametrised by their entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ...symmetries.patterns import DIAGONAL, READER
from .permutations import gather_matched, solve_assignment
from .sinkhorn import sinkhorn

Permuting: TypeAlias = Literal["sinkhorn", "straight_through", "kept"]


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """Settings by which group elements are relaxed, and the latents and permutation matrices made with them.

    Args:
        generator: random generator of the noise.
        permuting: "sinkhorn" for doubly stochastic matrices, "straight_through" for the best assignment with the
            gradient of the identity map, "kept" for no permutation but the identity.
        temperature: temperature of the Sinkhorn operator.
        iterations: number of its iterations.
        implicit: whether its gradient comes from the equations of its fixed point instead of unrolled iterations.
        noise: standard deviation of the noise added to an initial latent matrix I.
        device: device of the latents.
        dtype: dtype of the latent matrices of permutations; all other latents are float64.
    """

    generator: torch.Generator
    permuting: Permuting = "sinkhorn"
    temperature: float = 1.0
    iterations: int = 20
    implicit: bool = True
    noise: float = 0.0
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32

    def latent(self, batch: tuple[int, ...], n: int) -> Tensor | None:
        """Return a latent matrix near I for every index of `batch`; None where nothing can be permuted."""
        if self.permuting == "kept" or n == 1:
            return None
        noise = torch.randn(*batch, n, n, generator=self.generator, dtype=torch.float64) if self.noise else 0.0
        start = torch.eye(n, dtype=torch.float64).expand(*batch, n, n) + self.noise * noise
        return start.to(self.device, self.dtype, copy=True).requires_grad_()

    def zeros(self, *shape: int) -> Tensor:
        """Return latents of zeros, for elements other than permutations."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.device, requires_grad=True)

    def permutation(self, scores: Tensor) -> Tensor:
        """Return the relaxed permutation matrix of a latent matrix, as `permuting` says."""
        if self.permuting == "sinkhorn":
            return sinkhorn(scores, self.temperature, self.iterations, implicit=self.implicit)
        n = scores.shape[-1]
        hard = torch.eye(n, dtype=scores.dtype)[solve_assignment(scores.detach())].to(scores.device)
        return hard + (scores - scores.detach())


class SupportsAct(Protocol):
    """Protocol of anything that acts along an axis of a tensor: a group element or its relaxed form."""

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        """Return g · x along the leading dimensions of x, for an axis with a mark."""
        ...


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """A group element that is optimised by gradient descent.

    Args:
        permuting: latents of permutations and signs.
        smooth: latents of rotations, bases and scales.
        soft: returns the relaxed element for the current latents; gradients flow through its action to the latents.
        hard: returns the nearest element of the group itself, on the CPU.
    """

    permuting: tuple[Tensor, ...]
    smooth: tuple[Tensor, ...]
    soft: Callable[[], SupportsAct]
    hard: Callable[[], Any]


@dataclass(frozen=True)
class SoftMonomial:
    """(g · x)[i] = factor[i] · Σⱼ signed[i, j] x[j]; readers divide by the factor, diagonal axes use `plain` alone.

    This is the relaxed form of `Monomial`. A permutation is its own inverse transpose, and relaxed ones are treated as
    if they were, too.
    """

    plain: Tensor | None  # None for the identity
    signed: Tensor | None
    factor: Tensor | None

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        matrix = self.plain if mark == DIAGONAL else self.signed
        if matrix is not None:
            front = matrix.dim() - 1
            x = (matrix.to(x.dtype) @ x.reshape(*x.shape[:front], -1)).reshape(x.shape)
        if self.factor is None or mark == DIAGONAL:
            return x
        factor = self.factor.to(x.dtype).reshape(*self.factor.shape, *[1] * (x.dim() - self.factor.dim()))
        return x / factor if mark == READER else x * factor


def relax_monomial(
    make: Callable[[Tensor, Tensor], Any],
    batch: tuple[int, ...],
    n: int,
    relaxation: Relaxation,
    *,
    signed: bool = False,
    scaled: bool = False,
) -> Relaxed:
    """Relax permutations of n items with signs, scales or both; `make` builds the element of (order, factor).

    Signs share the latent matrix: the permutation comes from |x|, and the sign of an entry from x through tanh.
    """
    latent = relaxation.latent(batch, n)
    logs = relaxation.zeros(*batch, n) if scaled else None

    def soft() -> SoftMonomial:
        factor = None if logs is None else logs.exp()
        if latent is None:
            return SoftMonomial(None, None, factor)
        plain = relaxation.permutation(latent.abs() if signed else latent)
        if not signed:
            return SoftMonomial(plain, plain, factor)
        if relaxation.permuting == "straight_through":
            sign = torch.where(latent.detach() < 0, -1.0, 1.0)
            return SoftMonomial(plain, plain.detach() * sign + (latent - latent.detach()), factor)
        return SoftMonomial(plain, plain * latent.tanh(), factor)

    @torch.no_grad()
    def hard() -> Any:
        order = torch.arange(n).expand(*batch, n).contiguous()
        factor = torch.ones(*batch, n, dtype=torch.float64)
        if latent is not None:
            order = solve_assignment(latent.abs() if signed else latent)
            if signed:
                factor = torch.where(gather_matched(latent.cpu(), order) < 0, -1.0, 1.0).double()
        if logs is not None:
            factor = factor * logs.exp().cpu()
        return make(order, factor)

    return Relaxed(
        permuting=() if latent is None else (latent,),
        smooth=() if logs is None else (logs,),
        soft=soft,
        hard=hard,
    )


def relax_matrix(make: Callable[[Tensor], Any], latents: tuple[Tensor, ...], matrix: Callable[[], Tensor]) -> Relaxed:
    """Relax a matrix group whose matrix is computed from latents; `make` builds the element of a matrix."""

    @torch.no_grad()
    def hard() -> Any:
        return make(matrix().cpu().clone())

    return Relaxed(permuting=(), smooth=latents, soft=lambda: make(matrix()), hard=hard)


def relax_rotation(make: Callable[[Tensor], Any], batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
    """Relax rotations, without reflections, as exp(L − Lᵀ) of a latent L."""
    latent = relaxation.zeros(*batch, n, n)
    return relax_matrix(make, (latent,), lambda: torch.matrix_exp(latent - latent.mT))
