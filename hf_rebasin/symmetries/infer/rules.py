"""The building blocks of rules: how they are registered, and what many of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from .record import AxisRecord, Call, Operand
from .unification import Axis, fresh_axis, pin, unify

Rule: TypeAlias = Callable[[AxisRecord, Call], None]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these ATen operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def pin_everything(record: AxisRecord, call: Call) -> None:
    """Pin all axes of a call: the rule of an operation that has none."""
    why = f"{call.why}, which has no rule"
    record.pin(call.tensors, why)
    for out in call.outs:
        if not any(out is tensor for tensor in call.tensors) or len(record.axes_of(out)) != out.dim():
            record.set_pinned(out, why)


def labelled(labels: Iterable[Any], axes: Iterable[Axis]) -> Operand:
    """An operand with one index for each axis."""
    return tuple(((label, axis),) for label, axis in zip(labels, axes, strict=True))


Labels: TypeAlias = Iterable[Any]


def unify_labels(
    record: AxisRecord, call: Call, terms: Sequence[tuple[Tensor, Labels]], outs: Sequence[tuple[Tensor, Labels]]
) -> None:
    """Unify axes as in an einsum: equal labels are one index.

    A tensor that is constant along an index (of size one, or expanded) does not restrict how that index moves.
    """
    shared: dict[Any, Axis] = {}
    operands: list[Operand] = []
    for tensor, labels in terms:
        operand = []
        uniform = record.uniform_dims(tensor)
        for d, (label, axis) in enumerate(zip(labels, record.axes_of(tensor), strict=True)):
            if d in uniform or tensor.shape[d] == 1:
                continue
            operand.append(((label, axis),))
            if label in shared:
                unify(shared[label], axis, call.why)
            else:
                shared[label] = axis
        operands.append(tuple(operand))
    for tensor, labels in outs:
        sizes = list(zip(labels, tensor.shape, strict=True))
        record.set(tensor, [() if n == 1 else shared.get(label) or fresh_axis(n) for label, n in sizes])
        record.set_uniform(tensor, [d for d, (label, n) in enumerate(sizes) if n != 1 and label not in shared])
        operands.append(labelled(labels, record.axes_of(tensor)))
    record.relate(*operands)


def mark_mixed(record: AxisRecord, x: Tensor, out: Tensor, dims: Iterable[int]) -> None:
    """Record that along these dimensions every output depends on inputs at other positions, too.

    They are no longer the index they were, so no other axis may move differently for each of their positions.
    """
    dims = set(dims)
    record.consumed += [axis for d, axis in enumerate(record.axes_of(x)) if d in dims]
    before, after = ([(when, d) if d in dims else d for d in range(x.dim())] for when in ("before", "after"))
    record.relate(labelled(before, record.axes_of(x)), labelled(after, record.axes_of(out)))


def pin_and_replace(record: AxisRecord, x: Tensor, out: Tensor, dims: Iterable[int], why: str) -> None:
    """Pin these dimensions of x and give the output new, pinned ones: its positions depend on the order of x."""
    dims = set(dims)
    axes = record.axes_of(x)
    for d in dims:
        pin(axes[d], why)
    record.set(out, [fresh_axis(out.shape[d], why) if d in dims else axis for d, axis in enumerate(axes)])
    mark_mixed(record, x, out, dims)


def keep_origin(record: AxisRecord, x: Tensor, out: Tensor) -> None:
    """Record that an output is a view of the same parameter as x, if x is one; names and marks depend on it."""
    origin = record.origin_of(x)
    if origin is not None:
        record.origins[id(out)] = origin
