"""Parameters of merge methods, which may vary by tensor: gradients over the layers, and filters by the tensor's name.

    t: [0, 0.5, 1]                                   a gradient: 0 in the first layer, 0.5 halfway, 1 in the last one
    t: [{filter: mlp, value: 0.3}, {value: [0, 1]}]  the first entry whose filter occurs in the name; "*" always does
    weights: [1, [0, 1]]                             one value per model, each of which may be a gradient or filtered

This is mergekit's notation. Merge methods never see it: they are called with the numbers for the tensor at hand.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from .. import registry
from ..errors import OptionError, listed, nearest, quoted
from ..registry import MergeMethod, checked_keywords, coerce_value
from ..text import layer_of

# Names of tensors that are used before the first layer. All others without a layer (last norms, heads) come after it.
BEFORE_LAYERS = re.compile(
    r"embed(?!_out)|(^|\.)(wte|wpe|shared|cls_token|project_in|pre_layrnorm|stem|conv_stem|conv1|bn1)(\.|$)"
)


@dataclass(frozen=True)
class TensorPosition:
    """A tensor's name, and its depth in the model: 0 is the first layer, 1 the last one."""

    name: str
    depth: float


class Varying(ABC):
    """A value that depends on the tensor."""

    @abstractmethod
    def at(self, position: TensorPosition) -> Any:
        """Return the value for one tensor; LookupError if there is none."""

    def filters(self) -> Iterator[str]:
        """Yield the parts of names that are asked for."""
        yield from ()


@dataclass(frozen=True)
class Gradient(Varying):
    """Numbers evenly spaced over the layers, with linear interpolation between them."""

    numbers: tuple[float, ...]

    def at(self, position: TensorPosition) -> float:
        x = position.depth * (len(self.numbers) - 1)
        i = min(int(x), len(self.numbers) - 2)
        (a, b), rest = self.numbers[i : i + 2], x - i
        return a + rest * (b - a) if rest < 0.5 else b - (1 - rest) * (b - a)  # exactly a and b at the ends


@dataclass(frozen=True)
class Filtered(Varying):
    """Pairs (filter, value), of which the first one counts whose filter occurs in the name; None matches all names."""

    entries: tuple[tuple[str | None, Any], ...]

    def at(self, position: TensorPosition) -> Any:
        for part, value in self.entries:
            if part is None or part in position.name:
                return value_at(value, position)
        raise LookupError

    def filters(self) -> Iterator[str]:
        yield from (part for part, _ in self.entries if part is not None)


@dataclass(frozen=True)
class PerModel(Varying):
    """One value per model."""

    values: tuple[Any, ...]

    def at(self, position: TensorPosition) -> list[Any]:
        return [value_at(value, position) for value in self.values]

    def filters(self) -> Iterator[str]:
        for value in self.values:
            yield from value.filters() if isinstance(value, Varying) else ()


def value_at(value: Any, position: TensorPosition) -> Any:
    """Return the value for one tensor, whether it varies or not."""
    return value.at(position) if isinstance(value, Varying) else value


def read_parameter(kind: Any, raw: Any) -> Any:
    """Convert a raw value to a type, or to a `Varying` of values of that type.

    Raises:
        ValueError: the value is neither; the message says what is wrong.

    Example: `read_parameter(float, [0, 1])` is a gradient; `read_parameter(Sequence[float], [0, 1])` has a number for
    each of two models, and in `read_parameter(Sequence[float], [0, [0, 1]])` the second model has a gradient.
    """
    kinds = (kind, *get_args(kind))  # for `float | None` also float
    per_model = any(get_args(member) in ((float,), (float, ...)) for member in kinds)
    if not isinstance(raw, list | tuple) or not (per_model or _is_nested(raw) or float in kinds):
        return coerce_value(kind, raw)
    if per_model:
        if any(isinstance(item, Mapping) for item in raw):
            raise ValueError(
                "entries with filters belong to one model; give every model a number or a list of its own"
            )
        values = tuple(read_parameter(float, item) for item in raw) if _is_nested(raw) else ()
        return PerModel(values) if values else coerce_value(kind, raw)
    return Filtered(tuple(_read_entries(kind, raw))) if _is_nested(raw) else _read_gradient(raw)


def _is_nested(raw: Sequence[Any]) -> bool:
    return any(isinstance(item, list | tuple | Mapping) for item in raw)


def _read_gradient(raw: Sequence[Any]) -> Gradient:
    if len(raw) < 2:
        raise ValueError(f"{quoted(raw)} does not fit: a gradient over the layers takes 2 numbers or more")
    for number in raw:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(
                f"{quoted(raw)} does not fit: {quoted(number)} in a gradient over the layers is not a number"
            )
    return Gradient(tuple(coerce_value(float, number) for number in raw))


def _read_entries(kind: Any, raw: Sequence[Any]) -> Iterator[tuple[str | None, Any]]:
    for i, entry in enumerate(raw):
        if not isinstance(entry, Mapping) or "value" not in entry:
            raise ValueError(f"{quoted(entry)} does not fit: write entries as {{filter: part of a name, value: …}}")
        if unknown := [key for key in entry if key not in ("filter", "value")]:
            raise ValueError(f"{unknown[0]}: no such key of an entry{nearest(str(unknown[0]), ('filter', 'value'))}")
        part, value = entry.get("filter"), entry["value"]
        if part is not None and (not isinstance(part, str) or not part):
            raise ValueError(f"filter {quoted(part)} does not fit: give a part of tensor names")
        part = None if part == "*" else part
        if part is None and i + 1 < len(raw):
            raise ValueError(f"entries after the one for all tensors (number {i + 1}) are never used; put it last")
        if isinstance(value, list | tuple) and _is_nested(value):
            raise ValueError(f"{quoted(value)} does not fit: the value of an entry is a number or a gradient")
        yield part, read_parameter(kind, value)


