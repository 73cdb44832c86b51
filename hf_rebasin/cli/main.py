"""The command line; each command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from importlib import import_module

import typer

from ..errors import RebasinError
from ..text import printable, without_secrets
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
