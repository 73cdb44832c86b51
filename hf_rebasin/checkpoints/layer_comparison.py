"""Comparison of layers: whether the class of a model makes the same of layers that have other numbers.

What a layer is may depend on its number in ways that no configuration says: an attention that slides in every sixth
one, a norm that only the first has, a scale. So two modules without weights are compared, layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..errors import CheckpointError, listed, quoted


def refuse_other_layers(old: nn.Module, new: nn.Module, count: int, layers: Sequence[int], cause: str = "") -> None:
    """Raise CheckpointError if layers of one module are other ones in another module of its class.

    Tensors that belong to no layer have to keep their shapes, too.

    Args:
        old: a module with `count` layers.
        new: a module of the same class, whose layer i is to be layer `layers[i]` of the other.
        count: number of layers.
        layers: numbers of the layers that were chosen.
        cause: settings that may be the reason, for the message.
    """
    hint = f" (perhaps {cause})" if cause else ""
    stacks = dict(_stacks(old, new, count, layers))
    if not stacks:
        raise CheckpointError(f"{type(old).__name__} has no stack of {count} layers that can be cut")
    for name, (sources, results) in stacks.items():
        for i, layer in enumerate(layers):
            if difference := _difference(sources[layer], results[i], count, layers, (layer, i)):
                raise CheckpointError(
                    f"layer {layer} would become another one as layer {i} of {name}: {difference}; that depends on "
                    f"its number, or on how many there are, in {type(old).__name__}{hint}; choose other layers"
                )
    inside = tuple(f"{name}." for name in stacks)
    shapes = {key: tensor.shape for key, tensor in new.state_dict().items()}
    for key, tensor in old.state_dict().items():
        if not key.startswith(inside) and tensor.shape != shapes.get(key):
            had = f"has the shape {tuple(tensor.shape)}, and {tuple(shapes[key])} is needed" if key in shapes else ""
            raise CheckpointError(
                f"{key} {had or 'is not needed any more'} with {len(layers)} layers instead of {count}; a part of it "
                f"belongs to each layer, so layers of {type(old).__name__} cannot be taken out or repeated"
            )


def _stacks(
    old: nn.Module, new: nn.Module, count: int, layers: Sequence[int]
) -> Iterator[tuple[str, tuple[nn.ModuleList, nn.ModuleList]]]:
    """Yield the lists of modules that have an entry per layer, of two modules of one class, by their names."""
    counterparts = dict(new.named_modules())
    within: str | None = None
    for name, module in old.named_modules():
        other = counterparts.get(name)
        if within is not None and name.startswith(within):
            continue
        if isinstance(module, nn.ModuleList) and isinstance(other, nn.ModuleList):
            within = f"{name}."  # a layer's own lists are compared with the layer
            if len(module) == count and len(other) == len(layers):
                yield name, (module, other)


def _difference(
    old: nn.Module, new: nn.Module, count: int, layers: Sequence[int], pair: tuple[int, int]
) -> str | None:
    """Describe how a layer differs from the layer that it was, with their numbers `pair`; None if they are alike."""
    if type(old) is not type(new):
        return f"a {type(new).__name__} instead of a {type(old).__name__}"
    parts, others = (
        {name: part for name, part in layer.named_modules() if "drop" not in name.rpartition(".")[2]}
        for layer in (old, new)
    )
    if parts.keys() != others.keys():
        return f"{listed(sorted(parts.keys() ^ others.keys()))} in only one of them"
    for name, part in parts.items():
        if type(part) is not type(others[name]):
            return f"{name} a {type(others[name]).__name__} instead of a {type(part).__name__}"
        attributes, new_attributes = _plain_attributes(part), _plain_attributes(others[name])
        for key, value in attributes.items():
            other = new_attributes.get(key)
            by_layer = isinstance(value, list | tuple) and len(value) == count
            expected = [value[layer] for layer in layers] if by_layer else value  # a list of all layers
            if other not in (value, expected) and not _is_number_of_layer(key, value, other, pair):
                return f"{'.'.join(filter(None, (name, key)))} {quoted(other)} instead of {quoted(value)}"
    shapes = {key: tensor.shape for key, tensor in new.state_dict().items()}
    for key, tensor in old.state_dict().items():
        if tensor.shape != shapes.get(key):
            return f"{key} {tuple(shapes.get(key, ()))} instead of {tuple(tensor.shape)}"
    return None


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are numbers, words or lists of these; not those for training."""
    return {
        key: value
        for key, value in vars(module).items()
        if "drop" not in key and (value is None or isinstance(value, bool | int | float | str | list | tuple))
    }


def _is_number_of_layer(key: str, value: Any, other: Any, pair: tuple[int, int]) -> bool:
    """Whether an attribute is as far from its layer's number in both; or from its double, where a layer is two."""
    if type(value) is not int or type(other) is not int or not re.search("layer|idx|index|depth", key):
        return False
    return value - other in (pair[0] - pair[1], 2 * (pair[0] - pair[1]))
