"""Verification: whether a folder is as it was written, and whether its record reproduces it bit by bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import CHECKSUMS, RECORDS, is_record_file, is_weights, matches_path
from ..checkpoints.lazy import Lazy
from ..checkpoints.provenance import InputRecord, Provenance, hash_files, package_versions
from ..checkpoints.side_files import holds_weights, is_known_side_file
from ..errors import CheckpointError, listed
from ..modules.distributed import world_size
from ..modules.functional import Device
from .artefacts import LOADED_FILES, fetch_artefacts
from .rebuild import rebuild_model


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check.

    Args:
        kind: property that was checked.
        what: name of the file, model or tensor.
        holds: whether it has the property.
        detail: the difference, where it has not.
    """

    kind: Literal["as written", "as read", "the same when rebuilt"]
    what: str
    holds: bool
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.detail or 'is ' + self.kind}"


@dataclass(frozen=True)
class Verification:
    """Result of verifying a folder."""

    name: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)


def verify(
    source: str,
    *,
    rebuild: bool = False,
    resolve: bool = False,
    models: Sequence[str] = (),
    data: str | None = None,
    device: Device = None,
    progress: bool = False,
) -> Verification:
    """Recompute the hashes of a folder or repository, and optionally rebuild it.

    Args:
        source: folder, or id on the Hub (`org/name@revision`).
        rebuild: whether to rebuild it from its record, with the stored alignments, and compare all files bit by bit.
        resolve: whether to rebuild it with alignments that are solved anew.
        models: folders of inputs that are not on the Hub; they are identified by their sha256.
        data: path of the data, if they are not on the Hub.
        device: device to rebuild it on, if it was not made on a CPU.
        progress: whether to show progress bars.

    Raises:
        CheckpointError: there is no record, or an input is missing.
        HubError: an input or the repository cannot be read from the Hub.

    Example:
        >>> verification = verify("me/merged", rebuild=True)
        >>> verification.holds, [finding.what for finding in verification.findings if not finding.holds]
        (True, [])
    """
    folder = fetch_artefacts(source, progress=progress)
    provenance = Provenance.load(folder)
    hashes, notes = hash_files(folder, written=True), []
    findings = list(compare_files(folder, provenance, hashes))
    if rebuild or resolve:
        installed = dict(package_versions())
        differ = [
            f"{n} {v} (here {installed.get(n)})" for n, v in provenance.versions.items() if installed.get(n) != v
        ]
        if differ:
            notes.append(f"it was made with {listed(differ, 9)}; other versions may round differently")
        machine = provenance.machine
        if machine.device == "cpu":
            device = None
        elif (here_on := "cpu" if device is None else torch.device(device).type) != machine.device:
            notes.append(f"it was made on {machine.device} and is rebuilt on {here_on}, which may round differently")
        if machine.processes != world_size():
            notes.append(f"it was made by {machine.processes} processes; another number may round sums differently")
        inputs = [_find_input(record, models) for record in provenance.inputs]
        findings += [_check_input(record, files) for record, (_, files) in zip(provenance.inputs, inputs, strict=True)]
        checkpoints = [checkpoint for checkpoint, _ in inputs]
        with tempfile.TemporaryDirectory(prefix="hf-rebasin-") as scratch, _thread_count(machine.threads):
            rebuilt = Path(scratch) / "again"
            rebuild_model(
                provenance,
                checkpoints,
                folder,
                rebuilt,
                resolve=resolve,
                data=data,
                device=device,
                progress=progress,
            )
            findings += _compare_rebuilt(folder, rebuilt, provenance.outputs, hashes)
    return Verification(source, tuple(findings), tuple(notes))


def compare_files(folder: Path, provenance: Provenance, hashes: Mapping[str, str]) -> Iterator[Finding]:
    """Compare the files of a folder with its record, and report weights that are not in the record."""
    for name, digest in sorted(provenance.outputs.items()):
        current = hashes.get(name)
        if current is None:
            yield Finding(kind="as written", what=name, holds=False, detail="is missing")
        else:
            detail = "" if current == digest else f"was changed: its sha256 is {current}, not {digest}"
            yield Finding(kind="as written", what=name, holds=current == digest, detail=detail)
    for file in sorted((*folder.iterdir(), *(folder / RECORDS).glob("*"))):
        name = file.relative_to(folder).as_posix()
        if name not in provenance.outputs and (is_weights(name) or matches_path(name, LOADED_FILES)):
            detail = "was not written with the rest, and may be loaded instead of it"
            yield Finding(kind="as written", what=name, holds=False, detail=detail)


