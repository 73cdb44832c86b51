"""Gauges: function-preserving rewrites of the norms between a rotated stream and its readers.

A norm with gain g and bias b is read by linear maps W with biases c. *Folded*, the gain is in the readers:
W diag(g), c + W b, and the stream may be rotated, as it is normalised before anything else sees it. In the *gauge* of
another model with gain g' and bias b', the readers make up for these: W diag(g) / g', c + W b - W diag(g) (b' / g'),
and the norm is g', b'. A folded model is one in the gauge 1, 0. Where a reader has no bias that could take b, as a
head often has none, the norm keeps it, as b / g · g'.

Folding gains is exact as in SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024, 3.1); that the readers can make up for
the norms of another model, so that this other model need not be folded, is why one of two can stay as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checkpoints.lazy import Computed, Here, Lazy, Tensors, parts_of
from ..checkpoints.precision import laid_out, rounded, wide
from ..errors import SpecError
from ..symmetries.patterns import DIAGONAL, Leaf
from ..symmetries.spec import Labelled, Norm, Spec
from .elements.matrices import TINY
from .groups import Element

SMALL = 1e-4  # of the largest gain: nothing is divided by less


@dataclass(frozen=True)
class Reader:
    """A linear map that reads a norm."""

    weight: str
    bias: str | None
    axis: int  # of its weight, which reads the stream


@dataclass(frozen=True)
class Gauge:
    """A norm with its readers, those that are stored; `keeps` says that it has a bias some reader cannot take."""

    norm: Norm
    readers: tuple[Reader, ...]
    keeps: bool

    @property
    def vectors(self) -> list[str]:
        return [self.norm.gain] if self.norm.bias is None else [self.norm.gain, self.norm.bias]

    @property
    def shifted(self) -> list[str]:
        """The biases of its readers, where they make up for its own."""
        shifts = self.norm.bias is not None and not self.keeps
        return [reader.bias for reader in self.readers if shifts and reader.bias is not None]

    def divides(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a bias that the norm has to keep can be divided by its gain."""
        if not self.keeps:
            return True
        gain = state[self.norm.gain].double()
        return torch.equal(_divisor(gain), gain)


def gauges(spec: Spec) -> list[Gauge]:
    """The norms of all streams that can be rotated."""
    tensors = {key: tensor for tensor in spec.tensors for key in tensor.keys.values()} if spec.gauged else {}
    found = []
    for norm in spec.gauged:
        # a head that is not merged has no tensor here
        readers = tuple(_reader(spec, norm, key, tensors[key]) for key in norm.readers if key in tensors)
        bare = any(_bias_of(key) not in spec.shapes for key in norm.readers)
        found.append(Gauge(norm, readers, norm.bias is not None and bare))
    return found


