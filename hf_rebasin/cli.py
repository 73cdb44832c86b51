"""The command line. Each verb imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .errors import OptionError, RebasinError
from .folder import refuse_target
from .options import (
    MODEL,
    Assume,
    BackboneOnly,
    DataName,
    DataOption,
    GroupsName,
    Hold,
    KeepTied,
    Metric,
    Overwrite,
    Points,
    RecalibrateHow,
    Seed,
    SolverName,
    align_settings,
    assumed,
    batches_for,
    command,
    data_for,
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
from .text import printable

if TYPE_CHECKING:
    from .limits import Groups

app = typer.Typer(
    name="hf-rebasin",
    help="Merge Hugging Face checkpoints that were trained apart: bring them to the same coordinates, then merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the models go.")] = Path("demo"),
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="mlp, mlp512, resnet or vit; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many of each are trained; every pair of them is merged.")] = 3,
) -> None:
    """Train small models apart, align them, merge them, report. Three minutes on 2 cores, no download."""
    from . import demo as demonstration

    demonstration.run(out, kinds or demonstration.DEMO, seeds, say=typer.echo)


@app.command()
def compare(
    fixed: Annotated[str, typer.Argument(help=MODEL)],
    moving: Annotated[str, typer.Argument(help="The other model.")],
) -> None:
    """Are two models of one base, trained apart, or different? One screen, and a verdict."""
    from . import showing
    from .api import compare as look

    a, b = opened_model(fixed), opened_model(moving)
    comparison = look(a, b, device=found_device(), progress=True)
    for line in showing.side_by_side(a, b, comparison):
        typer.echo(line)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    every: Annotated[bool, typer.Option("--all", help="One line per symmetry instead of one per family.")] = False,
    infer: Annotated[
        bool, typer.Option("--infer", help="Read them off the forward pass, also where there is a table.")
    ] = False,
    write_table: Annotated[
        Path | None, typer.Option(help="With --infer: write what was found as a spec file, to be kept or edited.")
    ] = None,
) -> None:
    """Show the symmetries of a model: name, group, size, tensors."""
    from . import showing
    from .describing import inferred, spec_of, written

    if write_table is not None and not infer:
        raise OptionError("--write-table writes what was inferred; give --infer, too")
    if write_table is not None and write_table.exists():
        raise OptionError(f"{write_table} is already there; name another file")
    checkpoint = opened_model(model)
    spec = inferred(checkpoint) if infer else spec_of(checkpoint)
    how = ", inferred from its forward pass" if spec.pins else ""
    typer.echo(f"{model} ({type(checkpoint.config).__name__.removesuffix('Config')}): {spec}{how}\n")
    for line in showing.symmetries(spec, every):
        typer.echo(line)
    for line in showing.held(spec):
        typer.echo(line)
    for target, kept in spec.ties.items():
        typer.echo(f"\ntied: {target} is {kept}")
    if write_table is not None:
        write_table.write_text(written(spec, checkpoint), encoding="utf-8")
        typer.echo(f"\ntable: {write_table}")


@app.command()
def check(
    model: Annotated[str | None, typer.Argument(help=MODEL + " Without one: the small model of every table.")] = None,
    seed: Seed = 0,
) -> None:
    """Move a model at random and compare its outputs: your own proof that moving changes nothing."""
    from .checking import check as run_check
    from .checking import tiny_models

    failed = 0
    checks = [(None, opened_model(model))] if model else tiny_models()
    for name, one in checks:
        result = run_check(one, seed=seed)
        typer.echo(f"{name}: {str(result).partition(': ')[2]}" if name else str(result))
        failed += not result.holds
    if failed:
        raise typer.Exit(1)


@app.command()
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
    from . import showing
    from .api import align as find

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


@app.command()
def apply(
    alignment: Annotated[Path, typer.Argument(help="What align --alignment wrote.")],
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the moved model.")],
    overwrite: Overwrite = False,
) -> None:
    """Move a model by a saved alignment; its function stays exactly the same."""
    from .alignment import Alignment

    checkpoint = opened_model(model)
    refuse_target(out, overwrite, checkpoint.sources)
    moved = Alignment.load(alignment).apply(checkpoint)
    typer.echo(f"moved model: {moved.save(out, overwrite=overwrite, progress=True)}/")


@app.command()
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
    from . import showing
    from .running import run

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
        from .judging import judged

        found = judged(
            recipe, merged, opened_model(str(folder)), created=today(), command=command(), device=device, progress=True
        )
        for line in showing.judged(found):
            typer.echo(line)
        if report is not None:
            typer.echo(f"report: {found.save(report)[-1]}")


@app.command()
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
    from . import showing
    from .recalibrating import has_statistics, repair
    from .running import recalibrated

    checkpoint, sources = opened_model(model), [opened_model(name) for name in like or []]
    refuse_target(out, overwrite, (*checkpoint.sources, *(path for one in sources for path in one.sources)))
    if not sources and not has_statistics(checkpoint):
        raise OptionError(
            f"{model} has no running statistics; to repair a merge, name what was merged (--like A --like B)"
        )
    batches = data_for(data, data_option, checkpoint)
    typer.echo(f"data: {batches.describe()}")
    if sources:
        new = repair(checkpoint, sources, batches, device=found_device(), progress=True)
    else:
        new = recalibrated(checkpoint, batches, exact=exact, device=found_device(), progress=True)
    typer.echo(f"recalibrated model: {new.save(out, overwrite=overwrite, progress=True)}/, {showing.size(new)}")


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="One or more models. " + MODEL)],
    data: Annotated[str, typer.Option(help="Dataset with labels, or text for a language model.")],
    data_option: DataOption = None,
    metric: Metric = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss and metrics of models on data."""
    from . import showing
    from .evaluating import evaluate as measure

    found = {}
    for name in models:
        checkpoint = opened_model(name)
        batches = data_for(data, data_option, checkpoint)
        module = checkpoint.model().to(found_device())
        found[name] = measure(module, batches, metrics=metric, progress=True)
    for line in showing.measured(found, as_json):
        typer.echo(line)


@app.command()
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

    from . import showing
    from .evaluating import evaluate as measure
    from .line import between
    from .line import interpolate as along
    from .recalibrating import recalibrate as renew

    a, b = opened_model(fixed), opened_model(moving)
    if out is not None:
        refuse_target(out, overwrite, (*a.sources, *b.sources))
    batches, device = data_for(data, data_option, a), found_device()
    prepare = None
    if other := described(recalibrate, recalibrate_option, "--recalibrate"):
        like = described(data, data_option, "--data") if recalibrate is None else None
        prepare = partial(renew, batches=batches_for({**(like or {}), **other}, a), device=device)
    measured = partial(measure, data=batches, metrics=metric)
    curve = along(a, b, measured, points=points, prepare=prepare, device=device, progress=True)
    for line in showing.curve(curve, as_json):
        typer.echo(line)
    if out is not None:
        best = curve.best_by(by)
        folder = between(a, b, best, prepare=prepare, device=device).save(out, overwrite=overwrite, progress=True)
        typer.echo(f"best model by {by} (λ = {best:.3g}): {folder}/", err=as_json)


def main() -> None:
    """The entry point: errors of ours are one sentence and exit status 1."""
    try:
        app()
    except (RebasinError, OSError) as error:  # of the system: no such folder, no permission, no space left
        typer.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; a model that was not finished leaves nothing behind", err=True)
        sys.exit(130)
