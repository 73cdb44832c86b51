"""Random numbers of merge methods, which depend on a seed, the tensor's name and the model's content, on nothing else.

So masks differ between models and between tensors, and the same merge has the same bytes whatever the order of the
models, the sizes of files and pieces, and the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.cache import SHA256_DIGITS, cache_file, file_state, read_answer, store_answer
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.tensor_files import Stored

BLOCK = 1 << 18  # elements whose random numbers come from one generator, so that pieces may begin anywhere


def content_hash(checkpoint: Checkpoint) -> bytes:
    """Return a hash of the names, shapes, dtypes and values of a model's tensors, in whatever files they are.

    It is remembered for tensors that are read from files, as long as these stay what they are.
    """
    file = _remembered(checkpoint)
    match None if file is None else read_answer(file):
        case str(text) if len(text) == SHA256_DIGITS:
            return bytes.fromhex(text)
    digest = hashlib.sha256()
    for key in sorted(checkpoint.parts):
        part = checkpoint.parts[key]
        digest.update(f"{key} {part.shape} {part.dtype}\n".encode())
        for chunk in part.chunks():
            digest.update(cast(Any, chunk.contiguous().reshape(-1).view(torch.uint8).numpy()).data)
    if file is not None:
        store_answer(file, digest.hexdigest())
    return digest.digest()


def _remembered(checkpoint: Checkpoint) -> Path | None:
    """Return where the hash of a model is remembered; None if it is not read from files, or they are too new."""
    tensors, files = [], {}
    for key in sorted(checkpoint.parts):
        part = checkpoint.parts[key]
        if not isinstance(part, Stored):
            return None
        files[str(part.file.path.resolve())] = part.file.path
        tensors.append([key, str(part.dtype), part.shape, str(part.file.path.resolve()), part.offset])
    states = {name: file_state(path) for name, path in files.items()}
    return None if None in states.values() else cache_file("contents", [tensors, states])


@dataclass(frozen=True)
class Stream:
    """The random numbers of one tensor of one model, any part of which can be drawn by itself.

    Args:
        seed: seed of the merge.
        key: name of the tensor.
        content: returns the content hash of the model.
    """

    seed: int
    key: str
    content: Callable[[], bytes]

    @cached_property
    def _entropy(self) -> int:
        text = f"{self.seed} {self.key} ".encode() + self.content()
        return int.from_bytes(hashlib.sha256(text).digest(), "little")

    def draw(self, start: int, stop: int) -> Tensor:
        """Return uniform numbers in [0, 1), in float32, for the elements `start` to `stop` of the flat tensor."""
        parts = [torch.empty(0)]
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            parts.append(self._draw_block(block, min(stop - first, BLOCK))[max(start - first, 0) :])
        return parts[1] if len(parts) == 2 else torch.cat(parts)

    def _draw_block(self, block: int, count: int) -> Tensor:
        """Return the first numbers of a block."""
        bits = np.random.SFC64(np.random.SeedSequence([self._entropy, block])).random_raw((count + 1) // 2)
        halves = torch.from_numpy(bits.view(np.int32))[:count]
        return halves.bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)  # all 2²⁴ numbers are exact in float32


def streams(seed: int, key: str, contents: Sequence[Callable[[], bytes]]) -> list[Stream]:
    """Return the random numbers of a tensor in every model."""
    return [Stream(seed, key, content) for content in contents]
