"""Merge or overwrite torch modules in memory, with all their parameters and buffers, stored or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.correspondence import match_keys
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import copy_module
from ..errors import OptionError, listed
from ..merging.parameters import resolve_method


def refuse_unless_alike(models: Sequence[nn.Module]) -> None:
    """Raise OptionError unless `models` are two or more modules, MismatchError unless their tensors match."""
    wrong = [type(model).__name__ for model in models if not isinstance(model, nn.Module)]
    if wrong or len(models) < 2:
        detail = f" (not modules: {listed(wrong)})" if wrong else ""
        raise OptionError(f"got {len(models)} models{detail}; give two or more torch modules")
    first, *others = map(Checkpoint.open, models)
    for checkpoint in others:
        match_keys(first, checkpoint)


@torch.no_grad()
def merge_modules(models: Sequence[nn.Module], method: str, **parameters: Any) -> nn.Module:
    """Return a copy of the first module with the parameters and buffers of all merged into it, in float64.

    `merge` makes a checkpoint, of the tensors that a file holds. This also merges buffers that are not stored, and
    takes integers from the first module without asking. A tensor that is equal in all modules is not touched, even if
    it is infinite, as in attention masks.
    """
    out = copy_module(models[0])
    shared = dict(_shared_tensors(out, *models))
    merges = resolve_method(method, parameters).functions_by_key(len(models), shared)
    for name, (target, *tensors) in shared.items():
        wide = torch.promote_types(target.dtype, torch.float64)
        values = [tensor.to(target.device, wide) for tensor in tensors]
        if (target.is_floating_point() or target.is_complex()) and not _all_equal(values):
            if target.is_complex():  # real and imaginary parts are merged as numbers of their own
                target.copy_(torch.view_as_complex(merges[name]([torch.view_as_real(value) for value in values])))
            else:
                target.copy_(merges[name](values))
    return out


@torch.no_grad()
def overwrite(target: nn.Module, source: nn.Module) -> None:
    """Write the parameters and buffers of `source` into the tensors of `target`; references to these stay valid."""
    for _, (old, tensor) in _shared_tensors(target, source):
        new = tensor.to(old.device, old.dtype)
        if not _all_equal([old, new]):  # an expanded buffer cannot be written to; it is equal, so it need not be
            old.copy_(new)


def _shared_tensors(*modules: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each parameter and buffer that all modules have in one shape, by name; a tied tensor under each name.

    Only caches that are not stored may be missing or differ in shape; they are left out.
    """
    first, *others = (
        dict(chain(m.named_parameters(remove_duplicate=False), m.named_buffers(remove_duplicate=False)))
        for m in modules
    )
    for name, tensor in first.items():
        matches = [other[name] for other in others if name in other and other[name].shape == tensor.shape]
        if len(matches) == len(others):
            yield name, [tensor, *matches]


def _all_equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:])
