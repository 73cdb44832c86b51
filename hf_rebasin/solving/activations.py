"""Similarity of two models along their symmetries, from streamed statistics of their activations on the same inputs.

An activation carries the symmetries of the output axis of the weight that produced it, so specs, from tables or
inferred, tell where to record activations: at the outputs of linear maps, convolutions and embeddings for what these
write, and at the outputs of norms for a stream that is normalised. Only sums and cross-products are kept, in float64.

Units that are permuted are compared by correlation, as in Git Re-Basin (Ainsworth et al. 2022, arXiv 2209.04836,
section 3.1). Streams that are rotated are compared where sub-layers read them, behind norms without gains (arXiv
2506.22712).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import OptionError
from ..modules.distributed import all_reduce_sum, shard_batches
from ..modules.forward import attended_outputs, attention_mask_of, run_module
from ..modules.functional import FunctionalCall
from ..modules.hooks import forward_hooks
from ..modules.linear_maps import is_conv1d
from ..symmetries.spec import Dim, LabelledTensor, Spec, Unit
from .problem import label_of
from .units import Similarity

CHANNELS_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A block of a module's output: along its axis, `places[i, j, …]` is unit i, j, … of the symmetries of `dims`."""

    module: str
    axis: int
    dims: tuple[Dim, ...]
    places: Tensor

    @property
    def names(self) -> set[str]:
        return {dim.name for dim in self.dims if dim.name}


def find_slots(spec: Spec, module: nn.Module, names: Mapping[str, str]) -> list[Slot]:
    """Find the outputs of submodules that carry free symmetries; `names` is `{canonical key: module key}`.

    If a stream is rotated, only the outputs of its norms are used: in the raw stream a few large units drown the rest,
    and once streams agree, weights tell better than activations which units and heads match (docs/log.md). Otherwise
    the outputs of norms are used for the streams that they normalise, and those of other layers for what these write.
    """
    candidates: list[tuple[bool, Slot]] = []
    for tensor in spec.tensors:
        name = names.get(tensor.key, "")
        owner, _, attribute = name.rpartition(".")
        if () not in tensor.keys or attribute != "weight" or tensor.names.isdisjoint(spec.free):
            continue
        submodule = module.get_submodule(owner)
        channels_first = isinstance(submodule, CHANNELS_FIRST)
        channels_first |= getattr(submodule, "data_format", "") == "channels_first"
        slots = _slots_along(tensor, _output_axis(submodule), owner, 1 if channels_first else -1)
        candidates += [(len(tensor.shape) == 1, slot) for slot in slots if not slot.names.isdisjoint(spec.free)]
    if spec.gauged:
        return [slot for is_norm, slot in candidates if is_norm]
    normed = {name for is_norm, slot in candidates if is_norm for name in slot.names}
    return [slot for is_norm, slot in candidates if is_norm or slot.names.isdisjoint(normed)]


