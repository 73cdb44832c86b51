"""What is known of the tensors of one forward pass: their axes, and what each operation did with its indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .unification import GIVEN, Atom, Axis, fresh, pin, unify

# One tensor as an operation sees it: for each of its axes the (index of the operation, axis) pairs it is made of.
Operand: TypeAlias = tuple[tuple[tuple[Any, Axis], ...], ...]


@dataclass(frozen=True)
class Call:
    """One operation as it was called."""

    name: str
    arguments: dict[str, Any]
    out: Any
    why: str  # what a reason says: the operation and the module it ran in
    written: tuple[Tensor, ...] = ()  # arguments that were written to, in the shape that they have
    where: str = ""  # the module it ran in

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors_in(self.arguments.values()))

    @property
    def outs(self) -> list[Tensor]:
        return list(tensors_in([self.out]))


@dataclass(frozen=True)
class Stack:
    """A tensor whose slices along one dimension have axes of their own, as the queries, keys and values of a fused
    projection after `reshape(batch, tokens, 3, heads, size)`."""

    dim: int
    parts: tuple[list[Axis], ...]  # without that dimension


@dataclass(frozen=True)
class Seen:
    """A tensor as it was when an operation saw it."""

    tensor: int  # its id
    shape: tuple[int, ...]
    axes: tuple[Axis, ...] | None = None  # None where nothing is known of it, or it is a stack
    stack: Stack | None = None
    alike: frozenset[int] = frozenset()  # dimensions along which it is the same everywhere
    origin: int | None = None  # the parameter that it is, seen otherwise
    floating: bool = True

    @property
    def faces(self) -> Sequence[int | None]:
        """The slices with axes of their own."""
        return [None] if self.stack is None else range(len(self.stack.parts))

    def axis(self, face: int | None, d: int) -> Axis:
        if self.stack is None or face is None:
            return () if self.axes is None else self.axes[d]
        return () if d == self.stack.dim else self.stack.parts[face][d - (d > self.stack.dim)]

    def has(self, d: int) -> bool:
        """Whether it may differ from place to place along a dimension."""
        return self.shape[d] != 1 and d not in self.alike


@dataclass(frozen=True)
class Step:
    """One operation with what it saw: tensors among its arguments are `Seen`, others are as they were given."""

    name: str
    arguments: dict[str, Any]
    outs: tuple[Seen, ...]
    where: str

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)

    @property
    def seen(self) -> list[Seen]:
        return [
            one
            for said in self.arguments.values()
            for one in (said if isinstance(said, list) else [said])
            if isinstance(one, Seen)
        ]

    @property
    def out(self) -> Seen:
        return self.outs[0]


@dataclass
class Record:
    """The axes of every tensor that comes from a parameter, and the relations that operations made between them."""

    axes: dict[int, list[Axis]] = field(default_factory=dict)
    stacks: dict[int, Stack] = field(default_factory=dict)
    relations: list[tuple[Operand, ...]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)  # for what is to be read once all axes are known
    unstacked: list[Atom] = field(default_factory=list)  # composite axes that were taken apart slice by slice
    # what names and marks are made of
    origins: dict[int, int] = field(default_factory=dict)  # a tensor that is a parameter seen otherwise: its id
    readers: list[tuple[int, Axis]] = field(default_factory=list)  # a linear map reads this axis of a parameter
    gains: set[int] = field(default_factory=set)  # parameters that scale
    looked_up: set[int] = field(default_factory=set)  # parameters whose rows are looked up by number
    roles: list[tuple[str, Axis]] = field(default_factory=list)
    consumed: list[Axis] = field(default_factory=list)  # summed over, or mixed: what nobody consumes is not used
    _uniform: dict[int, tuple[frozenset[int], int]] = field(default_factory=dict)
    _constants: dict[int, list[Axis]] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # or an id might be given again

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self.axes or id(tensor) in self.stacks

    def of(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor; a constant has pinned ones."""
        if id(tensor) in self.axes:
            return self.axes[id(tensor)]
        if id(tensor) in self.stacks:
            return self._collapsed(tensor)
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = [fresh(n, GIVEN) for n in tensor.shape]
            self._kept.append(tensor)
        return self._constants[id(tensor)]

    def _collapsed(self, tensor: Tensor) -> list[Axis]:
        stack = self.stacks.pop(id(tensor))
        first, *others = stack.parts
        for other in others:
            for x, y in zip(first, other, strict=True):
                unify(x, y, "slices of one tensor")
        axes = list(first)
        axes.insert(stack.dim, fresh(len(stack.parts), "slices of one tensor", numbers=True))
        self.axes[id(tensor)] = axes
        return axes

    def set(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        assert len(axes) == tensor.dim(), (len(axes), tensor.shape)
        self.stacks.pop(id(tensor), None)
        self.axes[id(tensor)] = list(axes)
        self._kept.append(tensor)

    def set_stack(self, tensor: Tensor, stack: Stack) -> None:
        if len(stack.parts) == 1:
            axes = list(stack.parts[0])
            axes.insert(stack.dim, ())
            self.set(tensor, axes)
        else:
            self.axes.pop(id(tensor), None)
            self.stacks[id(tensor)] = stack
            self._kept.append(tensor)

    def pin(self, tensors: Iterable[Tensor], why: str) -> None:
        for tensor in tensors:
            for axis in self.of(tensor):
                pin(axis, why)

    def held(self, tensor: Tensor, why: str) -> None:
        """A new tensor of which nothing may move."""
        self.set(tensor, [fresh(n, why) for n in tensor.shape])

    def set_uniform(self, tensor: Tensor, dims: Iterable[int]) -> None:
        """A tensor with values that are the same everywhere along these dimensions, whatever the inputs are."""
        self._uniform[id(tensor)] = frozenset(dims), tensor._version
        self._kept.append(tensor)

    def uniform(self, tensor: Tensor) -> frozenset[int]:
        """The dimensions along which a tensor is the same everywhere, so that its order there says nothing. Who writes
        to it, or to a view of it, ends that."""
        dims, version = self._uniform.get(id(tensor), (frozenset(), 0))
        if not dims or tensor._version != version:
            return frozenset()
        if tensor.is_meta:
            return dims
        same = frozenset(d for d in dims if torch.equal(tensor, tensor.narrow(d, 0, 1).expand_as(tensor)))
        for d in dims - same:
            pin(self.of(tensor)[d], "written to where nobody could see it")
        return same

    def step(self, call: Call, alike: dict[int, frozenset[int]]) -> None:
        """Keep an operation that a rule has just read; `alike` is of before, as it may have written."""

        def seen(one: Any, outs: bool = False) -> Any:
            if isinstance(one, Tensor):
                return Seen(
                    id(one),
                    tuple(one.shape),
                    tuple(self.axes[id(one)]) if id(one) in self.axes else None,
                    self.stacks.get(id(one)),
                    frozenset() if outs else alike.get(id(one), frozenset()),
                    self.origin(one),
                    one.is_floating_point(),
                )
            return [seen(item, outs) for item in one] if isinstance(one, list | tuple) else one

        outs = tuple(seen(out, outs=True) for out in call.outs)
        self.steps.append(Step(call.name, {k: seen(v) for k, v in call.arguments.items()}, outs, call.where))

    def relate(self, *operands: Operand) -> None:
        self.relations.append(operands)

    def origin(self, tensor: Tensor) -> int | None:
        return self.origins.get(id(tensor))


def tensors_in(said: Iterable[Any]) -> Iterable[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    for one in said:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from tensors_in(one)
        elif isinstance(one, dict):
            yield from tensors_in(one.values())
