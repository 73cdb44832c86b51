"""Is a folder what was written, and does what is said of it make it again, bit by bit?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import ADAPTER, is_made, is_weights
from ..checkpoints.lazy import Lazy
from ..checkpoints.provenance import Input, Provenance, hashes, versions
from ..errors import CheckpointError, some
from ..modules.distributed import count
from ..modules.functional import Device
from .artefacts import folder_of
from .rebuild import made_again

# What is read before the weights, or with them, or instead of the alignment that was written.
READ_FIRST = (*ADAPTER, "pytorch_model*.bin", "alignment*.safetensors")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        kind: what was asked of it.
        what: which file, model or tensor it is.
        holds: whether it is as it should be.
        said: what was seen.
    """

    kind: Literal["as it was written", "as it was read", "the same, made again"]
    what: str
    holds: bool
    said: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.said or 'is ' + self.kind}"


@dataclass(frozen=True)
class Verification:
    """What looking at a folder came to."""

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
    """Recompute the hashes of a folder or repository, and make it again if asked to.

    Args:
        source: a folder, or an id on the Hub (`org/name@revision`).
        rebuild: make it again from its recipe, with the stored alignments, and compare all files bit by bit.
        resolve: look for the alignments anew, too.
        models: folders of inputs that are not on the Hub; they are told by their sha256.
        data: where the data are, if they are not on the Hub.
        device: where it is computed, if it was not made on a CPU.
        progress: show progress bars.

    Raises:
        CheckpointError: there is no record, or an input is not there.
        HubError: what is on the Hub cannot be read.

    Example:
        >>> found = verify("me/merged", rebuild=True)
        >>> found.holds, [finding.what for finding in found.findings if not finding.holds]
        (True, [])
    """
    folder = folder_of(source, progress=progress)
    provenance = Provenance.load(folder)
    there, notes = hashes(folder, written=True), []
    findings = list(compared(folder, provenance, there))
    if rebuild or resolve:
        here = dict(versions())
        differ = [f"{n} {v} (here {here.get(n)})" for n, v in provenance.versions.items() if here.get(n) != v]
        if differ:
            notes.append(f"it was made with {some(differ, 9)}; other versions may round differently")
        made_on = provenance.machine
        if made_on.device == "cpu":
            device = None
        elif (mine := "cpu" if device is None else torch.device(device).type) != made_on.device:
            notes.append(f"it was made on {made_on.device}, and is made again on {mine}, which may round differently")
        if made_on.processes != count():
            notes.append(
                f"it was made by {made_on.processes} processes; sums of other numbers may be rounded differently"
            )
        found = [_input(one, models) for one in provenance.inputs]
        findings += [_unchanged(one, files) for one, (_, files) in zip(provenance.inputs, found, strict=True)]
        places = [place for place, _ in found]
        with tempfile.TemporaryDirectory(prefix="hf-rebasin-") as scratch, _threads(provenance.machine.threads):
            again = Path(scratch) / "again"
            made_again(provenance, places, folder, again, resolve=resolve, data=data, device=device, progress=progress)
            findings += _same(folder, again, provenance.outputs, there)
    return Verification(source, tuple(findings), tuple(notes))


def compared(folder: Path, provenance: Provenance, there: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the files of a folder (`there`, with their sha256) are those that were written, and whether there are
    weights besides."""
    for name, digest in sorted(provenance.outputs.items()):
        found = there.get(name)
        if found is None:
            yield Finding("as it was written", name, False, "is missing")
        else:
            said = "" if found == digest else f"was changed: its sha256 is {found}, not {digest}"
            yield Finding("as it was written", name, found == digest, said)
    for file in sorted(folder.iterdir()):
        name = file.name
        if name not in provenance.outputs and (is_weights(name) or any(fnmatch(name, one) for one in READ_FIRST)):
            said = "was not written with the rest, and may be loaded instead of it"
            yield Finding("as it was written", name, False, said)


def _input(one: Input, models: Sequence[str]) -> tuple[Checkpoint, dict[str, str]]:
    """The model that was read, and its files with their sha256: at its commit, or among folders that were named the
    one with the same weights."""
    if one.commit is not None:
        checkpoint = Checkpoint.open(one.name, revision=one.commit)
        return checkpoint, {} if checkpoint.folder is None else hashes(checkpoint.folder)
    mine = _weights(one.files)
    for place in models:
        files = hashes(Path(place))
        if _weights(files) == mine:
            return Checkpoint.open(place), files
    tried = f"none of {some(models)} is it" if models else "say where it is (--model FOLDER)"
    raise CheckpointError(
        f"{one.name} is not on the Hub, and {tried}; its weights have {some(map(' '.join, mine.items()), 1)}"
    )


def _weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.endswith((".safetensors", ".bin"))}


def _unchanged(one: Input, there: Mapping[str, str]) -> Finding:
    other = sorted(name for name in one.files.keys() | there.keys() if one.files.get(name) != there.get(name))
    said = f"has other files than it had: {some(other)}" if other else ""
    return Finding("as it was read", one.place, not other, said)


def _same(folder: Path, again: Path, written: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Finding]:
    """Whether what was made again is what was written, and where the weights are not, in which tensors."""
    anew = hashes(again, written=True)
    for name, digest in sorted(anew.items()):
        if name in written:
            same = digest == written[name]
            yield Finding("the same, made again", name, same, "" if same else "is another, made again")
    for name in sorted(written.keys() - anew.keys()):
        if not is_made(name):  # the recipe, the report and stored alignments are what it is made again of, or after
            yield Finding("the same, made again", name, False, "does not come out when it is made again")
    here = {name: digest for name, digest in there.items() if is_weights(name) and name in written}
    if here == {name: digest for name, digest in anew.items() if is_weights(name)}:
        return
    try:
        a, b = Checkpoint.open(folder), Checkpoint.open(again)
    except CheckpointError as error:
        yield Finding("the same, made again", "the folder", False, f"cannot be read: {error}")
        return
    for key in sorted(a.parts.keys() | b.parts.keys()):
        if said := _difference(a.parts.get(key), b.parts.get(key)):
            yield Finding("the same, made again", key, False, said)


def _difference(one: Lazy | None, other: Lazy | None) -> str:
    """In what two tensors differ; empty if they do not."""
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return "is not in both, or has another shape or dtype"
    a, b = (part.read().reshape(-1) for part in (one, other))
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return ""
    away = (a.double() - b.double()).abs().max().item()
    number = int((a.view(torch.uint8) != b.view(torch.uint8)).reshape(len(a), -1).any(1).sum())
    return f"differs from what is made again in {number} of {len(a)} values, by {away:.3g} at most"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """How sums are rounded hangs on how many threads take part in them."""
    if not 1 <= count <= 1024:
        raise CheckpointError(f"the record says that {count} threads took part, which cannot be")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
