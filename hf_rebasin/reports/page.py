"""The page of a report: numbers as text, rows by what they consumed, charts; the template sets them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .charts import STYLES, Chart, charts, in_percent, small_multiples, spark, styles
from .measurements import CONSUMED, Line, Row, least
from .pairs import Pair
from .verdict import percent

if TYPE_CHECKING:
    from jinja2 import Environment

NONE = "–"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Column:
    """A column of numbers, all with the same decimals."""

    title: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Rows under one heading: (row, its cells, its share of the plain average's excess in per cent, for a bar)."""

    title: str
    rows: tuple[tuple[Row, tuple[str, ...], float | None], ...]


@dataclass(frozen=True)
class View:
    """One pair as the template shows it: `least` is the row with the least excess, `left` what the best merge has of
    the plain average's."""

    pair: Pair
    anchor: str
    image: str
    titles: tuple[str, ...]
    groups: tuple[Group, ...]
    charts: tuple[Chart, ...]
    legend: tuple[tuple[str, Line, tuple[str, ...]], ...]
    likeness: tuple[Chart, ...]
    spark: tuple[tuple[str, str], ...]
    least: Row | None
    left: str


def view(pair: Pair, anchor: str, image: str) -> View:
    """A pair with its numbers as text; `image` is the name of its PNG, empty if it has none."""
    columns = table_of(pair)
    rows = [*pair.ends, *pair.rows]
    shown = [(row, tuple(column.cells[i] for column in columns), share(row)) for i, row in enumerate(rows)]
    n = len(pair.ends)
    groups = [Group("The two models", tuple(shown[:n]))] if n else []
    for consumed in CONSUMED:
        those = tuple(one for one in shown[n:] if one[0].consumed == consumed)
        if those:
            groups.append(Group(f"Merged, using {consumed}" + " but the two models" * (consumed == "nothing"), those))
    legend = tuple(
        (style, line, tuple(column([v], 3)[0] for v in (line.barrier, line.area, line.middle)))
        for style, line in zip(styles(pair.lines), pair.lines, strict=True)
    )
    return View(
        pair,
        anchor,
        image,
        tuple(column.title for column in columns),
        tuple(groups),
        tuple(charts(pair.lines)),
        legend,
        tuple(small_multiples(pair.likeness)),
        tuple(spark(pair.lines)) if pair.lines else (),
        least(pair.rows),
        percent(pair.best.ratio) if pair.best and pair.best.ratio is not None else "",
    )


def table_of(pair: Pair) -> list[Column]:
    """What is shown of ends and merged models; a column of which nobody has a number is left out."""
    rows = [*pair.ends, *pair.rows]
    found = [
        ("loss", [row.loss for row in rows], False),
        ("excess", [row.excess for row in rows], False),
        ("÷ plain", [row.ratio for row in rows], True),
        ("barrier", [row.barrier for row in rows], False),
    ]
    for metric in sorted({metric for row in rows for metric in row.metrics}):
        values = [row.metrics.get(metric) for row in rows]
        found.append((metric, values, in_percent(metric, (v for v in values if v is not None))))
    columns = [Column(title, tuple(column(values, 3, percent=of_one))) for title, values, of_one in found]
    columns.append(Column("seconds", tuple(column([row.seconds for row in rows], 1, 1))))
    return [one for one in columns if set(one.cells) != {NONE}]


@dataclass(frozen=True)
class Summary:
    """All pairs in one table, by architecture: (view, its cells)."""

    titles: tuple[str, ...]
    groups: tuple[SummaryGroup, ...]
    sparks: bool


@dataclass(frozen=True)
class SummaryGroup:
    """The pairs of one architecture."""

    title: str
    rows: tuple[tuple[View, tuple[str, ...]], ...]


def summary(views: Sequence[View]) -> Summary:
    """The plain average and the best merge of every pair side by side; columns without numbers are left out."""
    pairs = [view.pair for view in views]
    both = [(pair.plain, pair.best) for pair in pairs]
    found = [
        ("plain excess", column([plain.excess if plain else None for plain, _ in both], 3)),
        ("best excess", column([best.excess if best else None for _, best in both], 3)),
        ("÷ plain", column([best.ratio if best else None for _, best in both], 3, percent=True)),
    ]
    metrics = sorted({metric for rows in both for row in rows if row for metric in row.metrics})
    for metric in metrics[:1]:
        for which, word in enumerate(("plain", "best")):
            values = [row.metrics.get(metric) if (row := rows[which]) else None for rows in both]
            of_one = in_percent(metric, (v for v in values if v is not None))
            found.append((f"{word} {metric}", column(values, 3, percent=of_one)))
    found.append(("max |Δ output|", [scientific(p.exactness.difference if p.exactness else None) for p in pairs]))
    found.append(("seconds", column([sum(p.seconds.values()) if p.seconds else None for p in pairs], 1, 1)))
    columns = [Column(title, tuple(cells)) for title, cells in found if set(cells) != {NONE}]
    rows: dict[str, list[tuple[View, tuple[str, ...]]]] = {}
    for i, one in enumerate(views):
        rows.setdefault(one.pair.architecture, []).append((one, tuple(column.cells[i] for column in columns)))
    groups = tuple(SummaryGroup(title, tuple(those)) for title, those in rows.items())
    return Summary(tuple(column.title for column in columns), groups, any(one.spark for one in views))


def share(row: Row) -> float | None:
    """The length of a bar, in per cent of the plain average's."""
    if row.ratio is None or not math.isfinite(row.ratio):
        return None
    return round(100 * min(max(row.ratio, 0), 1), 1)


def column(values: Iterable[float | None], least: int, most: int = 6, percent: bool = False) -> list[str]:
    """Numbers with the same decimals: at least so many, and at most, and enough for two digits of the smallest one."""
    values = list(values)
    if percent:
        return [_finite(value, lambda v: f"{100 * v:.1f}\u2009%") for value in values]
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and abs(value) >= 5e-6]
    decimals = min(max(least, 1 - math.floor(math.log10(min(sizes, default=1)))), most)
    return [_finite(value, lambda v: f"{v:,.{decimals}f}" if v < 1e6 else f"{v:.2e}") for value in values]


def _finite(value: float | None, show: Callable[[float], str]) -> str:
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    return ("−" if value < 0 else "") + ("∞" if math.isinf(value) else show(abs(value)))


def scientific(value: float | None) -> str:
    """`1.9 × 10⁻⁵`; 0 and what is near 1 as they are."""
    if value is None or not math.isfinite(value) or value == 0 or 1e-2 <= abs(value) < 1e4:
        return _finite(value, lambda v: f"{v:.3g}")
    digits, power = f"{value:.1e}".replace("-", "−").split("e")
    return f"{digits} × 10{str(int(power.replace('−', '-'))).translate(RAISED)}"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def render(**said: Any) -> str:
    """The page, from what the template names."""
    page = templates_of(__package__, autoescape=True)
    page.filters.update(seconds=seconds)
    return page.get_template("report.html.j2").render(styles_of_lines=STYLES, **said)


def templates_of(room: str, **settings: Any) -> Environment:
    """The templates in the folder `templates` of a room; a name that Jinja does not find in them is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader(room, "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )
    found.filters.update(scientific=scientific)
    return found
