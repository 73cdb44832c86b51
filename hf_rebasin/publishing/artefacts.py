"""Published artefacts, read from this machine or from the Hub: folders with their records, and alignments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..alignment.alignment import Alignment
from ..checkpoints.folder import ADAPTER_FILES, PROVENANCE, RECORDS, matches_path
from ..checkpoints.hub import fetch, fetch_matching, list_files, progress_bars, resolve_revision, split_revision
from ..checkpoints.hub_errors import translated_errors
from ..checkpoints.provenance import Provenance
from ..errors import CheckpointError, listed

ALIGNMENT_PATTERN = "alignment*.safetensors"
PLACES = (f"{RECORDS}/", "")  # of the alignments in a folder: those of a model, and one that is published by itself
# Files that are loaded before or with the weights, whoever wrote them, or instead of the recorded alignment.
LOADED_FILES = (*ADAPTER_FILES, "*.safetensors", "pytorch_model*.bin", f"{RECORDS}/{ALIGNMENT_PATTERN}")


def fetch_artefacts(source: str, *, progress: bool = False) -> Path:
    """Return a local folder, or fetch a repository's record, the files it names and other files that may be loaded.

    Raises:
        CheckpointError: there is neither such a folder nor such a repository.
        HubError: the Hub refuses or cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    with _open_repository(source, progress) as (repository, commit):
        folder = fetch(repository, commit, [PROVENANCE])
        if (folder / PROVENANCE).is_file():
            loadable = {name for name in list_files(repository, commit, folder) if matches_path(name, LOADED_FILES)}
            fetch(repository, commit, sorted(loadable.union(Provenance.load(folder).outputs)))
    return folder


def load_alignment(source: str, name: str | None = None) -> Alignment:
    """Load an alignment from a file, a folder or a repository on the Hub.

    Args:
        source: file, folder, or id on the Hub (`org/name@revision`).
        name: name of the file within `source`, or within the folder `rebasin` in it, where there are several.

    Raises:
        CheckpointError: there is none, or there are several and no name selects one.
    """
    path = Path(source).expanduser()
    if path.suffix == ".safetensors" or path.is_file():
        return Alignment.load(path)
    try:
        folder = path if path.is_dir() else _fetch_alignments(source, name)
    except CheckpointError as error:
        raise CheckpointError(f"{source} cannot be read as an alignment: {error}") from error
    present = [place + file.name for place in PLACES for file in sorted((folder / place).glob(ALIGNMENT_PATTERN))]
    wanted = present if name is None else [place + name for place in PLACES if (folder / place / name).is_file()][:1]
    if len(wanted) == 1:
        return Alignment.load(folder / wanted[0])
    missing = "" if name is None else f"no {name}, only "
    which = f"; say which (--file {Path(present[0]).name})" if present else ""
    problem = f"{missing}{listed(present)}{which}" if present else f"no {name or ALIGNMENT_PATTERN}"
    raise CheckpointError(f"{source} has {problem}")


def artefact_name(source: str) -> str:
    """Name of an artefact without local folders: its file name, or its id on the Hub."""
    return Path(source).name if Path(source).expanduser().exists() else source


def _fetch_alignments(source: str, name: str | None) -> Path:
    """Fetch one file, or all alignments, of a repository and return the folder they are in."""
    with _open_repository(source, progress=False) as (repository, commit):
        if name:
            return fetch(repository, commit, [place + name for place in PLACES])
        return fetch_matching(repository, commit, [place + ALIGNMENT_PATTERN for place in PLACES])


@contextmanager
def _open_repository(source: str, progress: bool) -> Iterator[tuple[str, str]]:
    """Yield (repository, commit); inside the block errors are translated, and progress bars shown or hidden."""
    repository, revision = split_revision(source)
    commit = resolve_revision(repository, revision)
    with translated_errors(f"read {source}"), progress_bars(progress):
        yield repository, commit
