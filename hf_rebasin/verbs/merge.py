"""hf-rebasin merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    RecalibrateHow,
    Seed,
    SolverName,
    align_settings,
    command,
    described,
    found_device,
    opened_model,
    parameters,
    recipe_file,
    recipe_of,
    refuse_options_beside_a_recipe,
    refuse_report,
    today,
)


def merge(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Two or more models, or one recipe (.yaml). " + MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    method: Annotated[str, typer.Option(help="linear, lerp, slerp or refit (with --data).")] = "linear",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="Of the method, as t=0.3 or weights=[1,3]. May be repeated."),
    ] = None,
    align: Annotated[bool, typer.Option(help="Bring the models to the first one's coordinates first.")] = True,
    solver: SolverName = "weight_matching",
    seed: Seed = 0,
    groups: GroupsName = "full",
    keep_tied: KeepTied = False,
    hold: Hold = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the result: float32, float16, bfloat16; by default the first's.")
    ] = None,
    assume: Assume = None,
    backbone_only: BackboneOnly = False,
    data: DataName = None,
    data_option: DataOption = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the layers of the merge to what the models say to the data.")
    ] = False,
    recalibrate: RecalibrateHow = "statistics",
    evaluate: Annotated[
        str | None, typer.Option(help="Dataset to measure on; by default that of --data, as --evaluate-option says.")
    ] = None,
    evaluate_option: Annotated[
        list[str] | None,
        typer.Option("--evaluate-option", "-e", help="As -d, and points=11 of the line. May be repeated."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file for the report; its numbers and plots go beside it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge models that were trained apart into one that from_pretrained loads."""
    from .. import showing
    from ..running import run

    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        refuse_options_beside_a_recipe(context)
        recipe = recipe_file(models[0])
    else:
        if len(models) < 2:
            raise OptionError(f"a merge needs two models or a recipe (.yaml), got {models[0]!r}")
        recipe = recipe_of(
            {
                "models": models,
                "merge_method": method,
                "parameters": parameters(parameter or []),
                "align": align_settings(solver, seed, groups, keep_tied, hold) if align else False,
                "dtype": dtype,
                "assume": list(assume or []),
                "backbone_only": backbone_only,
                "data": described(data, data_option, "--data"),
                "refit": refit,
                "recalibrate": False if recalibrate == "none" else recalibrate,
                "evaluate": described(evaluate, evaluate_option, "--evaluate"),
            }
        )
    refuse_report(report, overwrite)
    refuse_target(out, overwrite, [Path(entry.model) for entry in recipe.models if Path(entry.model).is_dir()])
    if dry_run:
        for line in showing.plan(recipe, out):
            typer.echo(line)
        return
    needs_device = recipe.align is not None or recipe.data is not None or recipe.evaluate is not None
    device = found_device() if needs_device else None
    merged = run(recipe, device=device, progress=True)
    for solution, model in zip(merged.solutions, merged.models[1:], strict=False):
        for line in showing.solved(solution, model.name):
            typer.echo(line)
    folder = merged.checkpoint.save(out, overwrite=overwrite, progress=True)
    typer.echo(f"merged model ({recipe.merge_method}): {folder}/, {showing.size(merged.checkpoint)}")
    if recipe.evaluate is not None or report is not None:
        from ..judging import judged

        found = judged(
            recipe, merged, opened_model(str(folder)), created=today(), command=command(), device=device, progress=True
        )
        for line in showing.judged(found):
            typer.echo(line)
        if report is not None:
            typer.echo(f"report: {found.save(report)[-1]}")
