"""What the command line asks for: options that several verbs have, and what is made of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoints.folder import refuse_target
from ..errors import OptionError

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..publishing.record import Record
    from ..recipes.recipe import PublishSettings, Recipe

MODEL = "Folder or Hub id; id@revision pins a commit, branch or tag."
Assume = Annotated[
    list[str] | None,
    typer.Option(help="Take this for the same without looking: config, labels or vocabulary. May be repeated."),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Of everything random; the same seed gives the same bytes.")
]
SolverName = Annotated[str, typer.Option(help="How the coordinates are found.")]
BackboneOnly = Annotated[
    bool,
    typer.Option("--backbone-only", help="Keep the first model's head; only base models are brought together."),
]
GroupsName = Annotated[
    str,
    typer.Option("--groups", help="full (rotations, bases of heads, scales, where exact) or permutation."),
]
KeepTied = Annotated[
    bool,
    typer.Option("--keep-tied", help="Never store a head apart from its embedding; its stream is only permuted."),
]
Hold = Annotated[
    list[str] | None, typer.Option(help="A symmetry that stays as it is, or a pattern as 'ff.*'. May be repeated.")
]
DataName = Annotated[
    str | None,
    typer.Option(help="Dataset to look at: Hub id, folder or file. Labels are not needed."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data-option", "-d", help="Of the data, as split=train or samples=256. May be repeated."),
]
Metric = Annotated[
    list[str] | None, typer.Option(help="accuracy or perplexity; by default what fits. May be repeated.")
]
Points = Annotated[int, typer.Option(min=0, help="Of the line between two models, ends included; 0 for no line.")]
RecalibrateHow = Annotated[
    str, typer.Option(help="statistics (of BatchNorm layers), repair (means and deviations of all units) or none.")
]
Public = Annotated[bool, typer.Option("--public", help="A repository that is made can be seen by everybody.")]
License = Annotated[
    str | None, typer.Option(help="Of the result, such as mit; needed where the inputs' differ or are not said.")
]
Revision = Annotated[str | None, typer.Option(help="Branch to publish to; made if it is not there.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")]
CommitMessage = Annotated[str | None, typer.Option(help="Of the commit.")]
Template = Annotated[Path | None, typer.Option(help="Jinja2 template for the card instead of ours.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")]


def opened_model(model: str) -> Checkpoint:
    return opened_models([model])[0]


def opened_models(models: Sequence[str]) -> list[Checkpoint]:
    """Several at once: a branch that two of them name is one commit."""
    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.hub import once

    entries = [recipe_of({"models": [model]}).models[0] for model in models]
    with once():
        return [Checkpoint.open(entry.model, revision=entry.revision, progress=shown()) for entry in entries]


def found_device() -> Any:
    """Where accelerate places work, if there is an accelerator."""
    import torch

    there = torch.accelerator.is_available()
    if not there and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not there).device


def shown() -> bool:
    """Whether this process shows progress: of several the first one, and on a terminal."""
    from ..modules.distributed import is_first

    return is_first() and sys.stderr.isatty()


def say(text: str, *, err: bool = False) -> None:
    """Print a line; of several processes the first one does."""
    from ..modules.distributed import is_first

    if is_first():
        typer.echo(text, err=err)


def refuse_out(out: Path, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """`refuse_target`, by the process that is to write there: the others may look when it has begun."""
    from ..modules.distributed import is_first

    if is_first():
        refuse_target(out, overwrite, sources)


def saved(checkpoint: Checkpoint, out: Path, overwrite: bool, record: Record) -> Path:
    """Write a model with its record; of several processes the first one does, and the others wait."""
    from ..modules.distributed import is_first, wait

    if is_first():
        checkpoint.save(out, overwrite=overwrite, progress=shown(), beside=record.write)
    wait()
    return out


def data_for(dataset: str, options: list[str] | None, checkpoint: Checkpoint) -> Any:
    return batches_for(described(dataset, options, "--data"), checkpoint)


def batches_for(said: dict[str, Any] | None, checkpoint: Checkpoint) -> Any:
    """Batches of what is described as in a recipe, with the mistakes of one; None of nothing."""
    from ..data.batches import open_data

    described = recipe_of({"models": ["x", "y"], "align": False, "data": said}).data
    return None if described is None else open_data(described, checkpoint)


def recipe_of(said: dict[str, Any]) -> Recipe:
    from ..recipes.recipe import Recipe

    return Recipe.from_dict(said, name="the command")


def said_of_publishing(
    to: str | None,
    public: bool,
    license: str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
) -> dict[str, Any]:
    """What the command line says of publishing, in the words of a recipe; what it does not say is not there."""
    said = {"to": to, "private": False if public else None, "license": license, "revision": revision}
    said |= {"create_pr": create_pr or None, "message": commit_message}
    return {key: value for key, value in said.items() if value is not None}


def publish_settings(said: dict[str, Any]) -> PublishSettings:
    """The same with the mistakes of a recipe found, and its defaults."""
    settings = recipe_of({"models": ["x"], "publish": said}).publish
    assert settings is not None
    return settings


def published_as(recipe: Recipe, said: dict[str, Any], template: Path | None) -> Recipe:
    """A recipe with what the command line says of publishing over what it says itself."""
    if recipe.publish is not None:
        said = {**recipe.publish.model_dump(exclude_defaults=True), **said}
    if "to" not in said and (said or template is not None):
        raise OptionError(
            "--license, --public, --revision, --create-pr, --commit-message and --template are for "
            "publishing; say where to (--push-to ORG/NAME)"
        )
    return recipe.model_copy(update={"publish": publish_settings(said) if said else None})


def recipe_file(path: str) -> Recipe:
    from ..recipes.recipe import Recipe

    return Recipe.from_file(path)


def refuse_options_beside_a_recipe(context: typer.Context) -> None:
    """What a recipe says is not said again on the command line."""
    for name in (
        "method",
        "parameter",
        "align",
        "solver",
        "seed",
        "groups",
        "keep_tied",
        "hold",
        "dtype",
        "assume",
        "backbone_only",
        "data",
        "data_option",
        "refit",
        "recalibrate",
        "evaluate",
        "evaluate_option",
    ):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise OptionError(f"--{name.replace('_', '-')} is given beside a recipe; write it into the recipe")


def align_settings(solver: str, seed: int, groups: str, keep_tied: bool, hold: list[str] | None) -> dict[str, Any]:
    return {"solver": solver, "seed": seed, "groups": groups, "keep_tied": keep_tied, "hold": hold or []}


def parameters(said: list[str], option: str = "--parameter", such: str = "t=0.3") -> dict[str, Any]:
    from ..recipes.yaml_reader import read_yaml

    parameters = {}
    for one in said:
        name, equals, value = one.partition("=")
        if not equals:
            raise OptionError(f"{option} {one!r} is not NAME=VALUE, as in {such}")
        try:
            parameters[name] = read_yaml(value, repr(value))
        except OptionError as error:
            raise OptionError(f"{option} {one!r} has no value that can be read: {error}") from error
    return parameters


def described(dataset: str | None, options: list[str] | None, option: str) -> dict[str, Any] | None:
    """A description of data as in a recipe; None where nothing is said."""
    said = {} if dataset is None else {"dataset": dataset}
    return {**said, **parameters(options or [], f"{option}-option", "split=test")} or None


def refuse_report(report: Path | None, overwrite: bool) -> None:
    if report is not None and (report.suffix != ".html" or report.is_dir()):
        raise OptionError(f"--report {report} is no HTML file; name one, such as report.html")
    if report is not None and report.exists() and not overwrite:
        raise OptionError(f"{report} is already there; name another file, or overwrite it (--overwrite)")


def today() -> str:
    from datetime import date

    return date.today().isoformat()


def command() -> str:
    import shlex

    return shlex.join(["hf-rebasin", *sys.argv[1:]])


def assumed(assume: list[str] | None) -> Any:
    return recipe_of({"models": ["x"], "assume": list(assume or [])}).assume
