"""hf-rebasin align"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..errors import OptionError
from ..folder import refuse_target
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
    opened_model,
)

if TYPE_CHECKING:
    from ..limits import Groups


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
    from .. import showing
    from ..api import align as find

    if out is None and alignment is None:
        raise OptionError(
            "nothing would be written: give --out for the moved model, --alignment for the alignment, or both"
        )
    if alignment is not None and (alignment.is_dir() or (alignment.exists() and not overwrite)):
        raise OptionError(f"{alignment} is already there; name another file, or overwrite a file (--overwrite)")
    if alignment is not None and out is not None and alignment.resolve() == out.resolve():
        raise OptionError(f"{out} cannot be both the moved model and the alignment; name two")
    a, b = opened_model(fixed), opened_model(moving)
    if out is not None:
        refuse_target(out, overwrite, (*a.sources, *b.sources))
    solution = find(
        a,
        b,
        solver=solver,
        seed=seed,
        assume=assumed(assume),
        backbone_only=backbone_only,
        groups=cast("Groups", groups),
        keep_tied=keep_tied,
        hold=hold or (),
        data=batches_for(described(data, data_option, "--data"), a),
        device=found_device(),
        progress=True,
    )
    for line in showing.solved(solution, moving):
        typer.echo(line)
    if alignment is not None:
        typer.echo(f"alignment: {solution.alignment.save(alignment)}")
    if out is not None:
        typer.echo(f"moved model: {solution.apply(b).save(out, overwrite=overwrite, progress=True)}/")
