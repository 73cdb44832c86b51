"""Publishing a merge or an alignment to the Hub, with a card that says what it is and how to reproduce it."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..alignment.alignment import Alignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import (
    CARD,
    CHECKSUMS,
    INDEX,
    OLD_INDEX,
    PROVENANCE,
    RECORD_FILES,
    REPORT,
    is_record_file,
    is_weights,
    matches_path,
    write_atomically,
)
from ..checkpoints.hub import progress_bars
from ..checkpoints.hub_errors import refuse_token, translated_errors
from ..checkpoints.licences import LicenceOutcome, merged_licence
from ..checkpoints.provenance import Provenance, hash_files
from ..checkpoints.side_files import holds_weights, is_known_side_file
from ..errors import CheckpointError, OptionError, listed
from ..modules.distributed import is_main_process
from ..recipes.recipe import PublishSettings, make_publish_settings
from ..reports.pairs import Pair
from ..reports.report import Report
from .artefacts import LOADED_FILES
from .card import GENERATED, Subject, render_alignment_card, render_card
from .record import find_licences
from .verification import compare_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

# Files that a previous model leaves behind: they would be loaded together with the new one, or tell of another.
STALE_PATTERNS = (*RECORD_FILES, CHECKSUMS, INDEX, OLD_INDEX, *LOADED_FILES)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Result of publishing, or of a dry run.

    Args:
        repository: id of the repository.
        url: URL of the commit or pull request, or of the repository where nothing had changed.
        changed: whether there was anything to commit.
        card: text of README.md.
        files: files that were sent, or were there already.
        deleted: files of another model that were deleted, as they would have been loaded with this one.
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
    """Publish a folder written by hf-rebasin, or a file with an alignment.

    Everything is checked first: all files are as `rebasin.json` records them, no tensor contains NaN or Inf, all
    measurements are finite, the licence is known. Everything is then sent in one commit, which also deletes files that
    another model left in the repository; where nothing has changed, there is no commit.

    Args:
        source: folder with weights and `rebasin.json`, or an alignment (`.safetensors`).
        repository: `org/name`; created if it does not exist.
        private: whether a repository that is created is private.
        licence: licence of the result; required where those of the inputs differ or are unknown.
        revision: branch, created if it does not exist; by default the main one.
        create_pr: whether to open a pull request instead.
        message: commit message.
        template: Jinja2 template of the card, instead of ours.
        token: Hub token, instead of the one that is logged in with.
        dry_run: whether only to check everything, render the card and inspect the repository, and write nothing.
        progress: whether to show progress bars.

    Raises:
        CheckpointError: files are not as they were written, or cannot be read.
        OptionError: the licence is missing, the repository's name is invalid, or the template cannot be rendered; or
            the repository has something that must not be replaced: a model where an alignment is sent, or a
            handwritten card.
        HubError: the Hub refuses or cannot be reached; a rerun continues where it stopped.

    Example:
        >>> publish("merged", "me/merged", licence="mit").url
        'https://huggingface.co/me/merged/commit/…'
    """
    settings = make_publish_settings(
        to=repository, private=private, license=licence, revision=revision, create_pr=create_pr, message=message
    )
    return publish_from_settings(
        settings, Path(source), template=template, token=token, dry_run=dry_run, progress=progress
    )


def publish_from_settings(
    settings: PublishSettings,
    source: Path,
    *,
    template: Path | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> Published:
    """Publish a folder or an alignment with the settings of a recipe; see `publish`."""
    refuse_name(settings.to)
    if settings.create_pr and settings.revision is not None:
        raise OptionError("a pull request is always opened against the main branch; leave out the revision")
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; name a folder written by hf-rebasin, or an alignment")
    if source.is_file():
        if template is not None:
            raise OptionError("the template is for the card of a model, and this is an alignment; leave it out")
        files, text = {"alignment.safetensors": source}, _render_alignment_card(source, settings)
    else:
        names, text = _check_folder(source, settings, template)
        files = {name: source / name for name in names}
        custom = _read_custom_card(source / CARD)
        if custom is not None:
            if template is not None:
                raise OptionError(f"{source / CARD} is a handwritten card; remove it, or leave out the template")
            text = custom
    if source.is_dir() and not dry_run:
        write_atomically(source / CARD, text.encode())
    with translated_errors(f"{'look at' if dry_run else 'publish to'} {settings.to}"):
        refuse_token(token)
        send = _preview if dry_run else _send
        return send(settings, files, text, token, progress)


def refuse_unready(models: Sequence[Checkpoint], settings: PublishSettings) -> None:
    """Raise, before a merge is computed, if it could not be published: for want of a licence or of a login."""
    from huggingface_hub import HfApi

    refuse_name(settings.to)
    refuse_unlicensed(merged_licence(find_licences(models), settings.license))
    if not is_main_process():
        return  # only the main process publishes, and the Hub limits the rate of whoami requests
    with translated_errors(f"publish to {settings.to}"):
        refuse_token()
        HfApi().whoami()


def plan_publishing(settings: PublishSettings, measured: bool, aligned: bool) -> str:
    """Describe in one line what publishing would do; asks the Hub whether the repository exists."""
    from huggingface_hub import HfApi

    refuse_name(settings.to)
    with translated_errors(f"look at {settings.to}"):
        exists = HfApi().repo_exists(settings.to)
    visibility = "private" if settings.private else "public"
    how = "which exists: files of another model are replaced" if exists else f"which is created, {visibility}"
    branch = (
        " as a pull request" if settings.create_pr else f", branch {settings.revision}" if settings.revision else ""
    )
    files = "weights, configuration, tokenizer, card, recipe" + ", alignment" * aligned + ", rebasin.json"
    files += ", report" * measured
    return f"would publish to {settings.to}{branch}, {how}: {files}"


def publishing_command(settings: PublishSettings, source: Path, template: Path | None = None) -> str:
    """Return the command that publishes a folder with the settings of a recipe."""
    options = {"--license": settings.license, "--revision": settings.revision, "--commit-message": settings.message}
    options |= {"--template": None if template is None else str(template)}
    words = [part for option, value in options.items() if value is not None for part in (option, value)]
    words += ["--public"] * (not settings.private) + ["--create-pr"] * settings.create_pr
    return shlex.join(["hf-rebasin", "publish", str(source), settings.to, *words])


def refuse_name(repository: str) -> None:
    """Raise OptionError for a name that cannot be the id of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionError(f"{repository!r} is not the name of a repository: {str(error).splitlines()[0]}") from error
    if repository.count("/") != 1:
        raise OptionError(f"{repository!r} is not the name of a repository; say whose it is, as in me/{repository}")


