"""hf-rebasin check"""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import MODEL, Seed, opened_model, say


def check(
    model: Annotated[str | None, typer.Argument(help=MODEL + " Without one: the small model of every table.")] = None,
    seed: Seed = 0,
) -> None:
    """Move a model at random and compare its outputs: your own proof that moving changes nothing."""
    from ...alignment.exactness import check as run_check
    from ...alignment.exactness import tiny_models

    failed = 0
    checks = [(None, opened_model(model))] if model else tiny_models()
    for name, one in checks:
        result = run_check(one, seed=seed)
        say(f"{name}: {str(result).partition(': ')[2]}" if name else str(result))
        failed += not result.holds
    if failed:
        raise typer.Exit(1)
