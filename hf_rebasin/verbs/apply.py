"""hf-rebasin apply"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..folder import refuse_target
from ..options import MODEL, Overwrite, opened_model


def apply(
    alignment: Annotated[Path, typer.Argument(help="What align --alignment wrote.")],
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the moved model.")],
    overwrite: Overwrite = False,
) -> None:
    """Move a model by a saved alignment; its function stays exactly the same."""
    from ..alignment import Alignment

    checkpoint = opened_model(model)
    refuse_target(out, overwrite, checkpoint.sources)
    moved = Alignment.load(alignment).apply(checkpoint)
    typer.echo(f"moved model: {moved.save(out, overwrite=overwrite, progress=True)}/")
