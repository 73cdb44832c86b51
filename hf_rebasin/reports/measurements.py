"""The numbers of a report: curves between two models, rows of merged models, and what aligning moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from ..evaluation.barrier import Curve


def _nan_for_null(value: object) -> object:
    return math.nan if value is None else value


# JSON has no NaN and no infinity: they are written as null, and null is read as NaN. Unknown numbers are left out.
Number: TypeAlias = Annotated[float, BeforeValidator(_nan_for_null)]
OptionalNumber: TypeAlias = Annotated[float | None, BeforeValidator(_nan_for_null)]
Consumed: TypeAlias = Literal["nothing", "unlabelled inputs", "labels"]
CONSUMED: tuple[Consumed, ...] = ("nothing", "unlabelled inputs", "labels")  # from little to much


@dataclass(frozen=True)
class Line(Curve):
    """A curve from the fixed model to the moving one as a report shows it, with a name and a role.

    Args:
        name: name to show, such as "aligned average".
        role: "plain", "aligned", "refit", "control" or another word; decides how the curve is drawn.
        at: λ of the points, ascending from 0 to 1.
        loss: mean loss at every point.
        metrics: `{name: values at the same points}`.

    Raises:
        OptionError: the points do not ascend from 0 to 1, or there are not as many values as points.

    Example:
        >>> line = Line("plain average", "plain", at=(0, 0.5, 1), loss=(0.1, 1.2, 0.3))
        >>> line.barrier, line.area, line.middle
        (1.0, 0.5, 1.2)
    """

    name: str
    role: str
    _: KW_ONLY
    at: tuple[float, ...]
    loss: tuple[Number, ...]
    metrics: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)

    @property
    def middle(self) -> float:  # type: ignore[override]
        """The loss at the point nearest to λ = ½, which is what `middle` is in report.json."""
        return super().middle["loss"]


@dataclass(frozen=True)
class TableRow:
    """One measured model: one of the two ends, or a merge of them.

    Args:
        name: name to show, such as "aligned average".
        consumed: what was used to make it, besides the two models.
        control: whether it is a baseline that results have to beat: made without aligning, like the plain average.
        loss: mean loss on held-out data; None if there are none.
        metrics: `{name: value}`; an accuracy is a fraction of 1.
        excess: loss above the mean of the ends' losses; filled in by `with_excess`.
        ratio: excess ÷ the plain average's excess; filled in by `with_excess`.
        barrier: barrier of the line that this merge lies on.
        seconds: time it took to make.
        note: remark on this model.
    """

    name: str
    consumed: Consumed = "nothing"
    _: KW_ONLY
    control: bool = False
    loss: OptionalNumber = None
    metrics: Mapping[str, Number] = field(default_factory=dict)
    excess: OptionalNumber = None
    ratio: OptionalNumber = None
    barrier: OptionalNumber = None
    seconds: OptionalNumber = None
    note: str = ""


@dataclass(frozen=True)
class Likeness:
    """How similar two models are along their depth, before and after aligning, in one family of symmetries.

    Args:
        family: family of symmetries, such as `ff.*`.
        points: (name, before, after), by depth.
        measure: name of the measure.
    """

    family: str
    points: tuple[tuple[str, Number, Number], ...]
    measure: str = "cosine of the weights"


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How many symmetries of one family were moved.

    Args:
        family: family of symmetries, such as `ff.*`.
        group: group that they move under, such as `permutation`.
        count: number of symmetries.
        size: size of each.
        moved: number of those that are not the identity.
    """

    family: str
    group: str
    count: int
    size: int
    moved: int


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """How exactly the moved model computes what it did before; None for what was not checked.

    Args:
        difference: max |Δ output| on the same inputs.
        before: loss of the moving model by itself.
        after: loss of the moved model by itself.
        dtype: dtype that both were computed in.
        keys: whether the keys of the written model are the first model's.
        shapes: whether the shapes are.
        dtypes: whether the dtypes are.
    """

    difference: OptionalNumber = None
    before: OptionalNumber = None
    after: OptionalNumber = None
    dtype: str = ""
    keys: bool | None = None
    shapes: bool | None = None
    dtypes: bool | None = None


def find_plain_average(rows: Sequence[TableRow]) -> TableRow | None:
    """Find the row of the plain average: the first control made of the two models alone."""
    return next((row for row in rows if row.control and row.consumed == "nothing"), None)


def with_excess(ends: Sequence[TableRow], rows: Sequence[TableRow]) -> tuple[TableRow, ...]:
    """The rows with `excess` and `ratio` filled in.

    The ratio is None where the plain average has no excess.

    Args:
        ends: rows of the two models; the excess is taken over the mean of their losses.
        rows: merged models and controls, the plain average among them.
    """
    losses = [end.loss for end in ends if end.loss is not None]
    if not losses:
        return tuple(rows)
    mean = sum(losses) / len(losses)
    filled = [row if row.loss is None else replace(row, excess=row.loss - mean) for row in rows]
    plain = find_plain_average(filled)
    if plain is None or plain.excess is None or not plain.excess > 0:
        return tuple(filled)
    plain_excess = plain.excess
    return tuple(row if row.excess is None else replace(row, ratio=row.excess / plain_excess) for row in filled)


def least_excess_row(rows: Iterable[TableRow | None]) -> TableRow | None:
    """The row with the least finite excess; the first of equals."""
    finite = [row for row in rows if row is not None and row.excess is not None and math.isfinite(row.excess)]
    return min(finite, key=excess_or_nan, default=None)


def excess_or_nan(row: TableRow) -> float:
    """The excess of a row; NaN if it is unknown."""
    return math.nan if row.excess is None else row.excess
