"""Measuring models: their loss and metrics on data, over samples and not over batches."""

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
from ..modules.distributed import numbers_of_all, shared_out
from ..modules.forward import evaluating, logits_in, loss_in, outputs_in, run
from ..modules.functional import there

IGNORED = -100  # a label that does not count
OWN = ("accuracy", "perplexity")
LANGUAGE_MODEL = re.compile(r"ForCausalLM|ForMaskedLM|LMHead|ForConditionalGeneration")

# (module, batch) → its mean over the batch, (sum, count), or a tensor with a number for every sample.
Score: TypeAlias = "Callable[[nn.Module, Any], float | Tensor | tuple[float | Tensor, float | Tensor]]"
Metrics: TypeAlias = "Sequence[str] | Mapping[str, str | Score]"


@dataclass(frozen=True)
class Measured:
    """What a model is worth on some data.

    Args:
        loss: the mean over all labels that count.
        metrics: `{name: mean}`.
        samples: how many labels that were: samples, or tokens.
    """

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    metrics: Metrics | None = None,
    loss: Score | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Measured:
    """The mean loss and metrics of a model, in evaluation mode and without gradients.

    Means are over samples, or over tokens where these have labels: how the data are cut into batches and how much of
    them is padding makes no difference. Labels of -100 do not count, and of a model whose loss compares every token
    with the next label, the first label of a sequence does not.

    Args:
        model: any module; its modes are restored, and nothing else of it changes.
        data: batches: mappings of keyword arguments with `labels` among them, or anything that `loss` takes. Under
            `accelerate launch` every process takes its share; give the loader as it is, as one that accelerate has
            prepared repeats samples until all processes have as many.
        metrics: names, or `{name: what}`: "accuracy", "perplexity" (exp of the mean loss), or a callable of
            (module, batch) that gives the mean over the batch, (sum, count), or a tensor with a number for every
            sample. By default, and without `loss`, the accuracy where there are logits and whole labels, and the
            perplexity of language models.
        loss: gives the loss in one of the same three ways; by default what the model says it is.
        device: where batches are brought; by default to the model, if that is not on the CPU.
        progress: show a progress bar (on a terminal).

    Raises:
        OptionError: no batch, no label that counts, batches for which the model gives no loss, an unknown metric.

    Example:
        >>> measured = evaluate(model, loader)
        >>> measured.loss, measured.metrics["accuracy"], measured.samples
        >>> evaluate(model, pairs, loss=lambda module, pair: cross_entropy(module(pair[0]), pair[1]))
    """
    totals = _Totals(model, loss, _asked(metrics))
    home = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    where = torch.device(device) if device is not None else home
    with evaluating(model):
        for batch in tqdm(shared_out(data), desc="evaluating", unit="batch", disable=None if progress else True):
            totals.add(there(batch, where if device is not None or where.type != "cpu" else None))
    return totals.measured(where, all_that_fit=metrics is None and loss is None)


def _asked(metrics: Metrics | None) -> dict[str, str | Score]:
    """`{name: one of ours, or a callable}`."""
    asked: dict[str, str | Score] = {}
    asked |= metrics if isinstance(metrics, Mapping) else {name: name for name in metrics or ()}
    for name, what in asked.items():
        if name == "loss":
            raise OptionError("a metric cannot be called 'loss'; the loss is there anyway, or given by loss=")
        if not callable(what) and what not in OWN:
            raise OptionError(f"no metric {what!r}{nearest(str(what), OWN)}; or give a callable of (module, batch)")
    return asked


