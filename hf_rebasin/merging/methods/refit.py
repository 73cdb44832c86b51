"""Refit: fit every linear map of a merge, by least squares on its inputs, to its outputs in the merged models.

Averaged weights do not give averaged outputs, the less so the farther a layer is from the input. So layer by layer,
W = argmin ‖X W − T‖² + r‖W − W₀‖², where X are the inputs of the layer in the *merge*, whose earlier layers have been
refitted already, T is the mean of the layer's outputs in the merged models, and W₀ the average of its weights. So
W = (XᵀX + rI)⁻¹(XᵀT + rW₀), with a column of ones in X for the bias. No labels are needed, and only XᵀX and XᵀT are
kept of the data. After PLeaS (Nasery et al. 2024, 2407.02447) and RegMean (Jin et al. 2022, 2212.09849).

For the layer that computes a model's logits, squares are the wrong measure: they weigh the logits of the least likely
classes as much as all others. So the solution W₁ of least squares is first scaled by the s ≤ 1 that minimises
KL(softmax T ‖ softmax s X W₁), and W then minimises Σ KL(softmax T ‖ softmax X W) + r‖W − s W₁‖². Both problems are
convex. The second one is solved by repeated least squares, as its second derivatives are at most ½ XᵀX (Böhning
1992), with Nesterov's momentum; it is stopped after `KL_STEPS` passes, near the minimum.
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
from ...modules.hooks import LayerCalls
from ...modules.layerwise import Change, LayerStep
from ...modules.linear_maps import CHUNK_ELEMENTS, Affine
from ..fitting import average_tensors, change_layers, normalise_weights

RIDGE = 1e-3
PRIOR_SAMPLES = 32.0  # s W₁ counts as much as so many samples: r = PRIOR_SAMPLES · tr(XᵀX) / (n · samples)
SCALE_STEPS, KL_STEPS = 8, 20  # passes over the data: at most, for s, and then for W
PIECES = "elements"
VERB = ("refitting", "refitted")


def merge(tensors: Sequence[Tensor], *, weights: Sequence[float] | None = None, ridge: float = RIDGE) -> Tensor:
    """Average tensors with weights; the fit starts from the average.

    Args:
        tensors: one tensor per model, all of one shape.
        weights: weights of the models in the average and in the mean of their outputs; by default equal.
        ridge: weight of the average relative to the data, in r = ridge · tr(XᵀX) / n.

    Raises:
        OptionError: weights that are not one per model or have no positive sum, or a ridge that is not above 0.
    """
    _refuse_ridge(ridge)
    return average_tensors(tensors, normalise_weights(weights, len(tensors)))


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
    """Fit the layers of a merge, in the order of its forward pass, to the mean of their outputs in the merged models.

    Linear layers, Conv1D and convolutions (grouped, depthwise, dilated) are fitted by least squares. A linear layer
    that computes the `logits` of classes or tokens is then fitted by KL divergence of their softmax, unless
    `config.problem_type` says regression or multi-label classification. Weights that are tied to others or computed
    from them stay as they were merged, and so do layers that no pass calls, or that read different positions in
    different models, as experts do; the log names them. BatchNorm statistics are recomputed on the data.

    Args:
        merged: the merge, which is not modified.
        models: models that were merged, in the same coordinates (moved already).
        data: unlabelled batches that can be read again and again; a few thousand tokens or images suffice. Under
            `accelerate launch` every process takes its share. Positions that an `attention_mask` leaves out do not
            count.
        weights: weights of the models in the mean of their outputs; by default equal.
        ridge: r = ridge · tr(XᵀX) / n.
        device: device of the computation.
        progress: show a progress bar (on a terminal).

    Returns:
        The refitted merge, with the same keys and dtypes.

    Raises:
        OptionError: no data, or data that can be read only once; weights that are not one per model or have no
            positive sum; a ridge that is not above 0.
        CheckpointError: a model without a known class, or NaN in inputs or outputs of a layer.

    Example: for y = x W with W = 2 in one model and 4 in the other, T = 3x, so W = 3 up to the ridge, whatever W₀ was.
    In a deeper model whose first layers disagree, the average of the later ones is not the solution.

        >>> better = refit(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    _refuse_ridge(ridge)
    shares = normalise_weights(weights, len(models))
    fit = partial(_LeastSquares, shares=shares, ridge=ridge)
    return change_layers(merged, models, data, fit, device=device, progress="refitting" if progress else "")


finish = refit  # called on the average that `merge` returns


def _refuse_ridge(ridge: float) -> None:
    if not 0 < ridge < math.inf:
        raise OptionError(f"ridge = {ridge}; give a number above 0, such as {RIDGE}")


class _LeastSquares(Change):
    """Normal equations of the layers of a step, which read the same input."""

    def __init__(self, step: LayerStep, shares: Sequence[float], ridge: float):
        self.layers, self.shares, self.ridge, self.gives_logits = step.layers, shares, ridge, step.gives_logits
        shapes = [layer.matrix.shape for layer in self.layers]
        groups, width = shapes[0][0], shapes[0][1] + 1  # with the column of ones
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.layers[0].module.weight.device}
        mismatches = torch.zeros(len(shapes), **options)  # batches on which the models call a layer differently
        products = [torch.zeros(groups, width, n, **options) for _, _, n in shapes]
        self.batch_sums = [mismatches, torch.zeros(groups, width, width, **options), *products]

    def add(self, calls: Sequence[LayerCalls], mask: Tensor | None) -> None:
        mismatches, squares, *products = self.batch_sums
        matching = [i for i, layer in enumerate(self.layers) if _same_shapes([model[layer.name] for model in calls])]
        mismatches += 1
        mismatches[matching] -= 1
        of_merge, *others = calls
        for k, (read, _) in enumerate(of_merge[self.layers[0].name]):
            targets = {}
            for i in matching:
                outputs = [other[self.layers[i].name][k][1] for other in others]
                targets[i] = _mean_outputs(self.layers[i], outputs, self.shares, mask)
            start = 0
            for piece in self.layers[0].input_samples(read, mask):
                x = _append_ones(piece.double())
                rows = slice(start, start := start + x.shape[1])
                squares += x.mT @ x
                for i, target in targets.items():
                    products[i] += x.mT @ target[:, rows]

    def write(self) -> Sequence[str]:
        mismatches, squares, *products = self.batch_sums
        changed = []
        for layer, product, count in zip(self.layers, products, mismatches.tolist(), strict=True):
            if count == 0 and squares.any():
                self._fit(layer, squares, product)
                changed.append(layer.name)
        return changed

    def follow_up(self) -> Change | None:
        mismatches, squares, *_ = self.batch_sums
        if not self.gives_logits or mismatches.any() or not squares.any():
            return None
        return _ScaleSearch(_Head(self.layers[0], self.shares, squares[0]))

    def _fit(self, layer: Affine, squares: Tensor, product: Tensor) -> None:
        matrix, bias = layer.matrix.double(), layer.bias
        n = squares.shape[-1] if bias is not None else squares.shape[-1] - 1
        before = matrix if bias is None else torch.cat([matrix, bias.double()[:, None]], 1)
        gram, cross = squares[:, :n, :n], product[:, :n]
        r = self.ridge * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        r = torch.where(r > 0, r, 1.0)  # a group whose inputs are all 0 stays as it is
        eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
        fitted = torch.linalg.solve(gram + r * eye, cross + r * before)
        layer.write(fitted if bias is None else fitted[:, :-1], None if bias is None else fitted[:, -1])


