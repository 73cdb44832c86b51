"""The command `hf-rebasin merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ... import registry
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
    command_line,
    find_device,
    publish_options,
    read_assignments,
    read_data_options,
    recipe_from_file,
    recipe_from_options,
    refuse_options_beside_recipe,
    refuse_out,
    refuse_report,
    say,
    shows_progress,
    today,
    with_publish_options,
)

if TYPE_CHECKING:
    from ...recipes.runner import MergeResult
    from ...reports.report import Report


def merge(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Two or more models, or one recipe (.yaml). " + MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    method: Annotated[
        str, typer.Option(help=f"Merge method: {', '.join(registry.names('merge method'))}; some use --data.")
    ] = "linear",
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            help="Parameter of the method: t=0.3, t=[0,1] over the layers, weights=[1,3] … May be repeated.",
        ),
    ] = None,
    align: Annotated[
        bool, typer.Option(help="Bring the models to the first one's coordinates before merging.")
    ] = True,
    solver: SolverName = "weight_matching",
    seed: Seed = 0,
    groups: GroupsName = "full",
    keep_tied: KeepTied = False,
    hold: Hold = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the result: float32, float16, bfloat16 or float64; by default the first model's."),
    ] = None,
    assume: Assume = None,
    backbone_only: BackboneOnly = False,
    data: DataName = None,
    data_option: DataOption = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the layers of the merge to the models' outputs on the data.")
    ] = False,
    recalibrate: RecalibrateHow = "statistics",
    evaluate: Annotated[
        str | None, typer.Option(help="Dataset to measure on; with -e, by default the dataset of --data.")
    ] = None,
    evaluate_option: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate-option",
            "-e",
            help="Setting of that dataset, as with -d, or points=11 on the line. May be repeated.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file for the report; its numbers and plots are written beside it.")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option("--push-to", help="Repository ORG/NAME to publish the merge to, with a model card.")
    ] = None,
    public: Public = False,
    license: License = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    commit_message: CommitMessage = None,
    template: Template = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file of weights.")] = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be done, but write nothing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge models that were trained apart into one that from_pretrained loads."""
    from ...modules.distributed import is_main_process
    from ...pipeline import run_recipe
    from .. import output

    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        refuse_options_beside_recipe(context)
        recipe = recipe_from_file(models[0])
    else:
        if len(models) < 2:
            raise OptionError(f"a merge needs two models or a recipe (.yaml), got {models[0]!r}")
        recipe = recipe_from_options(
            {
                "models": models,
                "merge_method": method,
                "parameters": read_assignments(parameter or []),
                "align": align_settings(solver, seed, groups, keep_tied, hold) if align else False,
                "dtype": dtype,
                "assume": list(assume or []),
                "backbone_only": backbone_only,
                "data": read_data_options(data, data_option, "--data"),
                "refit": refit,
                "recalibrate": False if recalibrate == "none" else recalibrate,
                "evaluate": read_data_options(evaluate, evaluate_option, "--evaluate"),
            }
        )
    options = publish_options(push_to, public, license, revision, create_pr, commit_message)
    recipe = with_publish_options(recipe, options, template)
    if report is not None and out.resolve() in report.resolve().parents:
        raise OptionError(
            f"{report} is inside the folder of the merge, which gets numbers and plots of its own; name another file"
        )
    refuse_report(report, overwrite)
    refuse_out(out, overwrite, [Path(entry.model) for entry in recipe.models if Path(entry.model).is_dir()])
    if dry_run:
        for line in output.describe_plan(recipe, out):
            say(line)
        return

    def print_merge(merged: MergeResult) -> None:
        for solution, model in zip(merged.solutions, merged.models[1:], strict=False):
            for line in output.describe_solution(solution, model.name):
                say(line)
        say(f"merged model ({recipe.merge_method}): {out}/, {output.describe_size(merged.checkpoint)}")

    def print_report(assessment: Report) -> None:
        for line in output.describe_report(assessment):
            say(line)
        if report is not None and is_main_process():
            say(f"report: {assessment.save(report)[-1]}")

    done = run_recipe(
        recipe,
        out,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        report=report is not None,
        template=template,
        created=today(),
        command=command_line(),
        device=find_device(),
        progress=shows_progress(),
        merged=print_merge,
        judge=print_report,
    )
    if done.published is not None:
        for line in output.describe_publication(done.published):
            say(line)
