"""Similarity of the units of two models, from streaming statistics of their activations on the same inputs.

The channels of a module's output are permuted or rotated together with the output axis of its weight. A spec labels
that axis, so it also tells which activations to record: the outputs of linear maps, convolutions and embeddings and,
for streams that pass through norms, the outputs of the norms. Only sums and cross-products are kept, in float64.

Permuted units are compared by correlation, as in Git Re-Basin (Ainsworth et al. 2022, arXiv 2209.04836, section 3.1).
Rotated streams are compared by inner products where sub-layers read them: at the outputs of norms, whose gains are
folded into the sub-layers (arXiv 2506.22712).
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

CHANNELS_FIRST_LAYERS = (_ConvNd, _BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, kw_only=True)
class ActivationBlock:
    """The channels of a module's output that one block of its weight produces.

    Args:
        module: name of the submodule whose output it is.
        axis: axis of the output that runs over channels.
        dims: dimensions of the weight's block along its output axis, each labelled with a symmetry.
        channels: `channels[i, j, …]` is the channel with index i, j, … along `dims`.
    """

    module: str
    axis: int
    dims: tuple[Dim, ...]
    channels: Tensor

    @property
    def names(self) -> set[str]:
        """The symmetries of its dimensions."""
        return {dim.name for dim in self.dims if dim.name}


def find_activation_blocks(spec: Spec, module: nn.Module, module_keys: Mapping[str, str]) -> list[ActivationBlock]:
    """Find the activations to record: the outputs of submodules whose channels a symmetry can move, block by block.

    Where a stream can be rotated, only the outputs of its norms are used: in the raw stream a few large units drown
    out the rest, and once the streams agree, weights tell better than activations which units and heads match
    (docs/log.md). Otherwise a stream that passes through norms is read off their outputs, and every other symmetry
    off the outputs of the layers that write to it.

    Args:
        spec: symmetries that may move.
        module: module whose submodules are searched.
        module_keys: `{canonical key: module key}`.
    """
    candidates: list[tuple[bool, ActivationBlock]] = []
    for tensor in spec.tensors:
        owner, _, attribute = module_keys.get(tensor.key, "").rpartition(".")
        if () not in tensor.keys or attribute != "weight" or tensor.names.isdisjoint(spec.free):
            continue
        submodule = module.get_submodule(owner)
        channels_first = isinstance(submodule, CHANNELS_FIRST_LAYERS)
        channels_first |= getattr(submodule, "data_format", "") == "channels_first"
        blocks = _blocks_along(tensor, _output_axis(submodule), owner, 1 if channels_first else -1)
        candidates += [(len(tensor.shape) == 1, block) for block in blocks if not block.names.isdisjoint(spec.free)]
    if spec.gauged:
        return [block for is_norm, block in candidates if is_norm]
    normed = {name for is_norm, block in candidates if is_norm for name in block.names}
    return [block for is_norm, block in candidates if is_norm or block.names.isdisjoint(normed)]


def _output_axis(module: nn.Module) -> int:
    """Return the axis of a module's weight that runs over its output channels."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return 1
    return 1 if isinstance(module, _ConvNd) and module.transposed else 0


