"""What two models compute on the same inputs: how alike they are along every symmetry, from streamed cross-products.

An activation carries the symmetries of the output axis of the weight that made it, so tables and inferred specs say
where to look alike: at the outputs of linear maps, convolutions and embeddings for what they write, and at the outputs
of norms for a stream that norms stand on. Only sums and cross-products are kept, in float64.

Units that are permuted are compared by correlation, as in Git Re-Basin (Ainsworth et al. 2022, arXiv 2209.04836,
section 3.1); streams that are rotated where sub-layers read them, behind norms without gains (2506.22712).
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
from ..modules.distributed import shared_out, sum_of_all
from ..modules.forward import answers, mask_in, run
from ..modules.functional import Computing
from ..modules.linear_maps import is_conv1d
from ..symmetries.spec import Dim, Labelled, Spec, Unit
from ..symmetries.table import ROTATING
from .problem import label_of
from .units import Similarity

CHANNELS_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Slot:
    """A block of a module's output: `places[i, j, …]` along its axis is unit i, j, … of the symmetries of `dims`."""

    module: str
    axis: int
    dims: tuple[Dim, ...]
    places: Tensor

    @property
    def names(self) -> set[str]:
        return {dim.name for dim in self.dims if dim.name}


def slots_of(spec: Spec, module: nn.Module, names: Mapping[str, str]) -> list[Slot]:
    """Where a module's own activations carry symmetries that can move; `names` is `{canonical key: module key}`.

    Where a stream is rotated, the outputs of its norms alone: raw, what a few units have much of drowns the rest, and
    once streams agree, weights tell better than activations which units and heads are alike (docs/log.md). Otherwise
    the outputs of norms for whatever they stand on, and those of all other layers for what these write.
    """
    found: list[tuple[bool, Slot]] = []
    for tensor in spec.tensors:
        name = names.get(tensor.key, "")
        owner, _, attribute = name.rpartition(".")
        if () not in tensor.keys or attribute != "weight" or tensor.names.isdisjoint(spec.free):
            continue
        part = module.get_submodule(owner)
        axis = 1 if isinstance(part, CHANNELS_FIRST) or getattr(part, "data_format", "") == "channels_first" else -1
        slots = _slots(tensor, _written(part, tensor), owner, axis)
        found += [(len(tensor.shape) == 1, slot) for slot in slots if not slot.names.isdisjoint(spec.free)]
    if spec.gauged:
        return [slot for is_norm, slot in found if is_norm]
    normed = {name for is_norm, slot in found if is_norm for name in slot.names}
    return [slot for is_norm, slot in found if is_norm or slot.names.isdisjoint(normed)]


