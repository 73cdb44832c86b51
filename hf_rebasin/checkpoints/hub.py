"""Reading from the Hub, always at one commit.

This is the only module that reads models from the Hub. A revision is resolved once, to a commit, and every file is
requested by that commit. What the cache holds at that commit is not requested again, so that it works offline.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, HubError, listed, nearest
from .folder import (
    CARD,
    INDEX,
    MODULES,
    OLD_INDEX,
    OLD_SINGLE,
    SINGLE,
    list_sizes,
    read_modules,
    report_left,
    select_side_files,
)
from .formats import ADAPTER_CONFIG, explain_adapter_beside, explain_missing_weights
from .hub_errors import LOG_IN, denies_access, refuse_token, translated_errors
from .json_files import read_json
from .side_files import folder_of, folders_with_weights, is_known_side_file, select_weights

if TYPE_CHECKING:
    from .lazy import Absent

logger = logging.getLogger(__name__)

# Files that tell what kind of model it is; the others to fetch depend on them.
FETCHED_FIRST = ("config.json", ADAPTER_CONFIG, INDEX, OLD_INDEX, MODULES)
_pinned_commits: ContextVar[dict[tuple[str, str], str] | None] = ContextVar("pinned_commits", default=None)


def split_revision(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """Split `id` or `id@revision` into (repository, revision)."""
    repo, at, pinned = source.rpartition("@")
    return (repo, pinned) if at and pinned and revision is None else (source, revision)


@contextmanager
def pin_commits() -> Iterator[None]:
    """Resolve each revision of a repository only once inside the block, even if its branch moves meanwhile."""
    before = _pinned_commits.set(dict(_pinned_commits.get() or {}))
    try:
        yield
    finally:
        _pinned_commits.reset(before)


def resolve_revision(repo: str, revision: str | None = None, token: str | None = None) -> str:
    """Resolve a branch, tag or commit to its current commit, or offline to the commit last seen.

    Raises:
        CheckpointError: there is no such repository.
        HubError: there is no such revision, or the Hub cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub import resolve_revision as ask_hub

    pinned, key = _pinned_commits.get(), (repo, revision or constants.DEFAULT_REVISION)
    if pinned is not None and key in pinned:
        return pinned[key]
    with _translated_read_errors(repo, revision, token):
        commit = ask_hub(repo, revision=revision, token=token).resolved
    if pinned is not None:
        pinned[key] = commit
    return commit


def download(
    repo: str, commit: str, token: str | None = None, *, weights: bool = True, progress: bool = False
) -> Path:
    """Download what a model needs at a commit and return its folder; `.bin` weights only where there are no others.

    Args:
        repo: its id.
        commit: full hash of the commit.
        token: Hub token, instead of the one that is logged in with.
        weights: whether to download the weights; otherwise the folder has them only if they were downloaded before.
        progress: whether to show the Hub's progress bars.

    Raises:
        CheckpointError: there is no such repository, or it has no weights.
        HubError: the Hub refuses or cannot be reached; also an `OSError`.
        NoSpaceError: the disk is full.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _translated_read_errors(repo, commit, token), progress_bars(progress):
        folder = fetch(repo, commit, FETCHED_FIRST, token)
        files = _list_weights(repo, commit, folder)
        if (folder / ADAPTER_CONFIG).is_file():  # before the weights are downloaded
            raise explain_adapter_beside(repo, read_json(folder / ADAPTER_CONFIG), commit)
        sizes = list_files(repo, commit, folder)
        modules = read_modules(folder)
        side_files, left = select_side_files(sizes, modules)
        report_left(repo, left)

        def complete(wanted: list[str]) -> None:
            if not all((folder / name).is_file() for name in wanted):
                fetch(repo, commit, wanted, token)

        complete([name for name in side_files if is_known_side_file(name.rpartition("/")[2])])
        complete(_select_module_weights(sizes, modules))
        try:
            complete(side_files)
            complete([CARD] if CARD in sizes else [])  # for the licence
        except LocalEntryNotFoundError:  # offline, a model that another client cached without them can still be read
            missing = [name for name in side_files if not (folder / name).is_file()]
            if missing:
                logger.warning("%s is not in the cache with %s, which do not go along", repo, listed(missing))
        if weights:
            complete(files)
    return folder


def fetch(repo: str, commit: str, names: Iterable[str], token: str | None = None) -> Path:
    """Fetch the files of these names that exist at a commit and return the folder they are in."""
    return fetch_matching(repo, commit, [glob.escape(name) for name in names], token)


def fetch_matching(repo: str, commit: str, patterns: list[str], token: str | None = None) -> Path:
    """Fetch the files that match the patterns and return the folder they are in; a `*` also matches slashes."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=commit, token=token, allow_patterns=patterns))


def fetch_model(
    source: str, revision: str | None = None, token: str | None = None, *, values: bool = True, progress: bool = False
) -> tuple[Path, str, dict[str, Absent] | None]:
    """Fetch `id` or `id@revision` and return (folder, commit, shapes).

    The shapes are None where the folder has the weights; without `values`, weights are not downloaded.
    """
    repo, revision = split_revision(source, revision)
    commit = resolve_revision(repo, revision, token)
    folder = download(repo, commit, token, weights=values, progress=progress)
    return folder, commit, None if values or has_all_weights(folder) else read_headers(repo, commit, folder, token)


