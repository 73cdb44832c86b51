"""hf-rebasin align"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError
from ..options import (
    MODEL,
    Assume,
    BackboneOnly,
    DataName,
    DataOption,
    GroupsName,
    Hold,
    KeepTied,
    Overwrite,
    Seed,
    SolverName,
    assumed,
    batches_for,
    described,
    found_device,
    opened_models,
    refuse_out,
    saved,
    say,
    shown,
)


def align(
    fixed: Annotated[str, typer.Argument(help="The model that stays. " + MODEL)],
    moving: Annotated[str, typer.Argument(help="The model that is moved.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the moved model.")] = None,
    alignment: Annotated[Path | None, typer.Option(help="File for the alignment itself (safetensors).")] = None,
    solver: SolverName = "weight_matching",
    seed: Seed = 0,
    assume: Assume = None,
    backbone_only: BackboneOnly = False,
    groups: GroupsName = "full",
    keep_tied: KeepTied = False,
    hold: Hold = None,
    data: DataName = None,
    data_option: DataOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Bring one model to the coordinates of another; its function stays exactly the same."""
    from ...modules.distributed import is_first
    from ...publishing.record import Record, inputs_of, recorded, settings_of
    from ...solving.align import align as find
    from .. import output

    if out is None and alignment is None:
        raise OptionError(
            "nothing would be written: give --out for the moved model, --alignment for the alignment, or both"
        )
    if alignment is not None and (alignment.is_dir() or (alignment.exists() and not overwrite)):
        raise OptionError(f"{alignment} is already there; name another file, or overwrite a file (--overwrite)")
    if alignment is not None and out is not None and alignment.resolve() == out.resolve():
        raise OptionError(f"{out} cannot be both the moved model and the alignment; name two")
    a, b = opened_models([fixed, moving])
    if out is not None:
        refuse_out(out, overwrite, (*a.sources, *b.sources))
    batches, device = batches_for(described(data, data_option, "--data"), a), found_device()
    settings = {
        "solver": solver,
        "seed": seed,
        "assume": assumed(assume),
        "backbone_only": backbone_only,
        "groups": groups,
        "keep_tied": keep_tied,
        "hold": hold or [],
    }
    solution = find(a, b, data=batches, device=device, progress=shown(), **settings)
    for line in output.solved(solution, moving):
        say(line)
    if alignment is not None and is_first():
        say(f"alignment: {solution.alignment.save(alignment)}")
    if out is not None:
        said = settings | {"data": None if batches is None else settings_of(batches)}
        inputs, looked = inputs_of([a, b]), {"looked at": batches}
        provenance = recorded("align", said, inputs, looked, notes=solution.notes, device=device)
        record = Record(provenance, [solution.alignment])
        say(f"moved model: {saved(solution.apply(b), out, overwrite, record)}/")
