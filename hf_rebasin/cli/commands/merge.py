"""hf-rebasin merge"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import OptionError
from ..options import (
    MODEL,
    Assume,
    BackboneOnly,
    CommitMessage,
    CreatePr,
    DataName,
    DataOption,
    GroupsName,
    Hold,
    KeepTied,
    License,
    Overwrite,
    Public,
    RecalibrateHow,
    Revision,
    Seed,
    SolverName,
    Template,
    align_settings,
    command,
    described,
    found_device,
    parameters,
    published_as,
    recipe_file,
    recipe_of,
    refuse_options_beside_a_recipe,
    refuse_out,
    refuse_report,
    said_of_publishing,
    say,
    shown,
    today,
)

if TYPE_CHECKING:
    from ...recipes.runner import Merged
    from ...reports.report import Report


def merge(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Two or more models, or one recipe (.yaml). " + MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    method: Annotated[str, typer.Option(help="linear, lerp, slerp; with --data refit or distil.")] = "linear",
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            help="Of the method, as t=0.3, t=[0,1] over the layers, weights=[1,3]. May be repeated.",
        ),
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
    push_to: Annotated[
        str | None, typer.Option("--push-to", help="ORG/NAME: publish the merge there, with its card.")
    ] = None,
    public: Public = False,
    license: License = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    commit_message: CommitMessage = None,
    template: Template = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge models that were trained apart into one that from_pretrained loads."""
    from ...modules.distributed import is_first
    from ...pipeline import run_recipe
    from .. import output

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
    said = said_of_publishing(push_to, public, license, revision, create_pr, commit_message)
    recipe = published_as(recipe, said, template)
    if report is not None and out.resolve() in report.resolve().parents:
        raise OptionError(
            f"{report} is inside of the merge's folder, which gets numbers and plots of its own; name another"
        )
    refuse_report(report, overwrite)
    refuse_out(out, overwrite, [Path(entry.model) for entry in recipe.models if Path(entry.model).is_dir()])
    if dry_run:
        for line in output.plan(recipe, out):
            say(line)
        return

    def tell(merged: Merged) -> None:
        for solution, model in zip(merged.solutions, merged.models[1:], strict=False):
            for line in output.solved(solution, model.name):
                say(line)
        say(f"merged model ({recipe.merge_method}): {out}/, {output.size(merged.checkpoint)}")

    def judge(found: Report) -> None:
        for line in output.judged(found):
            say(line)
        if report is not None and is_first():
            say(f"report: {found.save(report)[-1]}")

    done = run_recipe(
        recipe,
        out,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        report=report is not None,
        template=template,
        created=today(),
        command=command(),
        device=found_device(),
        progress=shown(),
        merged=tell,
        judge=judge,
    )
    if done.published is not None:
        for line in output.published(done.published):
            say(line)
