"""Recompute the statistics of a merged model, for which averages of the models' statistics are wrong.

BatchNorm statistics are recomputed from data. REPAIR goes further: the average of two units varies less than either
of them, so every unit is rescaled to the mean and standard deviation that the merged models have on average, in the
weights themselves (Jordan et al. 2022, arXiv 2211.08403).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from tqdm import tqdm

from ..alignment.correspondence import tensors_equal
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import Absent
from ..errors import CheckpointError, OptionError
from ..modules.distributed import all_reduce_numbers, all_reduce_sum, shard_batches
from ..modules.forward import Inputs, evaluation_mode, run_module
from ..modules.functional import Device, move_batch
from ..modules.hooks import LayerCalls, forward_hooks
from ..modules.layerwise import Change, LayerStep, NormStatistics, change_in_order, keeps_statistics, refuse_nan
from .fitting import change_layers, normalise_weights


def recalibrate(
    model: nn.Module, batches: Iterable[Inputs], *, exact: bool = False, device: Device = None, progress: bool = False
) -> int:
    """Recompute the running mean and variance of every BatchNorm layer, in place, from all samples of all batches.

    There is one pass, in which layers normalise by the statistics of each batch, as in training, so batches should not
    be small. With `exact` there is one pass per layer, in order: the result then equals the statistics of one big
    batch in training mode, however the data are split into batches. An InstanceNorm that keeps statistics gets the
    mean over all instances. Momentum and `num_batches_tracked`, which belong to training, do not change, and neither
    do layers that no pass calls.

    Args:
        model: any module; its training or evaluation mode is restored.
        batches: inputs of its forward pass: tensors, positional arguments, or mappings of keyword arguments; with
            `exact` they are read once per layer. Under `accelerate launch` every process takes its share.
        exact: make one pass per layer, so that the statistics are those of the data as one batch.
        device: device of the model, to which batches are moved; by default they stay where they are.
        progress: show a progress bar (on a terminal).

    Returns:
        The number of layers that keep statistics; if there are none, no batch is read.

    Raises:
        OptionError: no batches, although there are such layers; with `exact`, batches that can be read only once.
        CheckpointError: NaN or Inf in the input of a layer, which the message names. After any failure the statistics
            are as before.

    Example: for two batches, one of zeros and one of tens, the mean is 5, whichever comes last.

        >>> norm = torch.nn.BatchNorm1d(1).eval()
        >>> recalibrate(norm, [torch.zeros(4, 1), torch.full((4, 1), 10.0)])
        1
        >>> norm.running_mean
        tensor([5.])
    """
    norms = {name: part for name, part in model.named_modules() if keeps_statistics(part)}
    if not norms:
        return 0
    with evaluation_mode(model), _restored_on_failure(norms.values()):
        if exact:
            _recalibrate_layer_by_layer(model, batches, device, progress)
        else:
            statistics = [NormStatistics(norm, name) for name, norm in norms.items()]
            _recalibrate_in_one_pass(model, statistics, batches, device, progress)
    return len(norms)


@dataclass(frozen=True)
class StatisticsLayers:
    """Disk keys of the running means of a model, by whether data can replace them.

    Args:
        recomputed: of the layers that `recalibrate` recomputes.
        frozen: of layers of other classes, such as the frozen BatchNorm of detection models.
    """

    recomputed: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


def find_statistics(checkpoint: Checkpoint) -> StatisticsLayers:
    """Find the layers of a model that have running statistics, by their classes if the model's class is known."""
    suffix = "running_mean"
    keys = [key for key in checkpoint.parts if key.endswith(suffix)]
    if not keys:
        return StatisticsLayers()
    try:
        module, disk_keys = checkpoint.skeleton()
    except CheckpointError:  # no module can be built, so keys are all there is
        return StatisticsLayers(tuple(keys))
    frozen = {
        disk_keys.get(f"{name}.{suffix}")
        for name, part in module.named_modules()
        if suffix in part._buffers and not keeps_statistics(part)
    }
    return StatisticsLayers(
        tuple(key for key in keys if key not in frozen), tuple(key for key in keys if key in frozen)
    )


