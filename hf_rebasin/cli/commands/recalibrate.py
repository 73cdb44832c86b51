"""hf-rebasin recalibrate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError
from ..options import (
    MODEL,
    DataOption,
    Overwrite,
    data_for,
    found_device,
    opened_models,
    refuse_out,
    saved,
    say,
    shown,
)


def recalibrate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model with new statistics.")],
    data: Annotated[str, typer.Option(help="Dataset to take statistics of: Hub id, folder or file.")],
    data_option: DataOption = None,
    like: Annotated[
        list[str] | None,
        typer.Option(
            help="REPAIR: give every unit the mean and deviation that these models have on average, those that were "
            "merged, in the coordinates of the merge. Give it once for each."
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="One pass for every BatchNorm layer: as of one big batch.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Recompute BatchNorm statistics of a model on data, or repair a merge of networks without BatchNorm."""
    from ...merging.recalibration import has_statistics, repair
    from ...publishing.record import Record, inputs_of, recorded, settings_of
    from ...recipes.runner import recalibrated
    from .. import output

    checkpoint, *sources = opened_models([model, *(like or [])])
    refuse_out(out, overwrite, (*checkpoint.sources, *(path for one in sources for path in one.sources)))
    if not sources and not has_statistics(checkpoint):
        raise OptionError(
            f"{model} has no running statistics; to repair a merge, name what was merged (--like A --like B)"
        )
    batches = data_for(data, data_option, checkpoint)
    say(f"data: {batches.describe()}")
    device = found_device()
    if sources:
        new = repair(checkpoint, sources, batches, device=device, progress=shown())
    else:
        new = recalibrated(checkpoint, batches, exact=exact, device=device, progress=shown())
    settings = {"data": settings_of(batches), "exact": exact}
    inputs, looked = inputs_of([checkpoint, *sources]), {"statistics of": batches}
    record = Record(recorded("recalibrate", settings, inputs, looked, device=device))
    say(f"recalibrated model: {saved(new, out, overwrite, record)}/, {output.size(new)}")
