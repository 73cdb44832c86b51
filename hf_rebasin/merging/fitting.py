"""Fit the layers of a merge to data: make modules of checkpoints, change them, and read them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.canonical import CanonicalView
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import InMemory, Lazy
from ..checkpoints.precision import all_finite, compute_dtype, rounded
from ..errors import CheckpointError, OptionError, listed
from ..modules.distributed import OwnBatches, all_reduce_mean
from ..modules.forward import refuse_read_once
from ..modules.layerwise import Change, LayerStep, NormStatistics, change_in_order
from ..symmetries.table import canonical_view


def normalise_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the share of each of `count` models; OptionError unless each has a weight and the sum is above 0."""
    weights = [1.0] * count if weights is None else [1.0 if weight is None else weight for weight in weights]
    if len(weights) != count or not sum(weights) > 0:
        raise OptionError(f"got {len(weights)} weights for {count} models; give one for each, with a sum above 0")
    return [weight / sum(weights) for weight in weights]


def nonnegative_shares(weights: Sequence[float] | None, count: int, reason: str) -> list[float]:
    """Return the share of each of `count` models; OptionError if one is negative, for the reason that is given."""
    shares = normalise_weights(weights, count)
    if min(shares) < 0:
        raise OptionError(f"weights = {weights}; {reason}, so give weights of 0 or more")
    return shares


def average_tensors(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the average of one tensor per model: shares 0.25 and 0.75 of the values 2 and 6 give 5."""
    return torch.stack([share * tensor for share, tensor in zip(shares, tensors, strict=True)]).sum(0)


def refuse_schedule(steps: int, rate: float, usual_rate: float) -> None:
    """Raise OptionError unless there are steps of training, at a learning rate above 0."""
    if steps < 1:
        raise OptionError(f"steps = {steps}; give 1 or more")
    if not 0 < rate < math.inf:
        raise OptionError(f"rate = {rate}; give a number above 0, such as {usual_rate}")


def finite_mean(values: Tensor, quantity: str, when: str) -> float:
    """Return the mean over all processes of what training minimises; OptionError unless it is finite."""
    mean = all_reduce_mean(values.double().mean()).item()
    if not math.isfinite(mean):
        raise OptionError(
            f"{quantity} on these data is not finite ({mean} {when}); check the models and the "
            "data, or take a lower rate if it became so in training"
        )
    return mean


def refuse_other_owners(data: Iterable[Any], count: int) -> None:
    """Raise OptionError for `OwnBatches` of another number of models."""
    if isinstance(data, OwnBatches) and len(data.of_models) != count:
        raise OptionError(
            f"data have batches of {len(data.of_models)} models, and {count} are merged; give one of each"
        )


def load_modules(checkpoints: Sequence[Checkpoint], device: Any) -> tuple[list[nn.Module], torch.dtype]:
    """Make modules of checkpoints, all in one dtype: float32, or wider if any of their tensors is.

    Returns:
        The modules and the dtype.

    Raises:
        CheckpointError: a checkpoint without a known model class.
    """
    wide = compute_dtype(*(checkpoint.compute_dtype for checkpoint in checkpoints))
    return [checkpoint.model(wide).to(device).eval() for checkpoint in checkpoints], wide


def refuse_submodels(models: Iterable[Checkpoint]) -> None:
    """Raise OptionError for models with weights in sub-folders, which their forward pass does not use."""
    for model in models:
        if model.submodels:
            raise OptionError(
                f"{model.name} has weights of its own in {listed(model.submodels)}, which come after its forward pass "
                "and cannot be fitted with it; merge it by a method that goes tensor by tensor (linear, lerp, slerp), "
                "without refit or repair"
            )


def change_layers(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    change: Callable[[LayerStep], Change | None],
    *,
    device: Any = None,
    progress: str = "",
) -> Checkpoint:
    """Change the linear maps of a merge in order, and recompute its BatchNorm statistics; see `change_in_order`.

    Args:
        merged: the merge, which is not modified.
        models: models that were merged.
        data: `batches` of `change_in_order`.
        change: returns the change of the linear maps of a step; None leaves them as they are.
        device: device of the computation.
        progress: label of the progress bar.
    """

    def change_maps(step: LayerStep, modules: Sequence[nn.Module]) -> Change | None:
        return change(step) if step.norm is None else None

    return change_modules(merged, models, data, change_maps, device=device, progress=progress)


def change_modules(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    change: Callable[[LayerStep, Sequence[nn.Module]], Change | None],
    *,
    device: Any = None,
    progress: str = "",
    own: bool = False,
) -> Checkpoint:
    """Do what `change_layers` does, by a function that also gets the modules.

    Args:
        merged: the merge, which is not modified.
        models: models that were merged.
        data: `batches` of `change_in_order`.
        change: called with a step and the modules of the merge and of the models, in this order; the modules are
            copies, which it may change. What it returns for a BatchNorm does not count.
        device: device of the computation.
        progress: label of the progress bar.
        own: whether models read their own batches only, if data are `OwnBatches`; the merge reads all.
    """
    refuse_read_once(data)
    refuse_submodels([*models, merged])
    modules, dtype = load_modules([merged, *models], device)

    def change_or_recompute(step: LayerStep) -> Change | None:
        changed = change(step, modules)
        return changed if step.norm is None else NormStatistics(step.norm, step.name)

    change_in_order(modules, data, change_or_recompute, device=device, dtype=dtype, progress=progress, own=own)
    return with_module_values(merged, modules[0])


def with_module_values(merged: Checkpoint, module: nn.Module) -> Checkpoint:
    """Return a checkpoint with the values of a module, rounded to the dtypes of the checkpoint.

    Raises:
        CheckpointError: a value that does not fit its dtype, or a tensor that the checkpoint does not have.
    """
    view = canonical_view(merged)
    prefix = merged.base_prefix if view.prefix is None else view.prefix
    disk_keys, values = view.keys, CanonicalView(Checkpoint.open(module), prefix)
    parts: dict[str, Lazy] = {}
    for name, tensor in values.state.items():
        key = disk_keys.get(name)
        if key is None and name in values.ties.values():  # stored under its other name
            continue
        if key is None:
            raise CheckpointError(
                f"{merged.name}: {name} of the module is not one of its tensors, which are {listed(disk_keys)}"
            )
        dtype = merged.parts[key].dtype
        if dtype.is_floating_point:
            value = rounded(tensor.detach().cpu(), dtype).clone(memory_format=torch.contiguous_format)
            if not all_finite(value):
                raise CheckpointError(f"{key} has values that do not fit {dtype}; merge into a wider dtype")
            parts[key] = InMemory.of(value, owned=True)
    return merged.with_parts(parts)
