"""Where a model came from: what was read, what was done, what was written, as `rebasin.json` beside the weights.

There is no date, no duration and no path of a machine in it, so that the same merge is the same bytes. Inputs that are
on the Hub are named with their commit, others are known by their sha256 alone.
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
from .checkpoint import Checkpoint
from .folder import CARD, PROVENANCE, SUMS, is_made, is_weights, side_files, write_whole
from .licences import Said
from .tensor_files import sha256_of

OLD_WEIGHTS = "pytorch_model*.bin*"
FORMAT = "hf_rebasin.provenance.v1"
PACKAGES = ("hf_rebasin", "torch", "transformers", "safetensors", "datasets", "numpy", "scipy")


@dataclass(frozen=True)
class Input:
    """A model that was read.

    Args:
        name: its id on the Hub, or the last part of the name of its folder.
        commit: on the Hub; None for a folder, which nobody else can find.
        licence: as its card says it; None where it says none.
        files: `{file: sha256}` of its weights and of what goes along with them.
        made_of: what it was made of itself, where a record in its folder says so.
    """

    name: str
    commit: str | None = None
    licence: Said = None
    files: Mapping[str, str] = field(default_factory=dict)
    made_of: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """`org/name@commit`, or the name of a folder."""
        return self.name if self.commit is None else f"{self.name}@{self.commit}"


@dataclass(frozen=True)
class Machine:
    """What sums hang on besides their numbers."""

    device: str = "cpu"
    threads: int = 1
    processes: int = 1


@dataclass(frozen=True)
class Provenance:
    """How a folder came about.

    Args:
        verb: what was done: `merge`, `align`, `recalibrate` …
        recipe: of a merge, complete, its models as in `inputs`; else the settings of the verb.
        inputs: what was read, the fixed model first.
        data: `{what for: what was looked at, in a line}`.
        outputs: `{file: sha256}` of all that was written but this file and the card.
        machine: on which it was made.
        versions: `{package: version}`.
        notes: what else is to be said of the result, such as a head that is stored apart.
        shard: the largest size of a file of weights.
    """

    verb: str
    recipe: Mapping[str, Any]
    inputs: tuple[Input, ...]
    data: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    machine: Machine = Machine()
    versions: Mapping[str, str] = field(default_factory=lambda: dict(versions()))
    notes: tuple[str, ...] = ()
    shard: str = "5GB"

    def save(self, folder: Path) -> None:
        """Write it into a folder, with the sha256 of all that is there now."""
        whole = replace(self, outputs=hashes(folder, written=True, known=dict(read_sums(folder))))
        said = {"format": FORMAT, **asdict(whole)}
        text = json.dumps(said, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(folder / PROVENANCE, text.encode())

    @property
    def licences(self) -> dict[str, Said]:
        """What the inputs say, by their names."""
        return {one.name: one.licence for one in self.inputs}

    @staticmethod
    def beside(model: Checkpoint) -> Provenance | None:
        """The record in a model's folder; None where there is none.

        Raises:
            CheckpointError: it is not what `save` wrote.
        """
        folder = model.folder
        return None if folder is None or not (folder / PROVENANCE).is_file() else Provenance.load(folder)

    @staticmethod
    def load(folder: Path) -> Provenance:
        """Read it from a folder.

        Raises:
            CheckpointError: there is none, or it is not what `save` wrote.
        """
        from pydantic import TypeAdapter, ValidationError

        file = folder / PROVENANCE
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no {PROVENANCE}, so it is not known how it came about; the verbs of hf-rebasin that "
                "write a model (merge, align, apply, recalibrate, interpolate) leave one"
            )
        try:
            said = json.loads(file.read_bytes())
            if not isinstance(said, dict) or said.pop("format", None) != FORMAT:
                raise CheckpointError(f"{file} is not of the format {FORMAT}")
            return TypeAdapter(Provenance).validate_python(said)
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(
                f"{file} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error
        except (ValueError, RecursionError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def hashes(folder: Path, *, written: bool = False, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """`{file: sha256}` of what makes a model in a folder: weights and what goes along with them.

    Args:
        folder: of the model.
        written: of all that came of making it, too, but for the record itself and the card.
        known: files that were hashed while they were written.
    """
    known = known or {}
    if not folder.is_dir():
        return {}
    top = [file for file in folder.iterdir() if file.is_file()]
    old = not any(is_weights(file.name) for file in top)
    files = {
        file
        for file in top
        if is_weights(file.name)
        or (old and not written and fnmatch(file.name, OLD_WEIGHTS))
        or (written and is_made(file.name) and file.name not in (PROVENANCE, CARD))
    }
    named = {file.relative_to(folder).as_posix(): file for file in files.union(side_files(folder))}
    return {name: known.get(name) or sha256_of(file) for name, file in sorted(named.items())}


def read_sums(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, sha256) of `SHA256SUMS`."""
    file = folder / SUMS
    for line in file.read_text().splitlines() if file.is_file() else ():
        digest, _, name = line.partition("  ")
        yield name, digest


def versions(packages: Iterable[str] = PACKAGES) -> Iterator[tuple[str, str]]:
    import platform

    yield "python", platform.python_version()
    for name in packages:
        yield name, version(name)
