"""Rules for what is found or written by number: embeddings, indices, gather and scatter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .record import Call, Record
from .rules import labelled, other_places, rule, unknown
from .unification import Axis, fresh, pin, unify


@rule("embedding")
def _embedding(record: Record, call: Call) -> None:
    """A row is looked up by its number."""
    weight, indices = record.of(call["weight"]), record.of(call["indices"])
    pin(weight[0], f"{call.why}: rows are looked up by number")
    for axis in indices:
        pin(axis, f"{call.why}: numbers of rows")
    record.set(call.out, [*indices, weight[1]])
    record.relate(labelled(["row", "in"], weight), labelled([*range(len(indices)), "in"], record.of(call.out)))
    if (origin := record.origin(call["weight"])) is not None:
        record.looked_up.add(origin)


@rule("_embedding_bag _embedding_bag_forward_only")
def _embedding_bag(record: Record, call: Call) -> None:
    weight = record.of(call["weight"])
    pin(weight[0], f"{call.why}: rows are looked up by number")
    record.pin([t for t in call.tensors if t is not call["weight"]], f"{call.why}: numbers of rows")
    out, *rest = call.outs
    record.set(out, [fresh(out.shape[0], call.why), weight[1]])
    record.relate(labelled(["row", "in"], weight), labelled(["bag", "in"], record.of(out)))
    for other in rest:
        record.held(other, call.why)


def _indexed(record: Record, call: Call) -> tuple[list[int], list[Axis], list[Any]]:
    """What `x[indices]` is: the indexed dimensions, its axes, and its labels where those of x are its dimensions."""
    x, indices = call["self"], list(call["indices"])
    axes, at = record.of(x), [d for d, i in enumerate(indices) if i is not None]
    for d in at:
        pin(axes[d], f"{call.why}: rows are looked up by number")
        record.pin([indices[d]], f"{call.why}: numbers of rows")
    new = torch.broadcast_shapes(*(indices[d].shape for d in at))
    place = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    kept: list[Any] = [d for d in range(x.dim()) if d not in at]
    found = [axes[d] for d in kept]
    found[place:place] = [fresh(n, f"{call.why}: numbers of rows") for n in new]
    kept[place:place] = [("after", d) for d in range(len(new))]
    return at, found, kept


@rule("index _unsafe_index")
def _index(record: Record, call: Call) -> None:
    """Rows by their numbers; the axes that are not indexed go through."""
    x = call["self"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in call["indices"]):
        return unknown(record, call)
    at, axes, labels = _indexed(record, call)
    record.set(call.out, axes)
    before = [("before", d) if d in at else d for d in range(x.dim())]
    return record.relate(labelled(before, record.of(x)), labelled(labels, axes))


@rule("index_put _unsafe_index_put")
def _index_put(record: Record, call: Call) -> None:
    """Rows written by their numbers; along the other axes the values are at their own place."""
    x, values = call["self"], call["values"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in call["indices"]):
        return unknown(record, call)
    _, axes, labels = _indexed(record, call)
    whole = record.of(x)
    given = []
    for axis, d in zip(reversed(record.of(values)), range(-1, -values.dim() - 1, -1), strict=True):
        if values.shape[d] != 1:
            unify(axes[d], axis, call.why)
            given.append(((labels[d], axis),))
    record.set(call.out, whole)
    return record.relate(labelled(range(x.dim()), whole), tuple(given))


def _along(record: Record, call: Call, source: Tensor | None = None) -> int:
    """Along all axes but one the places of `self`, an index and a source are the same; along that one they are picked
    by number."""
    x, index, dim = call["self"], call["index"], call["dim"] % max(call["self"].dim(), 1)
    sources, uniform = [] if source is None else [source], record.uniform(index)
    for d in range(x.dim()):
        if d == dim:
            for tensor in (x, *sources, index):
                pin(record.of(tensor)[d], f"{call.why}: places are picked by number")
            continue
        says_nothing = d in uniform and all(t.shape[d] == index.shape[d] for t in (x, *sources))
        for tensor in (*sources, *([] if says_nothing else [index])):
            unify(record.of(x)[d], record.of(tensor)[d], call.why)
    return dim


@rule("gather")
def _gather(record: Record, call: Call) -> None:
    x, out = call["self"], call.out
    dim = _along(record, call)
    shorter = [d for d, (n, m) in enumerate(zip(x.shape, out.shape, strict=True)) if n != m]
    other_places(record, x, out, {dim, *shorter}, call.why)


@rule("scatter scatter_add index_add index_copy")
def _scatter(record: Record, call: Call) -> None:
    """Written by number along one axis, at their own place along the others."""
    x = call["self"]
    source = next((call.arguments[k] for k in ("src", "source") if isinstance(call.arguments.get(k), Tensor)), None)
    if source is None or source.dim() != x.dim() or call["index"].dim() != x.dim():
        return unknown(record, call)
    before = record.of(x)
    _along(record, call, source)
    return record.set(call.out, before)


@rule("index_select")
def _index_select(record: Record, call: Call) -> None:
    x = call["self"]
    record.pin([call["index"]], f"{call.why}: numbers of rows")
    other_places(record, x, call.out, [call["dim"] % x.dim()], f"{call.why}: rows are looked up by number")