def _written(module: nn.Module, tensor: Labelled) -> int:
    """The axis of a weight that its module's output runs over."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return 1
    return 1 if isinstance(module, _ConvNd) and module.transposed else 0


def _slots(tensor: Labelled, axis: int, module: str, out: int) -> Iterator[Slot]:
    """The blocks along one axis, each once."""
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
        yield Slot(module, out, dims, places)


@dataclass
class Sums:
    """Over all samples of two models along one slot, in float64: Σw, Σwx, Σwx² of each, and Σ w x yᵀ."""

    count: float
    sums: Tensor  # (2, n)
    squares: Tensor  # (2, n)
    cross: Tensor  # (n, n)

    @staticmethod
    def zero(n: int, device: Any) -> Sums:
        kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return Sums(0.0, torch.zeros(2, n, **kind), torch.zeros(2, n, **kind), torch.zeros(n, n, **kind))

    def add(self, x: Tensor, y: Tensor, w: Tensor) -> None:
        """Samples (many, n) of both, and what each of them counts."""
        both = torch.stack([x, y]).double()
        weighted = both * w.double()[:, None]
        self.count += w.double().sum().item()
        self.sums += weighted.sum(1)
        self.squares += (weighted * both).sum(1)
        self.cross += weighted[0].mT @ both[1]

    def of_all(self) -> Sums:
        """Over all processes."""
        count = sum_of_all(torch.tensor(self.count, dtype=torch.float64, device=self.sums.device)).item()
        return Sums(count, *map(sum_of_all, (self.sums, self.squares, self.cross)))

    @property
    def covariance(self) -> Tensor:
        """(n, n), of the units of one with those of the other."""
        a, b = self.sums / self.count
        return self.cross / self.count - torch.outer(a, b)

    @property
    def deviations(self) -> Tensor:
        """(2, n) standard deviations; 0 where they are no more than rounding."""
        squares = self.squares / self.count
        variances = squares - (self.sums / self.count).square()
        return torch.where(variances > 1e-10 * squares, variances, 0.0).sqrt()


@dataclass(frozen=True)
class Statistics:
    """How alike two models are along every symmetry that activations carry."""

    spec: Spec
    slots: Sequence[tuple[Slot, Sums]] = field(repr=False)

    def similarity(self, unit: Unit) -> Similarity:
        """The same as of weights, see `hf_rebasin.solving.units`; empty where no activation carries the unit."""
        total: Similarity = {}
        for slot, sums in self.slots:
            inside = [i for i, dim in enumerate(slot.dims) if dim.name in unit.names]
            if not inside or not {unit.outer} <= slot.names:
                continue
            shape = tuple(slot.places.shape)
            matrix = self._alike(slot, sums).reshape(*shape, *shape)
            beside = [i for i in range(len(shape)) if i not in inside]
            for i in reversed(beside):  # what no symmetry of the unit moves is compared place by place
                matrix = matrix.diagonal(dim1=i, dim2=matrix.dim() // 2 + i).sum(-1)
            order = sorted(range(len(inside)), key=lambda k: unit.names.index(slot.dims[inside[k]].name or ""))
            matrix = matrix.permute(*order, *(len(inside) + k for k in order))
            labels = tuple(label_of(self.spec, slot.dims[inside[k]]) for k in order)
            total[labels] = total[labels] + matrix if labels in total else matrix
        return {labels: matrix.cpu() for labels, matrix in total.items()}

    def _alike(self, slot: Slot, sums: Sums) -> Tensor:
        """Correlations of units; of a stream that is rotated, products in units of its size."""
        if any(self.spec.symmetries[name].kind in ROTATING for name in slot.names):
            size = sums.squares.sum(1).prod().sqrt()
            return sums.cross * (len(sums.cross) / size if size else 0.0)
        a, b = sums.deviations
        sizes = torch.outer(a, b)
        return torch.where(sizes > 0, sums.covariance / sizes, 0.0)


def collect(
    spec: Spec,
    module: nn.Module,
    names: Mapping[str, str],
    states: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Any],
    device: Any = None,
    sensitive: bool = False,
) -> Statistics:
    """Run two models, the same module with other tensors in it, over batches; nothing of a batch is kept.

    Every sample counts the same, or, with `sensitive`, as much as what the models say hangs on it:
    w = (‖∂f/∂x‖ ‖∂f′/∂x′‖)^½ for activations x of one and x′ of the other, where f = ½ Σ (y − ȳ)² of the outputs y of
    a model and ȳ their means along the last axis. So tokens that are hardly read do not outvote the one that is.

    Args:
        spec: what may move.
        module: to compute with; its own tensors are not used.
        names: `{canonical key: module key}`.
        states: of the fixed and of the moving model, by canonical keys.
        batches: inputs of the forward pass; labels among them are no matter. Positions that an `attention_mask` leaves
            out are not looked at.
        device: where it is computed.
        sensitive: whether samples are weighted; takes a backward pass for every forward pass.

    Raises:
        OptionError: no batches.
    """
    slots = slots_of(spec, module, names)
    sums = [Sums.zero(slot.places.numel(), device) for slot in slots]
    computed = Computing(module, names, run, device)
    came = False
    with _listening(module, {slot.module for slot in slots}) as heard, torch.set_grad_enabled(sensitive):
        for batch in shared_out(batches):
            came = True
            mask = mask_in(batch)
            said: list[dict[str, list[Tensor]]] = []
            pulls: list[dict[str, list[Tensor]]] = []
            for state in states:
                heard.clear()
                outputs = computed(state, batch)
                pulls.append(_pulls(heard, answers(outputs, mask)) if sensitive else {})
                said.append({name: [x.detach() for x in xs] for name, xs in heard.items()})
            for slot, total in zip(slots, sums, strict=True):
                for i, pair in enumerate(zip(*(one.get(slot.module, []) for one in said), strict=True)):
                    x, y = (_samples(x, slot, mask)[:, slot.places.reshape(-1).to(x.device)] for x in pair)
                    ws = [_samples(pull[slot.module][i], slot, mask).double().norm(dim=1) for pull in pulls if pull]
                    total.add(x, y, (ws[0] * ws[1]).sqrt() if ws else x.new_ones(len(x)))
    if not came:
        raise OptionError("the data gave no batch to this process")
    summed = [total.of_all() for total in sums]
    return Statistics(spec, [(slot, total) for slot, total in zip(slots, summed, strict=True) if total.count])


def _pulls(heard: Mapping[str, list[Tensor]], outputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """∂f/∂x of all that was heard; 0 where no output hangs on it."""
    f = sum(((y - y.mean(-1, keepdim=True)).square().sum() / 2 for y in outputs), torch.zeros(()))
    flat = [x for xs in heard.values() for x in xs]
    found = iter(torch.autograd.grad(f, flat, allow_unused=True, materialize_grads=True))
    return {name: [next(found) for _ in xs] for name, xs in heard.items()}


@contextmanager
def _listening(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """{name: its outputs, call after call} of submodules, while it lasts; with gradients, these can be asked for."""
    heard: dict[str, list[Tensor]] = {}

    def hear(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            one = output[0] if isinstance(output, tuple) else output
            if not isinstance(one, Tensor):
                return None
            heard.setdefault(name, []).append(one)
            if not torch.is_grad_enabled():
                return None
            if not one.requires_grad:
                one.requires_grad_()
            passed = one.clone()  # what comes after may write to it
            return (passed, *output[1:]) if isinstance(output, tuple) else passed

        return hook

    handles = [module.get_submodule(name).register_forward_hook(hear(name)) for name in sorted(names)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _samples(x: Tensor, slot: Slot, mask: Tensor | None) -> Tensor:
    """(many, all numbers along the axis of a slot)"""
    x = x.movedim(slot.axis, -1)
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.bool().to(x.device)]
    return x.reshape(-1, x.shape[-1])
