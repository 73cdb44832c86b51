"""Groups: how an axis may move. Each file defines one group, as a class named `Element`.

An instance holds one group element for every index of its contexts: all its tensors have the contexts as leading
dimensions. `Alignment` moves a block's dimensions into that order, so groups need not know about blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self

    from ...registry import Permutations
    from ..elements.matrices import Moments
    from ..elements.relaxation import Relaxation, Relaxed


class Element(Protocol):
    """The interface of every group's `Element`."""

    EXACT: ClassVar[bool]  # whether acting only reorders entries, so that every value keeps its bits
    PERMUTATIONS: ClassVar[Permutations]  # the group of the permutations it contains
    ROTATES: ClassVar[bool]  # whether norms stand between a moved stream and its readers, so that it needs a gauge
    SIGNED: ClassVar[bool]  # whether it has signs, which do not act on diagonal axes
    MOVES_ONE: ClassVar[bool]  # whether it can move an axis of size 1
    SIZE: ClassVar[int | None]  # the only size it supports, or None

    @classmethod
    def identity(cls, batch: tuple[int, ...], n: int) -> Self:
        """Return the element that moves nothing, on n items, for every index of `batch`."""
        ...

    @classmethod
    def permuting(cls, order: Tensor) -> Self:
        """Return the element that only permutes; only for groups that contain the permutations."""
        ...

    @classmethod
    def random(cls, batch: tuple[int, ...], n: int, generator: torch.Generator) -> Self:
        """Draw a random element."""
        ...

    @classmethod
    def project(cls, similarity: Tensor) -> Self:
        """Find the isometry g that maximises ⟨similarity, g⟩ for (*batch, n, n) matrices ⟨fixed i, moving j⟩.

        A `SIGNED` group also takes `diagonal`, the similarity along diagonal axes, on which signs do not act.
        """
        ...

    @classmethod
    def best(cls, similarity: Tensor) -> Tensor:
        """Return ⟨similarity, g⟩ for the g that `project` finds for these arguments, as (*batch) in float64."""
        ...

    @classmethod
    def moments(cls, x: Tensor, y: Tensor) -> Tensor:
        """Return the products of x and y, (*batch, n, rest), that `balance` and `fit` use; they sum over tensors."""
        ...

    @classmethod
    def balance(cls, writers: Tensor, readers: Tensor) -> Self:
        """Find the g that makes the moments of writers and readers equal.

        Two models that differ by an element of the group differ by an isometry once both are balanced. In a group of
        isometries, g is the identity.
        """
        ...

    @classmethod
    def fit(cls, writers: Moments, readers: Moments) -> Self:
        """Find the g near the identity that minimises ‖x - g y‖² + ‖u - g⁻ᵀ v‖² without permuting.

        The arguments are the moments ⟨x, x⟩, ⟨x, y⟩, ⟨y, y⟩ of writers, and likewise those of readers. It refines the
        scales and bases once `project` has found the isometry.
        """
        ...

    @classmethod
    def relax(cls, batch: tuple[int, ...], n: int, relaxation: Relaxation) -> Relaxed:
        """Return the identity with gradients: latents, their relaxed element, and the nearest element of the group."""
        ...

    def contract(self, similarity: Tensor, diagonal: bool = False) -> Tensor:
        """Return ⟨similarity, g⟩ over two dimensions, (*batch, n, n, *rest) to (*batch, *rest), in float64."""
        ...

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], batch: tuple[int, ...], n: int) -> Self:
        """Build the element whose `tensors()` these are; raise ValueError if there is none."""
        ...

    def act(self, x: Tensor, mark: str = "") -> Tensor:
        """Return g · x for x of shape (*batch, n, *rest); `mark` as in the pattern language."""
        ...

    def compose(self, first: Self) -> Self:
        """Return the element that acts like `first` and then like this one."""
        ...

    def inverse(self) -> Self: ...

    def is_identity(self) -> bool: ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors to store, by name."""
        ...

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the element with `change` applied to its tensors; used to reorder contexts."""
        ...
