"""Merge checkpoints that share their coordinates, key by key, with the keys and dtypes of the first model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..alignment.compatibility import Assumption, match_models
from ..alignment.correspondence import match_keys, match_submodels, tensors_equal, untie_for_merge, untie_like
from ..alignment.rows import Vocabulary, absent_in, lend_rows
from ..alignment.token_axes import overwrite_rows
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.lazy import Computed, InMemory, Lazy
from ..checkpoints.model_classes import is_recomputed
from ..checkpoints.precision import all_finite, rounded, sum_dtype
from ..errors import CheckpointError, MismatchError, OptionError
from ..modules.forward import refuse_read_once
from ..modules.functional import Device
from .parameters import ResolvedMethod, resolve_method


def combine(
    checkpoints: Sequence[Checkpoint],
    method: str | ResolvedMethod,
    parameters: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    backbone_only: bool = False,
) -> Checkpoint:
    """Merge checkpoints tensor by tensor; tensors of folders are merged when the result is saved or read.

    Sums are taken in float64 (in float32 for half precision) and rounded once, to `dtype` or to the dtype that the
    first model has for the key. Tensors that are not floating-point (token ids, batch counts) are the first model's,
    and so are the rows of tokens that no other model has.

    Args:
        checkpoints: the models; the first gives keys, shapes, dtypes, configuration and tokenizer.
        method: name of a file of `merging/methods/`, or a resolved method, which has its parameters.
        parameters: parameters of a named method; numbers may vary by tensor, see `hf_rebasin.merging.parameters`.
        dtype: dtype of the floating-point tensors of the result.
        backbone_only: keep the first model's head; the other models may have another head, or none.

    Raises:
        CheckpointError: a quantised model; when values are computed, NaN or Inf in a model or in the result (an
            overflow of `dtype`).
        MismatchError: tensors that are missing, left over or of another shape.
        UnknownNameError: an unknown method.
        OptionError: a parameter that does not fit.
    """
    resolved = resolve_method(method, parameters or {}) if isinstance(method, str) else method
    resolved.refuse_unfit(len(checkpoints))
    first, *others = checkpoints
    first = untie_for_merge(first, others)
    checkpoints = [first, *others]
    matched = [match_keys(first, checkpoint, backbone_only=backbone_only) for checkpoint in checkpoints]
    matched = [lend_rows(first.parts, parts, model) for parts, model in zip(matched, checkpoints, strict=True)]
    common = matched[-1]  # the keys are the same in all of them
    matched_submodels = [] if backbone_only else [match_submodels(first, checkpoint) for checkpoint in checkpoints]
    functions = resolved.functions_by_key(len(checkpoints), averaged_keys(first, common, backbone_only=backbone_only))
    submodels = {}
    for path, submodel in first.submodels.items():
        group = [submodel] if backbone_only else [checkpoint.submodels[path] for checkpoint in checkpoints]
        pairs = [matches[path] for matches in matched_submodels] or [{}]
        own = {key: functions[f"{path}/{key}"] for key in submodel.parts if f"{path}/{key}" in functions}
        submodels[path] = submodel.with_parts(_merge_keys(group, pairs, own, resolved, dtype))
    merged = first.with_parts(
        _merge_keys(checkpoints, matched, functions, resolved, dtype),
        name=f"{resolved.method.name} of {', '.join(c.name for c in checkpoints)}",
        sources=tuple(source for c in checkpoints for source in c.sources),
        commit=None,
        submodels=submodels,
    )
    return keep_own_rows(merged, checkpoints, backbone_only=backbone_only)


def keep_own_rows(merged: Checkpoint, models: Sequence[Checkpoint], *, backbone_only: bool = False) -> Checkpoint:
    """Return a merge with the first model's rows for tokens that no other model has, whatever the merge method is."""
    first, *others = models
    if not others or not all(other.absent_rows for other in others):
        return merged
    first = untie_like(first, others)
    absent = [absent_in(match_keys(first, other, backbone_only=backbone_only), other) for other in others]
    parts: dict[str, Lazy] = {}
    for key in set.intersection(*map(set, absent)) & merged.parts.keys():
        axes, rows = zip(*(rows_by_key[key] for rows_by_key in absent), strict=True)
        if own := sorted(set.intersection(*map(set, rows))):
            part = merged.parts[key]
            parts[key] = overwrite_rows(part, first.parts[key], axes[0], own, part.dtype)
    return merged.with_parts(parts) if parts else merged


