"""Doubly stochastic matrices from free ones, differentiably: the Sinkhorn operator with an implicit gradient.

A permutation has no gradient; P = S_τ(X) does, and tends to a permutation as τ falls. Forward, Sinkhorn's iteration
(Mena et al. 2018, arXiv 1802.08665; for merging Peña et al. 2022, arXiv 2212.12042). Backward, the gradient of the
map it converges to, from P alone (Eisenberger et al. 2022, arXiv 2205.06688): nothing of the iterations is stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import OptionError

DIRECT_UP_TO = 192  # columns; up to here factoring the Schur complement takes no longer than iterating
MOST_ITERATIONS = 100  # of conjugate gradients; at thousands of columns a fraction of what factoring takes


def sinkhorn(x: Tensor, temperature: float = 1.0, iterations: int = 20, *, implicit: bool = True) -> Tensor:
    """P = S_τ(X), a doubly stochastic matrix for every matrix of logits.

        Z = X / τ;  repeat:  Z −= logsumexp of every column,  then  Z −= logsumexp of every row;  P = exp Z

    Rows come last: they sum to 1 up to rounding, columns as far as the iteration converged. With ℓ a loss, G = ∂ℓ/∂P,
    H = P ⊙ G / τ and P's own row sums r and column sums c, the implicit gradient is

        [[diag r, P], [Pᵀ, diag c]] [u; v] = [H·1; Hᵀ·1],   ∂ℓ/∂X = H − P ⊙ (u·1ᵀ + 1·vᵀ)

    It is the gradient of the converged map: where the iterations have not converged (small τ), it differs from the
    unrolled one, which is that of the iterations as they ran.

    Args:
        x: logits, (*batch, n, n) and finite, of any floating type; halves are computed in float32.
        temperature: τ > 0, in the units of `x`. Low ones give almost permutations.
        iterations: how often columns and rows are normalised, at least 1.
        implicit: differentiate through the fixed point, in the memory of P; it can be done once, not twice. Otherwise
            through all iterations, which stores 2 · `iterations` matrices as large as `x`.

    Returns:
        P, the shape and type of `x`: row i, column j is how much of i is assigned to j.

    Raises:
        OptionError: x that is no stack of square matrices, not floating, or has entries that are not finite (or
            overflow when divided by τ); τ or a number of iterations that is not positive.

    Example:
        A 2 × 2 matrix is doubly stochastic with one number p on its diagonal, and Sinkhorn keeps the odds ratio
        p² / (1 − p)² = exp((x₁₁ + x₂₂ − x₁₂ − x₂₁) / τ), here 3 · 3 = 9: p / (1 − p) = 3, so p = 3 / 4.

        >>> sinkhorn(torch.log(torch.tensor([[3.0, 1.0], [1.0, 3.0]])))
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    _refuse(x, temperature, iterations)
    if not x.numel():
        return x / temperature  # nothing to normalise; keeps shape, type and graph
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):  # its half-precision products would be P's precision
        if implicit:
            p: Tensor = _Implicit.apply(wide, temperature, iterations)
        else:
            p = _unrolled(wide, temperature, iterations)
    return p.to(x.dtype)


def _refuse(x: Tensor, temperature: float, iterations: int) -> None:
    if not 0 < temperature < math.inf:
        raise OptionError(f"temperature {temperature}: has to be positive and finite")
    if iterations < 1 or iterations != int(iterations):
        raise OptionError(f"{iterations} iterations: has to be a whole number, 1 or more")
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise OptionError(f"x of shape {tuple(x.shape)}: has to be (*batch, n, n), square matrices")
    if not x.is_floating_point():
        raise OptionError(f"x of type {x.dtype}: has to be of a floating type, such as x.float()")
    if x.numel():
        bounds = torch.stack(x.detach().aminmax()).to(torch.promote_types(x.dtype, torch.float32)) / temperature
        if not bounds.diff().isfinite():  # NaN and infinities survive into the difference
            raise OptionError(
                f"x / temperature lies in {bounds.tolist()} with {int((~x.isfinite()).sum())} of {x.numel()} entries "
                "of x not finite: has to be finite; for an entry that is to be 0 in P, use a low number such as -1e4"
            )


def _unrolled(x: Tensor, temperature: float, iterations: int) -> Tensor:
    """The definition, operation by operation."""
    z = x / temperature
    for _ in range(iterations):
        z = z - z.logsumexp(-2, keepdim=True)
        z = z - z.logsumexp(-1, keepdim=True)
    return z.exp()