def _read_custom_card(file: Path) -> str | None:
    """Return the card in a folder if it is handwritten, not generated by us."""
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else GENERATED
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{file} is not UTF-8 (byte {error.start}), which the Hub requires of cards; convert it, or remove it"
        ) from None
    return None if GENERATED in text else text


def _check_folder(folder: Path, settings: PublishSettings, template: Path | None) -> tuple[list[str], str]:
    """Check a folder and return (names of the files to send besides the card, text of the card)."""
    provenance = Provenance.load(folder)
    findings = compare_files(folder, provenance, hash_files(folder, written=True))
    if failed := [finding for finding in findings if not finding.holds]:
        raise CheckpointError(f"{folder} is not as it was written, so it is not published: {failed[0]}")
    checkpoint = Checkpoint.open(folder)
    checkpoint.refuse_broken()
    report = None
    if (file := provenance.recorded_path(REPORT)) is not None:
        report = Report.from_json((folder / file).read_text(encoding="utf-8"))
        for pair in report.pairs:
            _refuse_failed(folder, pair)
    licence = merged_licence(provenance.licences, settings.license)
    refuse_unlicensed(licence)
    branch = None if settings.create_pr else settings.revision
    subject = Subject(
        repository=settings.to,
        checkpoint=checkpoint,
        provenance=provenance,
        licence=licence,
        report=report,
        revision=branch,
    )
    return [*provenance.outputs, PROVENANCE], render_card(subject, template)


def refuse_unlicensed(outcome: LicenceOutcome) -> None:
    """Raise OptionError where no licence follows from those of the inputs and none was named."""
    if outcome.refused:
        raise OptionError(f"{outcome.text}; say which licence the result has (--license)")


