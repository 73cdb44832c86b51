"""Alignment as a problem, and the number that its solvers maximise: Σ ⟨fixed, g · moving⟩."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..alignment.alignment import Alignment, act_on, identity_of
from ..alignment.groups import Element
from ..modules.functional import Device
from ..symmetries.patterns import DIAGONAL
from ..symmetries.spec import Block, Dim, Labelled, Spec
from ..symmetries.table import ROTATING, SIGNED

PIECE = 1 << 24  # elements of a tensor that are widened at a time


@dataclass(frozen=True)
class Forward:
    """What a cost on data needs.

    Args:
        module: makes (a module to compute with, `{canonical key: its own key}`).
        data: batches, any number of times.
        loss: gives one number for (module, batch); None for what the module says is its loss, or, of batches without
            labels, how far it is from what the two models say.
    """

    module: Callable[[], tuple[nn.Module, Mapping[str, str]]]
    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """Move one model onto another.

    Args:
        spec: what may move.
        fixed: the model that stays, `{canonical key: tensor}`.
        moving: the model that moves.
        generator: all randomness of a solver comes from here.
        device: where similarities are computed; by default where the tensors are.
        progress: show a progress bar (on a terminal).
        forward: the module, data and loss of costs on data.
    """

    spec: Spec
    fixed: Mapping[str, Tensor]
    moving: Mapping[str, Tensor]
    generator: torch.Generator
    device: Device = None
    progress: bool = False
    forward: Forward | None = None

    def tensors(self, tensor: Labelled) -> tuple[Tensor, Tensor]:
        """The two of one labelled tensor, in their own dtypes, on the device."""
        fixed, moving = tensor.gather(self.fixed), tensor.gather(self.moving)
        place = fixed.device if self.device is None else self.device
        return fixed.to(place), moving.to(place)

    @cached_property
    def constant(self) -> dict[str, Tensor]:
        """{symmetry: ⟨fixed, moving⟩ along it} over the blocks that no other symmetry touches."""
        total: dict[str, Tensor] = {}
        for tensor in matched_tensors(self.spec):
            dims = {block: place for block in tensor.blocks if (place := lone(self.spec, block)) is not None}
            fixed, moving = self.tensors(tensor) if dims else (None, None)
            for block, place in dims.items():
                a, b = block.view(cast(Tensor, fixed)), block.view(cast(Tensor, moving))
                product = product_of(a, b, [place]).mul_(weight_of(self.spec, block))
                label = label_of(self.spec, block.dims[place])
                total[label] = total[label].add_(product) if label in total else product
        return total


def objective(problem: Problem, elements: Mapping[str, Element], tensors: Sequence[Labelled] | None = None) -> float:
    """Σ ⟨fixed, g · moving⟩ over the matched tensors, each once, summed in float64."""
    moving = {name: element for name, element in elements.items() if not element.is_identity()}
    total = 0.0
    for label, similarity in problem.constant.items() if tensors is None else ():
        name = label.removesuffix(DIAGONAL)
        element = elements.get(name) or identity_of(problem.spec, name)
        total += element.contract(similarity, name != label).item()
    for tensor in matched_tensors(problem.spec) if tensors is None else tensors:
        if tensors is None and all(lone(problem.spec, block) is not None for block in tensor.blocks):
            continue
        a, b = problem.tensors(tensor)
        if not tensor.names.isdisjoint(moving):
            b = act_on(problem.spec, moving, tensor, b)
        total += _weighted(problem.spec, tensor, a, b, every=tensors is not None)
    return total


def lone(spec: Spec, block: Block) -> int | None:
    """The place of the one dimension of a block that can move, if it is one and the block is not empty."""
    places = [i for i, dim in enumerate(block.dims) if dim.name in spec.free]
    whole = all(dim.size for dim in block.dims)
    return places[0] if len(places) == 1 and whole and not block.dims[places[0]].contexts else None


def label_of(spec: Spec, dim: Dim) -> str:
    """A dimension's symmetry; what signs do not reach is told apart where there are signs."""
    name = dim.name or ""
    return name + DIAGONAL if dim.mark == DIAGONAL and spec.symmetries[name].kind in SIGNED else name


