"""hf-rebasin compare"""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import MODEL, found_device, opened_models, say, shown


def compare(
    fixed: Annotated[str, typer.Argument(help=MODEL)],
    moving: Annotated[str, typer.Argument(help="The other model.")],
) -> None:
    """Are two models of one base, trained apart, or different? One screen, and a verdict."""
    from ...evaluation.comparison import compare as look
    from .. import output

    a, b = opened_models([fixed, moving])
    comparison = look(a, b, device=found_device(), progress=shown())
    for line in output.side_by_side(a, b, comparison):
        say(line)
