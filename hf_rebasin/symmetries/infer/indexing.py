"""Rules for reading and writing by number: embeddings, indices, gather and scatter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .record import AxisRecord, Call
from .rules import labelled, pin_and_replace, pin_everything, rule
from .unification import Axis, fresh_axis, pin, unify


@rule("embedding")
def _embedding(record: AxisRecord, call: Call) -> None:
    """Rows are looked up by number; the columns keep their axis."""
    weight, indices = record.axes_of(call["weight"]), record.axes_of(call["indices"])
    pin(weight[0], f"{call.why}: rows are looked up by number")
    for axis in indices:
        pin(axis, f"{call.why}: numbers of rows")
    record.set(call.out, [*indices, weight[1]])
    record.relate(labelled(["row", "in"], weight), labelled([*range(len(indices)), "in"], record.axes_of(call.out)))
    if (origin := record.origin_of(call["weight"])) is not None:
        record.looked_up.add(origin)


@rule("_embedding_bag _embedding_bag_forward_only")
def _embedding_bag(record: AxisRecord, call: Call) -> None:
    weight = record.axes_of(call["weight"])
    pin(weight[0], f"{call.why}: rows are looked up by number")
    record.pin([t for t in call.tensors if t is not call["weight"]], f"{call.why}: numbers of rows")
    out, *rest = call.outs
    record.set(out, [fresh_axis(out.shape[0], call.why), weight[1]])
    record.relate(labelled(["row", "in"], weight), labelled(["bag", "in"], record.axes_of(out)))
    for tensor in rest:
        record.set_pinned(tensor, call.why)


def _index_axes(record: AxisRecord, call: Call) -> tuple[list[int], list[Axis], list[Any]]:
    """Return the indexed dimensions of x in `x[indices]`, and the axes of the result with their labels.

    A label is the dimension of x that the axis comes from, or marks the axis as new.
    """
    x, indices = call["self"], list(call["indices"])
    axes, indexed = record.axes_of(x), [d for d, index in enumerate(indices) if index is not None]
    for d in indexed:
        pin(axes[d], f"{call.why}: rows are looked up by number")
        record.pin([indices[d]], f"{call.why}: numbers of rows")
    new_shape = torch.broadcast_shapes(*(indices[d].shape for d in indexed))
    first = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0  # where the new axes go
    labels: list[Any] = [d for d in range(x.dim()) if d not in indexed]
    result = [axes[d] for d in labels]
    result[first:first] = [fresh_axis(n, f"{call.why}: numbers of rows") for n in new_shape]
    labels[first:first] = [("after", d) for d in range(len(new_shape))]
    return indexed, result, labels


@rule("index _unsafe_index")
def _index(record: AxisRecord, call: Call) -> None:
    """Indexed dimensions are read by number; the others keep their axes."""
    x = call["self"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in call["indices"]):
        return pin_everything(record, call)
    indexed, axes, labels = _index_axes(record, call)
    record.set(call.out, axes)
    before = [("before", d) if d in indexed else d for d in range(x.dim())]
    return record.relate(labelled(before, record.axes_of(x)), labelled(labels, axes))


@rule("index_put _unsafe_index_put")
def _index_put(record: AxisRecord, call: Call) -> None:
    """Indexed dimensions are written by number; along the others values keep their positions."""
    x, values = call["self"], call["values"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in call["indices"]):
        return pin_everything(record, call)
    _, axes, labels = _index_axes(record, call)
    written = record.axes_of(x)
    operand = []
    for axis, d in zip(reversed(record.axes_of(values)), range(-1, -values.dim() - 1, -1), strict=True):
        if values.shape[d] != 1:
            unify(axes[d], axis, call.why)
            operand.append(((labels[d], axis),))
    record.set(call.out, written)
    return record.relate(labelled(range(x.dim()), written), tuple(operand))


def _unify_other_axes(record: AxisRecord, call: Call, source: Tensor | None = None) -> int:
    """Pin the axis along which positions are picked by number, and return it.

    Along all other axes `self`, the index and the source (if any) share their positions, and are unified.
    """
    x, index, dim = call["self"], call["index"], call["dim"] % max(call["self"].dim(), 1)
    sources, uniform = [] if source is None else [source], record.uniform_dims(index)
    for d in range(x.dim()):
        if d == dim:
            for tensor in (x, *sources, index):
                pin(record.axes_of(tensor)[d], f"{call.why}: positions are picked by number")
            continue
        unrestricted = d in uniform and all(t.shape[d] == index.shape[d] for t in (x, *sources))
        for tensor in (*sources, *([] if unrestricted else [index])):
            unify(record.axes_of(x)[d], record.axes_of(tensor)[d], call.why)
    return dim


@rule("gather")
def _gather(record: AxisRecord, call: Call) -> None:
    x, out = call["self"], call.out
    dim = _unify_other_axes(record, call)
    shorter = [d for d, (n, m) in enumerate(zip(x.shape, out.shape, strict=True)) if n != m]
    pin_and_replace(record, x, out, {dim, *shorter}, call.why)


@rule("scatter scatter_add index_add index_copy")
def _scatter(record: AxisRecord, call: Call) -> None:
    """Values are written by number along one axis, and keep their positions along the others."""
    x = call["self"]
    source = next((call.arguments[k] for k in ("src", "source") if isinstance(call.arguments.get(k), Tensor)), None)
    if source is None or source.dim() != x.dim() or call["index"].dim() != x.dim():
        return pin_everything(record, call)
    before = record.axes_of(x)
    _unify_other_axes(record, call, source)
    return record.set(call.out, before)


@rule("index_select")
def _index_select(record: AxisRecord, call: Call) -> None:
    x = call["self"]
    record.pin([call["index"]], f"{call.why}: numbers of rows")
    pin_and_replace(record, x, call.out, [call["dim"] % x.dim()], f"{call.why}: rows are looked up by number")
