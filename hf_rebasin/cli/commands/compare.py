"""The command `hf-rebasin compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import MODEL, find_device, open_checkpoints, say, shows_progress


def compare(
    fixed: Annotated[str, typer.Argument(help="The first model. " + MODEL)],
    moving: Annotated[str, typer.Argument(help="The second model.")],
) -> None:
    """Tell whether two models share a base, were trained apart or differ in architecture."""
    from ...evaluation.comparison import compare as compare_models
    from .. import output

    a, b = open_checkpoints([fixed, moving])
    comparison = compare_models(a, b, device=find_device(), progress=shows_progress())
    for line in output.describe_comparison(a, b, comparison):
        say(line)
