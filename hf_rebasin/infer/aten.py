"""A rule per operation: what an ATen call says about the axes of its tensors.

A rule may unify axes that one index runs over, refine them, and pin what depends on an order. It must leave free only
what it knows to be equivariant: moving the inputs along a free axis moves the outputs along it and changes nothing
else. An operation without a rule pins everything it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .record import Call, Operand, Record, Stack
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

Rule: TypeAlias = Callable[[Record, Call], None]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def apply_rule(record: Record, call: Call) -> None:
    """What one call says; in-place variants (`add_`) say what the others do."""
    name = call.name if call.name in RULES else call.name.removesuffix("_")
    one = RULES.get(name, _unknown)
    written = [(out, list(record.of(out))) for out in call.written]
    one(record, call)
    for out, before in written:  # whoever else sees that memory sees what was written
        for old, new in zip(before, record.of(out), strict=True):
            unify(old, new, call.why)
    if one is not _elementwise:
        for out in (out for out in call.outs if id(out) in record.axes):
            record.relate(_labelled(range(out.dim()), record.of(out)))  # it may have lost what something hung on


def _unknown(record: Record, call: Call) -> None:
    why = f"{call.why}, which has no rule"
    record.pin(call.tensors, why)
    for out in call.outs:
        if not any(out is tensor for tensor in call.tensors) or len(record.of(out)) != out.dim():
            record.held(out, why)


# --- one index for each output element ------------------------------------------------------------------------------


@rule(
    """abs acos acosh add addcdiv addcmul alias asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or ceil
    celu clamp clamp_max clamp_min clone contiguous copy cos cosh detach div elu eq erf erfc exp exp2 expm1 fill floor
    floor_divide fmod ge gelu gt hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp lift
    lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid_forward logical_and logical_not logical_or logical_xor
    logit lt masked_fill maximum minimum mish mul nan_to_num native_dropout ne neg pow _prelu_kernel reciprocal relu
    relu6 remainder round rsqrt rsub selu sigmoid sign silu sin sinh softplus softshrink softsign sqrt square sub tan
    tanh tanhshrink threshold _to_copy trunc where zero"""
)
def _elementwise(record: Record, call: Call) -> None:
    """Output [i, j] needs the inputs at [i, j] (or at [j], or [i, 0], by broadcasting): one index per axis."""
    tensors, outs = call.tensors, call.outs
    if len(tensors) == 1:
        stack, uniform = record.stacks.get(id(tensors[0])), record.uniform(tensors[0])
        for out in outs:
            if stack is not None:
                record.set_stack(out, stack)
            else:
                record.set(out, record.of(tensors[0]))
            record.set_uniform(out, uniform)
            if call.name in ("clone", "_to_copy", "alias", "detach"):
                _seen_otherwise(record, tensors[0], out)
        return
    if call.name in ("mul", "mul_"):
        record.gains |= {origin for t in tensors if (origin := record.origin(t)) is not None and t.numel() > 1}
    _share(record, call, [(t, range(-t.dim(), 0)) for t in tensors], [(out, range(-out.dim(), 0)) for out in outs])
    if call.name in ("add", "add_") and all(record.knows(t) and record.origin(t) is None for t in tensors):
        record.roles += [("residual", axis) for axis in record.of(outs[0])]


Labels: TypeAlias = Iterable[Any]


def _share(
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
        operands.append(_labelled(labels, record.of(tensor)))
    record.relate(*operands)


def _contract(
    record: Record, call: Call, terms: Sequence[tuple[Tensor, str]], out: tuple[Tensor, str], batch: str = ""
) -> None:
    """A sum of products over the labels that the output lacks: each of them is one index, in any order."""
    _share(record, call, terms, [out])
    attends = batch and all(record.origin(tensor) is None for tensor, _ in terms)
    for tensor, labels in terms:
        origin = record.origin(tensor)
        for label, axis in zip(labels, record.of(tensor), strict=True):
            if label not in out[1]:
                record.consumed.append(axis)
                if origin is not None:
                    record.readers.append((origin, axis))
            if attends and label in batch:
                record.roles.append(("head", axis))
            elif attends and label in "kj":
                record.roles.append(("qk" if label == "k" else "ov", axis))


@rule("mm")
def _mm(record: Record, call: Call) -> None:
    _contract(record, call, [(call["self"], "ik"), (call["mat2"], "kj")], (call.out, "ij"))


@rule("bmm")
def _bmm(record: Record, call: Call) -> None:
    _contract(record, call, [(call["self"], "nik"), (call["mat2"], "nkj")], (call.out, "nij"), "n")


@rule("mv")
def _mv(record: Record, call: Call) -> None:
    _contract(record, call, [(call["self"], "ik"), (call["vec"], "k")], (call.out, "i"))


@rule("dot vdot")
def _dot(record: Record, call: Call) -> None:
    one, other = call.tensors
    _contract(record, call, [(one, "k"), (other, "k")], (call.out, ""))


def _right(labels: str, tensor: Tensor) -> str:
    """The labels a broadcast summand has: the last ones."""
    return labels[len(labels) - tensor.dim() :]


@rule("addmm")
def _addmm(record: Record, call: Call) -> None:
    _contract(
        record,
        call,
        [(call["mat1"], "ik"), (call["mat2"], "kj"), (call["self"], _right("ij", call["self"]))],
        (call.out, "ij"),
    )


@rule("baddbmm")
def _baddbmm(record: Record, call: Call) -> None:
    terms = [(call["batch1"], "nik"), (call["batch2"], "nkj"), (call["self"], _right("nij", call["self"]))]
    _contract(record, call, terms, (call.out, "nij"), "n")


@rule("linear")
def _linear(record: Record, call: Call) -> None:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    before = "abcdefgh"[: x.dim() - 1]
    terms = [(x, before + "k"), (weight, "jk"), *([(bias, "j")] if bias is not None else [])]
    _contract(record, call, terms, (call.out, before + "j"))


@rule("_trilinear")
def _trilinear(record: Record, call: Call) -> None:
    """Σ x₁ ⊙ x₂ ⊙ x₃ over `sumdim`, after a new dimension has been put into each where `expand` says."""
    n, terms = call["i1"].dim() + len(call["expand1"]), []
    for i in "123":
        new = {d % n for d in call[f"expand{i}"]}
        terms.append((call[f"i{i}"], "".join(c for d, c in enumerate("abcdefgh"[:n]) if d not in new)))
    gone = {d % n for d in call["sumdim"]}
    _contract(record, call, terms, (call.out, "".join(c for d, c in enumerate("abcdefgh"[:n]) if d not in gone)))


@rule("embedding")
def _embedding(record: Record, call: Call) -> None:
    """A row is looked up by its number."""
    weight, indices = record.of(call["weight"]), record.of(call["indices"])
    pin(weight[0], f"{call.why}: rows are looked up by number")
    for axis in indices:
        pin(axis, f"{call.why}: numbers of rows")
    record.set(call.out, [*indices, weight[1]])
    record.relate(_labelled(["row", "in"], weight), _labelled([*range(len(indices)), "in"], record.of(call.out)))
    if (origin := record.origin(call["weight"])) is not None:
        record.looked_up.add(origin)


@rule("_embedding_bag _embedding_bag_forward_only")
def _embedding_bag(record: Record, call: Call) -> None:
    weight = record.of(call["weight"])
    pin(weight[0], f"{call.why}: rows are looked up by number")
    record.pin([t for t in call.tensors if t is not call["weight"]], f"{call.why}: numbers of rows")
    out, *rest = call.outs
    record.set(out, [fresh(out.shape[0], call.why), weight[1]])
    record.relate(_labelled(["row", "in"], weight), _labelled(["bag", "in"], record.of(out)))
    for other in rest:
        record.held(other, call.why)


# --- convolutions and norms -----------------------------------------------------------------------------------------


@rule("convolution")
def _convolution(record: Record, call: Call) -> None:
    """Channels are (group in) and (group out); kernels and places have an order, but a 1×1 kernel has no places."""
    x, w, bias, groups = record.of(call["input"]), record.of(call["weight"]), call["bias"], call["groups"]
    shape, transposed = call["weight"].shape, call["transposed"]
    group, into = regroup([x[1]], [groups, call["input"].shape[1] // groups], call.why)
    first, second = regroup([w[0]], [groups, shape[0] // groups], call.why)
    unify(group, first, call.why)
    unify(into, second if transposed else w[1], call.why)
    record.consumed.append(into)
    out = w[1] if transposed else second
    written: Axis = (*first, *out)
    if bias is not None:
        unify(record.of(bias)[0], written, call.why)
    places = range(2, len(w))
    pointwise = all(n == 1 for n in shape[2:]) and set(call["stride"]) == {1} and not any(call["padding"])
    for d in () if pointwise else places:
        pin(w[d], f"{call.why}: the kernel")
        pin(x[d], f"{call.why}: neighbours")
    size = call.out.shape
    after = [x[d] if pointwise else fresh(size[d], f"{call.why}: neighbours") for d in places]
    record.set(call.out, [x[0], written, *after])
    kernel = tuple(((("kernel", d), w[d]),) for d in places)
    read, write = (("group", group), ("in", into)), (("group", first), ("out", out))
    around = tuple((((d if pointwise else ("from", d)), x[d]),) for d in places)
    further = tuple(((d, axis),) for d, axis in zip(places, after, strict=True))
    if transposed:
        weight = ((("group", first), ("in", second)), (("out", w[1]),), *kernel)
    else:
        weight = (write, (("in", w[1]),), *kernel)
    record.relate(((("n", x[0]),), read, *around), weight, ((("n", x[0]),), write, *further))
    if bias is not None:
        record.relate((write,))
    origin = record.origin(call["weight"])
    if origin is not None:
        record.readers.append((origin, second if transposed else w[1]))


def _labelled(labels: Iterable[Any], axes: Iterable[Axis]) -> Operand:
    """An operand whose axes have one index each."""
    return tuple(((label, axis),) for label, axis in zip(labels, axes, strict=True))


def _mixed(record: Record, x: Tensor, out: Tensor, dims: Iterable[int]) -> None:
    """Along these dimensions an output needs other inputs than that of its own place: they are no longer the index
    that they were, so that nothing outside them may move differently from place to place of theirs."""
    dims = set(dims)
    record.consumed += [axis for d, axis in enumerate(record.of(x)) if d in dims]
    before, after = ([(when, d) if d in dims else d for d in range(x.dim())] for when in ("before", "after"))
    record.relate(_labelled(before, record.of(x)), _labelled(after, record.of(out)))


def _other_places(record: Record, x: Tensor, out: Tensor, dims: Iterable[int], why: str) -> None:
    """Along these dimensions the output has places of its own, which hang on the order of those of x."""
    dims = set(dims)
    axes = record.of(x)
    for d in dims:
        pin(axes[d], why)
    record.set(out, [fresh(out.shape[d], why) if d in dims else axis for d, axis in enumerate(axes)])
    _mixed(record, x, out, dims)


@rule("native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm")
def _batch_norm(record: Record, call: Call) -> None:
    """Each channel has a mean, a variance, a gain and a bias."""
    x = call["input"]
    stats = [call.arguments.get(name) for name in ("running_mean", "running_var")]
    record.gains |= {origin for t in stats if t is not None and (origin := record.origin(t)) is not None}
    affine = [t for t in (call["weight"], call["bias"], *stats) if t is not None]
    labels = ["n", "c", *range(2, x.dim())]
    _share(record, call, [(x, labels), *((t, "c") for t in affine)], [(call.outs[0], labels)])
    if call.arguments.get("training", True):  # statistics of the batch, over all of it
        _mixed(record, x, call.outs[0], [d for d in range(x.dim()) if d != 1])
    for rest in call.outs[1:]:
        record.set(rest, [record.of(x)[1]] if rest.numel() else [fresh(n) for n in rest.shape])


@rule("native_layer_norm _fused_rms_norm")
def _layer_norm(record: Record, call: Call) -> None:
    """Mean and variance over the last axes do not hang on their order."""
    x, n = call["input"], len(call["normalized_shape"])
    affine = [t for t in (call["weight"], call.arguments.get("bias")) if t is not None]
    if call["weight"] is not None and record.origin(call["weight"]) is not None:
        record.gains.add(record.origins[id(call["weight"])])
    out, *stats = call.outs
    record.set(out, record.of(x))
    _mixed(record, x, out, range(x.dim() - n, x.dim()))
    _share(record, call, [(t, range(-t.dim(), 0)) for t in (out, *affine)], [(out, range(-x.dim(), 0))])
    for stat in stats:
        record.set(stat, [*record.of(x)[:-n], *[()] * n])


@rule("native_group_norm")
def _group_norm(record: Record, call: Call) -> None:
    """Channels are (group inside): mean and variance over what is inside and over all places."""
    x, n = call["input"], call["group"]
    batch, channels, *places = record.of(x)
    group, inside = regroup([channels], [n, x.shape[1] // n], call.why)
    labels = ["n", "c", *range(2, x.dim())]
    affine = [t for t in (call["weight"], call["bias"]) if t is not None]
    out, *stats = call.outs
    record.set(out, record.of(x))
    before, after = (
        ((("n", batch),), (("group", group), (when, inside)), *((((when, d), axis),) for d, axis in enumerate(places)))
        for when in ("before", "after")
    )
    record.relate(before, after)
    record.consumed += [inside, *places]
    _share(record, call, [(out, labels), *((t, "c") for t in affine)], [(out, labels)])
    for stat in stats:
        record.held(stat, call.why)


@rule("_weight_norm_interface")
def _weight_norm(record: Record, call: Call) -> None:
    """v · g / ‖v‖, the norm over all axes but one."""
    v, g = call["v"], call["g"]
    labels = range(v.dim())
    out, norms = call.outs
    record.set(out, record.of(v))
    _mixed(record, v, out, [d for d in labels if d != call["dim"] % v.dim()])
    _share(record, call, [(out, labels), (g, labels)], [(out, labels), (norms, labels)])
    _seen_otherwise(record, v, out)
    if record.origin(g) is not None:
        record.gains.add(record.origins[id(g)])


@rule("_softmax _log_softmax _safe_softmax")
def _softmax(record: Record, call: Call) -> None:
    """Numbers along an axis, divided by what does not hang on their order."""
    x = call["self"]
    record.set(call.out, record.of(x))
    _mixed(record, x, call.out, [call["dim"] % max(x.dim(), 1)])


@rule(
    """all amax amin any count_nonzero linalg_vector_norm logsumexp mean nansum norm prod std std_mean sum var
    var_mean"""
)
def _reduction(record: Record, call: Call) -> None:
    """What comes out of an axis does not hang on its order."""
    x = call["self"]
    axes = record.of(x)
    dims = call.arguments.get("dim")
    dims = range(x.dim()) if dims is None or isinstance(dims, bool) or dims == [] else dims
    gone = {d % max(x.dim(), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    keep = bool(call.arguments.get("keepdim"))
    record.consumed += [axes[d] for d in gone if d < len(axes)]
    for out in call.outs:
        record.set(out, [() if d in gone else axis for d, axis in enumerate(axes) if keep or d not in gone])


@rule("max min argmax argmin median mode sort topk argsort kthvalue")
def _position(record: Record, call: Call) -> None:
    """Says where something is, which hangs on the order; without a dimension only how much."""
    x = call["self"]
    dim = call.arguments.get("dim")
    if "other" in call.arguments:
        return _elementwise(record, call)
    if dim is None:
        if call.name.startswith("arg"):
            record.pin([x], call.why)
        record.consumed += record.of(x)
        for out in call.outs:
            record.set(out, [()] * out.dim())
        return None
    dim %= x.dim()
    for out in call.outs:
        if out.dim() < x.dim():
            pin(record.of(x)[dim], call.why)
            record.set(out, [axis for d, axis in enumerate(record.of(x)) if d != dim])
        else:
            _other_places(record, x, out, [dim], call.why)
    return None


# --- places ---------------------------------------------------------------------------------------------------------


@rule(
    """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa
    upsample_trilinear3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
    reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"""
)
def _neighbourhood(record: Record, call: Call) -> None:
    """Every channel for itself; places have an order."""
    x = call.tensors[0]
    places = int(next(c for c in call.name if c.isdigit()))
    for out in call.outs:
        _other_places(record, x, out, range(x.dim() - places, x.dim()), f"{call.why}: neighbours")


@rule("im2col")
def _im2col(record: Record, call: Call) -> None:
    """Channels are (channel, place in the window)."""
    *before, channel, height, width = record.of(call["self"])
    for axis in (height, width):
        pin(axis, f"{call.why}: neighbours")
    window = fresh(math.prod(call["kernel_size"]), f"{call.why}: neighbours")
    record.set(call.out, [*before, (*channel, *window), fresh(call.out.shape[-1], f"{call.why}: neighbours")])
    labels = [*(("n",) if before else ()), "c"]
    read = _labelled([*labels, "height", "width"], record.of(call["self"]))
    record.relate(read, _labelled([*labels, "place"], record.of(call.out)))


@rule("pixel_shuffle")
def _pixel_shuffle(record: Record, call: Call) -> None:
    """Channels are (channel, place in the tile)."""
    *before, channel, height, width = record.of(call["self"])
    kept, tile = regroup([channel], [call.out.shape[-3], call["upscale_factor"] ** 2], call.why)
    for axis in (tile, height, width):
        pin(axis, f"{call.why}: neighbours")
    record.set(call.out, [*before, kept, *(fresh(n, f"{call.why}: neighbours") for n in call.out.shape[-2:])])
    _mixed(record, call["self"], call.out, range(len(before) + 1, call.out.dim()))


@rule("pixel_unshuffle")
def _pixel_unshuffle(record: Record, call: Call) -> None:
    *before, channel, height, width = record.of(call["self"])
    for axis in (height, width):
        pin(axis, f"{call.why}: neighbours")
    tile = fresh(call["downscale_factor"] ** 2, f"{call.why}: neighbours")
    after = (fresh(n, f"{call.why}: neighbours") for n in call.out.shape[-2:])
    record.set(call.out, [*before, (*channel, *tile), *after])
    _mixed(record, call["self"], call.out, range(len(before) + 1, call.out.dim()))


@rule("roll flip cumsum cumprod logcumsumexp triu tril")
def _ordered(record: Record, call: Call) -> None:
    """What comes out at a place hangs on which place it is, and is another place's."""
    x = call["self"]
    dims = call.arguments.get("dims", call.arguments.get("dim", (-1, -2)))
    ordered = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))]
    _other_places(record, x, call.out, ordered, f"{call.why}: has an order")


