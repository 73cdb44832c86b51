"""Merge checkpoints that share their coordinates, key by key, with the keys and dtypes of the first model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from typing import Any

import torch

from .. import registry
from ..alignment.compatibility import Assumption, match_models
from ..alignment.correspondence import (
    head_keys,
    match_keys,
    match_submodels,
    tensors_equal,
    untie_for_merge,
    untie_like,
)
from ..alignment.rows import Vocabulary, absent_in, lend_rows
from ..alignment.token_axes import overwrite_rows
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.lazy import InMemory, Lazy
from ..checkpoints.model_classes import is_recomputed
from ..errors import CheckpointError, MismatchError, OptionError
from ..modules.forward import refuse_read_once
from ..modules.functional import Device
from ..registry import MergeMethod
from ..text import layer_of
from .parameters import ResolvedMethod, refuse_unmatched_filters, resolve_method
from .pieces import BoundMethod, MergedTensor
from .randomness import content_hash, streams

EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared)(\.|$)")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|score|classifier|decoder)\.(weight|bias)$")


def combine(
    checkpoints: Sequence[Checkpoint],
    method: str | ResolvedMethod,
    parameters: Mapping[str, Any] | None = None,
    *,
    base: Checkpoint | None = None,
    origins: Sequence[Checkpoint] | None = None,
    own_names: Sequence[Mapping[str, str]] | None = None,
    dtype: torch.dtype | None = None,
    input_dtype: torch.dtype | None = None,
    backbone_only: bool = False,
) -> Checkpoint:
    """Merge checkpoints tensor by tensor; tensors of folders are merged when the result is saved or read.

    Sums are taken in float64 (averages of half precision in float32) and rounded once, to `dtype` or to the dtype that
    the first model has for the key. Tensors that are not floating-point (token ids, batch counts) are the first
    model's, and so are the rows of tokens that no other model has. The first model is the base where there is one.

    Args:
        checkpoints: the models; the first gives keys, shapes, dtypes, configuration and tokenizer.
        method: name of a file of `merging/methods/`, or a resolved method, which has its parameters.
        parameters: parameters of a named method; numbers may vary by tensor, see `hf_rebasin.merging.parameters`.
        base: the base model of methods that merge differences; it is not one of the checkpoints, and comes first.
        origins: for every checkpoint the model that its difference is taken from; by default the base.
        own_names: for every checkpoint `{key of the first: key that filters look at}`; by default the first model's.
        dtype: dtype of the floating-point tensors of the result.
        input_dtype: dtype that values, and differences from the base, are rounded to before they are merged, as in
            mergekit; by default they are not.
        backbone_only: keep the first model's head; the other models may have another head, or none.

    Raises:
        CheckpointError: a quantised model; when values are computed, NaN or Inf in a model or in the result (an
            overflow of `dtype`).
        MismatchError: tensors that are missing, left over or of another shape.
        UnknownNameError: an unknown method.
        OptionError: a parameter that does not fit, or a base that the method lacks or does not use.
    """
    resolved = resolve_method(method, parameters or {}) if isinstance(method, str) else method
    refuse_unfit_base(resolved.method, base is not None)
    resolved.refuse_unfit(len(checkpoints))
    separate = [origin for origin in origins or () if origin is not base]
    everything = [*([] if base is None else [base]), *checkpoints, *separate]
    first = untie_for_merge(everything[0], everything[1:])
    everything[0] = first
    matched = [match_keys(first, checkpoint, backbone_only=backbone_only) for checkpoint in everything]
    matched = [lend_rows(first.parts, parts, model) for parts, model in zip(matched, everything, strict=True)]
    common = matched[-1]  # the keys are the same in all of them
    matched_submodels = [] if backbone_only else [match_submodels(first, checkpoint) for checkpoint in everything]
    keys = averaged_keys(first, common, backbone_only=backbone_only)
    functions = resolved.functions_by_key(len(checkpoints), keys, own_names)
    roles = _Roles.of(len(checkpoints), base, origins)
    contents = [cache(partial(content_hash, checkpoint)) for checkpoint in checkpoints]
    asked = inspect.signature(resolved.method.merge).parameters
    job = _Job(
        everything,
        roles,
        resolved,
        find_lookups(first) if "lookup" in asked else frozenset(),
        find_transposed(first) if "transposed" in asked else frozenset(),
        contents,
        input_dtype,
    )
    submodels = {}
    for path, submodel in first.submodels.items():
        group = [submodel] if backbone_only else [checkpoint.submodels[path] for checkpoint in everything]
        pairs = [matches[path] for matches in matched_submodels] or [{}]
        own = {key: functions[f"{path}/{key}"] for key in submodel.parts if f"{path}/{key}" in functions}
        submodels[path] = submodel.with_parts(_merge_keys(replace(job, models=group), pairs, own, dtype))
    merged = first.with_parts(
        _merge_keys(job, matched, functions, dtype),
        name=f"{resolved.method.name} of {', '.join(c.name for c in checkpoints)}",
        sources=tuple(source for c in everything for source in c.sources),
        commit=None,
        submodels=submodels,
    )
    return keep_own_rows(merged, everything, backbone_only=backbone_only)


def refuse_unfit_base(method: MergeMethod, has_base: bool) -> None:
    """Raise OptionError if a method needs a base model and has none, or has one without any use for it."""
    if method.base == "required" and not has_base:
        raise OptionError(
            f"merge method {method.name!r} merges differences from the model that was fine-tuned, and no base model "
            "is named; name it (base_model in a recipe, --base, base= in Python)"
        )
    if method.base == "none" and has_base:
        raise OptionError(
            f"merge method {method.name!r} does not use a base model; leave it out, or list it as a model"
        )


def find_lookups(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the keys of tensors whose rows are those of tokens or classes: embeddings, and heads that end in them."""
    prefix = checkpoint.base_prefix
    heads = head_keys(checkpoint, prefix) if prefix else set()
    return frozenset(
        key
        for key in checkpoint.parts
        if layer_of(key) is None and (key in heads or EMBEDDING.search(key) or HEAD.search(key))
    )


