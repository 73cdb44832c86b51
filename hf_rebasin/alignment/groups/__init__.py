"""Groups: how an axis may move. One file each, exporting one class named `Element`.

An element carries one group element for every index of its contexts: all its tensors have the contexts as leading
dimensions. `Alignment` brings a block's dimensions in that order, so a group knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self

    from ..elements.matrices import Sides
    from ..elements.relaxation import Relaxed, Softening


class Element(Protocol):
    """What every group's `Element` offers."""

    EXACT: ClassVar[bool]  # whether acting only changes places, so that nothing is rounded

    @classmethod
    def identity(cls, batch: tuple[int, ...], n: int) -> Self:
        """The element that moves nothing, on n things, once per index of `batch`."""
        ...

    @classmethod
    def permuting(cls, order: Tensor) -> Self:
        """The element that only permutes; of a group that has the permutations in it."""
        ...

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Self:
        """A random element."""
        ...

    @classmethod
    def project(cls, similarity: Tensor) -> Self:
        """The g that keeps lengths and maximises ⟨similarity, g⟩ for (*batch, n, n) matrices ⟨fixed i, moving j⟩.

        A group in `table.SIGNED` also takes `diagonal`, the similarity of what is marked diagonal: signs do not reach
        it.
        """
        ...

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        """⟨similarity, g⟩ for the g that `project` finds, (*batch) in float64; of the same arguments."""
        ...

    @classmethod
    def moments(cls, x: Tensor, y: Tensor) -> Tensor:
        """What `balance` and `fit` have to know of x and y of shape (*batch, n, rest); adds up over several."""
        ...

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Self:
        """The g that leaves nothing to lengths: it makes the moments of writers and of readers alike.

        Two models that differ by an element of the group differ, once both are balanced, by one that keeps lengths.
        The identity in a group all of which does.
        """
        ...

    @classmethod
    def fit(cls, writers: Sides, readers: Sides) -> Self:
        """The g near the identity of least ‖x - g y‖² + ‖u - g⁻ᵀ v‖², of those that do not permute.

        Given the moments ⟨x, x⟩, ⟨x, y⟩, ⟨y, y⟩ of writers, and the same of readers. It is what lengths leave to
        improve once `project` has found the rest.
        """
        ...

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, softening: Softening) -> Relaxed:
        """The identity with gradients: latent numbers, the relaxed element they give, the nearest exact one."""
        ...

    def contract(self, similarity: Tensor, diagonal: bool = False) -> Tensor:
        """⟨similarity, g⟩ along two dimensions: (*batch, n, n, *rest) to (*batch, *rest), in float64."""
        ...

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Self:
        """The element whose `tensors()` these are; ValueError if they are no element."""
        ...

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        """g · x for x of shape (*batch, n, *rest); `mark` as in the pattern language."""
        ...

    def compose(self, first: Self) -> Self:
        """The element that acts like `first`, then this one."""
        ...

    def inverse(self) -> Self: ...

    def is_identity(self) -> bool: ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored."""
        ...

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The element with its tensors changed; used to reorder contexts."""
        ...
