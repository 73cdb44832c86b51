"""Layers: cut some of them out of a model, so that a model can be put together from layers of several.

    cut, names = cut_layers(checkpoint, 8, 16, 0, before=True, after=True)   layers 8 to 15, a model by themselves
    cut, names = cut_layers(checkpoint, 8, 16, 8, before=False, after=True)  the second half of one with 16 layers

No tensor is read: what is cut is a selection of lazy tensors under other names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, OptionError, listed
from ..text import BEFORE_LAYERS, layer_of
from .checkpoint import Checkpoint
from .layer_settings import layer_counts, main_count, select_settings
from .lazy import Lazy, Tensors

SAME_PART = {"visual": "vision", "image": "vision", "language": "text", "speech": "audio"}  # words for parts of models


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model that `layer_range` counts.

    Args:
        prefix: what comes before a layer's number in the keys of its tensors: `"model.layers."`.
        count: number of layers.
        setting: dotted name of the setting of `config.json` that says so; empty where nothing does.
    """

    prefix: str
    count: int
    setting: str = ""


def find_stack(checkpoint: Checkpoint, keys: Collection[str] | None = None) -> LayerStack:
    """Return the stack of layers of a model: as many as its configuration says, by the keys of its tensors.

    Args:
        checkpoint: the model.
        keys: disk keys of the part of it to look at, such as one of `module_keys`; by default all.

    Raises:
        CheckpointError: there is no such stack, or there are several, as in an encoder-decoder.
    """
    left_out = {*checkpoint.passed_over, *checkpoint.unused}  # such as layers that predict further tokens
    numbers: dict[str, set[int]] = {}
    for key in checkpoint.parts if keys is None else keys:
        if key not in left_out and (layer := layer_of(key)) is not None:
            numbers.setdefault(layer[0], set()).add(layer[1])
    complete = {prefix: len(own) for prefix, own in numbers.items() if max(own) + 1 == len(own)}
    content = checkpoint.raw_config
    counts, main = layer_counts(content), main_count(content)
    fitting = {}
    for prefix, count in complete.items():
        settings = [setting for setting, number in counts.items() if number == count]
        if settings or not counts:
            fitting[prefix] = min(settings, key=lambda setting: _distance(setting, prefix), default="")
    if main is not None and "." not in main and not checkpoint.settings.get("is_encoder_decoder"):
        usual = {prefix: setting for prefix, setting in fitting.items() if setting == main}
        fitting = usual if usual and keys is None else fitting
    if not fitting:
        known = listed(f"{prefix}* ({count})" for prefix, count in complete.items()) or "none"
        wanted = listed(f"{setting} {number}" for setting, number in counts.items()) or "nothing of layers"
        raise CheckpointError(
            f"{checkpoint.name} has no stack of layers that can be cut: its config.json says {wanted}, and its "
            f"tensors have the stacks {known}"
        )
    if len(fitting) > 1:
        stacks = listed(f"{prefix}* ({complete[prefix]} layers)" for prefix in fitting)
        raise CheckpointError(
            f"{checkpoint.name} has several stacks of layers, {stacks}, and layer_range does not say which; cut them "
            "one by one, each under its own name in modules"
        )
    (prefix, setting), *_ = fitting.items()
    return LayerStack(prefix, complete[prefix], setting)


def _distance(setting: str, prefix: str) -> tuple[int, int]:
    """How far a setting's name is from a stack's: the place of its first word there, and how many words are not."""
    words = [SAME_PART.get(word, word) for word in re.split(r"[._]", prefix)]
    own = [word for word in re.split(r"[._]", setting) if word in SAME_PART.values() or word in ("encoder", "decoder")]
    places = [words.index(word) for word in own if word in words]
    return min(places, default=len(words)), len(own) - len(places)


def cut_layers(
    checkpoint: Checkpoint,
    start: int,
    stop: int,
    at: int,
    *,
    before: bool,
    after: bool,
    keys: Collection[str] | None = None,
) -> tuple[Checkpoint, dict[str, str]]:
    """Return a model with some of its layers only, and `{its key: key of the same tensor in the whole model}`.

    A head that shares the embedding is not stored, and is not part of a cut without that embedding; a tensor of a
    layer that shares one of a layer that goes is stored. The configuration has `at` layers more than are kept, those
    before them, so that the class knows all of its keys; `config_of_layers` makes the one of the finished model.

    Args:
        checkpoint: the model.
        start: first layer to keep, from 0.
        stop: the layer after the last one to keep.
        at: new number of the first layer.
        before: whether to keep the tensors that are used before the first layer, such as embeddings.
        after: whether to keep those that are used after the last layer: the last norm, the head, all else.
        keys: disk keys of the part of the model to cut, such as one of `module_keys`; by default all.

    Raises:
        CheckpointError: the model has no stack of layers, or several.
        OptionError: it does not have these layers.

    Example:
        >>> cut, names = cut_layers(checkpoint, 8, 16, 0, before=True, after=False)
        >>> names["model.layers.0.mlp.up_proj.weight"]
        'model.layers.8.mlp.up_proj.weight'
    """
    stack = find_stack(checkpoint, keys)
    if not 0 <= start < stop <= stack.count or at < 0:
        raise OptionError(
            f"layer_range [{start}, {stop}] does not fit {checkpoint.name}: it has {stack.count} layers "
            f"({stack.prefix}*), so 0 <= first < end <= {stack.count}"
        )
    names: dict[str, str] = {}  # {key: new key}, also of tied tensors that are not stored
    ties = checkpoint.declared_ties
    stored = list(checkpoint.parts if keys is None else keys)
    shared = [key for key in ties if key not in checkpoint.parts and (keys is None or ties[key] in keys)]
    for key in [*stored, *shared]:
        layer = layer_of(key)
        if layer is not None and layer[0] == stack.prefix:
            if start <= layer[1] < stop:
                number = str(layer[1])
                names[key] = f"{stack.prefix}{layer[1] - start + at}{key[len(stack.prefix) + len(number) :]}"
        elif before if BEFORE_LAYERS.search(key) else after:
            names[key] = key
    own_ties = {names[target]: names[source] for target, source in ties.items() if {target, source} <= names.keys()}
    sources = {names[key]: key for key in stored if key in names}
    for key in shared:  # a layer needs its tensors, wherever they were stored
        if key in names and ties[key] not in names and key.startswith(stack.prefix):
            sources[names[key]] = ties[key]
    parts: dict[str, Lazy] = {new: checkpoint.parts[key] for new, key in sources.items()}
    absent = {new: checkpoint.absent_rows[key] for new, key in sources.items() if key in checkpoint.absent_rows}
    layers = [start] * at + list(range(start, stop))
    cut = replace(
        checkpoint,
        tensors=Tensors(parts),
        name=f"layers {start} to {stop - 1} of {checkpoint.name}",
        given_ties=own_ties,
        template=None,
        absent_rows=absent,
        origin=checkpoint.origin or checkpoint,
        **_config_fields(checkpoint, layers, stack.setting),
    )
    return cut, sources


def _config_fields(checkpoint: Checkpoint, layers: list[int], setting: str) -> dict[str, Any]:
    """Return the fields of a checkpoint that hold its configuration, for a choice of its layers."""
    if not setting:
        return {}
    content: Mapping[str, Any] = select_settings(checkpoint.raw_config, layers, setting)
    if checkpoint.given_config is None:
        return {"written": content}
    return {"given_config": type(checkpoint.given_config).from_dict(dict(content))}
