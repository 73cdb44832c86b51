"""The command `hf-rebasin inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError
from ..options import MODEL, open_checkpoint, say


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    every: Annotated[
        bool, typer.Option("--all", help="Show one line per symmetry instead of one per family.")
    ] = False,
    infer: Annotated[
        bool, typer.Option("--infer", help="Infer the symmetries from the forward pass, even for a built-in family.")
    ] = False,
    write_table: Annotated[
        Path | None,
        typer.Option(help="With --infer: file to write the inferred symmetries to, as a spec to edit or keep."),
    ] = None,
) -> None:
    """Show the symmetries of a model: names, groups, sizes and tensors."""
    from ...symmetries.detection import detect_spec, infer_checkpoint, render_spec
    from .. import output

    if write_table is not None and not infer:
        raise OptionError("only inferred symmetries are written to a file (--write-table); give --infer, too")
    if write_table is not None and write_table.exists():
        raise OptionError(f"{write_table} already exists; name another file")
    checkpoint = open_checkpoint(model)
    spec = infer_checkpoint(checkpoint) if infer else detect_spec(checkpoint)
    origin = ", inferred from its forward pass" if spec.pins else ""
    say(f"{model} ({type(checkpoint.config).__name__.removesuffix('Config')}): {spec}{origin}\n")
    for line in output.describe_symmetries(spec, every):
        say(line)
    for line in output.describe_held_axes(spec):
        say(line)
    for target, source in spec.ties.items():
        say(f"\ntied: {target} is {source}")
    if write_table is not None:
        write_table.write_text(render_spec(spec, checkpoint), encoding="utf-8", newline="\n")
        say(f"\ntable: {write_table}")
