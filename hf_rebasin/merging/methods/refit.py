"""Refit: every linear map of a merged model by least squares, on what it reads, to what the merged models say there.

An average of weights gives something else than an average of what two layers say, the more so the farther from the
input. So layer by layer, W = argmin ‖X W − T‖² + r‖W − W₀‖² with X what the layer of the *merged* model reads, the
layers before it refitted already, T the mean of what the layer says in the models that were merged, and W₀ the
average: W = (XᵀX + rI)⁻¹(XᵀT + rW₀), with 1 among the columns of X for the bias. No labels; of the data only XᵀX and
XᵀT are kept. After PLeaS (Nasery et al. 2024, 2407.02447) and RegMean (Jin et al. 2022, 2212.09849).

Where a layer gives the logits that a model answers, a square is the wrong measure: it counts the scores of what nobody
would choose as much as the others. So W is there what least squares gave, W₁, times the s ≤ 1 that makes KL(softmax T
‖ softmax s X W₁) least, and then the least of Σ KL(softmax T ‖ softmax X W) + r‖W − s W₁‖². Both are convex. The
second is a least squares fit again and again, as the second derivatives are at most ½ XᵀX (Böhning 1992), with
Nesterov's momentum; it is stopped after `ROUNDS` passes, near its end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.checkpoint import Checkpoint
from ...errors import OptionError
from ...modules.hooks import Calls
from ...modules.layerwise import Change, Step
from ...modules.linear_maps import PIECE, Affine
from ..fitting import shares_of, with_changes

RIDGE = 1e-3
HELD = 32.0  # samples: how much s W₁ counts beside the data, in r = HELD · tr(XᵀX) / (n · samples)
STRETCHES, ROUNDS = 8, 20  # passes over the data: for s at most, and for W after that
ELEMENTWISE = True
WORDS = ("refitting", "refitted")


def merge(tensors: Sequence[Tensor], *, weights: Sequence[float] | None = None, ridge: float = RIDGE) -> Tensor:
    """The weighted average, of which the fit begins.

    Args:
        tensors: one per model, all of one shape.
        weights: of the models, in the average and in what is fitted to; by default equal.
        ridge: r = ridge · tr(XᵀX) / n: how much the average counts beside the data.

    Raises:
        OptionError: weights that are not one per model with a sum, or a ridge that is not above 0.
    """
    _refuse_ridge(ridge)
    terms = [share * tensor for share, tensor in zip(shares_of(weights, len(tensors)), tensors, strict=True)]
    return torch.stack(terms).sum(0)


def refit(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    ridge: float = RIDGE,
    device: Any = None,
    progress: bool = False,
) -> Checkpoint:
    """Fit the layers of a merge, in the order of its forward pass, to the mean of what the merged models say.

    Linear layers, Conv1D and convolutions (grouped, depthwise, dilated) are fitted by least squares; a linear layer
    whose output is the `logits` of the answer, as classes and tokens have them, then by the KL of what softmax makes
    of them, unless `config.problem_type` says that they are a regression's or of several labels. A weight that is tied
    to another or computed from others stays as it is merged, and so does a layer that no pass calls, or that reads
    other positions in one model than in another, as experts do; the log says which. BatchNorm statistics become those
    of the data.

    Args:
        merged: the merge; it stays as it is.
        models: what was merged, in one system of coordinates (moved already).
        data: unlabelled batches that can be read again and again; a few thousand tokens or images do. Under
            `accelerate launch` every process takes its share. Positions that an `attention_mask` leaves out do not
            count.
        weights: of the models in the mean; by default equal.
        ridge: r = ridge · tr(XᵀX) / n.
        device: where it is computed.
        progress: show a progress bar (on a terminal).

    Returns:
        The refitted merge, with the keys and dtypes it had.

    Raises:
        OptionError: no data, or such as can be read once; weights that are not one per model with a sum; the ridge.
        CheckpointError: no class is known that could be run, or NaN in what a layer reads or gives.

    Example: y = x W with W = 2 in one model and 4 in the other: T = 3x, so W = 3 whatever W₀ was, as far as the ridge
    lets it. Where layers follow each other, and the first ones do not agree, the average is not the answer.

        >>> better = refit(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    _refuse_ridge(ridge)
    shares = shares_of(weights, len(models))
    fit = partial(_LeastSquares, shares=shares, ridge=ridge)
    return with_changes(merged, models, data, fit, device=device, progress="refitting" if progress else "")


finish = refit  # of the average that `merge` gives


def _refuse_ridge(ridge: float) -> None:
    if not 0 < ridge < math.inf:
        raise OptionError(f"ridge = {ridge}; give a number above 0, such as {RIDGE}")


class _LeastSquares(Change):
    """The normal equations of the layers of a step, which read the same; a `Change`."""

    def __init__(self, step: Step, shares: Sequence[float], ridge: float):
        self.layers, self.shares, self.ridge, self.scores = step.layers, shares, ridge, step.scores
        shapes = [layer.matrix.shape for layer in self.layers]
        groups, width = shapes[0][0], shapes[0][1] + 1  # with the column of ones
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self.layers[0].module.weight.device}
        apart = torch.zeros(len(shapes), **kind)  # how often a layer was not called on the same in all models
        products = [torch.zeros(groups, width, n, **kind) for _, _, n in shapes]
        self.sums = [apart, torch.zeros(groups, width, width, **kind), *products]

    def add(self, calls: Sequence[Calls], mask: Tensor | None) -> None:
        apart, squares, *products = self.sums
        together = [i for i, layer in enumerate(self.layers) if _alike([model[layer.name] for model in calls])]
        apart += 1
        apart[together] -= 1
        own, *others = calls
        for k, (read, _) in enumerate(own[self.layers[0].name]):
            said = {
                i: _said(self.layers[i], [other[self.layers[i].name][k][1] for other in others], self.shares, mask)
                for i in together
            }
            start = 0
            for piece in self.layers[0].samples(read, mask):
                x = _with_ones(piece.double())
                rows = slice(start, start := start + x.shape[1])
                squares += x.mT @ x
                for i, y in said.items():
                    products[i] += x.mT @ y[:, rows]

    def write(self) -> Sequence[str]:
        apart, squares, *products = self.sums
        changed = []
        for layer, product, times in zip(self.layers, products, apart.tolist(), strict=True):
            if times == 0 and squares.any():
                self._fit(layer, squares, product)
                changed.append(layer.name)
        return changed

    def then(self) -> Change | None:
        apart, squares, *_ = self.sums
        if not self.scores or apart.any() or not squares.any():
            return None
        return _Stretch(_Head(self.layers[0], self.shares, squares[0]))

    def _fit(self, layer: Affine, squares: Tensor, product: Tensor) -> None:
        matrix, bias = layer.matrix.double(), layer.bias
        n = squares.shape[-1] if bias is not None else squares.shape[-1] - 1
        before = matrix if bias is None else torch.cat([matrix, bias.double()[:, None]], 1)
        left, right = squares[:, :n, :n], product[:, :n]
        r = self.ridge * left.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        r = torch.where(r > 0, r, 1.0)  # a group that has read nothing but 0 stays as it is
        eye = torch.eye(n, dtype=left.dtype, device=left.device)
        fitted = torch.linalg.solve(left + r * eye, right + r * before)
        layer.write(fitted if bias is None else fitted[:, :-1], None if bias is None else fitted[:, -1])


