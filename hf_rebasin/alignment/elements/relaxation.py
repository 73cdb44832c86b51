"""Group elements with gradients: what solvers that descend a loss move, and how it becomes an exact element again.

Everything starts at the identity, as a solver moves the model to where it starts from first. What permutes is relaxed
to doubly stochastic matrices (Sinkhorn), or taken as it is with the gradient passed straight through; rotations are
exponentials of skew matrices, turns of logarithms; bases are themselves and scales exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ...symmetries.patterns import DIAGONAL, READER
from .permutations import assigned, chosen
from .sinkhorn import sinkhorn

Permuting: TypeAlias = Literal["sinkhorn", "straight_through", "kept"]


@dataclass(frozen=True)
class Softening:
    """How elements are relaxed.

    Args:
        generator: of the noise.
        permuting: "sinkhorn" for doubly stochastic matrices, "straight_through" for the best assignment with the
            gradient of the identity map, "kept" for no permutation but the identity.
        temperature: of the Sinkhorn operator.
        iterations: of the same.
        implicit: its gradient, from the equations of its fixed point or else through all iterations.
        noise: standard deviation of what is added to a latent matrix I.
        device: where latents are.
        dtype: of latent matrices of permutations; all else is in float64.
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
        """A latent matrix near I for every index of `batch`; None where nothing permutes."""
        if self.permuting == "kept" or n == 1:
            return None
        noise = torch.randn(*batch, n, n, generator=self.generator, dtype=torch.float64) if self.noise else 0.0
        start = torch.eye(n, dtype=torch.float64).expand(*batch, n, n) + self.noise * noise
        return start.to(self.device, self.dtype, copy=True).requires_grad_()

    def zeros(self, *shape: int) -> Tensor:
        """Latent numbers of what does not permute."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.device, requires_grad=True)

    def permutation(self, scores: Tensor) -> Tensor:
        """The matrix of a latent one, as `permuting` says."""
        if self.permuting == "sinkhorn":
            return sinkhorn(scores, self.temperature, self.iterations, implicit=self.implicit)
        n = scores.shape[-1]
        hard = torch.eye(n, dtype=scores.dtype)[assigned(scores.detach())].to(scores.device)
        return hard + (scores - scores.detach())


class Acting(Protocol):
    """What acts along an axis: an element of a group, or a relaxed one."""

    def act(self, x: Tensor, mark: str = "") -> Tensor: ...


@dataclass(frozen=True)
class Relaxed:
    """An element to be found by gradients.

    Args:
        permuting: latents of what permutes.
        smooth: latents of rotations, bases and scales.
        soft: the relaxed element of the present latents; gradients flow through its action to the latents.
        hard: the nearest exact element, on the CPU.
    """

    permuting: tuple[Tensor, ...]
    smooth: tuple[Tensor, ...]
    soft: Callable[[], Acting]
    hard: Callable[[], Any]


@dataclass(frozen=True)
class SoftMonomial:
    """(g · x)[i] = factor[i] · Σⱼ signed[i, j] x[j]; readers divide, what is diagonal is moved by `plain` alone.

    The relaxed form of `elements.Monomial`: a permutation is its own inverse transpose, and so are its relaxed forms.
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


def relaxed_monomial(
    make: Callable[[Tensor, Tensor], Any],
    batch: tuple[int, ...],
    n: int,
    softening: Softening,
    *,
    signed: bool = False,
    scaled: bool = False,
) -> Relaxed:
    """A relaxed permutation of n things with signs, scales or both; `make` gives the element of (order, factor).

    Signs come with the latent matrix: what |x| permutes has the sign of x, by way of tanh.
    """
    latent = softening.latent(batch, n)
    logs = softening.zeros(*batch, n) if scaled else None

    def soft() -> SoftMonomial:
        factor = None if logs is None else logs.exp()
        if latent is None:
            return SoftMonomial(None, None, factor)
        plain = softening.permutation(latent.abs() if signed else latent)
        if not signed:
            return SoftMonomial(plain, plain, factor)
        if softening.permuting == "straight_through":
            sign = torch.where(latent.detach() < 0, -1.0, 1.0)
            return SoftMonomial(plain, plain.detach() * sign + (latent - latent.detach()), factor)
        return SoftMonomial(plain, plain * latent.tanh(), factor)

    @torch.no_grad()
    def hard() -> Any:
        order = torch.arange(n).expand(*batch, n).contiguous()
        factor = torch.ones(*batch, n, dtype=torch.float64)
        if latent is not None:
            order = assigned(latent.abs() if signed else latent)
            if signed:
                factor = torch.where(chosen(latent.cpu(), order) < 0, -1.0, 1.0).double()
        if logs is not None:
            factor = factor * logs.exp().cpu()
        return make(order, factor)

    return Relaxed(() if latent is None else (latent,), () if logs is None else (logs,), soft, hard)


def relaxed_matrix(
    make: Callable[[Tensor], Any], latents: tuple[Tensor, ...], matrix: Callable[[], Tensor]
) -> Relaxed:
    """An element that is a matrix computed from latents."""

    @torch.no_grad()
    def hard() -> Any:
        return make(matrix().cpu().clone())

    return Relaxed((), latents, lambda: make(matrix()), hard)


def relaxed_rotation(make: Callable[[Tensor], Any], batch: tuple[int, ...], n: int, softening: Softening) -> Relaxed:
    """exp(L − Lᵀ) of a latent L: the rotations, without reflections."""
    latent = softening.zeros(*batch, n, n)
    return relaxed_matrix(make, (latent,), lambda: torch.matrix_exp(latent - latent.mT))
