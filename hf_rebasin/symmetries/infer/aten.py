"""One rule per operation: what an ATen call implies for the axes of its tensors.

A rule may unify axes that share an index, refine them, and pin those on whose order something depends. It may leave
an axis free only if the operation is equivariant: moving the inputs along that axis moves the outputs along it and
changes nothing else. An operation without a rule pins everything it touches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from . import indexing, views  # noqa: F401 (they register their rules)
from .record import AxisRecord, Call
from .rules import RULES, keep_origin, labelled, mark_mixed, pin_and_replace, pin_everything, rule, unify_labels
from .unification import Axis, fresh_axis, pin, regroup, unify


def apply_rule(record: AxisRecord, call: Call) -> None:
    """Apply the rule of an operation to one call; an in-place variant (`add_`) has the rule of the other (`add`)."""
    name = call.name if call.name in RULES else call.name.removesuffix("_")
    apply = RULES.get(name, pin_everything)
    written = [(out, list(record.axes_of(out))) for out in call.written]
    uniform = {id(tensor): record.uniform_dims(tensor) for tensor in call.tensors}
    apply(record, call)
    record.add_step(call, uniform)
    for out, before in written:  # views of the same memory see what was written
        for old, new in zip(before, record.axes_of(out), strict=True):
            unify(old, new, call.why)
    if apply is not _elementwise:
        for out in (out for out in call.outs if id(out) in record.axes):
            record.relate(labelled(range(out.dim()), record.axes_of(out)))  # an outer axis of a nesting may be gone


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
def _elementwise(record: AxisRecord, call: Call) -> None:
    """Output [i, j] depends on the inputs at [i, j] (with broadcasting, at [j] or [i, 0]): one index per axis."""
    tensors, outs = call.tensors, call.outs
    if len(tensors) == 1:
        stack, uniform = record.stacks.get(id(tensors[0])), record.uniform_dims(tensors[0])
        for out in outs:
            if stack is not None:
                record.set_stack(out, stack)
            else:
                record.set(out, record.axes_of(tensors[0]))
            record.set_uniform(out, uniform)
            if call.name in ("clone", "_to_copy", "alias", "detach"):
                keep_origin(record, tensors[0], out)
        return
    if call.name in ("mul", "mul_"):
        record.gains |= {origin for t in tensors if (origin := record.origin_of(t)) is not None and t.numel() > 1}
    unify_labels(
        record, call, [(t, range(-t.dim(), 0)) for t in tensors], [(out, range(-out.dim(), 0)) for out in outs]
    )
    if call.name in ("add", "add_") and all(record.knows(t) and record.origin_of(t) is None for t in tensors):
        record.roles += [("residual", axis) for axis in record.axes_of(outs[0])]


def _contract(
    record: AxisRecord, call: Call, terms: Sequence[tuple[Tensor, str]], out: tuple[Tensor, str], batch: str = ""
) -> None:
    """Apply a sum of products over the labels that the output lacks, each of which is one index, in any order."""
    unify_labels(record, call, terms, [out])
    attends = batch and all(record.origin_of(tensor) is None for tensor, _ in terms)
    for tensor, labels in terms:
        origin = record.origin_of(tensor)
        for label, axis in zip(labels, record.axes_of(tensor), strict=True):
            if label not in out[1]:
                record.consumed.append(axis)
                if origin is not None:
                    record.readers.append((origin, axis))
            if attends and label in batch:
                record.roles.append(("head", axis))
            elif attends and label in "kj":
                record.roles.append(("qk" if label == "k" else "ov", axis))


@rule("mm")
def _mm(record: AxisRecord, call: Call) -> None:
    _contract(record, call, [(call["self"], "ik"), (call["mat2"], "kj")], (call.out, "ij"))


@rule("bmm")
def _bmm(record: AxisRecord, call: Call) -> None:
    _contract(record, call, [(call["self"], "nik"), (call["mat2"], "nkj")], (call.out, "nij"), "n")


@rule("mv")
def _mv(record: AxisRecord, call: Call) -> None:
    _contract(record, call, [(call["self"], "ik"), (call["vec"], "k")], (call.out, "i"))


@rule("dot vdot")
def _dot(record: AxisRecord, call: Call) -> None:
    x, y = call.tensors
    _contract(record, call, [(x, "k"), (y, "k")], (call.out, ""))


def _last_labels(labels: str, tensor: Tensor) -> str:
    """The labels of a broadcast summand, which are the last ones of the output."""
    return labels[len(labels) - tensor.dim() :]


@rule("addmm")
def _addmm(record: AxisRecord, call: Call) -> None:
    _contract(
        record,
        call,
        [(call["mat1"], "ik"), (call["mat2"], "kj"), (call["self"], _last_labels("ij", call["self"]))],
        (call.out, "ij"),
    )


@rule("baddbmm")
def _baddbmm(record: AxisRecord, call: Call) -> None:
    terms = [(call["batch1"], "nik"), (call["batch2"], "nkj"), (call["self"], _last_labels("nij", call["self"]))]
    _contract(record, call, terms, (call.out, "nij"), "n")


@rule("linear")
def _linear(record: AxisRecord, call: Call) -> None:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    before = "abcdefgh"[: x.dim() - 1]
    terms = [(x, before + "k"), (weight, "jk"), *([(bias, "j")] if bias is not None else [])]
    _contract(record, call, terms, (call.out, before + "j"))


@rule("_trilinear")
def _trilinear(record: AxisRecord, call: Call) -> None:
    """Σ x₁ ⊙ x₂ ⊙ x₃ over `sumdim`, each factor with new dimensions where its `expand` has them."""
    n, terms = call["i1"].dim() + len(call["expand1"]), []
    for i in "123":
        new = {d % n for d in call[f"expand{i}"]}
        terms.append((call[f"i{i}"], "".join(c for d, c in enumerate("abcdefgh"[:n]) if d not in new)))
    gone = {d % n for d in call["sumdim"]}
    _contract(record, call, terms, (call.out, "".join(c for d, c in enumerate("abcdefgh"[:n]) if d not in gone)))


# --- convolutions and norms -----------------------------------------------------------------------------------------


@rule("convolution")
def _convolution(record: AxisRecord, call: Call) -> None:
    """Channels are (group in) and (group out); kernels and positions have an order, except for a 1×1 kernel."""
    x, w, bias, groups = record.axes_of(call["input"]), record.axes_of(call["weight"]), call["bias"], call["groups"]
    shape, transposed = call["weight"].shape, call["transposed"]
    group, into = regroup([x[1]], [groups, call["input"].shape[1] // groups], call.why)
    first, second = regroup([w[0]], [groups, shape[0] // groups], call.why)
    unify(group, first, call.why)
    unify(into, second if transposed else w[1], call.why)
    record.consumed.append(into)
    out = w[1] if transposed else second
    written: Axis = (*first, *out)
    if bias is not None:
        unify(record.axes_of(bias)[0], written, call.why)
    positions = range(2, len(w))
    pointwise = all(n == 1 for n in shape[2:]) and set(call["stride"]) == {1} and not any(call["padding"])
    for d in () if pointwise else positions:
        pin(w[d], f"{call.why}: the kernel")
        pin(x[d], f"{call.why}: neighbours")
    size = call.out.shape
    after = [x[d] if pointwise else fresh_axis(size[d], f"{call.why}: neighbours") for d in positions]
    record.set(call.out, [x[0], written, *after])
    kernel = tuple(((("kernel", d), w[d]),) for d in positions)
    read, write = (("group", group), ("in", into)), (("group", first), ("out", out))
    around = tuple((((d if pointwise else ("from", d)), x[d]),) for d in positions)
    further = tuple(((d, axis),) for d, axis in zip(positions, after, strict=True))
    if transposed:
        weight = ((("group", first), ("in", second)), (("out", w[1]),), *kernel)
    else:
        weight = (write, (("in", w[1]),), *kernel)
    record.relate(((("n", x[0]),), read, *around), weight, ((("n", x[0]),), write, *further))
    if bias is not None:
        record.relate((write,))
    origin = record.origin_of(call["weight"])
    if origin is not None:
        record.readers.append((origin, second if transposed else w[1]))


@rule("native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm")
def _batch_norm(record: AxisRecord, call: Call) -> None:
    """Each channel has a mean, a variance, a gain and a bias."""
    x = call["input"]
    stats = [call.arguments.get(name) for name in ("running_mean", "running_var")]
    record.gains |= {origin for t in stats if t is not None and (origin := record.origin_of(t)) is not None}
    affine = [t for t in (call["weight"], call["bias"], *stats) if t is not None]
    labels = ["n", "c", *range(2, x.dim())]
    unify_labels(record, call, [(x, labels), *((t, "c") for t in affine)], [(call.outs[0], labels)])
    if call.arguments.get("training", True):  # the statistics are those of the batch
        mark_mixed(record, x, call.outs[0], [d for d in range(x.dim()) if d != 1])
    for rest in call.outs[1:]:
        record.set(rest, [record.axes_of(x)[1]] if rest.numel() else [fresh_axis(n) for n in rest.shape])


@rule("native_layer_norm _fused_rms_norm")
def _layer_norm(record: AxisRecord, call: Call) -> None:
    """Mean and variance over the last axes do not depend on their order."""
    x, n = call["input"], len(call["normalized_shape"])
    affine = [t for t in (call["weight"], call.arguments.get("bias")) if t is not None]
    if call["weight"] is not None and record.origin_of(call["weight"]) is not None:
        record.gains.add(record.origins[id(call["weight"])])
    out, *stats = call.outs
    record.set(out, record.axes_of(x))
    mark_mixed(record, x, out, range(x.dim() - n, x.dim()))
    unify_labels(record, call, [(t, range(-t.dim(), 0)) for t in (out, *affine)], [(out, range(-x.dim(), 0))])
    for stat in stats:
        record.set(stat, [*record.axes_of(x)[:-n], *[()] * n])


@rule("native_group_norm")
def _group_norm(record: AxisRecord, call: Call) -> None:
    """Channels are (group inside): mean and variance are over the channels inside a group and all positions."""
    x, n = call["input"], call["group"]
    batch, channels, *positions = record.axes_of(x)
    group, inside = regroup([channels], [n, x.shape[1] // n], call.why)
    labels = ["n", "c", *range(2, x.dim())]
    affine = [t for t in (call["weight"], call["bias"]) if t is not None]
    out, *stats = call.outs
    record.set(out, record.axes_of(x))
    before, after = (
        (
            (("n", batch),),
            (("group", group), (when, inside)),
            *((((when, d), axis),) for d, axis in enumerate(positions)),
        )
        for when in ("before", "after")
    )
    record.relate(before, after)
    record.consumed += [inside, *positions]
    unify_labels(record, call, [(out, labels), *((t, "c") for t in affine)], [(out, labels)])
    for stat in stats:
        record.set_pinned(stat, call.why)


@rule("_weight_norm_interface")
def _weight_norm(record: AxisRecord, call: Call) -> None:
    """v · g / ‖v‖, with the norm over all axes but one."""
    v, g = call["v"], call["g"]
    labels = range(v.dim())
    out, norms = call.outs
    record.set(out, record.axes_of(v))
    mark_mixed(record, v, out, [d for d in labels if d != call["dim"] % v.dim()])
    unify_labels(record, call, [(out, labels), (g, labels)], [(out, labels), (norms, labels)])
    keep_origin(record, v, out)
    if record.origin_of(g) is not None:
        record.gains.add(record.origins[id(g)])


@rule("_softmax _log_softmax _safe_softmax")
def _softmax(record: AxisRecord, call: Call) -> None:
    """Values along an axis are divided by a sum, which does not depend on their order."""
    x = call["self"]
    record.set(call.out, record.axes_of(x))
    mark_mixed(record, x, call.out, [call["dim"] % max(x.dim(), 1)])


@rule(
    """all amax amin any count_nonzero linalg_vector_norm logsumexp mean nansum norm prod std std_mean sum var
    var_mean"""
)
def _reduction(record: AxisRecord, call: Call) -> None:
    """The result does not depend on the order along the reduced axes."""
    x = call["self"]
    axes = record.axes_of(x)
    dims = call.arguments.get("dim")
    dims = range(x.dim()) if dims is None or isinstance(dims, bool) or dims == [] else dims
    gone = {d % max(x.dim(), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    keep = bool(call.arguments.get("keepdim"))
    record.consumed += [axes[d] for d in gone if d < len(axes)]
    for out in call.outs:
        record.set(out, [() if d in gone else axis for d, axis in enumerate(axes) if keep or d not in gone])


@rule("max min argmax argmin median mode sort topk argsort kthvalue")
def _position(record: AxisRecord, call: Call) -> None:
    """A position along `dim` depends on the order there; without `dim` the value alone does not."""
    x = call["self"]
    dim = call.arguments.get("dim")
    if "other" in call.arguments:
        return _elementwise(record, call)
    if dim is None:
        if call.name.startswith("arg"):
            record.pin([x], call.why)
        record.consumed += record.axes_of(x)
        for out in call.outs:
            record.set(out, [()] * out.dim())
        return None
    dim %= x.dim()
    for out in call.outs:
        if out.dim() < x.dim():
            pin(record.axes_of(x)[dim], call.why)
            record.set(out, [axis for d, axis in enumerate(record.axes_of(x)) if d != dim])
        else:
            pin_and_replace(record, x, out, [dim], call.why)
    return None


# --- positions ------------------------------------------------------------------------------------------------------


@rule(
    """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa
    upsample_trilinear3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
    reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"""
)
def _neighbourhood(record: AxisRecord, call: Call) -> None:
    """Every channel is treated on its own; positions have an order."""
    x = call.tensors[0]
    spatial = int(next(c for c in call.name if c.isdigit()))
    for out in call.outs:
        pin_and_replace(record, x, out, range(x.dim() - spatial, x.dim()), f"{call.why}: neighbours")


@rule("im2col")
def _im2col(record: AxisRecord, call: Call) -> None:
    """The new channels are (channel, position in the window)."""
    *before, channel, height, width = record.axes_of(call["self"])
    for axis in (height, width):
        pin(axis, f"{call.why}: neighbours")
    window = fresh_axis(math.prod(call["kernel_size"]), f"{call.why}: neighbours")
    record.set(call.out, [*before, (*channel, *window), fresh_axis(call.out.shape[-1], f"{call.why}: neighbours")])
    labels = [*(("n",) if before else ()), "c"]
    read = labelled([*labels, "height", "width"], record.axes_of(call["self"]))
    record.relate(read, labelled([*labels, "position"], record.axes_of(call.out)))


@rule("pixel_shuffle")
def _pixel_shuffle(record: AxisRecord, call: Call) -> None:
    """The old channels are (channel, position in the tile)."""
    *before, channel, height, width = record.axes_of(call["self"])
    kept, tile = regroup([channel], [call.out.shape[-3], call["upscale_factor"] ** 2], call.why)
    for axis in (tile, height, width):
        pin(axis, f"{call.why}: neighbours")
    record.set(call.out, [*before, kept, *(fresh_axis(n, f"{call.why}: neighbours") for n in call.out.shape[-2:])])
    mark_mixed(record, call["self"], call.out, range(len(before) + 1, call.out.dim()))


@rule("pixel_unshuffle")
def _pixel_unshuffle(record: AxisRecord, call: Call) -> None:
    *before, channel, height, width = record.axes_of(call["self"])
    for axis in (height, width):
        pin(axis, f"{call.why}: neighbours")
    tile = fresh_axis(call["downscale_factor"] ** 2, f"{call.why}: neighbours")
    after = (fresh_axis(n, f"{call.why}: neighbours") for n in call.out.shape[-2:])
    record.set(call.out, [*before, (*channel, *tile), *after])
    mark_mixed(record, call["self"], call.out, range(len(before) + 1, call.out.dim()))


@rule("roll flip cumsum cumprod logcumsumexp triu tril")
def _ordered(record: AxisRecord, call: Call) -> None:
    """The output at a position depends on which position it is, and on inputs at other positions."""
    x = call["self"]
    dims = call.arguments.get("dims", call.arguments.get("dim", (-1, -2)))
    ordered = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))]
    pin_and_replace(record, x, call.out, ordered, f"{call.why}: has an order")


@rule(
    """empty empty_like full full_like new_empty new_full new_ones new_zeros ones ones_like scalar_tensor zeros
    zeros_like"""
)
def _filled(record: AxisRecord, call: Call) -> None:
    """A constant tensor (or one not written yet) looks the same in any order."""
    record.set(call.out, [fresh_axis(n) for n in call.out.shape])
    record.set_uniform(call.out, range(call.out.dim()))


FILLED = frozenset(name for name, function in RULES.items() if function is _filled)
