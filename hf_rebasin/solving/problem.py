"""Alignment as an optimisation problem, and the objective that solvers maximise: Σ ⟨fixed, g · moving⟩."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import registry
from ..alignment.action import act_on_tensor, identity_element
from ..alignment.alignment import Alignment
from ..alignment.groups import Element
from ..checkpoints.precision import compute_dtype
from ..modules.functional import Device
from ..symmetries.patterns import DIAGONAL
from ..symmetries.spec import Block, Dim, LabelledTensor, Spec

WIDENED_ELEMENTS = 1 << 24  # elements of a tensor that are widened at once


@dataclass(frozen=True)
class Forward:
    """Forward pass, data and loss of a cost on data.

    Args:
        module: makes (a module to compute with, `{canonical key: module key}`).
        data: batches, which can be read any number of times.
        loss: returns one number for (module, batch). None stands for the loss that the module itself returns or, where
            batches have no labels, for the divergence of its outputs from those of the two models.
    """

    module: Callable[[], tuple[nn.Module, Mapping[str, str]]]
    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """The task of moving one model onto another.

    Args:
        spec: symmetries that may move.
        fixed: tensors of the model that stays, `{canonical key: tensor}`.
        moving: tensors of the model that moves.
        generator: source of all randomness in a solver.
        device: device on which similarities are computed; by default the one that the tensors are on.
        progress: whether to show a progress bar (on a terminal).
        forward: module, data and loss, for costs on data.
    """

    spec: Spec
    fixed: Mapping[str, Tensor]
    moving: Mapping[str, Tensor]
    generator: torch.Generator
    device: Device = None
    progress: bool = False
    forward: Forward | None = None

    def tensors(self, tensor: LabelledTensor) -> tuple[Tensor, Tensor]:
        """Gather a labelled tensor of the fixed and of the moving model, in their own dtypes, on the device."""
        fixed, moving = tensor.gather(self.fixed), tensor.gather(self.moving)
        device = fixed.device if self.device is None else self.device
        return fixed.to(device), moving.to(device)

    @cached_property
    def constant(self) -> dict[str, Tensor]:
        """{symmetry: ⟨fixed, moving⟩ along it}, over blocks that no other symmetry touches."""
        total: dict[str, Tensor] = {}
        for tensor in matched_tensors(self.spec):
            dims = {block: dim for block in tensor.blocks if (dim := sole_free_dim(self.spec, block)) is not None}
            fixed, moving = self.tensors(tensor) if dims else (None, None)
            for block, dim in dims.items():
                a, b = block.view(cast(Tensor, fixed)), block.view(cast(Tensor, moving))
                product = inner_products(a, b, [dim]).mul_(weight_of(self.spec, block))
                label = label_of(self.spec, block.dims[dim])
                total[label] = total[label].add_(product) if label in total else product
        return total


def objective(
    problem: Problem, elements: Mapping[str, Element], tensors: Sequence[LabelledTensor] | None = None
) -> float:
    """Return Σ ⟨fixed, g · moving⟩ over the matched tensors, or over `tensors`, summed in float64."""
    moving = {name: element for name, element in elements.items() if not element.is_identity()}
    total = 0.0
    for label, similarity in problem.constant.items() if tensors is None else ():
        name = label.removesuffix(DIAGONAL)
        element = elements.get(name) or identity_element(problem.spec, name)
        total += element.contract(similarity, name != label).item()
    for tensor in matched_tensors(problem.spec) if tensors is None else tensors:
        if tensors is None and all(sole_free_dim(problem.spec, block) is not None for block in tensor.blocks):
            continue
        a, b = problem.tensors(tensor)
        if not tensor.names.isdisjoint(moving):
            b = act_on_tensor(problem.spec, moving, tensor, b)
        total += _weighted_product(problem.spec, tensor, a, b, every=tensors is not None)
    return total


def sole_free_dim(spec: Spec, block: Block) -> int | None:
    """Return the index of the only dimension of a block that can move; None if there is not exactly one.

    Blocks that are empty, or whose free dimension is nested in others, have none either.
    """
    free = [i for i, dim in enumerate(block.dims) if dim.name in spec.free]
    filled = all(dim.size for dim in block.dims)
    return free[0] if len(free) == 1 and filled and not block.dims[free[0]].contexts else None


def label_of(spec: Spec, dim: Dim) -> str:
    """Return the label of a dimension: its symmetry, marked `~` where signs exist and do not reach it."""
    name = dim.name or ""
    return name + DIAGONAL if dim.mark == DIAGONAL and registry.group(spec.symmetries[name].kind).signed else name


def weight_of(spec: Spec, block: Block) -> float:
    """Return the weight of a block in the objective: 1 or, where a stream is rotated, 1 / (size without the stream).

    So a matrix with many rows does not outvote one with few, and all blocks of a head or a feed-forward layer count
    the same, as in arXiv 2506.22712.
    """
    if not spec.gauged:
        return 1.0
    streams = {name for name in block.names if name and spec.symmetries[name].rotates}
    return 1 / max(math.prod(dim.size for dim in block.dims if dim.name not in streams), 1)


def _weighted_product(spec: Spec, tensor: LabelledTensor, a: Tensor, b: Tensor, every: bool) -> float:
    """Return Σ weight · ⟨a, b⟩, over every block or over those that are not in `Problem.constant`."""
    if every and not spec.gauged:
        return _dot(a, b)
    blocks = [block for block in tensor.blocks if every or sole_free_dim(spec, block) is None]
    return sum(weight_of(spec, block) * _dot(block.view(a), block.view(b)) for block in blocks)


def matched_tensors(spec: Spec) -> list[LabelledTensor]:
    """Return the tensors that tell which features match: all with a free symmetry, except gains and statistics."""
    return [tensor for tensor in spec.tensors if not tensor.names.isdisjoint(spec.free) and not tensor.measures]


def _dot(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ in float64, chunk by chunk, so that no float64 copy of a large tensor is made."""
    pairs = zip(a.reshape(-1).split(1 << 20), b.reshape(-1).split(1 << 20), strict=True)
    return sum(torch.dot(x.double(), y.double()).item() for x, y in pairs)


