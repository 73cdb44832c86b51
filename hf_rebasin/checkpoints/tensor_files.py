"""Tensor files: read by their header, one range at a time, and written header first, one chunk at a time.

A safetensors file consists of 8 bytes with the length of a JSON header, the header, and the data. Ranges are read
rather than mapped, so that the resident memory of a process is what it works on.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from queue import Queue
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError, listed
from .formats import explain_pickle
from .lazy import InMemory, Lazy

# The dtypes of the format in the order of the safetensors library, which lays tensors out from the last to the first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
# Numbers of less than 8 bits, several in a byte: only quantised models have them.
PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
LARGEST_READ = 1 << 30  # bytes at a time; some systems refuse 2 GB


class OpenFile:
    """An open file, closed once nothing refers to it; a file that replaces it under its name goes unnoticed.

    Windows lets nobody replace or remove a file that is open, or a folder with one in it.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        try:
            if path.exists() and not path.is_file():  # a folder, or a pipe without a writer
                raise OSError("not a file")
            self.file = path.open("rb", buffering=0)
            weakref.finalize(self, self.file.close)
            self.state = self._state()
        except (OSError, ValueError) as error:  # ValueError: an impossible name
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _state(self) -> tuple[int, int]:
        now = os.fstat(self.file.fileno())
        return now.st_size, now.st_mtime_ns

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.state[0]

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset; raise CheckpointError if the file was changed since it was opened."""
        done = 0
        try:
            if self._state() != self.state:
                raise CheckpointError(f"{self.path} was changed after it was opened; open it again")
            while done < len(buffer):
                got = self._read(buffer[done : done + LARGEST_READ], offset + done)
                if not got:
                    raise CheckpointError(f"{self.path} ends at byte {offset + done}, in the middle of a tensor")
                done += got
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def _read(self, buffer: memoryview, offset: int) -> int:
        """Read from an offset, and return the number of bytes that came; threads may read at the same time."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [buffer], offset)
        with self.lock:  # Windows knows no read at an offset, and threads share the position of the file
            self.file.seek(offset)
            return self.file.readinto(buffer) or 0


@dataclass(frozen=True, kw_only=True)
class Stored(Lazy):
    """A tensor in a file."""

    file: OpenFile
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
    """Return the memory of a contiguous flat tensor."""
    return cast(Any, flat.view(torch.uint8).numpy()).data


def read_file(path: Path) -> dict[str, Stored]:
    """Open the tensors of a safetensors file without reading their values.

    Raises:
        CheckpointError: it cannot be opened, is truncated, or its header does not match it.
    """
    file = OpenFile(path)
    try:
        header, begin = _read_header(file)
        tensors = {
            name: _parse_entry(file, name, entry, begin) for name, entry in header.items() if name != "__metadata__"
        }
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: it has no safetensors header ({error!r})") from error
    end = begin
    for name, part in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if part.offset != end:
            raise CheckpointError(f"{path} cannot be read: {name} begins at byte {part.offset} instead of {end}")
        end += part.nbytes
    if end != file.size:
        raise CheckpointError(f"{path} cannot be read: it has {file.size} bytes, and its header describes {end}")
    return tensors


def read_pickle(path: Path) -> dict[str, Lazy]:
    """Open the tensors of a `.bin` file, a pickle that may hold nothing but tensors: no code in it is run.

    The values of a file written by torch ≥ 1.6 are not read yet; older files are read whole.

    Raises:
        CheckpointError: it cannot be read, or holds anything but named tensors.
    """
    file = OpenFile(path)
    try:
        _refuse_compressed(path)
        state = _unpickle(path, lazily=True)
        for name, tensor in state.items():
            _refuse_name(path, name)
            if tensor.numel() * tensor.itemsize > file.size:  # one element may be expanded to a billion
                raise CheckpointError(
                    f"{path} cannot be read: {name} {tuple(tensor.shape)} would be larger than the file "
                    f"({file.size} bytes)"
                )
        offsets = {name: _file_offset(tensor) for name, tensor in state.items()}
        if None in offsets.values():
            return {name: InMemory.of(tensor, owned=True) for name, tensor in _unpickle(path, lazily=False).items()}
        return {
            name: Stored(tuple(tensor.shape), tensor.dtype, file=file, offset=cast(int, offsets[name]))
            for name, tensor in state.items()
        }
    except CheckpointError:
        raise
    except UnpicklingError as error:
        with path.open("rb") as opened:
            if not opened.read(2).startswith((b"PK", b"\x80")):  # neither an archive nor a pickle
                raise CheckpointError(f"{path} cannot be read: torch.save did not write it; fetch it again") from error
        if "Weights only load failed" not in str(error):
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        raise explain_pickle(path, "cannot be read: it holds Python objects, and not tensors alone") from error
    except Exception as error:  # a broken pickle may raise anything
        message = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read: {message}") from error


def _refuse_name(path: Path, name: str) -> None:
    """Raise CheckpointError for a name with control characters, which would affect a terminal."""
    if not name.isprintable():
        raise CheckpointError(f"{path} cannot be read: the name {name!r} has unprintable characters")


