"""The report of a merge: one HTML page that needs nothing else, the same numbers as JSON, and plots as PNG.

from hf_rebasin.report import Line, Pair, Report, Row, with_excess

ends = (Row("seed-0", loss=0.08), Row("seed-1", loss=0.09))
rows = (Row("plain average", control=True, loss=4.6), Row("aligned average", loss=1.4))
Report("ViT, two seeds", (Pair("seed-0", "seed-1", ends, with_excess(ends, rows)),)).save("report.html")
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..checkpoints.folder import write_whole
from ..errors import OptionError
from ..text import without_place, without_places
from .charts import png
from .measurements import Exactness, Likeness, Line, Moved, Row, with_excess
from .page import render, summary, view
from .pairs import Pair, verdict_over
from .verdict import Verdict, verdict_on

__all__ = [
    "Exactness",
    "Likeness",
    "Line",
    "Moved",
    "Pair",
    "Report",
    "Row",
    "Verdict",
    "verdict_on",
    "verdict_over",
    "with_excess",
]

Said = TypeVar("Said")
DERIVED = {"Line": ("barrier", "area", "middle"), "Pair": ("verdict",), "Report": ("verdict",)}  # in the JSON, too


@dataclass(frozen=True)
class Report:
    """What a merge came to, as it is shown.

    Args:
        title: of the page.
        pairs: one per moving model, or all pairs of a demo.
        recipe: the recipe as YAML.
        data: what it was measured on, in a line.
        versions: `{package: version}`.
        command: that makes the same again.
        created: a date, such as 2026-01-31; reports with the same contents are the same bytes.
        notes: on all of it.
    """

    title: str
    pairs: tuple[Pair, ...] = ()
    recipe: str = ""
    data: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """On all pairs together."""
        return verdict_over(self.pairs)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write `x.html`, `x.json`, and `x-PAIR.png` for every pair with lines; a file is complete or absent.

        Args:
            path: of the page; its folder is made.

        Returns:
            What was written, the page last.

        Raises:
            OptionError: the name does not end in `.html`.
        """
        page = Path(path)
        if page.suffix != ".html":
            raise OptionError(f"a report is one .html file with others beside it; {page.name!r} does not end in .html")
        page.parent.mkdir(parents=True, exist_ok=True)
        public = self.public()
        images = public.images(page.stem)
        for name, pair in images.items():
            write_whole(page.with_name(name), png(pair.lines, f"{pair.fixed} and {pair.moving}"))
        write_whole(page.with_suffix(".json"), public.to_json().encode())
        write_whole(page, public.html(page.stem).encode())
        return [*(page.with_name(name) for name in images), page.with_suffix(".json"), page]

    def images(self, stem: str) -> dict[str, Pair]:
        """`{file name: pair}` of the pairs that have lines to plot."""
        found: dict[str, Pair] = {}
        for pair in self.pairs:
            parts = [pair.architecture, *(name.rstrip("/").split("/")[-1] for name in (pair.fixed, pair.moving))]
            name = "-".join([stem, *filter(None, map(_slug, parts))])
            if pair.lines:
                found[f"{name}.png" if f"{name}.png" not in found else f"{name}-{len(found) + 1}.png"] = pair
        return found

    def html(self, stem: str = "report") -> str:
        """The page; `stem` is the name of the files beside it."""
        report = self.public()
        names = iter(report.images(stem))
        views = [
            view(pair, f"pair-{i}", next(names) if pair.lines else "") for i, pair in enumerate(report.pairs, start=1)
        ]
        return render(report=report, views=views, summary=summary(views), stem=stem)

    def to_json(self) -> str:
        """The same numbers, keys sorted, barriers and verdicts, too. NaN and infinities are null; None is left out."""
        return json.dumps(_said(self.public()), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that `to_json` wrote; what was NaN or infinite is NaN.

        Raises:
            OptionError: it is not the JSON of a report; says where.
        """
        try:
            return TypeAdapter(Report).validate_python(json.loads(text))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "at the top"
            raise OptionError(f"this is not the JSON of a report: {where}: {first['msg']}") from error
        except ValueError as error:
            raise OptionError(f"this is not JSON: {error}") from error

    def public(self) -> Report:
        """Without absolute paths, of which the last two components are left, in names as in texts."""
        names = {name for pair in self.pairs for name in (pair.fixed, pair.moving) if without_place(name) != name}
        return _with_texts(self.renamed({name: without_place(name) for name in names}), without_places)

    def renamed(self, names: Mapping[str, str]) -> Report:
        """With other names, wherever they stand."""
        ordered = sorted(names, key=lambda name: (-len(name), name))
        pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        return _with_texts(self, lambda text: pattern.sub(lambda found: names[found[0]], text))

    def timeless(self) -> Report:
        """Without date, durations and command: the same whenever the same is made."""

        def row(one: Row) -> Row:
            return replace(one, seconds=None)

        pairs = (
            replace(pair, ends=tuple(map(row, pair.ends)), rows=tuple(map(row, pair.rows)), seconds={})
            for pair in self.pairs
        )
        return replace(self, pairs=tuple(pairs), created="", command="")


def _with_texts(value: Said, change: Callable[[str], str]) -> Said:
    """The same with every text in it changed."""
    found: Any = value
    if isinstance(value, str):
        found = change(value)
    elif isinstance(value, tuple):
        found = tuple(_with_texts(part, change) for part in value)
    elif isinstance(value, Mapping):
        found = {_with_texts(key, change): _with_texts(part, change) for key, part in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{f.name: _with_texts(getattr(value, f.name), change) for f in fields(value)})
    return found


def _said(value: Any) -> Any:
    """As JSON has it, with what is derived from it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_said(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _said(part) for key, part in value.items()}
    if is_dataclass(value):
        names = (*(f.name for f in fields(value)), *DERIVED.get(type(value).__name__, ()))
        said = {name: getattr(value, name) for name in names}
        return {name: _said(part) for name, part in said.items() if part is not None}
    return value


def _slug(said: str) -> str:
    """Of a name what every file system takes: `vit-seed-0-seed-1`."""
    return re.sub(r"[^a-z0-9]+", "-", said.lower()).strip("-")[:48].strip("-")
