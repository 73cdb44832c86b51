"""Rules for the same numbers in other brackets: views, slices, stacks, concatenations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .record import Call, Record, Stack
from .rules import mixed, other_places, rule, seen_otherwise, unknown
from .unification import (
    Axis,
    cut,
    flat,
    fresh,
    leaves,
    parts_of,
    piece,
    pin,
    regroup,
    size_of,
    split_axis,
    sum_of,
    unify,
)


def _permuted(record: Record, x: Tensor, out: Tensor, order: Sequence[int]) -> None:
    stack = record.stacks.get(id(x))
    if stack is None:
        axes = record.of(x)
        record.set(out, [axes[d] for d in order])
    else:
        inside = [d - (d > stack.dim) for d in order if d != stack.dim]
        parts = tuple([part[d] for d in inside] for part in stack.parts)
        record.set_stack(out, Stack(list(order).index(stack.dim), parts))
    seen_otherwise(record, x, out)


@rule("t transpose permute")
def _transpose(record: Record, call: Call) -> None:
    x = call["self"]
    order = list(range(x.dim()))
    if call.name.startswith("permute"):
        order = [d % x.dim() for d in call["dims"]]
    elif x.dim() > 1:
        i, j = (0, 1) if call.name.rstrip("_") == "t" else (call["dim0"], call["dim1"])
        order[i], order[j] = order[j], order[i]
    _permuted(record, x, call.out, order)


@rule("unsqueeze squeeze")
def _squeeze(record: Record, call: Call) -> None:
    """Axes of size one come and go."""
    x, out = call["self"], call.out
    stack = record.stacks.get(id(x))
    axes = [*stack.parts[0]] if stack is not None else record.of(x)  # x itself may have changed its shape in place
    if stack is not None:
        axes.insert(stack.dim, fresh(len(stack.parts)))
    n = len(axes)
    if call.name.startswith("unsqueeze"):
        at = call["dim"] % out.dim()
        kept = [d for d in range(out.dim()) if d != at]  # the places of x's dimensions in the output
    else:
        dims = call.arguments.get("dim")
        dims = range(n) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {d % n for d in dims if n and size_of(axes[d]) == 1}
        left = iter(range(n))
        kept = [-1 if d in gone else next(left) for d in range(n)]

    def placed(axes: Sequence[Axis], where: Sequence[int], length: int) -> list[Axis]:
        found: list[Axis] = [()] * length
        for axis, place in zip(axes, where, strict=True):
            if place >= 0:
                found[place] = axis
        return found

    if stack is None:
        record.set(out, placed(axes, kept, out.dim()))
    else:
        new = kept[stack.dim]
        where = [k - (k > new) for d, k in enumerate(kept) if d != stack.dim]
        record.set_stack(out, Stack(new, tuple(placed(part, where, out.dim() - 1) for part in stack.parts)))
    seen_otherwise(record, x, out)


@rule("view _unsafe_view reshape _reshape_alias unflatten")
def _view(record: Record, call: Call) -> None:
    """Row-major: the same atoms in the same order. A sum of equal blocks that becomes rows is a stack."""
    x, out = call["self"], call.out
    shape = list(out.shape)
    if out.dtype != x.dtype or out.numel() != x.numel():
        return unknown(record, call)
    seen_otherwise(record, x, out)
    stack = record.stacks.get(id(x))
    if stack is not None:
        found = _restacked(stack, list(x.shape), shape, call.why)
        if isinstance(found, Stack):
            return record.set_stack(out, found)
        if found is not None:
            return record.set(out, found)
    axes = record.of(x)
    atoms = tuple(atom for axis in axes for atom in flat(axis))
    for at, atom in enumerate(atoms):
        parts = parts_of(atom)
        if len({size_of(part) for part in parts}) == 1:
            dim = _dim_after(shape, size_of(atoms[:at]), len(parts))
            if dim is not None and shape[dim] != atom.size:
                rest = [*shape[:dim], *shape[dim + 1 :]]
                whole = (regroup([(*atoms[:at], *part, *atoms[at + 1 :])], rest, call.why) for part in parts)
                return record.set_stack(out, Stack(dim, tuple(whole)))
    record.set(out, regroup(axes, shape, call.why))
    record.relate(tuple(((0, axis),) for axis in axes), tuple(((0, axis),) for axis in record.of(out)))
    return None


def _dim_after(shape: Sequence[int], before: int, size: int) -> int | None:
    """The dimension of that size with exactly so many elements before it."""
    for dim, n in enumerate(shape):
        if n == size and math.prod(shape[:dim]) == before:
            return dim
    return None


def _restacked(stack: Stack, old: Sequence[int], new: list[int], why: str) -> Stack | list[Axis] | None:
    """A stack viewed otherwise: still a stack, or laid end to end along an axis again, or neither (None)."""
    n, before = len(stack.parts), math.prod(old[: stack.dim])
    dim = _dim_after(new, before, n)
    if dim is not None:
        rest = [*new[:dim], *new[dim + 1 :]]
        return Stack(dim, tuple(regroup(part, rest, why) for part in stack.parts))
    for dim, size in enumerate(new):
        if math.prod(new[:dim]) == before and size % n == 0:
            heads = [regroup(part[: stack.dim], new[:dim], why) for part in stack.parts]
            tails = [
                split_axis(tuple(a for x in part[stack.dim :] for a in x), size // n, why) for part in stack.parts
            ]
            if None in tails:
                return None
            blocks, insides = zip(*(t for t in tails if t is not None), strict=True)
            for other, inside in zip(heads[1:], insides[1:], strict=True):
                for a, b in zip([*heads[0], insides[0]], [*other, inside], strict=True):
                    unify(a, b, why)
            return [*heads[0], sum_of(list(blocks)), *regroup([insides[0]], new[dim + 1 :], why)]
    return None


@rule("expand")
def _expand(record: Record, call: Call) -> None:
    """What is repeated is the same everywhere, so the new axis may move as it likes."""
    x, out = call["self"], call.out
    axes = record.of(x)
    new = out.dim() - x.dim()
    record.set(
        out,
        [fresh(n) if d < new or x.shape[d - new] != n else axes[d - new] for d, n in enumerate(out.shape)],
    )
    if list(out.shape) == list(x.shape):
        seen_otherwise(record, x, out)


@rule("repeat")
def _repeat(record: Record, call: Call) -> None:
    """The axis is (copy, axis), and the copies are equal."""
    x, out = call["self"], call.out
    axes = [()] * (out.dim() - x.dim()) + record.of(x)
    record.set(out, [(*fresh(n, numbers=True), *axis) for n, axis in zip(call["repeats"], axes, strict=True)])


@rule("select")
def _select(record: Record, call: Call) -> None:
    """One slice by its number."""
    x, dim = call["self"], call["dim"] % call["self"].dim()
    stack = record.stacks.get(id(x))
    if stack is not None and stack.dim == dim:
        record.set(call.out, stack.parts[call["index"]])
    else:
        axes, index = record.of(x), call["index"] % x.shape[dim]
        record.unstacked += flat(axes[dim])
        piece(axes[dim], index, index + 1, call.why)  # the others may still move among themselves
        record.set(call.out, [axis for d, axis in enumerate(axes) if d != dim])
    seen_otherwise(record, x, call.out)


@rule("unbind")
def _unbind(record: Record, call: Call) -> None:
    x, dim = call["self"], call["dim"] % call["self"].dim()
    stack = record.stacks.get(id(x))
    axes = None if stack is not None and stack.dim == dim else record.of(x)
    if axes is not None:
        record.unstacked += flat(axes[dim])
        pin(axes[dim], f"{call.why}: takes slices by number")
    for i, out in enumerate(call.outs):
        if axes is None and stack is not None:
            record.set(out, stack.parts[i])
        elif axes is not None:
            record.set(out, [axis for d, axis in enumerate(axes) if d != dim])
        seen_otherwise(record, x, out)


def _pieces(record: Record, call: Call, dim: int, bounds: Sequence[tuple[int, int]]) -> None:
    x = call["self"]
    stack = record.stacks.get(id(x))
    for out, (start, stop) in zip(call.outs, bounds, strict=True):
        if stack is not None and stack.dim == dim:
            record.set_stack(out, Stack(dim, stack.parts[start:stop]))
        else:
            axes = list(record.of(x))
            whole, axes[dim] = axes[dim], piece(axes[dim], start, stop, call.why)
            record.set(out, axes)
            if not set(leaves(axes[dim])) <= set(leaves(whole)):
                mixed(record, x, out, [dim])
        seen_otherwise(record, x, out)


@rule("slice")
def _slice(record: Record, call: Call) -> None:
    """A piece of an axis; with steps, places by their number."""
    x, dim, step = call["self"], call["dim"] % call["self"].dim(), call["step"]
    n, length = x.shape[dim], call.out.shape[dim]
    start = min(max((call["start"] or 0) + (n if (call["start"] or 0) < 0 else 0), 0), n)
    if step == 1 or length == 1:
        return _pieces(record, call, dim, [(start, start + length)])
    return other_places(record, x, call.out, [dim], f"{call.why}: takes every {step}th")


@rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk")
def _split(record: Record, call: Call) -> None:
    """An axis cut into pieces."""
    dim, start, bounds = call["dim"] % call["self"].dim(), 0, []
    for out in call.outs:
        bounds.append((start, start + out.shape[dim]))
        start += out.shape[dim]
    _pieces(record, call, dim, bounds)


@rule("glu")
def _glu(record: Record, call: Call) -> None:
    """One half of an axis times the sigmoid of the other."""
    x, dim = call["self"], call["dim"] % call["self"].dim()
    axes = list(record.of(x))
    halves = cut(axes[dim], x.shape[dim] // 2)
    if halves is None:
        pin(axes[dim], f"{call.why}: cuts a composite axis")
        halves = (fresh(x.shape[dim] // 2, call.why),) * 2
    unify(*halves, call.why)
    axes[dim] = halves[0]
    record.set(call.out, axes)


@rule("cat")
def _cat(record: Record, call: Call) -> None:
    """Axes laid end to end; the others run together."""
    tensors = [t for t in call["tensors"] if t.numel() or t.dim() > 1]
    dim = call["dim"] % call.out.dim()
    axes = []
    for d in range(call.out.dim()):
        if d == dim:
            axes.append(sum_of([record.of(t)[d] for t in tensors if t.shape[d]] or [record.of(tensors[0])[d]]))
        else:
            for t in tensors[1:]:
                unify(record.of(tensors[0])[d], record.of(t)[d], call.why)
            axes.append(record.of(tensors[0])[d])
    record.set(call.out, axes)


@rule("stack")
def _stack(record: Record, call: Call) -> None:
    parts = tuple(list(record.of(t)) for t in call["tensors"])
    record.set_stack(call.out, Stack(call["dim"] % call.out.dim(), parts))


@rule("constant_pad_nd")
def _pad(record: Record, call: Call) -> None:
    """A constant before and after, the same everywhere."""
    x, pads = call["self"], list(call["pad"])
    axes = list(record.of(x))
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        d = x.dim() - 1 - i
        if before < 0 or after < 0:
            axes[d] = piece(axes[d], max(-before, 0), x.shape[d] - max(-after, 0), call.why)
        ends = [fresh(before)] if before > 0 else [], [fresh(after)] if after > 0 else []
        axes[d] = sum_of([*ends[0], axes[d], *ends[1]])
    record.set(call.out, axes)


@rule("as_strided")
def _as_strided(record: Record, call: Call) -> None:
    """Only where it changes nothing but the strides of axes of size one, as adaptive pooling does in place."""
    x, out = call["self"], call.out
    if list(x.shape) != list(out.shape) or any(
        n > 1 and s != t for n, s, t in zip(x.shape, call["strides_before"], out.stride(), strict=True)
    ):
        return unknown(record, call)
    return record.set(out, record.of(x))


@rule("view_as_complex")
def _as_complex(record: Record, call: Call) -> None:
    *axes, pair = record.of(call["self"])
    pin(pair, f"{call.why}: real and imaginary part")
    record.set(call.out, axes)


@rule("view_as_real")
def _as_real(record: Record, call: Call) -> None:
    record.set(call.out, [*record.of(call["self"]), fresh(2, f"{call.why}: real and imaginary part")])