def _scaled(x: Tensor, temperature: float, iterations: int) -> Tensor:
    """The same P from one exponential: P = diag u · K · diag v, of which an iteration changes only u and v.

    K has its maximum 1 in every row and every column, so the first sums lie between 1 / n and n². An entry of K below
    `tiny` is lost; in P it would be below tiny · max u · max v. As long as neither exceeds tiny^(-1/3), that is
    tiny^(1/3), far less than rounding; before one does, u moves into the exponents and K is made anew.
    The first iteration of a new K never exceeds it.
    """
    limit = torch.finfo(x.dtype).tiny ** (-1 / 3)
    z = x / temperature
    left = int(iterations)
    while True:
        z -= z.amax(-2, keepdim=True)
        highest = z.amax(-1, keepdim=True)
        z -= highest  # every column keeps the 0 it had: the row of that 0 had the maximum 0
        k, u = z.exp(), highest.exp()  # where this u is 0, the row was nothing beside any column's maximum
        while left:
            new_v = (k.mT @ u).reciprocal()  # (*batch, n, 1)
            new_u = (k @ new_v).reciprocal()  # (*batch, n, 1)
            if torch.maximum(new_u, new_v).max() > limit:
                break
            u, v, left = new_u, new_v, left - 1
        if not left:
            return k.mul_(u).mul_(v.mT)
        z += u.log()  # v may be forgotten: columns come first


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float, iterations: int) -> Tensor:
        p = _scaled(x, temperature, iterations)
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
    """The gradient for one matrix, τ apart; by Cholesky where conjugate gradients do not converge."""
    system = _System(p, grad)
    v = _conjugate_gradients(system)
    return _by_cholesky(p, grad) if v is None else system.gradient(v)


def _by_cholesky(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient for a stack of matrices, τ apart, in float64: `_cholesky` shifts by as much as rounding is."""
    system = _System(p.double(), grad.double())
    return system.gradient(_cholesky(system)).to(p.dtype)


class _System:
    """[[diag r, P], [Pᵀ, diag c]] [u; v] = [H·1; Hᵀ·1] with u eliminated: S v = Hᵀ·1 − Pᵀ (H·1 / r).

    S = diag c − Pᵀ diag(1/r) P is the Laplacian of a graph whose nodes are the columns: symmetric, positive
    semidefinite, 0 on constants, and on more where P falls into blocks. The right-hand side is orthogonal to all of
    these, and adding one to v, with u moving the other way, does not change P ⊙ (u·1ᵀ + 1·vᵀ).
    Vectors are (*batch, n, 1).
    """

    def __init__(self, p: Tensor, grad: Tensor):
        self.p, self.h = p, p * grad
        self.r, self.c = p.sum(-1, keepdim=True), p.sum(-2).unsqueeze(-1)
        self.rows, self.columns = self.h.sum(-1, keepdim=True), self.h.sum(-2).unsqueeze(-1)
        self.expected = p.mT @ (self.rows / self.r)
        self.right = self.columns - self.expected

    def image(self, v: Tensor) -> Tensor:
        """S v."""
        return self.c * v - self.p.mT @ ((self.p @ v) / self.r)

    def gradient(self, v: Tensor) -> Tensor:
        """H − P ⊙ (u·1ᵀ + 1·vᵀ), in the place of H."""
        u = (self.rows - self.p @ v) / self.r
        return self.h.sub_(self.p * (u + v.mT))


def _cholesky(system: _System) -> Tensor:
    """v, by factoring S.

    The diagonal of S as the sum of what lies beside it, not as c minus something almost c: this way S is diagonally
    dominant, however saturated P is. A shift of the size of rounding makes it definite; in directions where S vanishes
    v is then a quotient of two roundings, as small as the right-hand side was before it cancelled.
    """
    p = system.p
    s = p.mT @ (p / system.r)
    s.diagonal(dim1=-2, dim2=-1).zero_()
    degrees = s.sum(-1)
    shift = 4 * s.shape[-1] * torch.finfo(s.dtype).eps * system.c.amax(-2)  # (*batch, 1)
    s.neg_().diagonal(dim1=-2, dim2=-1).copy_(degrees + shift)
    return torch.cholesky_solve(system.right, torch.linalg.cholesky(s))


def _conjugate_gradients(system: _System) -> Tensor | None:
    """v, by products with P and Pᵀ, preconditioned with the diagonal of S; None where it does not converge."""
    p, c, residual = system.p, system.c, system.right
    eps = torch.finfo(p.dtype).eps
    enough = eps * (system.columns.norm() + system.expected.norm())  # what rounding leaves of their difference
    diagonal = (c - p.square().mT @ system.r.reciprocal()).clamp(min=eps * float(c.max()))
    v = torch.zeros_like(residual)
    step = towards = residual / diagonal
    energy = (residual * towards).sum()
    for _ in range(MOST_ITERATIONS):
        if residual.norm() <= enough:
            return v
        image = system.image(step)
        curvature = (step * image).sum()
        if not curvature > 0:
            return None  # nothing but rounding in this direction
        v = v + step * (energy / curvature)
        residual = residual - image * (energy / curvature)
        towards = residual / diagonal
        energy, before = (residual * towards).sum(), energy
        step = towards + step * (energy / before)
    return None
