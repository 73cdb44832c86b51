"""Parameters of merge methods, which may vary by tensor: gradients over the layers, and filters by the tensor's name.

    t: [0, 0.5, 1]                                   a gradient: 0 in the first layer, 0.5 halfway, 1 in the last one
    t: [{filter: mlp, value: 0.3}, {value: [0, 1]}]  the first entry whose filter occurs in the name; "*" always does
    weight: [0, 1]                                   a gradient for every model
    weights: [1, [0, 1]]                             one value per model, each of which may be a gradient or filtered

This is mergekit's notation. Merge methods never see it: they are called with the numbers for the tensor at hand.
Tensors outside of the layers are at one of the ends of a gradient; `Convention` says at which.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch

from .. import registry
from ..checkpoints.checkpoint import Checkpoint
from ..errors import OptionError, listed, nearest, quoted
from ..registry import MergeMethod, checked_keywords, coerce_value, is_per_model
from ..text import BEFORE_LAYERS, layer_of
from .pieces import BoundMethod

logger = logging.getLogger(__name__)

# Where gradients put tensors outside of the layers: "own" at the first number or the last one, whichever side of the
# layers they are on; "mergekit" all of them at the first number, as mergekit does.
Convention = Literal["own", "mergekit"]
REQUIRED = frozenset({"weights", "t"})  # parameters that need a value for every tensor if they are given


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

    def has_gradient(self) -> bool:
        """Whether any of the values depends on the depth."""
        return False


@dataclass(frozen=True)
class Gradient(Varying):
    """Numbers evenly spaced over the layers, with linear interpolation between them."""

    numbers: tuple[float, ...]

    def at(self, position: TensorPosition) -> float:
        x = position.depth * (len(self.numbers) - 1)
        i = min(int(x), len(self.numbers) - 2)
        (a, b), rest = self.numbers[i : i + 2], x - i
        return a + rest * (b - a) if rest < 0.5 else b - (1 - rest) * (b - a)  # exactly a and b at the ends

    def has_gradient(self) -> bool:
        return True


@dataclass(frozen=True)
class Steps(Varying):
    """Values that are not numbers, evenly spaced over the layers; each counts up to where the next one begins."""

    values: tuple[Any, ...]

    def at(self, position: TensorPosition) -> Any:
        return self.values[int(position.depth * (len(self.values) - 1))]

    def has_gradient(self) -> bool:
        return True


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

    def has_gradient(self) -> bool:
        return any(is_gradient(value) for _, value in self.entries)


@dataclass(frozen=True)
class Layered(Varying):
    """Values of several levels, the innermost first, of which the first one counts that has one for the tensor."""

    levels: tuple[Any, ...]

    def at(self, position: TensorPosition) -> Any:
        for value in self.levels:
            with suppress(LookupError):
                return value_at(value, position)
        raise LookupError

    def filters(self) -> Iterator[str]:
        for value in self.levels:
            yield from value.filters() if isinstance(value, Varying) else ()

    def has_gradient(self) -> bool:
        return any(map(is_gradient, self.levels))


@dataclass(frozen=True)
class PerModel(Varying):
    """One value per model, or one `shared` by all of them; None where a model has none of its own."""

    values: tuple[Any, ...]
    shared: bool = False

    def at(self, position: TensorPosition) -> list[Any]:
        return self.at_each([position] * len(self.values))

    def at_each(self, positions: Sequence[TensorPosition]) -> list[Any]:
        """Return the value for one tensor in every model, by its position and name in that model."""
        values = self.values * len(positions) if self.shared else self.values
        last = len(positions) - 1  # too many values are for the method to refuse
        return [value_at(value, positions[min(i, last)]) for i, value in enumerate(values)]

    def filters(self) -> Iterator[str]:
        for value in self.values:
            yield from value.filters() if isinstance(value, Varying) else ()

    def has_gradient(self) -> bool:
        return any(map(is_gradient, self.values))

    @property
    def varies(self) -> bool:
        """Whether any of the values depends on the tensor."""
        return any(isinstance(value, Varying) for value in self.values)


def value_at(value: Any, position: TensorPosition) -> Any:
    """Return the value for one tensor, whether it varies or not."""
    return value.at(position) if isinstance(value, Varying) else value


def is_gradient(value: Any) -> bool:
    """Whether a value depends on the depth of the tensor."""
    return isinstance(value, Varying) and value.has_gradient()


def varies(value: Any) -> bool:
    """Whether a value depends on the tensor."""
    return value.varies if isinstance(value, PerModel) else isinstance(value, Varying)


def read_parameter(kind: Any, raw: Any) -> Any:
    """Convert a raw value to a type, or to a `Varying` of values of that type.

    Raises:
        ValueError: the value is neither; the message says what is wrong.

    Example: `read_parameter(float, [0, 1])` is a gradient; `read_parameter(Sequence[float], [0, 1])` has a number for
    each of two models, and in `read_parameter(Sequence[float], [0, [0, 1]])` the second model has a gradient.
    """
    per_model = is_per_model(kind)
    if not isinstance(raw, list | tuple):
        return coerce_value(kind, raw)
    if per_model:
        if any(isinstance(item, Mapping) for item in raw):
            raise ValueError(
                "entries with filters belong to one model; give every model a number or a list of its own"
            )
        values = tuple(read_parameter(float, item) for item in raw) if _is_nested(raw) else ()
        return PerModel(values) if values else coerce_value(kind, raw)
    return Filtered(tuple(_read_entries(kind, raw))) if _is_nested(raw) else _read_gradient(kind, raw)


def _is_nested(raw: Sequence[Any]) -> bool:
    return any(isinstance(item, list | tuple | Mapping) for item in raw)


def _read_gradient(kind: Any, raw: Sequence[Any]) -> Gradient | Steps:
    if len(raw) < 2:
        raise ValueError(f"{quoted(raw)} does not fit: a gradient over the layers takes 2 numbers or more")
    if float not in (kind, *get_args(kind)):
        return Steps(tuple(coerce_value(kind, item) for item in raw))
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


def tensor_positions(names: Collection[str], convention: Convention = "own") -> dict[str, TensorPosition]:
    """Return the position of every tensor; each stack of layers (such as two towers) is counted on its own.

    The first number in a name is the layer's; in a ResNet it is the stage, and for an expert the layer that contains
    it. A layer that is alone in its stack counts as the last one. A tensor without a number comes before the first
    layer if `BEFORE_LAYERS` matches its name, and otherwise after the last one; by mergekit's convention it always
    comes before.
    """
    layers = {name: layer_of(name) for name in names}
    stacks: dict[str, set[int]] = {}
    for stack, number in filter(None, layers.values()):
        stacks.setdefault(stack, set()).add(number)
    order = {stack: sorted(numbers) for stack, numbers in stacks.items()}

    def depth(name: str, layer: tuple[str, int] | None) -> float:
        if layer is None:
            return 0.0 if convention == "mergekit" or BEFORE_LAYERS.search(name) else 1.0
        stack, number = layer
        numbers = order[stack]
        return numbers.index(number) / (len(numbers) - 1) if len(numbers) > 1 else 1.0

    return {name: TensorPosition(name, depth(name, layer)) for name, layer in layers.items()}


def has_filters(parameters: Mapping[str, Any]) -> bool:
    """Whether any parameter looks at the names of tensors."""
    return any(True for value in parameters.values() if isinstance(value, Varying) for _ in value.filters())


def refuse_unmatched_filters(parameters: Mapping[str, Any], names: Collection[str], convention: Convention) -> None:
    """Refuse filters that occur in no name; by mergekit's convention, which passes over them, only note them.

    Raises:
        OptionError: such a filter; the message suggests the nearest part of a name.
    """
    for parameter, value in parameters.items():
        for part in value.filters() if isinstance(value, Varying) else ():
            if not any(part in name for name in names):
                suggestion = nearest(part, _components_like(part, names))
                problem = f"{parameter}: no tensor has {quoted(part)} in its name{suggestion}"
                if convention == "own":
                    raise OptionError(problem)
                logger.info("%s", problem)


def values_by_key(
    parameters: Mapping[str, Any],
    names: Collection[str],
    models: int = 1,
    *,
    convention: Convention = "own",
    own_names: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the parameters of every tensor, as plain values.

    Args:
        parameters: `{parameter: value}`.
        names: names of the tensors.
        models: number of models.
        convention: where gradients put tensors outside of the layers. By mergekit's convention, parameters that no
            entry is for have their default.
        own_names: for every model `{name: the tensor's name in that model}`, which filters of its own values look at.

    Raises:
        OptionError: a tensor that no entry matches.
    """
    values: dict[str, dict[str, Any]] = {}
    unmatched: dict[str, list[str]] = {}
    for name, position in tensor_positions(names, convention).items():
        values[name] = {}
        positions = [replace(position, name=own[name]) for own in own_names] if own_names else [position] * models
        for parameter, value in parameters.items():
            try:
                if isinstance(value, PerModel):
                    values[name][parameter] = value.at_each(positions)
                else:
                    values[name][parameter] = value_at(value, position)
            except LookupError:
                if convention == "own" or parameter in REQUIRED:
                    unmatched.setdefault(parameter, []).append(name)
    for parameter, keys in unmatched.items():
        raise OptionError(f"{parameter}: no entry is for {listed(keys)}; end with one for all others, {{value: …}}")
    return values