def objective_bound(problem: Problem) -> float:
    """Return ½(‖fixed‖² + ‖moving‖²), which the objective never exceeds and reaches only if the two become equal."""
    spec = problem.spec
    return 0.5 * sum(
        _weighted_product(spec, t, x, x, every=True) for t in matched_tensors(spec) for x in problem.tensors(t)
    )


def all_tensors_equal(problem: Problem, elements: Mapping[str, Element]) -> bool:
    """Tell whether every tensor of the moved model equals the fixed one's exactly."""
    pairs = ((tensor, *problem.tensors(tensor)) for tensor in problem.spec.tensors)
    return all(torch.equal(a, act_on_tensor(problem.spec, elements, tensor, b)) for tensor, a, b in pairs)


def equal_within(problem: Problem, alignment: Alignment, share: float = 1e-5) -> bool:
    """Tell whether every tensor of the moved model equals the fixed one's up to a share of its norm."""
    moved = alignment.on(problem.spec, problem.moving)
    pairs = ((problem.fixed[key].double(), moved[key].double()) for key in problem.spec.shapes if key in moved)
    return all((a - b).norm() <= share * a.norm() for a, b in pairs if a.numel())


def inner_products(a: Tensor, b: Tensor, dims: list[int]) -> Tensor:
    """Contract a (p..., rest) and b (p'..., rest) over all dimensions but `dims`, to (p..., p'...).

    Products are taken in float32 (in float64 for float64), over chunks of the rest that make large but not huge
    matrices, and are summed in float64.
    """
    front = list(range(len(dims)))
    sizes = [a.shape[i] for i in dims]
    n = math.prod(sizes)
    x, y = (t.movedim(dims, front).reshape(n, -1) for t in (a, b))
    # vectors are cheap and count as much as matrices; what they leave undecided depends on much smaller numbers
    dtype = torch.float64 if x.shape[1] <= 64 else compute_dtype(a.dtype)
    step = max(WIDENED_ELEMENTS // n, 1)
    total: Tensor | None = None
    for start in range(0, x.shape[1], step):
        product = torch.mm(x[:, start : start + step].to(dtype), y[:, start : start + step].to(dtype).T)
        total = product.double() if total is None else total.add_(product)
    assert total is not None
    return total.reshape(*sizes, *sizes).cpu()