def _find_input(record: InputRecord, models: Sequence[str]) -> tuple[Checkpoint, dict[str, str]]:
    """Open an input and hash its files: at its commit on the Hub, else the folder in `models` with its weights."""
    if record.commit is not None:
        checkpoint = Checkpoint.open(record.name, revision=record.commit)
        return checkpoint, {} if checkpoint.folder is None else hash_files(checkpoint.folder)
    wanted = _weight_hashes(record.files)
    for folder in models:
        files = hash_files(Path(folder))
        if _weight_hashes(files) == wanted:
            return Checkpoint.open(folder), files
    problem = f", and none of {listed(models)} is it" if models else ""
    raise CheckpointError(
        f"{record.name} is not on the Hub{problem}; say where it is (--model FOLDER): its weights have "
        f"{listed(map(' '.join, wanted.items()), 1)}"
    )


def _weight_hashes(files: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.endswith((".safetensors", ".bin"))}


def _check_input(record: InputRecord, files: Mapping[str, str]) -> Finding:
    # of files that the record lacks, those count that would be loaded; older versions recorded no others
    added = {name for name in files if holds_weights(name) or is_known_side_file(Path(name).name)}
    names = record.files.keys() | added
    changed = sorted(name for name in names if record.files.get(name) != files.get(name))
    detail = f"has files that differ from those that were read: {listed(changed)}" if changed else ""
    return Finding(kind="as read", what=record.reference, holds=not changed, detail=detail)


def _compare_rebuilt(
    folder: Path, rebuilt: Path, written: Mapping[str, str], hashes: Mapping[str, str]
) -> Iterator[Finding]:
    """Compare a rebuilt folder with what was written, and where the weights differ, with the tensors of `folder`."""
    rebuilt_hashes = hash_files(rebuilt, written=True)
    for name, digest in sorted(rebuilt_hashes.items()):
        if name in written and name != CHECKSUMS:  # hashes of the others; older versions listed the weights alone
            same = digest == written[name]
            yield _rebuilt_finding(name, "" if same else "differs when rebuilt")
    for name in sorted(written.keys() - rebuilt_hashes.keys()):
        if not is_record_file(name):  # recipe, report and stored alignments are not always written by a rebuild
            yield _rebuilt_finding(name, "is missing from the rebuilt model")
    current = {name: digest for name, digest in hashes.items() if is_weights(name) and name in written}
    if current == {name: digest for name, digest in rebuilt_hashes.items() if is_weights(name)}:
        return
    try:
        a, b = Checkpoint.open(folder), Checkpoint.open(rebuilt)
    except CheckpointError as error:
        yield _rebuilt_finding("the folder", f"cannot be read: {error}")
        return
    for key in sorted(a.parts.keys() | b.parts.keys()):
        if difference := _describe_difference(a.parts.get(key), b.parts.get(key)):
            yield _rebuilt_finding(key, difference)


def _rebuilt_finding(name: str, detail: str) -> Finding:
    return Finding(kind="the same when rebuilt", what=name, holds=not detail, detail=detail)


def _describe_difference(stored: Lazy | None, rebuilt: Lazy | None) -> str:
    """Describe in what two tensors differ; empty if they do not."""
    if stored is None or rebuilt is None or (stored.shape, stored.dtype) != (rebuilt.shape, rebuilt.dtype):
        return "is not in both, or has another shape or dtype"
    a, b = (part.read().reshape(-1) for part in (stored, rebuilt))
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return ""
    largest = (a.double() - b.double()).abs().max().item()
    number = int((a.view(torch.uint8) != b.view(torch.uint8)).reshape(len(a), -1).any(1).sum())
    return f"differs from the rebuilt tensor in {number} of {len(a)} values, by {largest:.3g} at most"


@contextmanager
def _thread_count(count: int) -> Iterator[None]:
    """Set the number of torch threads inside the block: how sums are rounded depends on it."""
    if not 1 <= count <= 1024:
        raise CheckpointError(f"the record says that {count} threads took part, which is impossible")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
