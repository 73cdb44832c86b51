"""Charts of a report: curves as geometry that a template draws as SVG, and as a PNG by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from ..text import spread
from .measurements import Likeness, Line

INK, FAINT = "#1b1f24", "#8a929c"  # of PNGs; those of the page are in its template
FRACTIONS = ("accuracy", "error rate")  # metrics of such names are shown in per cent


@dataclass(frozen=True)
class Style:
    """How a curve is drawn, told apart by colour and by dashes: colours are Okabe and Ito's, 3:1 on their paper."""

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


def styles(lines: Sequence[Line]) -> list[str]:
    """The style of every line: that of its role, or one that is still free where another line has it."""
    taken: list[str] = []
    for line in lines:
        free = [name for name in ("other", "another", *STYLES) if name not in taken] or list(STYLES)
        taken.append(line.role if line.role in STYLES and line.role not in taken else free[0])
    return taken


# --- scales ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Numbers to places: `low` and `high` at `start` and `stop`."""

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


def domain(values: Iterable[float]) -> list[float]:
    """Ticks around all finite values, from 0 where that is not far away."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    return ticks(0.0 if 0 <= low <= 0.4 * high else low, high)


def said(values: Sequence[float], percent: bool = False) -> list[str]:
    """Ticks with as many decimals as their distance needs."""
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


@dataclass(frozen=True)
class Curve:
    """A line as it is drawn.

    Args:
        name: what it is.
        style: a key of STYLES.
        path: of the curve; in pieces where losses are not finite.
        rise: outline of what is between the curve and its chord, where that is shown.
        chord: the straight line between its ends.
        dots: (x, y, what is said of the point, whether it is an end).
        peak: (x, y, text) over the highest rise.
    """

    name: str
    style: str
    path: str
    dots: tuple[tuple[float, float, str, bool], ...]
    rise: str = ""
    chord: str = ""
    peak: tuple[float, float, str] | None = None


@dataclass(frozen=True)
class Chart:
    """What a template draws: sizes, ticks as (place, text), curves."""

    title: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]


def charts(lines: Sequence[Line]) -> list[Chart]:
    """The loss on all lines, with chords and what rises above them, then every metric."""
    if not lines:
        return []
    return [_chart("loss", lines), *(_chart(metric, lines) for metric in metrics_of(lines))]


def metrics_of(lines: Sequence[Line]) -> list[str]:
    return sorted({metric for line in lines for metric in line.metrics})


def values_of(line: Line, what: str) -> tuple[float, ...]:
    """On every point: the loss, or a metric, NaN where the line does not have it."""
    if what == "loss":
        return line.loss
    return tuple(line.metrics.get(what, (math.nan,) * len(line.at)))


def _chart(what: str, lines: Sequence[Line]) -> Chart:
    every = [value for line in lines for value in values_of(line, what)]
    percent = what != "loss" and in_percent(what, every)
    places = domain(every)
    texts = said(places, percent)
    width, height, top, bottom = 420.0, 270.0, 30.0, 222.0
    left, right = 14 + 6.6 * max(map(len, texts)), width - 14
    x, y = Scale(0, 1, left, right), Scale(places[0], places[-1], bottom, top)
    x_ticks = tuple((x(t), f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1))
    curves = [_curve(line, style, what, percent, x, y) for line, style in zip(lines, styles(lines), strict=True)]
    y_ticks = tuple((y(v), text) for v, text in zip(places, texts, strict=True))
    return Chart(what, width, height, left, right, top, bottom, x_ticks, y_ticks, tuple(_apart(curves)))


def _curve(line: Line, style: str, what: str, percent: bool, x: Scale, y: Scale) -> Curve:
    values = values_of(line, what)
    points = [(x(t), y(v)) if math.isfinite(v) else None for t, v in zip(line.at, values, strict=True)]
    dots = tuple(
        (*point, f"{line.name}, λ = {t:.3g}: {_value(v, percent)}", t in (0, 1))
        for point, t, v in zip(points, line.at, values, strict=True)
        if point is not None
    )
    rise, chord, peak = "", "", None
    if what == "loss" and None not in points:
        chord = _path([points[0], points[-1]])
        rise = _path(points) + "Z"
        highest = max(range(len(points)), key=line.rises.__getitem__)
        if line.rises[highest] > 0:
            at, top = points[highest] or (0, 0)
            peak = (at, round(top - 8, 1), f"+{_value(line.barrier, False)}")
    return Curve(line.name, style, _path(points), dots, rise, chord, peak)


def _path(points: Sequence[Point | None]) -> str:
    """Straight from point to point, with a gap where there is none."""
    parts, pen = [], "M"
    for point in points:
        parts += [f"{pen}{point[0]:g} {point[1]:g}"] if point else []
        pen = "L" if point else "M"
    return "".join(parts)


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def _apart(curves: Sequence[Curve]) -> list[Curve]:
    """Without the texts over peaks that would run into those of curves before."""
    kept: list[tuple[float, float, str]] = []
    for curve in curves:
        if curve.peak and all(abs(curve.peak[0] - x) > 44 or abs(curve.peak[1] - y) > 15 for x, y, _ in kept):
            kept.append(curve.peak)
    return [curve if curve.peak in kept else replace(curve, peak=None) for curve in curves]


def spark(lines: Sequence[Line], width: float = 84, height: float = 26) -> list[tuple[str, str]]:
    """(style, path) of every line's loss, small."""
    places = domain(value for line in lines for value in line.loss)
    x, y = Scale(0, 1, 2, width - 2), Scale(places[0], places[-1], height - 2, 2)
    return [
        (style, _path([(x(t), y(v)) if math.isfinite(v) else None for t, v in zip(line.at, line.loss, strict=True)]))
        for line, style in zip(lines, styles(lines), strict=True)
    ]


