"""hf-rebasin verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError
from ..options import found_device, say, shown


def verify(
    source: Annotated[str, typer.Argument(help="Folder, or id on the Hub; id@revision pins a commit, branch or tag.")],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make it again with the stored alignments, and compare bit by bit.")
    ] = False,
    resolve: Annotated[
        bool, typer.Option("--resolve", help="Make it again, look for the alignments anew, too, and compare.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Folder of an input that is not on the Hub; told by its sha256. May be repeated."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder or file of data that are not on the Hub.")] = None,
) -> None:
    """Recompute the hashes of what was written or published; make it again, if asked to."""
    from ...publishing.verification import verify as look
    from .. import output

    places = [Path(place).expanduser() for place in model or ()]
    for place in places:
        if not place.is_dir():
            raise OptionError(f"--model {place} is no folder that is there; name the one with the model that was read")
    found = look(
        source,
        rebuild=rebuild,
        resolve=resolve,
        models=[str(place) for place in places],
        data=data,
        device=found_device() if rebuild or resolve else None,
        progress=shown(),
    )
    for line in output.verified(found):
        say(line)
    if not found.holds:
        raise typer.Exit(1)
