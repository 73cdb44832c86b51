"""Activation matching: the alignment under which two models have similar activations on the same inputs, unlabelled.

Permutations are found by the correlation of units, as in Git Re-Basin (Ainsworth, Hayase, Srinivasa 2022, arXiv
2209.04836, section 3.1), rotations by Procrustes on the normalised stream (arXiv 2506.22712). How much weights count
relative to activations, and whether all samples count the same, is chosen by the divergence on the line between the
two aligned models (docs/log.md).
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

from ...alignment.action import act
from ...alignment.groups import Element
from ...checkpoints.precision import widen
from ...errors import OptionError
from ...modules.distributed import all_reduce_sum, shard_batches
from ...modules.divergence import Divergence
from ...registry import DataUse
from ...symmetries.spec import Unit
from ..activations import ActivationStatistics, collect_statistics
from ..canonical import solve_over_full_groups
from ..coordinate_ascent import coordinate_ascent
from ..problem import Problem, objective, objective_bound
from ..similarity import weight_similarity
from ..solution import Clock, Solution, Status
from ..units import Elements, Nested, Similarity, total_similarity

TRIED_SHARES = (0.0, 0.5, 1.0)  # of weight matching
LINE_POINTS = (0.25, 0.5, 0.75)  # the midpoint alone would miss a barrier to either side of it


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Options of activation matching.

    Args:
        weights: share of weight matching in the objective, from 0 to 1. By default 0, ½ and 1 are tried, and the
            alignment is kept under which the line between the models diverges least from them; see `line_divergence`.
        sensitive: whether samples count as much as the outputs depend on them; see `activations.collect_statistics`.
            By default both are tried.
        batches: number of batches that are used; by default all of the data.
        starts: as in weight matching, for every mix; one is enough where weights have no share.
        max_sweeps: as in weight matching.
    """

    weights: float | None = None
    sensitive: bool | None = None
    batches: int | None = None
    starts: int = 2
    max_sweeps: int = 100

    data: ClassVar[DataUse] = "required"

    def __post_init__(self) -> None:
        if self.weights is not None and not 0 <= self.weights <= 1:
            raise OptionError(f"weights = {self.weights}; give a share between 0 and 1")
        if self.batches is not None and self.batches < 1:
            raise OptionError(f"batches = {self.batches}; give 1 or more")

    @staticmethod
    def memory(model: int, *, data: bool) -> int:
        return 4 * model  # both models, the one between them, and a moved copy

    def solve(self, problem: Problem) -> Solution:
        if problem.forward is None:
            raise OptionError("activation_matching compares activations on data, but no data is given; give data=")
        return solve_over_full_groups(problem, self._ascend, self._solve_quickly)

    def _solve_quickly(self, problem: Problem) -> Solution:
        return coordinate_ascent(problem, partial(weight_similarity, problem), 1, min(2, self.max_sweeps))

    def _ascend(self, problem: Problem) -> Solution:
        """Solve with every mix, and keep the alignment under which the line between the models diverges least."""
        clock = Clock()
        with clock("activations"):
            statistics = {sensitive: _collect(problem, self.batches, sensitive) for sensitive in self._sensitive}
        best, least = None, math.inf
        mixes, random_state = self._mixes, problem.generator.get_state()
        for share, sensitive in mixes:
            problem.generator.set_state(random_state)  # as if this were the only mix
            mixed = _MixedSimilarity(problem, statistics[sensitive], share)
            solution = coordinate_ascent(problem, mixed, self.starts, self.max_sweeps, mixed.score)
            for activity, seconds in solution.seconds.items():
                clock.seconds[activity] = clock.seconds.get(activity, 0.0) + seconds
            if len(mixes) == 1 or solution.status in (Status.EQUAL, Status.IDENTITY):
                return replace(solution, seconds=clock.seconds)
            with clock("line"):
                divergence = line_divergence(problem, solution.alignment.elements, self.batches)
            if best is None or divergence < least:  # of equals, the first
                best, least = solution, divergence
        assert best is not None
        return replace(best, seconds=clock.seconds)

    @property
    def _sensitive(self) -> tuple[bool, ...]:
        return (False, True) if self.sensitive is None else (self.sensitive,)

    @property
    def _mixes(self) -> list[tuple[float, bool]]:
        """(share of weights, whether samples are weighted) of every mix; weights alone are tried once."""
        shares = TRIED_SHARES if self.weights is None else (self.weights,)
        return [
            (share, sensitive)
            for share in shares
            for sensitive in (self._sensitive if share < 1 else self._sensitive[:1])
        ]