def _blocks_along(tensor: LabelledTensor, axis: int, module: str, channel_axis: int) -> Iterator[ActivationBlock]:
    """Yield the channels that each block of a weight produces; blocks that differ only along other axes count once.

    Args:
        tensor: weight of the module.
        axis: axis of the weight that runs over output channels.
        module: name of the module.
        channel_axis: axis of the module's output that runs over channels.
    """
    stride, size, seen = math.prod(tensor.shape[axis + 1 :]), tensor.shape[axis], set()
    for block in tensor.blocks:
        dims = tuple(dim for dim in block.dims if dim.axis == axis)
        start = block.offset // stride % size
        if start in seen or not all(dim.size for dim in dims):
            continue
        seen.add(start)
        channels = torch.tensor(start)
        for dim in dims:
            channels = channels[..., None] + torch.arange(dim.size) * (dim.stride // stride)
        yield ActivationBlock(module=module, axis=channel_axis, dims=dims, channels=channels)


@dataclass(kw_only=True)
class ActivationSums:
    """Weighted sums over samples x of the fixed and y of the moving model, for one block of activations, in float64.

    Args:
        total_weight: Σ w over the samples.
        sums: Σ w x and Σ w y, (2, n) for n channels.
        squares: Σ w x² and Σ w y², (2, n).
        cross: Σ w x yᵀ, (n, n).
    """

    total_weight: float
    sums: Tensor
    squares: Tensor
    cross: Tensor

    @staticmethod
    def zero(n: int, device: Any) -> ActivationSums:
        """Return the sums over no samples."""
        sums, squares = (torch.zeros(2, n, dtype=torch.float64, device=device) for _ in range(2))
        cross = torch.zeros(n, n, dtype=torch.float64, device=device)
        return ActivationSums(total_weight=0.0, sums=sums, squares=squares, cross=cross)

    def add(self, x: Tensor, y: Tensor, w: Tensor) -> None:
        """Add samples of the fixed and of the moving model, both (samples, n), with their weights (samples,)."""
        both = torch.stack([x, y]).double()
        weighted = both * w.double()[:, None]
        self.total_weight += w.double().sum().item()
        self.sums += weighted.sum(1)
        self.squares += (weighted * both).sum(1)
        self.cross += weighted[0].mT @ both[1]

    def all_reduce(self) -> ActivationSums:
        """Return the sums over all processes."""
        weight = torch.tensor(self.total_weight, dtype=torch.float64, device=self.sums.device)
        total_weight = all_reduce_sum(weight).item()
        sums, squares, cross = map(all_reduce_sum, (self.sums, self.squares, self.cross))
        return ActivationSums(total_weight=total_weight, sums=sums, squares=squares, cross=cross)

    @property
    def cross_covariance(self) -> Tensor:
        """The covariances (n, n) of the fixed model's channels with the moving model's."""
        a, b = self.sums / self.total_weight
        return self.cross / self.total_weight - torch.outer(a, b)

    @property
    def standard_deviations(self) -> Tensor:
        """The standard deviations (2, n) of both models' channels; 0 for channels that vary only by rounding."""
        squares = self.squares / self.total_weight
        variances = squares - (self.sums / self.total_weight).square()
        return torch.where(variances > 1e-10 * squares, variances, 0.0).sqrt()


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of the activations of two models, from which the similarity along every unit is computed.

    Args:
        spec: symmetries that may move.
        blocks: blocks of activations, each with its sums over all samples.
    """

    spec: Spec
    blocks: Sequence[tuple[ActivationBlock, ActivationSums]] = field(repr=False)

    def similarity(self, unit: Unit) -> Similarity:
        """Compute the similarity along a unit, as in `hf_rebasin.solving.units`; empty if no activation carries it."""
        total: Similarity = {}
        for block, sums in self.blocks:
            inside = [i for i, dim in enumerate(block.dims) if dim.name in unit.names]
            if not inside or unit.outer not in block.names:
                continue
            shape = tuple(block.channels.shape)
            matrix = self._similarity_matrix(block, sums).reshape(*shape, *shape)
            outside = [i for i in range(len(shape)) if i not in inside]
            for i in reversed(outside):  # along dimensions outside the unit, only equal indices are compared
                matrix = matrix.diagonal(dim1=i, dim2=matrix.dim() // 2 + i).sum(-1)
            order = sorted(range(len(inside)), key=lambda k: unit.names.index(block.dims[inside[k]].name or ""))
            matrix = matrix.permute(*order, *(len(inside) + k for k in order))
            labels = tuple(label_of(self.spec, block.dims[inside[k]]) for k in order)
            total[labels] = total[labels] + matrix if labels in total else matrix
        return {labels: matrix.cpu() for labels, matrix in total.items()}

    def _similarity_matrix(self, block: ActivationBlock, sums: ActivationSums) -> Tensor:
        """Return the correlations of the channels of a block or, for a rotated stream, scaled inner products."""
        if any(self.spec.symmetries[name].rotates for name in block.names):
            scale = sums.squares.sum(1).prod().sqrt()
            return sums.cross * (len(sums.cross) / scale if scale else 0.0)
        a, b = sums.standard_deviations
        products = torch.outer(a, b)
        return torch.where(products > 0, sums.cross_covariance / products, 0.0)


def collect_statistics(
    spec: Spec,
    module: nn.Module,
    module_keys: Mapping[str, str],
    states: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Any],
    device: Any = None,
    sensitive: bool = False,
) -> ActivationStatistics:
    """Run two models on the same batches and sum up statistics of their activations, keeping no activation.

    Every sample has the weight 1. With `sensitive`, its weight grows with how much the outputs of the models depend on
    it: w = (‖∂f/∂x‖ ‖∂f′/∂x′‖)^½ for activations x of one model and x′ of the other, where f = ½ Σ (y − ȳ)² over the
    outputs y of a model, with means ȳ over the classes. A token that affects the outputs is then not outvoted by
    many that hardly do.

    Args:
        spec: symmetries that may move.
        module: module whose forward pass is run, with the tensors of each model in place of its own.
        module_keys: `{canonical key: module key}`.
        states: tensors of the fixed and of the moving model, by canonical keys.
        batches: inputs of the forward pass. Labels in them are ignored, and so are positions that an
            `attention_mask` leaves out.
        device: device on which the models run.
        sensitive: whether to weight samples, which needs a backward pass for every forward pass.

    Returns:
        The statistics, summed over all processes.

    Raises:
        OptionError: there are no batches.
    """
    blocks = find_activation_blocks(spec, module, module_keys)
    totals = [ActivationSums.zero(block.channels.numel(), device) for block in blocks]
    call = FunctionalCall(module, module_keys, run_module, device)
    any_batch = False
    with _record_outputs(module, {block.module for block in blocks}) as recorded, torch.set_grad_enabled(sensitive):
        for batch in shard_batches(batches):
            any_batch = True
            mask = attention_mask_of(batch)
            activations: list[dict[str, list[Tensor]]] = []
            gradients: list[dict[str, list[Tensor]]] = []
            for state in states:
                recorded.clear()
                outputs = call(state, batch)
                scores = attended_outputs(module, outputs, batch) if sensitive else []
                gradients.append(_activation_gradients(recorded, scores) if sensitive else {})
                activations.append({name: [x.detach() for x in xs] for name, xs in recorded.items()})
            for block, total in zip(blocks, totals, strict=True):
                calls = zip(*(xs.get(block.module, []) for xs in activations), strict=True)
                for i, pair in enumerate(calls):
                    x, y = (_flatten_samples(x, block, mask)[:, block.channels.reshape(-1).to(x.device)] for x in pair)
                    gradient_norms = [
                        _flatten_samples(g[block.module][i], block, mask).double().norm(dim=1) for g in gradients if g
                    ]
                    weights = (gradient_norms[0] * gradient_norms[1]).sqrt() if gradient_norms else x.new_ones(len(x))
                    total.add(x, y, weights)
    if not any_batch:
        raise OptionError("the data yielded no batch to this process")
    reduced = [total.all_reduce() for total in totals]
    return ActivationStatistics(
        spec, [(block, total) for block, total in zip(blocks, reduced, strict=True) if total.total_weight]
    )


def _activation_gradients(recorded: Mapping[str, list[Tensor]], outputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return ∂f/∂x for all recorded activations x, with f as in `collect_statistics`; 0 if f is independent of x."""
    f = sum(((y - y.mean(-1, keepdim=True)).square().sum() / 2 for y in outputs), torch.zeros(()))
    flat = [x for xs in recorded.values() for x in xs]
    gradients = iter(torch.autograd.grad(f, flat, allow_unused=True, materialize_grads=True))
    return {name: [next(gradients) for _ in xs] for name, xs in recorded.items()}


@contextmanager
def _record_outputs(module: nn.Module, submodules: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of submodules in a `with` block, as `{submodule: one output per call}`.

    If gradients are enabled, they can be taken with respect to the recorded tensors.
    """
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

    with forward_hooks(module, sorted(submodules), after=record):
        yield recorded


def _flatten_samples(x: Tensor, block: ActivationBlock, mask: Tensor | None) -> Tensor:
    """Flatten an output to (samples, channels), without the positions that a mask leaves out."""
    x = x.movedim(block.axis, -1)
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.bool().to(x.device)]
    return x.reshape(-1, x.shape[-1])
