"""All errors that the package raises on purpose.

    RebasinError
    ├── PatternError (ValueError)     a pattern that cannot be read
    ├── SpecError (ValueError)        a table that does not fit the tensors
    ├── UnknownNameError (LookupError) a solver, merge method, group or table that does not exist
    ├── PluginError (TypeError)       a file of such a plug-in that lacks a part of its contract
    ├── CheckpointError (ValueError)  a checkpoint that cannot be read or written without losing something
    ├── MismatchError (ValueError)    two things that do not belong together: models, or an alignment and a model
    ├── OptionError (ValueError)      an unknown option or parameter, or a value it cannot take
    ├── RecipeError (ValueError)      a recipe with mistakes, all of them listed
    ├── TargetExistsError (FileExistsError)  an output that is already there
    ├── NoSpaceError (OSError)        a disk that has no room for the output
    └── HubError (OSError)            a request that the Hub refuses or cannot answer: access, revision, connection

Messages say what was asked for, what was found (names, shapes, numbers) and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RebasinError(Exception):
    """Base class of all errors that the package raises on purpose."""


class PatternError(RebasinError, ValueError):
    """A pattern or key that cannot be read; the message points at the character."""

    def __init__(self, message: str, text: str, at: int):
        super().__init__(f"{message}\n  {text}\n  {' ' * at}^")


class SpecError(RebasinError, ValueError):
    """A table that does not fit the tensors; the message names the key, its shape and the row."""


class UnknownNameError(RebasinError, LookupError):
    """A name that does not exist; the message suggests the nearest one."""


class PluginError(RebasinError, TypeError):
    """A file of a solver, merge method, group or table that lacks a part of its contract; the message says which."""


class CheckpointError(RebasinError, ValueError):
    """A checkpoint that is broken, or cannot be written as asked."""


class MismatchError(RebasinError, ValueError):
    """Two things that do not belong together; the message names the first difference."""


class OptionError(RebasinError, ValueError):
    """An unknown option or parameter, or a value that it cannot take."""


class RecipeError(RebasinError, ValueError):
    """A recipe with mistakes; the message lists all of them with their path."""


class TargetExistsError(RebasinError, FileExistsError):
    """An output that already exists and may not be overwritten."""


class NoSpaceError(RebasinError, OSError):
    """A disk without room for the output; nothing was written."""


class HubError(RebasinError, OSError):
    """A request that the Hub refuses or cannot answer; the message says what to do, and never holds a token."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'linear'?"`, or the whole list if no name is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def quoted(value: object, longest: int = 200) -> str:
    """Return a value as Python writes it, cut short."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Return the first few names and how many more there are: `a, b, c and 40 more`."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
