"""Files of tensors: read by their header, one range at a time, and written header first, one chunk at a time.

The format of safetensors is 8 bytes with the length of a JSON header, the header, the data. Ranges are read with
`pread`, not mapped, so the memory a process is seen to hold is what it works on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError, some
from .lazy import Here, Lazy

# The dtypes of the format, in the order in which the safetensors library lays tensors out: the widest come first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000


class File:
    """An open file, closed when nothing reads from it any more. What replaces it under its name is not seen."""

    def __init__(self, path: Path):
        self.path = path
        try:
            if path.exists() and not path.is_file():  # a folder, or a pipe that nobody writes to
                raise OSError("not a file")
            self.descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self.descriptor)
            self.state = self._state()
        except (OSError, ValueError) as error:  # ValueError: a name that no system has
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _state(self) -> tuple[int, int]:
        now = os.fstat(self.descriptor)
        return now.st_size, now.st_mtime_ns

    @property
    def size(self) -> int:
        """Bytes."""
        return self.state[0]

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Read as many bytes as the buffer has; a file that was written to since it was opened is an error."""
        done = 0
        try:
            if self._state() != self.state:
                raise CheckpointError(f"{self.path} was changed after it was opened; open it again")
            while done < len(buffer):
                got = os.preadv(self.descriptor, [buffer[done:]], offset + done)
                if not got:
                    raise CheckpointError(f"{self.path} ends at byte {offset + done}, where a tensor goes on")
                done += got
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Stored(Lazy):
    """A tensor in a file."""

    file: File
    offset: int

    @property
    def lasting(self) -> bool:
        return True

    def ready(self) -> Lazy:
        return self

    def chunk(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, dtype=self.dtype)
        self.file.fill(_bytes(out), self.offset + start * self.dtype.itemsize)
        return out


def _bytes(flat: Tensor) -> memoryview:
    """The memory of a contiguous flat tensor."""
    return cast(Any, flat.view(torch.uint8).numpy()).data


def read_file(path: Path) -> dict[str, Stored]:
    """The tensors of a file, not read yet.

    Raises:
        CheckpointError: it cannot be opened, is cut short, or its header does not describe it.
    """
    file = File(path)
    try:
        header, begin = _header(file)
        tensors = {name: _stored(file, name, said, begin) for name, said in header.items() if name != "__metadata__"}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: no header of a safetensors file ({error!r})") from error
    at = begin
    for name, part in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if part.offset != at:
            raise CheckpointError(f"{path} cannot be read: {name} begins at byte {part.offset} instead of {at}")
        at += part.nbytes
    if at != file.size:
        raise CheckpointError(f"{path} cannot be read: it has {file.size} bytes, and says what {at} of them are")
    return tensors


def read_pickle(path: Path) -> dict[str, Lazy]:
    """The tensors of a `.bin` file, which is a pickle of tensors and of nothing else: no code in it is run.

    Those of a file that torch ≥ 1.6 wrote are not read yet; older files are read whole.

    Raises:
        CheckpointError: it cannot be read, or holds other things than tensors by name.
    """
    file = File(path)
    try:
        _refuse_compressed(path)
        state = _unpickled(path, lazily=True)
        for name, tensor in state.items():
            _refuse_name(path, name)
            if tensor.numel() * tensor.itemsize > file.size:  # one number can be said to be a billion
                raise CheckpointError(
                    f"{path} cannot be read: {name} {tuple(tensor.shape)} would be larger than the file "
                    f"({file.size} bytes)"
                )
        offsets = {name: _offset(tensor) for name, tensor in state.items()}
        if None in offsets.values():
            return {name: Here.of(tensor, own=True) for name, tensor in _unpickled(path, lazily=False).items()}
        return {
            name: Stored(tuple(tensor.shape), tensor.dtype, file, cast(int, offsets[name]))
            for name, tensor in state.items()
        }
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle raises whatever the code reading it stumbles on
        said = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read: {said}") from error


def _refuse_name(path: Path, name: str) -> None:
    """Raise CheckpointError for a name that would move a terminal's cursor where it is shown."""
    if not name.isprintable():
        raise CheckpointError(f"{path} cannot be read: the name {name!r} has characters that cannot be shown")