def _collect(problem: Problem, count: int | None, sensitive: bool) -> ActivationStatistics:
    assert problem.forward is not None
    module, module_keys = problem.forward.module()
    module = module.to(problem.device).eval()
    batches = islice(problem.forward.data, count)
    states = _widen_states(problem)
    return collect_statistics(problem.spec, module, module_keys, states, batches, problem.device, sensitive)


def line_divergence(problem: Problem, elements: Mapping[str, Element], count: int | None = None) -> float:
    """Measure how far the outputs of models on the line between two models are from those of the two, without labels.

    Args:
        problem: problem with the models and the batches.
        elements: elements of g, which moves the moving model first.
        count: number of batches that are used; by default all.

    Returns:
        The divergence of `hf_rebasin.modules.divergence`, averaged over samples (or tokens) and over λ = ¼, ½, ¾.

    Raises:
        OptionError: the outputs are not finite.
    """
    assert problem.forward is not None
    fixed, moving = _widen_states(problem)
    moved = act(problem.spec, elements, moving)
    module, module_keys = problem.forward.module()
    divergence = Divergence(module.to(problem.device).eval(), module_keys, (fixed, moving), problem.device)
    line = {
        t: {k: x.lerp(moved[k].to(x), t) if x.is_floating_point() else x for k, x in fixed.items()}
        for t in LINE_POINTS
    }
    sum_and_count = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in shard_batches(islice(problem.forward.data, count)):
            ends = divergence.outputs_of_ends(batch)
            for t, state in line.items():
                samples = divergence.per_sample(state, (1 - t, t), batch, ends)
                sum_and_count += torch.tensor([samples.double().sum().item(), samples.numel()], dtype=torch.float64)
    summed, samples_seen = all_reduce_sum(sum_and_count).tolist()
    if not math.isfinite(summed):
        raise OptionError(
            f"the models' outputs on these data are not finite ({summed}); check both models and the data"
        )
    return summed / samples_seen if samples_seen else 0.0


def _widen_states(problem: Problem) -> list[dict[str, Tensor]]:
    """Return the tensors of the fixed and of the moving model, widened, on the device."""
    both = (problem.fixed, problem.moving)
    return [{key: widen(tensor).to(problem.device) for key, tensor in state.items()} for state in both]


class _MixedSimilarity:
    """Mix of the similarities of activations and of weights; of weights alone for units that no activation carries."""

    def __init__(self, problem: Problem, statistics: ActivationStatistics, weights: float):
        self.problem, self.weights = problem, weights
        self.activation_similarity = {unit: statistics.similarity(unit) for unit in problem.spec.units}
        scale = sum(t.abs().max().item() * t.shape[0] for s in self.activation_similarity.values() for t in s.values())
        self.share = weights * scale / max(objective_bound(problem), 1e-30)  # of weights, on the scale of activations

    def __call__(
        self, unit: Unit, elements: Mapping[str, Element], known: set[str] | None = None
    ) -> tuple[Similarity, bool]:
        of_activations = self.activation_similarity[unit]
        if of_activations and not self.weights:
            return {names: tensor.clone() for names, tensor in of_activations.items()}, True
        of_weights, linear = weight_similarity(self.problem, unit, elements, known)
        if not of_activations:
            return of_weights, linear
        mixed = {names: (1 - self.weights) * tensor for names, tensor in of_activations.items()}
        for names, tensor in of_weights.items():
            part = self.share * tensor
            mixed[names] = mixed[names] + part if names in mixed else part
        return mixed, linear

    def score(self, elements: Elements) -> float:
        """Return the objective, a mix of both similarities; that of weights alone if activations carry no unit."""
        if not any(self.activation_similarity.values()):
            return objective(self.problem, elements)
        total = self.share * objective(self.problem, elements) if self.share else 0.0
        for unit, similarity in self.activation_similarity.items():
            nested = Nested.of(self.problem.spec, unit)
            complete = {name: elements.get(name) or nested.identity(name) for name in nested.contexts}
            total += (1 - self.weights) * total_similarity(nested, similarity, complete)
        return total