def tensor_positions(names: Collection[str]) -> dict[str, TensorPosition]:
    """Return the position of every tensor; each stack of layers (such as two towers) is counted on its own.

    The first number in a name is the layer's; in a ResNet it is the stage, and for an expert the layer that contains
    it. A layer that is alone in its stack counts as the last one. A tensor without a number comes before the first
    layer if `BEFORE_LAYERS` matches its name, and otherwise after the last one.
    """
    layers = {name: layer_of(name) for name in names}
    stacks: dict[str, set[int]] = {}
    for stack, number in filter(None, layers.values()):
        stacks.setdefault(stack, set()).add(number)
    order = {stack: sorted(numbers) for stack, numbers in stacks.items()}

    def depth(name: str, layer: tuple[str, int] | None) -> float:
        if layer is None:
            return 0.0 if BEFORE_LAYERS.search(name) else 1.0
        stack, number = layer
        numbers = order[stack]
        return numbers.index(number) / (len(numbers) - 1) if len(numbers) > 1 else 1.0

    return {name: TensorPosition(name, depth(name, layer)) for name, layer in layers.items()}


def values_by_key(parameters: Mapping[str, Any], names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the parameters of every tensor, as plain numbers.

    Raises:
        OptionError: a filter that occurs in no name, or a tensor that no entry matches.
    """
    for parameter, value in parameters.items():
        for part in value.filters() if isinstance(value, Varying) else ():
            if not any(part in name for name in names):
                suggestion = nearest(part, _components_like(part, names))
                raise OptionError(f"{parameter}: no tensor has {quoted(part)} in its name{suggestion}")
    values: dict[str, dict[str, Any]] = {}
    unmatched: dict[str, list[str]] = {}
    for name, position in tensor_positions(names).items():
        values[name] = {}
        for parameter, value in parameters.items():
            try:
                values[name][parameter] = value_at(value, position)
            except LookupError:
                unmatched.setdefault(parameter, []).append(name)
    for parameter, keys in unmatched.items():
        raise OptionError(f"{parameter}: no entry is for {listed(keys)}; end with one for all others, {{value: …}}")
    return values


def _components_like(like: str, names: Collection[str]) -> set[str]:
    """Return the parts of names that have as many components as `like`, except mere numbers."""
    length, components = like.strip(".").count(".") + 1, [name.split(".") for name in names]
    parts = {".".join(c[i : i + length]) for c in components for i in range(len(c) - length + 1)}
    return {part for part in parts if not part.isdigit()}


@dataclass(frozen=True)
class ResolvedMethod:
    """A merge method with its parameters, looked up and converted once.

    Args:
        method: the plug-in.
        values: `{parameter: value}`, each of the parameter's type or a `Varying` of such values.
    """

    method: MergeMethod
    values: Mapping[str, Any]

    @property
    def varying(self) -> list[str]:
        """The parameters that vary by tensor."""
        return [parameter for parameter, value in self.values.items() if isinstance(value, Varying)]

    @property
    def finish(self) -> Callable[..., Any] | None:
        """The second phase `(merge, models, data) -> checkpoint`, on the whole merge; most methods have none."""
        return None if self.method.finish is None else partial(self.method.finish, **self.values)

    def refuse_unfit(self, models: int) -> None:
        """Raise OptionError if the method cannot merge so many models, as far as its constant parameters show."""
        fixed = {parameter: value for parameter, value in self.values.items() if parameter not in self.varying}
        self.method.merge([torch.zeros(())] * models, **fixed)

    def functions_by_key(self, models: int, keys: Collection[str]) -> dict[str, Callable[..., Tensor]]:
        """Return a merge function for every key, each tried on scalars; OptionError names the key where one fails."""
        self.refuse_unfit(models)
        functions: dict[str, Callable[..., Tensor]] = {}
        tried: dict[str, Callable[..., Tensor]] = {}
        for key, values in (values_by_key(self.values, keys) if keys else {}).items():
            if (text := repr(values)) not in tried:
                tried[text] = partial(self.method.merge, **values)
                try:
                    tried[text]([torch.zeros(())] * models)
                except OptionError as error:
                    raise OptionError(f"{key}: {error}" if self.varying else str(error)) from error
            functions[key] = tried[text]
        return functions


def resolve_method(name: str, parameters: Mapping[str, Any]) -> ResolvedMethod:
    """Look up a merge method and convert its parameters.

    Raises:
        UnknownNameError: there is no such method.
        OptionError: an unknown parameter, a value that does not fit, or one that varies by tensor although the method
            fits whole models.
    """
    method = registry.merge_method(name)
    values = checked_keywords(f"merge method {name!r}", method.merge, parameters, read_parameter)
    resolved = ResolvedMethod(method, values)
    if resolved.varying and method.finish is not None:
        raise OptionError(
            f"merge method {name!r} fits whole models, with one number for all tensors; {listed(resolved.varying)} "
            "cannot vary"
        )
    return resolved