def _refuse_compressed(path: Path) -> None:
    """Raise CheckpointError for a compressed archive, which torch never writes and whose ranges are not tensors."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(
                f"{path} cannot be read: {listed(packed)} is compressed, which torch.save never does"
            )


def _file_offset(tensor: Tensor) -> int | None:
    """Return where in its file a tensor begins that was unpickled without values; None if it is not contiguous."""
    storage_offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if storage_offset is None or not tensor.is_contiguous():
        return None
    return int(storage_offset) + int(tensor.storage_offset()) * tensor.itemsize


def _unpickle(path: Path, lazily: bool) -> dict[str, Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it logs tracebacks of errors caught here
    with FakeTensorMode() if lazily else nullcontext(), _silenced(logger):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not _is_state_dict(state):
        nested = [name for name, value in state.items() if _is_state_dict(value)] if isinstance(state, dict) else []
        if len(nested) == 1:
            raise explain_pickle(path, "", nested[0])
        raise CheckpointError(f"{path} is not a state dict: it holds other things than named tensors")
    return cast("dict[str, Tensor]", state)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
            for name, tensor in value.items()
        )
    )


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _read_header(file: OpenFile) -> tuple[dict[str, Any], int]:
    """Return (header, offset of the data)."""
    length = bytearray(8)
    if file.size < 8:
        raise CheckpointError(f"{file.path} cannot be read: it has {file.size} bytes, too few for a safetensors file")
    file.fill(memoryview(length), 0)
    n = int.from_bytes(length, "little")
    if n > min(LONGEST_HEADER, file.size - 8):
        raise CheckpointError(
            f"{file.path} cannot be read: it has {file.size} bytes, and its header would have {n}; it is truncated, "
            "or not a safetensors file"
        )
    text = bytearray(n)
    file.fill(memoryview(text), 8)
    header = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    if not isinstance(header, dict):
        raise ValueError(f"a {type(header).__name__}, not an object")
    return header, 8 + n


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, or raise ValueError for duplicate keys, of which readers take different ones."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name is given twice")
    return unique


def _parse_entry(file: OpenFile, name: str, entry: Mapping[str, Any], begin: int) -> Stored:
    shape, dtype = tuple(entry["shape"]), find_dtype(f"{file.path} cannot be read", name, entry["dtype"])
    first, last = entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, last)) or not name.encode():
        raise ValueError(f"{name!r} has shape {shape} in bytes {first} to {last}")
    _refuse_name(file.path, name)
    if last - first != math.prod(shape) * dtype.itemsize or math.prod(max(n, 1) for n in shape) >= 1 << 63:
        raise CheckpointError(
            f"{file.path} cannot be read: {name} {shape} of {entry['dtype']} cannot fill bytes {first} to {last}"
        )
    if begin + last > file.size:
        raise CheckpointError(
            f"{file.path} cannot be read: it is truncated, {name} {shape} ends at byte {begin + last} of {file.size}"
        )
    return Stored(shape, dtype, file=file, offset=begin + first)


def find_dtype(problem: str, name: str, dtype: str) -> torch.dtype:
    """Return the dtype of a tensor of a safetensors file by the format's name, or raise CheckpointError."""
    if dtype in PACKED_DTYPES:
        raise CheckpointError(
            f"{problem}: it is quantised ({name} is {dtype}), and quantised weights cannot be moved or averaged; use "
            "the original"
        )
    if dtype not in DTYPES:
        raise CheckpointError(f"{problem}: {name} has dtype {dtype}, which is not supported")
    return DTYPES[dtype]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(piece):
            digest.update(piece[:n])
    return digest.hexdigest()


def write_file(path: Path, parts: Mapping[str, Lazy], written: Callable[[int], object]) -> str:
    """Write tensors as they are computed and return the file's sha256; the safetensors library writes the same bytes.

    Args:
        path: path of the file.
        parts: `{name: lazy tensor}`.
        written: callback for the number of bytes of every tensor written.
    """
    order = {dtype: i for i, dtype in enumerate(DTYPE_NAMES)}
    other = {str(part.dtype) for part in parts.values() if part.dtype not in DTYPE_NAMES}
    if other:
        raise CheckpointError(f"safetensors files cannot hold {', '.join(sorted(other))}")
    if "__metadata__" in parts:
        raise CheckpointError("a tensor named '__metadata__' cannot be written: that name is reserved")
    names = sorted(parts, key=lambda name: (-order[parts[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        part = parts[name]
        header[name] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [end, end + part.nbytes],
        }
        end += part.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _HashingWriter(path) as writer:
        writer.put(memoryview(len(text).to_bytes(8, "little") + text))
        for part in _ready_in_turn([parts[name] for name in names]):
            for chunk in part.chunks():
                writer.put(_bytes(chunk.cpu()))
            written(part.nbytes)
    return writer.sha256.hexdigest()


def _ready_in_turn(parts: Sequence[Lazy]) -> Iterator[Lazy]:
    """Yield tensors that are ready to be read, each while those are made ready that have passes to make first."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        waiting: Future[Lazy] | None = None
        for i, part in enumerate(parts):
            ready = waiting.result() if waiting is not None else part.ready()
            following = parts[i + 1] if i + 1 < len(parts) else None
            waiting = thread.submit(following.ready) if following is not None and following.passes_first else None
            yield ready


class _HashingWriter:
    """A file that a thread of its own hashes while it is written and the next chunk is computed."""

    def __init__(self, path: Path):
        self.path, self.sha256 = path, hashlib.sha256()
        self.queue: Queue[memoryview | None] = Queue(maxsize=8)
        self.thread = threading.Thread(target=self._hash, name=f"sha256 {path.name}", daemon=True)

    def __enter__(self) -> _HashingWriter:
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
