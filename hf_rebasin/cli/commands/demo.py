"""hf-rebasin demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the models go.")] = Path("demo"),
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="mlp, mlp512, resnet or vit; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many of each are trained; every pair of them is merged.")] = 3,
) -> None:
    """Train small models apart, align them, merge them, report. Three minutes on 2 cores, no download."""
    from ...demo import experiments as demonstration

    demonstration.run(out, kinds or demonstration.DEMO, seeds, say=typer.echo)
