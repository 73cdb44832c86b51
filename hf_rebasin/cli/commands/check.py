"""The command `hf-rebasin check`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import MODEL, Seed, open_checkpoint, say


def check(
    model: Annotated[
        str | None, typer.Argument(help=MODEL + " By default a small model of every built-in family.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Move a model by random symmetries and check that its outputs stay the same."""
    from ...alignment.exactness import check as run_check
    from ...alignment.exactness import tiny_models

    failed = 0
    models = [(None, open_checkpoint(model))] if model else tiny_models()
    for name, candidate in models:
        result = run_check(candidate, seed=seed)
        say(f"{name}: {str(result).partition(': ')[2]}" if name else str(result))
        failed += not result.holds
    if failed:
        raise typer.Exit(1)
