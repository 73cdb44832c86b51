"""Differentiable alignments: relaxed elements of all symmetries of a spec that can move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..symmetries.spec import LabelledTensor, Spec
from .action import act_on_block, element_class, element_shape
from .alignment import Alignment
from .elements.relaxation import Relaxation, Relaxed, SupportsAct


@dataclass(frozen=True)
class RelaxedAlignment:
    """One relaxed element for each symmetry that can move, except those that `relaxation` keeps.

    Example: gradient descent towards a planted alignment g.

        >>> relaxed = RelaxedAlignment.identity(spec, Relaxation(generator=generator))
        >>> optimizer = torch.optim.AdamW([*relaxed.permuting, *relaxed.smooth], lr=0.1)
        >>> moved = relaxed.apply(state)
        >>> sum((moved[key] - target[key]).square().sum() for key in state).backward()
        >>> optimizer.step()
        >>> relaxed.hard().apply(state)  # moved by the nearest alignment in the groups
    """

    spec: Spec
    elements: Mapping[str, Relaxed]

    @staticmethod
    def identity(spec: Spec, relaxation: Relaxation) -> RelaxedAlignment:
        """Return the relaxed identity, where every descent starts."""
        names = [name for name in spec.symmetries if name in spec.free]  # in an order that does not depend on hashes
        relaxed = {name: element_class(spec, name).relax(*element_shape(spec, name), relaxation) for name in names}
        return RelaxedAlignment(
            spec, {name: element for name, element in relaxed.items() if element.permuting or element.smooth}
        )

    @property
    def permuting(self) -> list[Tensor]:
        """The latents of permutations."""
        return [latent for element in self.elements.values() for latent in element.permuting]

    @property
    def smooth(self) -> list[Tensor]:
        """The latents of rotations, bases and scales."""
        return [latent for element in self.elements.values() for latent in element.smooth]

    def soft(self) -> dict[str, SupportsAct]:
        """Return the relaxed elements for the current latents."""
        return {name: element.soft() for name, element in self.elements.items()}

    def hard(self) -> Alignment:
        """Return the nearest alignment whose elements are in the groups, not relaxed."""
        return Alignment(self.spec, {name: element.hard() for name, element in self.elements.items()})

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the relaxed g · state by canonical keys, with gradients to the latents and to the state.

        Rotations need a state whose gains are folded into their readers (see `gauge`).
        """
        elements, moved = self.soft(), dict(state)
        for tensor in self.spec.tensors:
            if not tensor.names.isdisjoint(elements) and tensor.key in state:
                moved |= split_keys(tensor, act_with_gradients(self.spec, elements, tensor, tensor.gather(state)))
        return moved


def act_with_gradients(spec: Spec, elements: Mapping[str, SupportsAct], tensor: LabelledTensor, x: Tensor) -> Tensor:
    """Return g · x for one labelled tensor, with gradients."""
    if tensor.names.isdisjoint(elements):
        return x
    views = [(block, act_on_block(spec, elements, block, block.view(x))) for block in tensor.blocks]
    if len(views) == 1 and views[0][1].numel() == x.numel():
        return views[0][1].reshape(x.shape)
    out = x.new_empty(x.shape)
    for block, moved in views:
        block.view(out).copy_(moved)
    return out


def split_keys(tensor: LabelledTensor, x: Tensor) -> dict[str, Tensor]:
    """Split a labelled tensor into `{key: its part}`."""
    return {key: x[index] if index else x for index, key in tensor.keys.items()}
