"""A cache on disk of answers that are slow to find, beside the Hub's; nothing depends on it, and it may be deleted."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SHA256_DIGITS = 64
SETTLED_SECONDS = 5.0


def file_state(path: Path) -> list[int] | None:
    """Return size, times and inode of a file, which change whenever its content does.

    None for a file that was written in the last seconds, which may change once more within the resolution of its
    times.
    """
    stat = path.stat()
    if time.time() - max(stat.st_mtime, stat.st_ctime) <= SETTLED_SECONDS:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def cache_file(kind: str, question: Sequence[Any]) -> Path:
    """Return the file for the answer to a question, which has to hold everything that the answer depends on.

    Args:
        kind: name of a sub-folder.
        question: values that can be written as JSON; others are written as their `repr`.
    """
    from huggingface_hub.constants import HF_HOME

    text = json.dumps(question, sort_keys=True, default=repr)
    return Path(HF_HOME) / "hf-rebasin" / kind / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def read_answer(file: Path) -> Any:
    """Return the answer in a file; None if there is none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store_answer(file: Path, answer: Any) -> None:
    """Write an answer, unless the disk does not let us."""
    from .folder import write_atomically

    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(answer, indent=1, sort_keys=True).encode())
