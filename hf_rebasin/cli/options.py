"""Options that several commands have, and functions that turn them into models, data and recipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import registry
from ..checkpoints.target import refuse_target
from ..errors import OptionError

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..publishing.record import MergeRecord
    from ..recipes.documents import Document
    from ..recipes.recipe import PublishSettings, Recipe

MODEL = "Folder or Hub id; id@revision pins a commit, branch or tag."
Assume = Annotated[
    list[str] | None,
    typer.Option(
        help="Property to assume equal without checking: config (config:KEY for one setting), labels or vocabulary. "
        "May be repeated."
    ),
]
VocabularyRows = Annotated[
    str | None,
    typer.Option(
        "--vocabulary",
        help="Rows of tokens where the models have other ones: first (the first model's, its own where another has "
        "none) or common (its padding is cut to the rows that all have); by default such models are refused.",
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Random seed; the same seed gives the same result, byte for byte.")
]
SolverName = Annotated[
    str, typer.Option(help=f"Solver that finds the alignment: {', '.join(registry.names('solver'))}.")
]
BackboneOnly = Annotated[
    bool,
    typer.Option("--backbone-only", help="Keep the first model's head, and align and merge only the backbones."),
]
GroupsName = Annotated[
    str,
    typer.Option(
        "--groups",
        help="What aligning may do to units: full (permute and, where exact, rotate and scale) or permutation.",
    ),
]
KeepTied = Annotated[
    bool,
    typer.Option(
        "--keep-tied", help="Keep the head tied to the embedding; the residual stream is then permuted, not rotated."
    ),
]
Hold = Annotated[
    list[str] | None,
    typer.Option(help="Symmetry to leave as it is, by its name in `inspect` or as 'ff.*'. May be repeated."),
]
DataName = Annotated[
    str | None,
    typer.Option(
        help="Dataset to run the models on while aligning or merging: Hub id, folder or file; labels are optional."
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data-option",
        "-d",
        help="Setting of the --data dataset, such as split=train or samples=256. May be repeated.",
    ),
]
Metric = Annotated[
    list[str] | None,
    typer.Option(
        help="Metric to compute: accuracy or perplexity; by default those that fit the model. May be repeated."
    ),
]
Points = Annotated[int, typer.Option(min=0, help="Number of points on the line between two models, ends included.")]
RecalibrateHow = Annotated[
    str,
    typer.Option(
        help="What to recompute with --data: statistics (of BatchNorm layers), repair (the mean and standard "
        "deviation of every unit, as in REPAIR) or none."
    ),
]
Public = Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")]
License = Annotated[
    str | None,
    typer.Option(help="Licence of the result, such as mit; needed if those of the inputs differ or are unknown."),
]
Revision = Annotated[str | None, typer.Option(help="Branch to publish to; created if it does not exist.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")]
CommitMessage = Annotated[str | None, typer.Option(help="Message of the commit.")]
Template = Annotated[Path | None, typer.Option(help="Jinja2 template of the model card, instead of the built-in one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it already exists.")]


def open_checkpoint(model: str) -> Checkpoint:
    """Open one model."""
    return open_checkpoints([model])[0]


def open_checkpoints(models: Sequence[str]) -> list[Checkpoint]:
    """Open several models; a branch that several of them name is the same commit."""
    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.hub import pin_commits

    entries = [recipe_from_options({"models": [model]}).models[0] for model in models]
    with pin_commits():
        return [Checkpoint.open(entry.model, revision=entry.revision, progress=shows_progress()) for entry in entries]


def find_device() -> Any:
    """Return the device that accelerate chooses; None on a single process without an accelerator."""
    import torch

    available = torch.accelerator.is_available()
    if not available and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not available).device


def shows_progress() -> bool:
    """Tell whether this process shows progress: only the first one does, and on a terminal."""
    from ..modules.distributed import is_main_process

    return is_main_process() and sys.stderr.isatty()


def say(text: str, *, err: bool = False) -> None:
    """Print a line, in the first process only."""
    from ..modules.distributed import is_main_process

    if is_main_process():
        typer.echo(text, err=err)


def refuse_out(out: Path, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse a bad target, in the writing process only: others may check after it has begun to write."""
    from ..modules.distributed import is_main_process

    if is_main_process():
        refuse_target(out, overwrite, sources)


def save_with_record(checkpoint: Checkpoint, out: Path, overwrite: bool, record: MergeRecord) -> Path:
    """Write a model with its record in the first process, while the others wait."""
    from ..modules.distributed import is_main_process, wait_for_everyone

    if is_main_process():
        record.save(checkpoint, out, overwrite=overwrite, progress=shows_progress())
    wait_for_everyone()
    return out


def load_data(dataset: str, options: list[str] | None, checkpoint: Checkpoint, *, needs_labels: bool = False) -> Any:
    """Open the data of --data and --data-option for a model."""
    return load_batches(read_data_options(dataset, options, "--data"), checkpoint, needs_labels=needs_labels)


def load_batches(settings: dict[str, Any] | None, checkpoint: Checkpoint, *, needs_labels: bool = False) -> Any:
    """Open data that are described as in a recipe, with the same checks; None without a description."""
    from ..data.batches import open_data

    data = recipe_from_options({"models": ["x", "y"], "align": False, "data": settings}).data
    return None if data is None else open_data(data, checkpoint, needs_labels=needs_labels)


