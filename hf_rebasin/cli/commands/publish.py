"""The command `hf-rebasin publish`."""

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
    publish_options,
    read_publish_settings,
    say,
    shows_progress,
)


def publish(
    source: Annotated[Path, typer.Argument(help="Folder that hf-rebasin wrote, or an alignment (.safetensors).")],
    repository: Annotated[str, typer.Argument(help="Repository ORG/NAME on the Hub; created if it does not exist.")],
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
            help="Check everything, print the card and what would be sent, but send nothing.",
        ),
    ] = False,
) -> None:
    """Publish a model to the Hub, with a card, the recipe, the alignment and all measurements."""
    from ...modules.distributed import is_main_process
    from ...publishing.upload import publish_from_settings
    from .. import output

    if not is_main_process():
        return
    settings = read_publish_settings(publish_options(repository, public, license, revision, create_pr, commit_message))
    published = publish_from_settings(settings, source, template=template, dry_run=dry_run, progress=shows_progress())
    for line in output.describe_publication(published, dry_run):
        say(line)