def _refuse_compressed(path: Path) -> None:
    """Raise CheckpointError for an archive that torch has not written: its ranges are not what tensors are made of."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(f"{path} cannot be read: {some(packed)} is compressed, as torch.save never does")


def _offset(tensor: Tensor) -> int | None:
    """Where in its file a tensor begins that was unpickled without its values; None if it is not in one piece."""
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if place is None or not tensor.is_contiguous():
        return None
    return int(place) + int(tensor.storage_offset()) * tensor.itemsize


def _unpickled(path: Path, lazily: bool) -> dict[str, Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it logs the traceback of what is caught here
    with FakeTensorMode() if lazily else nullcontext(), _silent(logger):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for name, tensor in state.items()
    ):
        raise CheckpointError(f"{path} is no state dict: it holds other things than tensors by name")
    return state


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _header(file: File) -> tuple[dict[str, Any], int]:
    """(header, where the data begin)"""
    length = bytearray(8)
    if file.size < 8:
        raise CheckpointError(f"{file.path} cannot be read: it has {file.size} bytes, too few for a safetensors file")
    file.fill(memoryview(length), 0)
    n = int.from_bytes(length, "little")
    if n > min(LONGEST_HEADER, file.size - 8):
        raise CheckpointError(
            f"{file.path} cannot be read: it has {file.size} bytes, and would need a header of {n}; it is cut short, "
            "or no safetensors file"
        )
    text = bytearray(n)
    file.fill(memoryview(text), 8)
    header = json.loads(text.decode(), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError(f"a {type(header).__name__}, not an object")
    return header, 8 + n


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose keys is said twice: readers differ in which they take."""
    said = dict(pairs)
    if len(said) < len(pairs):
        raise ValueError("a name is said twice")
    return said


def _stored(file: File, name: str, said: Mapping[str, Any], begin: int) -> Stored:
    if said["dtype"] not in DTYPES:
        raise CheckpointError(f"{file.path} cannot be read: {name} is {said['dtype']}, a dtype that is not known here")
    shape, dtype = tuple(said["shape"]), DTYPES[said["dtype"]]
    first, last = said["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, last)) or not name.encode():
        raise ValueError(f"{name!r} has shape {shape} in bytes {first} to {last}")
    _refuse_name(file.path, name)
    if last - first != math.prod(shape) * dtype.itemsize or math.prod(max(n, 1) for n in shape) >= 1 << 63:
        raise CheckpointError(
            f"{file.path} cannot be read: {name} {shape} of {said['dtype']} is said to lie in bytes {first} to {last}"
        )
    if begin + last > file.size:
        raise CheckpointError(
            f"{file.path} cannot be read: it is cut short, {name} {shape} ends at byte {begin + last} of {file.size}"
        )
    return Stored(shape, dtype, file, begin + first)


def sha256_of(path: Path) -> str:
    """Of a whole file, read in pieces."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(piece):
            digest.update(piece[:n])
    return digest.hexdigest()


def write_file(path: Path, parts: Mapping[str, Lazy], written: Callable[[int], object]) -> str:
    """Write tensors as they come and return the file's sha256; the bytes are those the safetensors library writes.

    Args:
        path: of the file.
        parts: `{name: tensor to come}`.
        written: called with the number of bytes, every now and then.
    """
    order = {dtype: i for i, dtype in enumerate(NAMES)}
    other = {str(part.dtype) for part in parts.values() if part.dtype not in NAMES}
    if other:
        raise CheckpointError(f"safetensors files have no {', '.join(sorted(other))}")
    if "__metadata__" in parts:
        raise CheckpointError("a tensor named '__metadata__' cannot be written: that name is not for tensors")
    names = sorted(parts, key=lambda name: (-order[parts[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        part = parts[name]
        header[name] = {
            "dtype": NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [at, at + part.nbytes],
        }
        at += part.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _Sink(path) as sink:
        sink.put(memoryview(len(text).to_bytes(8, "little") + text))
        for name in names:
            for chunk in parts[name].chunks():
                sink.put(_bytes(chunk.cpu()))
            written(parts[name].nbytes)
    return sink.sha256.hexdigest()


class _Sink:
    """A file that is hashed by a thread of its own, while it is written and the next chunk is read and computed."""

    def __init__(self, path: Path):
        self.path, self.sha256 = path, hashlib.sha256()
        self.queue: Queue[memoryview | None] = Queue(maxsize=8)
        self.thread = threading.Thread(target=self._hash, name=f"sha256 {path.name}", daemon=True)

    def __enter__(self) -> _Sink:
        self.file = self.path.open("wb", buffering=0)
        self.thread.start()
        return self

    def put(self, data: memoryview) -> None:
        self.queue.put(data)
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _hash(self) -> None:
        while (data := self.queue.get()) is not None:
            self.sha256.update(data)

    def __exit__(self, *_: object) -> None:
        self.queue.put(None)
        self.thread.join()
        self.file.close()