def recipe_from_options(settings: dict[str, Any]) -> Recipe:
    """Make a recipe of what the command line sets."""
    from ..recipes.recipe import Recipe

    return Recipe.from_dict(settings, name="the command")


def publish_options(
    to: str | None,
    public: bool,
    license: str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
) -> dict[str, Any]:
    """Return the options on publishing that are given, by the keys of a recipe."""
    options = {"to": to, "private": False if public else None, "license": license, "revision": revision}
    options |= {"create_pr": create_pr or None, "message": commit_message}
    return {key: value for key, value in options.items() if value is not None}


def read_publish_settings(options: dict[str, Any]) -> PublishSettings:
    """Check options on publishing as a recipe does, and fill in its defaults."""
    settings = recipe_from_options({"models": ["x"], "publish": options}).publish
    assert settings is not None
    return settings


def with_publish_options(recipe: Recipe, options: dict[str, Any], template: Path | None) -> Recipe:
    """Return a recipe in which options on publishing override its own settings."""
    if recipe.publish is not None:
        options = {**recipe.publish.model_dump(exclude_defaults=True), **options}
    if "to" not in options and (options or template is not None):
        names = {"private": "public", "create_pr": "create-pr", "message": "commit-message"}
        given = [f"--{names.get(key, key)}" for key in [*options, *(["template"] if template else [])]]
        raise OptionError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for publishing; name the repository "
            "(--push-to ORG/NAME)"
        )
    return recipe.model_copy(update={"publish": read_publish_settings(options) if options else None})


def documents_from_file(path: str) -> list[Document]:
    """Read the recipes of a YAML file, most of which have one."""
    from ..recipes.documents import read_documents

    return read_documents(path)


def recipe_field(option: str) -> str | None:
    """Return the field of a recipe, or of its `align`, that an option of `merge` sets; None if there is none.

    Example: `recipe_field("method")` is "merge_method", `recipe_field("data_option")` is "data".
    """
    from ..recipes.recipe import AlignSettings, Recipe

    fields = {*Recipe.model_fields, *AlignSettings.model_fields} - {"models", "publish"}
    names = (option, f"merge_{option}", f"{option}_model", f"{option}s", option.removesuffix("_option"))
    return next((name for name in names if name in fields), None)


def refuse_options_beside_recipe(context: typer.Context, settings: Mapping[str, Any]) -> None:
    """Raise OptionError for an option that belongs in the recipe, with its line there.

    Args:
        context: the command, with the options that are given.
        settings: what all options set, by the keys of a recipe.
    """
    import yaml

    for option, value in context.params.items():
        source, field = context.get_parameter_source(option), recipe_field(option)
        if source is not None and source.name == "COMMANDLINE" and field is not None:
            if field not in settings and settings["align"]:
                field, setting = "align", {field: settings["align"][field]}
            else:
                field = field if field in settings else "align"
                setting = settings[field]
            line = yaml.safe_dump({field: setting}, default_flow_style=True, width=1000, allow_unicode=True)
            name = f"{'no-' if value is False else ''}{option.replace('_', '-')}"
            raise OptionError(
                f"--{name} is given together with a recipe; write it into the recipe ({line.strip()[1:-1]})"
            )


def align_settings(solver: str, seed: int, groups: str, keep_tied: bool, hold: list[str] | None) -> dict[str, Any]:
    """Return the options on aligning by the keys of a recipe."""
    return {"solver": solver, "seed": seed, "groups": groups, "keep_tied": keep_tied, "hold": hold or []}


def read_assignments(texts: list[str], option: str = "--parameter", example: str = "t=0.3") -> dict[str, Any]:
    """Read texts NAME=VALUE, with values in YAML."""
    from ..recipes.yaml_reader import read_yaml

    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"{option} {text!r} is not NAME=VALUE, as in {example}")
        try:
            values[name] = read_yaml(value, repr(value))
        except OptionError as error:
            raise OptionError(f"{option} {text!r} has no value that can be read: {error}") from error
    return values


def read_data_options(dataset: str | None, options: list[str] | None, option: str) -> dict[str, Any] | None:
    """Describe data by the keys of a recipe; None if no option is given."""
    settings = {} if dataset is None else {"dataset": dataset}
    return {**settings, **read_assignments(options or [], f"{option}-option", "split=test")} or None


def refuse_report(report: Path | None, overwrite: bool) -> None:
    """Raise OptionError unless a report can be written to a file."""
    if report is not None and (report.suffix != ".html" or report.is_dir()):
        raise OptionError(f"--report {report} is not an HTML file; name one, such as report.html")
    if report is not None and report.exists() and not overwrite:
        raise OptionError(f"{report} already exists; name another file, or overwrite it (--overwrite)")


def today() -> str:
    """Return the date of today, such as 2026-01-31."""
    from datetime import date

    return date.today().isoformat()


def command_line() -> str:
    """Return the command that is running, as one types it."""
    import shlex

    return shlex.join(["hf-rebasin", *sys.argv[1:]])


def read_vocabulary(vocabulary: str | None) -> Any:
    """Check the value of --vocabulary as a recipe does."""
    return recipe_from_options({"models": ["x"], "vocabulary": vocabulary}).vocabulary


def read_assumptions(assume: list[str] | None) -> Any:
    """Check the values of --assume as a recipe does."""
    return recipe_from_options({"models": ["x"], "assume": list(assume or [])}).assume
