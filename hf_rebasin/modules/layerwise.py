"""Change the layers of a module one after the other, in the order of its forward pass, by sums over batches.

The change of a layer depends on its inputs, and so on all layers before it. So there is one pass over the data
for every step in that order, and each pass ends where its step is reached.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from tqdm import tqdm

from ..checkpoints.precision import all_finite
from ..errors import CheckpointError, OptionError, listed
from .distributed import all_reduce_numbers, all_reduce_sum, broadcast_object
from .forward import class_axis, has_no_classes, labels_of, logits_from_outputs, refuse_read_once, run_module
from .functional import move_batch
from .hooks import LayerCalls, RecordedCalls, forward_hooks
from .linear_maps import Affine, is_affine, is_matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerStep:
    """Layers that read the same input, and so are changed together; or one BatchNorm."""

    layers: tuple[Affine, ...] = ()
    norm: _NormBase | None = None
    name: str = ""
    calls: int = 1  # after so many, no layer of the step is called again
    gives_logits: bool = False  # its one layer computes the model's logits, which softmax turns into probabilities
    pending: frozenset[str] = frozenset()  # names of the layers of this step and of all later ones

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers) or (self.name,)


class Change(Protocol):
    """A change of the layers of one step, computed from sums over all batches."""

    batch_sums: list[Tensor]  # what `add` accumulates, on one process; `write` reads it after the all-reduce

    def add(self, calls: Sequence[LayerCalls], mask: Tensor | None) -> None:
        """Add one batch: inputs and outputs of the layers of the step, in every model."""

    def write(self) -> Sequence[str]:
        """Change the layers of the first model, and return their names; `batch_sums` are over all processes by now."""

    def follow_up(self) -> Change | None:
        """Return the next change of the same step, which gets a pass of its own; None if there is none."""
        return None


@torch.no_grad()
def change_in_order(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    change: Callable[[LayerStep], Change | None],
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    progress: str = "",
    own: bool = False,
) -> list[str]:
    """Change the layers of the first model one after the other; the other models are only recorded.

    Args:
        models: models of one architecture, in evaluation mode, on the device.
        batches: inputs of their forward pass, which can be read again and again; each process takes its share.
        change: returns what to do at a step; None leaves its layers as they are.
        device: device that batches are moved to.
        dtype: dtype that their floating-point tensors are cast to; by default they keep their own.
        progress: label of the progress bar; the bar is not shown without one.
        own: whether models after the first read their own batches only, if batches are `OwnBatches`.

    Returns:
        The names of the layers that were changed.

    Raises:
        OptionError: no batches, or batches that can be read only once.
        CheckpointError: NaN or Inf in the inputs or outputs of a layer, which the message names.
    """
    refuse_read_once(batches)
    changed: list[str] = []
    steps: list[LayerStep] = []
    plan = _plan_steps(models[0], batches, lambda batch: move_batch(batch, device, dtype))
    for step in tqdm(plan, desc=progress, unit="layer", leave=False, disable=None if progress else True):
        current = change(step)  # not before its turn: the sums of all layers together are larger than the models
        if current is not None:
            steps.append(step)
        recorded = RecordedCalls(
            models=models,
            layers=step.names,
            calls=step.calls,
            batches=batches,
            device=device,
            dtype=dtype,
            cached=step.gives_logits,
            own=own,
        )
        while current is not None:
            for calls, mask in recorded:
                current.add(calls, mask)
            current.batch_sums = [all_reduce_sum(batch_sum) for batch_sum in current.batch_sums]
            refuse_nan(current.batch_sums, step.names)
            changed += current.write()
            current = current.follow_up()
    if any(step.layers for step in steps):
        _log_unplanned_maps(models[0], plan)
    if unchanged := [name for step in steps for name in step.names if name not in changed]:
        logger.info("%s read nothing, or not the same in all models, so they stay as they are", listed(unchanged))
    return changed


def _log_unplanned_maps(module: nn.Module, plan: Sequence[LayerStep]) -> None:
    maps = [name for name, part in module.named_modules() if is_affine(part)]
    planned = {name for step in plan for name in step.names}
    if unplanned := [name for name in maps if name not in planned]:
        why = "as their weights are tied or computed, or no pass calls them"
        logger.info("%d of %d linear maps stay as they are, %s: %s", len(unplanned), len(maps), why, listed(unplanned))


def refuse_nan(batch_sums: Iterable[Tensor], layers: Sequence[str]) -> None:
    """Raise CheckpointError unless the sums over inputs and outputs of layers are all finite."""
    if not all(all_finite(batch_sum) for batch_sum in batch_sums):
        named = listed(layer or "the module" for layer in layers)
        raise CheckpointError(
            f"{named}: on these data NaN or Inf occurs in inputs or outputs, in the merge or in a model that was "
            "merged; check the data, and whether each model computes on them by itself"
        )


def _plan_steps(module: nn.Module, batches: Iterable[Any], move: Callable[[Any], Any]) -> list[LayerStep]:
    """Find the steps, the same ones in every process, as sums are reduced over processes step by step."""
    first = next(iter(batches), None)
    device = next((parameter.device for parameter in module.parameters()), None)
    with_batches, processes = all_reduce_numbers([first is not None, 1.0], device)
    if with_batches < processes:
        raise OptionError(
            "the data yielded no batch"
            if not with_batches
            else f"the data yielded a batch in {with_batches:.0f} of {processes:.0f} processes; each needs one"
        )
    steps = find_steps(module, move(first))
    plan = broadcast_object([(step.names, step.norm is not None, step.calls, step.gives_logits) for step in steps])
    made = [_make_step(module, *entry) for entry in plan]
    return [
        replace(step, pending=frozenset(name for later in made[i:] for name in later.names))
        for i, step in enumerate(made)
    ]


def _make_step(module: nn.Module, names: Sequence[str], is_norm: bool, calls: int, gives_logits: bool) -> LayerStep:
    parts = {name: module.get_submodule(name) for name in names}
    if is_norm:
        (norm,) = parts.values()
        assert isinstance(norm, _NormBase)
        return LayerStep(norm=norm, name=names[0], calls=calls)
    layers = tuple(Affine(name, part) for name, part in parts.items())
    return LayerStep(layers=layers, name=names[0], calls=calls, gives_logits=gives_logits)


def find_steps(module: nn.Module, batch: Any) -> list[LayerStep]:
    """Find the steps of a forward pass; layers that share weights with something else belong to none."""
    layers = _changeable_layers(module)
    norms = {name for name, part in module.named_modules() if keeps_statistics(part)}
    inputs: dict[str, list[int]] = {}  # {layer: the number of its input, call after call}
    unexplained: set[str] = set()
    outputs: dict[str, weakref.ref[Any]] = {}  # the last of a layer; convolutions do not have classes last
    number = 0
    last: tuple[Any, int] = (None, -1)  # last input, and its version

    def record(name: str, x: Any, y: Any) -> None:
        nonlocal number, last
        # a tensor that was written to since is another input
        version = x._version if isinstance(x, Tensor) and not x.is_inference() else -1
        if x is not last[0] or version != last[1]:
            number, last = number + 1, (x, version)
        if name in layers and name not in inputs and not _is_explained(layers[name], x, y):
            unexplained.add(name)
        inputs.setdefault(name, []).append(number)
        if name in layers and is_matrix(layers[name].module) and isinstance(y, Tensor):
            outputs[name] = weakref.ref(y)

    with forward_hooks(module, [*layers, *norms], after=record):
        logits = _softmax_logits(module, run_module(module, batch), batch)
    heads = {name for name, output in outputs.items() if logits is not None and output() is logits}
    groups: list[list[str]] = []
    for name, numbers in inputs.items():
        previous = groups[-1][0] if groups else name
        same_input = groups and inputs[previous] == numbers and {name, previous} <= layers.keys()
        if name in unexplained:
            continue
        if same_input and is_matrix(layers[name].module) and is_matrix(layers[previous].module):
            groups[-1].append(name)
        else:
            groups.append([name])
    return [
        _make_step(module, names, names[0] in norms, sum(len(inputs[name]) for name in names), {*names} <= heads)
        for names in groups
    ]


def _softmax_logits(module: nn.Module, outputs: Any, batch: Any) -> Tensor | None:
    """Return the logits, if softmax along their last axis turns them into probabilities."""
    logits = logits_from_outputs(outputs, batch)
    if has_no_classes(module) or logits is None or logits.shape[-1] == 1:
        return None
    return logits if class_axis(module, logits, labels_of(batch)) == logits.dim() - 1 else None


def _changeable_layers(module: nn.Module) -> dict[str, Affine]:
    """Return the linear maps whose weight and bias are theirs alone: not tied or computed by a parametrisation."""
    parts = dict(module.named_modules())
    owners: dict[int, int] = {}
    biases: dict[int, int] = {}
    for part in parts.values():
        for parameter in part._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        if is_affine(part):  # other modules may register the bias of a linear map, too
            bias = part._parameters.get("bias")
            biases[id(bias)] = biases.get(id(bias), 0) + 1

    def has_its_own(part: Any) -> bool:
        weight, bias = (part._parameters.get(name) for name in ("weight", "bias"))
        if weight is None or owners[id(weight)] > 1:
            return False
        return part.bias is None if bias is None else biases[id(bias)] == 1

    return {name: Affine(name, part) for name, part in parts.items() if is_affine(part) and has_its_own(part)}


def _is_explained(layer: Affine, x: Any, y: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(y, Tensor) and layer.explains(x, y)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm or InstanceNorm with running statistics."""
    return isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None


