"""What a merge came to: what was measured of every pair of models, and a verdict on it in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from .errors import OptionError, some


def _finite_or_nan(said: object) -> object:
    return math.nan if said is None else said


# What JSON has no number for (NaN, ±∞) is null there, and NaN when it is read again; what is not known is left out.
Number: TypeAlias = Annotated[float, BeforeValidator(_finite_or_nan)]
Known: TypeAlias = Annotated[float | None, BeforeValidator(_finite_or_nan)]
Consumed: TypeAlias = Literal["nothing", "unlabelled inputs", "labels"]
CONSUMED: tuple[Consumed, ...] = ("nothing", "unlabelled inputs", "labels")  # from little to much


def rises(at: Sequence[float], costs: Sequence[float]) -> tuple[float, ...]:
    """How far costs at λ = `at` are above the straight line between their ends."""
    return tuple(c - ((1 - t) * costs[0] + t * costs[-1]) for t, c in zip(at, costs, strict=True))


def highest(values: Sequence[float]) -> float:
    """The highest; NaN where one of them is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def mean_over(at: Sequence[float], values: Sequence[float]) -> float:
    """∫₀¹ over λ by the trapezoid rule."""
    points = zip(at, values, strict=True)
    return sum((t - s) * (x + y) / 2 for (s, x), (t, y) in pairwise(points))


def halfway(at: Sequence[float]) -> int:
    """The number of the point nearest to λ = ½, the first of equals."""
    return min(range(len(at)), key=lambda i: abs(at[i] - 0.5))


@dataclass(frozen=True)
class Line:
    """Loss and metrics on points of the line from the fixed model to the moving one, both ends included.

    Args:
        name: as it is shown, such as "aligned average".
        role: "plain", "aligned", "refit", "control" or another word; says how it is drawn.
        at: λ of the points, ascending from 0 to 1.
        loss: mean loss there.
        metrics: `{name: values there}`.

    Raises:
        OptionError: the points do not go from 0 to 1, or there are not as many values as points.

    Example:
        >>> line = Line("plain average", "plain", at=(0, 0.5, 1), loss=(0.1, 1.2, 0.3))
        >>> line.barrier, line.area, line.middle
        (1.0, 0.5, 1.2)
    """

    name: str
    role: str
    at: tuple[float, ...]
    loss: tuple[Number, ...]
    metrics: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.at) < 2 or (self.at[0], self.at[-1]) != (0, 1) or list(self.at) != sorted(set(self.at)):
            raise OptionError(f"{self.name}: λ has to go up from 0 to 1, and is {some(map(str, self.at), 9)}")
        for what, values in {"loss": self.loss, **self.metrics}.items():
            if len(values) != len(self.at):
                raise OptionError(f"{self.name}: {what} has {len(values)} values on {len(self.at)} points")

    @property
    def rises(self) -> tuple[float, ...]:
        """How far the loss is above the straight line between its ends, the chord."""
        return rises(self.at, self.loss)

    @property
    def barrier(self) -> float:
        """The highest rise, 0 at least; not finite where one of the losses is not. As `evaluate.Curve.barrier`."""
        return highest(self.rises)

    @property
    def area(self) -> float:
        """The mean rise over λ, by trapezia."""
        return mean_over(self.at, self.rises)

    @property
    def halfway(self) -> int:
        """The point nearest to λ = ½."""
        return halfway(self.at)

    @property
    def middle(self) -> float:
        """The loss halfway."""
        return self.loss[self.halfway]


@dataclass(frozen=True)
class Row:
    """One model that was measured: an end, or a merge of the two.

    Args:
        name: as it is shown, such as "aligned average".
        consumed: what was used to make it, beside the two models.
        control: it is what a result has to beat: made without aligning, such as the plain average.
        loss: on held-out data; None where there are none.
        metrics: `{name: value}`; an accuracy is a fraction of 1.
        excess: loss above the mean of the ends' losses; `with_excess` fills it in.
        ratio: excess ÷ that of the plain average; `with_excess` fills it in.
        barrier: of the line this merge lies on.
        seconds: it took to make.
        note: what else is to be said of it.
    """

    name: str
    consumed: Consumed = "nothing"
    control: bool = False
    loss: Known = None
    metrics: Mapping[str, Number] = field(default_factory=dict)
    excess: Known = None
    ratio: Known = None
    barrier: Known = None
    seconds: Known = None
    note: str = ""


