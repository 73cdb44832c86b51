"""Matrix groups: the base class of rotations and bases, and their projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from ...checkpoints.precision import compute_dtype, in_torch_layout
from ...registry import Permutations
from ...symmetries.patterns import DIAGONAL, READER
from .relaxation import Relaxation, Relaxed, relax_rotation

EIGENVECTORS_FROM = 256  # size from which on eigenvectors are faster than singular values
NEGLIGIBLE = 1e-30  # a unit whose weights are this small is not scaled: nothing determines its scale

# ⟨x, x⟩, ⟨x, y⟩ and ⟨y, y⟩ of two models along one symmetry
Moments: TypeAlias = tuple[Tensor, Tensor, Tensor]


def is_finite_real(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has that shape and holds finite numbers in float32 or float64."""
    return tensor.shape == shape and tensor.dtype in (torch.float32, torch.float64) and bool(tensor.isfinite().all())


@dataclass(frozen=True)
class Matrices:
    """(g · x)[i] = Σⱼ matrix[i, j] x[j]; readers use the inverse transpose, diagonal axes stay as they are.

    `matrix` is float64 of shape (*batch, n, n).
    """

    matrix: Tensor

    ISOMETRIC: ClassVar[bool] = False  # whether every element is its own inverse transpose
    EXACT: ClassVar[bool] = False
    PERMUTATIONS: ClassVar[Permutations] = "permutation"
    ROTATES: ClassVar[bool] = False
    SIGNED: ClassVar[bool] = False
    MOVES_ONE: ClassVar[bool] = False
    SIZE: ClassVar[int | None] = None

    @classmethod
    def identity(cls, batch: tuple[int, ...], n: int) -> Self:
        return cls(torch.eye(n, dtype=torch.float64).expand(*batch, n, n).contiguous())

    @classmethod
    def permuting(cls, order: Tensor) -> Self:
        """Return the element that only permutes."""
        return cls(torch.eye(order.shape[-1], dtype=torch.float64)[order])

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Self:
        """Draw a uniform rotation or reflection."""
        return cls(random_rotations(batch, n, generator))

    @classmethod
    def project(cls, similarity: Tensor) -> Self:
        """Find the orthogonal g that maximises ⟨similarity, g⟩; stretches are left to `balance` and `fit`."""
        return cls(polar_factor(similarity))

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        """Return the sum of the singular values."""
        return torch.linalg.svdvals(similarity.to("cpu", torch.float64)).sum(-1)

    @classmethod
    def moments(cls, x: Tensor, y: Tensor) -> Tensor:
        """Return ⟨xᵢ, yⱼ⟩ for x and y of shape (*batch, n, rest)."""
        return (x.double() @ y.double().mT).cpu()

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Self:
        """Return the identity: a group that preserves lengths has nothing to balance."""
        return cls.identity(tuple(writers.shape[:-2]), writers.shape[-1])

    @classmethod
    def fit(cls, writers: Moments, readers: Moments) -> Self:
        """Return the identity: `project` leaves nothing to fit."""
        return cls.balance(writers[0], readers[0])

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
        return relax_rotation(cls, batch, n, relaxation)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Self:
        matrix = tensors.get("matrix")
        if matrix is None or not is_finite_real(matrix, (*batch, n, n)):
            stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            raise ValueError(f"expected finite matrices of shape {(*batch, n, n)}, got {stored}")
        cls.refuse(matrix)
        return cls(matrix)

    @classmethod
    def refuse(cls, matrix: Tensor) -> None:
        """Raise ValueError for a matrix that is not in this group."""
        if cls.ISOMETRIC:
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
            error = (matrix @ matrix.mT - eye).abs().amax().item() if matrix.numel() else 0.0
            if error > 1e-6:
                raise ValueError(f"the matrix is not orthogonal: |g gᵀ - 1| is up to {error:.2g}")
        elif torch.linalg.inv_ex(matrix).info.any():
            raise ValueError("the matrix has no inverse")

    def contract(self, similarity: Tensor, diagonal: bool = False) -> Tensor:
        dim = self.matrix.dim()
        matrix = self.matrix.reshape(*self.matrix.shape, *[1] * (similarity.dim() - dim))
        return (matrix * similarity.double()).sum((dim - 2, dim - 1))

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        if mark == DIAGONAL:
            return x
        matrix = self.matrix if mark != READER or self.ISOMETRIC else torch.linalg.inv(self.matrix).mT
        front = self.matrix.dim() - 1
        dtype = compute_dtype(x.dtype)
        moved = in_torch_layout(matrix.to(x.device, dtype)) @ in_torch_layout(
            x.reshape(*x.shape[:front], -1).to(dtype)
        )
        return moved.to(x.dtype).reshape(x.shape)

    def compose(self, first: Self) -> Self:
        return type(self)(self.matrix @ first.matrix)

    def inverse(self) -> Self:
        return type(self)((self.matrix.mT if self.ISOMETRIC else torch.linalg.inv(self.matrix)).contiguous())

    def is_identity(self) -> bool:
        return torch.equal(
            self.matrix, torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype).expand_as(self.matrix)
        )

    def tensors(self) -> Mapping[str, Tensor]:
        return {"matrix": self.matrix}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(change(self.matrix))


def random_rotations(batch: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly from O(n): the Q of a Gaussian matrix whose R has a positive diagonal (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def polar_factor(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor U Vᵀ of M = U S Vᵀ, which maximises ⟨M, Q⟩; in float64 on the CPU.

    It solves the orthogonal Procrustes problem (Schönemann 1966). Large matrices that are far enough from singular use
    the eigenvectors of MᵀM, several times faster than a singular value decomposition, and two Newton-Schulz steps to
    restore the precision that squaring lost.
    """
    m = matrix.to("cpu", torch.float64)
    if m.shape[-1] >= EIGENVECTORS_FROM and m.dim() == 2:
        squares, v = torch.linalg.eigh(m.mT @ m)
        if squares[0] > 1e-10 * squares[-1]:
            q = (m @ (v / squares.sqrt())) @ v.mT
            for _ in range(2):
                q = 1.5 * q - 0.5 * q @ (q.mT @ q)
            return q
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    return u @ v
