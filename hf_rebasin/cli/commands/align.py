"""The command `hf-rebasin align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import OptionError, SpecError
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
    VocabularyRows,
    find_device,
    load_batches,
    open_checkpoints,
    read_assumptions,
    read_data_options,
    read_vocabulary,
    refuse_out,
    save_with_record,
    say,
    shows_progress,
)


def align(
    fixed: Annotated[str, typer.Argument(help="Model that stays as it is. " + MODEL)],
    moving: Annotated[str, typer.Argument(help="Model to move.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the moved model.")] = None,
    alignment: Annotated[
        Path | None, typer.Option(help="File to write the alignment itself to (.safetensors).")
    ] = None,
    solver: SolverName = "weight_matching",
    seed: Seed = 0,
    assume: Assume = None,
    vocabulary: VocabularyRows = None,
    backbone_only: BackboneOnly = False,
    groups: GroupsName = "full",
    keep_tied: KeepTied = False,
    hold: Hold = None,
    data: DataName = None,
    data_option: DataOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Move one model into the coordinates of another without changing its function."""
    from ...modules.distributed import is_main_process
    from ...publishing.record import MergeRecord, make_provenance, pinned_settings, record_inputs
    from ...solving.align import align as align_models
    from ...symmetries.detection import detect_spec
    from .. import output

    if out is None and alignment is None:
        raise OptionError(
            "nothing would be written: name a folder for the moved model (--out FOLDER), a file for the alignment "
            "(--alignment FILE.safetensors), or both"
        )
    if alignment is not None and (alignment.is_dir() or (alignment.exists() and not overwrite)):
        raise OptionError(f"{alignment} already exists; name another file, or overwrite a file (--overwrite)")
    if alignment is not None and out is not None and alignment.resolve() == out.resolve():
        raise OptionError(f"{out} cannot be both the moved model and the alignment; name two")
    a, b = open_checkpoints([fixed, moving])
    if out is not None:
        refuse_out(out, overwrite, (*a.sources, *b.sources))
    if out is not None and backbone_only:
        try:
            detect_spec(b)
        except SpecError as error:
            raise SpecError(
                f"{moving} cannot be moved as a whole: {error}. Write the alignment of its backbone alone: "
                "--alignment FILE.safetensors without --out"
            ) from error
    batches, device = load_batches(read_data_options(data, data_option, "--data"), a), find_device()
    settings = {
        "solver": solver,
        "seed": seed,
        "assume": read_assumptions(assume),
        "vocabulary": read_vocabulary(vocabulary),
        "backbone_only": backbone_only,
        "groups": groups,
        "keep_tied": keep_tied,
        "hold": hold or [],
    }
    solution = align_models(a, b, data=batches, device=device, progress=shows_progress(), **settings)
    for line in output.describe_solution(solution, moving):
        say(line)
    if alignment is not None and is_main_process():
        say(f"alignment: {solution.alignment.save(alignment)}")
    if out is not None:
        settings |= {"data": None if batches is None else pinned_settings(batches)}
        inputs, data_uses = record_inputs([a, b]), {"looked at": batches}
        provenance = make_provenance("align", settings, inputs, data_uses, notes=solution.notes, device=device)
        record = MergeRecord(provenance, [solution.alignment])
        say(f"moved model: {save_with_record(solution.apply(b), out, overwrite, record)}/")
