"""hf-rebasin evaluate"""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import MODEL, DataOption, Metric, data_for, found_device, opened_model, say, shown


def evaluate(
    models: Annotated[list[str], typer.Argument(help="One or more models. " + MODEL)],
    data: Annotated[str, typer.Option(help="Dataset with labels, or text for a language model.")],
    data_option: DataOption = None,
    metric: Metric = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss and metrics of models on data."""
    from ...evaluation.metrics import evaluate as measure
    from .. import output

    found = {}
    for name in models:
        checkpoint = opened_model(name)
        batches = data_for(data, data_option, checkpoint)
        module = checkpoint.model().to(found_device())
        found[name] = measure(module, batches, metrics=metric, progress=shown())
    for line in output.measured(found, as_json):
        say(line)
