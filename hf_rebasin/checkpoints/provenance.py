"""Provenance of a model: what was read, done and written, as `rebasin.json` next to the weights.

It contains no date, no duration and no local path, so that the same merge is the same bytes. Inputs on the Hub are
named with their commit; others are identified by their sha256 alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .cache import SHA256_DIGITS, cache_file, file_state, read_answer, store_answer
from .checkpoint import Checkpoint
from .folder import (
    CARD,
    PROVENANCE,
    RECORDS,
    is_weights,
    list_module_weights,
    list_record_files,
    list_side_files,
    matches_path,
    read_checksums,
    write_atomically,
)
from .licences import DeclaredLicence
from .tensor_files import sha256_of

OLD_WEIGHTS = "pytorch_model*.bin*"
PROVENANCE_FORMAT = "hf_rebasin.provenance.v1"
SMALL_FILE = 1 << 20  # bytes; hashing less takes no time
PACKAGES = ("hf_rebasin", "torch", "transformers", "safetensors", "datasets", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """Record of a model that was read.

    Args:
        name: its id on the Hub, or the last component of its folder's path.
        commit: commit on the Hub; None for a local folder, which nobody else can find.
        licence: licence in its card; None where none is declared.
        files: `{file: sha256}` of its weights and side files.
        made_of: models it was made of itself, where a record in its folder names them.
    """

    name: str
    commit: str | None = None
    licence: DeclaredLicence = None
    files: Mapping[str, str] = field(default_factory=dict)
    made_of: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The model as `org/name@commit`, or the name of its local folder."""
        return self.name if self.commit is None else f"{self.name}@{self.commit}"


@dataclass(frozen=True)
class Machine:
    """Properties of a machine that affect how sums are rounded."""

    device: str = "cpu"
    threads: int = 1
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Record of how a folder was made.

    Args:
        verb: command that was run: `merge`, `align`, `recalibrate` …
        recipe: complete recipe of a merge, with its models as in `inputs`; else the settings of the verb.
        inputs: models that were read, the fixed model first.
        data: `{purpose: one-line description of the data}`.
        outputs: `{file: sha256}` of everything that was written except this record and the card.
        machine: machine on which it was made.
        versions: `{package: version}`.
        notes: remarks on the result, such as a head that is stored separately.
        shard: maximum size of a weight file.
    """

    verb: str
    recipe: Mapping[str, Any]
    inputs: tuple[InputRecord, ...]
    data: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    machine: Machine = Machine()
    versions: Mapping[str, str] = field(default_factory=lambda: dict(package_versions()))
    notes: tuple[str, ...] = ()
    shard: str = "5GB"

    def hash_outputs(self, folder: Path) -> Provenance:
        """Return the record with the sha256 of everything that is in a folder now."""
        return replace(self, outputs=hash_files(folder, written=True, known=dict(read_checksums(folder))))

    def save(self, folder: Path) -> None:
        """Write the record into a folder."""
        content = {"format": PROVENANCE_FORMAT, **asdict(self)}
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / PROVENANCE, text.encode())

    def recorded_path(self, name: str) -> str | None:
        """Return where a report or an alignment lies: in `rebasin/`, or at the top as in older folders; else None."""
        return next((path for path in (f"{RECORDS}/{name}", name) if path in self.outputs), None)

    def count_outputs(self, pattern: str) -> int:
        """Count the reports or alignments whose name has a pattern, in `rebasin/`, or at the top in older folders."""
        counts = (sum(matches_path(path, [place + pattern]) for path in self.outputs) for place in (f"{RECORDS}/", ""))
        return next(filter(None, counts), 0)

    @property
    def licences(self) -> dict[str, DeclaredLicence]:
        """Licences of the inputs, by their names."""
        return {model.name: model.licence for model in self.inputs}

    @staticmethod
    def find(model: Checkpoint) -> Provenance | None:
        """Load the record in a model's folder; None where there is none.

        Raises:
            CheckpointError: it is not what `save` wrote.
        """
        folder = model.folder
        return None if folder is None or not (folder / PROVENANCE).is_file() else Provenance.load(folder)

    @staticmethod
    def load(folder: Path) -> Provenance:
        """Load the record of a folder.

        Raises:
            CheckpointError: there is none, or it is not what `save` wrote.
        """
        from pydantic import TypeAdapter, ValidationError

        file = folder / PROVENANCE
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no {PROVENANCE}, so how it was made is not known; the verbs of hf-rebasin that write a "
                "model (merge, align, apply, recalibrate, interpolate) leave one"
            )
        try:
            content = json.loads(file.read_bytes())
            if not isinstance(content, dict) or content.pop("format", None) != PROVENANCE_FORMAT:
                raise CheckpointError(f"{file} is not of the format {PROVENANCE_FORMAT}")
            return TypeAdapter(Provenance).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(
                f"{file} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error
        except (ValueError, RecursionError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def hash_files(
    folder: Path, *, written: bool = False, known: Mapping[str, str] | None = None, remembered: bool = False
) -> dict[str, str]:
    """Hash the files that make up a model, weights and side files, as `{file: sha256}`.

    Args:
        folder: folder of the model.
        written: whether to include what was written while making it, except the record itself and the card.
        known: hashes of files that were hashed while they were written.
        remembered: whether to trust hashes of large files from earlier, see `remembered_hash`.
    """
    known, hash_file = known or {}, remembered_hash if remembered else sha256_of
    if not folder.is_dir():
        return {}
    top = [file for file in folder.iterdir() if file.is_file()]
    old = not any(is_weights(file.name) for file in top)
    files = {
        file for file in top if is_weights(file.name) or (old and not written and fnmatch(file.name, OLD_WEIGHTS))
    }
    if written:
        files |= {file for file in list_record_files(folder) if file.name not in (PROVENANCE, CARD)}
    files.update(list_side_files(folder), list_module_weights(folder))
    by_name = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: known.get(name) or hash_file(file) for name, file in sorted(by_name.items())}


def remembered_hash(path: Path) -> str:
    """Return the sha256 of a file, which is remembered for large files as long as they stay what they are."""
    state = file_state(path) if path.stat().st_size >= SMALL_FILE else None
    if state is None:
        return sha256_of(path)
    file = cache_file("hashes", [str(path.resolve()), state])
    answer = read_answer(file)
    if isinstance(answer, str) and len(answer) == SHA256_DIGITS:
        return answer
    digest = sha256_of(path)
    store_answer(file, digest)
    return digest


def package_versions(packages: Iterable[str] = PACKAGES) -> Iterator[tuple[str, str]]:
    """Yield (name, version) of Python and of the packages that affect results."""
    import platform

    yield "python", platform.python_version()
    for name in packages:
        yield name, version(name)
