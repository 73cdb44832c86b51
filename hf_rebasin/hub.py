"""The Hub: what is read from it, always at one commit, and what it refuses, in plain words.

Models are read from here alone. A revision is resolved once, to a commit, and every file after it is asked for by that
commit; what is in the cache at that commit is not asked for again, so that it works offline.
"""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, HubError, NoSpaceError, nearest, some
from .folder import ADAPTER, INDEX, OLD_INDEX, OLD_SINGLE, SIDE_FILES, SINGLE, read_json
from .text import without_secrets

if TYPE_CHECKING:
    from .lazy import Absent

# What is fetched whatever is done with a model, in the order of who needs it: we, and whoever reads the licence.
SMALL = (*SIDE_FILES, ADAPTER[0], INDEX, OLD_INDEX)
CARD = ("README.md", "LICENSE*")
LOG_IN = "log in (`hf auth login`), or set HF_TOKEN"
_resolved: ContextVar[dict[tuple[str, str], str] | None] = ContextVar("resolved", default=None)


def named(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """(repository, revision) of `id`, or of `id@revision`."""
    repo, at, pinned = source.rpartition("@")
    return (repo, pinned) if at and pinned and revision is None else (source, revision)


@contextmanager
def once() -> Iterator[None]:
    """Inside, a revision of a repository is one commit, however often it is named and wherever its branch goes."""
    before = _resolved.set(dict(_resolved.get() or {}))
    try:
        yield
    finally:
        _resolved.reset(before)


def resolved(repo: str, revision: str | None = None, token: str | None = None) -> str:
    """The commit that a branch, a tag or a commit is now; without a connection, what it was when last seen.

    Raises:
        CheckpointError: there is no such repository.
        HubError: there is no such revision, or the Hub cannot say.
    """
    from huggingface_hub import constants, resolve_revision

    known, place = _resolved.get(), (repo, revision or constants.DEFAULT_REVISION)
    if known is not None and place in known:
        return known[place]
    with _reading(repo, revision, token):
        commit = resolve_revision(repo, revision=revision, token=token).resolved
    if known is not None:
        known[place] = commit
    return commit


def download(
    repo: str, commit: str, token: str | None = None, *, weights: bool = True, progress: bool = False
) -> Path:
    """The folder of a repository at a commit, with what a model needs; `.bin` if that is all there is.

    Args:
        repo: its id.
        commit: a whole hash.
        token: instead of the one that is logged in with.
        weights: fetch them, too; without them the folder has them only if they were fetched before.
        progress: show the Hub's progress bars.

    Raises:
        CheckpointError: there is no such repository, or no weights are in it.
        HubError: the Hub refuses, or cannot be reached; `OSError` is its other name.
        NoSpaceError: the disk runs full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _reading(repo, commit, token), bars(progress):
        folder = Path(snapshot_download(repo, revision=commit, token=token, allow_patterns=list(SMALL)))
        names = _names(repo, commit, folder)
        card = [name for name in names if "/" not in name and any(fnmatch(name, one) for one in CARD)]
        if not all((folder / name).is_file() for name in card):
            with suppress(LocalEntryNotFoundError):  # offline, a model that came without its card is still a model
                snapshot_download(repo, revision=commit, token=token, allow_patterns=[glob.escape(n) for n in card])
        files = _weights(repo, commit, folder)
        if weights and files and not all((folder / name).is_file() for name in files):
            patterns = [glob.escape(name) for name in files]
            snapshot_download(repo, revision=commit, token=token, allow_patterns=patterns)
    return folder


def fetched(
    source: str, revision: str | None = None, token: str | None = None, *, values: bool = True, progress: bool = False
) -> tuple[Path, str, dict[str, Absent] | None]:
    """(folder, commit, shapes alone if the values were not wanted and are not here) of `id` or `id@revision`."""
    repo, revision = named(source, revision)
    commit = resolved(repo, revision, token)
    folder = download(repo, commit, token, weights=values, progress=progress)
    return folder, commit, None if values or whole(folder) else headers(repo, commit, token)


def whole(folder: Path) -> bool:
    """Whether all weights of a model are in a folder."""
    names = _weight_files(folder, {file.name for file in folder.iterdir()})
    return bool(names) and all((folder / name).is_file() for name in names)


def to_download(repo: str, commit: str, token: str | None = None) -> int:
    """How many bytes of a model are still to be fetched, its small files included."""
    from huggingface_hub import snapshot_download

    folder = download(repo, commit, token, weights=False)
    if whole(folder):
        return 0
    with _reading(repo, commit, token), bars(False):
        patterns = [*SMALL, *CARD, *map(glob.escape, _weights(repo, commit, folder))]
        files = snapshot_download(repo, revision=commit, token=token, allow_patterns=patterns, dry_run=True)
    return sum(file.file_size or 0 for file in files if file.will_download)


def headers(repo: str, commit: str, token: str | None = None) -> dict[str, Absent]:
    """Shape and dtype of all tensors of a repository, read off the headers of its files; no weights are fetched.

    Raises:
        CheckpointError: there are no weights, only `.bin` files, or headers that do not say what they should.
        HubError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    from .files import DTYPES
    from .lazy import Absent

    folder = download(repo, commit, token, weights=False)
    files = _weights(repo, commit, folder)
    if not files or not files[0].endswith(".safetensors"):
        why = f"its weights are {some(files)}, which say no shapes before they are here" if files else "no weights"
        raise CheckpointError(f"{repo} cannot be looked at without its weights: {why}; fetch it (hf download {repo})")
    places = read_json(folder / INDEX).get("weight_map", {}) if files != [SINGLE] else {}
    api = HfApi(token=token)

    def header(name: str) -> Any:
        return api.parse_safetensors_file_metadata(repo, name, revision=commit, token=token)

    with _reading(repo, commit, token), ThreadPoolExecutor(8) as pool:
        try:
            said = dict(zip(files, pool.map(header, files), strict=True))
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"{repo} has a file that is no safetensors file: {str(error).splitlines()[0]}"
            ) from None
    found = {}
    for file, one in said.items():
        for key, info in one.tensors.items():
            if places.get(key, file) == file:
                if info.dtype not in DTYPES:
                    raise CheckpointError(f"{repo}: {key} is {info.dtype}, a dtype that is not known here")
                found[key] = Absent(tuple(info.shape), DTYPES[info.dtype], repo)
    if missing := sorted(places.keys() - found.keys()):
        raise CheckpointError(f"{INDEX} of {repo} names tensors that its files have not: {some(missing)}")
    return found