# --- the same numbers in other brackets -----------------------------------------------------------------------------


def _seen_otherwise(record: Record, x: Tensor, out: Tensor) -> None:
    """A parameter transposed or cut is still that parameter, for names and marks."""
    origin = record.origin(x)
    if origin is not None:
        record.origins[id(out)] = origin


def _permuted(record: Record, x: Tensor, out: Tensor, order: Sequence[int]) -> None:
    stack = record.stacks.get(id(x))
    if stack is None:
        axes = record.of(x)
        record.set(out, [axes[d] for d in order])
    else:
        inside = [d - (d > stack.dim) for d in order if d != stack.dim]
        parts = tuple([part[d] for d in inside] for part in stack.parts)
        record.set_stack(out, Stack(list(order).index(stack.dim), parts))
    _seen_otherwise(record, x, out)


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
    _seen_otherwise(record, x, out)


@rule("view _unsafe_view reshape _reshape_alias unflatten")
def _view(record: Record, call: Call) -> None:
    """Row-major: the same atoms in the same order. A sum of equal blocks that becomes rows is a stack."""
    x, out = call["self"], call.out
    shape = list(out.shape)
    if out.dtype != x.dtype or out.numel() != x.numel():
        return _unknown(record, call)
    _seen_otherwise(record, x, out)
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
        _seen_otherwise(record, x, out)


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
    _seen_otherwise(record, x, call.out)


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
        _seen_otherwise(record, x, out)


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
                _mixed(record, x, out, [dim])
        _seen_otherwise(record, x, out)


