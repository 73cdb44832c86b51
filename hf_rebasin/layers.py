"""The layers of a module in the order its forward pass calls them, changed one after the other on streamed sums.

Linear layers, transformers' Conv1D and convolutions are one thing here: y = x W + b of samples x, for a convolution
the patches of its input, group by group. What a layer is changed to hangs on what it reads, and so on all layers
before it: there is one pass over the data for every place in the order, which ends where that place is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from .checkpoint import Checkpoint
from .classes import stored, to_disk
from .errors import OptionError
from .inputs import run
from .lazy import Here, Lazy, rounded
from .processes import shared_out, sum_of_all

Calls = Mapping[str, list[tuple[Tensor, Tensor]]]  # of layers by their names: what they read and gave, call after call


@dataclass(frozen=True)
class Affine:
    """A linear map of a module."""

    name: str
    module: Any

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.module, _ConvNd)

    @property
    def groups(self) -> int:
        return int(self.module.groups) if self.is_convolution else 1

    @property
    def matrix(self) -> Tensor:
        """Its weight, (groups, in, out)."""
        weight = self.module.weight.detach()
        if self.is_convolution:
            return weight.unflatten(0, (self.groups, -1)).flatten(2).mT
        return weight[None] if _is_conv1d(self.module) else weight.mT[None]

    @property
    def bias(self) -> Tensor | None:
        """(groups, out)"""
        bias = self.module.bias
        return None if bias is None else bias.detach().reshape(self.groups, -1)

    def write(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Change its weight, (groups, in, out), and its bias, (groups, out), in place."""
        weight = self.module.weight.detach()
        weight.copy_((matrix[0] if _is_conv1d(self.module) else matrix.mT).reshape(weight.shape))
        if bias is not None:
            self.module.bias.detach().copy_(bias.reshape(-1))

    def samples(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What it reads, (groups, many, in)."""
        if not self.is_convolution:
            return _looked_at(x, mask)[None]
        conv, spatial = self.module, len(self.module.kernel_size)
        x = x if x.dim() == spatial + 2 else x[None]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        for i in range(spatial):
            window = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
            x = x.unfold(2 + i, window, conv.stride[i])[..., :: conv.dilation[i]]
        # (batch, channels, places …, patch …) to (groups, batch, places …, channels of a group, patch …)
        x = x.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, 2 + spatial)
        return x.flatten(1, 1 + spatial).flatten(2)

    def answers(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """What it gives, (groups, many, out)."""
        if not self.is_convolution:
            return _looked_at(y, mask)[None]
        y = y if y.dim() == len(self.module.kernel_size) + 2 else y[None]
        return y.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer, whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D"


def _looked_at(x: Tensor, mask: Tensor | None) -> Tensor:
    """(many, n), without the positions that a mask leaves out."""
    return x[mask.bool()] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Step:
    """Layers that read the same, and so are changed together; or one BatchNorm."""

    layers: tuple[Affine, ...] = ()
    norm: _NormBase | None = None
    name: str = ""
    calls: int = 1  # after so many, no layer of the step is called again

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers) or (self.name,)


class Change(Protocol):
    """What is done at a step: sums over all batches, and then a change of its layers."""

    sums: list[Tensor]

    def add(self, calls: Sequence[Calls], mask: Tensor | None) -> None:
        """What the layers of the step read and gave in every model, on one batch."""

    def write(self) -> None:
        """Change the layers of the first model; `sums` are over all processes by now."""


@torch.no_grad()
def change_in_order(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    change: Callable[[Step], Change | None],
    *,
    device: Any = None,
    progress: str = "",
) -> int:
    """Change the layers of the first model one after the other; the other models are only listened to.

    Args:
        models: of one architecture, in evaluation mode, on the device.
        batches: inputs of their forward pass, which can be read again and again; each process takes its share.
        change: what is to be done at a step; None leaves it as it is.
        device: where batches are brought.
        progress: what the progress bar says; none without it.

    Returns:
        How many layers were changed.

    Raises:
        OptionError: no batches.
    """
    first = next(iter(batches), None)
    if first is None:
        raise OptionError("the data gave no batch")
    steps = [(step, made) for step in order(models[0], there(first, device)) if (made := change(step)) is not None]
    for step, doing in tqdm(steps, desc=progress, unit="layer", leave=False, disable=None if progress else True):
        for batch in shared_out(batches):
            batch = there(batch, device)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            doing.add([heard(model, step.names, batch, step.calls) for model in models], mask)
        doing.sums = [sum_of_all(total) for total in doing.sums]
        doing.write()
    return sum(len(step.names) for step, _ in steps)


def order(module: nn.Module, batch: Any) -> list[Step]:
    """The steps of a forward pass. Weights that a layer shares with something else belong to no step."""
    own = dict(module.named_modules())
    owners: dict[int, int] = {}
    for parameter in chain.from_iterable(part._parameters.values() for part in own.values()):
        if parameter is not None:
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = [name for name, part in own.items() if _is_affine(part) and owners[id(part.weight)] == 1]
    norms = [name for name, part in own.items() if isinstance(part, _NormBase) and part.track_running_stats]
    called: list[tuple[str, Tensor]] = []
    with _listening(module, [*layers, *norms], lambda name, x, _: called.append((name, x))):
        run(module, batch)
    found: list[tuple[Tensor | None, list[str]]] = []
    for name, x in called:
        if any(name in names for _, names in found):
            continue
        if found and found[-1][0] is x:
            found[-1][1].append(name)
        else:
            found.append((x if isinstance(own[name], nn.Linear) or _is_conv1d(own[name]) else None, [name]))
    counts = {name: sum(name == other for other, _ in called) for name, _ in called}
    return [
        Step(
            layers=tuple(Affine(name, own[name]) for name in names if name in layers),
            norm=own[names[0]] if names[0] in norms else None,
            name=names[0],
            calls=sum(counts[name] for name in names),
        )
        for _, names in found
    ]


def _is_affine(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return not module.transposed
    return isinstance(module, nn.Linear) or _is_conv1d(module)


class _Reached(Exception):
    """All that was to be heard has been heard."""


def heard(module: nn.Module, names: Sequence[str], batch: Any, calls: int) -> Calls:
    """What layers read and gave in a forward pass, which ends after so many calls of them."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    left = calls

    def hear(name: str, x: Tensor, y: Tensor) -> None:
        nonlocal left
        found[name].append((x, y))
        left -= 1
        if not left:
            raise _Reached

    try:
        with _listening(module, names, hear):
            run(module, batch)
    except _Reached:
        pass
    return found


@contextmanager
def _listening(module: nn.Module, names: Iterable[str], hear: Callable[[str, Tensor, Tensor], Any]) -> Iterator[None]:
    """`hear(name, input, output)` at every call of some layers, while it lasts; what is changed in place is copied."""

    def hook(name: str) -> Any:
        def called(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> None:
            hear(name, inputs[0] if inputs else next(iter(named.values())), output.clone())

        return called

    handles = [module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def there(batch: Any, device: Any) -> Any:
    if device is None:
        return batch
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


class NormStatistics:
    """The mean and variance of what a BatchNorm reads, over all samples; a `Change`."""

    def __init__(self, norm: _NormBase, device: Any):
        self.norm = norm
        self.sums = [torch.zeros(3, norm.num_features, dtype=torch.float64, device=device)]  # Σ1, Σx, Σx²

    def add(self, calls: Sequence[Calls], mask: Tensor | None = None) -> None:
        for read, _ in next(iter(calls[0].values())):
            self.see(read)

    def see(self, read: Tensor) -> None:
        """(batch, channels, …)"""
        x = read.double().movedim(1, -1).reshape(-1, self.norm.num_features)
        self.sums[0] += torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])

    @property
    def samples(self) -> int:
        return int(self.sums[0][0, 0])

    def write(self) -> None:
        (count, total, squares), norm = self.sums[0], self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance * (count / (count - 1).clamp_min(1)))  # unbiased, as torch has it


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """The share of each of `count` models; OptionError unless there is one weight for each, and a sum to divide by."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or not sum(given) > 0:
        raise OptionError(f"got {len(given)} weights for {count} models; give one for each, with a sum above 0")
    return [weight / sum(given) for weight in given]


def computing(checkpoint: Checkpoint, device: Any) -> nn.Module:
    """A module of its own, in float32 or a wider dtype of its tensors."""
    module: nn.Module = checkpoint.model(checkpoint.wide)
    return module.to(device).eval()


def with_values(merged: Checkpoint, module: nn.Module) -> Checkpoint:
    """A checkpoint with the values of a module, rounded to its dtypes."""
    parts: dict[str, Lazy] = {}
    for key, tensor in to_disk(module, stored(module)).items():
        part = merged.parts.get(key)
        if part is not None and part.dtype.is_floating_point:
            parts[key] = Here.of(rounded(tensor.detach().cpu(), part.dtype).clone(), own=True)
    return merged.with_parts(parts)