def small_multiples(likeness: Sequence[Likeness]) -> list[Chart]:
    """One small chart per family, all on the same scale: before and after by depth."""
    measured = [value for family in likeness for _, *values in family.points for value in values]
    measured = [value for value in measured if math.isfinite(value)]
    places = ticks(min([0.0, *measured]), max([1.0, *measured]), most=4)
    return [_small(family, places) for family in likeness]


def _small(family: Likeness, places: Sequence[float]) -> Chart:
    width, height, left, right, top, bottom = 230.0, 150.0, 34.0, 222.0, 14.0, 118.0
    n = len(family.points)
    x, y = Scale(-0.5, max(n, 1) - 0.5, left, right), Scale(places[0], places[-1], bottom, top)
    curves = []
    names, *both = zip(*family.points, strict=True) if family.points else ((), (), ())
    for word, style, values in zip(("before", "after"), ("plain", "aligned"), both, strict=True):
        points = [(x(i), y(v)) if math.isfinite(v) else None for i, v in enumerate(values)]
        dots = tuple(
            (*point, f"{name}, {word}: {v:.3f}", True)
            for point, name, v in zip(points, names, values, strict=True)
            if point is not None
        )
        curves.append(Curve(word, style, _path(points), dots))
    named = spread(list(enumerate(names)), 2)
    x_ticks = tuple((x(i), _ellipsis(name)) for i, name in named)
    y_ticks = tuple((y(v), text) for v, text in zip(places, said(places), strict=True))
    return Chart(family.family, width, height, left, right, top, bottom, x_ticks, y_ticks, tuple(curves))


def _ellipsis(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


# --- PNG -------------------------------------------------------------------------------------------------------------


def png(lines: Sequence[Line], title: str) -> bytes:
    """The loss on all lines, and the first metric beside it, on white at 160 dpi."""
    from matplotlib.figure import Figure  # without pyplot, which keeps a state of the whole process
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = ["loss", *metrics_of(lines)[:1]]
    layout, size = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08), (1.2 + 4.4 * len(panels), 4.1)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout=layout)
    for what, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        curves = _panel(axes, what, lines)
    figure.suptitle(_ellipsis(title, 44 * len(panels)), fontsize=11, color=INK, parse_math=False)
    names = [f"{line.name}, barrier {_value(line.barrier, False)}" for line in lines]
    legend = figure.legend(
        curves, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3.4
    )
    for text in legend.get_texts():
        text.set(parse_math=False, color=INK)
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(axes: Any, what: str, lines: Sequence[Line]) -> list[Any]:
    """Draw one panel, and return its curves."""
    percent = what != "loss" and in_percent(what, [v for line in lines for v in values_of(line, what)])
    places = domain(v for line in lines for v in values_of(line, what))
    curves = []
    for line, name in zip(lines, styles(lines), strict=True):
        values = [v if math.isfinite(v) else math.nan for v in values_of(line, what)]
        style = STYLES[name]
        if what == "loss":
            chord = [values[0] * (1 - t) + values[-1] * t for t in line.at]
            axes.fill_between(line.at, chord, values, color=style.light, alpha=0.1, linewidth=0)
            axes.plot(line.at, chord, color=FAINT, linewidth=1, linestyle=":")
        dashes = (0, tuple(length / 2.2 for length in style.dash)) if style.dash else "-"
        (curve,) = axes.plot(line.at, values, color=style.light, linewidth=2, linestyle=dashes)
        axes.plot([0, 1], [values[0], values[-1]], "o", color=style.light, markersize=5, clip_on=False)
        curves.append(curve)
    axes.set(xlim=(0, 1), ylim=(places[0], places[-1]))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nfixed", "0.25", "0.5", "0.75", "1\nmoving"])
    axes.set_yticks(places, said(places, percent))
    axes.set_xlabel("λ", color=INK, labelpad=-8)
    axes.set_title(what, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.tick_params(colors=INK, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    return curves