def has_statistics(checkpoint: Checkpoint) -> bool:
    """Tell whether a model has running statistics that `recalibrate` recomputes."""
    return bool(find_statistics(checkpoint).recomputed)


def describe_averaged_statistics(models: Sequence[Checkpoint], keys: Sequence[str]) -> str:
    """Say that a merge averages the running statistics of layers; empty if all models have the same.

    Args:
        models: the models; the statistics are compared only where all of them have been downloaded.
        keys: disk keys of the running means in the first model.
    """
    first, *others = models
    differing = [key for key in keys if not all(_same_statistics(first, other, key) for other in others)]
    if not differing:
        return ""
    layers = f"{len(differing)} BatchNorm layer{'s' * (len(differing) > 1)}"
    return (
        f"the running means and variances of {layers} are averages of the models', not those of the averaged weights, "
        "so outputs may be far off"
    )


def _same_statistics(a: Checkpoint, b: Checkpoint, key: str) -> bool:
    """Whether two models have the same running mean and variance; False where that is not known."""
    pairs = [(a.parts[k], b.parts.get(k)) for k in (key, key.replace("running_mean", "running_var")) if k in a.parts]
    return all(
        y is not None and not isinstance(x, Absent) and not isinstance(y, Absent) and tensors_equal(x, y)
        for x, y in pairs
    )


def _recalibrate_layer_by_layer(model: nn.Module, batches: Iterable[Inputs], device: Device, progress: bool) -> None:
    """Let later layers read inputs normalised by the biased variance, as in training; then store the unbiased one."""
    recomputed: list[NormStatistics] = []

    def change(step: LayerStep) -> Change | None:
        if step.norm is None:
            return None
        recomputed.append(NormStatistics(step.norm, step.name, correction=0))
        return recomputed[-1]

    change_in_order([model], batches, change, device=device, progress="recalibrating" if progress else "")
    for statistics in recomputed:
        statistics.correction = 1
        statistics.write()


def _recalibrate_in_one_pass(
    model: nn.Module, norms: Sequence[NormStatistics], batches: Iterable[Inputs], device: Device, progress: bool
) -> None:
    """Sum the inputs of every layer in one pass, in which all layers normalise by the batch."""
    batch_count = 0
    with _normalising_by_batch(model, norms):
        for batch in tqdm(
            shard_batches(batches), desc="recalibrating", unit="batch", disable=None if progress else True
        ):
            run_module(model, move_batch(batch, device))
            batch_count += 1
    (batch_count_everywhere,) = all_reduce_numbers([batch_count], norms[0].batch_sums[0].device)
    if not batch_count_everywhere:
        raise OptionError("there are no batches to take statistics of; is the iterator used up?")
    for norm in norms:
        norm.batch_sums = [all_reduce_sum(batch_sum) for batch_sum in norm.batch_sums]
        refuse_nan(norm.batch_sums, [norm.name])
        norm.write()


@contextmanager
def _normalising_by_batch(model: nn.Module, norms: Sequence[NormStatistics]) -> Iterator[None]:
    """Let layers normalise by their inputs, as in training, but without dropout and without waiting for processes.

    The running statistics of a BatchNorm are set to those of each batch before it is called. An InstanceNorm is put
    into training mode, with a momentum of 0 so that it keeps its statistics.
    """

    by_name = {statistics.name: statistics for statistics in norms}

    def normalise_by(name: str, x: Tensor) -> None:
        by_name[name].add_input(x)
        norm: Any = by_name[name].norm
        if not norm.training:
            x = x.detach().double().movedim(1, -1).reshape(-1, norm.num_features)
            norm.running_mean.copy_(x.mean(0))
            norm.running_var.copy_(x.var(0, correction=0))

    momenta = {s.norm: s.norm.momentum for s in norms if isinstance(s.norm, _InstanceNorm)}
    for norm in momenta:
        norm.train().momentum = 0.0
    try:
        with forward_hooks(model, by_name, before=normalise_by):
            yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


