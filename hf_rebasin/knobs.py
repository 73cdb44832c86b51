"""Knobs: the keyword arguments of a merge method or the fields of a solver, checked by name and by type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from .errors import OptionError, nearest, shown


def knobs_of(thing: Callable[..., Any]) -> dict[str, Any]:
    """{knob: its type} of a merge method (keyword-only arguments) or of a solver's dataclass (fields)."""
    hints = get_type_hints(thing)  # of a class, those of every field where it was written
    parameters = inspect.signature(thing).parameters.values()
    return {p.name: hints[p.name] for p in parameters if inspect.isclass(thing) or p.kind is p.KEYWORD_ONLY}


Reading = Callable[[Any, Any], Any]


def fitting(kind: Any, value: Any) -> Any:
    """The value as one of that type; ValueError says why it is none."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"{shown(value)} does not fit: {message[0].lower()}{message[1:]}") from error


def read_knobs(
    thing: Callable[..., Any], given: Mapping[str, Any], read: Reading = fitting
) -> tuple[dict[str, Any], dict[str, str]]:
    """(knobs with values of their types, what is wrong with the others): `{"t": "1e-1"}` makes `{"t": 0.1}`."""
    known, values, wrong = knobs_of(thing), {}, {}
    for knob, value in given.items():
        if knob not in known:
            wrong[knob] = f"no such parameter{nearest(str(knob), known)}"
            continue
        try:
            values[knob] = read(known[knob], value)
        except ValueError as error:
            wrong[knob] = str(error)
    return values, wrong


def knobs_for(
    what: str, thing: Callable[..., Any], given: Mapping[str, Any], read: Reading = fitting
) -> dict[str, Any]:
    """Knobs with values of their types; OptionError lists everything that is wrong."""
    values, wrong = read_knobs(thing, given, read)
    if wrong:
        raise OptionError(f"{what}: {'; '.join(f'{knob}: {message}' for knob, message in wrong.items())}")
    return values
