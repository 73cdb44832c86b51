"""The command `hf-rebasin evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import MODEL, DataOption, Metric, find_device, load_data, open_checkpoint, say, shows_progress


def evaluate(
    models: Annotated[list[str], typer.Argument(help="One or more models. " + MODEL)],
    data: Annotated[str, typer.Option(help="Dataset with labels, or text for a language model.")],
    data_option: DataOption = None,
    metric: Metric = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the loss and metrics of models on data."""
    from ...evaluation.metrics import evaluate as evaluate_model
    from .. import output

    measurements = {}
    for name in models:
        checkpoint = open_checkpoint(name)
        batches = load_data(data, data_option, checkpoint, needs_labels=True)
        module = checkpoint.model().to(find_device())
        measurements[name] = evaluate_model(module, batches, metrics=metric, progress=shows_progress())
    for line in output.describe_measurements(measurements, as_json):
        say(line)
