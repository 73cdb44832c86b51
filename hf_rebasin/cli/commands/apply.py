"""hf-rebasin apply"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import MODEL, Overwrite, opened_model, refuse_out, saved, say


def apply(
    alignment: Annotated[
        str, typer.Argument(help="What align --alignment wrote, or the id of a repository on the Hub with one.")
    ],
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the moved model.")],
    file: Annotated[str | None, typer.Option(help="Of a repository with several alignments, which one.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Move a model by a saved alignment; its function stays exactly the same."""
    from ...publishing.artefacts import alignment_of, artefact_name
    from ...publishing.record import Record, inputs_of, recorded

    found, checkpoint = alignment_of(alignment, file), opened_model(model)
    place = Path(alignment).expanduser()
    refuse_out(out, overwrite, (*checkpoint.sources, *([place] if place.exists() else [])))
    record = Record(recorded("apply", {"alignment": artefact_name(alignment)}, inputs_of([checkpoint])), [found])
    say(f"moved model: {saved(found.apply(checkpoint), out, overwrite, record)}/")
