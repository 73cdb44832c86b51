"""The solver protocol, and the solution that a solver returns."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, overload

from torch import Tensor

from .. import registry
from ..alignment.alignment import Alignment, Module
from ..checkpoints.checkpoint import Checkpoint
from ..registry import checked_keywords, keywords_of
from ..text import html_overview, overview
from .problem import Problem


class Status(enum.Enum):
    """How a solver ended; the value says how to read the result."""

    CONVERGED = "converged: no symmetry can be improved by itself"
    EQUAL = "the moved model equals the fixed one, tensor by tensor"
    IDENTITY = "every symmetry is best left as it is, as for models of one base: nothing was moved"
    SETTLED = "settled: the cost of the exact alignment no longer fell; the best one is returned"
    STEP_LIMIT = "ended at the step limit; the best exact alignment is returned"
    SWEEP_LIMIT = "stopped at the sweep limit before it converged: raise max_sweeps"


@dataclass(frozen=True, repr=False)
class Solution:
    """Alignment found by a solver, with its objective and how the search went.

    Args:
        alignment: one element per symmetry.
        objective: Σ ⟨fixed, g · moving⟩ over all tensors that carry a symmetry, except gains and running statistics.
            Over groups larger than permutations it is taken between the canonical forms of the two models, with
            blocks weighted by `weight_of`. Gradient descent reports the same for its cost "l2", between models whose
            gains are folded away, and minus the cost otherwise.
        history: objective at the start and after every sweep, for the start that won. For gradient descent, the
            objective at the identity, at the start, and the best so far at every check.
        status: how the solver ended; its value says how to read the result.
        seconds: seconds spent, by activity.
        notes: what was left out of the groups and why, and anything else a user should know.
    """

    alignment: Alignment
    objective: float
    history: tuple[float, ...]
    status: Status
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return overview(f"Solution({self.status.value})", self._facts(), widest=100)

    def _repr_html_(self) -> str:
        return html_overview(f"Solution: {self.status.value}", ("", ""), self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        start = f"{self.history[0]:.5g} → " if self.history else ""
        return [
            ("objective", f"{start}{self.objective:.5g}"),
            ("seconds", f"{sum(self.seconds.values()):.1f}"),
            ("alignment", str(self.alignment)),
            *(("note", note) for note in self.notes),
        ]

    @overload
    def apply(self, moving: str | os.PathLike[str] | Checkpoint) -> Checkpoint: ...

    @overload
    def apply(self, moving: Module) -> Module: ...

    @overload
    def apply(self, moving: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def apply(self, moving: Any) -> Any:
        """Return the moving model in the coordinates of the fixed one; see `Alignment.apply`."""
        return self.alignment.apply(moving)


class Solver(Protocol):
    """Any object that solves a problem; those of the package are frozen dataclasses of options."""

    def solve(self, problem: Problem) -> Solution: ...


def make_solver(name: str, options: Mapping[str, Any]) -> Solver:
    """Create a solver by name; options that are unknown or do not fit raise OptionError."""
    solver_class = registry.solver(name)
    return cast(Solver, solver_class(**checked_keywords(f"solver {name!r}", keywords_of(solver_class), options)))


class Clock:
    """Stopwatch that adds up seconds by activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start