def _output_axis(module: nn.Module) -> int:
    """Return the axis of a module's weight that its output runs over."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return 1
    return 1 if isinstance(module, _ConvNd) and module.transposed else 0


def _slots_along(tensor: LabelledTensor, axis: int, module: str, output_axis: int) -> Iterator[Slot]:
    """Yield the blocks of a weight along one axis, each once, as slots along an axis of the module's output."""
    stride, size, seen = math.prod(tensor.shape[axis + 1 :]), tensor.shape[axis], set()
    for block in tensor.blocks:
        dims = tuple(dim for dim in block.dims if dim.axis == axis)
        start = block.offset // stride % size
        if start in seen or not all(dim.size for dim in dims):
            continue
        seen.add(start)
        places = torch.tensor(start)
        for dim in dims:
            places = places[..., None] + torch.arange(dim.size) * (dim.stride // stride)
        yield Slot(module=module, axis=output_axis, dims=dims, places=places)


@dataclass(kw_only=True)
class Sums:
    """Weighted sums over samples of two models along one slot, in float64: Σw, Σwx and Σwx² of each, and Σ w x yᵀ."""

    count: float
    sums: Tensor  # (2, n)
    squares: Tensor  # (2, n)
    cross: Tensor  # (n, n)

    @staticmethod
    def zero(n: int, device: Any) -> Sums:
        """Return the sums over no samples."""
        sums, squares = (torch.zeros(2, n, dtype=torch.float64, device=device) for _ in range(2))
        return Sums(count=0.0, sums=sums, squares=squares, cross=torch.zeros(n, n, dtype=torch.float64, device=device))

    def add(self, x: Tensor, y: Tensor, w: Tensor) -> None:
        """Add samples (many, n) of both models, with their weights (many,)."""
        both = torch.stack([x, y]).double()
        weighted = both * w.double()[:, None]
        self.count += w.double().sum().item()
        self.sums += weighted.sum(1)
        self.squares += (weighted * both).sum(1)
        self.cross += weighted[0].mT @ both[1]

    def all_reduce(self) -> Sums:
        """Return the sums over all processes."""
        count = all_reduce_sum(torch.tensor(self.count, dtype=torch.float64, device=self.sums.device)).item()
        sums, squares, cross = map(all_reduce_sum, (self.sums, self.squares, self.cross))
        return Sums(count=count, sums=sums, squares=squares, cross=cross)

    @property
    def covariance(self) -> Tensor:
        """Covariances (n, n) of the units of the fixed model with those of the moving one."""
        a, b = self.sums / self.count
        return self.cross / self.count - torch.outer(a, b)

    @property
    def deviations(self) -> Tensor:
        """Standard deviations (2, n) of the units of both models; 0 where they are within rounding."""
        squares = self.squares / self.count
        variances = squares - (self.sums / self.count).square()
        return torch.where(variances > 1e-10 * squares, variances, 0.0).sqrt()


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of the activations of two models, which give similarities along the symmetries that they carry."""

    spec: Spec
    slots: Sequence[tuple[Slot, Sums]] = field(repr=False)

    def similarity(self, unit: Unit) -> Similarity:
        """Compute the similarity along a unit, as in `hf_rebasin.solving.units`; empty if no activation carries it."""
        total: Similarity = {}
        for slot, sums in self.slots:
            inside = [i for i, dim in enumerate(slot.dims) if dim.name in unit.names]
            if not inside or not {unit.outer} <= slot.names:
                continue
            shape = tuple(slot.places.shape)
            matrix = self._compare(slot, sums).reshape(*shape, *shape)
            beside = [i for i in range(len(shape)) if i not in inside]
            for i in reversed(beside):  # dimensions outside the unit are compared place by place
                matrix = matrix.diagonal(dim1=i, dim2=matrix.dim() // 2 + i).sum(-1)
            order = sorted(range(len(inside)), key=lambda k: unit.names.index(slot.dims[inside[k]].name or ""))
            matrix = matrix.permute(*order, *(len(inside) + k for k in order))
            labels = tuple(label_of(self.spec, slot.dims[inside[k]]) for k in order)
            total[labels] = total[labels] + matrix if labels in total else matrix
        return {labels: matrix.cpu() for labels, matrix in total.items()}

    def _compare(self, slot: Slot, sums: Sums) -> Tensor:
        """Return the correlations of units or, for a stream that is rotated, products scaled by its size."""
        if any(self.spec.symmetries[name].rotates for name in slot.names):
            size = sums.squares.sum(1).prod().sqrt()
            return sums.cross * (len(sums.cross) / size if size else 0.0)
        a, b = sums.deviations
        sizes = torch.outer(a, b)
        return torch.where(sizes > 0, sums.covariance / sizes, 0.0)


def collect_statistics(
    spec: Spec,
    module: nn.Module,
    names: Mapping[str, str],
    states: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Any],
    device: Any = None,
    sensitive: bool = False,
) -> ActivationStatistics:
    """Run two models over batches and sum statistics of their activations; no activation is kept.

    All samples count the same or, with `sensitive`, as much as the outputs of the models depend on them:
    w = (‖∂f/∂x‖ ‖∂f′/∂x′‖)^½ for activations x of one model and x′ of the other, where f = ½ Σ (y − ȳ)² over the
    outputs y of a model, and ȳ are their means along the last axis. So a token that is read is not outvoted by many
    that hardly are.

    Args:
        spec: symmetries that may move.
        module: module to compute with, in which the tensors of both models are put; its own are not used.
        names: `{canonical key: module key}`.
        states: tensors of the fixed and of the moving model, by canonical keys.
        batches: inputs of the forward pass; labels among them are ignored, and so are positions that an
            `attention_mask` leaves out.
        device: device on which the models run.
        sensitive: whether samples are weighted, which takes a backward pass for every forward pass.

    Returns:
        The statistics, summed over all processes.

    Raises:
        OptionError: the data gives no batch.
    """
    slots = find_slots(spec, module, names)
    sums = [Sums.zero(slot.places.numel(), device) for slot in slots]
    call = FunctionalCall(module, names, run_module, device)
    any_batch = False
    with _record_outputs(module, {slot.module for slot in slots}) as recorded, torch.set_grad_enabled(sensitive):
        for batch in shard_batches(batches):
            any_batch = True
            mask = attention_mask_of(batch)
            activations: list[dict[str, list[Tensor]]] = []
            gradients: list[dict[str, list[Tensor]]] = []
            for state in states:
                recorded.clear()
                outputs = call(state, batch)
                gradients.append(_output_gradients(recorded, attended_outputs(outputs, mask)) if sensitive else {})
                activations.append({name: [x.detach() for x in xs] for name, xs in recorded.items()})
            for slot, total in zip(slots, sums, strict=True):
                calls = zip(*(xs.get(slot.module, []) for xs in activations), strict=True)
                for i, pair in enumerate(calls):
                    x, y = (_samples(x, slot, mask)[:, slot.places.reshape(-1).to(x.device)] for x in pair)
                    ws = [_samples(g[slot.module][i], slot, mask).double().norm(dim=1) for g in gradients if g]
                    total.add(x, y, (ws[0] * ws[1]).sqrt() if ws else x.new_ones(len(x)))
    if not any_batch:
        raise OptionError("the data gave no batch to this process")
    summed = [total.all_reduce() for total in sums]
    return ActivationStatistics(
        spec, [(slot, total) for slot, total in zip(slots, summed, strict=True) if total.count]
    )


def _output_gradients(recorded: Mapping[str, list[Tensor]], outputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return ∂f/∂x for all recorded activations x; 0 where no output depends on them."""
    f = sum(((y - y.mean(-1, keepdim=True)).square().sum() / 2 for y in outputs), torch.zeros(()))
    flat = [x for xs in recorded.values() for x in xs]
    gradients = iter(torch.autograd.grad(f, flat, allow_unused=True, materialize_grads=True))
    return {name: [next(gradients) for _ in xs] for name, xs in recorded.items()}


@contextmanager
def _record_outputs(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of submodules in a `with` block, {name: outputs, call after call}; gradients reach them."""
    recorded: dict[str, list[Tensor]] = {}

    def record(name: str, _input: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, Tensor):
            return None
        recorded.setdefault(name, []).append(tensor)
        if not torch.is_grad_enabled():
            return None
        if not tensor.requires_grad:
            tensor.requires_grad_()
        passed = tensor.clone()  # later layers may write to it in place
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    with forward_hooks(module, sorted(names), after=record):
        yield recorded


def _samples(x: Tensor, slot: Slot, mask: Tensor | None) -> Tensor:
    """Return the samples of an output that count, (many, size of the slot's axis)."""
    x = x.movedim(slot.axis, -1)
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.bool().to(x.device)]
    return x.reshape(-1, x.shape[-1])
