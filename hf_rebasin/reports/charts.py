"""The charts of a report: curves as geometry that a template draws as SVG, and plots as PNG by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from ..text import spread
from .measurements import Likeness, Line

INK, FAINT = "#1b1f24", "#8a929c"  # of PNGs; the page's colours are in its template
FRACTIONS = ("accuracy", "error rate")  # metrics with such names are shown in per cent


@dataclass(frozen=True)
class Style:
    """How a curve is drawn: colours from Okabe and Ito, with a contrast of 3:1 on their paper, and a dash pattern."""

    light: str
    dark: str
    dash: tuple[float, ...] = ()


STYLES = {
    "plain": Style("#d55e00", "#e8711a", (8, 4)),
    "aligned": Style("#0072b2", "#56b4e9"),
    "refit": Style("#009e73", "#1fb58a", (12, 3, 3, 3)),
    "control": Style("#b4588f", "#cc79a7", (3, 3)),
    "other": Style("#4d4d4d", "#f0e442", (12, 3)),
    "another": Style("#000000", "#ffffff", (6, 2, 1, 2, 1, 2)),
}


def assign_styles(lines: Sequence[Line]) -> list[str]:
    """Assign a style to every curve: its role's, or a free one if another curve has that already."""
    taken: list[str] = []
    for line in lines:
        free = [name for name in ("other", "another", *STYLES) if name not in taken] or list(STYLES)
        taken.append(line.role if line.role in STYLES and line.role not in taken else free[0])
    return taken