def find_transposed(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the keys of matrices that are stored as (inputs, outputs), which those of transformers' Conv1D are.

    Nothing is known of models whose class cannot be built.
    """
    try:
        module, keys = checkpoint.skeleton()
    except CheckpointError:
        return frozenset()
    weights = (f"{name}.weight" for name, part in module.named_modules() if type(part).__name__ == "Conv1D")
    return frozenset(keys[name] for name in weights if name in keys)


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """Which of the models, by number, are merged, and which ones their differences are taken from.

    Args:
        merged: the models that are merged.
        origins: for every one of them the model that its difference is taken from; None without a base.
    """

    merged: Sequence[int]
    origins: Sequence[int] | None

    @staticmethod
    def of(count: int, base: Checkpoint | None, origins: Sequence[Checkpoint] | None) -> _Roles:
        """Number the base, then the models, then the other origins."""
        if base is None:
            return _Roles(merged=range(count), origins=None)
        numbers, at = list[int](), count + 1
        for origin in origins or [base] * count:
            numbers.append(0 if origin is base else at)
            at += origin is not base
        return _Roles(merged=range(1, count + 1), origins=numbers)


@dataclass(frozen=True)
class _Job:
    """What the merge of every tensor has in common."""

    models: Sequence[Checkpoint]
    roles: _Roles
    resolved: ResolvedMethod
    lookups: frozenset[str]
    transposed: frozenset[str]
    contents: Sequence[Callable[[], bytes]]
    input_dtype: torch.dtype | None = None


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
    job: _Job, matched: Sequence[Mapping[str, Lazy]], functions: Mapping[str, BoundMethod], dtype: torch.dtype | None
) -> dict[str, Lazy]:
    """Return the merged tensors of checkpoints, by the first one's keys; tensors without a match are the first one's.

    Args:
        job: the models and what is done to them.
        matched: `{key of the first: tensor}` for each of the models.
        functions: merge functions of the keys.
        dtype: dtype of the floating-point tensors.
    """
    first, common = job.models[0], matched[-1]  # the keys are the same in all of them
    copy = BoundMethod(method=registry.merge_method("passthrough"))
    parts: dict[str, Lazy] = {}
    for key, part in first.parts.items():
        out_dtype = part.dtype if dtype is None else dtype
        if not part.dtype.is_floating_point:
            if key in common:
                _refuse_differing_integers(key, [parts_by_key[key] for parts_by_key in matched], job.models)
        elif key in common:
            tensors = [parts_by_key[key] for parts_by_key in matched]
            if dtype is None and job.resolved.convention == "mergekit":
                out_dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
            origins = None if job.roles.origins is None else [tensors[i] for i in job.roles.origins]
            parts[key] = MergedTensor(
                part.shape,
                out_dtype,
                key=key,
                bound=functions[key],
                inputs=[tensors[i] for i in job.roles.merged],
                base=None if origins is None else tensors[0],
                origins=origins,
                streams=streams(job.resolved.seed, key, job.contents),
                lookup=key in job.lookups,
                transposed=key in job.transposed,
                input_dtype=job.input_dtype,
                models=job.models,
            )
        elif not is_recomputed(key, part) and key not in first.passed_over:  # a tensor of the head that is kept
            parts[key] = MergedTensor(part.shape, out_dtype, key=key, bound=copy, inputs=[part], models=[first])
        if isinstance(part, InMemory) and key not in parts:  # its owner may change it later
            parts[key] = part.owned_copy()
    return parts


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
    base: Source | None = None,
    seed: int = 0,
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
        models: folders, Hub ids, modules, state dicts or checkpoints; the first, or the base, gives keys, shapes,
            dtypes, configuration and tokenizer.
        method: name of a file of `hf_rebasin/merging/methods/`: "linear", "slerp", "ties", "refit", …
        base: the model that the others were fine-tuned from, for methods that merge differences from it.
        seed: seed of methods that draw random numbers, such as "dare_ties".
        dtype: dtype of the floating-point tensors of the result; by default the first model's.
        assume: aspects to take as equal without checking: "config" ("config:KEY" for one setting), "labels",
            "vocabulary".
        vocabulary: which rows of tokens the result has where the models have other tokens, or other numbers of rows:
            "first" for the first model's, its own ones where another model has none; "common" to cut its padding to
            the rows that all models have. By default such models are refused.
        backbone_only: keep the first model's head; the other models may have another head, or none.
        data: unlabelled batches that can be read several times, for methods that fit the merge, such as "refit"; for
            "fisher" and the "regmean" methods better `OwnBatches`, with the data of every model's own task.
        device: device that these methods compute on.
        progress: show a progress bar (on a terminal).
        parameters: parameters of the method, such as `t=0.3`. A number may vary by tensor: `t=[0, 0.5, 1]` from the
            first layer to the last, `t=[{"filter": "mlp", "value": 0.3}, {"value": 0.5}]` by the tensor's name. What
            differs by model has two names: `weights=[1, 3]` for one number per model, `weight=1` for all alike.

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
    resolved = resolve_method(method, parameters, seed=seed)
    refuse_unfit_base(resolved.method, base is not None)
    first, *others = (Checkpoint.open(model) for model in ([] if base is None else [base]) + list(models))
    for checkpoint in (first, *others):
        checkpoint.refuse_quantised()
    first.refuse_unloadable()
    first, compatible = match_models(first, others, assume, vocabulary=vocabulary, backbone_only=backbone_only)
    opened_base, merging = (None, [first, *compatible]) if base is None else (first, compatible)
    names = averaged_keys(first, first.parts, backbone_only=backbone_only)
    refuse_unmatched_filters(resolved.values, names, resolved.convention)
    merged = combine(merging, resolved, base=opened_base, dtype=dtype, backbone_only=backbone_only)
    if (resolved.method.finish is None) != (data is None):
        unused = resolved.method.finish is None
        problem = "does not use data" if unused else "needs data, and there are none"
        raise OptionError(f"merge method {method!r} {problem}; {'leave out' if unused else 'give'} data=")
    finish = resolved.finish(merging, opened_base)
    if finish is None or data is None:
        return merged
    refuse_read_once(data)
    if backbone_only:
        raise OptionError(f"merge method {method!r} runs whole models, so it cannot be combined with backbone_only")
    finished = finish(merged, merging, data, device=device, progress=progress)
    return keep_own_rows(finished, [first, *compatible])
