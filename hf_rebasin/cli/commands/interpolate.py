"""hf-rebasin interpolate"""

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
    batches_for,
    data_for,
    described,
    found_device,
    opened_models,
    refuse_out,
    saved,
    say,
    shown,
)


def interpolate(
    fixed: Annotated[str, typer.Argument(help="The model at λ = 0. " + MODEL)],
    moving: Annotated[str, typer.Argument(help="The model at λ = 1, in the same coordinates (align it first).")],
    data: Annotated[str, typer.Option(help="Dataset with labels, or text for a language model.")],
    data_option: DataOption = None,
    points: Points = 25,
    metric: Metric = None,
    recalibrate: Annotated[
        str | None, typer.Option(help="Dataset for BatchNorm statistics of every model on the line.")
    ] = None,
    recalibrate_option: Annotated[
        list[str] | None, typer.Option(help="As -d; without --recalibrate of the dataset of --data.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the best model on the line.")] = None,
    by: Annotated[str, typer.Option(help="What the best model is best by: loss or a metric.")] = "loss",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure the models on the line between two, and keep the best one."""
    from functools import partial

    from ...evaluation.interpolation import between
    from ...evaluation.interpolation import interpolate as along
    from ...evaluation.metrics import evaluate as measure
    from ...merging.recalibration import recalibrate as renew
    from ...publishing.record import Record, inputs_of, recorded, settings_of
    from .. import output

    a, b = opened_models([fixed, moving])
    if out is not None:
        refuse_out(out, overwrite, (*a.sources, *b.sources))
    batches, device = data_for(data, data_option, a), found_device()
    prepare = renewing = None
    if other := described(recalibrate, recalibrate_option, "--recalibrate"):
        like = described(data, data_option, "--data") if recalibrate is None else None
        renewing = batches_for({**(like or {}), **other}, a)
        prepare = partial(renew, batches=renewing, device=device)
    measured = partial(measure, data=batches, metrics=metric)
    curve = along(a, b, measured, points=points, prepare=prepare, device=device, progress=shown())
    for line in output.curve(curve, as_json):
        say(line)
    if out is not None:
        best = curve.best_by(by)
        new = between(a, b, best, prepare=prepare, device=device)
        settings = {"at": best, "recalibrate": None if renewing is None else settings_of(renewing)}
        inputs, looked = inputs_of([a, b]), {"measured on": batches, "statistics of": renewing}
        record = Record(recorded("interpolate", settings, inputs, looked, device=device))
        folder = saved(new, out, overwrite, record)
        say(f"best model by {by} (λ = {best:.3g}): {folder}/", err=as_json)
