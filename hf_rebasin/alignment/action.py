"""The action of group elements on tensors: every block along every labelled dimension, contexts first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from .. import registry
from ..checkpoints.lazy import Computed, Tensors, lazy_parts
from ..symmetries.spec import Block, Dim, LabelledTensor, Spec
from .elements.relaxation import SupportsAct
from .groups import Element


def act(spec: Spec, elements: Mapping[str, Element], state: Mapping[str, Tensor]) -> Tensors:
    """Return g · state by canonical keys, computing each tensor when it is read.

    Outer symmetries act first; an inner element is indexed by the new index of its context.
    """
    moving = {name: element for name, element in elements.items() if not element.is_identity()}
    parts = dict(lazy_parts(state))
    moved = dict(parts)
    for tensor in spec.tensors:
        if tensor.names.isdisjoint(moving):
            continue
        if _keys_depend_on_data(
            tensor
        ):  # which key a value comes from depends on its index inside: all tensors are needed
            inputs = [parts[key] for key in tensor.keys.values()]
            for index, key in tensor.keys.items():
                compute = partial(_act_on_stack, spec, moving, tensor, index)
                moved[key] = Computed(parts[key].shape, parts[key].dtype, inputs, compute)
        else:
            for index, key in tensor.keys.items():
                source, single, inside = _restrict_to_key(spec, moving, tensor, index)
                part = parts[source]
                moved[key] = Computed(part.shape, part.dtype, [part], partial(_act_on_one, spec, inside, single))
    return Tensors(moved)


def _act_on_one(
    spec: Spec, elements: Mapping[str, Element], tensor: LabelledTensor, inputs: Sequence[Tensor]
) -> Tensor:
    return act_on_tensor(spec, elements, tensor, inputs[0].contiguous())


def _keys_depend_on_data(tensor: LabelledTensor) -> bool:
    """Whether an axis over keys has a context that is an axis of the tensors themselves."""
    n = len(next(iter(tensor.keys)))
    return any(context >= n for block in tensor.blocks for dim in block.dims[:n] for context in dim.contexts)


def _act_on_stack(
    spec: Spec,
    elements: Mapping[str, Element],
    tensor: LabelledTensor,
    index: tuple[int, ...],
    inputs: Sequence[Tensor],
) -> Tensor:
    stacked = tensor.gather(dict(zip(tensor.keys.values(), inputs, strict=True)))
    return act_on_tensor(spec, elements, tensor, stacked)[index].clone()


def _restrict_to_key(
    spec: Spec, elements: Mapping[str, Element], tensor: LabelledTensor, index: tuple[int, ...]
) -> tuple[str, LabelledTensor, Mapping[str, Element]]:
    """Return the key whose tensor moves to `index`, the labelled tensor of one key, and the elements acting in it."""
    if not index:
        return tensor.key, tensor, elements
    n = len(index)
    counts = tensor.shape[:n]
    sources = torch.arange(math.prod(counts)).reshape(counts)  # {index after: flat index before} of the keys
    for name, position, dim in _ordered_dims(
        spec, tensor.blocks[0]
    ):  # the same in all blocks, as key axes are not cut
        if position < n and name in elements:
            sources = act_along(sources, elements[name], position, dim.contexts, "")
    source = tuple(int(i) for i in torch.unravel_index(sources[index], counts))
    inside = dict(elements)
    for name, position, dim in (item for block in tensor.blocks for item in _ordered_dims(spec, block)):
        if position >= n and name in elements and any(context < n for context in dim.contexts):
            selection = tuple(index[context] if context < n else slice(None) for context in dim.contexts)
            inside[name] = elements[name].map(itemgetter(selection))

    def without_key_axes(dim: Dim) -> Dim:
        return replace(dim, axis=dim.axis - n, contexts=tuple(context - n for context in dim.contexts if context >= n))

    blocks = tuple(Block(offset=b.offset, dims=tuple(map(without_key_axes, b.dims[n:]))) for b in tensor.blocks)
    single = replace(
        tensor, keys={(): tensor.keys[source]}, shape=tensor.shape[n:], axes=tensor.axes[n:], blocks=blocks
    )
    return single.key, single, inside


def act_on_tensor(spec: Spec, elements: Mapping[str, Element], tensor: LabelledTensor, x: Tensor) -> Tensor:
    """Return g · x for one labelled tensor, as a new tensor."""
    out = torch.empty_like(x)
    for block in tensor.blocks:
        block.view(out).copy_(act_on_block(spec, elements, block, block.view(x)))
    return out


def act_on_block(
    spec: Spec, elements: Mapping[str, SupportsAct], block: Block, x: Tensor, skip: Iterable[int] = ()
) -> Tensor:
    """Return g · x for one block; `x` has the block's dimensions, and those in `skip` are not acted on."""
    for name, position, dim in _ordered_dims(spec, block):
        if name in elements and position not in skip:
            x = act_along(x, elements[name], position, dim.contexts, dim.mark)
    return x


def _ordered_dims(spec: Spec, block: Block) -> list[tuple[str, int, Dim]]:
    """List the labelled dimensions of a block, contexts first, then by name.

    In this order rounding does not depend on the order of keys in a file.
    """
    dims = [(dim.name, position, dim) for position, dim in enumerate(block.dims) if dim.name]
    return sorted(dims, key=lambda dim: (len(spec.symmetries[dim[0]].contexts), dim[0], dim[1]))


def act_along(x: Tensor, element: SupportsAct, position: int, contexts: tuple[int, ...], mark: str) -> Tensor:
    """Act on dimension `position` of x, whose contexts are the dimensions `contexts`."""
    dims = [*contexts, position]
    front = list(range(len(dims)))
    return element.act(x.movedim(dims, front), mark).movedim(front, dims)


def element_class(spec: Spec, name: str) -> type[Element]:
    """Return the `Element` class of the group of a symmetry."""
    kind = spec.symmetries[name].kind
    return registry.group(kind).element


def identity_element(spec: Spec, name: str) -> Element:
    """Return the element of a symmetry that moves nothing."""
    return element_class(spec, name).identity(*element_shape(spec, name))


def element_shape(spec: Spec, name: str) -> tuple[tuple[int, ...], int]:
    """Return (sizes of the contexts, size) of a symmetry: the batch shape and n of its elements."""
    symmetry = spec.symmetries[name]
    return tuple(spec.symmetries[c].size for c in symmetry.contexts), symmetry.size