@contextmanager
def _restored_on_failure(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the statistics if anything fails."""
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise


def repair(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    device: Device = None,
    progress: bool = False,
) -> Checkpoint:
    """Give every unit of a merge the mean and standard deviation that the merged models have on average (REPAIR).

    Let μ and σ be the mean and standard deviation over the data of a unit of a linear map or convolution, in the merge
    with all earlier layers repaired. Then w ← w · σ_α / σ and b ← μ_α + (b − μ) · σ_α / σ, with σ_α = Σ αᵢ σᵢ and
    μ_α = Σ αᵢ μᵢ over the models. Without a bias, the mean of a unit becomes μ · σ_α / σ. BatchNorm statistics are
    recomputed on the data. The result has ordinary weights. Layers that are tied, or that no pass calls, stay as they
    were merged; the log names them.

    Args:
        merged: the merge, which is not modified.
        models: models that were merged, in the same coordinates (moved already).
        data: unlabelled batches that can be read again and again. Under `accelerate launch` every process takes its
            share. Positions that an `attention_mask` leaves out do not count.
        weights: α of the models; by default equal.
        device: device of the computation.
        progress: show a progress bar (on a terminal).

    Returns:
        The repaired merge, with the same keys and dtypes.

    Raises:
        OptionError: no data, or data that can be read only once; weights that are not one per model, or whose sum is
            not above 0.
        CheckpointError: a model without a known class, or NaN in the output of a layer, which the message names.

    Example: the average of two independent units with standard deviation 1 has √½, and less in every further layer.
    Scaled by √2 it is 1 again.

        >>> repaired = repair(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    rescale = partial(_Rescaling, shares=normalise_weights(weights, len(models)))
    return change_layers(merged, models, data, rescale, device=device, progress="repairing" if progress else "")


class _Rescaling(Change):
    """Rescale layers by the means and standard deviations of their outputs, in the merge and in the merged models."""

    def __init__(self, step: LayerStep, shares: Sequence[float]):
        self.layers, self.shares = step.layers, shares
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.layers[0].module.weight.device}
        shapes = [(1 + len(shares), 3, layer.groups, layer.matrix.shape[2]) for layer in self.layers]
        self.batch_sums = [torch.zeros(shape, **options) for shape in shapes]  # Σ1, Σy, Σy² of every model

    def add(self, calls: Sequence[LayerCalls], mask: Tensor | None) -> None:
        for moments, layer in zip(self.batch_sums, self.layers, strict=True):
            for i, model in enumerate(calls):
                for _, output in model[layer.name]:
                    y = layer.output_samples(output, mask).double()
                    moments[i] += torch.stack(
                        [torch.full_like(moments[i, 0], y.shape[1]), y.sum(1), y.square().sum(1)]
                    )

    def write(self) -> Sequence[str]:
        moments_by_layer = zip(self.layers, self.batch_sums, strict=True)
        called = [(layer, moments) for layer, moments in moments_by_layer if moments[:, 0].all()]
        for layer, moments in called:
            count, sum_y, sum_y2 = moments.unbind(1)
            means = sum_y / count
            deviations = (sum_y2 / count - means.square()).clamp_min(0).sqrt()
            shares = torch.tensor(self.shares, dtype=means.dtype, device=means.device)[:, None, None]
            mean, deviation = (shares * means[1:]).sum(0), (shares * deviations[1:]).sum(0)
            alive = deviations[0] > 1e-6 * means[0].abs()  # the deviation of a constant unit is rounding error
            scale = torch.where(alive, deviation / deviations[0], 1.0)
            bias = layer.bias
            shifted = None if bias is None else mean + (bias.double() - means[0]) * scale
            layer.write(layer.matrix.double() * scale[:, None], shifted)
        return [layer.name for layer, _ in called]