class _Totals:
    """Sums and counts over the batches of this process, and what comes of them over all."""

    def __init__(self, module: nn.Module, loss: Score | None, asked: Mapping[str, str | Score]):
        self.module, self.loss, self.asked = module, loss, asked
        self.looks = loss is None or "accuracy" in asked.values()
        # The same places in every process, also in one that gets no batch: batches, then a sum and a count each.
        self.batches = 0
        self.sums = {name: [0.0, 0.0] for name in ("its loss", "its accuracy", *asked)}
        self.next_token: bool | None = None  # not known before a batch has told

    def add(self, batch: Any) -> None:
        self.batches += 1
        if self.looks:
            self._look(batch)
        if self.loss is not None:
            self._add("its loss", *_sum_and_count(self.loss, self.module, batch))
        for name, what in self.asked.items():
            if callable(what):
                self._add(name, *_sum_and_count(what, self.module, batch))

    def _look(self, batch: Any) -> None:
        """What the model itself says of a batch: its loss, and which labels it gets right."""
        labels = _labels_of(batch)
        if labels is None and self.loss is not None:
            return
        said = run(self.module, batch)
        value, logits = loss_in(self.module, said, batch) if self.loss is None else None, logits_in(said, batch)
        if labels is None or labels.is_floating_point():
            if value is not None:
                self._add_mean(value, _samples_of(batch) if labels is None else len(labels))
            return
        fit = isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape and logits.shape[-1] > 1
        if fit and self._leaves_out_first(batch, labels, cast(Tensor, logits)):
            logits, labels = cast(Tensor, logits)[:, :-1], labels[:, 1:]
        counted = labels != _ignored(self.module)
        if value is not None:
            self._add_mean(value, int(counted.sum()))
        if fit:
            right = cast(Tensor, logits).argmax(-1).to(labels.device) == labels
            self._add("its accuracy", int((right & counted).sum()), int(counted.sum()))

    def _leaves_out_first(self, batch: Mapping[str, Any], labels: Tensor, logits: Tensor) -> bool:
        """Whether the loss compares every token with the next label, as that of causal language models does.

        Neither shapes nor names tell: BartForCausalLM does not, for one. So the model is asked for its loss where only
        the first labels count, and these are what it finds least likely: if they are left out, that is a mean of
        nothing.
        """
        if self.next_token is None and labels.dim() == 2:
            only = torch.full_like(labels, IGNORED)
            only[:, 0] = logits[:, 0].argmin(-1)
            batch = {**batch, "labels": only}
            value = loss_in(self.module, run(self.module, batch), batch)
            self.next_token = bool((value.isnan() | (value == 0)).all())
        return bool(self.next_token)

    def _add_mean(self, loss: Tensor, count: int) -> None:
        if loss.dim():
            raise OptionError(
                f"{type(self.module).__name__} gave a loss of shape {tuple(loss.shape)}; it has to be one number"
            )
        self._add("its loss", loss.item() * count if count else 0.0, count)  # the mean of no labels is NaN

    def _add(self, name: str, value: float, count: float) -> None:
        self.sums[name][0] += value
        self.sums[name][1] += count

    def measured(self, device: torch.device, *, all_that_fit: bool) -> Measured:
        """Over all processes."""
        plain = [number for pair in self.sums.values() for number in pair]
        batches, next_token, *plain = numbers_of_all([self.batches, float(self.next_token or 0), *plain], device)
        means = {name: (s / n if n else None) for name, s, n in zip(self.sums, plain[::2], plain[1::2], strict=True)}
        if not batches:
            raise OptionError("no batch came, so there is nothing to measure; is the iterator used up?")
        loss = means["its loss"]
        if loss is None:
            raise OptionError(
                f"none of the labels in {int(batches)} batches counts; all of them are {_ignored(self.module)}"
            )
        asked = dict(self.asked)
        if all_that_fit:
            asked |= {"accuracy": "accuracy"} if means["its accuracy"] is not None else {}
            if next_token or LANGUAGE_MODEL.search(type(self.module).__name__):
                asked["perplexity"] = "perplexity"
        found = {name: _metric(name, what, loss, means) for name, what in asked.items()}
        return Measured(loss, found, round(plain[1]))


def _metric(name: str, what: str | Score, loss: float, means: Mapping[str, float | None]) -> float:
    if what == "perplexity":
        return math.exp(loss) if not loss > 700 else math.inf
    mean = means["its accuracy" if what == "accuracy" else name]
    if mean is None:
        why = "gives no logits that go with whole-number labels" if what == "accuracy" else "counted nothing"
        raise OptionError(f"metric {name!r}: {'the model' if what == 'accuracy' else 'it'} {why} in any batch")
    return mean


def _sum_and_count(score: Score, module: nn.Module, batch: Any) -> tuple[float, float]:
    """Of whichever of the three kinds a callable gives."""
    value = score(module, batch)
    if isinstance(value, tuple):
        total, count = (float(one) for one in value)
    elif isinstance(value, Tensor) and value.dim():
        total, count = value.detach().cpu().double().sum().item(), value.numel()
    else:
        count = _samples_of(batch)
        total = float(value) * count
    return (total, count) if count else (0.0, 0)


def _samples_of(batch: Any) -> int:
    """The length of its first tensor."""
    first = next((tensor for tensor in outputs_in(batch) if tensor.dim()), None)
    if first is None:
        raise OptionError(f"a batch is a {type(batch).__name__} without a tensor, so its samples cannot be counted")
    return len(first)


def _labels_of(batch: Any) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels if isinstance(labels, Tensor) and labels.dim() else None


def _ignored(module: nn.Module) -> int:
    """Segmentation has a label of its own for what does not count."""
    segments = type(module).__name__.endswith("ForSemanticSegmentation")
    return getattr(getattr(module, "config", None), "semantic_loss_ignore_index", IGNORED) if segments else IGNORED
