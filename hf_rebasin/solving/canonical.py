"""Larger groups than permutations: what lengths and norms leave open is settled first, then the same solver solves.

Two models that differ by an element of the full groups differ by an isometry once both are in *canonical form*: gains
are folded into readers, what LayerNorms do not let through is left out, and what writes to a unit is as large as what
reads it. There ⟨fixed, g · moving⟩ has a largest value and tells how near the two are. What was found is brought back
to the models as they are, and scales and bases inside heads are fitted to the fixed model by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..alignment.alignment import Alignment, act, group_of
from ..alignment.gauge import gauges, plain, vectors
from ..alignment.groups import Element
from ..checkpoints.lazy import Here, Tensors
from ..symmetries.patterns import DIAGONAL, READER
from ..symmetries.spec import Spec
from .problem import Problem, equal_within
from .solution import Clock, Solution, Status

STRETCHING = ("scaled", "nonzero", "invertible", "rotary")  # kinds with elements that change lengths
KEPT = 1 << 28  # numbers; the canonical form of a model with more is computed anew whenever it is looked at
AT_HOME = 0.5  # of all units in their places: the two are of one base, and only some were moved

Solve: TypeAlias = Callable[[Problem], Solution]


def in_full(problem: Problem, solve: Solve, glance: Solve) -> Solution:
    """Solve over the full groups, unless a glance over the permutations shows equal models or two of one base.

    So models that were only permuted come back bit for bit, and of two fine-tunes of one base nothing is rewritten.
    Where no stream can be rotated and the canonical forms do not become equal either, permutations are found between
    the models as they are, and only scales and bases are fitted (docs/log.md has what it is worth).
    """
    spec, clock = problem.spec, Clock()
    if spec.symmetries == spec.restricted().symmetries:
        return solve(problem)
    chance = problem.generator.get_state()

    def posed(**other: Any) -> Problem:
        """The problem in other terms, with the same randomness each time."""
        return replace(problem, generator=torch.Generator().set_state(chance), **other)

    with clock("permutations"):
        permuted = glance(posed(spec=spec.restricted()))
    if permuted.status in (Status.EQUAL, Status.IDENTITY):
        return permuted
    if at_home(permuted.alignment) >= AT_HOME:
        return solve(posed(spec=spec.restricted()))
    with clock("canonical forms"):
        (fixed, mine), (moving, theirs) = (canonical(spec, state) for state in (problem.fixed, problem.moving))
    found = (solve if spec.gauged else glance)(posed(fixed=fixed, moving=moving))
    between = Alignment(spec, mine).inverse().compose(found.alignment).compose(Alignment(spec, theirs))
    alignment = fit(problem, between.elements, clock)
    if equal_within(problem, alignment):
        found = replace(found, status=Status.EQUAL)
    elif spec.gauged:  # the identity between canonical forms is none between the models
        found = replace(found, status=Status.CONVERGED if found.status is Status.IDENTITY else found.status)
    else:
        found = solve(posed(spec=spec.restricted()))
        alignment = fit(problem, _permuting(spec, found.alignment), clock)
    return replace(found, alignment=alignment, seconds=clock.seconds | dict(found.seconds))


def _permuting(spec: Spec, alignment: Alignment) -> dict[str, Element]:
    """Permutations as elements of the larger groups they are in."""
    return {n: group_of(spec, n).permuting(e.tensors()["order"]) for n, e in alignment.elements.items()}


def at_home(alignment: Alignment) -> float:
    """The share of units that permutations leave in their places."""
    orders = [element.tensors()["order"] for element in alignment.elements.values()]
    still = sum(int((order == torch.arange(order.shape[-1])).sum()) for order in orders)
    return still / max(sum(order.numel() for order in orders), 1)


def canonical(spec: Spec, state: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, Element]]:
    """(the canonical form of a model, the elements that balanced it)"""
    form = plain(spec, state, centre=True)
    elements = {}
    for name, sides in moments(spec, [form]).items():
        if sides.keys() == {"", READER}:
            elements[name] = group_of(spec, name).balance(sides[""][0], sides[READER][0])
    balanced = act(spec, elements, form)
    if sum(part.numel for part in balanced.parts.values()) <= KEPT:
        balanced = Tensors({key: Here.of(tensor.clone(), own=True) for key, tensor in balanced.items()})
    return balanced, elements


def fit(problem: Problem, elements: Mapping[str, Element], clock: Clock) -> Alignment:
    """An alignment of the elements, with scales and bases fitted to the fixed model, in the fixed model's gauge."""
    spec = problem.spec
    with clock("fit"):
        fixed, moving = (
            plain(spec, problem.fixed, centre=True),
            act(spec, elements, plain(spec, problem.moving, centre=True)),
        )
        fitted = dict(elements)
        sides: Any
        for name, sides in moments(spec, [fixed, moving]).items():
            if sides.keys() == {"", READER}:
                better = group_of(spec, name).fit(sides[""], sides[READER])
                fitted[name] = better.compose(fitted[name]) if name in fitted else better
    ordered = {name: fitted[name] for name in spec.symmetries if name in fitted}
    norms = gauges(spec)
    return Alignment(spec, ordered, vectors(norms, problem.fixed), vectors(norms, problem.moving))


def moments(spec: Spec, states: list[Mapping[str, Tensor]]) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """{symmetry: {mark: ⟨x, x⟩ or, of two models, ⟨x, x⟩, ⟨x, y⟩, ⟨y, y⟩}} of all that can be stretched."""
    found: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    for tensor in spec.tensors:
        names = {name for name in tensor.names & spec.free if spec.symmetries[name].kind in STRETCHING}
        wholes = [tensor.gather(state) for state in states] if names else []
        for block in tensor.blocks if names else ():
            for place, dim in enumerate(block.dims):
                if dim.name in names and dim.mark != DIAGONAL and all(d.size for d in block.dims):
                    front = [*dim.contexts, place]
                    views = [block.view(whole).movedim(front, list(range(len(front)))) for whole in wholes]
                    rows = [x.reshape(*x.shape[: len(front)], -1) for x in views]
                    group = group_of(spec, dim.name)
                    pairs = combinations_with_replacement(rows, 2)
                    new = tuple(group.moments(x, y) for x, y in pairs)
                    sides = found.setdefault(dim.name, {})
                    old = sides.get(dim.mark)
                    sides[dim.mark] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))
    return found