def _refuse_failed(folder: Path, pair: Pair) -> None:
    """Raise CheckpointError where the measurements show that something went wrong."""
    results = [row for row in pair.rows if not row.control]
    for name in dict.fromkeys(("loss", *(metric for row in results for metric in row.metrics))):
        values = {row.name: row.loss if name == "loss" else row.metrics.get(name) for row in results}
        bad = [row for row, value in values.items() if value is not None and not math.isfinite(value)]
        if bad:
            raise CheckpointError(f"{folder} has no finite {name} ({listed(bad)}), so it is not published")
    exactness = pair.exactness
    if exactness is None or exactness.before is None or exactness.after is None:
        return
    if not abs(exactness.before - exactness.after) <= 1e-3 * max(1.0, abs(exactness.before)):
        raise CheckpointError(
            f"moving a model of {folder} changed its loss from {exactness.before:.6g} to {exactness.after:.6g}, which "
            "must never happen, so it is not published"
        )


def _render_alignment_card(file: Path, settings: PublishSettings) -> str:
    licence = None if settings.license is None else merged_licence({}, settings.license).licence
    return render_alignment_card(Alignment.load(file), settings.to, None if licence is None else licence.licence)


def _preview(
    settings: PublishSettings, files: dict[str, Path], text: str, token: str | None, progress: bool
) -> Published:
    """Return what `_send` would do, without doing it."""
    from huggingface_hub import HfApi

    api, repository, revision = HfApi(token=token), settings.to, settings.revision
    stale: tuple[str, ...] = ()
    if api.repo_exists(repository):
        if revision is not None and not api.revision_exists(repository, revision):
            revision = None  # the branch would be created from the main one
        head = api.model_info(repository, revision=revision)
        stale = _find_stale(api, settings, files, text, head, progress)
    return Published(repository=repository, url="", changed=False, card=text, files=tuple(files), deleted=stale)


def _send(
    settings: PublishSettings, files: dict[str, Path], text: str, token: str | None, progress: bool
) -> Published:
    """Send everything in one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, model = HfApi(token=token), any(is_weights(name) for name in files)
    repository, revision = settings.to, settings.revision
    api.create_repo(repository, private=settings.private, exist_ok=True)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    head = api.model_info(repository, revision=revision)
    stale = _find_stale(api, settings, files, text, head, progress)
    # upload_folder may split a large upload into several commits, and publish half a model in between
    with progress_bars(progress):
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
    return Published(repository=repository, url=url, changed=changed, card=text, files=tuple(files), deleted=stale)


def _find_stale(
    api: HfApi, settings: PublishSettings, files: dict[str, Path], text: str, head: ModelInfo, progress: bool
) -> tuple[str, ...]:
    """Find the stale files of a repository, or raise OptionError where it has something that must not be replaced."""
    present, model = {file.rfilename for file in head.siblings or ()}, any(is_weights(name) for name in files)
    if not model:
        _refuse_model(settings.to, present)
    if CARD in present and not settings.create_pr:  # a pull request leaves it to the owner
        with progress_bars(progress):
            card = Path(api.hf_hub_download(settings.to, CARD, revision=head.sha))
        _refuse_card(settings.to, card.read_bytes(), text, files)
    other = present - {*files, CARD}
    return tuple(name for name in sorted(other) if model and _is_stale(name))


def _is_stale(name: str) -> bool:
    """Whether a file that a model is published beside is one that a previous model left."""
    return matches_path(name, STALE_PATTERNS) or ("/" not in name and is_known_side_file(name))


def _refuse_model(repository: str, present: Iterable[str]) -> None:
    """Raise OptionError where publishing an alignment would replace a model's card, and its alignment."""
    weights = [name for name in sorted(present) if holds_weights(name) and not is_record_file(name)]
    if weights:
        raise OptionError(
            f"{repository} holds a model ({listed(weights)}); publish the alignment to a repository of its own"
        )


def _refuse_card(repository: str, current: bytes, text: str, files: dict[str, Path]) -> None:
    """Raise OptionError where a generated card would replace a handwritten one; metadata alone do not count."""
    card = current.decode("utf-8", errors="replace").lstrip("\ufeff")
    body = re.sub(r"\A\s*---[ \t\r]*\n.*?^---[ \t\r]*$", "", card, flags=re.DOTALL | re.MULTILINE).strip()
    if not body or GENERATED in card or GENERATED not in text:
        return
    folder = next((file.parent for name, file in files.items() if is_weights(name)), None)
    how = (
        "publish the alignment to a repository of its own"
        if folder is None
        else f"to keep it as the card of this model, fetch it (hf download {repository} {CARD} --local-dir "
        f"{shlex.quote(str(folder))}) "
        "and publish again; else remove it from the repository"
    )
    raise OptionError(f"{repository} has a handwritten {CARD}, which would be replaced: {how}")
