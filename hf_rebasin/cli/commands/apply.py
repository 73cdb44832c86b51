"""The command `hf-rebasin apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import MODEL, Overwrite, open_checkpoint, refuse_out, save_with_record, say


def apply(
    alignment: Annotated[
        str, typer.Argument(help="File written by align --alignment, or folder or Hub repository of a merge.")
    ],
    model: Annotated[str, typer.Argument(help="Model to move. " + MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the moved model.")],
    file: Annotated[
        str | None, typer.Option(help="Name of the alignment file, if a repository holds several.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Move a model by a saved alignment without changing its function."""
    from ...publishing.artefacts import artefact_name, load_alignment
    from ...publishing.record import MergeRecord, make_provenance, record_inputs

    loaded, checkpoint = load_alignment(alignment, file), open_checkpoint(model)
    path = Path(alignment).expanduser()
    refuse_out(out, overwrite, (*checkpoint.sources, *([path] if path.exists() else [])))
    record = MergeRecord(
        make_provenance("apply", {"alignment": artefact_name(alignment)}, record_inputs([checkpoint])), [loaded]
    )
    say(f"moved model: {save_with_record(loaded.apply(checkpoint), out, overwrite, record)}/")
