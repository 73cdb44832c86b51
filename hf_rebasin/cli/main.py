"""The command line; each command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import codecs
import ctypes
import logging
import os
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper

import typer

from ..errors import RebasinError
from ..text import printable, spell_out, without_secrets
from .options import find_device

VERBS = (
    *("demo", "compare", "inspect", "check", "align", "apply", "merge"),
    *("recalibrate", "evaluate", "interpolate", "publish", "verify"),
)

app = typer.Typer(
    name="hf-rebasin",
    help="Merge Hugging Face checkpoints that were trained apart: bring them to the same coordinates, then merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in VERBS:
    app.command()(getattr(import_module(f".commands.{verb}", __package__), verb))


def main() -> None:
    """Run the command line; errors on purpose and of the system are a message and exit status 1."""
    _keep_freed_memory()
    _show_notes()
    _spell_out_missing_characters()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by accelerate launch
            find_device()
        app()
    except (RebasinError, OSError) as error:  # OSError: no such folder, no permission, no space left
        typer.echo(f"error: {without_secrets(printable(str(error)))}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; unfinished outputs leave nothing behind", err=True)
        sys.exit(130)


class _Notes(logging.Handler):
    """Shows on stderr what the package notes while it works, one line each, and each of them once."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        note = record.getMessage()
        if note not in self.shown:  # a command may open and match the same models again, such as to try its advice
            self.shown.add(note)
            typer.echo(f"note: {printable(note)}", err=True)


def _show_notes() -> None:
    """Show notes in the first process; in others, without any handler, logging itself would print the warnings."""
    logger = logging.getLogger("hf_rebasin")
    if os.environ.get("RANK", "0") != "0":
        logger.addHandler(logging.NullHandler())
    elif not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
        logger.setLevel(logging.INFO)


def _spell_out_missing_characters() -> None:
    """Let output to a pipe or console of another encoding than UTF-8, as on Windows, spell out what that one lacks.

    An error handler that somebody chose (PYTHONIOENCODING) stays.
    """
    codecs.register_error(spell_out.__name__, spell_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=spell_out.__name__)


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep up to 64 MB of freed memory from the start, as it does after freeing a large block.

    Otherwise it may return the memory of every chunk of a merge to the system and fetch it again, page by page and
    zeroed, which can take half of the time of the merge.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another libc
            change = ctypes.CDLL(None).mallopt
            change(-3, 32 << 20)  # M_MMAP_THRESHOLD
            change(-1, 64 << 20)  # M_TRIM_THRESHOLD
