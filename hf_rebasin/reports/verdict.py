"""A verdict in plain words on what was measured of two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .measurements import CONSUMED, Row, excess_of, least, plain_of


@dataclass(frozen=True)
class Verdict:
    """What to make of it: a word for the page, and sentences for whoever reads it."""

    kind: Literal["better", "control", "unchecked", "unmeasured"]
    text: str


UNMEASURED = Verdict(
    "unmeasured",
    "Nothing was measured: there were no data. This page says what was done, and nothing of how good the merge is.",
)


def verdict_on(rows: Sequence[Row]) -> Verdict:
    """Whether the best merge of two models beats every control, and what is to be held against it.

    Example:
        >>> rows = [Row("plain average", control=True, loss=4.6), Row("aligned average", loss=1.4)]
        >>> print(verdict_on(with_excess([Row("a", loss=0.1), Row("b", loss=0.1)], rows)).text)
        Aligned average is best: excess 1.3, 29 % of the plain average's.
    """
    measured = [row for row in rows if row.excess is not None]
    if not measured:
        return UNMEASURED
    broken = [row.name for row in measured if least([row]) is None]
    caveats = [f"No finite loss: {', '.join(broken)}."] if broken else []
    best, rival = (least(row for row in measured if row.control is control) for control in (False, True))
    if best is None and all(row.control for row in measured):
        return Verdict("unchecked", " ".join(["Nothing but controls was measured.", *caveats]))
    if best is None:
        return Verdict(
            "control" if rival else "unchecked", " ".join(["No aligned merge has a finite loss.", *caveats])
        )
    plain = least([plain_of(rows)])
    if rival is not None and excess_of(rival) <= excess_of(best):
        return Verdict("control", " ".join([_beaten(best, rival), *_unhelped(rows, best, rival), *caveats]))
    said = [_best(best, rival, plain), *_unhelped(rows, best, rival), *caveats]
    controls = [
        row for row in measured if row.control and CONSUMED.index(row.consumed) >= CONSUMED.index(best.consumed)
    ]
    if controls:
        return Verdict("better", " ".join(said))
    used = "" if best.consumed == "nothing" else f" that used {best.consumed}, too"
    return Verdict("unchecked", " ".join([*said, f"There is no control{used}: what aligning adds is not known."]))


def _best(best: Row, rival: Row | None, plain: Row | None) -> str:
    share = "" if best.ratio is None else f", {percent(best.ratio)} of the plain average's"
    text = f"{_upper(best.name)} is best: excess {short(excess_of(best))}{share}"
    if excess_of(best) <= 0:
        text += ", so its loss is no higher than the mean of the ends"
    if rival is None or (rival is plain and best.ratio is not None):
        return text + "."
    reached = short(excess_of(rival)) if rival.ratio is None else percent(rival.ratio)
    return f"{text}; the {rival.name} (control) reaches {reached}."


def _beaten(best: Row, rival: Row) -> str:
    """Of a result that is not better than a control, which may have used more than the result did."""
    more = CONSUMED.index(rival.consumed) > CONSUMED.index(best.consumed)
    using = f", using {rival.consumed}," if more else ""
    if excess_of(rival) == excess_of(best):
        excess = short(excess_of(rival))
        return f"A control does as well: {rival.name}{using} has excess {excess}, and so has {best.name}."
    return (
        f"A control does better: {rival.name}{using} has excess {short(excess_of(rival))}, "
        f"{best.name}, the best merge beside it, {short(excess_of(best))}."
    )


def _unhelped(rows: Sequence[Row], best: Row, rival: Row | None) -> Iterator[str]:
    """Results that are not better than what was made of the same without aligning, unless that has been said."""
    for consumed in CONSUMED:
        those = [row for row in rows if row.consumed == consumed]
        result, control = (least(row for row in those if row.control is control) for control in (False, True))
        if result is None or control is None or excess_of(result) < excess_of(control):
            continue
        if consumed == "nothing":
            yield "Aligning by itself did not help" + (
                "." if (result, control) == (best, rival) else f": {_against(result, control)}."
            )
        elif (result, control) != (best, rival):
            yield f"With {consumed} aligning did not help: {_against(result, control)}."


def _against(result: Row, control: Row) -> str:
    return f"{result.name} has excess {short(excess_of(result))}, {control.name} {short(excess_of(control))}"


def _upper(said: str) -> str:
    return said[:1].upper() + said[1:]


def short(value: float) -> str:
    """Two or three digits that count: `0.0513`, `1.33`, `4e-05`."""
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def percent(ratio: float) -> str:
    """`12 %`, and `0.4 %` below one."""
    return f"{100 * ratio:.1f} %" if 0 < abs(ratio) < 0.01 else f"{100 * ratio:.0f} %"
