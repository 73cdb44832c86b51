"""Distil: train the whole merge to match the predictions of the merged models on unlabelled inputs.

The loss is KL(Σ wᵢ pᵢ ‖ p), where pᵢ is the softmax of the outputs of model i and p the merge's; see `divergence`.
This is the ensemble distillation of federated learning (FedDF, Lin et al. 2020, arXiv 2006.07242), started from
aligned models. Minutes of training reach a lower loss than any fit of single layers, also from a plain average:
compare with that control.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...checkpoints.checkpoint import Checkpoint
from ...modules.distributed import all_reduce_gradients, cycle_batches
from ...modules.divergence import comparable_outputs, divergence_per_sample
from ...modules.forward import evaluation_mode, has_no_classes, refuse_read_once, run_module
from ...modules.functional import move_batch, use_batch_statistics
from ...modules.layerwise import keeps_statistics
from ..fitting import (
    average_tensors,
    change_layers,
    finite_mean,
    load_modules,
    nonnegative_shares,
    refuse_schedule,
    refuse_submodels,
    with_module_values,
)

logger = logging.getLogger(__name__)

STEPS, RATE = 300, 3e-4
CHECK_BATCHES = 8  # batches that the merge is measured on, before and after
DIVERGENCE = "the divergence between the models"
PIECES = "elements"
VERB = ("distilling", "distilled")
EXTRA_COPIES = 3  # the gradients of the merge and their two moments


def merge(
    tensors: Sequence[Tensor], *, weights: Sequence[float] | None = None, steps: int = STEPS, rate: float = RATE
) -> Tensor:
    """Average tensors with weights; training starts from the average.

    Args:
        tensors: one tensor per model, all of one shape.
        weights: weights of the models in the average and in the mean prediction, 0 or more; by default equal.
        steps: number of steps of Adam.
        rate: learning rate at the start.

    Raises:
        OptionError: weights that are not one per model, are negative or have no positive sum; steps or a rate that
            are not above 0.
    """
    return average_tensors(tensors, _checked_shares(weights, len(tensors), steps, rate))


def distil(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    steps: int = STEPS,
    rate: float = RATE,
    device: Any = None,
    progress: bool = False,
) -> Checkpoint:
    """Train the whole merge to match the predictions of the merged models, by KL divergence, without labels.

    The optimiser is Adam with a cosine schedule down to 0 and gradients clipped to a norm of 1; dropout is off, and
    BatchNorm normalises by the batch. If training does not lower the divergence on the first eight batches, measured
    after rounding to the dtypes of the merge, the merge is returned as it was, with a warning. BatchNorm statistics
    are recomputed on the data.

    Args:
        merged: the merge, which is not modified.
        models: models that were merged; any models whose outputs have the same meaning will do.
        data: unlabelled batches that can be read again and again, thousands of samples rather than hundreds. Labels in
            them are ignored. Under `accelerate launch` every process takes its share, and a step is one batch of each.
        weights: weights of the models in the mean prediction, 0 or more; by default equal.
        steps: number of steps of Adam.
        rate: learning rate at the start; wide models need a lower one.
        device: device of the computation.
        progress: show a progress bar (on a terminal).

    Returns:
        The distilled merge, with the same keys, dtypes and ties.

    Raises:
        OptionError: no data, or data that can be read only once; weights that are not one per model, are negative or
            have no positive sum; steps or a rate that are not above 0; predictions that are not finite.
        CheckpointError: a model without a known class.

    Example: a model is one bias, 0 in the merge, and the two merged models assign the first of two classes p = 0.2 and
    0.4. The bias becomes log(0.3 / 0.7), which gives p = 0.3, and not the mean of the two biases.

        >>> better = distil(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    shares = _checked_shares(weights, len(models), steps, rate)
    refuse_read_once(data)
    refuse_submodels([*models, merged])
    (module, *teachers), dtype = load_modules([merged, *models], device)
    batches = (move_batch(batch, device, dtype) for batch in cycle_batches(data))
    check_batches, classes = list(islice(batches, CHECK_BATCHES)), not has_no_classes(module)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        targets = []
        for teacher in teachers:
            with evaluation_mode(teacher):
                targets.append(comparable_outputs(teacher, run_module(teacher, batch), batch))
        divergences = divergence_per_sample(module, targets, run_module(module, batch), shares, batch, classes)
        return divergences.sum() / max(len(divergences), 1)

    def measure(module: nn.Module) -> float:
        use_batch_statistics(module)
        with torch.no_grad():
            losses = torch.stack([loss(module, batch) for batch in check_batches])
            return finite_mean(losses, DIVERGENCE, "before and after training")

    before = measure(module)
    _train(module, batches, loss, steps, rate, progress)
    trained, after = merged, measure(module)
    if after < before:
        trained = with_module_values(merged, module)
        after = measure(trained.model(dtype).to(device).eval())  # rounded to the dtypes of the merge
    if after < before:
        logger.info("the divergence of the merge from the models went from %.3g to %.3g nats", before, after)
        merged = trained
    else:
        logger.warning(
            "%d steps at a rate of %g did not bring the predictions of the merge closer to the models' (%.3g nats "
            "before, %.3g after), so it stays as it is; if there is something to learn, try a lower rate or more data",
            steps,
            rate,
            before,
            after,
        )
    if not any(keeps_statistics(part) for part in module.modules()):
        return merged
    return change_layers(merged, (), data, lambda step: None, device=device)


finish = distil  # called on the average that `merge` returns


def _train(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    steps: int,
    rate: float,
    progress: bool,
) -> None:
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    quiet = None if progress else True
    bar = tqdm(islice(batches, steps), "distilling", steps, unit="step", leave=False, disable=quiet)
    for step, batch in enumerate(bar, start=1):
        with torch.enable_grad():
            optimizer.zero_grad()
            value = loss(module, batch)
            value.backward()
        finite_mean(value.detach(), DIVERGENCE, f"in step {step}, at a rate of {rate:g}")
        all_reduce_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _checked_shares(weights: Sequence[float] | None, count: int, steps: int, rate: float) -> list[float]:
    """Return the share of each model; OptionError if a parameter does not fit."""
    refuse_schedule(steps, rate, RATE)
    return nonnegative_shares(weights, count, "predictions are mixed")
