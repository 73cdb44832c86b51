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
    VocabularyRows,
    align_settings,
    command_line,
    documents_from_file,
    find_device,
    publish_options,
    read_assignments,
    read_data_options,
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
        str,
        typer.Option(
            help=f"Merge method: {', '.join(registry.names('merge method'))}; one that fits layers needs --data."
        ),
    ] = "linear",
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            help="Parameter of the method, such as t=0.3, weights=[1,3] or, from the first layer to the last, "
            "t=[0,1]. May be repeated.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model that the others were fine-tuned from, for methods that merge differences, such as ties; for "
            "others, which of the models stays fixed."
        ),
    ] = None,
    align: Annotated[
        bool, typer.Option(help="Before merging, move the other models into the first model's coordinates.")
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
    vocabulary: VocabularyRows = None,
    backbone_only: BackboneOnly = False,
    data: DataName = None,
    data_option: DataOption = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="After merging, fit every layer to the mean of its outputs in the models, on --data."
        ),
    ] = False,
    recalibrate: RecalibrateHow = "statistics",
    evaluate: Annotated[
        str | None, typer.Option(help="Dataset to measure the merge on; if only -e is given, the dataset of --data.")
    ] = None,
    evaluate_option: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate-option",
            "-e",
            help="Setting of the --evaluate dataset, as with -d, or points=11: the number of points measured on the "
            "line between two models. May be repeated.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file for the report; its numbers and plots are written next to it.")
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option("--push-to", help="Hub repository ORG/NAME to publish the merge to, with a model card."),
    ] = None,
    public: Public = False,
    license: License = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    commit_message: CommitMessage = None,
    template: Template = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one file of weights.")] = "5GB",
    intermediates: Annotated[
        Path | None,
        typer.Option(help="Folder for the merges that later documents of a recipe use; by default OUT-intermediates."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be done, but write nothing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Align models that were trained apart and merge them into one that from_pretrained loads."""
    from ...modules.distributed import is_main_process
    from ...pipeline import run_documents
    from ...recipes.documents import Document
    from .. import output

    settings = {
        "merge_method": method,
        "parameters": read_assignments(parameter or []),
        "base_model": base,
        "seed": seed,
        "align": align_settings(solver, seed, groups, keep_tied, hold) if align else False,
        "dtype": dtype,
        "assume": list(assume or []),
        "vocabulary": vocabulary,
        "backbone_only": backbone_only,
        "data": read_data_options(data, data_option, "--data"),
        "refit": refit,
        "recalibrate": False if recalibrate == "none" else recalibrate,
        "evaluate": read_data_options(evaluate, evaluate_option, "--evaluate"),
    }
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        refuse_options_beside_recipe(context, settings)
        *others, last = documents_from_file(models[0])
        recipe = last.recipe
    else:
        if len(models) < 2:
            raise OptionError(f"a merge needs two models or a recipe (.yaml), got {models[0]!r}")
        recipe = recipe_from_options({"models": models, **settings})
        others = []
    options = publish_options(push_to, public, license, revision, create_pr, commit_message)
    recipe = with_publish_options(recipe, options, template)
    if report is not None and out.resolve() in report.resolve().parents:
        raise OptionError(
            f"{report} is inside the folder of the merge, which gets numbers and plots of its own; name another file"
        )
    refuse_report(report, overwrite)
    refuse_out(out, overwrite, [Path(entry.model) for entry in recipe.in_order() if Path(entry.model).is_dir()])
    if dry_run:
        for document in others:
            say(f"would merge {document.name} first, which later documents use")
        if others:
            say("the merges that use them can be planned once they are there")
            return
        for line in output.describe_plan(recipe, out):
            say(line)
        return

    def print_intermediate(name: str, folder: Path, reused: bool) -> None:
        say(f"{name}: {folder}/ is there, and nothing it depends on has changed" if reused else f"{name}: {folder}/")

    def print_merge(merged: MergeResult) -> None:
        for solution, model in zip(merged.solutions, merged.models[1:], strict=False):
            for line in output.describe_solution(solution, model.name):
                say(line)
        say(f"merged model ({recipe.merge_method}): {out}/, {output.describe_size(merged.checkpoint)}")
        for remark in merged.remarks:
            say(f"note: {remark}")

    def print_report(measured: Report) -> None:
        for line in output.describe_report(measured):
            say(line)
        if report is not None and is_main_process():
            say(f"report: {measured.save(report)[-1]}")

    result = run_documents(
        [*others, Document(name=None, recipe=recipe)],
        out,
        intermediates=intermediates,
        started=print_intermediate,
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
    if result.published is not None:
        for line in output.describe_publication(result.published):
            say(line)
