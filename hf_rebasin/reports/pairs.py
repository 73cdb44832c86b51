"""The measurements of one pair of models, and the verdict on several pairs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from ..errors import listed
from .measurements import Exactness, Likeness, Line, Moved, TableRow, find_plain_average, least_excess_row
from .verdict import UNMEASURED, MergeVerdict, format_percent, verdict_on


@dataclass(frozen=True)
class Pair:
    """The outcome of aligning and merging two models.

    Args:
        fixed: name of the model at λ = 0, as the user wrote it.
        moving: name of the model at λ = 1.
        ends: rows of the two models, the fixed one first; empty if nothing was measured.
        rows: rows of the merged models, controls included.
        result: name of the row of the merge that is kept, if any.
        lines: curves between the two models.
        likeness: one entry per family of symmetries.
        moved: one entry per family of symmetries.
        exactness: how exactly the moved model computes what it did before.
        seconds: `{phase: seconds}`.
        status: how the solver ended.
        notes: remarks on this pair.
        architecture: heading that pairs are grouped under.
    """

    fixed: str
    moving: str
    ends: tuple[TableRow, ...] = ()
    rows: tuple[TableRow, ...] = ()
    _: KW_ONLY
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
        """Both names in a phrase."""
        return f"{self.fixed} and {self.moving}"

    @property
    def plain(self) -> TableRow | None:
        """The row of the plain average, if there is one."""
        return find_plain_average(self.rows)

    @property
    def best(self) -> TableRow | None:
        """The result with the least excess; None if no result has a finite one."""
        return least_excess_row(row for row in self.rows if not row.control)

    @property
    def verdict(self) -> MergeVerdict:
        """The verdict on the merges of this pair."""
        return verdict_on(self.rows)


def verdict_over(pairs: Sequence[Pair]) -> MergeVerdict:
    """Judge all pairs together; a single pair gets its own verdict."""
    if len(pairs) == 1:
        return pairs[0].verdict
    by_kind: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_kind.setdefault(pair.verdict.kind, []).append(pair)
    if by_kind.keys() <= {"unmeasured"}:
        return UNMEASURED
    sentences = []
    if better := by_kind.get("better"):
        sentences.append(f"In {_count_of(better, pairs)} a merge beats every control{_describe_shares(better)}.")
    for kind, finding in (
        ("control", "a control does as well or better"),
        ("unchecked", "there is no control to compare with"),
        ("unmeasured", "nothing was measured"),
    ):
        if matching := by_kind.get(kind):
            sentences.append(
                f"In {_count_of(matching, pairs)} {finding}: {listed((pair.name for pair in matching), 4)}."
            )
    kinds: tuple[Literal["control", "unchecked", "better"], ...] = ("control", "unchecked", "better")
    return MergeVerdict(next(kind for kind in kinds if kind in by_kind), " ".join(sentences))


def _describe_shares(pairs: Sequence[Pair]) -> str:
    """`, with 1 % to 35 % of the plain average's excess`"""
    ratios = sorted(pair.best.ratio for pair in pairs if pair.best is not None and pair.best.ratio is not None)
    if not ratios:
        return ""
    low, high = format_percent(ratios[0]), format_percent(ratios[-1])
    return f", with {low if low == high else f'{low} to {high}'} of the plain average's excess"


def _count_of(some_pairs: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    return f"all {len(pairs)} pairs" if len(some_pairs) == len(pairs) else f"{len(some_pairs)} of {len(pairs)} pairs"
