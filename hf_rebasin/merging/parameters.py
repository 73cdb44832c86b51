"""Knobs that are others for other tensors: gradients over the layers, and filters by the tensor's name.

    t: [0, 0.5, 1]                                  a gradient: 0 in the first layer, 0.5 halfway, 1 in the last one
    t: [{filter: mlp, value: 0.3}, {value: [0, 1]}]  the first entry whose filter is in the name counts; "*" is in all
    weights: [1, [0, 1]]                            where there is one number per model, each may be such a value

So mergekit writes them. A merge method does not know: it is called with the numbers of the tensor at hand.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ..errors import OptionError, nearest, shown, some
from ..registry import fitting, read_knobs

# By name, what is computed before the first layer. What else has no layer, such as last norms and heads, comes after.
BEFORE = re.compile(
    r"embed(?!_out)|(^|\.)(wte|wpe|shared|cls_token|project_in|pre_layrnorm|stem|conv_stem|conv1|bn1)(\.|$)"
)


@dataclass(frozen=True)
class Place:
    """A tensor by its name, and how far on it is: 0 is the first layer, 1 the last one."""

    name: str
    depth: float


class Varying(ABC):
    """A value that hangs on the tensor."""

    @abstractmethod
    def at(self, place: Place) -> Any:
        """The value for one tensor; LookupError where none is said."""

    def filters(self) -> Iterator[str]:
        """What names are asked for."""
        yield from ()


@dataclass(frozen=True)
class Gradient(Varying):
    """Numbers at even distances over the layers, with straight lines between them."""

    numbers: tuple[float, ...]

    def at(self, place: Place) -> float:
        whole = place.depth * (len(self.numbers) - 1)
        i = min(int(whole), len(self.numbers) - 2)
        (a, b), rest = self.numbers[i : i + 2], whole - i
        return a + rest * (b - a) if rest < 0.5 else b - (1 - rest) * (b - a)  # a and b themselves at the ends


@dataclass(frozen=True)
class Filtered(Varying):
    """(filter, value): the first one counts whose filter is a part of the name; None is a part of all."""

    entries: tuple[tuple[str | None, Any], ...]

    def at(self, place: Place) -> Any:
        for part, value in self.entries:
            if part is None or part in place.name:
                return value_at(value, place)
        raise LookupError

    def filters(self) -> Iterator[str]:
        yield from (part for part, _ in self.entries if part is not None)


@dataclass(frozen=True)
class PerModel(Varying):
    """One value per model."""

    values: tuple[Any, ...]

    def at(self, place: Place) -> list[Any]:
        return [value_at(value, place) for value in self.values]

    def filters(self) -> Iterator[str]:
        for value in self.values:
            yield from value.filters() if isinstance(value, Varying) else ()


def value_at(value: Any, place: Place) -> Any:
    return value.at(place) if isinstance(value, Varying) else value


def reading(kind: Any, said: Any) -> Any:
    """A value of a type, or a `Varying` of such values.

    Raises:
        ValueError: it is neither; says what is wrong.

    Example: `reading(float, [0, 1])` is a gradient; `reading(Sequence[float], [0, 1])` are the numbers of two models,
    and `reading(Sequence[float], [0, [0, 1]])` those of two models of which the second has a gradient.
    """
    kinds = (kind, *get_args(kind))  # of `float | None` also float
    per_model = any(get_args(one) in ((float,), (float, ...)) for one in kinds)
    if not isinstance(said, list | tuple) or not (per_model or _nested(said) or float in kinds):
        return fitting(kind, said)
    if per_model:
        if any(isinstance(one, Mapping) for one in said):
            raise ValueError(
                "entries with filters belong to one model; give every model a number or a list of its own"
            )
        values = tuple(reading(float, one) for one in said) if _nested(said) else ()
        return PerModel(values) if values else fitting(kind, said)
    return Filtered(tuple(_entries(kind, said))) if _nested(said) else _gradient(said)


def varies(thing: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    """The knobs of a merge method that are given others for other tensors."""
    values, _ = read_knobs(thing, given, reading)
    return [knob for knob, value in values.items() if isinstance(value, Varying)]


def _nested(said: Sequence[Any]) -> bool:
    return any(isinstance(one, list | tuple | Mapping) for one in said)


def _gradient(said: Sequence[Any]) -> Gradient:
    if len(said) < 2:
        raise ValueError(f"{shown(said)} does not fit: a gradient over the layers takes 2 numbers or more")
    for number in said:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{shown(said)} does not fit: {shown(number)} in a gradient over the layers is no number")
    return Gradient(tuple(fitting(float, number) for number in said))


def _entries(kind: Any, said: Sequence[Any]) -> Iterator[tuple[str | None, Any]]:
    for i, entry in enumerate(said):
        if not isinstance(entry, Mapping) or "value" not in entry:
            raise ValueError(f"{shown(entry)} does not fit: every entry says {{filter: part of a name, value: …}}")
        if unknown := [key for key in entry if key not in ("filter", "value")]:
            raise ValueError(f"{unknown[0]}: no such key of an entry{nearest(str(unknown[0]), ('filter', 'value'))}")
        part, value = entry.get("filter"), entry["value"]
        if part is not None and (not isinstance(part, str) or not part):
            raise ValueError(f"filter {shown(part)} does not fit: give a part of the names of tensors")
        part = None if part == "*" else part
        if part is None and i + 1 < len(said):
            raise ValueError(
                f"entries after the one for all tensors (number {i + 1}) are never looked at; put it last"
            )
        if isinstance(value, list | tuple) and _nested(value):
            raise ValueError(f"{shown(value)} does not fit: the value of an entry is a number or a gradient")
        yield part, reading(kind, value)


def places(names: Collection[str]) -> dict[str, Place]:
    """How far on every tensor is: layers that are numbered apart, such as those of two towers, are counted apart.

    The first number in a name is that of the layer: of a ResNet the stage, of an expert the layer it is in. A layer
    alone is the last one. What has no number is before the first layer if it is called so, and else after the last.
    """
    found = {name: re.match(r"(.*?)(?:(?<=\.)|^)(\d+)\.", name) for name in names}
    stacks: dict[str, set[int]] = {}
    for match in filter(None, found.values()):
        stacks.setdefault(match[1], set()).add(int(match[2]))
    order = {stack: sorted(numbers) for stack, numbers in stacks.items()}

    def depth(name: str, match: re.Match[str] | None) -> float:
        if match is None:
            return 0.0 if BEFORE.search(name) else 1.0
        numbers = order[match[1]]
        return numbers.index(int(match[2])) / (len(numbers) - 1) if len(numbers) > 1 else 1.0

    return {name: Place(name, depth(name, match)) for name, match in found.items()}


def resolved(knobs: Mapping[str, Any], names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The knobs of every tensor.

    Raises:
        OptionError: a filter that is in no name, or a tensor that no entry is for.
    """
    for knob, value in knobs.items():
        for part in value.filters() if isinstance(value, Varying) else ():
            if not any(part in name for name in names):
                raise OptionError(
                    f"{knob}: no tensor has {shown(part)} in its name{nearest(part, _parts(part, names))}"
                )
    found: dict[str, dict[str, Any]] = {}
    left: dict[str, list[str]] = {}
    for name, place in places(names).items():
        found[name] = {}
        for knob, value in knobs.items():
            try:
                found[name][knob] = value_at(value, place)
            except LookupError:
                left.setdefault(knob, []).append(name)
    for knob, missed in left.items():
        raise OptionError(f"{knob}: no entry is for {some(missed)}; end with one for all others, {{value: …}}")
    return found


def _parts(like: str, names: Collection[str]) -> set[str]:
    """Parts of names of as many components as something has, without what is but a number."""
    length, parts = like.strip(".").count(".") + 1, [name.split(".") for name in names]
    found = {".".join(p[i : i + length]) for p in parts for i in range(len(p) - length + 1)}
    return {part for part in found if not part.isdigit()}
