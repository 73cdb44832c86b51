"""The Sinkhorn operator with an implicit gradient: differentiable doubly stochastic matrices.

A permutation has no gradient; P = S_τ(X) does, and tends to a permutation as τ falls. The forward pass is Sinkhorn's
iteration (Mena et al. 2018, arXiv 1802.08665; for merging Peña et al. 2022, arXiv 2212.12042). The backward pass
computes the gradient of the map that the iteration converges to from P alone (Eisenberger et al. 2022, arXiv
2205.06688), so no intermediate result is stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checkpoints.precision import compute_dtype
from ...errors import OptionError

DIRECT_UP_TO = 192  # columns up to which factoring the Schur complement takes no longer than iterating
MAX_ITERATIONS = 100  # of conjugate gradients; with thousands of columns, a fraction of the cost of factoring


def sinkhorn(x: Tensor, temperature: float = 1.0, iterations: int = 20, *, implicit: bool = True) -> Tensor:
    """Apply the Sinkhorn operator: P = S_τ(X), a doubly stochastic matrix for every matrix of logits.

        Z = X / τ;  repeat:  Z −= logsumexp of every column,  then  Z −= logsumexp of every row;  P = exp Z

    Rows are normalised last: they sum to 1 up to rounding, columns only as far as the iteration has converged. With a
    loss ℓ, G = ∂ℓ/∂P, H = P ⊙ G / τ, and the row sums r and column sums c of P, the implicit gradient is

        [[diag r, P], [Pᵀ, diag c]] [u; v] = [H·1; Hᵀ·1],   ∂ℓ/∂X = H − P ⊙ (u·1ᵀ + 1·vᵀ)

    It is the gradient of the converged map: where the iteration has not converged (small τ), it differs from the
    gradient of the unrolled iterations.

    Args:
        x: finite logits of shape (*batch, n, n) and any floating-point dtype; half precision is computed in float32.
        temperature: τ > 0, in the units of `x`. At low temperatures P is almost a permutation.
        iterations: number of times columns and rows are normalised, at least 1.
        implicit: whether to differentiate through the fixed point, which needs the memory of P and cannot be
            differentiated again. Otherwise through all iterations, which stores 2 · `iterations` matrices as large as
            `x`.

    Returns:
        P, with the shape and dtype of `x`: the entry in row i, column j is how much of i is assigned to j.

    Raises:
        OptionError: `x` is not a stack of square floating-point matrices, or has entries that are not finite (or
            overflow when divided by τ); or τ or the number of iterations is not positive.

    Example:
        A doubly stochastic 2 × 2 matrix has one number p on its diagonal, and Sinkhorn preserves the odds ratio
        p² / (1 − p)² = exp((x₁₁ + x₂₂ − x₁₂ − x₂₁) / τ), here 3 · 3 = 9: p / (1 − p) = 3, so p = 3 / 4.

        >>> sinkhorn(torch.log(torch.tensor([[3.0, 1.0], [1.0, 3.0]])))
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    _refuse_arguments(x, temperature, iterations)
    if not x.numel():
        return x / temperature  # nothing to normalise; keeps shape, type and graph
    wide = x.to(compute_dtype(x.dtype))
    with torch.autocast(x.device.type, enabled=False):  # half-precision products would limit the precision of P
        if implicit:
            p: Tensor = _Implicit.apply(wide, temperature, iterations)
        else:
            p = _unrolled(wide, temperature, iterations)
    return p.to(x.dtype)


def _refuse_arguments(x: Tensor, temperature: float, iterations: int) -> None:
    if not 0 < temperature < math.inf:
        raise OptionError(f"temperature {temperature}: must be positive and finite")
    if iterations < 1 or iterations != int(iterations):
        raise OptionError(f"{iterations} iterations: must be a whole number, 1 or more")
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise OptionError(f"x of shape {tuple(x.shape)}: must be square matrices, (*batch, n, n)")
    if not x.is_floating_point():
        raise OptionError(f"x of dtype {x.dtype}: must be floating-point, such as x.float()")
    if x.numel():
        bounds = torch.stack(x.detach().aminmax()).to(compute_dtype(x.dtype)) / temperature
        if not bounds.diff().isfinite():  # NaN and infinities survive into the difference
            raise OptionError(
                f"x / temperature lies in {bounds.tolist()}, and {int((~x.isfinite()).sum())} of {x.numel()} entries "
                "of x are not finite: all must be; for an entry that should be 0 in P, use a low number such as -1e4"
            )


def _unrolled(x: Tensor, temperature: float, iterations: int) -> Tensor:
    """Compute P as it is defined, operation by operation."""
    z = x / temperature
    for _ in range(iterations):
        z = z - z.logsumexp(-2, keepdim=True)
        z = z - z.logsumexp(-1, keepdim=True)
    return z.exp()


