"""The page of a report: numbers as text, rows grouped by what they consumed, and charts, for a template to set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .charts import STYLES, Chart, assign_styles, draw_charts, draw_small_multiples, draw_sparklines, in_percent
from .measurements import CONSUMED, Line, TableRow, least_excess_row
from .pairs import Pair
from .verdict import format_percent

if TYPE_CHECKING:
    from jinja2 import Environment

MISSING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Column:
    """A column of numbers, all with the same decimals."""

    title: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class RowGroup:
    """Rows under one heading: (row, its cells, length of its bar in per cent)."""

    title: str
    rows: tuple[tuple[TableRow, tuple[str, ...], float | None], ...]


@dataclass(frozen=True, kw_only=True)
class View:
    """One pair as the template shows it.

    Args:
        pair: the pair.
        anchor: its id on the page.
        image: file name of its plot; empty if it has none.
        titles: titles of the columns of numbers.
        groups: its rows, grouped by what they consumed.
        charts: its curves.
        legend: (style, curve, its barrier, area and loss halfway as text).
        likeness: one small chart per family of symmetries.
        spark: (style, path) of its curves, small.
        least: the row with the least excess.
        left: share of the plain average's excess that the best merge has left.
    """

    pair: Pair
    anchor: str
    image: str
    titles: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    charts: tuple[Chart, ...]
    legend: tuple[tuple[str, Line, tuple[str, ...]], ...]
    likeness: tuple[Chart, ...]
    spark: tuple[tuple[str, str], ...]
    least: TableRow | None
    left: str


def make_view(pair: Pair, anchor: str, image: str) -> View:
    """Turn the numbers of a pair into text and charts.

    Args:
        pair: the pair.
        anchor: its id on the page.
        image: file name of its plot; empty if it has none.
    """
    columns = table_columns(pair)
    rows = [*pair.ends, *pair.rows]
    shown = [(row, tuple(column.cells[i] for column in columns), bar_length(row)) for i, row in enumerate(rows)]
    n = len(pair.ends)
    groups = [RowGroup("The two models", tuple(shown[:n]))] if n else []
    for consumed in CONSUMED:
        comparable = tuple(entry for entry in shown[n:] if entry[0].consumed == consumed)
        if comparable:
            title = f"Merged, using {consumed}" + " but the two models" * (consumed == "nothing")
            groups.append(RowGroup(title, comparable))
    legend = tuple(
        (style, line, tuple(format_column([v], 3)[0] for v in (line.barrier, line.area, line.middle)))
        for style, line in zip(assign_styles(pair.lines), pair.lines, strict=True)
    )
    return View(
        pair=pair,
        anchor=anchor,
        image=image,
        titles=tuple(column.title for column in columns),
        groups=tuple(groups),
        charts=tuple(draw_charts(pair.lines)),
        legend=legend,
        likeness=tuple(draw_small_multiples(pair.likeness)),
        spark=tuple(draw_sparklines(pair.lines)) if pair.lines else (),
        least=least_excess_row(pair.rows),
        left=format_percent(pair.best.ratio) if pair.best and pair.best.ratio is not None else "",
    )


def table_columns(pair: Pair) -> list[Column]:
    """The columns of numbers for the ends and the merged models; columns without any number are left out."""
    rows = [*pair.ends, *pair.rows]
    numbers = [
        ("loss", [row.loss for row in rows], False),
        ("excess", [row.excess for row in rows], False),
        ("÷ plain", [row.ratio for row in rows], True),
        ("barrier", [row.barrier for row in rows], False),
    ]
    for metric in sorted({metric for row in rows for metric in row.metrics}):
        values = [row.metrics.get(metric) for row in rows]
        numbers.append((metric, values, in_percent(metric, (v for v in values if v is not None))))
    columns = [Column(title, tuple(format_column(values, 3, percent=percent))) for title, values, percent in numbers]
    columns.append(Column("seconds", tuple(format_column([row.seconds for row in rows], 1, 1))))
    return [column for column in columns if set(column.cells) != {MISSING}]


@dataclass(frozen=True)
class Summary:
    """All pairs in one table, grouped by architecture."""

    titles: tuple[str, ...]
    groups: tuple[SummaryGroup, ...]
    sparks: bool


@dataclass(frozen=True)
class SummaryGroup:
    """The pairs of one architecture: (view, its cells)."""

    title: str
    rows: tuple[tuple[View, tuple[str, ...]], ...]


def make_summary(views: Sequence[View]) -> Summary:
    """Put the plain average and the best merge of every pair side by side; columns without numbers are left out."""
    pairs = [view.pair for view in views]
    both = [(pair.plain, pair.best) for pair in pairs]
    numbers = [
        ("plain excess", format_column([plain.excess if plain else None for plain, _ in both], 3)),
        ("best excess", format_column([best.excess if best else None for _, best in both], 3)),
        ("÷ plain", format_column([best.ratio if best else None for _, best in both], 3, percent=True)),
    ]
    metrics = sorted({metric for rows in both for row in rows if row for metric in row.metrics})
    for metric in metrics[:1]:
        for which, word in enumerate(("plain", "best")):
            values = [row.metrics.get(metric) if (row := rows[which]) else None for rows in both]
            percent = in_percent(metric, (v for v in values if v is not None))
            numbers.append((f"{word} {metric}", format_column(values, 3, percent=percent)))
    differences = [pair.exactness.difference if pair.exactness else None for pair in pairs]
    numbers.append(("max |Δ output|", [format_scientific(difference) for difference in differences]))
    totals = [sum(pair.seconds.values()) if pair.seconds else None for pair in pairs]
    numbers.append(("seconds", format_column(totals, 1, 1)))
    columns = [Column(title, tuple(cells)) for title, cells in numbers if set(cells) != {MISSING}]
    by_architecture: dict[str, list[tuple[View, tuple[str, ...]]]] = {}
    for i, view in enumerate(views):
        cells = tuple(column.cells[i] for column in columns)
        by_architecture.setdefault(view.pair.architecture, []).append((view, cells))
    groups = tuple(SummaryGroup(title, tuple(rows)) for title, rows in by_architecture.items())
    return Summary(tuple(column.title for column in columns), groups, any(view.spark for view in views))


def bar_length(row: TableRow) -> float | None:
    """The length of a row's bar, in per cent of the plain average's."""
    if row.ratio is None or not math.isfinite(row.ratio):
        return None
    return round(100 * min(max(row.ratio, 0), 1), 1)


def format_column(values: Iterable[float | None], least: int, most: int = 6, percent: bool = False) -> list[str]:
    """Format numbers with the same decimals.

    Args:
        values: the numbers; None is shown as a dash.
        least: the fewest decimals.
        most: the most decimals; between the two, enough for two digits of the smallest number.
        percent: whether to show percentages, with one decimal.
    """
    values = list(values)
    if percent:
        return [_format_number(value, lambda v: f"{100 * v:.1f}\u2009%") for value in values]
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and abs(value) >= 5e-6]
    decimals = min(max(least, 1 - math.floor(math.log10(min(sizes, default=1)))), most)
    return [_format_number(value, lambda v: f"{v:,.{decimals}f}" if v < 1e6 else f"{v:.2e}") for value in values]


def _format_number(value: float | None, format_size: Callable[[float], str]) -> str:
    """Format a number that may be missing or not finite; `format_size` gets its absolute value."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    return ("−" if value < 0 else "") + ("∞" if math.isinf(value) else format_size(abs(value)))


def format_scientific(value: float | None) -> str:
    """Format a number as `1.9 × 10⁻⁵`; 0 and numbers near 1 are written out."""
    if value is None or not math.isfinite(value) or value == 0 or 1e-2 <= abs(value) < 1e4:
        return _format_number(value, lambda v: f"{v:.3g}")
    digits, power = f"{value:.1e}".replace("-", "−").split("e")
    return f"{digits} × 10{str(int(power.replace('−', '-'))).translate(SUPERSCRIPTS)}"


def format_seconds(value: float) -> str:
    """Format a duration: `51.0 s`, and `3 min` from two minutes on."""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def render_page(**variables: Any) -> str:
    """Render the page from the variables that its template names."""
    environment = load_templates(__package__, autoescape=True)
    environment.filters.update(seconds=format_seconds)
    return environment.get_template("report.html.j2").render(styles_of_lines=STYLES, **variables)


def load_templates(package: str, **settings: Any) -> Environment:
    """An environment for the templates in a package's folder `templates`; undefined names are errors."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package, "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )
    environment.filters.update(scientific=format_scientific)
    return environment