def _components_like(like: str, names: Collection[str]) -> set[str]:
    """Return the parts of names that have as many components as `like`, except mere numbers."""
    length, components = like.strip(".").count(".") + 1, [name.split(".") for name in names]
    parts = {".".join(c[i : i + length]) for c in components for i in range(len(c) - length + 1)}
    return {part for part in parts if not part.isdigit()}


@dataclass(frozen=True, kw_only=True)
class ResolvedMethod:
    """A merge method with its parameters, looked up and converted once.

    Args:
        method: the plug-in.
        values: `{parameter: value}`, each of the parameter's type or a `Varying` of such values.
        convention: where gradients put tensors outside of the layers.
        seed: seed of random methods.
    """

    method: MergeMethod
    values: Mapping[str, Any]
    convention: Convention = "own"
    seed: int = 0

    @property
    def varying(self) -> list[str]:
        """The parameters that vary by tensor."""
        return [parameter for parameter, value in self.values.items() if varies(value)]

    def constants(self, models: int) -> dict[str, Any]:
        """Return the parameters that are the same for all tensors, as plain values for so many models."""
        position = TensorPosition("", 0.0)
        return {
            parameter: value.at_each([position] * models) if isinstance(value, PerModel) else value
            for parameter, value in self.values.items()
            if not varies(value)
        }

    def finish(
        self, models: Sequence[Checkpoint], base: Checkpoint | None = None, origins: Sequence[Checkpoint] | None = None
    ) -> Callable[..., Any] | None:
        """Return the second phase `(merge, models, data) -> checkpoint`, on the whole merge, if the method has one."""
        if self.method.finish is None:
            return None
        values: dict[str, Any] = self.constants(len(models)) | {"seed": self.seed}
        if base is not None:
            values |= {"base": base, "bases": origins or [base] * len(models)}
        return partial(self.method.finish, **self.method.keywords_for(self.method.finish, values))

    def refuse_unfit(self, models: int) -> None:
        """Raise OptionError if the method cannot merge so many models, as far as its constant parameters show."""
        self._try(self.constants(models), models)

    def _try(self, values: Mapping[str, Any], models: int) -> BoundMethod:
        self._refuse_numbers(values, models)
        bound = BoundMethod(method=self.method, values=values)
        zeros = [torch.zeros((), dtype=torch.float64)] * models
        bound(zeros, None if self.method.base == "none" else torch.zeros((), dtype=torch.float64))
        return bound

    def _refuse_numbers(self, values: Mapping[str, Any], models: int) -> None:
        """Raise OptionError for lists that are not one number per model, and for NaN and infinity in them."""
        for one_model, parameter in self.method.per_model.items():
            numbers = values.get(parameter)
            if numbers is None:
                continue
            if len(numbers) != models:
                raise OptionError(
                    f"{self.method.name} got {len(numbers)} {parameter} for {models} models; give one per model"
                )
            for number in numbers:
                if number is not None and not math.isfinite(number):
                    raise OptionError(f"{self.method.name} got {one_model} = {number}; give a finite number")

    def functions_by_key(
        self,
        models: int,
        keys: Collection[str],
        own_names: Sequence[Mapping[str, str]] | None = None,
    ) -> dict[str, BoundMethod]:
        """Return the method with its values for every key, each tried on zeros.

        Args:
            models: number of models.
            keys: names of the tensors.
            own_names: for every model `{key: its key in that model}`.

        Raises:
            OptionError: values that do not fit; the message names the key.
        """
        self.refuse_unfit(models)
        functions: dict[str, BoundMethod] = {}
        tried: dict[str, BoundMethod] = {}
        values = values_by_key(self.values, keys, models, convention=self.convention, own_names=own_names)
        for key, values_of_key in values.items():
            if (text := repr(values_of_key)) not in tried:
                try:
                    tried[text] = self._try(values_of_key, models)
                except OptionError as error:
                    raise OptionError(f"{key}: {error}" if self.varying else str(error)) from error
            functions[key] = tried[text]
        return functions


