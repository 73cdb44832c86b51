"""The command `hf-rebasin demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the models.")] = Path("demo"),
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Kind of models: mlp, mlp512, resnet or vit. May be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of models of each kind; every pair of them is merged.")] = 3,
) -> None:
    """Train small models apart, align, merge and report on them, in three minutes on 2 cores without downloads."""
    from ...demo import experiments

    experiments.run_demo(out, kinds or experiments.DEFAULT_KINDS, seeds, say=typer.echo)
