"""The verdict on a merge, in plain words, from what was measured of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .measurements import CONSUMED, TableRow, excess_or_nan, find_plain_average, least_excess_row


@dataclass(frozen=True)
class MergeVerdict:
    """The verdict on a merge: a keyword for the page, and sentences for the reader."""

    kind: Literal["better", "control", "unchecked", "unmeasured"]
    text: str


UNMEASURED = MergeVerdict(
    "unmeasured",
    "Nothing was measured: there were no data. This page says what was done, and nothing of how good the merge is.",
)


def verdict_on(rows: Sequence[TableRow]) -> MergeVerdict:
    """Judge whether the best merge of two models beats every control, and what counts against it.

    Args:
        rows: merged models and controls, with the excess that `with_excess` fills in.

    Example:
        >>> rows = [Row("plain average", control=True, loss=4.6), Row("aligned average", loss=1.4)]
        >>> print(verdict_on(with_excess([Row("a", loss=0.1), Row("b", loss=0.1)], rows)).text)
        Aligned average is best: excess 1.3, 29 % of the plain average's.
    """
    measured = [row for row in rows if row.excess is not None]
    if not measured:
        return UNMEASURED
    broken = [row.name for row in measured if least_excess_row([row]) is None]
    caveats = [f"No finite loss: {', '.join(broken)}."] if broken else []
    best, rival = (least_excess_row(row for row in measured if row.control is control) for control in (False, True))
    if best is None and all(row.control for row in measured):
        return MergeVerdict("unchecked", " ".join(["Nothing but controls was measured.", *caveats]))
    if best is None:
        return MergeVerdict(
            "control" if rival else "unchecked", " ".join(["No aligned merge has a finite loss.", *caveats])
        )
    plain = least_excess_row([find_plain_average(rows)])
    if rival is not None and excess_or_nan(rival) <= excess_or_nan(best):
        sentences = [_describe_beaten(best, rival), *_list_unhelped(rows, best, rival), *caveats]
        return MergeVerdict("control", " ".join(sentences))
    sentences = [_describe_best(best, rival, plain), *_list_unhelped(rows, best, rival), *caveats]
    controls = [
        row for row in measured if row.control and CONSUMED.index(row.consumed) >= CONSUMED.index(best.consumed)
    ]
    if controls:
        return MergeVerdict("better", " ".join(sentences))
    used = "" if best.consumed == "nothing" else f" that used {best.consumed}, too"
    sentences.append(f"There is no control{used}: what aligning adds is not known.")
    return MergeVerdict("unchecked", " ".join(sentences))


def _describe_best(best: TableRow, rival: TableRow | None, plain: TableRow | None) -> str:
    """Describe a result that beats every control."""
    share = "" if best.ratio is None else f", {format_percent(best.ratio)} of the plain average's"
    text = f"{_capitalise(best.name)} is best: excess {format_short(excess_or_nan(best))}{share}"
    if excess_or_nan(best) <= 0:
        text += ", so its loss is no higher than the mean of the ends"
    if rival is None or (rival is plain and best.ratio is not None):
        return text + "."
    reached = format_short(excess_or_nan(rival)) if rival.ratio is None else format_percent(rival.ratio)
    return f"{text}; the {rival.name} (control) reaches {reached}."


def _describe_beaten(best: TableRow, rival: TableRow) -> str:
    """Describe a result that does not beat a control, which may have used more than the result did."""
    more = CONSUMED.index(rival.consumed) > CONSUMED.index(best.consumed)
    using = f", using {rival.consumed}," if more else ""
    if excess_or_nan(rival) == excess_or_nan(best):
        excess = format_short(excess_or_nan(rival))
        return f"A control does as well: {rival.name}{using} has excess {excess}, and so has {best.name}."
    return (
        f"A control does better: {rival.name}{using} has excess {format_short(excess_or_nan(rival))}, "
        f"{best.name}, the best merge beside it, {format_short(excess_or_nan(best))}."
    )


def _list_unhelped(rows: Sequence[TableRow], best: TableRow, rival: TableRow | None) -> Iterator[str]:
    """Name the results that do not beat the control with the same inputs, unless `best` and `rival` are that pair."""
    for consumed in CONSUMED:
        comparable = [row for row in rows if row.consumed == consumed]
        result, control = (
            least_excess_row(row for row in comparable if row.control is control) for control in (False, True)
        )
        if result is None or control is None or excess_or_nan(result) < excess_or_nan(control):
            continue
        if consumed == "nothing":
            yield "Aligning by itself did not help" + (
                "." if (result, control) == (best, rival) else f": {_contrast(result, control)}."
            )
        elif (result, control) != (best, rival):
            yield f"With {consumed} aligning did not help: {_contrast(result, control)}."


def _contrast(result: TableRow, control: TableRow) -> str:
    excess, control_excess = (format_short(excess_or_nan(row)) for row in (result, control))
    return f"{result.name} has excess {excess}, {control.name} {control_excess}"


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def format_short(value: float) -> str:
    """Format a number with two or three significant digits: `0.0513`, `1.33`, `4e-05`."""
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def format_percent(ratio: float) -> str:
    """Format a ratio as a percentage: `12 %`, and `0.4 %` below one per cent."""
    return f"{100 * ratio:.1f} %" if 0 < abs(ratio) < 0.01 else f"{100 * ratio:.0f} %"
