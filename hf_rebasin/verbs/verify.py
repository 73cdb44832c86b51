"""hf-rebasin verify"""

from __future__ import annotations

from typing import Annotated

import typer

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
    from .. import showing
    from ..verifying import verify as look

    found = look(
        source,
        rebuild=rebuild,
        resolve=resolve,
        models=model or (),
        data=data,
        device=found_device() if rebuild or resolve else None,
        progress=shown(),
    )
    for line in showing.verified(found):
        say(line)
    if not found.holds:
        raise typer.Exit(1)
