"""The command line. Each verb imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from importlib import import_module

import typer

from ..errors import RebasinError
from ..text import printable, without_secrets
from .options import found_device

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
    """The entry point: errors of ours are one sentence and exit status 1."""
    _keep_freed_memory()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by accelerate launch
            found_device()
        app()
    except (RebasinError, OSError) as error:  # of the system: no such folder, no permission, no space left
        typer.echo(f"error: {without_secrets(printable(str(error)))}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; a model that was not finished leaves nothing behind", err=True)
        sys.exit(130)


def _keep_freed_memory() -> None:
    """Begin where glibc's malloc ends up once a large block was freed: up to 64 MB that are free stay with us.

    Otherwise it may give back the memory of every chunk of a merge and get it again, page by page, set to 0, for half
    of the time that the merge takes.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another libc
            change = ctypes.CDLL(None).mallopt
            change(-3, 32 << 20)  # M_MMAP_THRESHOLD
            change(-1, 64 << 20)  # M_TRIM_THRESHOLD
