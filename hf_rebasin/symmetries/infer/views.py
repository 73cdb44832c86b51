"""Rules for rearranging elements: views, slices, stacks, concatenations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .record import AxisRecord, Call, Stack
from .rules import keep_origin, mark_mixed, pin_and_replace, pin_everything, rule
from .unification import (
    Axis,
    axis_size,
    cut_axis,
    flat_atoms,
    fresh_axis,
    leaf_atoms,
    pin,
    regroup,
    slice_axis,
    split_axis,
    sum_of,
    summands,
    unify,
)


def _permute_axes(record: AxisRecord, x: Tensor, out: Tensor, order: Sequence[int]) -> None:
    """Give an output the axes of x, or its stack, in another order."""
    stack = record.stacks.get(id(x))
    if stack is None:
        axes = record.axes_of(x)
        record.set(out, [axes[d] for d in order])
    else:
        inside = [d - (d > stack.dim) for d in order if d != stack.dim]
        parts = tuple([part[d] for d in inside] for part in stack.parts)
        record.set_stack(out, Stack(list(order).index(stack.dim), parts))
    keep_origin(record, x, out)


@rule("t transpose permute")
def _transpose(record: AxisRecord, call: Call) -> None:
    x = call["self"]
    order = list(range(x.dim()))
    if call.name.startswith("permute"):
        order = [d % x.dim() for d in call["dims"]]
    elif x.dim() > 1:
        i, j = (0, 1) if call.name.rstrip("_") == "t" else (call["dim0"], call["dim1"])
        order[i], order[j] = order[j], order[i]
    _permute_axes(record, x, call.out, order)


@rule("unsqueeze squeeze")
def _squeeze(record: AxisRecord, call: Call) -> None:
    """Axes of size one are added or removed."""
    x, out = call["self"], call.out
    stack = record.stacks.get(id(x))
    # not the shape of x, which an in-place variant has changed already
    axes = [*stack.parts[0]] if stack is not None else record.axes_of(x)
    if stack is not None:
        axes.insert(stack.dim, fresh_axis(len(stack.parts)))
    n = len(axes)
    if call.name.startswith("unsqueeze"):
        at = call["dim"] % out.dim()
        kept = [d for d in range(out.dim()) if d != at]  # where the dimensions of x are in the output
    else:
        dims = call.arguments.get("dim")
        dims = range(n) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {d % n for d in dims if n and axis_size(axes[d]) == 1}
        free = iter(range(n))
        kept = [-1 if d in gone else next(free) for d in range(n)]

    def place(axes: Sequence[Axis], positions: Sequence[int], length: int) -> list[Axis]:
        placed: list[Axis] = [()] * length
        for axis, position in zip(axes, positions, strict=True):
            if position >= 0:
                placed[position] = axis
        return placed

    if stack is None:
        record.set(out, place(axes, kept, out.dim()))
    else:
        new = kept[stack.dim]
        positions = [k - (k > new) for d, k in enumerate(kept) if d != stack.dim]
        record.set_stack(out, Stack(new, tuple(place(part, positions, out.dim() - 1) for part in stack.parts)))
    keep_origin(record, x, out)


@rule("view _unsafe_view reshape _reshape_alias unflatten")
def _view(record: AxisRecord, call: Call) -> None:
    """A row-major view has the same atoms in the same order; a sum of equal blocks that becomes rows is a stack."""
    x, out = call["self"], call.out
    shape = list(out.shape)
    if out.dtype != x.dtype or out.numel() != x.numel():
        return pin_everything(record, call)
    keep_origin(record, x, out)
    stack = record.stacks.get(id(x))
    if stack is not None:
        viewed = _view_stack(stack, list(x.shape), shape, call.why)
        if isinstance(viewed, Stack):
            return record.set_stack(out, viewed)
        if viewed is not None:
            return record.set(out, viewed)
    axes = record.axes_of(x)
    atoms = tuple(atom for axis in axes for atom in flat_atoms(axis))
    for at, atom in enumerate(atoms):
        parts = summands(atom)
        if len({axis_size(part) for part in parts}) == 1:
            dim = _dim_after(shape, axis_size(atoms[:at]), len(parts))
            if dim is not None and shape[dim] != atom.size:
                rest = [*shape[:dim], *shape[dim + 1 :]]
                slices = (regroup([(*atoms[:at], *part, *atoms[at + 1 :])], rest, call.why) for part in parts)
                return record.set_stack(out, Stack(dim, tuple(slices)))
    record.set(out, regroup(axes, shape, call.why))
    record.relate(tuple(((0, axis),) for axis in axes), tuple(((0, axis),) for axis in record.axes_of(out)))
    return None


def _dim_after(shape: Sequence[int], before: int, size: int) -> int | None:
    """The dimension of the given size whose preceding dimensions have `before` elements in all, if there is one."""
    for dim, n in enumerate(shape):
        if n == size and math.prod(shape[:dim]) == before:
            return dim
    return None


def _view_stack(stack: Stack, old: Sequence[int], new: list[int], why: str) -> Stack | list[Axis] | None:
    """View a stack in another shape: as a stack, as axes with its slices end to end along one, or neither (None)."""
    n, before = len(stack.parts), math.prod(old[: stack.dim])
    dim = _dim_after(new, before, n)
    if dim is not None:
        rest = [*new[:dim], *new[dim + 1 :]]
        return Stack(dim, tuple(regroup(part, rest, why) for part in stack.parts))
    for dim, size in enumerate(new):
        if math.prod(new[:dim]) == before and size % n == 0:
            heads = [regroup(part[: stack.dim], new[:dim], why) for part in stack.parts]
            tails = [
                split_axis(tuple(atom for axis in part[stack.dim :] for atom in axis), size // n, why)
                for part in stack.parts
            ]
            if None in tails:
                return None
            blocks, insides = zip(*(tail for tail in tails if tail is not None), strict=True)
            for other, inside in zip(heads[1:], insides[1:], strict=True):
                for a, b in zip([*heads[0], insides[0]], [*other, inside], strict=True):
                    unify(a, b, why)
            return [*heads[0], sum_of(list(blocks)), *regroup([insides[0]], new[dim + 1 :], why)]
    return None


@rule("expand")
def _expand(record: AxisRecord, call: Call) -> None:
    """Expanded values are constant along the new axis, which therefore moves freely."""
    x, out = call["self"], call.out
    axes = record.axes_of(x)
    new = out.dim() - x.dim()
    record.set(
        out,
        [fresh_axis(n) if d < new or x.shape[d - new] != n else axes[d - new] for d, n in enumerate(out.shape)],
    )
    if list(out.shape) == list(x.shape):
        keep_origin(record, x, out)


@rule("repeat")
def _repeat(record: AxisRecord, call: Call) -> None:
    """A repeated axis is (copy, axis), and the copies are equal."""
    x, out = call["self"], call.out
    axes = [()] * (out.dim() - x.dim()) + record.axes_of(x)
    record.set(out, [(*fresh_axis(n, numbers=True), *axis) for n, axis in zip(call["repeats"], axes, strict=True)])


@rule("select")
def _select(record: AxisRecord, call: Call) -> None:
    """One slice is taken by number."""
    x, dim = call["self"], call["dim"] % call["self"].dim()
    stack = record.stacks.get(id(x))
    if stack is not None and stack.dim == dim:
        record.set(call.out, stack.parts[call["index"]])
    else:
        axes, index = record.axes_of(x), call["index"] % x.shape[dim]
        record.unstacked += flat_atoms(axes[dim])
        slice_axis(axes[dim], index, index + 1, call.why)  # the other slices may still be permuted
        record.set(call.out, [axis for d, axis in enumerate(axes) if d != dim])
    keep_origin(record, x, call.out)


@rule("unbind")
def _unbind(record: AxisRecord, call: Call) -> None:
    x, dim = call["self"], call["dim"] % call["self"].dim()
    stack = record.stacks.get(id(x))
    axes = None if stack is not None and stack.dim == dim else record.axes_of(x)
    if axes is not None:
        record.unstacked += flat_atoms(axes[dim])
        pin(axes[dim], f"{call.why}: takes slices by number")
    for i, out in enumerate(call.outs):
        if axes is None and stack is not None:
            record.set(out, stack.parts[i])
        elif axes is not None:
            record.set(out, [axis for d, axis in enumerate(axes) if d != dim])
        keep_origin(record, x, out)


def _slice_dim(record: AxisRecord, call: Call, dim: int, bounds: Sequence[tuple[int, int]]) -> None:
    """Give each output its slice [start, stop) of a dimension."""
    x = call["self"]
    stack = record.stacks.get(id(x))
    for out, (start, stop) in zip(call.outs, bounds, strict=True):
        if stack is not None and stack.dim == dim:
            record.set_stack(out, Stack(dim, stack.parts[start:stop]))
        else:
            axes = list(record.axes_of(x))
            whole, axes[dim] = axes[dim], slice_axis(axes[dim], start, stop, call.why)
            record.set(out, axes)
            if not set(leaf_atoms(axes[dim])) <= set(leaf_atoms(whole)):
                mark_mixed(record, x, out, [dim])
        keep_origin(record, x, out)


@rule("slice")
def _slice(record: AxisRecord, call: Call) -> None:
    """One slice of an axis; with a step, positions are picked by number."""
    x, dim, step = call["self"], call["dim"] % call["self"].dim(), call["step"]
    n, length = x.shape[dim], call.out.shape[dim]
    start = min(max((call["start"] or 0) + (n if (call["start"] or 0) < 0 else 0), 0), n)
    if step == 1 or length == 1:
        return _slice_dim(record, call, dim, [(start, start + length)])
    return pin_and_replace(record, x, call.out, [dim], f"{call.why}: takes every {step}th")


@rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk")
def _split(record: AxisRecord, call: Call) -> None:
    """An axis is cut into several."""
    dim, start, bounds = call["dim"] % call["self"].dim(), 0, []
    for out in call.outs:
        bounds.append((start, start + out.shape[dim]))
        start += out.shape[dim]
    _slice_dim(record, call, dim, bounds)


@rule("glu")
def _glu(record: AxisRecord, call: Call) -> None:
    """One half of an axis is multiplied by the sigmoid of the other."""
    x, dim = call["self"], call["dim"] % call["self"].dim()
    axes = list(record.axes_of(x))
    halves = cut_axis(axes[dim], x.shape[dim] // 2)
    if halves is None:
        pin(axes[dim], f"{call.why}: cuts a composite axis")
        halves = (fresh_axis(x.shape[dim] // 2, call.why),) * 2
    unify(*halves, call.why)
    axes[dim] = halves[0]
    record.set(call.out, axes)


@rule("cat")
def _cat(record: AxisRecord, call: Call) -> None:
    """The concatenated axis is a sum; all others are unified."""
    tensors = [t for t in call["tensors"] if t.numel() or t.dim() > 1]
    dim = call["dim"] % call.out.dim()
    axes = []
    for d in range(call.out.dim()):
        if d == dim:
            axes.append(
                sum_of([record.axes_of(t)[d] for t in tensors if t.shape[d]] or [record.axes_of(tensors[0])[d]])
            )
        else:
            for t in tensors[1:]:
                unify(record.axes_of(tensors[0])[d], record.axes_of(t)[d], call.why)
            axes.append(record.axes_of(tensors[0])[d])
    record.set(call.out, axes)


@rule("stack")
def _stack(record: AxisRecord, call: Call) -> None:
    parts = tuple(list(record.axes_of(t)) for t in call["tensors"])
    record.set_stack(call.out, Stack(call["dim"] % call.out.dim(), parts))


@rule("constant_pad_nd")
def _pad(record: AxisRecord, call: Call) -> None:
    """Padding adds constants before and after an axis, which are free to move."""
    x, pads = call["self"], list(call["pad"])
    axes = list(record.axes_of(x))
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        d = x.dim() - 1 - i
        if before < 0 or after < 0:
            axes[d] = slice_axis(axes[d], max(-before, 0), x.shape[d] - max(-after, 0), call.why)
        starts, ends = [fresh_axis(before)] if before > 0 else [], [fresh_axis(after)] if after > 0 else []
        axes[d] = sum_of([*starts, axes[d], *ends])
    record.set(call.out, axes)


@rule("as_strided")
def _as_strided(record: AxisRecord, call: Call) -> None:
    """Supported only where it changes just the strides of axes of size one, as adaptive pooling does in place."""
    x, out = call["self"], call.out
    if list(x.shape) != list(out.shape) or any(
        n > 1 and s != t for n, s, t in zip(x.shape, call["strides_before"], out.stride(), strict=True)
    ):
        return pin_everything(record, call)
    return record.set(out, record.axes_of(x))


@rule("view_as_complex")
def _as_complex(record: AxisRecord, call: Call) -> None:
    *axes, pair = record.axes_of(call["self"])
    pin(pair, f"{call.why}: real and imaginary part")
    record.set(call.out, axes)


@rule("view_as_real")
def _as_real(record: AxisRecord, call: Call) -> None:
    record.set(call.out, [*record.axes_of(call["self"]), fresh_axis(2, f"{call.why}: real and imaginary part")])
