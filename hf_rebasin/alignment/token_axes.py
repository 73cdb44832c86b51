"""Token axes: which tensors of a model have a row for every token, and how these change with their number."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import Computed, Lazy
from ..checkpoints.model_classes import build_without_weights, copy_module, to_disk_keys
from ..errors import CheckpointError, MismatchError, SpecError
from ..symmetries.detection import detect_spec
from ..symmetries.patterns import Leaf
from ..symmetries.table import canonical_view, table_for

Axes: TypeAlias = Mapping[str, int]  # {canonical key of a tensor with a row for every token: axis of these rows}
NO_ROW = -1  # in place of a row that the other model does not have
GROWTH = 64  # tokens that a class is given more to see which of its tensors grow; all usual paddings divide it


def sizes_may_differ(fixed: Checkpoint, moving: Checkpoint) -> bool:
    """Whether configurations or shapes hint at other numbers of rows, without building a class."""
    sizes = [_vocabulary_sizes(checkpoint.raw_config) for checkpoint in (fixed, moving)]
    if sizes[0] != sizes[1]:  # a file may leave out the default of its class
        sizes = [_vocabulary_sizes(checkpoint.settings) for checkpoint in (fixed, moving)]
    return sizes[0] != sizes[1] or any(
        part.shape != moving.parts[key].shape for key, part in fixed.parts.items() if key in moving.parts
    )


def _vocabulary_sizes(settings: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Return the numbers of tokens that a configuration names, by their path."""
    sizes: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            sizes |= _vocabulary_sizes(value, f"{inside}{key}.")
        elif _is_vocabulary_size(key):
            sizes[inside + key] = value
    return sizes


def _is_vocabulary_size(key: object) -> bool:
    """Whether a setting is a number of tokens; BERT's `type_vocab_size` is a number of segments."""
    return str(key).endswith("vocab_size") and key != "type_vocab_size"


def find_token_axes(checkpoint: Checkpoint, other: Checkpoint) -> Axes | None:
    """Find the tensors that have a row for every token: by the table, the class, or else by both configurations.

    A class is built twice without weights, the second time for more tokens: the tensors that grow have such rows.
    Where no class is known, they are the tensors of another length in the other model, if both lengths are the numbers
    of tokens in the configurations. None if none of these tells.
    """
    if checkpoint.config is not None:
        with suppress(SpecError, CheckpointError, MismatchError):
            if table_for(checkpoint.config) is not None:
                tensors = detect_spec(checkpoint).tensors
                return {t.key: axis for t in tensors for axis, node in enumerate(t.axes) if _is_vocab(node)}
        with suppress(CheckpointError):
            if axes := _axes_by_class(checkpoint):
                return axes
    return _axes_by_sizes(checkpoint, other) or None


def _is_vocab(node: Any) -> bool:
    return isinstance(node, Leaf) and node.name == "vocab"


