"""Labels of rows as a model's numbers of classes, matched by name where both dataset and model name their labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError, OptionError, listed, quoted
from .dataset import DatasetRow, Rows

LEAVE_OUT = "leave labels out (labels: false)"


@dataclass(frozen=True)
class ClassLabels:
    """A reader of labels that returns the model's numbers of classes.

    Args:
        column: column of the labels.
        known: `{the model's name of a label: its number}`.
        order: the model's number for each number of the dataset; empty if both are the same.
        needed: whether a loss is to be measured, so that labels cannot be left out.
    """

    column: str
    known: Mapping[str, int] = field(repr=False)
    order: Sequence[int] = ()
    needed: bool = False

    def __call__(self, rows: Sequence[DatasetRow]) -> Tensor:
        """Return the classes of rows, (rows,)."""
        return torch.tensor([self._number(row.get(self.column)) for row in rows])

    def _number(self, label: Any) -> int:
        if isinstance(label, str):
            number = _match_names([label], self.known)[label]
            if number is None and label.isdecimal():
                return self._number(int(label))
            if number is None:
                raise MismatchError(f"{self._where} {label!r}, and the model's labels are {listed(self.known)}")
            return number
        count = len(self.order) or len(self.known)
        if not isinstance(label, int) or not 0 <= label < count:
            raise MismatchError(
                f"{self._where} {quoted(label)}, and the labels that the model knows are 0 to {count - 1}"
                f"{'' if self.needed else f'; if this column is not meant, {LEAVE_OUT}'}"
            )
        return self.order[label] if self.order else int(label)

    @property
    def _where(self) -> str:
        return f"column {self.column!r} has a label"


@dataclass(frozen=True)
class RegressionTargets:
    """A reader of the numbers that a model with one output is to predict."""

    column: str

    def __call__(self, rows: Sequence[DatasetRow]) -> Tensor:
        """Return the targets of rows, (rows,)."""
        values = [row.get(self.column) for row in rows]
        wrong = [value for value in values if not isinstance(value, int | float)]
        if wrong:
            raise MismatchError(f"column {self.column!r} has {wrong[0]!r}, and the model's one output is a number")
        return torch.tensor(values, dtype=torch.float32)


def make_label_reader(
    config: Any, rows: Rows, column: str, *, needed: bool = False
) -> ClassLabels | RegressionTargets:
    """Make a reader of the labels in a column for a model.

    Args:
        config: configuration of the model.
        rows: the rows.
        column: column of the labels.
        needed: whether a loss is to be measured, so that labels cannot be left out.

    Raises:
        OptionError: a model that predicts several numbers or labels per row.
        MismatchError: labels that are not the model's.
    """
    if getattr(config, "problem_type", None) == "regression" or config.num_labels == 1:
        if config.num_labels == 1:
            return RegressionTargets(column)
        problem = f"the model predicts {config.num_labels} numbers per row"
    elif config.problem_type == "multi_label_classification":
        problem = "the model predicts several labels per row"
    else:
        problem = ""
    if problem:
        raise OptionError(f"{problem}; {'such labels are not read' if needed else LEAVE_OUT}")
    known = {str(label): int(number) for number, label in config.id2label.items()}
    names = getattr(rows.features.get(column), "names", None)
    advice = "use other data" if needed else f"{LEAVE_OUT}, or use other data"
    return ClassLabels(
        column, known, () if names is None else _match_order(rows.name, column, names, known, advice), needed
    )


def _match_order(name: str, column: str, names: Sequence[str], known: Mapping[str, int], advice: str) -> Sequence[int]:
    numbers = _match_names(names, known)
    unmatched = [label for label, number in numbers.items() if number is None]
    if not unmatched:
        return [number for number in numbers.values() if number is not None]
    if len(unmatched) < len(names):
        raise MismatchError(
            f"of the labels of {name} ({column}), {listed(map(repr, unmatched))} are not the model's, which are "
            f"{listed(map(repr, known))}; {advice}"
        )
    if len(names) != len(known):
        raise MismatchError(
            f"{name} has {len(names)} labels ({column}: {listed(names)}) and the model {len(known)} "
            f"({listed(known)}), and no names match; {advice}"
        )
    return ()


def _match_names(names: Iterable[str], known: Mapping[str, int]) -> dict[str, int | None]:
    """Look up the model's numbers of labels, ignoring case if no two of the model's names differ by case only."""
    folded = {label.casefold(): number for label, number in known.items()}
    folded = folded if len(folded) == len(known) else {}
    return {name: known.get(name, folded.get(name.casefold())) for name in names}