def _merge_keys(
    checkpoints: Sequence[Checkpoint],
    matched: Sequence[Mapping[str, Lazy]],
    functions: Mapping[str, Callable[..., Tensor]],
    resolved: ResolvedMethod,
    dtype: torch.dtype | None,
) -> dict[str, Lazy]:
    """Return the merged tensors of checkpoints, by the first one's keys; tensors without a match are the first one's.

    Args:
        checkpoints: the models.
        matched: `{key of the first: tensor}` for each of them.
        functions: merge functions of the keys.
        resolved: the merge method.
        dtype: dtype of the floating-point tensors.
    """
    first, common = checkpoints[0], matched[-1]  # the keys are the same in all of them
    sums, streams = resolved.method.sums, resolved.method.streams
    parts: dict[str, Lazy] = {}
    for key, part in first.parts.items():
        out_dtype = part.dtype if dtype is None else dtype
        if not part.dtype.is_floating_point:
            if key in common:
                _refuse_differing_integers(key, [parts_by_key[key] for parts_by_key in matched], checkpoints)
        elif key in common:
            inputs = [parts_by_key[key] for parts_by_key in matched]
            compute = _KeyMerge(key=key, merge=functions[key], inputs=inputs, checkpoints=checkpoints, dtype=out_dtype)
            prepare = None if sums is None else partial(compute.with_sums, sums)
            parts[key] = Computed(part.shape, compute.dtype, inputs, compute, streams, prepare)
        elif not is_recomputed(key, part) and key not in first.passed_over:  # a tensor of the head that is kept
            copy = _KeyMerge(
                key=key, merge=lambda tensors: tensors[0], inputs=[part], checkpoints=checkpoints, dtype=out_dtype
            )
            parts[key] = Computed(part.shape, copy.dtype, [part], copy, True)
        if isinstance(part, InMemory) and key not in parts:  # its owner may change it later
            parts[key] = part.owned_copy()
    return parts


@dataclass(frozen=True, kw_only=True)
class _KeyMerge:
    """The merge of the tensors of one key, or of a chunk of each."""

    key: str
    merge: Callable[..., Tensor]
    inputs: Sequence[Lazy]
    checkpoints: Sequence[Checkpoint]
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """Dtype that sums are taken in."""
        return sum_dtype(self.dtype, *(part.dtype for part in self.inputs))

    @property
    def half(self) -> bool:
        """Whether everything is in half precision, so that sums in float32 are exact enough."""
        return self.wide == torch.float32

    def _widen(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.to(self.wide) for tensor in tensors]

    def with_sums(self, sums: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Lazy]) -> _KeyMerge:
        """Return a merge of chunks that knows the sums over the whole tensors."""
        total = torch.zeros((), dtype=torch.float64)
        for chunks in zip(*(part.chunks() for part in inputs), strict=True):
            total = total + sums(self._widen(chunks))
        return replace(self, merge=lambda tensors: self.merge(tensors, total))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        values = self._widen(tensors)
        for value, part, checkpoint in zip(values, self.inputs, self.checkpoints, strict=False):
            if not all_finite(value):
                checkpoint.refuse_values(part)
        merged = self.merge(values)
        out = rounded(merged, self.dtype)
        if self.half and not all_finite(out):  # bfloat16 has the range of float32, which sums of mask values overflow
            merged = self.merge([value.double() for value in values])
            out = rounded(merged, self.dtype)
        if not all_finite(out):
            raise CheckpointError(
                f"{self.key} of the merge has values that do not fit {self.dtype} (up to {merged.abs().max():.3g}); "
                "write a wider dtype"
            )
        return out