def _axes_by_class(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the tensors of a class that grow with its vocabulary."""
    small, large = (copy.deepcopy(checkpoint.config) for _ in range(2))
    text = large.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        return {}
    text.vocab_size += GROWTH
    shapes = []
    for config in (small, large):
        module = build_without_weights(config, len(checkpoint.parts))
        state = to_disk_keys(module, dict(module.state_dict()))
        shapes.append({checkpoint.canonical_key(key): tuple(tensor.shape) for key, tensor in state.items()})
    grown = {}
    for key, shape in shapes[0].items():
        larger = shapes[1].get(key, shape)
        differ = [axis for axis in range(len(shape)) if shape[axis] != larger[axis]]
        if len(differ) == 1:
            grown[key] = differ[0]
    return grown


def _axes_by_sizes(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, int]:
    """Return the tensors whose lengths differ by model as the vocabularies of the configurations do."""
    sizes = [_vocabulary_sizes(c.settings) for c in (checkpoint, other)]
    pairs = {(sizes[0][key], sizes[1][key]) for key in sizes[0].keys() & sizes[1].keys()}
    keys, keys_of_other = _keys_of(checkpoint, checkpoint), _keys_of(other, checkpoint)
    axes = {}
    for name in keys.keys() & keys_of_other.keys():
        shape, shape_of_other = checkpoint.parts[keys[name]].shape, other.parts[keys_of_other[name]].shape
        if len(shape) == len(shape_of_other):
            differ = [axis for axis in range(len(shape)) if shape[axis] != shape_of_other[axis]]
            if len(differ) == 1 and (shape[differ[0]], shape_of_other[differ[0]]) in pairs:
                axes[name] = differ[0]
    return axes


def _keys_of(checkpoint: Checkpoint, first: Checkpoint) -> dict[str, str]:
    """Return `{canonical key: disk key}` of a checkpoint, by the prefixes of the first model."""
    view = canonical_view(first)
    return checkpoint.canonical(first.base_prefix if view.prefix is None else view.prefix)


def find_rows(checkpoint: Checkpoint, axes: Axes) -> dict[str, int]:
    """Return `{disk key: axis}` of the tensors of a checkpoint that have a row for every token."""
    keys = _keys_of(checkpoint, checkpoint)
    return {keys[name]: axis for name, axis in axes.items() if name in keys}


def count_rows(checkpoint: Checkpoint, axes: Axes) -> int | None:
    """Return the number of rows of tokens; None if there are none, or if not all tensors have the same number."""
    counts = {checkpoint.parts[key].shape[axis] for key, axis in find_rows(checkpoint, axes).items()}
    return counts.pop() if len(counts) == 1 else None


def take_rows(part: Lazy, axis: int, rows: Sequence[int]) -> Lazy:
    """Return some rows of a tensor in another order; NO_ROW ones are zero."""
    shape = (*part.shape[:axis], len(rows), *part.shape[axis + 1 :])
    return Computed(shape, part.dtype, [part], partial(_take, axis, torch.tensor(rows)))


def _take(axis: int, rows: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    (tensor,) = inputs
    taken = tensor.index_select(axis, rows.clamp(min=0).to(tensor.device))
    return taken.index_fill_(axis, (rows < 0).nonzero()[:, 0].to(tensor.device), 0)


def overwrite_rows(part: Lazy, source: Lazy, axis: int, rows: Sequence[int], dtype: torch.dtype | None = None) -> Lazy:
    """Return a tensor with some rows of another, in a dtype that holds both unless one is given."""
    dtype = torch.promote_types(part.dtype, source.dtype) if dtype is None else dtype
    return Computed(part.shape, dtype, [part, source], partial(_overwrite, axis, torch.tensor(rows), dtype))


def _overwrite(axis: int, rows: Tensor, dtype: torch.dtype, inputs: Sequence[Tensor]) -> Tensor:
    tensor, source = inputs
    rows = rows.to(tensor.device)
    kept = source.to(tensor.device).index_select(axis, rows).to(dtype)
    return tensor.to(dtype, copy=True).index_copy_(axis, rows, kept)


def with_vocabulary_size(checkpoint: Checkpoint, before: int, after: int) -> Checkpoint:
    """Return a checkpoint whose configuration names another number of tokens, wherever it named the number before."""
    if before == after:
        return checkpoint
    other: dict[str, Any] = {}
    if checkpoint.template is not None:
        template = copy_module(checkpoint.template)
        template.resize_token_embeddings(after, mean_resizing=False)
        other["template"] = template
    if checkpoint.given_config is not None:
        config = copy.deepcopy(checkpoint.given_config)
        config.get_text_config().vocab_size = after
        other["given_config"] = config
    if checkpoint.written:
        other["written"] = _replace_size(checkpoint, before, after)
    return replace(checkpoint, **other)


def _replace_size(checkpoint: Checkpoint, before: int, after: int) -> dict[str, Any]:
    """Return the written configuration with another number of tokens, which it may have left out as a default."""

    def replaced(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: new_value(key, value) for key, value in settings.items()}

    def new_value(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return replaced(value)
        return after if _is_vocabulary_size(key) and value == before else value

    written, config = replaced(checkpoint.written), checkpoint.config
    if written != checkpoint.written or config is None:
        return written
    text = config.get_text_config()
    if text is config:
        return {**written, "vocab_size": after}
    path = next(name for name in config.sub_configs if getattr(config, name) is text)
    return {**written, path: {**written.get(path, {}), "vocab_size": after}}
