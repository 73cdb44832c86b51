"""Merging checkpoints that share their coordinates, one key at a time, with the keys and dtypes of the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..alignment.compatibility import Assumption, paired
from ..alignment.correspondence import equal, lined_up, untied_like
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.lazy import Computed, Here, Lazy
from ..checkpoints.model_classes import recomputed
from ..checkpoints.precision import all_finite, rounded
from ..errors import CheckpointError, MismatchError, OptionError, some
from ..modules.forward import refuse_read_once
from ..modules.functional import Device
from ..registry import knobs_for
from .parameters import Varying, reading, resolved

logger = logging.getLogger(__name__)


def combine(
    checkpoints: Sequence[Checkpoint],
    method: str,
    knobs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    backbone_only: bool = False,
) -> Checkpoint:
    """Merge checkpoints tensor by tensor; those of folders when the result is saved or asked for.

    Sums are taken in float64 (in float32 for half precision) and rounded once, to the dtype that the first model has
    for that key or to `dtype`. What is no floating-point tensor (token ids, batch counts) is the first model's.

    Args:
        checkpoints: the models; the first gives keys, shapes, dtypes, configuration and tokenizer.
        method: a file of `merge_methods/`.
        knobs: its keyword arguments; numbers may be others for other tensors, see `hf_rebasin.merging.parameters`.
        dtype: of the floating-point tensors of the result.
        backbone_only: keep the first model's head; the others may have another, or none.

    Raises:
        CheckpointError: a quantised model. When values are computed: NaN or Inf in a model, or in the result (an
            overflow of `dtype`).
        MismatchError: tensors that are missing, left over or of another shape.
        UnknownNameError, OptionError: the method or a knob.
    """
    methods_with(method, knobs or {}, len(checkpoints))
    module = registry.find("merge_methods", method)
    sums = getattr(module, "sums", None)
    elementwise = getattr(module, "ELEMENTWISE", False) or sums is not None
    given, *others = checkpoints
    first = untied_like(given, others)
    if apart := [key for key in first.parts if key not in given.parts]:
        logger.info("%s of the merge is stored apart, as one of the models has it so", some(apart))
    checkpoints = [first, *others]
    lined = [lined_up(first, checkpoint, backbone_only=backbone_only) for checkpoint in checkpoints]
    merges = methods_with(method, knobs or {}, len(checkpoints), averaged(first, lined[-1]))
    parts: dict[str, Lazy] = {}
    for key, one in first.parts.items():
        if not one.dtype.is_floating_point:
            if key in lined[-1]:  # they all have the same keys
                _refuse_if_it_matters(key, [model[key] for model in lined], checkpoints)
        elif key in lined[-1]:
            inputs = [model[key] for model in lined]
            compute = _Merge(key, merges[key], inputs, checkpoints, one.dtype if dtype is None else dtype)
            prepare = None if sums is None else partial(compute.with_sums, sums)
            parts[key] = Computed(one.shape, compute.dtype, inputs, compute, elementwise, prepare)
        elif not recomputed(key, one):  # of the head that is kept
            alone = _Merge(key, lambda tensors: tensors[0], [one], checkpoints, one.dtype if dtype is None else dtype)
            parts[key] = Computed(one.shape, alone.dtype, [one], alone, True)
        if isinstance(one, Here) and key not in parts:  # whoever holds it may change it later
            parts[key] = one.kept()
    return first.with_parts(
        parts,
        name=f"{method} of {', '.join(c.name for c in checkpoints)}",
        sources=tuple(source for c in checkpoints for source in c.sources),
        commit=None,
    )


@dataclass(frozen=True)
class _Merge:
    """What is done to the tensors of one key, or to a chunk of each."""

    key: str
    merge: Callable[..., Tensor]
    inputs: Sequence[Lazy]
    checkpoints: Sequence[Checkpoint]
    dtype: torch.dtype

    @property
    def half(self) -> bool:
        """Whether all is half precision, so that sums in float32 are exact enough."""
        return max(self.dtype.itemsize, *(part.dtype.itemsize for part in self.inputs)) <= 2

    def _widened(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        wide = torch.float32 if self.half else torch.float64
        return [tensor.to(wide) for tensor in tensors]

    def with_sums(self, sums: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Lazy]) -> _Merge:
        """The same for chunks, with what has to be known of the whole tensors."""
        total = torch.zeros((), dtype=torch.float64)
        for chunks in zip(*(one.chunks() for one in inputs), strict=True):
            total = total + sums(self._widened(chunks))
        return replace(self, merge=lambda tensors: self.merge(tensors, total))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        values = self._widened(tensors)
        for value, part, checkpoint in zip(values, self.inputs, self.checkpoints, strict=False):
            if not all_finite(value):
                checkpoint.refuse_values(part)
        merged = self.merge(values)
        out = rounded(merged, self.dtype)
        if self.half and not all_finite(out):  # bfloat16 reaches as far as float32, so sums of masks do not fit that
            merged = self.merge([value.double() for value in values])
            out = rounded(merged, self.dtype)
        if not all_finite(out):
            raise CheckpointError(
                f"{self.key} of the merge has values that do not fit {self.dtype} (up to {merged.abs().max():.3g}); "
                "write a wider dtype"
            )
        return out


def _refuse_if_it_matters(key: str, parts: Sequence[Lazy], checkpoints: Sequence[Checkpoint]) -> None:
    """Whole numbers are not averaged, so apart from counts they have to be the same: quantised weights are not."""
    for part, checkpoint in zip(parts, checkpoints, strict=True):
        if not key.endswith("num_batches_tracked") and not equal(part, parts[0]):
            raise MismatchError(
                f"{key} ({part.dtype}) differs between {checkpoints[0].name} and {checkpoint.name}, and what is no "
                "floating-point number is not averaged; if the models are quantised, merge the originals"
            )


def averaged(first: Checkpoint, lined: Collection[str]) -> list[str]:
    """The keys of the first model that are merged: floating-point tensors that all have."""
    return [key for key, one in first.parts.items() if one.dtype.is_floating_point and key in lined]


def methods_with(
    name: str, knobs: Mapping[str, Any], models: int, keys: Collection[str] = ()
) -> dict[str, Callable[..., Tensor]]:
    """A merge method with its knobs for every key, tried on that many scalars; what it cannot do raises OptionError.

    Without keys, as long as no model is opened, that is seen for knobs that are the same for all tensors.
    """
    module = registry.find("merge_methods", name)
    values = knobs_for(f"merge method {name!r}", module.merge, knobs, reading)
    varying = [knob for knob, value in values.items() if isinstance(value, Varying)]
    if varying and hasattr(module, "finish"):
        raise OptionError(
            f"merge method {name!r} fits whole models, with one number for all tensors; {some(varying)} cannot vary"
        )
    scalars = [torch.zeros(())] * models
    module.merge(scalars, **{knob: value for knob, value in values.items() if knob not in varying})
    found: dict[str, Callable[..., Tensor]] = {}
    tried: dict[str, Callable[..., Tensor]] = {}
    for key, own in (resolved(values, keys) if keys else {}).items():
        if (said := repr(own)) not in tried:
            tried[said] = partial(module.merge, **own)
            try:
                tried[said](scalars)
            except OptionError as error:
                raise OptionError(f"{key}: {error}" if varying else str(error)) from error
        found[key] = tried[said]
    return found


def finish_with(name: str, knobs: Mapping[str, Any]) -> Callable[..., Checkpoint] | None:
    """What a merge method does to a whole merge, (merge, models, data) → checkpoint, with its knobs; None for most."""
    module = registry.find("merge_methods", name)
    finish = getattr(module, "finish", None)
    return None if finish is None else partial(finish, **knobs_for(f"merge method {name!r}", module.merge, knobs))


def merge(
    models: Sequence[Source],
    method: str = "linear",
    *,
    dtype: torch.dtype | None = None,
    assume: Iterable[Assumption] = (),
    backbone_only: bool = False,
    data: Iterable[Any] | None = None,
    device: Device = None,
    progress: bool = False,
    **knobs: Any,
) -> Checkpoint:
    """Merge models that share their coordinates already (align them first).

    Args:
        models: folders, Hub ids, modules, state dicts or checkpoints; the first gives keys, shapes, dtypes,
            configuration and tokenizer.
        method: a file of `hf_rebasin/merging/methods/`: "linear", "lerp", "slerp", "refit", "distil".
        dtype: of the floating-point tensors of the result, by default what the first model has.
        assume: what to take for the same without looking: "config", "labels", "vocabulary".
        backbone_only: keep the first model's head; the others may have another, or none.
        data: unlabelled batches that can be read several times, for "refit" and "distil".
        device: where that computes.
        progress: whether it shows a progress bar (on a terminal).
        knobs: of the method, such as `t=0.3`. A number may be another one for other tensors: `t=[0, 0.5, 1]` from the
            first layer to the last, `t=[{"filter": "mlp", "value": 0.3}, {"value": 0.5}]` by what is in a name.

    Returns:
        A `Checkpoint`: `.save(out)` writes a folder that `from_pretrained` loads, `.model()` makes a module. What is
        merged from folders and Hub ids is computed then, as it is written; what involves a module or a state dict,
        which may change, is computed now.

    Raises:
        MismatchError: tensors that are missing, left over or of another shape, or models that cannot mean the same.
        CheckpointError: a quantised model; NaN or Inf, as soon as they are read.
        UnknownNameError, OptionError: the method or a knob.

    Example: `merge([a, b])` of weights 2 and 6 has (2 + 6) / 2 = 4; `merge([a, b], "lerp", t=0.25)` has 3.
    """
    if not models:
        raise OptionError("nothing to merge: give at least one model")
    first, *others = (Checkpoint.open(model) for model in models)
    for checkpoint in (first, *others):
        checkpoint.refuse_quantised()
    moved = [paired(first, other, assume, backbone_only=backbone_only) for other in others]
    merged = combine([first, *moved], method, knobs, dtype=dtype, backbone_only=backbone_only)
    finish = finish_with(method, knobs)
    if (finish is None) != (data is None):
        said = "looks at no data" if finish is None else "looks at data, and there are none"
        raise OptionError(f"merge method {method!r} {said}; {'leave out' if finish is None else 'give'} data=")
    if finish is None or data is None:
        return merged
    refuse_read_once(data)
    if backbone_only:
        raise OptionError(f"merge method {method!r} computes with whole models, so backbone_only cannot go with it")
    return finish(merged, [first, *moved], data, device=device, progress=progress)
