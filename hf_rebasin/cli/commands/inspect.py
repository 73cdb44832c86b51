"""hf-rebasin inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError
from ..options import MODEL, opened_model, say


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    every: Annotated[bool, typer.Option("--all", help="One line per symmetry instead of one per family.")] = False,
    infer: Annotated[
        bool, typer.Option("--infer", help="Read them off the forward pass, also where there is a table.")
    ] = False,
    write_table: Annotated[
        Path | None, typer.Option(help="With --infer: write what was found as a spec file, to be kept or edited.")
    ] = None,
) -> None:
    """Show the symmetries of a model: name, group, size, tensors."""
    from ...symmetries.detection import inferred, spec_of, written
    from .. import output

    if write_table is not None and not infer:
        raise OptionError("--write-table writes what was inferred; give --infer, too")
    if write_table is not None and write_table.exists():
        raise OptionError(f"{write_table} is already there; name another file")
    checkpoint = opened_model(model)
    spec = inferred(checkpoint) if infer else spec_of(checkpoint)
    how = ", inferred from its forward pass" if spec.pins else ""
    say(f"{model} ({type(checkpoint.config).__name__.removesuffix('Config')}): {spec}{how}\n")
    for line in output.symmetries(spec, every):
        say(line)
    for line in output.held(spec):
        say(line)
    for target, kept in spec.ties.items():
        say(f"\ntied: {target} is {kept}")
    if write_table is not None:
        write_table.write_text(written(spec, checkpoint), encoding="utf-8")
        say(f"\ntable: {write_table}")
