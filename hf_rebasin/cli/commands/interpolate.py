"""The command `hf-rebasin interpolate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    MODEL,
    DataOption,
    Metric,
    Overwrite,
    Points,
    find_device,
    load_batches,
    load_data,
    open_checkpoints,
    read_data_options,
    refuse_out,
    save_with_record,
    say,
    shows_progress,
)


def interpolate(
    fixed: Annotated[str, typer.Argument(help="Model at λ = 0. " + MODEL)],
    moving: Annotated[str, typer.Argument(help="Model at λ = 1, in the same coordinates (align it first).")],
    data: Annotated[str, typer.Option(help="Dataset with labels, or text for a language model.")],
    data_option: DataOption = None,
    points: Points = 25,
    metric: Metric = None,
    recalibrate: Annotated[
        str | None, typer.Option(help="Dataset to recompute the BatchNorm statistics of every model on the line.")
    ] = None,
    recalibrate_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting of the --recalibrate dataset, as with -d; without --recalibrate, the --data dataset is used."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the best model on the line.")] = None,
    by: Annotated[str, typer.Option(help="Criterion of the best model: loss or a metric.")] = "loss",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure the models on the line between two models, and optionally save the best one."""
    from functools import partial

    from ...evaluation.interpolation import between
    from ...evaluation.interpolation import interpolate as interpolate_models
    from ...evaluation.metrics import evaluate as evaluate_model
    from ...merging.recalibration import describe_averaged_statistics, find_statistics
    from ...merging.recalibration import recalibrate as recalibrate_model
    from ...publishing.record import MergeRecord, make_provenance, pinned_settings, record_inputs
    from .. import output

    a, b = open_checkpoints([fixed, moving])
    if out is not None:
        refuse_out(out, overwrite, (*a.sources, *b.sources))
    batches, device = load_data(data, data_option, a, needs_labels=True), find_device()
    prepare = statistics_data = None
    if options := read_data_options(recalibrate, recalibrate_option, "--recalibrate"):
        defaults = read_data_options(data, data_option, "--data") if recalibrate is None else None
        statistics_data = load_batches({**(defaults or {}), **options}, a)
        prepare = partial(recalibrate_model, batches=statistics_data, device=device)
    measure = partial(evaluate_model, data=batches, metrics=metric)
    curve = interpolate_models(a, b, measure, points=points, prepare=prepare, device=device, progress=shows_progress())
    for line in output.describe_curve(curve, as_json):
        say(line)
    note = "" if prepare else describe_averaged_statistics([a, b], find_statistics(a).recomputed)
    if note:
        note += (
            "; recompute them in every model (--recalibrate DATASET, or --recalibrate-option split=NAME for another "
            "split of --data)"
        )
        say(f"note: {note}", err=as_json)
    if out is not None:
        best = curve.best_by(by)
        model = between(a, b, best, prepare=prepare, device=device)
        settings = {"at": best, "recalibrate": None if statistics_data is None else pinned_settings(statistics_data)}
        inputs, data_uses = record_inputs([a, b]), {"measured on": batches, "statistics of": statistics_data}
        notes = [note] if note and best not in (0, 1) else []
        provenance = make_provenance("interpolate", settings, inputs, data_uses, notes=notes, device=device)
        record = MergeRecord(provenance)
        folder = save_with_record(model, out, overwrite, record)
        say(f"best model by {by} (λ = {best:.3g}): {folder}/", err=as_json)
