"""Statistics of a merged model: an average of two models has none of its own.

BatchNorm statistics are recomputed from data. REPAIR goes further: an average of two units varies less than either, so
every unit is given back the mean and the deviation that the merged models have on average (Jordan et al. 2022, arXiv
2211.08403), in the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from tqdm import tqdm

from ..checkpoints.checkpoint import Checkpoint
from ..errors import OptionError
from ..modules.distributed import numbers_of_all, shared_out, sum_of_all
from ..modules.forward import Inputs, evaluating, run
from ..modules.functional import Device, there
from ..modules.hooks import Calls
from ..modules.layerwise import Change, NormStatistics, Step, change_in_order, keeps_statistics, refuse_nan
from .fitting import shares_of, with_changes


def recalibrate(
    model: nn.Module, batches: Iterable[Inputs], *, exact: bool = False, device: Device = None, progress: bool = False
) -> int:
    """Recompute running mean and variance of every BatchNorm layer, in place, from all samples of all batches.

    In one pass each layer reads what batches look like that are normalised by their own statistics, as in training; so
    batches should not be small. `exact` makes one pass for every layer, after those of the layers before it: the
    statistics are then those of one big batch in training mode, however it was cut. An InstanceNorm that keeps
    statistics gets the mean of those of all instances. Momentum and `num_batches_tracked`, which belong to training,
    stay as they are, and so do layers that no pass calls.

    Args:
        model: any module; its mode is restored.
        batches: inputs of its forward pass: tensors, positional arguments, or mappings of keyword arguments; with
            `exact` they are read again and again. Under `accelerate launch` every process takes its share.
        exact: one pass per layer.
        device: where batches are brought, and where the model is; by default nothing is moved.
        progress: show a progress bar (on a terminal).

    Returns:
        The number of layers that keep statistics; with none, no batch is read.

    Raises:
        OptionError: there are such layers and no batches; with `exact`, batches that can be read once.
        CheckpointError: NaN or Inf in what a layer reads; names it. Whatever fails, the statistics stay as they were.

    Example: of two batches, one of zeros and one of tens, the mean is 5 and not what the last one leaves.

        >>> norm = torch.nn.BatchNorm1d(1).eval()
        >>> recalibrate(norm, [torch.zeros(4, 1), torch.full((4, 1), 10.0)])
        1
        >>> norm.running_mean
        tensor([5.])
    """
    norms = {name: part for name, part in model.named_modules() if keeps_statistics(part)}
    if not norms:
        return 0
    with evaluating(model), _unless_it_fails(norms.values()):
        if exact:
            _in_order(model, batches, device, progress)
        else:
            _in_one_pass(
                model, [NormStatistics(norm, name) for name, norm in norms.items()], batches, device, progress
            )
    return len(norms)


def has_statistics(checkpoint: Checkpoint) -> bool:
    """Whether a model has running statistics, by its keys."""
    return any(key.endswith("running_mean") for key in checkpoint.parts)


def _in_order(model: nn.Module, batches: Iterable[Inputs], device: Device, progress: bool) -> None:
    """Layers after a norm read what it gives in training on all samples; its variance is unbiased only then."""
    made: list[NormStatistics] = []

    def change(step: Step) -> Change | None:
        if step.norm is None:
            return None
        made.append(NormStatistics(step.norm, step.name, correction=0))
        return made[-1]

    change_in_order([model], batches, change, device=device, progress="recalibrating" if progress else "")
    for one in made:
        one.correction = 1
        one.write()


def _in_one_pass(
    model: nn.Module, found: Sequence[NormStatistics], batches: Iterable[Inputs], device: Device, progress: bool
) -> None:
    """Every layer normalises by the batch, and what it reads is added up."""
    came = 0
    with _by_the_batch(found):
        for batch in tqdm(shared_out(batches), desc="recalibrating", unit="batch", disable=None if progress else True):
            run(model, there(batch, device))
            came += 1
    (total,) = numbers_of_all([came], found[0].sums[0].device)
    if not total:
        raise OptionError("no batch came, so there is nothing to take statistics of; is the iterator used up?")
    for one in found:
        one.sums = [sum_of_all(total) for total in one.sums]
        refuse_nan(one.sums, [one.name])
        one.write()


@contextmanager
def _by_the_batch(found: Sequence[NormStatistics]) -> Iterator[None]:
    """Layers normalise by what they read, as in training; only that dropout is off and no process waits for another.

    A BatchNorm finds the statistics of the batch where it looks for its own. An InstanceNorm is in training mode, with
    a momentum of 0 so that it keeps what it has.
    """

    def hook(one: NormStatistics) -> Any:
        def called(norm: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            read = inputs[0] if inputs else next(iter(named.values()))
            one.see(read)
            if not norm.training:
                x = read.detach().double().movedim(1, -1).reshape(-1, norm.num_features)
                norm.running_mean.copy_(x.mean(0))
                norm.running_var.copy_(x.var(0, correction=0))

        return called

    handles = [one.norm.register_forward_pre_hook(hook(one), with_kwargs=True) for one in found]
    momenta = {one.norm: one.norm.momentum for one in found if isinstance(one.norm, _InstanceNorm)}
    for norm in momenta:
        norm.train().momentum = 0.0
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum


@contextmanager
def _unless_it_fails(norms: Iterable[nn.Module]) -> Iterator[None]:
    """If something fails the statistics are restored."""
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    except BaseException:
        for buffer, kept in before:
            buffer.copy_(kept)
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
    """Give every unit of a merge the mean and the deviation that the merged models have on average (REPAIR).

    For a unit of a linear map or a convolution with mean μ and deviation σ over the data, in the merge with all layers
    before it repaired: w ← w · σ_α / σ and b ← μ_α + (b − μ) · σ_α / σ, with σ_α = Σ αᵢ σᵢ and μ_α = Σ αᵢ μᵢ over the
    models. A layer without a bias keeps its mean times σ_α / σ. BatchNorm statistics are those of the data. What comes
    out are ordinary weights. What is tied or called in no pass stays as it is merged; the log says which.

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
        OptionError: no data, or such as can be read once; weights that are not one per model with a sum.
        CheckpointError: no class is known that could be run, or NaN in what a layer gives; names it.

    Example: two units with deviation 1 that know nothing of each other have an average with deviation √½, and so on
    from layer to layer. Times √2 it is 1 again.

        >>> repaired = repair(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    rescale = partial(_Rescaling, shares=shares_of(weights, len(models)))
    return with_changes(merged, models, data, rescale, device=device, progress="repairing" if progress else "")


class _Rescaling(Change):
    """Means and deviations of what the layers of a step give, in the merge and in what was merged; a `Change`."""

    def __init__(self, step: Step, shares: Sequence[float]):
        self.layers, self.shares = step.layers, shares
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self.layers[0].module.weight.device}
        shapes = [(1 + len(shares), 3, layer.groups, layer.matrix.shape[2]) for layer in self.layers]
        self.sums = [torch.zeros(shape, **kind) for shape in shapes]  # of every model Σ1, Σy, Σy²

    def add(self, calls: Sequence[Calls], mask: Tensor | None) -> None:
        for total, layer in zip(self.sums, self.layers, strict=True):
            for i, model in enumerate(calls):
                for _, said in model[layer.name]:
                    y = layer.answers(said, mask).double()
                    total[i] += torch.stack([torch.full_like(total[i, 0], y.shape[1]), y.sum(1), y.square().sum(1)])

    def write(self) -> Sequence[str]:
        heard = [(layer, total) for layer, total in zip(self.layers, self.sums, strict=True) if total[:, 0].all()]
        for layer, total in heard:
            count, sums, squares = total.unbind(1)
            means = sums / count
            deviations = (squares / count - means.square()).clamp_min(0).sqrt()
            shares = torch.tensor(self.shares, dtype=means.dtype, device=means.device)[:, None, None]
            mean, deviation = (shares * means[1:]).sum(0), (shares * deviations[1:]).sum(0)
            alive = deviations[0] > 1e-6 * means[0].abs()  # what never changes has no deviation to be scaled
            scale = torch.where(alive, deviation / deviations[0], 1.0)
            bias = layer.bias
            moved = None if bias is None else mean + (bias.double() - means[0]) * scale
            layer.write(layer.matrix.double() * scale[:, None], moved)
        return [layer.name for layer, _ in heard]
