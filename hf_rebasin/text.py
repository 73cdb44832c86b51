"""Tables in plain text, and what is left out of them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import TypeVar

Item = TypeVar("Item")


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """Rows in columns two spaces apart; the columns in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def printable(text: str) -> str:
    """Names in a file may hold what moves a terminal's cursor: shown as they would be typed.

    Example:
        >>> printable("a\x1b[2J")
        'a\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def family_of(said: str) -> str:
    """With stars for numbers: ff.3 is one of ff.*, but fc1.3 one of fc1.*."""
    return re.sub(r"(?<=\.)\d+(?=[.\s:,]|$)", "*", said)


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most so many of them, evenly, first and last among them."""
    k = min(limit, len(items))
    return [items[round(i * (len(items) - 1) / max(k - 1, 1))] for i in range(k)]


def without_place(name: str) -> str:
    """An absolute path by its last two components, as it means nothing elsewhere; any other name as it is.

    Example:
        >>> without_place("/data/runs/vit/seed-0"), without_place("me/vit-seed-0")
        ('vit/seed-0', 'me/vit-seed-0')
    """
    bare = name.removeprefix("file://")
    kind: type[PurePath] = PureWindowsPath if re.match(r"[A-Za-z]:[\\/]|\\\\", bare) else PurePosixPath
    path = kind(bare)
    if not path.is_absolute() and not bare.startswith("~"):
        return name
    parts = [part for part in path.parts if part != path.anchor and not part.startswith("~")]
    return "/".join(parts[-2:])


def without_secrets(text: str) -> str:
    """Without tokens of the Hub: what looks like one, and the one that the environment names."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "hf_…")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}|\bhf_(?:oauth|jwt)_[\w.-]+|(?<=Bearer )[^\s'\"]+", "hf_…", text)


_PATHS = re.compile(r"""(?<![\w.~/<\\])(?:file://)?~?(?:[A-Za-z]:)?(?:[/\\][^\s/\\'"`<>|:;,()\[\]{}]+)+[/\\]?""")


def without_places(text: str) -> str:
    """The same of every absolute path in a text; a folder with a blank in its name is known by no pattern."""
    return _PATHS.sub(lambda found: without_place(found[0]), text)
