"""What was published: folders with their records, and alignments, from this machine or from the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..alignment.alignment import Alignment
from ..checkpoints.folder import ADAPTER, PROVENANCE, is_weights
from ..checkpoints.hub import bars, fetch, fetch_matching, named, names_of, resolved
from ..checkpoints.hub_errors import speaking
from ..checkpoints.provenance import Provenance
from ..errors import CheckpointError, some

ALIGNMENTS = "alignment*.safetensors"


def folder_of(source: str, *, progress: bool = False) -> Path:
    """A folder as it is; of a repository of the Hub its record, all that it names, and what may be loaded besides.

    Raises:
        CheckpointError: there is neither.
        HubError: the Hub refuses, or cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    with _read(source, progress) as (repository, commit):
        place = fetch(repository, commit, [PROVENANCE])
        if (place / PROVENANCE).is_file():
            loose = {name for name in names_of(repository, commit, place) if _may_be_loaded(name)}
            fetch(repository, commit, sorted(loose.union(Provenance.load(place).outputs)))
    return place


def _may_be_loaded(name: str) -> bool:
    """Whether somebody's code may read weights from it, written by us or not."""
    return "/" not in name and (is_weights(name) or name in ADAPTER or name.endswith((".safetensors", ".bin")))


def alignment_of(source: str, name: str | None = None) -> Alignment:
    """An alignment: a file, or the one in a folder or a repository of the Hub.

    Args:
        source: a file, a folder, or an id on the Hub (`org/name@revision`).
        name: of the file in there, where there are several.

    Raises:
        CheckpointError: there is none, or there are several and no name says which.
    """
    place = Path(source).expanduser()
    if place.suffix == ".safetensors" or place.is_file():
        return Alignment.load(place)
    try:
        folder = place if place.is_dir() else _alignments(source, name)
    except CheckpointError as error:
        raise CheckpointError(f"{source} cannot be read as an alignment: {error}") from error
    found = sorted(file.name for file in folder.glob(ALIGNMENTS))
    if name is not None and (folder / name).is_file():
        return Alignment.load(folder / name)
    if len(found) == 1 and name is None:
        return Alignment.load(folder / found[0])
    which = f"has {some(found)}; say which (--file)" if found else f"has no {name or ALIGNMENTS}"
    raise CheckpointError(f"{source} {which}")


def artefact_name(source: str) -> str:
    """What it is called where nobody knows the folders of this machine."""
    return Path(source).name if Path(source).expanduser().exists() else source


def _alignments(source: str, name: str | None) -> Path:
    """The folder of a repository, with this file of it, or with all its alignments."""
    with _read(source, progress=False) as (repository, commit):
        if name:
            return fetch(repository, commit, [name])
        return fetch_matching(repository, commit, [ALIGNMENTS])


@contextmanager
def _read(source: str, progress: bool) -> Iterator[tuple[str, str]]:
    """(repository, commit); inside, the Hub speaks plainly, and shows its bars or none."""
    repository, revision = named(source)
    commit = resolved(repository, revision)
    with speaking(f"read {source}"), bars(progress):
        yield repository, commit
