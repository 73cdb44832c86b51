"""Distil: go on training a merge, all of it, to say what the merged models say to unlabelled inputs.

What goes down is KL(Σ wᵢ pᵢ ‖ p): pᵢ is the softmax of what model i says, p that of the merge; see `divergence`. This
is the ensemble distillation of federated learning (FedDF, Lin et al. 2020, arXiv 2006.07242), from where aligning has
led. Minutes of gradients end lower than any fit of single layers, from a plain average, too: look at that control.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...checkpoints.checkpoint import Checkpoint
from ...errors import OptionError
from ...modules.distributed import averaged, endless, mean_of_all
from ...modules.divergence import apart, numbers_in
from ...modules.forward import evaluating, no_classes, refuse_read_once, run
from ...modules.functional import by_batch_statistics, there
from ...modules.layerwise import keeps_statistics
from ..fitting import computing, shares_of, with_changes, with_values

logger = logging.getLogger(__name__)

STEPS, RATE = 300, 3e-4
CHECKED = 8  # batches on which the merge before and after is measured
ELEMENTWISE = True
WORDS = ("distilling", "distilled")
COPIES = 3  # of the merge: its gradients and their two moments


def merge(
    tensors: Sequence[Tensor], *, weights: Sequence[float] | None = None, steps: int = STEPS, rate: float = RATE
) -> Tensor:
    """The weighted average, of which training begins.

    Args:
        tensors: one per model, all of one shape.
        weights: of the models, in the average and in what is said, 0 or more; by default equal.
        steps: of Adam.
        rate: how far a step goes at first.

    Raises:
        OptionError: weights that are not one per model with a sum, or below 0; steps or a rate that are not above 0.
    """
    terms = [w * tensor for w, tensor in zip(_shares(weights, len(tensors), steps, rate), tensors, strict=True)]
    return torch.stack(terms).sum(0)


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
    """Train all of a merge to say what the merged models say, by KL, without labels.

    Adam, down to 0 by a cosine, gradients cut at a norm of 1; without dropout, BatchNorm by the batch. Where the merge
    is no nearer afterwards to what the models say, on the first eight batches and rounded to its dtypes, it stays as
    it is, and a warning tells so. BatchNorm statistics become those of the data.

    Args:
        merged: the merge; it stays as it is.
        models: what was merged: any models whose outputs mean the same.
        data: unlabelled batches that can be read again and again, as training needs them: thousands of samples rather
            than hundreds. Labels in them do not count. Under `accelerate launch` every process takes its share, and a
            step is one batch of each.
        weights: of the models in what is said, 0 or more; by default equal.
        steps: of Adam.
        rate: how far a step goes at first; less for models that are wide.
        device: where it is computed.
        progress: show a progress bar (on a terminal).

    Returns:
        The distilled merge, with the keys and dtypes it had; what was tied is tied.

    Raises:
        OptionError: no data, or such as can be read once; weights that are not one per model with a sum, or below 0;
            steps or a rate that are not above 0; what the models say is not finite.
        CheckpointError: no class is known that could be run.

    Example: one bias, 0 in the merge, and two models that say p = 0.2 and 0.4 of the first of two classes: the bias
    goes to where p = 0.3, which is log(0.3 / 0.7), and not to the mean of theirs.

        >>> better = distil(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    shares = _shares(weights, len(models), steps, rate)
    refuse_read_once(data)
    (module, *ends), dtype = computing([merged, *models], device)
    batches = (there(batch, device, dtype) for batch in endless(data))
    checked, classes = list(islice(batches, CHECKED)), not no_classes(module)

    def off(module: nn.Module, batch: Any) -> Tensor:
        said = []
        for end in ends:
            with evaluating(end):
                said.append(numbers_in(run(end, batch), batch))
        found = apart(said, run(module, batch), shares, batch, classes)
        return found.sum() / max(len(found), 1)

    def measured(module: nn.Module) -> float:
        by_batch_statistics(module)
        with torch.no_grad():
            return _mean(torch.stack([off(module, batch) for batch in checked]), "before and after training")

    before = measured(module)
    _descend(module, batches, off, steps, rate, progress)
    trained, after = merged, measured(module)
    if after < before:
        trained = with_values(merged, module)
        after = measured(trained.model(dtype).to(device).eval())  # rounded to the dtypes of the merge
    if after < before:
        logger.info("what the merge says was %.3g nats from what the models say, and is %.3g now", before, after)
        merged = trained
    else:
        logger.warning(
            "%d steps at a rate of %g brought the merge no nearer to what the models say (%.3g before, %.3g after), "
            "so it stays as it is; if there is something to learn, take a lower rate, or more data",
            steps,
            rate,
            before,
            after,
        )
    if not any(keeps_statistics(part) for part in module.modules()):
        return merged
    return with_changes(merged, (), data, lambda step: None, device=device)


finish = distil  # of the average that `merge` gives


def _descend(
    module: nn.Module,
    batches: Iterable[Any],
    off: Callable[[nn.Module, Any], Tensor],
    steps: int,
    rate: float,
    progress: bool,
) -> None:
    trained = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    quiet = None if progress else True
    bar = tqdm(islice(batches, steps), "distilling", steps, unit="step", leave=False, disable=quiet)
    for step, batch in enumerate(bar, start=1):
        with torch.enable_grad():
            optimizer.zero_grad()
            value = off(module, batch)
            value.backward()
        _mean(value.detach(), f"in step {step}, at a rate of {rate:g}")
        averaged(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def _mean(values: Tensor, when: str) -> float:
    """Over all processes; OptionError unless it is finite."""
    mean = mean_of_all(values.double().mean()).item()
    if not math.isfinite(mean):
        raise OptionError(
            f"what the models say to these data is not finite ({mean} {when}); look at the models and at the data, or "
            "take a lower rate, if that comes of training"
        )
    return mean


def _shares(weights: Sequence[float] | None, count: int, steps: int, rate: float) -> list[float]:
    """Of each model; OptionError where a knob does not fit."""
    if steps < 1:
        raise OptionError(f"steps = {steps}; give 1 or more")
    if not 0 < rate < math.inf:
        raise OptionError(f"rate = {rate}; give a number above 0, such as {RATE}")
    shares = shares_of(weights, count)
    if min(shares) < 0:
        raise OptionError(f"weights = {weights}; what is said is a mixture, so give weights of 0 or more")
    return shares
