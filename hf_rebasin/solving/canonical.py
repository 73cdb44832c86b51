"""Groups larger than permutations: both models are brought to a canonical form, where any solver can align them.

Two models that differ by an element of the full groups differ by an isometry once both are in *canonical form*: gains
are folded into the readers of a norm, what LayerNorms do not let through is removed, and the weights that write to a
unit are as large as those that read it. There ⟨fixed, g · moving⟩ is bounded and measures how close the two are. The
alignment is then carried back to the models as they are, and scales and bases inside heads are fitted to the fixed
model by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..alignment.action import act, element_class
from ..alignment.alignment import Alignment
from ..alignment.gauge import find_gauges, fold_state, gauge_vectors
from ..alignment.groups import Element
from ..checkpoints.lazy import InMemory, Tensors
from ..symmetries.patterns import DIAGONAL, READER
from ..symmetries.spec import Spec
from .problem import Problem, equal_within
from .solution import Clock, Solution, Status

STRETCHING = ("scaled", "nonzero", "invertible", "rotary")  # kinds with elements that change lengths
MAX_CACHED_ELEMENTS = 1 << 28  # the canonical form of a larger model is recomputed at every access
SHARED_BASE = 0.5  # from this share of unmoved units on, two models count as fine-tunes of one base

SolveFunction: TypeAlias = Callable[[Problem], Solution]


def solve_over_full_groups(problem: Problem, solve: SolveFunction, quick_solve: SolveFunction) -> Solution:
    """Solve over the full groups, unless permutations show that the models are equal or fine-tunes of one base.

    So models that were only permuted come back bit for bit, and fine-tunes of one base are not rewritten. Where no
    stream can be rotated and the canonical forms do not become equal either, permutations are found between the models
    as they are, and only scales and bases are fitted (docs/log.md tells what this gains).

    Args:
        problem: problem over the full groups.
        solve: solves a problem.
        quick_solve: solves a problem with little effort, to see whether permutations are enough.
    """
    spec, clock = problem.spec, Clock()
    if spec.symmetries == spec.restricted().symmetries:
        return solve(problem)
    random_state = problem.generator.get_state()

    def restate(**changes: Any) -> Problem:
        """Return the problem with changes, and with the same randomness every time."""
        return replace(problem, generator=torch.Generator().set_state(random_state), **changes)

    with clock("permutations"):
        permuted = quick_solve(restate(spec=spec.restricted()))
    if permuted.status in (Status.EQUAL, Status.IDENTITY):
        return permuted
    if unmoved_share(permuted.alignment) >= SHARED_BASE:
        return solve(restate(spec=spec.restricted()))
    with clock("canonical forms"):
        fixed, balance_fixed = make_canonical(spec, problem.fixed)
        moving, balance_moving = make_canonical(spec, problem.moving)
    solution = (solve if spec.gauged else quick_solve)(restate(fixed=fixed, moving=moving))
    between = (
        Alignment(spec, balance_fixed).inverse().compose(solution.alignment).compose(Alignment(spec, balance_moving))
    )
    alignment = fit_alignment(problem, between.elements, clock)
    if equal_within(problem, alignment):
        solution = replace(solution, status=Status.EQUAL)
    elif spec.gauged:  # the identity between canonical forms is not the identity between the models
        status = Status.CONVERGED if solution.status is Status.IDENTITY else solution.status
        solution = replace(solution, status=status)
    else:
        solution = solve(restate(spec=spec.restricted()))
        alignment = fit_alignment(problem, _embed_permutations(spec, solution.alignment), clock)
    return replace(solution, alignment=alignment, seconds=clock.seconds | dict(solution.seconds))


def _embed_permutations(spec: Spec, alignment: Alignment) -> dict[str, Element]:
    """Return permutations as elements of the larger groups that contain them."""
    return {n: element_class(spec, n).permuting(e.tensors()["order"]) for n, e in alignment.elements.items()}


def unmoved_share(alignment: Alignment) -> float:
    """Return the share of units that permutations leave in place."""
    orders = [element.tensors()["order"] for element in alignment.elements.values()]
    unmoved = sum(int((order == torch.arange(order.shape[-1])).sum()) for order in orders)
    return unmoved / max(sum(order.numel() for order in orders), 1)


def make_canonical(spec: Spec, state: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, Element]]:
    """Return the canonical form of a model, and the elements that balance writers and readers in it."""
    form = fold_state(spec, state, centre=True)
    elements = {}
    for name, sides in sum_moments(spec, [form]).items():
        if sides.keys() == {"", READER}:
            elements[name] = element_class(spec, name).balance(sides[""][0], sides[READER][0])
    balanced = act(spec, elements, form)
    if sum(part.numel for part in balanced.parts.values()) <= MAX_CACHED_ELEMENTS:
        balanced = Tensors({key: InMemory.of(tensor.clone(), owned=True) for key, tensor in balanced.items()})
    return balanced, elements


def fit_alignment(problem: Problem, elements: Mapping[str, Element], clock: Clock) -> Alignment:
    """Build an alignment in the fixed model's gauge, with scales and bases fitted to the fixed model."""
    spec = problem.spec
    with clock("fit"):
        fixed, moving = (
            fold_state(spec, problem.fixed, centre=True),
            act(spec, elements, fold_state(spec, problem.moving, centre=True)),
        )
        fitted = dict(elements)
        sides: Any
        for name, sides in sum_moments(spec, [fixed, moving]).items():
            if sides.keys() == {"", READER}:
                correction = element_class(spec, name).fit(sides[""], sides[READER])
                fitted[name] = correction.compose(fitted[name]) if name in fitted else correction
    ordered = {name: fitted[name] for name in spec.symmetries if name in fitted}
    norms = find_gauges(spec)
    return Alignment(spec, ordered, gauge_vectors(norms, problem.fixed), gauge_vectors(norms, problem.moving))


def sum_moments(spec: Spec, states: list[Mapping[str, Tensor]]) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Sum second moments along all symmetries whose groups change lengths.

    Args:
        spec: spec of the models.
        states: tensors of one model x, or of two models x and y.

    Returns:
        `{symmetry: {mark: moments}}`, with moments ⟨x, x⟩, or ⟨x, x⟩, ⟨x, y⟩, ⟨y, y⟩ for two models.
    """
    total: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    for tensor in spec.tensors:
        names = {name for name in tensor.names & spec.free if spec.symmetries[name].kind in STRETCHING}
        gathered = [tensor.gather(state) for state in states] if names else []
        for block in tensor.blocks if names else ():
            for i, dim in enumerate(block.dims):
                if dim.name in names and dim.mark != DIAGONAL and all(d.size for d in block.dims):
                    front = [*dim.contexts, i]
                    views = [block.view(whole).movedim(front, list(range(len(front)))) for whole in gathered]
                    rows = [x.reshape(*x.shape[: len(front)], -1) for x in views]
                    group = element_class(spec, dim.name)
                    pairs = combinations_with_replacement(rows, 2)
                    new = tuple(group.moments(x, y) for x, y in pairs)
                    sides = total.setdefault(dim.name, {})
                    old = sides.get(dim.mark)
                    sides[dim.mark] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))
    return total
