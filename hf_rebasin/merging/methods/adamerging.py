"""AdaMerging: task arithmetic with coefficients that make predictions sure (Yang et al. 2024, arXiv 2310.02575).

θ = b + Σ λᵢ δᵢ with the base b, the differences δᵢ of the models from it, and one coefficient λᵢ per model and tensor.
They minimise the mean entropy of the predictions, − Σ p log p, on unlabelled inputs: what is sure is taken to be
right. So only a few hundred numbers are trained. Entropy is also low if everything is of one class. Few steps from a
sensible start keep it from that, and the log warns where predictions have become much less varied.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.precision import compute_dtype
from ...errors import OptionError, listed
from ...modules.distributed import all_reduce_mean, cycle_batches
from ...modules.divergence import comparable_outputs
from ...modules.forward import has_no_classes, has_no_head, refuse_read_once, run_module
from ...modules.functional import move_batch, use_batch_statistics
from ...modules.layerwise import keeps_statistics
from ..fitting import change_layers, finite_mean, refuse_schedule, refuse_submodels, with_module_values

logger = logging.getLogger(__name__)

LAMBDA, STEPS, RATE = 0.3, 1000, 1e-3
CHECK_BATCHES = 8  # batches that the merge is measured on, before and after
SHUFFLED = 64  # batches that the next one is drawn from
LESS_VARIED = 0.5  # share of the entropy of the mean prediction that has to be left
BASE = "required"
PIECES = "elements"
KEEPS = None  # the sum of all differences is more than one of them
VERB = ("adapting coefficients", "adapted by entropy")
EXTRA_COPIES = 3  # the base; the gradients of the merge, later its sums in float64


def merge(
    tensors: Sequence[Tensor],
    *,
    lambda_: float = LAMBDA,
    steps: int = STEPS,
    rate: float = RATE,
    clamp: bool = False,
) -> Tensor:
    """Return λ Σ δᵢ, the sum of differences from the base that training starts from.

    Args:
        tensors: one difference per model, all of one shape.
        lambda_: λ, the coefficient of every difference at the start.
        steps: number of steps of Adam.
        rate: learning rate.
        clamp: keep all coefficients between 0 and 1.

    Raises:
        OptionError: steps or a rate that are not above 0, or a λ that is not finite, or not in the range of `clamp`.

    Example: differences 1 and 2 give 0.3 * (1 + 2) = 0.9.
    """
    _refuse_parameters(lambda_, steps, rate, clamp)
    return lambda_ * torch.stack(list(tensors)).sum(0)


def finish(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    base: Checkpoint,
    bases: Sequence[Checkpoint],
    lambda_: float = LAMBDA,
    steps: int = STEPS,
    rate: float = RATE,
    clamp: bool = False,
    seed: int = 0,
    device: Any = None,
    progress: bool = False,
) -> Checkpoint:
    """Train one coefficient per model and tensor to minimise the mean entropy of the predictions of the merge.

    Inputs of every task have to be in the data, best in every batch; a task that is left out is given up for the
    others. (Of `OwnBatches`, the batches of the tasks come in turns.) Batches are drawn in a random order from the
    next 64. Dropout is off, and BatchNorm normalises by the batch; its statistics are recomputed on the data. If
    training does not lower the entropy on the first eight batches that are drawn, measured after rounding to the
    dtypes of the merge, the merge is returned as it was, with a warning. Tensors that are not parameters, or that the
    base does not have, stay as they are in the merge.

    Args:
        merged: the merge that λ Σ δᵢ gives, which is not modified.
        models: models that were merged, without the base.
        data: unlabelled batches that can be read again and again. Labels in them are ignored. Under
            `accelerate launch` every process takes its share, and a step is one batch of each. Positions that an
            `attention_mask` leaves out do not count.
        base: the model that differences are added to.
        bases: for every model the one that its difference is taken from, usually `base`.
        lambda_: λ, the coefficient of every difference at the start.
        steps: number of steps of Adam.
        rate: learning rate; Adam moves a coefficient by about so much in a step.
        clamp: keep all coefficients between 0 and 1.
        seed: seed of the order of the batches.
        device: device of the computation.
        progress: show a progress bar (on a terminal).

    Returns:
        The merge, with the same keys, dtypes and ties.

    Raises:
        OptionError: no data, or data that can be read only once; steps or a rate that are not above 0, or a λ that is
            not finite, or not in the range of `clamp`; a model without classes; an entropy that is not finite.
        CheckpointError: a model without a known class.

    Example: the base gives each input a logit of 1 for its class; the first difference adds 2 to it, and the second
    adds 2 to the logit of another class. With `clamp`, coefficients (0.3, 0.3) become (1, 0).

        >>> better = merge([a, b], "adamerging", base=base, data=batches)
    """
    _refuse_parameters(lambda_, steps, rate, clamp)
    refuse_read_once(data)
    refuse_submodels([*models, base, merged])
    dtype = compute_dtype(*(model.compute_dtype for model in (merged, base, *models)))
    module = merged.model(dtype).to(device).eval()
    if has_no_classes(module):  # before a pass with labels sets `problem_type`
        raise _no_classes(module)
    sums = _load_differences(module, models, base, bases, dtype, device, lambda_)
    batches = (move_batch(batch, device, dtype) for batch in _shuffle(cycle_batches(data), seed))
    check_batches = list(islice(batches, CHECK_BATCHES))
    before = _measure(module, check_batches)
    _train(module, sums, batches, steps, rate, clamp, progress)
    trained = _round_sums(merged, sums, device)
    after = _measure(trained.model(dtype).to(device).eval(), check_batches)
    if not after.entropy < before.entropy:
        logger.warning(
            "%d steps at a rate of %g did not lower the entropy of the predictions (%.3g nats before, %.3g after), so "
            "the merge stays as it is; if there is something to learn, try a lower rate or more data",
            steps,
            rate,
            before.entropy,
            after.entropy,
        )
        trained = merged
    else:
        _log_coefficients(models, sums, before, after)
    if not any(keeps_statistics(part) for part in module.modules()):
        return trained
    return change_layers(trained, (), data, lambda step: None, device=device)


@dataclass
class DifferenceSums:
    """The tensors of a merge as sums b + Σ λᵢ δᵢ.

    Args:
        targets: `{name: parameter}` of the module of the merge.
        origins: b, by the same names.
        differences: δᵢ for every model, by the same names.
        coefficients: λ, (models, names).
    """

    targets: dict[str, Tensor]
    origins: dict[str, Tensor]
    differences: list[dict[str, Tensor]]
    coefficients: Tensor

    @torch.no_grad()
    def fill(self, targets: dict[str, Tensor]) -> None:
        """Write the sums to tensors, computed in their dtype."""
        for column, (name, target) in zip(self.coefficients.T.tolist(), targets.items(), strict=True):
            target.copy_(self.origins[name])
            for coefficient, differences in zip(column, self.differences, strict=True):
                target.add_(differences[name].to(target.dtype), alpha=coefficient)

    def gradient(self) -> Tensor:
        """Return the derivatives by the coefficients, ⟨∂ loss / ∂θ, δᵢ⟩, from the gradients of the targets."""
        rows = [
            [
                torch.zeros((), device=target.device)
                if target.grad is None
                else torch.linalg.vecdot(target.grad.flatten(), differences[name].flatten())
                for name, target in self.targets.items()
            ]
            for differences in self.differences
        ]
        return torch.stack([torch.stack(row) for row in rows]).to(self.coefficients)


@dataclass(frozen=True)
class Sureness:
    """How sure predictions are: their mean entropy, and the entropy of the mean prediction, in nats."""

    entropy: float
    of_mean: float


def _load_differences(
    module: nn.Module,
    models: Sequence[Checkpoint],
    base: Checkpoint,
    bases: Sequence[Checkpoint],
    dtype: torch.dtype,
    device: Any,
    start: float,
) -> DifferenceSums:
    targets = {name: x for name, x in module.named_parameters() if x.is_floating_point()}
    origins = _parameters_of(base, dtype, device)
    differences = []
    for model, own_base in zip(models, bases, strict=True):
        own, its_origins = _parameters_of(model, dtype, device), origins
        if own_base is not base:
            its_origins = _parameters_of(own_base, dtype, device)
        differences.append(
            {
                name: own[name] - its_origins[name]
                for name, target in targets.items()
                if all(name in x and x[name].shape == target.shape for x in (own, its_origins, origins))
            }
        )
    shared = [name for name in targets if all(name in of_model for of_model in differences)]
    if not shared:
        raise OptionError(f"{base.name} and the models share no parameters; name the model that they were tuned from")
    if len(shared) < len(targets):
        missing = [name for name in targets if name not in shared]
        logger.info("%s stay as they are in the merge, as the base or a model has no such tensor", listed(missing))
    coefficients = torch.full((len(models), len(shared)), start, dtype=torch.float64)
    return DifferenceSums({name: targets[name] for name in shared}, origins, differences, coefficients)


def _parameters_of(model: Checkpoint, dtype: torch.dtype, device: Any) -> dict[str, Tensor]:
    module = model.model(dtype).to(device)
    return {name: x.detach() for name, x in module.named_parameters(remove_duplicate=False)}


def _round_sums(merged: Checkpoint, sums: DifferenceSums, device: Any) -> Checkpoint:
    """Return the merge with the sums, computed in float64 and rounded once."""
    holder = merged.model(torch.float64).to(device)
    sums.fill({name: x for name, x in holder.named_parameters() if name in sums.targets})
    return with_module_values(merged, holder)


def _train(
    module: nn.Module,
    sums: DifferenceSums,
    batches: Iterator[Any],
    steps: int,
    rate: float,
    clamp: bool,
    progress: bool,
) -> None:
    use_batch_statistics(module)
    for target in sums.targets.values():
        target.requires_grad_()
    optimizer = torch.optim.Adam([sums.coefficients], lr=rate)
    bar = tqdm(range(1, steps + 1), VERB[0], unit="step", leave=False, disable=None if progress else True)
    for step in bar:
        sums.fill(sums.targets)
        with torch.enable_grad():
            entropy = torch.cat([_entropies(y).flatten() for y in _scores(module, next(batches))]).mean()
            entropy.backward()
        finite_mean(entropy.detach(), "the entropy of the predictions", f"in step {step}, at a rate of {rate:g}")
        sums.coefficients.grad = all_reduce_mean(sums.gradient().to(next(iter(sums.targets.values())).device)).cpu()
        optimizer.step()
        if clamp:
            sums.coefficients.clamp_(0, 1)
        module.zero_grad(set_to_none=True)


@torch.no_grad()
def _measure(module: nn.Module, batches: Sequence[Any]) -> Sureness:
    use_batch_statistics(module)
    entropies, of_mean = [], []
    for batch in batches:
        scores = _scores(module, batch)
        entropies.append(torch.cat([_entropies(y).flatten() for y in scores]).mean())
        of_mean.append(scores[0].double().softmax(-1).flatten(0, -2).mean(0))
    entropy = finite_mean(torch.stack(entropies), "the entropy of the predictions", "before and after training")
    mean = all_reduce_mean(torch.stack(of_mean).mean(0))
    return Sureness(entropy, torch.special.entr(mean).sum().item())


def _scores(module: nn.Module, batch: Any) -> list[Tensor]:
    """Return the scores of classes that a module computes, (…, classes), at positions that count."""
    outputs = run_module(module, batch)
    scores = [y for y in comparable_outputs(module, outputs, batch) if y.shape[-1] > 1]
    if not scores or has_no_head(outputs):
        raise _no_classes(module)
    return scores


def _entropies(scores: Tensor) -> Tensor:
    """Return − Σ p log p over the last axis, where p is the softmax of scores."""
    logs = scores.log_softmax(-1).clamp_min(torch.finfo(scores.dtype).min)  # a class that is ruled out has −∞
    return -(logs.exp() * logs).sum(-1)


def _no_classes(module: nn.Module) -> OptionError:
    return OptionError(
        f"adamerging minimises the entropy of predicted classes, and {type(module).__name__} does not predict "
        "classes of which one is right; take a method without entropy, such as fisher or regmean"
    )


def _shuffle(batches: Iterator[Any], seed: int) -> Iterator[Any]:
    """Yield batches in a random order, each from the next few."""
    generator = torch.Generator().manual_seed(seed)
    waiting = list(islice(batches, SHUFFLED))
    for batch in batches:
        i = int(torch.randint(len(waiting), (), generator=generator))
        yield waiting[i]
        waiting[i] = batch


def _log_coefficients(models: Sequence[Checkpoint], sums: DifferenceSums, before: Sureness, after: Sureness) -> None:
    rows = [
        (model.name, row.mean(), row.min(), row.max()) for model, row in zip(models, sums.coefficients, strict=True)
    ]
    named = ", ".join(f"{mean:.3g} ({low:.3g} to {high:.3g}) of {name}" for name, mean, low, high in rows)
    logger.info(
        "the entropy of the predictions went from %.3g to %.3g nats, with the coefficients %s",
        before.entropy,
        after.entropy,
        named,
    )
    if after.of_mean < LESS_VARIED * before.of_mean:
        logger.warning(
            "the predictions of the merge have become much less varied (the entropy of the mean prediction went from "
            "%.3g to %.3g nats), so some classes may be lost; try fewer steps, or clamp",
            before.of_mean,
            after.of_mean,
        )


def _refuse_parameters(start: float, steps: int, rate: float, clamp: bool) -> None:
    refuse_schedule(steps, rate, RATE)
    if not math.isfinite(start):
        raise OptionError(f"lambda = {start}; give a number, such as {LAMBDA}")
    if clamp and not 0 <= start <= 1:
        raise OptionError(f"lambda = {start}; with clamp, give a number from 0 to 1")
