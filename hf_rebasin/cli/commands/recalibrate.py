"""The command `hf-rebasin recalibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError
from ..options import (
    MODEL,
    DataOption,
    Overwrite,
    find_device,
    load_data,
    open_checkpoints,
    refuse_out,
    save_with_record,
    say,
    shows_progress,
)


def recalibrate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the recalibrated model.")],
    data: Annotated[str, typer.Option(help="Dataset to compute the statistics on: Hub id, folder or file.")],
    data_option: DataOption = None,
    like: Annotated[
        list[str] | None,
        typer.Option(
            help="For REPAIR: one of the merged models, in the coordinates of the merge. Repeat it for each; "
            "every unit is rescaled to their average mean and standard deviation."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Compute the statistics as if all data were one batch, with one pass per BatchNorm layer."
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Recompute a model's BatchNorm statistics on data, or repair a merge (REPAIR, with --like)."""
    from ...merging.recalibration import has_statistics, repair
    from ...publishing.record import MergeRecord, make_provenance, pinned_settings, record_inputs
    from ...recipes.runner import recalibrate_checkpoint
    from .. import output

    checkpoint, *sources = open_checkpoints([model, *(like or [])])
    refuse_out(out, overwrite, (*checkpoint.sources, *(path for source in sources for path in source.sources)))
    if not sources and not has_statistics(checkpoint):
        raise OptionError(
            f"{model} has no running statistics; to repair a merge, name the models that were merged "
            "(--like A --like B)"
        )
    batches = load_data(data, data_option, checkpoint)
    say(f"data: {batches.describe()}")
    device = find_device()
    if sources:
        recalibrated = repair(checkpoint, sources, batches, device=device, progress=shows_progress())
    else:
        recalibrated = recalibrate_checkpoint(
            checkpoint, batches, exact=exact, device=device, progress=shows_progress()
        )
    settings = {"data": pinned_settings(batches), "exact": exact}
    inputs, data_uses = record_inputs([checkpoint, *sources]), {"statistics of": batches}
    record = MergeRecord(make_provenance("recalibrate", settings, inputs, data_uses, device=device))
    folder = save_with_record(recalibrated, out, overwrite, record)
    say(f"recalibrated model: {folder}/, {output.describe_size(recalibrated)}")