def _weights(repo: str, commit: str, folder: Path) -> list[str]:
    """The names of the files with a model's weights; empty for an adapter, whose weights are of no use here."""
    there = _names(repo, commit, folder)
    names = _weight_files(folder, there)
    if not names and ADAPTER[0] not in there:
        raise CheckpointError(
            f"{repo} has no weights that can be merged, no {SINGLE} and no {INDEX}, only {some(sorted(there))}; "
            "push it with push_to_hub of transformers, or name another repository"
        )
    return names


def _names(repo: str, commit: str, folder: Path) -> set[str]:
    """The files of a repository, as its folder knows them; what of them is here, where somebody else fetched it."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return {file.name for file in folder.iterdir()}


def _weight_files(folder: Path, there: set[str]) -> list[str]:
    for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
        if single in there:
            return [single]
        if index in there:
            places = read_json(folder / index).get("weight_map")
            files = places.values() if isinstance(places, dict) else ()
            return sorted({name for name in files if isinstance(name, str)}) or [index]
    return []


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """The Hub's own progress bars, or none."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# --- what the Hub says ---------------------------------------------------------------------------------------------


@contextmanager
def _reading(repo: str, revision: str | None, token: str | None) -> Iterator[None]:
    """`speaking`, and what is only said of what is read: a repository or a revision that there is not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with speaking(f"read {repo}" + (f"@{revision}" if revision else "")):
        refuse_token(token)
        try:
            yield
        except (HFValidationError, RepositoryNotFoundError) as error:
            if isinstance(error, HfHubHTTPError) and _refuses_who_asks(error):
                raise
            hint = "" if isinstance(error, HFValidationError) else f"; if it is private, {LOG_IN}"
            raise CheckpointError(
                f"{repo!r} is neither a folder here nor a repository on the Hub that can be read "
                f"({type(error).__name__}){hint}"
            ) from error
        except RevisionNotFoundError as error:
            names: list[str] = []
            with suppress(HfHubHTTPError):
                refs = HfApi(token=token).list_repo_refs(repo)
                names = [ref.name for ref in (*refs.branches, *refs.tags)]
            raise HubError(f"{repo} has no revision {revision!r}{nearest(revision or 'main', names)}") from error


@contextmanager
def speaking(what: str) -> Iterator[None]:
    """Whatever the Hub refuses or cannot inside, for reading or writing, raises an error that says what to do.

    Args:
        what: what is done inside, as it follows on "cannot": "publish to org/name".

    Raises:
        HubError: the reason, in one sentence, without a token in it.
        NoSpaceError: the disk runs full.
    """
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import errors

    refusals = (
        *(HTTPError, InvalidURL, errors.HFValidationError, errors.OfflineModeIsEnabled),
        *(errors.EntryNotFoundError, errors.RevisionResolutionError, errors.DryRunError, errors.FileMetadataError),
        *(errors.XetDownloadError, errors.LocalTokenNotFoundError, errors.OIDCError, errors.DeviceCodeError),
    )
    try:
        yield
    except refusals as error:
        raise HubError(f"cannot {what}: {_why(error)}") from (None if _tells(error) else error)
    except (OSError, RuntimeError) as error:  # of the disk; of a transfer that came to an end early
        if isinstance(error, HubError | NoSpaceError) or (isinstance(error, OSError) and error.errno):
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(f"cannot {what}: the disk is full ({error.filename or error.strerror})") from error
            raise
        why = _why(error.__cause__) if isinstance(error.__cause__, refusals) else _broken_off(error)
        raise HubError(f"cannot {what}: {why}") from (None if _tells(error) else error)


def refuse_token(token: str | bool | None = None) -> None:
    """Raise HubError for a token with characters that none has, before it is sent, and shown in somebody's error."""
    from huggingface_hub import get_token

    given = get_token() if token is None else token
    if isinstance(given, str) and not re.fullmatch(r"[\x21-\x7e]+", given):
        raise HubError(f"the Hub's token has characters in it that no token has; copy it again, then {LOG_IN}")


