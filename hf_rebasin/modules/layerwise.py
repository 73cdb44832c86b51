"""The layers of a module in the order its forward pass calls them, changed one after the other on streamed sums.

What a layer is changed to hangs on what it reads, and so on all layers before it: there is one pass over the data for
every place in the order, which ends where that place is reached.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from tqdm import tqdm

from ..checkpoints.precision import all_finite
from ..errors import CheckpointError, OptionError, some
from .distributed import numbers_of_all, sum_of_all, that_of_the_first
from .forward import logits_in, no_classes, refuse_read_once, run
from .functional import there
from .hooks import Calls, Hearing, listening
from .linear_maps import Affine, is_affine, is_matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """Layers that read the same, and so are changed together; or one BatchNorm."""

    layers: tuple[Affine, ...] = ()
    norm: _NormBase | None = None
    name: str = ""
    calls: int = 1  # after so many, no layer of the step is called again
    scores: bool = False  # what its one layer gives are the logits that the module answers: softmax makes p of them

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers) or (self.name,)


class Change(Protocol):
    """What is done at a step: sums over all batches, and then a change of its layers."""

    sums: list[Tensor]

    def add(self, calls: Sequence[Calls], mask: Tensor | None) -> None:
        """What the layers of the step read and gave in every model, on one batch."""

    def write(self) -> Sequence[str]:
        """Change the layers of the first model, and say which; `sums` are over all processes by now."""

    def then(self) -> Change | None:
        """What is done at the same step next, in a pass of its own."""
        return None


@torch.no_grad()
def change_in_order(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    change: Callable[[Step], Change | None],
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    progress: str = "",
) -> list[str]:
    """Change the layers of the first model one after the other; the other models are only listened to.

    Args:
        models: of one architecture, in evaluation mode, on the device.
        batches: inputs of their forward pass, which can be read again and again; each process takes its share.
        change: what is to be done at a step; None leaves it as it is.
        device: where batches are brought.
        dtype: what their floating-point numbers are brought to; by default they stay.
        progress: what the progress bar says; none without it.

    Returns:
        The names of the layers that were changed.

    Raises:
        OptionError: no batches, or such as can be read once.
        CheckpointError: NaN or Inf in what a layer reads or gives; names the layer.
    """
    refuse_read_once(batches)
    changed: list[str] = []
    steps: list[Step] = []
    planned = _planned(models[0], batches, lambda batch: there(batch, device, dtype))
    for step in tqdm(planned, desc=progress, unit="layer", leave=False, disable=None if progress else True):
        doing = change(step)  # not before its turn: the sums of all layers together are larger than the models
        if doing is not None:
            steps.append(step)
        hearing = Hearing(models, step.names, step.calls, batches, device, dtype, kept=step.scores)
        while doing is not None:
            for calls, mask in hearing:
                doing.add(calls, mask)
            doing.sums = [sum_of_all(total) for total in doing.sums]
            refuse_nan(doing.sums, step.names)
            changed += doing.write()
            doing = doing.then()
    if any(step.layers for step in steps):
        _say_what_is_left(models[0], planned)
    if left := [name for step in steps for name in step.names if name not in changed]:
        logger.info("%s read nothing, or not the same in all models, so they stay as they are", some(left))
    return changed


def _say_what_is_left(module: nn.Module, planned: Sequence[Step]) -> None:
    maps, found = _maps(module), {name for step in planned for name in step.names}
    if left := [name for name in maps if name not in found]:
        why = "as their weights are tied or computed, or no pass calls them"
        logger.info("%d of %d linear maps stay as they are, %s: %s", len(left), len(maps), why, some(left))


def refuse_nan(sums: Iterable[Tensor], names: Sequence[str]) -> None:
    """Raise CheckpointError unless all is finite that layers were heard to read and to give."""
    if not all(all_finite(total) for total in sums):
        said = some(name or "the module" for name in names)
        raise CheckpointError(
            f"{said}: on these data NaN or Inf is in what is read or given there, in the merge or in a model that was "
            "merged; look at the data, and at whether the models compute on them by themselves"
        )


def _planned(module: nn.Module, batches: Iterable[Any], brought: Callable[[Any], Any]) -> list[Step]:
    """The steps, the same in every process, as these add up their sums step by step."""
    first = next(iter(batches), None)
    count, everywhere = numbers_of_all([first is not None, 1.0], next((p.device for p in module.parameters()), None))
    if count < everywhere:
        raise OptionError(
            "the data gave no batch"
            if not count
            else f"the data gave a batch to {count:.0f} of {everywhere:.0f} processes; give each one"
        )
    found = order(module, brought(first))
    plan = that_of_the_first([(step.names, step.norm is not None, step.calls, step.scores) for step in found])
    return [_step(module, *one) for one in plan]


def _step(module: nn.Module, names: Sequence[str], is_norm: bool, calls: int, scores: bool) -> Step:
    own = {name: module.get_submodule(name) for name in names}
    if is_norm:
        (norm,) = own.values()
        assert isinstance(norm, _NormBase)
        return Step(norm=norm, name=names[0], calls=calls)
    return Step(tuple(Affine(name, part) for name, part in own.items()), name=names[0], calls=calls, scores=scores)


def order(module: nn.Module, batch: Any) -> list[Step]:
    """The steps of a forward pass. Weights that a layer shares with something else belong to no step."""
    layers, norms = _layers(module), {name for name, part in module.named_modules() if keeps_statistics(part)}
    read: dict[str, list[int]] = {}  # the number of what was read, at every call
    odd: set[str] = set()
    given: dict[str, weakref.ref[Any]] = {}  # what a layer gave last; of convolutions classes are not the last axis
    number = 0
    before: tuple[Any, int] = (None, -1)  # what was read last, and its version

    def hear(name: str, x: Any, y: Any) -> None:
        nonlocal number, before
        # what was changed in place is something else
        version = x._version if isinstance(x, Tensor) and not x.is_inference() else -1
        if x is not before[0] or version != before[1]:
            number, before = number + 1, (x, version)
        if name in layers and name not in read and not _is_explained(layers[name], x, y):
            odd.add(name)
        read.setdefault(name, []).append(number)
        if name in layers and is_matrix(layers[name].module) and isinstance(y, Tensor):
            given[name] = weakref.ref(y)

    with listening(module, [*layers, *norms], hear):
        logits = _scores_in(module, run(module, batch), batch)
    ends = {name for name, one in given.items() if logits is not None and one() is logits}
    groups: list[list[str]] = []
    for name, numbers in read.items():
        one = groups[-1][0] if groups else name
        alike = groups and read[one] == numbers and {name, one} <= layers.keys()
        if name in odd:
            continue
        if alike and is_matrix(layers[name].module) and is_matrix(layers[one].module):
            groups[-1].append(name)
        else:
            groups.append([name])
    return [
        _step(module, names, names[0] in norms, sum(len(read[name]) for name in names), {*names} <= ends)
        for names in groups
    ]


def _scores_in(module: nn.Module, said: Any, batch: Any) -> Tensor | None:
    """The logits in an answer, if softmax along the last axis is what makes probabilities of them."""
    logits = logits_in(said, batch)
    return None if no_classes(module) or logits is None or logits.shape[-1] == 1 else logits


def _maps(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if is_affine(part)]


def _layers(module: nn.Module) -> dict[str, Affine]:
    """The linear maps that have a weight, and a bias, of their own; no parametrisation computes it."""
    parts = dict(module.named_modules())
    owners: dict[int, int] = {}
    biases: dict[int, int] = {}
    for part in parts.values():
        for parameter in part._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        if is_affine(part):  # other modules name a bias that is none of theirs
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
    """Whether it is a BatchNorm, or an InstanceNorm, with running statistics."""
    return isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None


class NormStatistics(Change):
    """The mean and variance of what a BatchNorm reads, over all samples; a `Change`.

    Of an InstanceNorm, the means of those of every instance. With a correction of 1 variances are unbiased, as torch
    keeps them; in training it normalises by those without.
    """

    def __init__(self, norm: _NormBase, name: str = "", correction: int = 1):
        assert norm.running_mean is not None
        self.norm, self.name, self.correction = norm, name, correction
        self.sums = [torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.running_mean.device)]

    def add(self, calls: Sequence[Calls], mask: Tensor | None = None) -> None:
        for read, _ in calls[0][self.name]:
            self.see(read)

    def see(self, read: Tensor) -> None:
        """(batch, channels, …)"""
        x = read.detach().double()
        if isinstance(self.norm, _InstanceNorm):
            x = (x if x.dim() == self.norm._get_no_batch_dim() + 1 else x[None]).flatten(2)
            said = torch.full_like(x[0, :, 0], len(x)), x.mean(2).sum(0), x.var(2).sum(0)  # Σ1, Σmean, Σvariance
        else:
            x = x.movedim(1, -1).reshape(-1, self.norm.num_features)
            said = torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)  # Σ1, Σx, Σx²
        self.sums[0] += torch.stack(said)

    @property
    def samples(self) -> int:
        return int(self.sums[0][0, 0])

    def write(self) -> Sequence[str]:
        (count, total, squares), norm = self.sums[0], self.norm
        if not self.samples:
            return ()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = total / count, squares / count
        if not isinstance(norm, _InstanceNorm):
            variance = (variance - mean.square()).clamp_min(0) * (count / (count - self.correction).clamp_min(1))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        return (self.name,)
