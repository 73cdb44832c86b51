"""Merges whose layers are fitted to data: modules made of checkpoints, changed, and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import Here, Lazy
from ..checkpoints.precision import all_finite, rounded
from ..errors import CheckpointError, OptionError, some
from ..modules.forward import refuse_read_once
from ..modules.layerwise import Change, NormStatistics, Step, change_in_order
from ..symmetries.table import table_for


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """The share of each of `count` models; OptionError unless there is one weight for each, and a sum to divide by."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or not sum(given) > 0:
        raise OptionError(f"got {len(given)} weights for {count} models; give one for each, with a sum above 0")
    return [weight / sum(given) for weight in given]


def computing(checkpoints: Sequence[Checkpoint], device: Any) -> tuple[list[nn.Module], torch.dtype]:
    """Modules of their own, all in float32 or in the widest dtype of all their tensors; and that dtype.

    Raises:
        CheckpointError: no class is known that could be run.
    """
    wide = max((checkpoint.wide for checkpoint in checkpoints), key=lambda kind: kind.itemsize)
    return [checkpoint.model(wide).to(device).eval() for checkpoint in checkpoints], wide


def with_changes(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    change: Callable[[Step], Change | None],
    *,
    device: Any = None,
    progress: str = "",
) -> Checkpoint:
    """A merge whose linear maps were changed in order, with BatchNorm statistics of the data; see `change_in_order`.

    Args:
        merged: the merge; it stays as it is.
        models: what was merged.
        data: as `batches` there.
        change: what is done to linear maps; None leaves them as they are.
        device: where it is computed.
        progress: as there.
    """
    refuse_read_once(data)
    modules, dtype = computing([merged, *models], device)

    def made(step: Step) -> Change | None:
        return change(step) if step.norm is None else NormStatistics(step.norm, step.name)

    change_in_order(modules, data, made, device=device, dtype=dtype, progress=progress)
    return with_values(merged, modules[0])


def with_values(merged: Checkpoint, module: nn.Module) -> Checkpoint:
    """A checkpoint with the values of a module, rounded to its dtypes.

    Raises:
        CheckpointError: a value that does not fit its dtype, or has no place.
    """
    table = table_for(merged.config)
    prefix = merged.base_prefix if table is None else table.prefix or merged.base_prefix
    names, values = merged.canonical(prefix), Checkpoint.open(module)
    parts: dict[str, Lazy] = {}
    for name, tensor in values.state(prefix).items():
        key = names.get(name)
        if key is None and name in values.canonical_ties(prefix).values():  # stored under its other name
            continue
        if key is None:
            raise CheckpointError(f"{merged.name}: {name} of the module is none of its tensors, {some(names)}")
        kind = merged.parts[key].dtype
        if kind.is_floating_point:
            value = rounded(tensor.detach().cpu(), kind).clone(memory_format=torch.contiguous_format)
            if not all_finite(value):
                raise CheckpointError(f"{key} has values that do not fit {kind}; merge into a wider dtype")
            parts[key] = Here.of(value, own=True)
    return merged.with_parts(parts)
