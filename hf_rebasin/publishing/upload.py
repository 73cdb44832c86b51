"""Publishing to the Hub: a merge, or an alignment, with a card that says what it is and how to make it again."""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..alignment.alignment import Alignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import (
    ADAPTER,
    CARD,
    INDEX,
    MADE,
    OLD_INDEX,
    PROVENANCE,
    SIDE_FILES,
    SUMS,
    is_weights,
    write_whole,
)
from ..checkpoints.hub import bars
from ..checkpoints.hub_errors import refuse_token, speaking
from ..checkpoints.licences import Outcome, outcome
from ..checkpoints.provenance import Provenance, hashes
from ..errors import CheckpointError, OptionError, some
from ..modules.distributed import is_first
from ..recipes.recipe import PublishSettings, publishing
from ..reports.pairs import Pair
from ..reports.report import Report
from .card import GENERATED, Subject, alignment_card, card
from .record import REPORT, licences_of
from .verification import compared

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

# What a model that was there before leaves behind: it would be loaded together with the new one.
STALE = (*SIDE_FILES, *MADE, SUMS, INDEX, "model*.safetensors", OLD_INDEX, "pytorch_model*.bin", *ADAPTER)
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Published:
    """What was published, or would be.

    Args:
        repository: its id.
        url: of the commit, or of the pull request; of the repository where nothing had changed.
        changed: whether there was anything to commit.
        card: the text of README.md.
        files: what was sent, or was there already.
        deleted: what was there of another model, and would have been loaded with this one.
    """

    repository: str
    url: str
    changed: bool
    card: str
    files: tuple[str, ...]
    deleted: tuple[str, ...] = ()