@dataclass(frozen=True)
class _Head:
    """The layer that computes the logits, with XᵀX of its inputs."""

    layer: Affine
    shares: Sequence[float]
    squares: Tensor  # XᵀX, with the column of ones

    @property
    def matrix(self) -> Tensor:
        """The weight, (in, out), with the bias in the last row if there is one."""
        matrix, bias = self.layer.matrix[0].double(), self.layer.bias
        return matrix if bias is None else torch.cat([matrix, bias.double()])

    def write(self, matrix: Tensor) -> None:
        n = self.layer.matrix.shape[1]
        self.layer.write(matrix[None, :n], None if self.layer.bias is None else matrix[n:])

    def pieces(self, calls: Sequence[LayerCalls], mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield X and softmax T, a few samples at a time."""
        (of_merge, *others), layer = calls, self.layer
        for k, (read, _) in enumerate(of_merge[layer.name]):
            (x,) = (piece[0].double() for piece in layer.input_samples(read, mask))
            x = x if layer.bias is None else _append_ones(x)
            target = _mean_outputs(layer, [other[layer.name][k][1] for other in others], self.shares, mask)[0]
            length = max(1, CHUNK_ELEMENTS // target.shape[-1])
            for inputs, logits in zip(x.split(length), target.split(length), strict=True):
                yield inputs, logits.softmax(-1)


class _ScaleSearch(Change):
    """A Newton step towards the s ≤ 1 that minimises the KL divergence."""

    def __init__(self, head: _Head, start: Tensor | None = None, s: float = 1.0, steps_left: int = SCALE_STEPS):
        self.head, self.start, self.s, self.steps_left = head, head.matrix if start is None else start, s, steps_left
        self.batch_sums = [self.start.new_zeros(2)]  # first and second derivative

    def add(self, calls: Sequence[LayerCalls], mask: Tensor | None) -> None:
        for x, target in self.head.pieces(calls, mask):
            y = x @ self.start
            q = (self.s * y).softmax(-1)
            centred = y - (q * y).sum(-1, keepdim=True)
            self.batch_sums[0] += torch.stack([((q - target) * y).sum(), (q * centred.square()).sum()])

    def write(self) -> Sequence[str]:
        slope, curvature = self.batch_sums[0].tolist()
        newton = self.s - slope / curvature if curvature > 0 else self.s
        # never s > 1: the fit is closer to the targets on these data than on others, so they cannot justify confidence
        self.before, self.s = self.s, min(max(newton, self.s / 2), 1.0)
        return ()

    def follow_up(self) -> Change:
        if self.steps_left == 1 or abs(self.s - self.before) < 1e-3 * self.s:
            return _KLFit(self.head, self.s * self.start)
        return _ScaleSearch(self.head, self.start, self.s, self.steps_left - 1)


class _KLFit(Change):
    """A step towards the W that minimises the KL divergence; it is its own follow-up, with fresh `batch_sums`."""

    def __init__(self, head: _Head, start: Tensor):
        self.head, self.start, self.steps_left = head, start, KL_STEPS
        n = len(start)
        squares = head.squares[:n, :n]
        r = PRIOR_SAMPLES * squares.diagonal().mean() / head.squares[-1, -1]
        self.r = torch.where(r > 0, r, 1.0)  # a layer whose inputs are all 0 stays as it is
        eye = torch.eye(n, dtype=squares.dtype, device=squares.device)
        self.root = torch.linalg.cholesky(0.5 * squares + 2 * self.r * eye)
        self.best, self.ahead, self.momentum = start, start, 1.0
        self.batch_sums = [torch.zeros_like(start)]  # the gradient at the point ahead

    def add(self, calls: Sequence[LayerCalls], mask: Tensor | None) -> None:
        for x, target in self.head.pieces(calls, mask):
            self.batch_sums[0] += x.mT @ ((x @ self.ahead).softmax(-1) - target)

    def write(self) -> Sequence[str]:
        slope = self.batch_sums[0] + 2 * self.r * (self.ahead - self.start)
        new = self.ahead - torch.cholesky_solve(slope, self.root)
        step = new - self.best
        if (slope * step).sum() > 0:  # uphill: restart the momentum
            self.momentum = 1.0
        momentum = (1 + math.sqrt(1 + 4 * self.momentum**2)) / 2
        self.ahead = new + (self.momentum - 1) / momentum * step
        self.best, self.momentum = new, momentum
        self.steps_left -= 1
        if not self.steps_left:
            self.head.write(self.best)
        return ()

    def follow_up(self) -> Change | None:
        self.batch_sums = [torch.zeros_like(self.start)]
        return self if self.steps_left else None


def _mean_outputs(layer: Affine, outputs: Sequence[Tensor], shares: Sequence[float], mask: Tensor | None) -> Tensor:
    """Return the weighted mean of the models' outputs, (groups, samples, out)."""
    terms = (share * layer.output_samples(y, mask).double() for share, y in zip(shares, outputs, strict=True))
    return functools.reduce(Tensor.add_, terms)


def _same_shapes(models: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> bool:
    """Tell whether a layer was called equally often, and on equally many samples, in all models."""
    shapes = [[(read.shape, output.shape) for read, output in calls] for calls in models]
    return all(shape == shapes[0] for shape in shapes)


def _append_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)