def weight_of(spec: Spec, block: Block) -> float:
    """What a block counts in the objective: 1; where a stream is rotated, 1 / (the size of all but the stream).

    So a matrix with many rows does not outvote one with few, and all blocks of a head or a feed-forward layer count
    the same, as in 2506.22712.
    """
    if not spec.gauged:
        return 1.0
    kinds = {name: spec.symmetries[name].kind for name in block.names if name}
    return 1 / max(math.prod(d.size for d in block.dims if kinds.get(d.name or "") not in ROTATING), 1)


def _weighted(spec: Spec, tensor: Labelled, a: Tensor, b: Tensor, every: bool) -> float:
    """Σ of weight · ⟨a, b⟩ over blocks, over every one or those that are not in `Problem.constant`."""
    if every and not spec.gauged:
        return _dot(a, b)
    blocks = [block for block in tensor.blocks if every or lone(spec, block) is None]
    return sum(weight_of(spec, block) * _dot(block.view(a), block.view(b)) for block in blocks)


def matched_tensors(spec: Spec) -> list[Labelled]:
    """The tensors that say which features are alike: all that a moving symmetry touches but gains and statistics."""
    return [tensor for tensor in spec.tensors if not tensor.names.isdisjoint(spec.free) and not tensor.measures]


def _dot(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ in float64, in pieces, so that no float64 copy of a large tensor is made."""
    pairs = zip(a.reshape(-1).split(1 << 20), b.reshape(-1).split(1 << 20), strict=True)
    return sum(torch.dot(x.double(), y.double()).item() for x, y in pairs)


def bound(problem: Problem) -> float:
    """½(‖fixed‖² + ‖moving‖²): what the objective reaches when the two become equal, and never exceeds."""
    spec = problem.spec
    return 0.5 * sum(_weighted(spec, t, x, x, every=True) for t in matched_tensors(spec) for x in problem.tensors(t))


def all_equal(problem: Problem, elements: Mapping[str, Element]) -> bool:
    pairs = ((tensor, *problem.tensors(tensor)) for tensor in problem.spec.tensors)
    return all(torch.equal(a, act_on(problem.spec, elements, tensor, b)) for tensor, a, b in pairs)


def equal_within(problem: Problem, alignment: Alignment, share: float = 1e-5) -> bool:
    """Whether every tensor of the moved model is that of the fixed one, up to a share of its norm."""
    moved = alignment.on(problem.spec, problem.moving)
    pairs = ((problem.fixed[key].double(), moved[key].double()) for key in problem.spec.shapes if key in moved)
    return all((a - b).norm() <= share * a.norm() for a, b in pairs if a.numel())


def product_of(a: Tensor, b: Tensor, places: list[int]) -> Tensor:
    """a (p..., rest) and b (p'..., rest) to (p..., p'...), contracted over the rest.

    Products are taken in float32 (of float64 in float64), of as much of the rest at a time as makes some large but not
    huge matrices, and summed in float64.
    """
    front = list(range(len(places)))
    sizes = [a.shape[i] for i in places]
    n = math.prod(sizes)
    x, y = (t.movedim(places, front).reshape(n, -1) for t in (a, b))
    # vectors are short, count as much as matrices, and what they leave open is known from much smaller numbers
    kind = torch.float64 if x.shape[1] <= 64 else torch.promote_types(a.dtype, torch.float32)
    step = max(PIECE // n, 1)
    total: Tensor | None = None
    for at in range(0, x.shape[1], step):
        product = torch.mm(x[:, at : at + step].to(kind), y[:, at : at + step].to(kind).T)
        total = product.double() if total is None else total.add_(product)
    assert total is not None
    return total.reshape(*sizes, *sizes).cpu()
