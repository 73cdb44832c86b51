"""Merging checkpoints that share their coordinates, one key at a time, with the keys and dtypes of the first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import registry
from .checkpoint import Checkpoint
from .errors import CheckpointError, MismatchError, OptionError, nearest, some


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
    merge = method_with(method, knobs or {})
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
    return replace(first.with_state(merged), name=f"{method} of {', '.join(c.name for c in checkpoints)}")


def method_with(name: str, knobs: Mapping[str, Any]) -> Callable[[Sequence[Tensor]], Tensor]:
    """A merge method with its knobs; an unknown knob raises OptionError with the nearest known one."""
    merge = registry.find("merge_methods", name).merge
    known = [p.name for p in inspect.signature(merge).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for knob in knobs:
        if knob not in known:
            raise OptionError(f"merge method {name!r} has no parameter {knob!r}{nearest(knob, known)}")
    return lambda tensors: merge(tensors, **knobs)


def lined_up(first: Checkpoint, other: Checkpoint, prefix: str | tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The other's tensors by the first's canonical keys; a tied tensor may be stored by one and not by the other.

    Raises:
        MismatchError: tensors that are missing, left over, stored apart though tied in the first, or of another shape.
    """
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