def has_all_weights(folder: Path) -> bool:
    """Whether all weights of a model are in its folder."""
    names = _select_weights(folder, {file.name for file in folder.iterdir()})
    return bool(names) and all((folder / name).is_file() for name in names)


def bytes_to_download(repo: str, commit: str, folder: Path, token: str | None = None) -> int:
    """Number of bytes of weights that are still to be downloaded to a folder that has everything else."""
    from huggingface_hub import snapshot_download

    names = _list_weights(repo, commit, folder)
    if not names or has_all_weights(folder):
        return 0
    with _translated_read_errors(repo, commit, token), progress_bars(False):
        patterns = [glob.escape(name) for name in names]
        files = snapshot_download(repo, revision=commit, token=token, allow_patterns=patterns, dry_run=True)
    return sum(file.file_size or 0 for file in files if file.will_download)


def read_headers(repo: str, commit: str, folder: Path, token: str | None = None) -> dict[str, Absent]:
    """Read shape and dtype of all tensors of a repository from the headers of its files, without the weights.

    Args:
        repo: its id.
        commit: full hash of the commit.
        folder: folder with everything but the weights, as `download` leaves it.
        token: Hub token, instead of the one that is logged in with.

    Raises:
        CheckpointError: there are no weights, only `.bin` files, or headers that are invalid.
        HubError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    from .lazy import Absent
    from .tensor_files import find_dtype

    files = _list_weights(repo, commit, folder)
    if not files or not files[0].endswith(".safetensors"):
        why = f"its weights are {listed(files)}, whose shapes cannot be read remotely" if files else "no weights"
        raise CheckpointError(
            f"{repo} cannot be inspected without its weights: {why}; fetch it (hf download {repo} --revision {commit})"
        )
    weight_map = read_json(folder / INDEX).get("weight_map", {}) if files != [SINGLE] else {}
    api = HfApi(token=token)

    def read_header(name: str) -> Any:
        return api.parse_safetensors_file_metadata(repo, name, revision=commit, token=token)

    with _translated_read_errors(repo, commit, token), ThreadPoolExecutor(8) as pool:
        try:
            headers = dict(zip(files, pool.map(read_header, files), strict=True))
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{repo} has an invalid safetensors file: {str(error).splitlines()[0]}") from None
    tensors = {}
    for file, header in headers.items():
        for key, info in header.tensors.items():
            if weight_map.get(key, file) == file:
                tensors[key] = Absent(tuple(info.shape), find_dtype(repo, key, info.dtype), repo)
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(f"{INDEX} of {repo} names tensors that are missing from its files: {listed(missing)}")
    return tensors


def _list_weights(repo: str, commit: str, folder: Path) -> list[str]:
    """List the weight files of a model."""
    present = list_files(repo, commit, folder)
    names = _select_weights(folder, present)
    if not names:
        raise explain_missing_weights(repo, present, partial(read_json, folder / ADAPTER_CONFIG))
    return names


def list_files(repo: str, commit: str, folder: Path) -> dict[str, int]:
    """Return `{file: bytes}` of a repository as cached; of those in the folder where another client fetched it."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return list_sizes(folder)


def _select_module_weights(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Select the weights in the sub-folders that `modules.json` names, which are fetched for planning too."""
    names = list(names)
    selected: list[str] = []
    for folder in folders_with_weights(names, modules):
        inside = [name.rpartition("/")[2] for name in names if folder_of(name) == folder]
        selected += [f"{folder}/{name}" for name in select_weights(inside)]
    return selected


def _select_weights(folder: Path, present: Collection[str]) -> list[str]:
    for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
        if single in present:
            return [single]
        if index in present:
            weight_map = read_json(folder / index).get("weight_map")
            files = weight_map.values() if isinstance(weight_map, dict) else ()
            return sorted({name for name in files if isinstance(name, str)}) or [index]
    return []


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the Hub's progress bars inside the block."""
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
def _translated_read_errors(repo: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Extend `translated_errors` to missing repositories and revisions, which only reads can run into."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with translated_errors(f"read {repo}" + (f"@{revision}" if revision else "")):
        refuse_token(token)
        try:
            yield
        except (HFValidationError, RepositoryNotFoundError) as error:
            if isinstance(error, HfHubHTTPError) and denies_access(error):
                raise
            hint = f" ({type(error).__name__}); if it is private, {LOG_IN}"
            if isinstance(error, HFValidationError):
                hint = " (its name would be NAME or ORG/NAME)"
            raise CheckpointError(
                f"{repo!r} is neither a local folder nor a repository on the Hub that can be read{hint}"
            ) from error
        except RevisionNotFoundError as error:
            names: list[str] = []
            with suppress(HfHubHTTPError):
                refs = HfApi(token=token).list_repo_refs(repo)
                names = [ref.name for ref in (*refs.branches, *refs.tags)]
            raise HubError(f"{repo} has no revision {revision!r}{nearest(revision or 'main', names)}") from error
