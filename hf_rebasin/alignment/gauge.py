"""Gauges: function-preserving rewrites of the norms between a rotated stream and its readers.

A norm with gain g and bias b is read by linear maps W with biases c. *Folding* moves the gain into the readers, which
become W diag(g), c + W b. The stream may then be rotated, because it is normalised before anything else reads it. In
the *gauge* of another model with gain g' and bias b', the norm is g', b', and the readers compensate for it:
W diag(g) / g', c + W b - W diag(g) (b' / g'). A folded model is in the gauge 1, 0. Where some reader has no bias that
could absorb b, as is common for heads, the norm keeps it, as b / g · g'.

Folding gains is exact, as in SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024, 3.1). Because readers can compensate
for the norms of another model, the other model need not be folded: the fixed model stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checkpoints.lazy import Computed, InMemory, Lazy, Tensors, lazy_parts
from ..checkpoints.precision import compute_dtype, in_torch_layout, rounded, sum_dtype
from ..errors import SpecError
from ..symmetries.patterns import DIAGONAL, Leaf
from ..symmetries.spec import LabelledTensor, Norm, Spec
from .elements.matrices import NEGLIGIBLE
from .groups import Element

MIN_RELATIVE_GAIN = 1e-4  # of the largest gain of a norm; nothing is divided by less


@dataclass(frozen=True)
class Reader:
    """A linear map that reads a norm."""

    weight: str
    bias: str | None
    axis: int  # the axis of its weight that reads the stream


@dataclass(frozen=True)
class Gauge:
    """A norm and those of its readers that are stored.

    Args:
        norm: the norm.
        readers: the linear maps that read it.
        keeps: whether the norm keeps its bias, because some reader has none to absorb it.
    """

    norm: Norm
    readers: tuple[Reader, ...]
    keeps: bool

    @property
    def keys(self) -> list[str]:
        """The keys of the norm's gain and bias."""
        return [self.norm.gain] if self.norm.bias is None else [self.norm.gain, self.norm.bias]

    @property
    def shifted_biases(self) -> list[str]:
        """The keys of the readers' biases, where they absorb the norm's bias."""
        shifts = self.norm.bias is not None and not self.keeps
        return [reader.bias for reader in self.readers if shifts and reader.bias is not None]

    def divides(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the bias, if the norm keeps it, can be divided by the gain."""
        if not self.keeps:
            return True
        gain = state[self.norm.gain].double()
        return torch.equal(_divisor(gain), gain)


def find_gauges(spec: Spec) -> list[Gauge]:
    """Find the norms of all streams that can be rotated, with their readers."""
    tensors = {key: tensor for tensor in spec.tensors for key in tensor.keys.values()} if spec.gauged else {}
    gauges = []
    for norm in spec.gauged:
        # a head that is not merged has no tensor in the spec
        readers = tuple(_make_reader(spec, norm, key, tensors[key]) for key in norm.readers if key in tensors)
        some_unbiased = any(_bias_of(key) not in spec.shapes for key in norm.readers)
        gauges.append(Gauge(norm, readers, norm.bias is not None and some_unbiased))
    return gauges


def gauge_vectors(gauges: Sequence[Gauge], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gauge of a model in float64: its gains, kept away from 0 so as to divide by them, and its biases."""
    vectors = {}
    for gauge in gauges:
        vectors[gauge.norm.gain] = _divisor(state[gauge.norm.gain].double().cpu())
        if gauge.norm.bias is not None and not gauge.keeps:
            vectors[gauge.norm.bias] = state[gauge.norm.bias].double().cpu()
    return vectors


def fold_gains(
    gauges: Sequence[Gauge],
    parts: Mapping[str, Lazy],
    elements: Mapping[str, Element],
    target: Mapping[str, Tensor] | None = None,
) -> dict[str, Lazy]:
    """Fold the gains of norms into their readers.

    Args:
        gauges: the norms.
        parts: the tensors of the model by canonical keys; readers and shifted biases have gone through `upcast`.
        elements: the elements that will act afterwards, `{symmetry: element}`.
        target: the gauge that `unfold_gains` will give the model; biases compensate for it here. None for 1, 0.
    """
    out = dict(parts)
    for gauge in gauges:
        norm, element = gauge.norm, elements.get(gauge.norm.stream)
        gain = parts[norm.gain].read().double().cpu()
        out[norm.gain] = InMemory.of(torch.ones_like(gain), owned=True)
        if norm.bias is not None:
            bias = parts[norm.bias].read().double().cpu()
            kept_bias = bias / _divisor(gain) if gauge.keeps else torch.zeros_like(bias)
            out[norm.bias] = InMemory.of(kept_bias, owned=True)
            if not gauge.keeps:
                if target is not None:
                    shift = target[norm.bias] / target[norm.gain]
                    bias = bias - gain * (shift if element is None else element.inverse().act(shift))
                for reader in gauge.readers:
                    if reader.bias is not None:
                        old, weight = parts[reader.bias], parts[reader.weight]
                        add = partial(_add_product, axis=reader.axis, vector=bias)
                        out[reader.bias] = Computed(old.shape, old.dtype, [old, weight], add)
        for reader in gauge.readers:
            out[reader.weight] = _multiply(parts[reader.weight], reader.axis, gain)
    return out


def unfold_gains(gauges: Sequence[Gauge], parts: Mapping[str, Lazy], target: Mapping[str, Tensor]) -> dict[str, Lazy]:
    """Bring a folded model into the gauge `target`: divide its readers by the new gains of its norms."""
    out = dict(parts)
    for gauge in gauges:
        gain = target[gauge.norm.gain]
        out[gauge.norm.gain] = InMemory.of(gain, owned=True)
        if gauge.norm.bias is not None:
            bias = out[gauge.norm.bias].read() * gain if gauge.keeps else target[gauge.norm.bias]
            out[gauge.norm.bias] = InMemory.of(bias, owned=True)
        for reader in gauge.readers:
            out[reader.weight] = _multiply(out[reader.weight], reader.axis, 1 / gain)
    return out


def fold_state(spec: Spec, state: Mapping[str, Tensor], *, centre: bool = False) -> Tensors:
    """Fold all gains of a model into their readers, in float32 or the model's own wider dtype.

    With `centre`, the means that LayerNorms remove are removed as well. Such a state is for comparisons only, because
    a bias that a norm keeps is read after the LayerNorm.
    """
    parts = lazy_parts(state)
    folded = fold_gains(find_gauges(spec), {key: upcast(part) for key, part in parts.items()}, {})
    if centre:
        folded = remove_means(spec, folded)
    return Tensors({key: downcast(part, compute_dtype(parts[key].dtype)) for key, part in folded.items()})


def upcast(part: Lazy) -> Lazy:
    """Cast a tensor to the dtype in which moving it is computed."""
    wide = sum_dtype(part.dtype)
    return part if part.dtype == wide else Computed(part.shape, wide, [part], _upcast)


def downcast(part: Lazy, dtype: torch.dtype) -> Lazy:
    """Cast a tensor to the dtype it is stored in, rounding once."""
    return part if part.dtype == dtype else Computed(part.shape, dtype, [part], partial(_downcast, dtype=dtype))


def remove_means(spec: Spec, parts: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Remove from a folded model what its LayerNorms would: the means along centred streams."""
    out = dict(parts)
    for tensor in spec.tensors:
        for axis, node in enumerate(tensor.axes[len(next(iter(tensor.keys))) :]):
            if not isinstance(node, Leaf) or not node.name or node.mark == DIAGONAL:  # folded gains are 1
                continue
            if spec.symmetries[node.name].kind == "centred":
                for key in tensor.keys.values():
                    out[key] = Computed(out[key].shape, out[key].dtype, [out[key]], partial(_subtract_mean, axis=axis))
    return out


def _make_reader(spec: Spec, norm: Norm, key: str, tensor: LabelledTensor) -> Reader:
    axis = stream_axis(tensor, norm.stream)
    bias = _bias_of(key)
    if bias not in spec.shapes:
        return Reader(key, None, axis)
    shape = spec.shapes[key]
    outputs = [n for i, n in enumerate(shape) if i != axis]
    if torch.Size(outputs).numel() != torch.Size(spec.shapes[bias]).numel():
        raise SpecError(
            f"{key} {shape} reads {norm.gain}, but its bias {spec.shapes[bias]} does not have one number for each of "
            "its outputs, so the norm's bias cannot be folded into it"
        )
    return Reader(key, bias, axis)


def _divisor(gain: Tensor) -> Tensor:
    """Return a gain without values that are too small to divide by."""
    least = MIN_RELATIVE_GAIN * gain.abs().max().clamp_min(NEGLIGIBLE)
    return torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)


def _bias_of(key: str) -> str:
    return f"{key.removesuffix('.weight')}.bias"


def stream_axis(tensor: LabelledTensor, stream: str) -> int:
    """Return the axis of a reader's weight that reads the stream."""
    axes = tensor.axes[len(next(iter(tensor.keys))) :]  # without the axes over keys
    positions = [i for i, axis in enumerate(axes) if isinstance(axis, Leaf) and axis.name == stream]
    if len(positions) != 1:
        raise SpecError(
            f"{tensor.key} {tensor.shape}: expected one axis {stream!r}, but row {tensor.row!r} has {positions}"
        )
    return positions[0]


def _along(vector: Tensor, x: Tensor, axis: int) -> Tensor:
    return vector.to(x.device, x.dtype).reshape([-1 if i == axis else 1 for i in range(x.dim())])


def _multiply(part: Lazy, axis: int, vector: Tensor) -> Lazy:
    return Computed(part.shape, part.dtype, [part], partial(_scale, axis=axis, vector=vector))


def _scale(inputs: Sequence[Tensor], axis: int, vector: Tensor) -> Tensor:
    return inputs[0] * _along(vector, inputs[0], axis)


def _add_product(inputs: Sequence[Tensor], axis: int, vector: Tensor) -> Tensor:
    """Return c + W v."""
    bias, weight = inputs
    flat = weight.movedim(axis, -1)
    rows = in_torch_layout(flat.reshape(-1, flat.shape[-1]))
    return bias + (rows @ in_torch_layout(vector.to(weight.device, weight.dtype))).reshape(bias.shape).to(bias.dtype)


def _subtract_mean(inputs: Sequence[Tensor], axis: int) -> Tensor:
    return inputs[0] - inputs[0].mean(axis, keepdim=True)


def _upcast(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0].to(sum_dtype(inputs[0].dtype))


def _downcast(inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return rounded(inputs[0], dtype)
