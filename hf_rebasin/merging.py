"""Merging checkpoints that share their coordinates, one key at a time, with the keys and dtypes of the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from . import registry
from .checkpoint import Checkpoint
from .errors import CheckpointError, MismatchError, some
from .knobs import knobs_for


def combine(
    checkpoints: Sequence[Checkpoint],
    method: str,
    knobs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Merge checkpoints tensor by tensor.

    Sums are taken in float64 (in float32 for half precision) and rounded once, to the dtype that the first model has
    for that key or to `dtype`. What is no floating-point tensor (token ids, batch counts) is the first model's.

    Args:
        checkpoints: the models; the first gives keys, shapes, dtypes, configuration and tokenizer.
        method: a file of `merge_methods/`.
        knobs: its keyword arguments.
        dtype: of the floating-point tensors of the result.
        progress: show a progress bar (on a terminal).

    Raises:
        CheckpointError: NaN or Inf in a model, or in the result (an overflow of `dtype`).
        MismatchError: tensors that are missing, left over or of another shape.
        UnknownNameError, OptionError: the method or a knob.
    """
    merge = method_with(method, knobs or {}, len(checkpoints))
    first = checkpoints[0]
    for checkpoint in checkpoints:
        checkpoint.refuse_broken()
    states = [first.state(), *(lined_up(first, other) for other in checkpoints[1:])]
    merged: dict[str, Tensor] = {}
    for key in tqdm(
        states[0], desc=f"merging ({method})", unit="tensor", leave=False, disable=None if progress else True
    ):
        one = states[0][key]
        if not one.is_floating_point():
            _refuse_if_it_matters(key, [state[key] for state in states], checkpoints)
            merged[key] = one
            continue
        wide = torch.float64 if one.dtype in (torch.float32, torch.float64) else torch.float32
        out = merge([state[key].to(wide) for state in states])
        merged[key] = out.to(one.dtype if dtype is None else dtype)
        if not torch.isfinite(merged[key]).all():
            raise CheckpointError(
                f"{key} of the merge has values that do not fit {merged[key].dtype} (up to {out.abs().max():.3g}); "
                "write a wider dtype"
            )
    return replace(
        first.with_state(merged),
        name=f"{method} of {', '.join(c.name for c in checkpoints)}",
        sources=tuple(source for c in checkpoints for source in c.sources),
    )


def _refuse_if_it_matters(key: str, tensors: Sequence[Tensor], checkpoints: Sequence[Checkpoint]) -> None:
    """Whole numbers are not averaged, so apart from counts they have to be the same: quantised weights are not."""
    for tensor, checkpoint in zip(tensors, checkpoints, strict=True):
        if not key.endswith("num_batches_tracked") and not torch.equal(tensor, tensors[0]):
            raise MismatchError(
                f"{key} ({tensor.dtype}) differs between {checkpoints[0].name} and {checkpoint.name}, and whole "
                "numbers cannot be averaged; if the models are quantised, merge the originals"
            )


def method_with(name: str, knobs: Mapping[str, Any], models: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """A merge method with its knobs, tried on that many scalars; what it cannot do raises OptionError here."""
    merge = registry.find("merge_methods", name).merge
    values = knobs_for(f"merge method {name!r}", merge, knobs)
    merge([torch.zeros(())] * models, **values)
    return lambda tensors: cast(Tensor, merge(tensors, **values))


def lined_up(first: Checkpoint, other: Checkpoint, prefix: str | tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The other's tensors by the first's canonical keys; a tied tensor may be stored by one and not by the other.

    Raises:
        MismatchError: tensors that are missing, left over, stored apart though tied in the first, or of another shape.
    """
    prefix = first.base_prefix if prefix is None else prefix  # a state dict knows none of its own
    mine, theirs = first.state(prefix), other.state(prefix)
    ties = first.canonical_ties(prefix)
    for target, kept in other.canonical_ties(prefix).items():
        if target in mine and target not in theirs and kept in theirs:
            theirs[target] = theirs[kept]
    missing = [key for key in mine if key not in theirs]
    left = [key for key in theirs if key not in mine]
    extra = [key for key in left if ties.get(key) not in mine]
    untied = [key for key in left if ties.get(key) in mine and not torch.equal(theirs[key], theirs[ties[key]])]
    shapes = [
        f"{key} {tuple(theirs[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in mine.items()
        if key in theirs and theirs[key].shape != tensor.shape
    ]
    problems = [
        f"{what}: {some(keys)}"
        for what, keys in (
            ("it lacks", missing),
            (f"it has what {first.name} lacks", extra),
            (f"it has values of its own for what {first.name} ties", untied),
            ("it has other shapes", shapes),
        )
        if keys
    ]
    if problems:
        raise MismatchError(f"{other.name} cannot be merged into {first.name}; {'; '.join(problems)}")
    return {key: theirs[key] for key in mine}
