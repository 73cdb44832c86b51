"""Knobs: the keyword arguments of a merge method or the fields of a solver, checked by name and by type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

from .errors import OptionError, nearest


def knobs_of(thing: Callable[..., Any]) -> dict[str, Any]:
    """{knob: its type} of a merge method (keyword-only arguments) or of a solver's dataclass (fields)."""
    owner = thing.__init__ if inspect.isclass(thing) else thing
    hints = get_type_hints(owner)
    parameters = inspect.signature(thing).parameters.values()
    return {p.name: hints[p.name] for p in parameters if inspect.isclass(thing) or p.kind is p.KEYWORD_ONLY}


def mistakes(thing: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(knob, what is wrong with it) for every knob that is unknown or cannot have its value."""
    from pydantic import TypeAdapter, ValidationError

    known = knobs_of(thing)
    for knob, value in given.items():
        if knob not in known:
            yield knob, f"no such parameter{nearest(str(knob), known)}"
            continue
        try:
            TypeAdapter(known[knob]).validate_python(value, strict=False)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            yield knob, f"{value!r} does not fit: {message[0].lower()}{message[1:]}"


def refuse_mistakes(what: str, thing: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise OptionError that lists everything wrong with some knobs."""
    found = [f"{knob}: {message}" for knob, message in mistakes(thing, given)]
    if found:
        raise OptionError(f"{what}: {'; '.join(found)}")
