"""What a solver is, and what it returns."""

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
from ..registry import knobs_for
from .problem import Problem


class Status(enum.Enum):
    """How an alignment ended; the value says what to make of it."""

    CONVERGED = "converged: no symmetry can be improved by itself"
    EQUAL = "the moved model equals the fixed one, tensor by tensor"
    IDENTITY = "every symmetry is best left as it is, as for models of one base: nothing was moved"
    SETTLED = "settled: the cost of the exact alignment no longer fell; the best one is returned"
    STEP_LIMIT = "ended at the step limit; the best exact alignment is returned"
    SWEEP_LIMIT = "stopped at the sweep limit before it converged: raise max_sweeps"


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Args:
        alignment: one element per symmetry.
        objective: Σ ⟨fixed, g · moving⟩ over all tensors that a symmetry touches, but gains and running statistics;
            over larger groups than permutations, of the canonical forms of the two, blocks weighted by `weight_of`. Of
            a descent, the same where its cost is "l2", of models whose gains are folded away, else minus its cost.
        history: the objective at the start and after every sweep, of the start that won. Of a descent, at the
            identity, where it started, and the best so far at every measurement.
        status: how it ended; its value says what to make of it.
        seconds: where the time went.
        notes: what was left out of the groups and why, and what else a user should know.
    """

    alignment: Alignment
    objective: float
    history: tuple[float, ...]
    status: Status
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @overload
    def apply(self, moving: str | os.PathLike[str] | Checkpoint) -> Checkpoint: ...

    @overload
    def apply(self, moving: Module) -> Module: ...

    @overload
    def apply(self, moving: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def apply(self, moving: Any) -> Any:
        """The moving model in the coordinates of the fixed one; see `Alignment.apply`."""
        return self.alignment.apply(moving)


class Solver(Protocol):
    """A frozen dataclass of knobs that solves a problem."""

    def solve(self, problem: Problem) -> Solution: ...


def solver_with(name: str, knobs: Mapping[str, Any]) -> Solver:
    """A solver with its knobs; unknown or unfitting ones raise OptionError."""
    kind = registry.find("solvers", name).Solver
    return cast(Solver, kind(**knobs_for(f"solver {name!r}", kind, knobs)))


class Clock:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start
