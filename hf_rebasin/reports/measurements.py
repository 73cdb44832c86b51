"""What was measured of models, as numbers: on the lines between them, of merges in rows, of what was moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from ..errors import OptionError, some
from ..evaluation.barrier import halfway, highest, mean_over, rises


def _finite_or_nan(said: object) -> object:
    return math.nan if said is None else said


# What JSON has no number for (NaN, ±∞) is null there, and NaN when it is read again; what is not known is left out.
Number: TypeAlias = Annotated[float, BeforeValidator(_finite_or_nan)]
Known: TypeAlias = Annotated[float | None, BeforeValidator(_finite_or_nan)]
Consumed: TypeAlias = Literal["nothing", "unlabelled inputs", "labels"]
CONSUMED: tuple[Consumed, ...] = ("nothing", "unlabelled inputs", "labels")  # from little to much


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
    return min(finite, key=excess_of, default=None)


def excess_of(row: Row) -> float:
    """Its excess; NaN where that is not known."""
    return math.nan if row.excess is None else row.excess
