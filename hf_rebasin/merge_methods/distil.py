"""Distil: go on training a merge, all of it, to say what the merged models say to unlabelled inputs.

What goes down is KL(Σ wᵢ pᵢ ‖ p): pᵢ is the softmax of what model i says, p that of the merge; see `divergence`. This
is the ensemble distillation of federated learning (FedDF, Lin et al. 2020, arXiv 2006.07242), from where aligning has
led. Minutes of gradients end lower than any fit of single layers, from a plain average, too: look at that control.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import Checkpoint
from ..computing import there
from ..divergence import Divergence
from ..errors import OptionError
from ..inputs import refuse_read_once
from ..layers import computing, keeps_statistics, shares_of, with_changes, with_values
from ..processes import averaged, endless, mean_of_all

logger = logging.getLogger(__name__)

STEPS, RATE = 300, 3e-4
CHECKED = 8  # batches on which the merge before and after is measured
ELEMENTWISE = True
DID = "distilled"
COPIES = 3  # of the merge: its gradients and their two moments


def merge(
    tensors: Sequence[Tensor], *, weights: Sequence[float] | None = None, steps: int = STEPS, rate: float = RATE
) -> Tensor:
    """The weighted average, of which training begins.

    Args:
        tensors: one per model, all of one shape.
        weights: of the models, in the average and in what is said; by default equal.
        steps: of Adam.
        rate: how far a step goes at first.

    Raises:
        OptionError: weights that are not one per model with a sum, or a number of steps or a rate that is not above 0.
    """
    _refuse(steps, rate)
    terms = [share * tensor for share, tensor in zip(shares_of(weights, len(tensors)), tensors, strict=True)]
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
    """Train a merge to say what the merged models say, by KL, without labels.

    Adam, down to 0 by a cosine, gradients cut at a norm of 1; without dropout, BatchNorm by the batch, its statistics
    afterwards those of the data. Labels in the batches are not looked at. What says no better than before what the
    models say, on the first eight batches, is not kept, and a warning tells so.

    Args:
        merged: the merge; it stays as it is.
        models: what was merged, in any coordinates.
        data: unlabelled batches that can be read again and again, as training needs them: thousands of samples rather
            than hundreds. Under `accelerate launch` every process takes its share, and a step is one batch of each.
        weights: of the models in what is said; by default equal.
        steps: of Adam.
        rate: how far a step goes at first; less for models that are wide.
        device: where it is computed.
        progress: show a progress bar (on a terminal).

    Returns:
        The distilled merge, with the keys and dtypes it had; what was tied is tied.

    Raises:
        OptionError: no data, or such as can be read once; weights that are not one per model with a sum; steps or a
            rate that are not above 0; what the models say is not finite.
        CheckpointError: no class is known that could be run.

    Example: one bias, 0 in the merge, and two models that say p = 0.2 and 0.4 of the first of two classes: the bias
    goes to where p = 0.3, which is log(0.3 / 0.7), and not to the mean of theirs.

        >>> better = distil(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    _refuse(steps, rate)
    refuse_read_once(data)
    shares = shares_of(weights, len(models))
    (module, *others), dtype = computing([merged, *models], device)
    own = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name in module.state_dict()]
    ends = [{name: other.state_dict()[name] for name in own} for other in others]
    diverging = Divergence(module, {name: name for name in own}, ends, device)
    batches = (there(batch, device, dtype) for batch in endless(data))
    checked = list(islice(batches, CHECKED))

    def apart(batch: Any) -> Tensor:
        found = diverging.of(dict([*module.named_parameters(), *module.named_buffers()]), shares, batch)
        return found.sum() / max(len(found), 1)

    def measured() -> float:
        with torch.no_grad():
            return mean_of_all(torch.stack([apart(batch) for batch in checked]).double().mean()).item()

    before = measured()
    if not math.isfinite(before):
        raise OptionError(f"what the models say to these data is not finite ({before}); look at both, and at the data")
    _descend(module, batches, apart, steps, rate, progress)
    after = measured()
    if not after < before:
        logger.warning(
            "%d steps at a rate of %g brought the merge no nearer to what the models say (%.3g before, %.3g after), "
            "so it stays as it is; take a lower rate, or more data",
            steps,
            rate,
            before,
            after,
        )
        return merged
    logger.info("what the merge says was %.3g nats from what the models say, and is %.3g now", before, after)
    distilled = with_values(merged, module)
    if not any(keeps_statistics(part) for part in module.modules()):
        return distilled
    return with_changes(distilled, (), data, lambda step: None, device=device)


finish = distil  # of the average that `merge` gives


def _descend(module: nn.Module, batches: Iterable[Any], apart: Any, steps: int, rate: float, progress: bool) -> None:
    trained = [parameter.requires_grad_() for parameter in module.parameters() if parameter.is_floating_point()]
    optimizer = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    quiet = None if progress else True
    for batch in tqdm(islice(batches, steps), "distilling", steps, unit="step", leave=False, disable=quiet):
        with torch.enable_grad():
            optimizer.zero_grad()
            apart(batch).backward()
        averaged(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def _refuse(steps: int, rate: float) -> None:
    if steps < 1:
        raise OptionError(f"steps = {steps}; give 1 or more")
    if not 0 < rate < math.inf:
        raise OptionError(f"rate = {rate}; give a number above 0, such as {RATE}")
