"""The folders are the registries: the solver `sinkhorn` is the file `solvers/sinkhorn.py`.

Adding a table, group, solver or merge method is adding one file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from .errors import OptionError, UnknownNameError, nearest, shown

KINDS = {"specs": "table", "groups": "group", "solvers": "solver", "merge_methods": "merge method"}
ROOMS = {
    "specs": "symmetries.specs",
    "groups": "alignment.groups",
    "solvers": "solving.solvers",
    "merge_methods": "merging.methods",
}


@cache
def names(room: str) -> tuple[str, ...]:
    """The names in one room, sorted: `names("groups") == ("permutation",)`."""
    folder = Path(__file__).parent.joinpath(*ROOMS[room].split("."))
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


def find(room: str, name: str) -> ModuleType:
    """The module of that name in a room; an unknown name raises `UnknownNameError` with the nearest one."""
    if name not in names(room):
        raise UnknownNameError(f"no {KINDS[room]} {shown(name)}{nearest(name, names(room))}")
    return importlib.import_module(f"{__package__}.{ROOMS[room]}.{name}")


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
