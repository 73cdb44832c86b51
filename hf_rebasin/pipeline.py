"""Run a recipe from beginning to end: open, align and merge models, write them, measure and publish the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.target import refuse_target
from .errors import HubError, OptionError
from .modules.distributed import is_main_process, wait_for_everyone
from .modules.functional import Device
from .publishing.record import add_report, record_merge, start_hashing
from .publishing.upload import Published, publish_from_settings, publishing_command, refuse_unready
from .recipes.assessment import assess
from .recipes.documents import Document, is_unchanged, remember
from .recipes.recipe import Recipe
from .recipes.runner import MergeResult, open_models, run_merge
from .reports.report import Report


@dataclass(frozen=True, kw_only=True)
class RecipeResult:
    """Result of a recipe.

    Args:
        folder: folder with the merged model.
        merged: the merge, with the models and solutions that led to it.
        report: report on the merge; None if nothing was measured.
        published: where the merge is on the Hub; None if it was not published.
    """

    folder: Path
    merged: MergeResult
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
    merged: Callable[[MergeResult], object] = lambda _: None,
    judge: Callable[[Report], object] = lambda _: None,
) -> RecipeResult:
    """Run a recipe, as `hf-rebasin merge RECIPE -o OUT` does.

    The folder is complete or absent. Besides the weights it contains a model card, the recipe with all revisions
    pinned and `rebasin.json`; the alignments, and the numbers and plots of everything that was measured, are in its
    sub-folder `rebasin`. Under `accelerate launch` every process takes its share of the work, and the first one writes
    and publishes.

    Args:
        recipe: the recipe.
        out: folder to be written.
        overwrite: replace a model that is already there.
        max_shard_size: largest size of a file of weights.
        report: make a report even if the recipe names no data to measure the merge on.
        template: Jinja2 template of the model card, instead of the built-in one.
        created: date that the report states.
        command: command that repeats the run, for the report.
        device: device of all computations.
        progress: show progress bars (on a terminal).
        merged: called with the merge, once it is written.
        judge: called with the report.

    Returns:
        A `RecipeResult`.

    Raises:
        RebasinError: models that do not fit, an output that already exists, an unknown licence, a refusal of the Hub;
            whatever can be checked is checked before anything is computed.

    Example:
        >>> recipe = Recipe.from_dict({"models": ["me/bert-seed-0", "me/bert-seed-1"], "publish": "me/bert-merged"})
        >>> done = run_recipe(recipe, "merged")
        >>> done.published.url
        'https://huggingface.co/me/bert-merged/commit/…'
    """
    target, opened = Path(out), open_models(recipe, progress=progress)
    if is_main_process():
        refuse_target(target, overwrite, [path for model in opened.models for path in model.sources])
    if recipe.publish is not None:
        refuse_unready(opened.models, recipe.publish)
    if template is not None and not Path(template).is_file():
        raise OptionError(f"{template} is not a template: there is no such file")
    hashing = start_hashing(opened.models) if is_main_process() else []
    opened.models[0].refuse_unloadable()  # transformers is imported for it, which takes seconds, while others hash
    result = run_merge(recipe, opened=opened, device=device, progress=progress)
    if is_main_process():
        hashes = [wait_for_hash() for wait_for_hash in hashing]
        record = record_merge(recipe, result, hashes, max_shard_size=max_shard_size, device=device)
        options = {"overwrite": overwrite, "max_shard_size": max_shard_size, "progress": progress}
        record.save(result.checkpoint, target, **options)
    wait_for_everyone()
    merged(result)
    assessment = None
    if recipe.evaluate is not None or report:
        saved = Checkpoint.open(target)
        assessment = assess(recipe, result, saved, created=created, command=command, device=device, progress=progress)
        judge(assessment)
        if is_main_process():
            add_report(target, assessment, recipe, result)
    published = None
    if recipe.publish is not None and is_main_process():
        card_template = None if template is None else Path(template)
        try:
            published = publish_from_settings(recipe.publish, target, template=card_template, progress=progress)
        except HubError as error:  # the merge, which took long, is not lost
            again = publishing_command(recipe.publish, target, card_template)
            raise HubError(f"{error}. The merge is in {target}: publish it with {again}") from error
    wait_for_everyone()
    return RecipeResult(folder=target, merged=result, report=assessment, published=published)


def run_documents(
    documents: Sequence[Document],
    out: str | os.PathLike[str],
    *,
    intermediates: str | os.PathLike[str] | None = None,
    started: Callable[[str, Path, bool], object] = lambda name, folder, reused: None,
    progress: bool = False,
    **options: Any,
) -> RecipeResult:
    """Run the recipes of a file one after the other, as `hf-rebasin merge RECIPE -o OUT` does.

    Results that other documents use are kept, and used again the next time if nothing they depend on has changed.

    Args:
        documents: the documents, the one with the result of the file last.
        out: folder to be written.
        intermediates: folder for the results of the other documents; by default `OUT-intermediates`.
        started: called with the name of every other document, the folder of its result, and whether that is there.
        progress: show progress bars (on a terminal).
        options: options of `run_recipe`, for the last document.
    """
    *others, last = documents
    target = Path(out)
    folder = target.with_name(f"{target.name}-intermediates") if intermediates is None else Path(intermediates)
    names = [document.name for document in documents if document.name is not None]
    if others and is_main_process():
        refuse_target(target, bool(options.get("overwrite")), [])
    for document in others:
        assert document.name is not None
        recipe, result = document.with_results_in(folder, names), folder / document.name
        reused = is_unchanged(result, recipe)
        started(document.name, result, reused)
        if not reused:
            run_recipe(recipe, result, overwrite=True, device=options.get("device"), progress=progress)
            if is_main_process():
                remember(result, recipe)
            wait_for_everyone()
    recipe = last.with_results_in(folder, names) if others else last.recipe
    return run_recipe(recipe, target, progress=progress, **options)
