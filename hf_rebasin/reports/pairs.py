"""What a merge came to: all that was measured of a pair of models, and the verdict on several pairs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import some
from .measurements import Exactness, Likeness, Line, Moved, Row, least, plain_of
from .verdict import UNMEASURED, Verdict, percent, verdict_on


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


def _shares(pairs: Sequence[Pair]) -> str:
    """`, with 1 % to 35 % of the plain average's excess`"""
    ratios = sorted(pair.best.ratio for pair in pairs if pair.best is not None and pair.best.ratio is not None)
    if not ratios:
        return ""
    low, high = percent(ratios[0]), percent(ratios[-1])
    return f", with {low if low == high else f'{low} to {high}'} of the plain average's excess"


def _out_of(some_pairs: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    return f"all {len(pairs)} pairs" if len(some_pairs) == len(pairs) else f"{len(some_pairs)} of {len(pairs)} pairs"
