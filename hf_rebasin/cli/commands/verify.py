"""The command `hf-rebasin verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError
from ..options import MODEL, find_device, say, shows_progress


def verify(
    source: Annotated[str, typer.Argument(help=MODEL)],
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Make the model again with the stored alignments, and compare it bit by bit."),
    ] = False,
    resolve: Annotated[
        bool, typer.Option("--resolve", help="Make the model again, with newly computed alignments, and compare it.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Local folder of an input that is not on the Hub; matched by sha256. May be repeated."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Local folder or file of the data, if they are not on the Hub.")
    ] = None,
) -> None:
    """Check the hashes of a written or published model; optionally rebuild it and compare."""
    from ...publishing.verification import verify as verify_model
    from .. import output

    folders = [Path(folder).expanduser() for folder in model or ()]
    for folder in folders:
        if not folder.is_dir():
            raise OptionError(f"--model {folder} is not a folder; name the one with the model that was read")
    verification = verify_model(
        source,
        rebuild=rebuild,
        resolve=resolve,
        models=[str(folder) for folder in folders],
        data=data,
        device=find_device() if rebuild or resolve else None,
        progress=shows_progress(),
    )
    for line in output.describe_verification(verification):
        say(line)
    if not verification.holds:
        raise typer.Exit(1)