def _refuse_differing_integers(key: str, parts: Sequence[Lazy], checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse integers that differ, except counts: they are not averaged, and may be quantised weights."""
    for part, checkpoint in zip(parts, checkpoints, strict=True):
        if not key.endswith("num_batches_tracked") and not tensors_equal(part, parts[0]):
            raise MismatchError(
                f"{key} ({part.dtype}) differs between {checkpoints[0].name} and {checkpoint.name}, and only "
                "floating-point numbers are averaged; if the models are quantised, merge the originals"
            )


def averaged_keys(first: Checkpoint, common: Collection[str], *, backbone_only: bool = False) -> list[str]:
    """Return the keys of the first model that are merged: floating-point tensors that all models have.

    Those of sub-models, which belong to the head, follow with their sub-folder: `2_Dense/linear.weight`.
    """
    keys = [key for key, part in first.parts.items() if part.dtype.is_floating_point and key in common]
    for path, submodel in {} if backbone_only else first.submodels.items():
        keys += [f"{path}/{key}" for key, part in submodel.parts.items() if part.dtype.is_floating_point]
    return keys


def merge(
    models: Sequence[Source],
    method: str = "linear",
    *,
    dtype: torch.dtype | None = None,
    assume: Iterable[Assumption] = (),
    vocabulary: Vocabulary | None = None,
    backbone_only: bool = False,
    data: Iterable[Any] | None = None,
    device: Device = None,
    progress: bool = False,
    **parameters: Any,
) -> Checkpoint:
    """Merge models that share their coordinates already (align them first).

    Args:
        models: folders, Hub ids, modules, state dicts or checkpoints; the first gives keys, shapes, dtypes,
            configuration and tokenizer.
        method: name of a file of `hf_rebasin/merging/methods/`: "linear", "lerp", "slerp", "refit", "distil".
        dtype: dtype of the floating-point tensors of the result; by default the first model's.
        assume: aspects to take as equal without checking: "config" ("config:KEY" for one setting), "labels",
            "vocabulary".
        vocabulary: which rows of tokens the result has where the models have other tokens, or other numbers of rows:
            "first" for the first model's, its own ones where another model has none; "common" to cut its padding to
            the rows that all models have. By default such models are refused.
        backbone_only: keep the first model's head; the other models may have another head, or none.
        data: unlabelled batches that can be read several times, for "refit" and "distil".
        device: device that "refit" and "distil" compute on.
        progress: show a progress bar (on a terminal).
        parameters: parameters of the method, such as `t=0.3`. A number may vary by tensor: `t=[0, 0.5, 1]` from the
            first layer to the last, `t=[{"filter": "mlp", "value": 0.3}, {"value": 0.5}]` by the tensor's name.

    Returns:
        A `Checkpoint`: `.save(out)` writes a folder that `from_pretrained` loads, `.model()` makes a module. Merges of
        folders and Hub ids are computed as they are saved; those of modules and state dicts, which may change, are
        computed at once.

    Raises:
        MismatchError: tensors that are missing, left over or of another shape, or models with different meanings.
        CheckpointError: a quantised model; NaN or Inf, as soon as they are read.
        UnknownNameError: an unknown method.
        OptionError: a parameter that does not fit, or data that are missing or not needed.

    Example: `merge([a, b])` of weights 2 and 6 has (2 + 6) / 2 = 4; `merge([a, b], "lerp", t=0.25)` has 3.
    """
    if not models:
        raise OptionError("nothing to merge: give at least one model")
    first, *others = (Checkpoint.open(model) for model in models)
    for checkpoint in (first, *others):
        checkpoint.refuse_quantised()
    first.refuse_unloadable()
    first, compatible = match_models(first, others, assume, vocabulary=vocabulary, backbone_only=backbone_only)
    resolved = resolve_method(method, parameters)
    merged = combine([first, *compatible], resolved, dtype=dtype, backbone_only=backbone_only)
    finish = resolved.finish
    if (finish is None) != (data is None):
        problem = "does not use data" if finish is None else "needs data, and there are none"
        raise OptionError(f"merge method {method!r} {problem}; {'leave out' if finish is None else 'give'} data=")
    if finish is None or data is None:
        return merged
    refuse_read_once(data)
    if backbone_only:
        raise OptionError(f"merge method {method!r} runs whole models, so it cannot be combined with backbone_only")
    finished = finish(merged, [first, *compatible], data, device=device, progress=progress)
    return keep_own_rows(finished, [first, *compatible])
