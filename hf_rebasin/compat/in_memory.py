"""Modules as they stand in memory, with all their parameters and buffers: merged into a copy, or written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..alignment.correspondence import lined_up
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import copied
from ..errors import OptionError, some
from ..merging.merge import methods_with

Device: TypeAlias = torch.device | str | None


def refuse_unless_alike(models: Sequence[nn.Module]) -> None:
    """Raise OptionError unless there are two modules or more, MismatchError unless all have the tensors of one."""
    other = [type(model).__name__ for model in models if not isinstance(model, nn.Module)]
    if other or len(models) < 2:
        what = f"{some(other)} among them" if other else "nothing to bring together"
        raise OptionError(f"got {len(models)} models, {what}; give two torch modules or more")
    first, *others = map(Checkpoint.open, models)
    for checkpoint in others:
        lined_up(first, checkpoint)


@torch.no_grad()
def merged(models: Sequence[nn.Module], method: str, **knobs: Any) -> nn.Module:
    """A copy of the first module with its parameters and buffers merged in float64; none of the modules changes.

    `merge` gives a checkpoint, with what a file holds. Here buffers that are not stored count too, and whole numbers
    are the first module's without a question. What is equal in all stays as it is, be it infinite, as in masks.
    """
    out = copied(models[0])
    found = dict(_in_common(out, *models))
    merges = methods_with(method, knobs, len(models), found)
    for name, (place, *tensors) in found.items():
        wide = torch.promote_types(place.dtype, torch.float64)
        values = [tensor.to(place.device, wide) for tensor in tensors]
        if (place.is_floating_point() or place.is_complex()) and not _all_equal(values):
            place.copy_(merges[name](values))
    return out


@torch.no_grad()
def overwrite(target: nn.Module, source: nn.Module) -> None:
    """Write a module's parameters and buffers into another's own tensors, so whoever holds those sees the change."""
    for _, (place, tensor) in _in_common(target, source):
        value = tensor.to(place.device, place.dtype)
        if not _all_equal([place, value]):  # an expanded buffer cannot be written, and need not be
            place.copy_(value)


def _in_common(*modules: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """The parameters and buffers by name: of caches that are not stored, those that all have in one shape.

    A tied tensor comes once for each of its names.
    """
    first, *others = (
        dict(chain(m.named_parameters(remove_duplicate=False), m.named_buffers(remove_duplicate=False)))
        for m in modules
    )
    for name, tensor in first.items():
        same = [other[name] for other in others if name in other and other[name].shape == tensor.shape]
        if len(same) == len(others):
            yield name, [tensor, *same]


def _all_equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:])