@dataclass(frozen=True)
class Likeness:
    """How alike two models are along the depth, before and after aligning, in the symmetries of one family.

    Args:
        family: of symmetries, such as `ff.*`.
        points: (name, before, after), by depth.
        measure: what the numbers are.
    """

    family: str
    points: tuple[tuple[str, Number, Number], ...]
    measure: str = "cosine of the weights"


@dataclass(frozen=True)
class Moved:
    """The symmetries of one family, and how many of them were moved.

    Args:
        family: such as `ff.*`.
        group: under which they move, such as `permutation`.
        count: how many there are.
        size: of each.
        moved: how many are not the identity.
    """

    family: str
    group: str
    count: int
    size: int
    moved: int


@dataclass(frozen=True)
class Exactness:
    """How exactly the moved model is the model it was. What is None was not looked at.

    Args:
        difference: max |Δ output| on the same inputs.
        before: the moving model's own loss.
        after: the moved model's.
        dtype: in which both were computed.
        keys: whether the moved model has the same keys, and so on.
    """

    difference: Known = None
    before: Known = None
    after: Known = None
    dtype: str = ""
    keys: bool | None = None
    shapes: bool | None = None
    dtypes: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """What to make of it: a word for the page, and sentences for whoever reads it."""

    kind: Literal["better", "control", "unchecked", "unmeasured"]
    text: str


@dataclass(frozen=True)
class Pair:
    """What aligning and merging two models came to.

    Args:
        fixed: the model at λ = 0, as the user wrote it.
        moving: the model at λ = 1.
        ends: the two as rows, the fixed one first; empty where nothing was measured.
        rows: the merged models, controls included.
        result: the name of the row that is kept, where one of them is.
        lines: the lines between the two.
        likeness: one per family of symmetries.
        moved: one per family of symmetries.
        exactness: of the moved model.
        seconds: `{phase: seconds}`.
        status: how the solver ended.
        notes: what else is to be said.
        architecture: what pairs are grouped by.
    """

    fixed: str
    moving: str
    ends: tuple[Row, ...] = ()
    rows: tuple[Row, ...] = ()
    lines: tuple[Line, ...] = ()
    likeness: tuple[Likeness, ...] = ()
    moved: tuple[Moved, ...] = ()
    exactness: Exactness | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    status: str = ""
    notes: tuple[str, ...] = ()
    architecture: str = ""
    result: str = ""

    @property
    def name(self) -> str:
        return f"{self.fixed} and {self.moving}"

    @property
    def plain(self) -> Row | None:
        """The plain average's row."""
        return plain_of(self.rows)

    @property
    def best(self) -> Row | None:
        """The result with the least excess; None where none has a finite one."""
        return least(row for row in self.rows if not row.control)

    @property
    def verdict(self) -> Verdict:
        return verdict_on(self.rows)


def plain_of(rows: Sequence[Row]) -> Row | None:
    """The plain average: the first control that was made of the two models alone."""
    return next((row for row in rows if row.control and row.consumed == "nothing"), None)