def vectors(gauges: Sequence[Gauge], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gauge a model is in: gains, none of which is too small to divide by, and biases, in float64."""
    found = {}
    for gauge in gauges:
        found[gauge.norm.gain] = _divisor(state[gauge.norm.gain].double().cpu())
        if gauge.norm.bias is not None and not gauge.keeps:
            found[gauge.norm.bias] = state[gauge.norm.bias].double().cpu()
    return found


def folded(
    gauges: Sequence[Gauge],
    parts: Mapping[str, Lazy],
    elements: Mapping[str, Element],
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Lazy]:
    """A model with the gains of some norms folded into their readers.

    Args:
        gauges: the norms.
        parts: the tensors of the model by canonical keys; readers and `shifted` biases are `widened`.
        elements: what is going to act, `{symmetry: element}`.
        into: the gauge that `unfolded` will bring it to, for which biases make up already here; None for 1, 0.
    """
    out = dict(parts)
    for gauge in gauges:
        norm, element = gauge.norm, elements.get(gauge.norm.stream)
        gain = parts[norm.gain].read().double().cpu()
        out[norm.gain] = Here.of(torch.ones_like(gain), own=True)
        if norm.bias is not None:
            bias = parts[norm.bias].read().double().cpu()
            kept = bias / _divisor(gain) if gauge.keeps else torch.zeros_like(bias)
            out[norm.bias] = Here.of(kept, own=True)
            if not gauge.keeps:
                if into is not None:
                    there = into[norm.bias] / into[norm.gain]
                    bias = bias - gain * (there if element is None else element.inverse().act(there))
                for reader in gauge.readers:
                    if reader.bias is not None:
                        one, weight = parts[reader.bias], parts[reader.weight]
                        plus = partial(_plus, axis=reader.axis, vector=bias)
                        out[reader.bias] = Computed(one.shape, one.dtype, [one, weight], plus)
        for reader in gauge.readers:
            out[reader.weight] = _times(parts[reader.weight], reader.axis, gain)
    return out


def unfolded(gauges: Sequence[Gauge], parts: Mapping[str, Lazy], into: Mapping[str, Tensor]) -> dict[str, Lazy]:
    """A folded model in the gauge `into`: its readers divided by the gains that its norms get."""
    out = dict(parts)
    for gauge in gauges:
        gain = into[gauge.norm.gain]
        out[gauge.norm.gain] = Here.of(gain, own=True)
        if gauge.norm.bias is not None:
            bias = out[gauge.norm.bias].read() * gain if gauge.keeps else into[gauge.norm.bias]
            out[gauge.norm.bias] = Here.of(bias, own=True)
        for reader in gauge.readers:
            out[reader.weight] = _times(out[reader.weight], reader.axis, 1 / gain)
    return out


def plain(spec: Spec, state: Mapping[str, Tensor], *, centre: bool = False) -> Tensors:
    """A model with its gains folded away, in float32 or its own wider dtype.

    With `centre`, also without what its LayerNorms do not let through, for comparing: a bias that a norm keeps is read
    past that.
    """
    given = parts_of(state)
    form = folded(gauges(spec), {key: widened(part) for key, part in given.items()}, {})
    if centre:
        form = centred(spec, form)
    return Tensors(
        {key: narrowed(part, torch.promote_types(given[key].dtype, torch.float32)) for key, part in form.items()}
    )


def widened(part: Lazy) -> Lazy:
    """The same in the dtype that moving it is computed in."""
    return part if part.dtype == wide(part.dtype) else Computed(part.shape, wide(part.dtype), [part], _widen)


def narrowed(part: Lazy, dtype: torch.dtype) -> Lazy:
    """The same in the dtype it is stored in, rounded once."""
    return part if part.dtype == dtype else Computed(part.shape, dtype, [part], partial(_narrow, dtype=dtype))


def centred(spec: Spec, parts: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """A folded model without what its LayerNorms do not let through: the means along a centred stream."""
    out = dict(parts)
    for tensor in spec.tensors:
        for axis, node in enumerate(tensor.axes[len(next(iter(tensor.keys))) :]):
            if not isinstance(node, Leaf) or not node.name or node.mark == DIAGONAL:  # gains are 1 by now, and stay
                continue
            if spec.symmetries[node.name].kind == "centred":
                for key in tensor.keys.values():
                    out[key] = Computed(out[key].shape, out[key].dtype, [out[key]], partial(_centre, axis=axis))
    return out


def _reader(spec: Spec, norm: Norm, key: str, tensor: Labelled) -> Reader:
    axis = stream_axis(tensor, norm.stream)
    bias = _bias_of(key)
    if bias not in spec.shapes:
        return Reader(key, None, axis)
    shape = spec.shapes[key]
    rest = [n for i, n in enumerate(shape) if i != axis]
    if torch.Size(rest).numel() != torch.Size(spec.shapes[bias]).numel():
        raise SpecError(
            f"{key} {shape} reads {norm.gain}, but its bias {spec.shapes[bias]} has not one number for each of its "
            "outputs, so no bias of the norm can be folded into it"
        )
    return Reader(key, bias, axis)


def _divisor(gain: Tensor) -> Tensor:
    """A gain without values too small to divide by."""
    least = SMALL * gain.abs().max().clamp_min(TINY)
    return torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)


def _bias_of(key: str) -> str:
    return f"{key.removesuffix('.weight')}.bias"


def stream_axis(tensor: Labelled, stream: str) -> int:
    """The axis of a reader's own tensor that is the stream."""
    own = tensor.axes[len(next(iter(tensor.keys))) :]
    places = [i for i, axis in enumerate(own) if isinstance(axis, Leaf) and axis.name == stream]
    if len(places) != 1:
        raise SpecError(f"{tensor.key} {tensor.shape}: expected one axis {stream!r}, row {tensor.row!r} has {places}")
    return places[0]


def _along(vector: Tensor, x: Tensor, axis: int) -> Tensor:
    return vector.to(x.device, x.dtype).reshape([-1 if i == axis else 1 for i in range(x.dim())])


def _times(part: Lazy, axis: int, vector: Tensor) -> Lazy:
    return Computed(part.shape, part.dtype, [part], partial(_scaled, axis=axis, vector=vector))


def _scaled(inputs: Sequence[Tensor], axis: int, vector: Tensor) -> Tensor:
    return inputs[0] * _along(vector, inputs[0], axis)


def _plus(inputs: Sequence[Tensor], axis: int, vector: Tensor) -> Tensor:
    """c + W v"""
    bias, weight = inputs
    flat = weight.movedim(axis, -1)
    rows = laid_out(flat.reshape(-1, flat.shape[-1]))
    return bias + (rows @ laid_out(vector.to(weight.device, weight.dtype))).reshape(bias.shape).to(bias.dtype)


def _centre(inputs: Sequence[Tensor], axis: int) -> Tensor:
    return inputs[0] - inputs[0].mean(axis, keepdim=True)


def _widen(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0].to(wide(inputs[0].dtype))


def _narrow(inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return rounded(inputs[0], dtype)
