"""Loss and metrics of models on data, averaged over samples rather than over batches."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import OptionError, nearest
from ..modules.distributed import all_reduce_numbers, shard_batches
from ..modules.forward import (
    class_axis,
    evaluation_mode,
    labels_of,
    logits_from_outputs,
    loss_from_outputs,
    output_tensors,
    run_module,
)
from ..modules.functional import move_batch

IGNORED_LABEL = -100  # label of positions that do not count
BUILT_IN_METRICS = ("accuracy", "perplexity")
LANGUAGE_MODEL = re.compile(r"ForCausalLM|ForMaskedLM|LMHead|ForConditionalGeneration")

# (module, batch) → the mean over the batch, (sum, count), or a tensor with a number for every sample.
BatchScore: TypeAlias = "Callable[[nn.Module, Any], float | Tensor | tuple[float | Tensor, float | Tensor]]"
Metrics: TypeAlias = "Sequence[str] | Mapping[str, str | BatchScore]"


@dataclass(frozen=True)
class Measured:
    """Loss and metrics of a model on some data.

    Args:
        loss: mean loss over all labels that count.
        metrics: `{name: mean}`.
        samples: number of labels that count: samples, or tokens.
    """

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    metrics: Metrics | None = None,
    loss: BatchScore | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Measured:
    """Compute the mean loss and metrics of a model, in evaluation mode and without gradients.

    Means are taken over samples, or over tokens if these have labels: batch size and padding make no difference.
    Labels of -100 do not count; nor does the first label of a sequence, if the model's loss compares every token with
    the next label. For accuracy, the classes of a plain module's logits may be last, or second as
    `torch.nn.CrossEntropyLoss` reads them: the shape of the labels tells; where both fit, an attribute `class_axis` of
    the module says which.

    Args:
        model: any module; its training modes are restored, and nothing else of it changes.
        data: batches: mappings of keyword arguments with `labels` among them, or anything that `loss` takes. Under
            `accelerate launch` every process takes its share; pass the plain loader, because one that accelerate has
            prepared repeats samples until all processes have equally many.
        metrics: names, or `{name: metric}`: "accuracy", "perplexity" (exp of the mean loss), or a callable of
            (module, batch) that returns the mean over the batch, (sum, count), or a tensor with a number for every
            sample. By default, and without `loss`: the accuracy if there are logits and integer labels, and the
            perplexity of language models.
        loss: callable that returns the loss in one of the same three forms; by default the model's own loss.
        device: device that batches are moved to; by default the model's, unless that is the CPU.
        progress: show a progress bar (on a terminal).

    Returns:
        A `Measured`: `.loss`, `.metrics`, `.samples`.

    Raises:
        OptionError: no batch, no label that counts, batches for which the model returns no loss, or an unknown metric.

    Example:
        >>> measured = evaluate(model, loader)
        >>> measured.loss, measured.metrics["accuracy"], measured.samples
        >>> evaluate(model, pairs, loss=lambda module, pair: cross_entropy(module(pair[0]), pair[1]))
    """
    running_means = _RunningMeans(model, loss, _requested_metrics(metrics))
    home = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    target = torch.device(device) if device is not None else home
    with evaluation_mode(model):
        for batch in tqdm(shard_batches(data), desc="evaluating", unit="batch", disable=None if progress else True):
            running_means.add(move_batch(batch, target if device is not None or target.type != "cpu" else None))
    return running_means.reduce(target, default_metrics=metrics is None and loss is None)


def _requested_metrics(metrics: Metrics | None) -> dict[str, str | BatchScore]:
    """The metrics by name: each a built-in metric or a callable."""
    requested: dict[str, str | BatchScore] = {}
    requested |= metrics if isinstance(metrics, Mapping) else {name: name for name in metrics or ()}
    for name, metric in requested.items():
        if name == "loss":
            raise OptionError("a metric cannot be called 'loss'; the loss is measured anyway, or computed by loss=")
        if not callable(metric) and metric not in BUILT_IN_METRICS:
            hint = nearest(str(metric), BUILT_IN_METRICS)
            raise OptionError(f"no metric {metric!r}{hint}; or give a callable of (module, batch)")
    return requested


class _RunningMeans:
    """Means of the loss and the metrics: sums and counts over the batches of this process, reduced over all."""

    def __init__(self, module: nn.Module, loss: BatchScore | None, requested: Mapping[str, str | BatchScore]):
        self.module, self.loss, self.requested = module, loss, requested
        self.runs_model = loss is None or "accuracy" in requested.values()
        # The same entries in every process, even in one that gets no batch: batches, then a sum and a count each.
        self.batches = 0
        self.sums_and_counts = {name: [0.0, 0.0] for name in ("its loss", "its accuracy", *requested)}
        self.next_token: bool | None = None  # unknown until a batch has shown it

    def add(self, batch: Any) -> None:
        """Add a batch to the sums."""
        self.batches += 1
        if self.runs_model:
            self._add_outputs(batch)
        if self.loss is not None:
            self._add("its loss", *_sum_and_count(self.loss, self.module, batch))
        for name, metric in self.requested.items():
            if callable(metric):
                self._add(name, *_sum_and_count(metric, self.module, batch))

    def _add_outputs(self, batch: Any) -> None:
        """Run the model on a batch, and add its loss and the number of labels it gets right."""
        labels = labels_of(batch)
        if labels is None and self.loss is not None:
            return
        outputs = run_module(self.module, batch)
        value = loss_from_outputs(self.module, outputs, batch) if self.loss is None else None
        logits = logits_from_outputs(outputs, batch)
        if labels is None or labels.is_floating_point():
            if value is not None:
                self._add_mean(value, _count_samples(batch) if labels is None else len(labels))
            return
        if isinstance(logits, Tensor) and logits.dim() == labels.dim() + 1:
            logits = logits.movedim(class_axis(self.module, logits, labels), -1)
        fit = isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape and logits.shape[-1] > 1
        if fit and self._skips_first_label(batch, labels, cast(Tensor, logits)):
            logits, labels = cast(Tensor, logits)[:, :-1], labels[:, 1:]
        counted = labels != _ignored_label(self.module)
        if value is not None:
            self._add_mean(value, int(counted.sum()))
        if fit:
            right = cast(Tensor, logits).argmax(-1).to(labels.device) == labels
            self._add("its accuracy", int((right & counted).sum()), int(counted.sum()))

    def _skips_first_label(self, batch: Mapping[str, Any], labels: Tensor, logits: Tensor) -> bool:
        """Whether the loss compares every token with the next label, as in causal language models.

        Neither shapes nor class names tell: the loss of BartForCausalLM, for one, does not. So the model's loss is
        computed on a batch where only the first labels count, each of them the least likely one: if the loss skips
        them, it is the mean of nothing.
        """
        if self.next_token is None and labels.dim() == 2:
            only_first = torch.full_like(labels, IGNORED_LABEL)
            only_first[:, 0] = logits[:, 0].argmin(-1)
            batch = {**batch, "labels": only_first}
            value = loss_from_outputs(self.module, run_module(self.module, batch), batch)
            self.next_token = bool((value.isnan() | (value == 0)).all())
        return bool(self.next_token)

    def _add_mean(self, loss: Tensor, count: int) -> None:
        if loss.dim():
            raise OptionError(
                f"{type(self.module).__name__} returned a loss of shape {tuple(loss.shape)}; it has to be one number"
            )
        self._add("its loss", loss.item() * count if count else 0.0, count)  # the mean of no labels is NaN

    def _add(self, name: str, value: float, count: float) -> None:
        self.sums_and_counts[name][0] += value
        self.sums_and_counts[name][1] += count

    def reduce(self, device: torch.device, *, default_metrics: bool) -> Measured:
        """Compute the means over all processes; `default_metrics` adds the metrics that fit the model."""
        numbers = [number for pair in self.sums_and_counts.values() for number in pair]
        batches, next_token, *numbers = all_reduce_numbers(
            [self.batches, float(self.next_token or 0), *numbers], device
        )
        means = {
            name: (value / count if count else None)
            for name, value, count in zip(self.sums_and_counts, numbers[::2], numbers[1::2], strict=True)
        }
        if not batches:
            raise OptionError("no batch came, so there is nothing to measure; is the iterator used up?")
        loss = means["its loss"]
        if loss is None:
            raise OptionError(
                f"none of the labels in {int(batches)} batches counts; all of them are {_ignored_label(self.module)}"
            )
        requested = dict(self.requested)
        if default_metrics:
            requested |= {"accuracy": "accuracy"} if means["its accuracy"] is not None else {}
            if next_token or LANGUAGE_MODEL.search(type(self.module).__name__):
                requested["perplexity"] = "perplexity"
        metrics = {name: _metric_value(name, metric, loss, means) for name, metric in requested.items()}
        return Measured(loss, metrics, round(numbers[1]))


def _metric_value(name: str, metric: str | BatchScore, loss: float, means: Mapping[str, float | None]) -> float:
    if metric == "perplexity":
        return math.exp(loss) if not loss > 700 else math.inf
    mean = means["its accuracy" if metric == "accuracy" else name]
    if mean is None:
        why = "the model returns no logits that match integer labels" if metric == "accuracy" else "it counted nothing"
        raise OptionError(f"metric {name!r}: {why} in any batch")
    return mean


def _sum_and_count(score: BatchScore, module: nn.Module, batch: Any) -> tuple[float, float]:
    """The sum and the count of a score over a batch, whichever of the three forms the callable returns."""
    value = score(module, batch)
    if isinstance(value, tuple):
        total, count = (float(part) for part in value)
    elif isinstance(value, Tensor) and value.dim():
        total, count = value.detach().cpu().double().sum().item(), value.numel()
    else:
        count = _count_samples(batch)
        total = float(value) * count
    return (total, count) if count else (0.0, 0)


def _count_samples(batch: Any) -> int:
    """The number of samples in a batch: the length of its first tensor."""
    first = next((tensor for tensor in output_tensors(batch) if tensor.dim()), None)
    if first is None:
        raise OptionError(f"a batch is a {type(batch).__name__} without a tensor, so its samples cannot be counted")
    return len(first)


def _ignored_label(module: nn.Module) -> int:
    """The label that does not count; segmentation models have their own."""
    if not type(module).__name__.endswith("ForSemanticSegmentation"):
        return IGNORED_LABEL
    return getattr(getattr(module, "config", None), "semantic_loss_ignore_index", IGNORED_LABEL)