def resolve_method(
    name: str, parameters: Mapping[str, Any], *, convention: Convention = "own", seed: int = 0
) -> ResolvedMethod:
    """Look up a merge method and convert its parameters.

    A per-model parameter may be given for all models alike, by its singular: `density=0.5`.

    Raises:
        UnknownNameError: there is no such method.
        OptionError: an unknown parameter, a value that does not fit, or one that varies by tensor although the method
            fits whole models.
    """
    method = registry.merge_method(name)
    known = {**method.parameters, **dict.fromkeys(method.per_model, float)}
    values = checked_keywords(f"merge method {name!r}", known, parameters, read_parameter)
    for one_model, plural in method.per_model.items():
        if one_model in values:
            if plural in values:
                raise OptionError(f"merge method {name!r}: {plural} are given twice, also as {one_model}")
            values[plural] = PerModel((values.pop(one_model),), shared=True)
    return make_resolved(method, values, convention=convention, seed=seed)


def make_resolved(
    method: MergeMethod, values: Mapping[str, Any], *, convention: Convention = "own", seed: int = 0
) -> ResolvedMethod:
    """Return a method with values that are converted already; by mergekit's convention with mergekit's defaults.

    Raises:
        OptionError: a value varies by tensor although the method fits whole models.
    """
    defaults = method.mergekit if convention == "mergekit" else {}
    resolved = ResolvedMethod(method=method, values={**defaults, **values}, convention=convention, seed=seed)
    if resolved.varying and method.finish is not None:
        raise OptionError(
            f"merge method {method.name!r} fits whole models, with one number for all tensors; "
            f"{listed(resolved.varying)} cannot vary"
        )
    return resolved
