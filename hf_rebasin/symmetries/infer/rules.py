"""What rules are made of: how they register, and what many of them say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from .record import Call, Operand, Record
from .unification import Axis, fresh, pin, unify

Rule: TypeAlias = Callable[[Record, Call], None]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def unknown(record: Record, call: Call) -> None:
    why = f"{call.why}, which has no rule"
    record.pin(call.tensors, why)
    for out in call.outs:
        if not any(out is tensor for tensor in call.tensors) or len(record.of(out)) != out.dim():
            record.held(out, why)


def labelled(labels: Iterable[Any], axes: Iterable[Axis]) -> Operand:
    """An operand whose axes have one index each."""
    return tuple(((label, axis),) for label, axis in zip(labels, axes, strict=True))


Labels: TypeAlias = Iterable[Any]


def share(
    record: Record, call: Call, terms: Sequence[tuple[Tensor, Labels]], outs: Sequence[tuple[Tensor, Labels]]
) -> None:
    """Einstein's way: equal labels are one index, whose axes are unified. What is the same everywhere along an index,
    of size one or expanded, does not say how it moves."""
    shared: dict[Any, Axis] = {}
    operands: list[Operand] = []
    for tensor, labels in terms:
        operand = []
        uniform = record.uniform(tensor)
        for d, (label, axis) in enumerate(zip(labels, record.of(tensor), strict=True)):
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
        record.set(tensor, [() if n == 1 else shared.get(label) or fresh(n) for label, n in sizes])
        record.set_uniform(tensor, [d for d, (label, n) in enumerate(sizes) if n != 1 and label not in shared])
        operands.append(labelled(labels, record.of(tensor)))
    record.relate(*operands)


def mixed(record: Record, x: Tensor, out: Tensor, dims: Iterable[int]) -> None:
    """Along these dimensions an output needs other inputs than that of its own place: they are no longer the index
    that they were, so that nothing outside them may move differently from place to place of theirs."""
    dims = set(dims)
    record.consumed += [axis for d, axis in enumerate(record.of(x)) if d in dims]
    before, after = ([(when, d) if d in dims else d for d in range(x.dim())] for when in ("before", "after"))
    record.relate(labelled(before, record.of(x)), labelled(after, record.of(out)))


def other_places(record: Record, x: Tensor, out: Tensor, dims: Iterable[int], why: str) -> None:
    """Along these dimensions the output has places of its own, which hang on the order of those of x."""
    dims = set(dims)
    axes = record.of(x)
    for d in dims:
        pin(axes[d], why)
    record.set(out, [fresh(out.shape[d], why) if d in dims else axis for d, axis in enumerate(axes)])
    mixed(record, x, out, dims)


def seen_otherwise(record: Record, x: Tensor, out: Tensor) -> None:
    """A parameter transposed or cut is still that parameter, for names and marks."""
    origin = record.origin(x)
    if origin is not None:
        record.origins[id(out)] = origin
