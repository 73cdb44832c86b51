"""Activation matching: the alignment under which two models say the same of the same inputs, without labels.

Permutations by the correlation of units, as in Git Re-Basin (Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836,
section 3.1); rotations by Procrustes on the normalised stream (2506.22712). How much weights have a say in it, and
whether all samples count the same, is told by what is on the line between the two then (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from ...alignment.alignment import act
from ...alignment.groups import Element
from ...errors import OptionError
from ...modules.distributed import shared_out, sum_of_all
from ...modules.divergence import Divergence
from ...symmetries.spec import Unit
from ..activations import Statistics, collect
from ..canonical import in_full
from ..coordinate_ascent import coordinate_ascent
from ..problem import Problem, bound, objective
from ..similarity import weight_similarity
from ..solution import Clock, Solution, Status
from ..units import Elements, Nested, Similarity, value

SHARES = (0.0, 0.5, 1.0)  # of weight matching, that are tried
LOOKED_AT = (0.25, 0.5, 0.75)  # on the line: halfway alone may leave a hill beside the middle


@dataclass(frozen=True)
class Solver:
    """Knobs of activation matching.

    Args:
        weights: the share of weight matching in what is maximised, from 0 to 1. By default 0, ½ and 1 are tried, and
            what is kept is that after which the line between the two says most nearly what they say; see `divergence`.
        sensitive: whether samples count as much as the outputs depend on them; see `activations.collect`. By default
            both are tried.
        batches: how many are looked at; by default all that the data have.
        starts: as in weight matching, for every mix; one is enough where weights have no share.
        max_sweeps: as in weight matching.
    """

    weights: float | None = None
    sensitive: bool | None = None
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
        """By every mix that is asked for; the one is kept after which the line between the two diverges least."""
        clock = Clock()
        with clock("activations"):
            seen = {sensitive: _collected(problem, self.batches, sensitive) for sensitive in self._sensitive}
        best, least = None, math.inf
        mixes, chance = self._mixes, problem.generator.get_state()
        for share, sensitive in mixes:
            problem.generator.set_state(chance)  # the same as if this mix alone were asked for
            mixed = _Mixed(problem, seen[sensitive], share)
            found = coordinate_ascent(problem, mixed, self.starts, self.max_sweeps, mixed.score)
            for what, seconds in found.seconds.items():
                clock.seconds[what] = clock.seconds.get(what, 0.0) + seconds
            if len(mixes) == 1 or found.status in (Status.EQUAL, Status.IDENTITY):
                return replace(found, seconds=clock.seconds)
            with clock("line"):
                apart = divergence(problem, found.alignment.elements, self.batches)
            if best is None or apart < least:  # the first of equals
                best, least = found, apart
        assert best is not None
        return replace(best, seconds=clock.seconds)

    @property
    def _sensitive(self) -> tuple[bool, ...]:
        return (False, True) if self.sensitive is None else (self.sensitive,)

    @property
    def _mixes(self) -> list[tuple[float, bool]]:
        """(share of weights, whether samples are weighted); of weights alone, once."""
        shares = SHARES if self.weights is None else (self.weights,)
        return [(share, yes) for share in shares for yes in (self._sensitive if share < 1 else self._sensitive[:1])]


def _collected(problem: Problem, count: int | None, sensitive: bool) -> Statistics:
    assert problem.forward is not None
    module, names = problem.forward.module()
    module = module.to(problem.device).eval()
    batches = islice(problem.forward.data, count)
    return collect(problem.spec, module, names, _states(problem), batches, problem.device, sensitive)


def divergence(problem: Problem, elements: Mapping[str, Element], count: int | None = None) -> float:
    """How far what is on the line between two models is from saying what the two say, without labels.

    The mean over samples, or tokens, and over λ = ¼, ½, ¾ of what `hf_rebasin.modules.divergence` says of each.

    Args:
        problem: the models and the batches.
        elements: of g.
        count: how many batches are looked at; by default all.
    """
    assert problem.forward is not None
    fixed, moving = _states(problem)
    moved = act(problem.spec, elements, moving)
    module, names = problem.forward.module()
    diverging = Divergence(module.to(problem.device).eval(), names, (fixed, moving), problem.device)
    line = {
        at: {k: x.lerp(moved[k].to(x), at) if x.is_floating_point() else x for k, x in fixed.items()}
        for at in LOOKED_AT
    }
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in shared_out(islice(problem.forward.data, count)):
            said = diverging.said(batch)
            for at, state in line.items():
                apart = diverging.of(state, (1 - at, at), batch, said)
                total += torch.tensor([apart.double().sum().item(), apart.numel()], dtype=torch.float64)
    summed, samples = sum_of_all(total).tolist()
    if not math.isfinite(summed):
        raise OptionError(f"what the models say to these data is not finite ({summed}); look at both, and at the data")
    return summed / samples if samples else 0.0


def _states(problem: Problem) -> list[dict[str, Tensor]]:
    """Of the fixed and the moving model."""
    both = (problem.fixed, problem.moving)
    return [{key: _wide(tensor).to(problem.device) for key, tensor in state.items()} for state in both]


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