@dataclass(frozen=True)
class _Head:
    """The layer that gives the logits."""

    layer: Affine
    shares: Sequence[float]
    squares: Tensor  # XᵀX, with the column of ones

    @property
    def matrix(self) -> Tensor:
        """(in, out), with its bias in the last row if there is one."""
        matrix, bias = self.layer.matrix[0].double(), self.layer.bias
        return matrix if bias is None else torch.cat([matrix, bias.double()])

    def write(self, matrix: Tensor) -> None:
        n = self.layer.matrix.shape[1]
        self.layer.write(matrix[None, :n], None if self.layer.bias is None else matrix[n:])

    def pieces(self, calls: Sequence[Calls], mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """X and softmax T, a few samples at a time."""
        (own, *others), layer = calls, self.layer
        for k, (read, _) in enumerate(own[layer.name]):
            (x,) = (piece[0].double() for piece in layer.samples(read, mask))
            x = x if layer.bias is None else _with_ones(x)
            t = _said(layer, [other[layer.name][k][1] for other in others], self.shares, mask)[0]
            many = max(1, PIECE // t.shape[-1])
            for some, said in zip(x.split(many), t.split(many), strict=True):
                yield some, said.softmax(-1)


class _Stretch(Change):
    """One step of Newton towards the s ≤ 1 of least KL."""

    def __init__(self, head: _Head, start: Tensor | None = None, s: float = 1.0, left: int = STRETCHES):
        self.head, self.start, self.s, self.left = head, head.matrix if start is None else start, s, left
        self.sums = [self.start.new_zeros(2)]  # first and second derivative

    def add(self, calls: Sequence[Calls], mask: Tensor | None) -> None:
        for x, target in self.head.pieces(calls, mask):
            y = x @ self.start
            q = (self.s * y).softmax(-1)
            apart = y - (q * y).sum(-1, keepdim=True)
            self.sums[0] += torch.stack([((q - target) * y).sum(), (q * apart.square()).sum()])

    def write(self) -> Sequence[str]:
        slope, curvature = self.sums[0].tolist()
        found = self.s - slope / curvature if curvature > 0 else self.s
        # what was fitted to these data is nearer to the targets on them than on others: that is no reason to be surer
        self.before, self.s = self.s, min(max(found, self.s / 2), 1.0)
        return ()

    def then(self) -> Change:
        if self.left == 1 or abs(self.s - self.before) < 1e-3 * self.s:
            return _Divergence(self.head, self.s * self.start)
        return _Stretch(self.head, self.start, self.s, self.left - 1)


class _Divergence(Change):
    """One step towards the W of least KL; of all that is kept from one to the next, only the sums are made anew."""

    def __init__(self, head: _Head, start: Tensor):
        self.head, self.start, self.left = head, start, ROUNDS
        n = len(start)
        squares = head.squares[:n, :n]
        r = HELD * squares.diagonal().mean() / head.squares[-1, -1]
        self.r = torch.where(r > 0, r, 1.0)  # what has read nothing but 0 stays as it is
        eye = torch.eye(n, dtype=squares.dtype, device=squares.device)
        self.root = torch.linalg.cholesky(0.5 * squares + 2 * self.r * eye)
        self.best, self.ahead, self.momentum = start, start, 1.0
        self.sums = [torch.zeros_like(start)]  # the derivative where momentum has led

    def add(self, calls: Sequence[Calls], mask: Tensor | None) -> None:
        for x, target in self.head.pieces(calls, mask):
            self.sums[0] += x.mT @ ((x @ self.ahead).softmax(-1) - target)

    def write(self) -> Sequence[str]:
        slope = self.sums[0] + 2 * self.r * (self.ahead - self.start)
        found = self.ahead - torch.cholesky_solve(slope, self.root)
        moved = found - self.best
        if (slope * moved).sum() > 0:  # uphill: momentum begins anew
            self.momentum = 1.0
        after = (1 + math.sqrt(1 + 4 * self.momentum**2)) / 2
        self.ahead = found + (self.momentum - 1) / after * moved
        self.best, self.momentum = found, after
        self.left -= 1
        if not self.left:
            self.head.write(self.best)
        return ()

    def then(self) -> Change | None:
        self.sums = [torch.zeros_like(self.start)]
        return self if self.left else None


def _said(layer: Affine, answers: Sequence[Tensor], shares: Sequence[float], mask: Tensor | None) -> Tensor:
    """(groups, many, out): the mean of what the models say."""
    terms = (share * layer.answers(y, mask).double() for share, y in zip(shares, answers, strict=True))
    return functools.reduce(Tensor.add_, terms)


def _alike(models: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> bool:
    """Whether a layer was called as often in all models, on as many samples."""
    shapes = [[(read.shape, said.shape) for read, said in calls] for calls in models]
    return all(one == shapes[0] for one in shapes)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)
