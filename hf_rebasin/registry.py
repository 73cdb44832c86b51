"""The folders are the registries: the solver `sinkhorn` is the file `solvers/sinkhorn.py`.

Adding a table, group, solver or merge method is adding one file.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from .errors import UnknownNameError, nearest, shown

ROOMS = {"specs": "table", "groups": "group", "solvers": "solver", "merge_methods": "merge method"}


@cache
def names(room: str) -> tuple[str, ...]:
    """The names in one room, sorted: `names("groups") == ("permutation",)`."""
    folder = Path(__file__).parent / room
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


def find(room: str, name: str) -> ModuleType:
    """The module of that name in a room; an unknown name raises `UnknownNameError` with the nearest one."""
    if name not in names(room):
        raise UnknownNameError(f"no {ROOMS[room]} {shown(name)}{nearest(name, names(room))}")
    return importlib.import_module(f"{__package__}.{room}.{name}")