def publish(
    source: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    licence: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    template: Path | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> Published:
    """Publish a folder that a verb of ours wrote, or a file with an alignment.

    Everything is checked first: all files are what `rebasin.json` says, no tensor has NaN or Inf in it, what was
    measured is finite, the licence is known. Then all of it is one commit, with what the repository has left over of
    another model deleted; where nothing has changed, there is none.

    Args:
        source: a folder with weights and `rebasin.json`, or an alignment (`.safetensors`).
        repository: `org/name`; made if it is not there.
        private: whether only its owners see a repository that is made.
        licence: of the result; needed where those of the inputs differ or are not said.
        revision: the branch, made if it is not there; by default the main one.
        create_pr: open a pull request instead.
        message: of the commit.
        template: of the card, in Jinja2, instead of ours.
        token: instead of the one that is logged in with.
        dry_run: check all, render the card and look at the repository, but write and send nothing.
        progress: show progress bars.

    Raises:
        CheckpointError: files are not those that were written, or cannot be read.
        OptionError: no licence, no such repository name, a template that cannot be rendered; a repository with what
            is not to be replaced: a model where an alignment is sent, a card that somebody wrote.
        HubError: the Hub refuses or cannot be reached; run it again, and it goes on where it was.

    Example:
        >>> publish("merged", "me/merged", licence="mit").url
        'https://huggingface.co/me/merged/commit/…'
    """
    settings = publishing(
        to=repository, private=private, license=licence, revision=revision, create_pr=create_pr, message=message
    )
    return publish_as(settings, Path(source), template=template, token=token, dry_run=dry_run, progress=progress)


def publish_as(
    settings: PublishSettings,
    source: Path,
    *,
    template: Path | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> Published:
    """Publish a folder or an alignment as a recipe says; `publish` says what is checked before."""
    refuse_name(settings.to)
    if settings.create_pr and settings.revision is not None:
        raise OptionError("a pull request is always opened against the main branch; leave out the revision")
    if not source.exists():
        raise CheckpointError(f"{source} is not there; name a folder that a verb of ours wrote, or an alignment")
    if source.is_file():
        if template is not None:
            raise OptionError("the template is for the card of a model, and this is an alignment; leave it out")
        files, text = {"alignment.safetensors": source}, _alignment_card(source, settings)
    else:
        names, text = _checked(source, settings, template)
        files = {name: source / name for name in names}
        own = _own_card(source / CARD)
        if own is not None:
            if template is not None:
                raise OptionError(
                    f"{source / CARD} is a card of somebody's own; take it away, or leave out the template"
                )
            text = own  # whoever wrote a card of their own meant it
    if source.is_dir() and not dry_run:
        write_whole(source / CARD, text.encode())
    with speaking(f"{'look at' if dry_run else 'publish to'} {settings.to}"):
        refuse_token(token)
        send = _looked_at if dry_run else _sent
        return send(settings, files, text, token, progress)


def refuse_unready(models: Sequence[Checkpoint], settings: PublishSettings) -> None:
    """What would keep a merge from being published is said before it is made: no licence, or nobody logged in."""
    from huggingface_hub import HfApi

    refuse_name(settings.to)
    refuse_unlicensed(outcome(licences_of(models), settings.license))
    if not is_first():
        return  # that one publishes; the Hub soon refuses to say so often who somebody is
    with speaking(f"publish to {settings.to}"):
        refuse_token()
        HfApi().whoami()


def planned_publishing(settings: PublishSettings, measured: bool, aligned: bool) -> str:
    """What publishing would do, in a line; whether the repository is there is asked of the Hub."""
    from huggingface_hub import HfApi

    refuse_name(settings.to)
    with speaking(f"look at {settings.to}"):
        there = HfApi().repo_exists(settings.to)
    made = "private" if settings.private else "public"
    how = "which is there: what it has of another model is replaced" if there else f"which is made, {made}"
    branch = (
        " as a pull request" if settings.create_pr else f", branch {settings.revision}" if settings.revision else ""
    )
    files = "weights, configuration, tokenizer, card, recipe" + ", alignment" * aligned + ", rebasin.json"
    files += ", report" * measured
    return f"would publish to {settings.to}{branch}, {how}: {files}"


def refuse_name(repository: str) -> None:
    """Raise OptionError for what cannot be the id of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionError(f"{repository!r} is no name of a repository: {str(error).splitlines()[0]}") from error
    if repository.count("/") != 1:
        raise OptionError(f"{repository!r} is no name of a repository; say whose it is, as in me/{repository}")


def _own_card(file: Path) -> str | None:
    """The card in a folder, if it is none of ours."""
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else GENERATED
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{file} is not UTF-8 (byte {error.start}), as the Hub reads cards; write it so, or take it away"
        ) from None
    return None if GENERATED in text else text


def _checked(folder: Path, settings: PublishSettings, template: Path | None) -> tuple[list[str], str]:
    """(the files to be sent without the card, the card) of a folder that is what it says."""
    provenance = Provenance.load(folder)
    found = compared(folder, provenance, hashes(folder, written=True))
    if wrong := [finding for finding in found if not finding.holds]:
        raise CheckpointError(f"{folder} is not what was written, so it is not published: {wrong[0]}")
    checkpoint = Checkpoint.open(folder)
    checkpoint.refuse_broken()
    report = None
    if REPORT in provenance.outputs:
        report = Report.from_json((folder / REPORT).read_text(encoding="utf-8"))
        for pair in report.pairs:
            _refuse_failed(folder, pair)
    licence = outcome(provenance.licences, settings.license)
    refuse_unlicensed(licence)
    branch = None if settings.create_pr else settings.revision
    subject = Subject(settings.to, checkpoint, provenance, licence, report, branch)
    return [*provenance.outputs, PROVENANCE], card(subject, template)


def refuse_unlicensed(found: Outcome) -> None:
    """Raise OptionError where no licence follows from those of the inputs, and none was named."""
    if found.refused:
        raise OptionError(f"{found.text}; say which licence the result has (--license)")


def _refuse_failed(folder: Path, pair: Pair) -> None:
    """Raise CheckpointError where what was measured says that something went wrong."""
    results = [row for row in pair.rows if not row.control]
    for name in dict.fromkeys(("loss", *(metric for row in results for metric in row.metrics))):
        values = {row.name: row.loss if name == "loss" else row.metrics.get(name) for row in results}
        lost = [row for row, value in values.items() if value is not None and not math.isfinite(value)]
        if lost:
            raise CheckpointError(f"{folder} has no finite {name} ({some(lost)}), so it is not published")
    exact = pair.exactness
    if exact is None or exact.before is None or exact.after is None:
        return
    if not abs(exact.before - exact.after) <= 1e-3 * max(1.0, abs(exact.before)):
        raise CheckpointError(
            f"moving a model of {folder} changed its loss from {exact.before:.6g} to {exact.after:.6g}, which it "
            "never may, so it is not published"
        )


def _alignment_card(file: Path, settings: PublishSettings) -> str:
    said = None if settings.license is None else outcome({}, settings.license).licence
    return alignment_card(Alignment.load(file), settings.to, None if said is None else said.licence)


def _looked_at(
    settings: PublishSettings, files: dict[str, Path], text: str, token: str | None, progress: bool
) -> Published:
    """What `_sent` would do."""
    from huggingface_hub import HfApi

    api, repository, revision = HfApi(token=token), settings.to, settings.revision
    if not api.repo_exists(repository):
        return Published(repository, "", False, text, tuple(files))
    if revision is not None and not api.revision_exists(repository, revision):
        revision = None  # of which that branch would be made
    head = api.model_info(repository, revision=revision)
    return Published(repository, "", False, text, tuple(files), _replaced(api, settings, files, text, head, progress))


def _sent(
    settings: PublishSettings, files: dict[str, Path], text: str, token: str | None, progress: bool
) -> Published:
    """All of it in one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, model = HfApi(token=token), any(is_weights(name) for name in files)
    repository, revision = settings.to, settings.revision
    api.create_repo(repository, private=settings.private, exist_ok=True)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    head = api.model_info(repository, revision=revision)
    stale = _replaced(api, settings, files, text, head, progress)
    # upload_folder would commit what takes long in several parts, and in between there would be half a model
    with bars(progress):
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, str(file)) for name, file in sorted(files.items())),
                CommitOperationAdd(CARD, text.encode()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=settings.message or f"Upload {'a merge' if model else 'an alignment'} made with hf-rebasin",
            revision=revision,
            create_pr=settings.create_pr,
            parent_commit=None if settings.create_pr else head.sha,
        )
    changed = commit.oid != head.sha
    url = str(commit.pr_url or (commit.commit_url if changed else commit.repo_url))
    return Published(repository, url, changed, text, tuple(files), stale)