class NormStatistics(Change):
    """The `Change` that sets the running statistics of a BatchNorm to the mean and variance of its inputs.

    An InstanceNorm gets the means of the statistics of all instances. With a correction of 1 variances are unbiased,
    as torch stores them; with 0 they are those that it normalises by in training.
    """

    def __init__(self, norm: _NormBase, name: str = "", correction: int = 1):
        assert norm.running_mean is not None
        self.norm, self.name, self.correction = norm, name, correction
        device = norm.running_mean.device
        self.batch_sums = [torch.zeros(3, norm.num_features, dtype=torch.float64, device=device)]

    def add(self, calls: Sequence[LayerCalls], mask: Tensor | None = None) -> None:
        for x, _ in calls[0][self.name]:
            self.add_input(x)

    def add_input(self, x: Tensor) -> None:
        """Add one input, (batch, channels, …)."""
        x = x.detach().double()
        if isinstance(self.norm, _InstanceNorm):
            x = (x if x.dim() == self.norm._get_no_batch_dim() + 1 else x[None]).flatten(2)
            statistics = torch.full_like(x[0, :, 0], len(x)), x.mean(2).sum(0), x.var(2).sum(0)  # Σ1, Σmean, Σvariance
        else:
            x = x.movedim(1, -1).reshape(-1, self.norm.num_features)
            statistics = torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)  # Σ1, Σx, Σx²
        self.batch_sums[0] += torch.stack(statistics)

    @property
    def samples(self) -> int:
        return int(self.batch_sums[0][0, 0])

    def write(self) -> Sequence[str]:
        (count, first, second), norm = self.batch_sums[0], self.norm  # Σ1, then Σx and Σx², or Σmean and Σvariance
        if not self.samples:
            return ()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = first / count, second / count
        if not isinstance(norm, _InstanceNorm):
            variance = (variance - mean.square()).clamp_min(0) * (count / (count - self.correction).clamp_min(1))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        return (self.name,)
