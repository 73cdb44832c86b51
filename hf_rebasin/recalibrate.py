"""Statistics of a merged model: an average of two models has none of its own.

BatchNorm statistics are recomputed from data. REPAIR goes further: an average of two units varies less than either, so
every unit is given back the mean and the deviation that the merged models have on average (Jordan et al. 2022, arXiv
2211.08403), in the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from tqdm import tqdm

from .checkpoint import Checkpoint
from .errors import OptionError
from .inputs import Inputs, run
from .layers import Calls, Change, NormStatistics, Step, change_in_order, computing, shares_of, there, with_values
from .objective import Device
from .processes import shared_out, sum_of_all


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Inputs], *, exact: bool = False, device: Device = None, progress: bool = False
) -> int:
    """Recompute running mean and variance of every BatchNorm layer, in place, from all samples of all batches.

    In one pass each layer reads what batches look like that are normalised by their own statistics, as in training; so
    batches should not be small. `exact` makes one pass for every layer, with the layers before it as they will be: the
    statistics are then those of one big batch, however it was cut.

    Args:
        model: any module; its mode is restored.
        batches: inputs of its forward pass: tensors, positional arguments, or mappings of keyword arguments; with
            `exact` they are read again and again. Under `accelerate launch` every process takes its share.
        exact: one pass per layer.
        device: where batches are brought, and where the model is; by default nothing is moved.
        progress: show a progress bar (on a terminal).

    Returns:
        The number of BatchNorm layers; with none, no batch is read.

    Raises:
        OptionError: there are BatchNorm layers and no batches. Whatever fails, the statistics stay as they were.

    Example: of two batches, one of zeros and one of tens, the mean is 5 and not what the last one leaves.

        >>> norm = torch.nn.BatchNorm1d(1).eval()
        >>> recalibrate(norm, [torch.zeros(4, 1), torch.full((4, 1), 10.0)])
        1
        >>> norm.running_mean
        tensor([5.])
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not norms:
        return 0
    with _unless_it_fails(model, norms):
        model.eval()
        if exact:
            change_in_order(
                [model],
                batches,
                lambda step: None if step.norm is None else NormStatistics(step.norm, device),
                device=device,
                progress="recalibrating" if progress else "",
            )
        else:
            _in_one_pass(model, norms, batches, device, progress)
    return len(norms)


def has_statistics(checkpoint: Checkpoint) -> bool:
    """Whether a model has running statistics, by its keys."""
    return any(key.endswith("running_mean") for key in checkpoint.parts)


def _in_one_pass(
    model: nn.Module, norms: Sequence[_NormBase], batches: Iterable[Inputs], device: Device, progress: bool
) -> None:
    """Every layer normalises by the batch, and what it reads is added up."""
    seen = [
        NormStatistics(norm, device or norm.running_mean.device) for norm in norms if norm.running_mean is not None
    ]
    handles = [
        one.norm.register_forward_pre_hook(lambda _, inputs, one=one: one.see(inputs[0].detach())) for one in seen
    ]
    for norm in norms:
        norm.momentum = 0.0  # nothing is written on the way
        norm.train()  # only these: dropout stays off
    try:
        for batch in tqdm(shared_out(batches), desc="recalibrating", unit="batch", disable=None if progress else True):
            run(model, there(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    for one in seen:
        one.sums = [sum_of_all(total) for total in one.sums]
        if not one.samples:
            raise OptionError("no batch came, so there is nothing to take statistics of; is the iterator used up?")
        one.write()


@contextmanager
def _unless_it_fails(model: nn.Module, norms: Sequence[_NormBase]) -> Iterator[None]:
    """Modes and momenta are restored, and if something fails the statistics, too."""
    training, momenta = [m.training for m in model.modules()], [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        yield
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            norm.load_state_dict(buffers, strict=False)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode


def repair(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    device: Device = None,
    progress: bool = False,
) -> Checkpoint:
    """Give every unit of a merge the mean and the deviation that the merged models have on average (REPAIR).

    For a unit of a linear map or a convolution with mean μ and deviation σ over the data, in the merge with all layers
    before it repaired: w ← w · σ_α / σ and b ← μ_α + (b − μ) · σ_α / σ, with σ_α = Σ αᵢ σᵢ and μ_α = Σ αᵢ μᵢ over the
    models. A layer without a bias keeps its mean times σ_α / σ. BatchNorm statistics are those of the data. What comes
    out are ordinary weights.

    Args:
        merged: the merge; it stays as it is.
        models: what was merged, in one system of coordinates (moved already).
        data: unlabelled batches that can be read again and again. Under `accelerate launch` every process takes its
            share. Positions that an `attention_mask` leaves out do not count.
        weights: α of the models; by default equal.
        device: where it is computed.
        progress: show a progress bar (on a terminal).

    Returns:
        The repaired merge, with the keys and dtypes it had.

    Raises:
        OptionError: no data, or weights that are not one per model with a sum.
        CheckpointError: no class is known that could be run.

    Example: two units with deviation 1 that know nothing of each other have an average with deviation √½, and so on
    from layer to layer. Times √2 it is 1 again.

        >>> repaired = repair(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    shares = shares_of(weights, len(models))
    modules = [computing(checkpoint, device) for checkpoint in (merged, *models)]

    def change(step: Step) -> Change:
        return _Rescaling(step, shares, device) if step.norm is None else NormStatistics(step.norm, device)

    change_in_order(modules, data, change, device=device, progress="repairing" if progress else "")
    return with_values(merged, modules[0])


class _Rescaling:
    """Means and deviations of what the layers of a step give, in the merge and in what was merged; a `Change`."""

    def __init__(self, step: Step, shares: Sequence[float], device: Device):
        self.layers, self.shares = step.layers, shares
        kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
        shapes = [(1 + len(shares), 3, layer.groups, layer.matrix.shape[2]) for layer in self.layers]
        self.sums = [torch.zeros(shape, **kind) for shape in shapes]  # of every model Σ1, Σy, Σy²

    def add(self, calls: Sequence[Calls], mask: Tensor | None) -> None:
        for total, layer in zip(self.sums, self.layers, strict=True):
            for i, model in enumerate(calls):
                for _, said in model[layer.name]:
                    y = layer.answers(said, mask).double()
                    total[i] += torch.stack([torch.full_like(y[:, 0], y.shape[1]), y.sum(1), y.square().sum(1)])

    def write(self) -> None:
        for total, layer in zip(self.sums, self.layers, strict=True):
            count, sums, squares = total.unbind(1)
            means = sums / count.clamp_min(1)
            deviations = (squares / count.clamp_min(1) - means.square()).clamp_min(0).sqrt()
            shares = torch.tensor(self.shares, dtype=means.dtype, device=means.device)[:, None, None]
            mean, deviation = (shares * means[1:]).sum(0), (shares * deviations[1:]).sum(0)
            alive = (deviations[0] > 1e-6 * means[0].abs()) & (count[0] > 0)
            scale = torch.where(alive, deviation / deviations[0].clamp_min(1e-30), 1.0)
            bias = layer.bias
            if bias is not None:
                bias = torch.where(count[0] > 0, mean + (bias.double() - means[0]) * scale, bias.double())
            layer.write(layer.matrix.double() * scale[:, None], bias)