def _by_scaling(x: Tensor, temperature: float, iterations: int) -> Tensor:
    """Compute P from one exponential: P = diag u · K · diag v, where an iteration changes only u and v.

    Every row and every column of K has the maximum 1, so the first sums lie between 1 / n and n². An entry of K below
    `tiny` is lost; in P it would be below tiny · max u · max v. As long as neither maximum exceeds tiny^(-1/3), that
    is tiny^(1/3), far less than rounding. Before one does, u is moved into the exponents and K is recomputed; the
    first iteration with a new K never exceeds the limit.
    """
    limit = torch.finfo(x.dtype).tiny ** (-1 / 3)
    z = x / temperature
    remaining = int(iterations)
    while True:
        z -= z.amax(-2, keepdim=True)
        highest = z.amax(-1, keepdim=True)
        z -= highest  # every column keeps its 0: the maximum of the row with that 0 was 0
        k, u = z.exp(), highest.exp()  # where u is 0, the row was negligible against the maximum of every column
        while remaining:
            new_v = (k.mT @ u).reciprocal()  # (*batch, n, 1)
            new_u = (k @ new_v).reciprocal()  # (*batch, n, 1)
            if torch.maximum(new_u, new_v).max() > limit:
                break
            u, v, remaining = new_u, new_v, remaining - 1
        if not remaining:
            return k.mul_(u).mul_(v.mT)
        z += u.log()  # v may be dropped: columns are normalised first


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float, iterations: int) -> Tensor:
        p = _by_scaling(x, temperature, iterations)
        ctx.save_for_backward(p)
        ctx.temperature = temperature
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (p,) = ctx.saved_tensors
        n = p.shape[-1]
        with torch.autocast(p.device.type, enabled=False):
            if n <= DIRECT_UP_TO:
                h = _by_cholesky(p, grad)
            else:
                pairs = zip(p.reshape(-1, n, n), grad.reshape(-1, n, n), strict=True)
                h = torch.stack([_by_conjugate_gradients(*pair) for pair in pairs]).reshape(p.shape)
        return h.div_(ctx.temperature), None, None


def _by_conjugate_gradients(p: Tensor, grad: Tensor) -> Tensor:
    """Compute τ times the gradient for one matrix; by Cholesky where conjugate gradients do not converge."""
    system = _System(p, grad)
    v = _conjugate_gradients(system)
    return _by_cholesky(p, grad) if v is None else system.gradient(v)


def _by_cholesky(p: Tensor, grad: Tensor) -> Tensor:
    """Compute τ times the gradient for a stack of matrices, in float64, as `_cholesky` shifts by rounding errors."""
    system = _System(p.double(), grad.double())
    return system.gradient(_cholesky(system)).to(p.dtype)


class _System:
    """[[diag r, P], [Pᵀ, diag c]] [u; v] = [H·1; Hᵀ·1] with u eliminated: S v = Hᵀ·1 − Pᵀ (H·1 / r).

    S = diag c − Pᵀ diag(1/r) P is the Laplacian of a graph whose nodes are the columns: symmetric and positive
    semidefinite. Its null space holds the constants, and more vectors if P is block diagonal. The right-hand side is
    orthogonal to all of them, and adding one to v, with the opposite change of u, does not change P ⊙ (u·1ᵀ + 1·vᵀ).
    Vectors have the shape (*batch, n, 1).
    """

    def __init__(self, p: Tensor, grad: Tensor):
        self.p, self.h = p, p * grad
        self.r, self.c = p.sum(-1, keepdim=True), p.sum(-2).unsqueeze(-1)
        self.rows, self.columns = self.h.sum(-1, keepdim=True), self.h.sum(-2).unsqueeze(-1)
        self.expected = p.mT @ (self.rows / self.r)
        self.right = self.columns - self.expected

    def image(self, v: Tensor) -> Tensor:
        """Return S v."""
        return self.c * v - self.p.mT @ ((self.p @ v) / self.r)

    def gradient(self, v: Tensor) -> Tensor:
        """Return H − P ⊙ (u·1ᵀ + 1·vᵀ), overwriting H."""
        u = (self.rows - self.p @ v) / self.r
        return self.h.sub_(self.p * (u + v.mT))


def _cholesky(system: _System) -> Tensor:
    """Solve for v by factoring S.

    The diagonal of S is the sum of its off-diagonal entries, not c minus something almost equal to c, so that S is
    diagonally dominant however saturated P is. A shift the size of rounding makes it definite. In directions where S
    vanishes, v is then a quotient of two rounding errors, as small as the right-hand side was before it cancelled.
    """
    p = system.p
    s = p.mT @ (p / system.r)
    s.diagonal(dim1=-2, dim2=-1).zero_()
    degrees = s.sum(-1)
    shift = 4 * s.shape[-1] * torch.finfo(s.dtype).eps * system.c.amax(-2)  # (*batch, 1)
    s.neg_().diagonal(dim1=-2, dim2=-1).copy_(degrees + shift)
    return torch.cholesky_solve(system.right, torch.linalg.cholesky(s))


def _conjugate_gradients(system: _System) -> Tensor | None:
    """Solve for v by conjugate gradients, preconditioned with the diagonal of S; None if they do not converge."""
    p, c, residual = system.p, system.c, system.right
    eps = torch.finfo(p.dtype).eps
    tolerance = eps * (system.columns.norm() + system.expected.norm())  # the rounding error of their difference
    diagonal = (c - p.square().mT @ system.r.reciprocal()).clamp(min=eps * float(c.max()))
    v = torch.zeros_like(residual)
    step = preconditioned = residual / diagonal
    energy = (residual * preconditioned).sum()
    for _ in range(MAX_ITERATIONS):
        if residual.norm() <= tolerance:
            return v
        image = system.image(step)
        curvature = (step * image).sum()
        if not curvature > 0:
            return None  # nothing but rounding errors in this direction
        v = v + step * (energy / curvature)
        residual = residual - image * (energy / curvature)
        preconditioned = residual / diagonal
        energy, before = (residual * preconditioned).sum(), energy
        step = preconditioned + step * (energy / before)
    return None
