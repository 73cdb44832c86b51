"""Tables in plain text, and what is left out of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """Rows in columns two spaces apart; the columns in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def family_of(said: str) -> str:
    """With stars for numbers: ff.3 is one of ff.*, but fc1.3 one of fc1.*."""
    return re.sub(r"(?<=\.)\d+(?=[.\s:,]|$)", "*", said)


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most so many of them, evenly, first and last among them."""
    k = min(limit, len(items))
    return [items[round(i * (len(items) - 1) / max(k - 1, 1))] for i in range(k)]