# --- scales ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map from numbers to screen coordinates: `low` lies at `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from one at or below `low` to one at or above `high`."""
    span = high - low if high > low else abs(low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if math.ceil(span / (power * k)) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def domain_ticks(values: Iterable[float]) -> list[float]:
    """Ticks around all finite values, from 0 if that is not far away."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    return ticks(0.0 if 0 <= low <= 0.4 * high else low, high)


def tick_labels(values: Sequence[float], percent: bool = False) -> list[str]:
    """Ticks as text, with as many decimals as their distance needs."""
    values = [100 * value if percent else value for value in values]
    decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    form = f".{decimals}f" if max(map(abs, values)) < 1e5 else ".2g"
    return [f"{value:{form}}".replace("-", "−") + "\u2009%" * percent for value in values]


def in_percent(metric: str, values: Iterable[float]) -> bool:
    """Whether a metric is shown in per cent: an accuracy or error rate that is a fraction of 1."""
    named = any(word in metric.lower().replace("_", " ") for word in FRACTIONS)
    return named and all(0 <= value <= 1 for value in values if math.isfinite(value))


# --- SVG -------------------------------------------------------------------------------------------------------------

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class DrawnCurve:
    """A curve in screen coordinates.

    Args:
        name: name of the curve.
        style: key of STYLES.
        path: SVG path of the curve; in pieces where values are not finite.
        dots: (x, y, tooltip, whether it is an end).
        rise: outline of the area between the curve and its chord, where that is shown.
        chord: straight line between its ends.
        peak: (x, y, text) above the highest rise.
    """

    name: str
    style: str
    path: str
    dots: tuple[tuple[float, float, str, bool], ...]
    rise: str = ""
    chord: str = ""
    peak: tuple[float, float, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart that a template draws: sizes, ticks as (coordinate, text), and curves."""

    title: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[DrawnCurve, ...]


def draw_charts(lines: Sequence[Line]) -> list[Chart]:
    """Draw the loss along all curves, with chords and the rises above them, and then every metric."""
    if not lines:
        return []
    return [_draw_chart("loss", lines), *(_draw_chart(metric, lines) for metric in metric_names(lines))]


def metric_names(lines: Sequence[Line]) -> list[str]:
    """The names of all metrics of some curves, sorted."""
    return sorted({metric for line in lines for metric in line.metrics})


def values_along(line: Line, name: str) -> tuple[float, ...]:
    """The loss or a metric at every point; NaN if the curve does not have that metric."""
    if name == "loss":
        return line.loss
    return tuple(line.metrics.get(name, (math.nan,) * len(line.at)))


def _draw_chart(name: str, lines: Sequence[Line]) -> Chart:
    values = [value for line in lines for value in values_along(line, name)]
    percent = name != "loss" and in_percent(name, values)
    y_values = domain_ticks(values)
    texts = tick_labels(y_values, percent)
    width, height, top, bottom = 420.0, 270.0, 30.0, 222.0
    left, right = 14 + 6.6 * max(map(len, texts)), width - 14
    x = Scale(low=0, high=1, start=left, stop=right)
    y = Scale(low=y_values[0], high=y_values[-1], start=bottom, stop=top)
    curves = [
        _draw_curve(line, style, name, percent, x, y) for line, style in zip(lines, assign_styles(lines), strict=True)
    ]
    return Chart(
        title=name,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=tuple((x(t), f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)),
        y_ticks=tuple((y(value), text) for value, text in zip(y_values, texts, strict=True)),
        curves=tuple(_drop_colliding_peaks(curves)),
    )


def _draw_curve(line: Line, style: str, name: str, percent: bool, x: Scale, y: Scale) -> DrawnCurve:
    values = values_along(line, name)
    points = _locate(line.at, values, x, y)
    dots = tuple(
        (*point, f"{line.name}, λ = {t:.3g}: {_format_value(value, percent)}", t in (0, 1))
        for point, t, value in zip(points, line.at, values, strict=True)
        if point is not None
    )
    curve = DrawnCurve(name=line.name, style=style, path=_svg_path(points), dots=dots)
    if name != "loss" or None in points:
        return curve
    peak = None
    highest = max(range(len(points)), key=line.rises.__getitem__)
    if line.rises[highest] > 0:
        left, top = points[highest] or (0, 0)
        peak = (left, round(top - 8, 1), f"+{_format_value(line.barrier, False)}")
    return replace(curve, rise=curve.path + "Z", chord=_svg_path([points[0], points[-1]]), peak=peak)


def _locate(at: Sequence[float], values: Sequence[float], x: Scale, y: Scale) -> list[Point | None]:
    """The coordinates of every point; None where the value is not finite."""
    return [(x(t), y(value)) if math.isfinite(value) else None for t, value in zip(at, values, strict=True)]


def _svg_path(points: Sequence[Point | None]) -> str:
    """Straight lines from point to point, with a gap at every None."""
    parts, pen = [], "M"
    for point in points:
        parts += [f"{pen}{point[0]:g} {point[1]:g}"] if point else []
        pen = "L" if point else "M"
    return "".join(parts)


def _format_value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def _drop_colliding_peaks(curves: Sequence[DrawnCurve]) -> list[DrawnCurve]:
    """Drop the texts above peaks that would overlap the text of an earlier curve."""
    kept: list[tuple[float, float, str]] = []
    for curve in curves:
        if curve.peak and all(abs(curve.peak[0] - x) > 44 or abs(curve.peak[1] - y) > 15 for x, y, _ in kept):
            kept.append(curve.peak)
    return [curve if curve.peak in kept else replace(curve, peak=None) for curve in curves]


def draw_sparklines(lines: Sequence[Line], width: float = 84, height: float = 26) -> list[tuple[str, str]]:
    """Draw the loss along every curve, small, as (style, path)."""
    y_values = domain_ticks(value for line in lines for value in line.loss)
    x = Scale(low=0, high=1, start=2, stop=width - 2)
    y = Scale(low=y_values[0], high=y_values[-1], start=height - 2, stop=2)
    return [
        (style, _svg_path(_locate(line.at, line.loss, x, y)))
        for line, style in zip(lines, assign_styles(lines), strict=True)
    ]


def draw_small_multiples(likeness: Sequence[Likeness]) -> list[Chart]:
    """Draw one small chart per family, all on the same scale: before and after aligning, by depth."""
    measured = [value for family in likeness for _, *values in family.points for value in values]
    measured = [value for value in measured if math.isfinite(value)]
    y_values = ticks(min([0.0, *measured]), max([1.0, *measured]), most=4)
    return [_draw_small_chart(family, y_values) for family in likeness]


def _draw_small_chart(family: Likeness, y_values: Sequence[float]) -> Chart:
    width, height, left, right, top, bottom = 230.0, 150.0, 34.0, 222.0, 14.0, 118.0
    x = Scale(low=-0.5, high=max(len(family.points), 1) - 0.5, start=left, stop=right)
    y = Scale(low=y_values[0], high=y_values[-1], start=bottom, stop=top)
    curves = []
    names, *both = zip(*family.points, strict=True) if family.points else ((), (), ())
    for word, style, values in zip(("before", "after"), ("plain", "aligned"), both, strict=True):
        points = _locate(range(len(values)), values, x, y)
        dots = tuple(
            (*point, f"{name}, {word}: {value:.3f}", True)
            for point, name, value in zip(points, names, values, strict=True)
            if point is not None
        )
        curves.append(DrawnCurve(name=word, style=style, path=_svg_path(points), dots=dots))
    return Chart(
        title=family.family,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=tuple((x(i), _shorten(name)) for i, name in spread(list(enumerate(names)), 2)),
        y_ticks=tuple((y(value), text) for value, text in zip(y_values, tick_labels(y_values), strict=True)),
        curves=tuple(curves),
    )


def _shorten(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


# --- PNG -------------------------------------------------------------------------------------------------------------


def render_png(lines: Sequence[Line], title: str) -> bytes:
    """Render the loss along all curves, and the first metric next to it, as a PNG on white at 160 dpi."""
    from matplotlib.figure import Figure  # pyplot would keep state for the whole process
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = ["loss", *metric_names(lines)[:1]]
    layout, size = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08), (1.2 + 4.4 * len(panels), 4.1)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout=layout)
    for name, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        curves = _draw_panel(axes, name, lines)
    figure.suptitle(_shorten(title, 44 * len(panels)), fontsize=11, color=INK, parse_math=False)
    labels = [f"{line.name}, barrier {_format_value(line.barrier, False)}" for line in lines]
    legend = figure.legend(
        curves, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3.4
    )
    for text in legend.get_texts():
        text.set(parse_math=False, color=INK)
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw_panel(axes: Any, name: str, lines: Sequence[Line]) -> list[Any]:
    """Draw one panel, and return its curves."""
    percent = name != "loss" and in_percent(name, [value for line in lines for value in values_along(line, name)])
    y_values = domain_ticks(value for line in lines for value in values_along(line, name))
    curves = []
    for line, style_name in zip(lines, assign_styles(lines), strict=True):
        values = [value if math.isfinite(value) else math.nan for value in values_along(line, name)]
        style = STYLES[style_name]
        if name == "loss":
            chord = [values[0] * (1 - t) + values[-1] * t for t in line.at]
            axes.fill_between(line.at, chord, values, color=style.light, alpha=0.1, linewidth=0)
            axes.plot(line.at, chord, color=FAINT, linewidth=1, linestyle=":")
        dashes = (0, tuple(length / 2.2 for length in style.dash)) if style.dash else "-"
        (curve,) = axes.plot(line.at, values, color=style.light, linewidth=2, linestyle=dashes)
        axes.plot([0, 1], [values[0], values[-1]], "o", color=style.light, markersize=5, clip_on=False)
        curves.append(curve)
    axes.set(xlim=(0, 1), ylim=(y_values[0], y_values[-1]))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nfixed", "0.25", "0.5", "0.75", "1\nmoving"])
    axes.set_yticks(y_values, tick_labels(y_values, percent))
    axes.set_xlabel("λ", color=INK, labelpad=-8)
    axes.set_title(name, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.tick_params(colors=INK, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    return curves