def _why(error: BaseException) -> str:
    """What the Hub means, and what to do."""
    import httpx2
    from huggingface_hub import errors

    cached = isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError | errors.DryRunError)
    while (
        isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError | errors.DryRunError)
        and error.__cause__ is not None
    ):
        error = error.__cause__
    beside = "it is not in the cache, and " if cached else ""
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{beside}offline (HF_HUB_OFFLINE is set); do it with a connection, and once is enough"
    if isinstance(error, errors.HFValidationError):
        return f"that is no name the Hub knows ({_said(error)})"
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return f"{beside}there is no connection to {_endpoint()} ({type(error).__name__}); try again with one"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the cache, and the Hub cannot be reached; try again with a connection"
    if isinstance(error, httpx2.HTTPError | errors.XetDownloadError | errors.FileMetadataError):
        return _broken_off(error)
    return f"{_said(error)}; {LOG_IN}" if isinstance(error, errors.OIDCError) else _said(error)


def _status(error: Any) -> str:
    """What an answer of the Hub means."""
    from huggingface_hub import errors

    code, said = error.response.status_code, _said(error)
    repo = getattr(error, "repo_id", None)
    if isinstance(error, errors.GatedRepoError):
        place = f"{_endpoint()}/{repo}" if repo else "its page"
        return f"it is gated; accept its terms at {place}, then {LOG_IN}"
    if _refuses_token(error):
        place = f"{_endpoint()}/settings/tokens"
        return f"the Hub does not take the token, it is invalid or has expired; make one at {place} and {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo or 'of that name'}, or only for others; check its name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo or 'the repository'} has no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return f"there is no such file ({said})"
    if isinstance(error, errors.DisabledRepoError):
        return "the repository was disabled by the Hub"
    if code == 401:
        return f"the Hub wants to know who asks; {LOG_IN}"
    if code == 403:
        return f"the account or its token may not do that ({said}); use one that may: {LOG_IN}"
    if code in (409, 412):
        return f"somebody else changed it meanwhile, or it is there already ({said}); look, and run it again"
    if code == 429:
        return "the Hub takes no more requests from here for now; wait some minutes and run it again"
    if code >= 500:
        return f"the Hub has a fault of its own ({code}); run it again later"
    return f"the Hub refuses ({code}: {said})"


def _refuses_who_asks(error: Any) -> bool:
    """Whether it says that a repository is there, but not for these eyes; not that there is none."""
    from huggingface_hub.errors import GatedRepoError

    return isinstance(error, GatedRepoError) or _refuses_token(error)


def _refuses_token(error: Any) -> bool:
    """Whether an answer is about the token, and not about what was asked for."""
    said = (error.server_message or "").lower()
    return error.response.status_code == 401 and ("expired" in said or "credentials in auth" in said)


def _broken_off(error: BaseException) -> str:
    return f"the transfer broke off ({_said(error)}); run it again, and files that came whole are not sent again"


def _said(error: BaseException) -> str:
    """The first words of an error, without tokens."""
    text = (getattr(error, "server_message", None) or str(error) or type(error).__name__).strip()
    return without_secrets(text.splitlines()[0].rstrip(".") if text else type(error).__name__)


def _tells(error: BaseException | None) -> bool:
    """Whether a token is in an error, or in what caused it."""
    while error is not None:
        if without_secrets(str(error)) != str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
