"""A recipe from beginning to end: models opened, aligned, merged, written with their record, measured, published."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.folder import refuse_target
from .errors import HubError, OptionError
from .modules.distributed import is_first, wait
from .modules.functional import Device
from .publishing.record import add_report, begun, record_of
from .publishing.upload import Published, publish_as, refuse_unready
from .recipes.assessment import judged
from .recipes.recipe import Recipe
from .recipes.runner import Merged, opened, run
from .reports.report import Report


@dataclass(frozen=True)
class Done:
    """What a recipe came to.

    Args:
        folder: with the merge.
        merged: the same, with all that led to it.
        report: what it is worth; None if nothing was measured.
        published: where it is on the Hub; None if it is not to be.
    """

    folder: Path
    merged: Merged
    report: Report | None = None
    published: Published | None = None


def run_recipe(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    report: bool = False,
    template: str | os.PathLike[str] | None = None,
    created: str = "",
    command: str = "",
    device: Device = None,
    progress: bool = False,
    merged: Callable[[Merged], object] = lambda _: None,
    judge: Callable[[Report], object] = lambda _: None,
) -> Done:
    """Do what a recipe says, as `hf-rebasin merge RECIPE -o OUT` does.

    The folder is complete or absent. Beside the weights it has the recipe with all revisions pinned, the alignments,
    `rebasin.json`, and of what was measured the numbers and plots. Under `accelerate launch` every process takes its
    share of the work, and the first one writes and publishes.

    Args:
        recipe: what to do.
        out: the folder to be written.
        overwrite: replace a model that is there.
        max_shard_size: of a file of weights.
        report: judge the merge even where the recipe does not say on what it is measured.
        template: of the model card, in Jinja2, instead of ours.
        created: a date for the report.
        command: for the report, that does it again.
        device: where it is computed.
        progress: show progress bars (on a terminal).
        merged: called with what came out, when it is written.
        judge: called with the report.

    Returns:
        A `Done`.

    Raises:
        RebasinError: models that do not fit, a target that is there, a licence that is not known, a Hub that refuses;
            as much of it as can be known is said before anything is computed.

    Example:
        >>> recipe = Recipe.from_dict({"models": ["me/bert-seed-0", "me/bert-seed-1"], "publish": "me/bert-merged"})
        >>> done = run_recipe(recipe, "merged")
        >>> done.published.url
        'https://huggingface.co/me/bert-merged/commit/…'
    """
    target, found = Path(out), opened(recipe, progress=progress)
    if is_first():
        refuse_target(target, overwrite, [place for model in found.models for place in model.sources])
    if recipe.publish is not None:
        refuse_unready(found.models, recipe.publish)
    if template is not None and not Path(template).is_file():
        raise OptionError(f"{template} is no template: there is no such file")
    reading = begun(found.models) if is_first() else []
    result = run(recipe, found=found, device=device, progress=progress)
    if is_first():
        record = record_of(recipe, result, [one() for one in reading], max_shard_size=max_shard_size, device=device)
        save = partial(result.checkpoint.save, overwrite=overwrite, max_shard_size=max_shard_size)
        save(target, progress=progress, beside=record.write)
    wait()
    merged(result)
    what = None
    if recipe.evaluate is not None or report:
        saved = Checkpoint.open(target)
        what = judged(recipe, result, saved, created=created, command=command, device=device, progress=progress)
        judge(what)
        if is_first():
            add_report(target, what, recipe, result)
    published = None
    if recipe.publish is not None and is_first():
        given = None if template is None else Path(template)
        try:
            published = publish_as(recipe.publish, target, template=given, progress=progress)
        except HubError as error:  # what took long is done
            raise HubError(
                f"{error}. The merge is in {target}: publish it with hf-rebasin publish {target} {recipe.publish.to}"
            ) from error
    wait()
    return Done(target, result, what, published)
