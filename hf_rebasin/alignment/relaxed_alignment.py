"""Alignments with gradients: relaxed elements of all that moves in a spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..symmetries.spec import Labelled, Spec
from .alignment import Alignment, act_on_block, extent, group_of
from .elements.relaxation import Acting, Relaxed, Softening


@dataclass(frozen=True)
class RelaxedAlignment:
    """One relaxed element for each symmetry that can move; what `softening` keeps has none.

    Example: gradient descent towards a planted alignment g.

        >>> relaxed = RelaxedAlignment.identity(spec, Softening(generator))
        >>> optimizer = torch.optim.AdamW([*relaxed.permuting, *relaxed.smooth], lr=0.1)
        >>> moved = relaxed.apply(state)
        >>> sum((moved[key] - target[key]).square().sum() for key in state).backward()
        >>> optimizer.step()
        >>> relaxed.hard().apply(state)  # by the nearest exact alignment
    """

    spec: Spec
    elements: Mapping[str, Relaxed]

    @staticmethod
    def identity(spec: Spec, softening: Softening) -> RelaxedAlignment:
        """Where every descent begins."""
        names = [name for name in spec.symmetries if name in spec.free]  # in an order that does not hang on hashes
        relaxed = {name: group_of(spec, name).relax(*extent(spec, name), softening) for name in names}
        return RelaxedAlignment(spec, {name: one for name, one in relaxed.items() if one.permuting or one.smooth})

    @property
    def permuting(self) -> list[Tensor]:
        """The latents of all that permutes."""
        return [latent for element in self.elements.values() for latent in element.permuting]

    @property
    def smooth(self) -> list[Tensor]:
        """The latents of rotations, bases and scales."""
        return [latent for element in self.elements.values() for latent in element.smooth]

    def soft(self) -> dict[str, Acting]:
        """What acts for the present latents."""
        return {name: element.soft() for name, element in self.elements.items()}

    def hard(self) -> Alignment:
        """The nearest exact alignment."""
        return Alignment(self.spec, {name: element.hard() for name, element in self.elements.items()})

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The relaxed g · state, by canonical keys, with gradients to the latents and to the state.

        Larger groups than permutations need a state whose gains are folded into readers (see `gauge`).
        """
        elements, moved = self.soft(), dict(state)
        for tensor in self.spec.tensors:
            if not tensor.names.isdisjoint(elements) and tensor.key in state:
                moved |= split(tensor, acted(self.spec, elements, tensor, tensor.gather(state)))
        return moved


def acted(spec: Spec, elements: Mapping[str, Acting], tensor: Labelled, x: Tensor) -> Tensor:
    """g · x for one labelled tensor, with gradients."""
    if tensor.names.isdisjoint(elements):
        return x
    views = [(block, act_on_block(spec, elements, block, block.view(x))) for block in tensor.blocks]
    if len(views) == 1 and views[0][1].numel() == x.numel():
        return views[0][1].reshape(x.shape)
    out = x.new_empty(x.shape)
    for block, moved in views:
        block.view(out).copy_(moved)
    return out


def split(tensor: Labelled, x: Tensor) -> dict[str, Tensor]:
    """`{key: its part}` of a labelled tensor."""
    return {key: x[index] if index else x for index, key in tensor.keys.items()}
