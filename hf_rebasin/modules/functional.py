"""A module that computes with other tensors than its own, which stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import OptionError


class Computing:
    """`call` of a module and a batch, the module with other tensors in it.

    Args:
        module: to compute with; it is on the device already.
        names: `{canonical key: its own key}` of the tensors that are given.
        call: what is computed of (module, batch).
        device: where batches are brought; None leaves them where they are.
    """

    def __init__(
        self, module: nn.Module, names: Mapping[str, str], call: Callable[[nn.Module, Any], Any], device: Any = None
    ):
        self.names, self.device = names, device
        self._called = _Called(module, call)
        self._buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}

    def __call__(self, state: Mapping[str, Tensor], batch: Any) -> Any:
        """With a state by canonical keys, gradients flow to its parameters; buffers are copies that may be written."""
        tensors = {}
        for key, name in self.names.items():
            value = state[key]
            tensors[f"module.{name}"] = value.detach().clone() if name in self._buffers else value
        return torch.func.functional_call(self._called, tensors, (there(batch, self.device),))


class _Called(nn.Module):
    """(module, batch) → anything as a module of its own, as `torch.func.functional_call` wants it."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, batch: Any) -> Any:
        return self.call(self.module, batch)


def one_number(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """The loss; OptionError where it gives anything but one number."""

    def checked(module: nn.Module, batch: Any) -> Tensor:
        value = loss(module, batch)
        if not isinstance(value, Tensor) or value.dim():
            shaped = isinstance(value, Tensor)
            said = f"a tensor of shape {tuple(value.shape)}" if shaped else type(value).__name__
            raise OptionError(f"the loss gave {said}; it has to return one number as a tensor")
        return value

    return checked


def by_batch_statistics(module: nn.Module) -> None:
    """BatchNorm layers take the statistics of the batch: between two models, those of either end mean nothing."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.train()


def there(batch: Any, device: Any, dtype: torch.dtype | None = None) -> Any:
    """A batch on a device, its floating-point numbers in a dtype; None leaves them."""
    if device is not None:
        from accelerate.utils import send_to_device

        batch = send_to_device(batch, device)
    return batch if dtype is None else _converted(batch, dtype)


def _converted(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _converted(value, dtype) for key, value in batch.items()}
    return type(batch)(_converted(one, dtype) for one in batch) if type(batch) in (tuple, list) else batch


Device: TypeAlias = torch.device | str | None
