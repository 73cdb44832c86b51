"""Activation matching: the alignment under which two models say the same of the same inputs, without labels.

Permutations by the correlation of units, as in Git Re-Basin (Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836,
section 3.1); rotations by Procrustes on the normalised stream, and bases in heads likewise (2506.22712).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from ..activations import Statistics, collect
from ..canonical import in_full
from ..errors import OptionError
from ..groups import Element
from ..objective import Problem, bound, objective
from ..similarity import weight_similarity
from ..solving import Clock, Solution, coordinate_ascent
from ..spec import Unit
from ..units import Elements, Nested, Similarity, value


@dataclass(frozen=True)
class Solver:
    """Knobs of activation matching.

    Args:
        weights: the share of weight matching in what is maximised, from 0 to 1. By default ½ where streams are
            rotated, of which both know something, else 0 (docs/log.md).
        batches: how many are looked at; by default all that the data have.
        starts: as in weight matching; one is enough where weights have no share.
        max_sweeps: as in weight matching.
    """

    weights: float | None = None
    batches: int | None = None
    starts: int = 2
    max_sweeps: int = 100

    TAKES_DATA: ClassVar[bool] = True
    NEEDS_DATA: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights is not None and not 0 <= self.weights <= 1:
            raise OptionError(f"weights = {self.weights}; give a share between 0 and 1")
        if self.batches is not None and self.batches < 1:
            raise OptionError(f"batches = {self.batches}; give 1 or more")

    def solve(self, problem: Problem) -> Solution:
        if problem.forward is None:
            raise OptionError("activation_matching looks at what models say to data, and there are none; give data=")
        return in_full(problem, self._ascend, self._glance)

    def _glance(self, problem: Problem) -> Solution:
        return coordinate_ascent(problem, partial(weight_similarity, problem), 1, min(2, self.max_sweeps))

    def _ascend(self, problem: Problem) -> Solution:
        assert problem.forward is not None
        clock = Clock()
        with clock("activations"):
            module, names = problem.forward.module()
            module = module.to(problem.device).eval()
            states = [
                {key: _wide(tensor).to(problem.device) for key, tensor in state.items()}
                for state in (problem.fixed, problem.moving)
            ]
            batches = islice(problem.forward.data, self.batches)
            statistics = collect(problem.spec, module, names, states, batches, problem.device)
        weights = (0.5 if problem.spec.gauged else 0.0) if self.weights is None else self.weights
        mixed = _Mixed(problem, statistics, weights)
        found = coordinate_ascent(problem, mixed, self.starts, self.max_sweeps, mixed.score)
        return replace(found, seconds=clock.seconds | dict(found.seconds))


def _wide(x: Tensor) -> Tensor:
    """In float32 or its own wider dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


class _Mixed:
    """Similarity of activations and of weights; where no activation carries a unit, of its weights alone."""

    def __init__(self, problem: Problem, statistics: Statistics, weights: float):
        self.problem, self.weights = problem, weights
        self.alike = {unit: statistics.similarity(unit) for unit in problem.spec.units}
        scale = sum(t.abs().max().item() * t.shape[0] for s in self.alike.values() for t in s.values())
        self.share = weights * scale / max(bound(problem), 1e-30)  # of weights, in units of activations

    def __call__(
        self, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
    ) -> tuple[Similarity, bool]:
        alike = self.alike[unit]
        if alike and not self.weights:
            return {names: tensor.clone() for names, tensor in alike.items()}, True
        similarity, exact = weight_similarity(self.problem, unit, elements, known)
        if not alike:
            return similarity, exact
        total = {names: (1 - self.weights) * tensor for names, tensor in alike.items()}
        for names, tensor in similarity.items():
            part = self.share * tensor
            total[names] = total[names] + part if names in total else part
        return total, exact

    def score(self, elements: Elements) -> float:
        """What rises: how alike activations are, and the share of weights; these alone where nothing is carried."""
        if not any(self.alike.values()):
            return objective(self.problem, elements)
        total = self.share * objective(self.problem, elements) if self.share else 0.0
        for unit, alike in self.alike.items():
            nested = Nested.of(self.problem.spec, unit)
            everything = {name: elements.get(name) or nested.identity(name) for name in nested.contexts}
            total += (1 - self.weights) * value(nested, alike, everything)
        return total