@rule("slice")
def _slice(record: Record, call: Call) -> None:
    """A piece of an axis; with steps, places by their number."""
    x, dim, step = call["self"], call["dim"] % call["self"].dim(), call["step"]
    n, length = x.shape[dim], call.out.shape[dim]
    start = min(max((call["start"] or 0) + (n if (call["start"] or 0) < 0 else 0), 0), n)
    if step == 1 or length == 1:
        return _pieces(record, call, dim, [(start, start + length)])
    return _other_places(record, x, call.out, [dim], f"{call.why}: takes every {step}th")


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
        return _unknown(record, call)
    at, axes, labels = _indexed(record, call)
    record.set(call.out, axes)
    before = [("before", d) if d in at else d for d in range(x.dim())]
    return record.relate(_labelled(before, record.of(x)), _labelled(labels, axes))


@rule("index_put _unsafe_index_put")
def _index_put(record: Record, call: Call) -> None:
    """Rows written by their numbers; along the other axes the values are at their own place."""
    x, values = call["self"], call["values"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in call["indices"]):
        return _unknown(record, call)
    _, axes, labels = _indexed(record, call)
    whole = record.of(x)
    given = []
    for axis, d in zip(reversed(record.of(values)), range(-1, -values.dim() - 1, -1), strict=True):
        if values.shape[d] != 1:
            unify(axes[d], axis, call.why)
            given.append(((labels[d], axis),))
    record.set(call.out, whole)
    return record.relate(_labelled(range(x.dim()), whole), tuple(given))


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
    _other_places(record, x, out, {dim, *shorter}, call.why)


