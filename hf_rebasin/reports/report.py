"""The report of a merge: one self-contained HTML page, the same numbers as JSON, and plots as PNG.

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
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..checkpoints.folder import write_atomically
from ..errors import OptionError
from ..text import replace_names, shorten_path, shorten_paths
from .charts import render_png
from .measurements import Exactness, Likeness, Line, Moved, with_excess
from .measurements import TableRow as Row
from .page import make_summary, make_view, render_page
from .pairs import Pair, verdict_over
from .verdict import MergeVerdict as Verdict
from .verdict import verdict_on

__all__ = [  # what `hf_rebasin.report` promises
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

Value = TypeVar("Value")


@dataclass(frozen=True)
class Report:
    """The outcome of a merge, or of several, as a page, as JSON and as plots.

    Args:
        title: title of the page.
        pairs: one entry per moving model, or all pairs of a demo.
        recipe: the recipe as YAML.
        data: the data it was measured on, in a line.
        versions: `{package: version}`.
        command: the command that makes the same again.
        created: a date, such as 2026-01-31; reports with the same contents are the same bytes.
        notes: remarks on the whole report.
    """

    title: str
    pairs: tuple[Pair, ...] = ()
    _: KW_ONLY
    recipe: str = ""
    data: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The verdict on all pairs together."""
        return verdict_over(self.pairs)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write `x.html`, `x.json`, and `x-PAIR.png` for every pair with lines; a file is complete or absent.

        Args:
            path: path of the page; its folder is created.

        Returns:
            The paths of the written files, the page last.

        Raises:
            OptionError: the name does not end in `.html`.
        """
        page = Path(path)
        if page.suffix != ".html":
            raise OptionError(
                f"a report is one .html file with others next to it; {page.name!r} does not end in .html"
            )
        page.parent.mkdir(parents=True, exist_ok=True)
        public = self.public()
        images = public.images(page.stem)
        for name, pair in images.items():
            write_atomically(page.with_name(name), render_png(pair.lines, f"{pair.fixed} and {pair.moving}"))
        write_atomically(page.with_suffix(".json"), public.to_json().encode())
        write_atomically(page, public.html(page.stem).encode())
        return [*(page.with_name(name) for name in images), page.with_suffix(".json"), page]

    def images(self, stem: str) -> dict[str, Pair]:
        """The pairs that have curves to plot, by the file name of the plot."""
        images: dict[str, Pair] = {}
        for pair in self.pairs:
            parts = [pair.architecture, *(name.rstrip("/").split("/")[-1] for name in (pair.fixed, pair.moving))]
            name = "-".join([stem, *filter(None, map(_slug, parts))])
            if pair.lines:
                images[f"{name}.png" if f"{name}.png" not in images else f"{name}-{len(images) + 1}.png"] = pair
        return images

    def html(self, stem: str = "report") -> str:
        """The page as HTML; `stem` is the name of the files next to it, without a suffix."""
        report = self.public()
        names = iter(report.images(stem))
        views = [
            make_view(pair, f"pair-{i}", next(names) if pair.lines else "")
            for i, pair in enumerate(report.pairs, start=1)
        ]
        return render_page(report=report, views=views, summary=make_summary(views), stem=stem)

    def to_json(self) -> str:
        """The report as JSON with sorted keys, barriers and verdicts included.

        NaN and infinities are null; None is left out.
        """
        return (
            json.dumps(_as_json(self.public()), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report that `to_json` wrote; NaN and infinities are read as NaN.

        Raises:
            OptionError: this is not the JSON of a report; the message says where.
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
        """The report with absolute paths, in names and in texts, cut to their last two components."""
        names = {name for pair in self.pairs for name in (pair.fixed, pair.moving) if shorten_path(name) != name}
        return _with_texts(self.renamed({name: shorten_path(name) for name in names}), shorten_paths)

    def renamed(self, names: Mapping[str, str]) -> Report:
        """The report with names replaced, wherever they occur."""
        return _with_texts(self, lambda text: replace_names(text, names))

    def timeless(self) -> Report:
        """The report without date, durations and command, so that equal merges have equal reports."""

        def timeless_row(row: Row) -> Row:
            return replace(row, seconds=None)

        pairs = (
            replace(
                pair, ends=tuple(map(timeless_row, pair.ends)), rows=tuple(map(timeless_row, pair.rows)), seconds={}
            )
            for pair in self.pairs
        )
        return replace(self, pairs=tuple(pairs), created="", command="")


# What is computed from the fields, and stands in the JSON as well.
_DERIVED: dict[type, Callable[[Any], dict[str, Any]]] = {
    Line: lambda line: {"barrier": line.barrier, "area": line.area, "middle": line.middle},
    Pair: lambda pair: {"verdict": pair.verdict},
    Report: lambda report: {"verdict": report.verdict},
}


def _with_texts(value: Value, change: Callable[[str], str]) -> Value:
    """The value with every text in it changed, keys of mappings included."""
    changed: Any = value
    if isinstance(value, str):
        changed = change(value)
    elif isinstance(value, tuple):
        changed = tuple(_with_texts(part, change) for part in value)
    elif isinstance(value, Mapping):
        changed = {_with_texts(key, change): _with_texts(part, change) for key, part in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{f.name: _with_texts(getattr(value, f.name), change) for f in fields(value)})
    return changed


def _as_json(value: Any) -> Any:
    """The value as JSON has it, with what is derived from it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _as_json(part) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        if derive := _DERIVED.get(type(value)):
            parts |= derive(value)
        return {name: _as_json(part) for name, part in parts.items() if part is not None}
    return value


def _slug(text: str) -> str:
    """A part of a file name that every file system takes: `vit-seed-0-seed-1`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-")