def with_excess(ends: Sequence[Row], rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with their excess over the mean of the ends, and what share of the plain average's excess that is.

    Where the plain average has no excess, it has no share to give, and the ratio is None.
    """
    losses = [end.loss for end in ends if end.loss is not None]
    if not losses:
        return tuple(rows)
    mean = sum(losses) / len(losses)
    filled = [row if row.loss is None else replace(row, excess=row.loss - mean) for row in rows]
    plain = plain_of(filled)
    if plain is None or plain.excess is None or not plain.excess > 0:
        return tuple(filled)
    whole = plain.excess
    return tuple(row if row.excess is None else replace(row, ratio=row.excess / whole) for row in filled)


def least(rows: Iterable[Row | None]) -> Row | None:
    """The row with the least finite excess, the first of equals."""
    finite = [row for row in rows if row is not None and row.excess is not None and math.isfinite(row.excess)]
    return min(finite, key=_excess, default=None)


# --- in words --------------------------------------------------------------------------------------------------------

UNMEASURED = Verdict(
    "unmeasured",
    "Nothing was measured: there were no data. This page says what was done, and nothing of how good the merge is.",
)


def verdict_over(pairs: Sequence[Pair]) -> Verdict:
    """The verdict on all pairs together; of a single one, its own."""
    if len(pairs) == 1:
        return pairs[0].verdict
    by_kind: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_kind.setdefault(pair.verdict.kind, []).append(pair)
    if by_kind.keys() <= {"unmeasured"}:
        return UNMEASURED
    sentences = []
    if better := by_kind.get("better"):
        sentences.append(f"In {_out_of(better, pairs)} a merge beats every control{_shares(better)}.")
    for kind, said in (
        ("control", "a control does as well or better"),
        ("unchecked", "there is no control to compare with"),
        ("unmeasured", "nothing was measured"),
    ):
        if those := by_kind.get(kind):
            sentences.append(f"In {_out_of(those, pairs)} {said}: {some((pair.name for pair in those), 4)}.")
    kinds: tuple[Literal["control", "unchecked", "better"], ...] = ("control", "unchecked", "better")
    return Verdict(next(kind for kind in kinds if kind in by_kind), " ".join(sentences))


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
    if rival is not None and _excess(rival) <= _excess(best):
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
    text = f"{_upper(best.name)} is best: excess {short(_excess(best))}{share}"
    if _excess(best) <= 0:
        text += ", so its loss is no higher than the mean of the ends"
    if rival is None or (rival is plain and best.ratio is not None):
        return text + "."
    reached = short(_excess(rival)) if rival.ratio is None else percent(rival.ratio)
    return f"{text}; the {rival.name} (control) reaches {reached}."


def _beaten(best: Row, rival: Row) -> str:
    """Of a result that is not better than a control, which may have used more than the result did."""
    more = CONSUMED.index(rival.consumed) > CONSUMED.index(best.consumed)
    using = f", using {rival.consumed}," if more else ""
    if _excess(rival) == _excess(best):
        return (
            f"A control does as well: {rival.name}{using} has excess {short(_excess(rival))}, and so has {best.name}."
        )
    return (
        f"A control does better: {rival.name}{using} has excess {short(_excess(rival))}, "
        f"{best.name}, the best merge beside it, {short(_excess(best))}."
    )


def _unhelped(rows: Sequence[Row], best: Row, rival: Row | None) -> Iterator[str]:
    """Results that are not better than what was made of the same without aligning, unless that has been said."""
    for consumed in CONSUMED:
        those = [row for row in rows if row.consumed == consumed]
        result, control = (least(row for row in those if row.control is control) for control in (False, True))
        if result is None or control is None or _excess(result) < _excess(control):
            continue
        if consumed == "nothing":
            yield "Aligning by itself did not help" + (
                "." if (result, control) == (best, rival) else f": {_against(result, control)}."
            )
        elif (result, control) != (best, rival):
            yield f"With {consumed} aligning did not help: {_against(result, control)}."


def _against(result: Row, control: Row) -> str:
    return f"{result.name} has excess {short(_excess(result))}, {control.name} {short(_excess(control))}"


def _shares(pairs: Sequence[Pair]) -> str:
    """`, with 1 % to 35 % of the plain average's excess`"""
    ratios = sorted(pair.best.ratio for pair in pairs if pair.best is not None and pair.best.ratio is not None)
    if not ratios:
        return ""
    low, high = percent(ratios[0]), percent(ratios[-1])
    return f", with {low if low == high else f'{low} to {high}'} of the plain average's excess"


def _out_of(some_pairs: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    return f"all {len(pairs)} pairs" if len(some_pairs) == len(pairs) else f"{len(some_pairs)} of {len(pairs)} pairs"


def _excess(row: Row) -> float:
    return math.nan if row.excess is None else row.excess


def _upper(said: str) -> str:
    return said[:1].upper() + said[1:]


def short(value: float) -> str:
    """Two or three digits that count: `0.0513`, `1.33`, `4e-05`."""
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def percent(ratio: float) -> str:
    """`12 %`, and `0.4 %` below one."""
    return f"{100 * ratio:.1f} %" if 0 < abs(ratio) < 0.01 else f"{100 * ratio:.0f} %"