@rule("scatter scatter_add index_add index_copy")
def _scatter(record: Record, call: Call) -> None:
    """Written by number along one axis, at their own place along the others."""
    x = call["self"]
    source = next((call.arguments[k] for k in ("src", "source") if isinstance(call.arguments.get(k), Tensor)), None)
    if source is None or source.dim() != x.dim() or call["index"].dim() != x.dim():
        return _unknown(record, call)
    before = record.of(x)
    _along(record, call, source)
    return record.set(call.out, before)


@rule("as_strided")
def _as_strided(record: Record, call: Call) -> None:
    """Only where it changes nothing but the strides of axes of size one, as adaptive pooling does in place."""
    x, out = call["self"], call.out
    if list(x.shape) != list(out.shape) or any(
        n > 1 and s != t for n, s, t in zip(x.shape, call["strides_before"], out.stride(), strict=True)
    ):
        return _unknown(record, call)
    return record.set(out, record.of(x))


@rule("index_select")
def _index_select(record: Record, call: Call) -> None:
    x = call["self"]
    record.pin([call["index"]], f"{call.why}: numbers of rows")
    _other_places(record, x, call.out, [call["dim"] % x.dim()], f"{call.why}: rows are looked up by number")


@rule("view_as_complex")
def _as_complex(record: Record, call: Call) -> None:
    *axes, pair = record.of(call["self"])
    pin(pair, f"{call.why}: real and imaginary part")
    record.set(call.out, axes)


@rule("view_as_real")
def _as_real(record: Record, call: Call) -> None:
    record.set(call.out, [*record.of(call["self"]), fresh(2, f"{call.why}: real and imaginary part")])


@rule(
    """empty empty_like full full_like new_empty new_full new_ones new_zeros ones ones_like scalar_tensor zeros
    zeros_like"""
)
def _filled(record: Record, call: Call) -> None:
    """The same value everywhere (or none yet): any order will do."""
    record.set(call.out, [fresh(n) for n in call.out.shape])
    record.set_uniform(call.out, range(call.out.dim()))


FILLED = frozenset(name for name, one in RULES.items() if one is _filled)
