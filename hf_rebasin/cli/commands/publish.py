"""hf-rebasin publish"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    CommitMessage,
    CreatePr,
    License,
    Public,
    Revision,
    Template,
    publish_settings,
    said_of_publishing,
    say,
    shown,
)


def publish(
    source: Annotated[Path, typer.Argument(help="Folder that a verb of ours wrote, or an alignment (.safetensors).")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the Hub; made if it is not there.")],
    public: Public = False,
    license: License = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    commit_message: CommitMessage = None,
    template: Template = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything and look at the repository; print the card and what would be done, but do nothing.",
        ),
    ] = False,
) -> None:
    """Publish a model to the Hub, with a card, the recipe, the alignment and what was measured."""
    from ...modules.distributed import is_first
    from ...publishing.upload import publish_as
    from .. import output

    if not is_first():
        return
    settings = publish_settings(said_of_publishing(repository, public, license, revision, create_pr, commit_message))
    published = publish_as(settings, source, template=template, dry_run=dry_run, progress=shown())
    for line in output.published(published, dry_run):
        say(line)
