"""The Hub: what is read from it, always at one commit.

Models are read from here alone. A revision is resolved once, to a commit, and every file after it is asked for by that
commit; what is in the cache at that commit is not asked for again, so that it works offline.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, HubError, nearest, some
from .folder import ADAPTER, INDEX, OLD_INDEX, OLD_SINGLE, SINGLE, is_side_file, read_json
from .hub_errors import LOG_IN, refuse_token, refuses_who_asks, speaking

if TYPE_CHECKING:
    from .lazy import Absent

# What says what a model is, and is fetched first; and what whoever reads its licence needs.
FIRST = ("config.json", ADAPTER[0], INDEX, OLD_INDEX)
CARDS = ("README.md", "LICENSE*")
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
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _reading(repo, commit, token), bars(progress):
        folder = fetch(repo, commit, FIRST, token)
        names = names_of(repo, commit, folder)

        def complete(wanted: list[str]) -> None:
            if not all((folder / name).is_file() for name in wanted):
                fetch(repo, commit, wanted, token)

        complete(_side_files(names))
        with suppress(LocalEntryNotFoundError):  # offline, a model that came without its card is still a model
            complete(_cards(names))
        files = _weights(repo, commit, folder)
        if weights:
            complete(files)
    return folder


def fetch(repo: str, commit: str, names: Iterable[str], token: str | None = None) -> Path:
    """The folder of a repository at a commit, with the files of these names in it, as far as there are any."""
    return fetch_matching(repo, commit, [glob.escape(name) for name in names], token)


def fetch_matching(repo: str, commit: str, patterns: list[str], token: str | None = None) -> Path:
    """The same with the files that match, those in its folders, too: a `*` goes over slashes."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=commit, token=token, allow_patterns=patterns))


def fetched(
    source: str, revision: str | None = None, token: str | None = None, *, values: bool = True, progress: bool = False
) -> tuple[Path, str, dict[str, Absent] | None]:
    """(folder, commit, shapes alone if the values were not wanted and are not here) of `id` or `id@revision`."""
    repo, revision = named(source, revision)
    commit = resolved(repo, revision, token)
    folder = download(repo, commit, token, weights=values, progress=progress)
    return folder, commit, None if values or whole(folder) else headers(repo, commit, folder, token)


def whole(folder: Path) -> bool:
    """Whether all weights of a model are in a folder."""
    names = _weight_files(folder, {file.name for file in folder.iterdir()})
    return bool(names) and all((folder / name).is_file() for name in names)


def to_download(repo: str, commit: str, folder: Path, token: str | None = None) -> int:
    """How many bytes of a model's weights are still to be fetched to its folder, which has all else."""
    from huggingface_hub import snapshot_download

    names = _weights(repo, commit, folder)
    if not names or whole(folder):
        return 0
    with _reading(repo, commit, token), bars(False):
        patterns = [glob.escape(name) for name in names]
        files = snapshot_download(repo, revision=commit, token=token, allow_patterns=patterns, dry_run=True)
    return sum(file.file_size or 0 for file in files if file.will_download)


def headers(repo: str, commit: str, folder: Path, token: str | None = None) -> dict[str, Absent]:
    """Shape and dtype of all tensors of a repository, read off the headers of its files; no weights are fetched.

    Args:
        repo: its id.
        commit: a whole hash.
        folder: with all but its weights, as `download` leaves it.
        token: instead of the one that is logged in with.

    Raises:
        CheckpointError: there are no weights, only `.bin` files, or headers that do not say what they should.
        HubError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    from .lazy import Absent
    from .tensor_files import DTYPES

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
    there = names_of(repo, commit, folder)
    names = _weight_files(folder, there)
    if not names and ADAPTER[0] not in there:
        raise CheckpointError(
            f"{repo} has no weights that can be merged, no {SINGLE} and no {INDEX}, only {some(sorted(there))}; "
            "push it with push_to_hub of transformers, or name another repository"
        )
    return names


def names_of(repo: str, commit: str, folder: Path) -> set[str]:
    """The files of a repository, as its folder knows them; what of them is here, where somebody else fetched it."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def _side_files(names: Iterable[str]) -> list[str]:
    """What goes along with weights: those files that `folder.side_files` finds where all of a repository is here."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(name.partition("/")[0] if "/" in name else "", []).append(name)
    found = [name for name in folders.pop("", []) if is_side_file(name)]
    for folder, inside in folders.items():
        if not folder.startswith(".") and all(is_side_file(name.rpartition("/")[2]) for name in inside):
            found += inside
    return sorted(found)


def _cards(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if "/" not in name and any(fnmatch(name, one) for one in CARDS))


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
            if isinstance(error, HfHubHTTPError) and refuses_who_asks(error):
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
