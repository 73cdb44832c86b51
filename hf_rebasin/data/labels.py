"""Labels of rows as the numbers a model means by them: by their strings, where dataset and model both have names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError, OptionError, some
from .dataset import Row, Rows


@dataclass(frozen=True)
class Classes:
    """The labels of a column, as a model counts them.

    Args:
        column: of the rows.
        known: `{the model's name of a label: its number}`.
        order: the model's number for each number of the dataset; empty where they are the same.
    """

    column: str
    known: Mapping[str, int] = field(repr=False)
    order: Sequence[int] = ()

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """(rows,) numbers of classes."""
        return torch.tensor([self._number(row.get(self.column)) for row in rows])

    def _number(self, said: Any) -> int:
        if isinstance(said, str):
            number = _matched([said], self.known)[said]
            if number is None and said.isdecimal():
                return self._number(int(said))
            if number is None:
                raise MismatchError(f"{self._where} {said!r}, and the model's labels are {some(self.known)}")
            return number
        count = len(self.order) or len(self.known)
        if not isinstance(said, int) or not 0 <= said < count:
            raise MismatchError(
                f"{self._where} {said!r}, and the labels that the model knows are 0 to {count - 1}; if they are not "
                "meant, say so (labels: false)"
            )
        return self.order[said] if self.order else int(said)

    @property
    def _where(self) -> str:
        return f"column {self.column!r} has a label"


@dataclass(frozen=True)
class Amounts:
    """The numbers of a column that a model with one output is to give."""

    column: str

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """(rows,) numbers."""
        said = [row.get(self.column) for row in rows]
        wrong = [one for one in said if not isinstance(one, int | float)]
        if wrong:
            raise MismatchError(f"column {self.column!r} has {wrong[0]!r}, and the model's one output is a number")
        return torch.tensor(said, dtype=torch.float32)


def classes_of(config: Any, rows: Rows, column: str) -> Classes | Amounts:
    """How the labels of a column are read for a model.

    Raises:
        OptionError: a model of several labels at once.
        MismatchError: labels that are not the model's.
    """
    if getattr(config, "problem_type", None) == "regression" or config.num_labels == 1:
        if config.num_labels == 1:
            return Amounts(column)
        raise OptionError(f"the model gives {config.num_labels} numbers a row; go without labels (labels: false)")
    if config.problem_type == "multi_label_classification":
        raise OptionError("the model gives several labels a row; go without labels (labels: false)")
    known = {str(label): int(number) for number, label in config.id2label.items()}
    names = getattr(rows.features.get(column), "names", None)
    return Classes(column, known, () if names is None else _order(rows.name, column, names, known))


def _order(name: str, column: str, names: Sequence[str], known: Mapping[str, int]) -> Sequence[int]:
    numbers = _matched(names, known)
    without = [label for label, number in numbers.items() if number is None]
    if not without:
        return [number for number in numbers.values() if number is not None]
    if len(without) < len(names):
        raise MismatchError(
            f"of the labels of {name} ({column}), {some(map(repr, without))} are not the model's, which are "
            f"{some(map(repr, known))}; go without labels (labels: false), or take other data"
        )
    if len(names) != len(known):
        raise MismatchError(
            f"{name} has {len(names)} labels ({column}: {some(names)}) and the model {len(known)} ({some(known)}), "
            "and no two are called alike; go without labels (labels: false), or take other data"
        )
    return ()


def _matched(names: Iterable[str], known: Mapping[str, int]) -> dict[str, int | None]:
    """The model's numbers of labels, in capitals or not where that is no matter."""
    folded = {label.casefold(): number for label, number in known.items()}
    folded = folded if len(folded) == len(known) else {}
    return {name: known.get(name, folded.get(name.casefold())) for name in names}
