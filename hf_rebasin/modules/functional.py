"""Forward passes of a module with other tensors in place of its own, which do not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import OptionError


class FunctionalCall:
    """The function `call(module, batch)` as a function of the module's tensors and the batch.

    Args:
        module: module to compute with; it is on the device already.
        module_keys: `{canonical key: module key}` of the tensors that are replaced.
        call: function of (module, batch) to compute.
        device: device that batches are moved to; None leaves them where they are.
    """

    def __init__(
        self,
        module: nn.Module,
        module_keys: Mapping[str, str],
        call: Callable[[nn.Module, Any], Any],
        device: Any = None,
    ):
        self.module_keys, self.device = module_keys, device
        self._wrapper = _CallWrapper(module, call)
        self._buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}

    def __call__(self, state: Mapping[str, Tensor], batch: Any) -> Any:
        """Call with the tensors of a state dict with canonical keys.

        Gradients flow to its parameters; buffers are copied, as the forward pass may write to them.
        """
        tensors = {}
        for key, module_key in self.module_keys.items():
            value = state[key]
            tensors[f"module.{module_key}"] = value.detach().clone() if module_key in self._buffers else value
        return torch.func.functional_call(self._wrapper, tensors, (move_batch(batch, self.device),))


class _CallWrapper(nn.Module):
    """A function of (module, batch) as a module, which is what `torch.func.functional_call` takes."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, batch: Any) -> Any:
        return self.call(self.module, batch)


def require_scalar_loss(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """Wrap a loss so that it raises OptionError where it returns anything but one number."""

    def checked(module: nn.Module, batch: Any) -> Tensor:
        value = loss(module, batch)
        if not isinstance(value, Tensor) or value.dim():
            is_tensor = isinstance(value, Tensor)
            returned = f"a tensor of shape {tuple(value.shape)}" if is_tensor else type(value).__name__
            raise OptionError(f"the loss returned {returned}; it has to return one number as a tensor")
        return value

    return checked


def use_batch_statistics(module: nn.Module) -> None:
    """Make BatchNorm layers normalise by the batch: between two models, the running statistics of either are wrong."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.train()


def move_batch(batch: Any, device: Any, dtype: torch.dtype | None = None) -> Any:
    """Move a batch to a device, and cast its floating-point tensors to a dtype; None leaves either as it is."""
    if device is not None:
        from accelerate.utils import send_to_device

        batch = send_to_device(batch, device)
    return batch if dtype is None else _cast(batch, dtype)


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _cast(value, dtype) for key, value in batch.items()}
    return type(batch)(_cast(value, dtype) for value in batch) if type(batch) in (tuple, list) else batch


Device: TypeAlias = torch.device | str | None