def _replaced(
    api: HfApi, settings: PublishSettings, files: dict[str, Path], text: str, head: ModelInfo, progress: bool
) -> tuple[str, ...]:
    """What is to be deleted of what is there; OptionError where that is not ours to replace."""
    present, model = {file.rfilename for file in head.siblings or ()}, any(is_weights(name) for name in files)
    if not model:
        _refuse_model(settings.to, present)
    if CARD in present and not settings.create_pr:  # of which its owner is asked
        with bars(progress):
            card = Path(api.hf_hub_download(settings.to, CARD, revision=head.sha))
        _refuse_card(settings.to, card.read_bytes(), text, files)
    there = {name for name in present if "/" not in name} - {*files, CARD}
    return tuple(name for name in sorted(there) if model and any(fnmatch.fnmatch(name, kind) for kind in STALE))


def _refuse_model(repository: str, there: Iterable[str]) -> None:
    """Raise OptionError where an alignment would take the place of a model's card, and of its alignment."""
    weights = [
        name
        for name in sorted(there)
        if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)
        and not fnmatch.fnmatch(name, "alignment*.safetensors")
    ]
    if weights:
        raise OptionError(
            f"{repository} holds a model ({some(weights)}); publish the alignment to a repository of its own"
        )


def _refuse_card(repository: str, there: bytes, text: str, files: dict[str, Path]) -> None:
    """Raise OptionError where ours would replace a card that somebody wrote; metadata alone are no card."""
    said = there.decode("utf-8", errors="replace").lstrip("\ufeff")
    written = re.sub(r"\A\s*---[ \t\r]*\n.*?^---[ \t\r]*$", "", said, flags=re.DOTALL | re.MULTILINE).strip()
    if not written or GENERATED in said or GENERATED not in text:
        return
    folder = next((file.parent for name, file in files.items() if is_weights(name)), None)
    how = (
        "publish the alignment to a repository of its own"
        if folder is None
        else f"to keep it as the card of this model, fetch it (hf download {repository} {CARD} --local-dir {folder}) "
        "and publish again; else take it out of the repository"
    )
    raise OptionError(f"{repository} has a {CARD} that somebody wrote, and it would be replaced: {how}")
