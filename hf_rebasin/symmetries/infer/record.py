"""The record of one forward pass: the axes of its tensors, and what each operation did with its indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .unification import GIVEN, Atom, Axis, fresh_axis, pin, unify

# One tensor as an operation sees it: each of its axes as the (index of the operation, axis) pairs it is made of.
Operand: TypeAlias = tuple[tuple[tuple[Any, Axis], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an operation."""

    name: str
    arguments: dict[str, Any]
    out: Any
    why: str  # a reason to pin something: the operation and the module that called it
    written: tuple[Tensor, ...] = ()  # arguments that were written to in place
    where: str = ""  # the module that called it

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
    """The axes of a tensor whose slices along one dimension have axes of their own.

    For example the queries, keys and values of a fused projection after `reshape(batch, tokens, 3, heads, size)`.
    """

    dim: int
    parts: tuple[list[Axis], ...]  # the axes of each slice, without that dimension


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A tensor as it was when an operation used it."""

    tensor: int  # its id
    shape: tuple[int, ...]
    axes: tuple[Axis, ...] | None = None  # None where nothing is known about it, or it is a stack
    stack: Stack | None = None
    uniform: frozenset[int] = frozenset()  # dimensions along which its values are constant
    origin: int | None = None  # the id of the parameter of which it is a view
    floating: bool = True

    @property
    def slices(self) -> Sequence[int | None]:
        """The indices of the slices of a stack; [None] for any other tensor."""
        return [None] if self.stack is None else range(len(self.stack.parts))

    def axis(self, slice_index: int | None, d: int) -> Axis:
        """The axis of one slice at dimension d of the whole tensor; `()` where nothing is known about it."""
        if self.stack is None or slice_index is None:
            return () if self.axes is None else self.axes[d]
        return () if d == self.stack.dim else self.stack.parts[slice_index][d - (d > self.stack.dim)]

    def has(self, d: int) -> bool:
        """Whether its values may vary along a dimension."""
        return self.shape[d] != 1 and d not in self.uniform


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """One call of an operation, kept for later analysis; its arguments have snapshots in place of tensors."""

    name: str
    arguments: dict[str, Any]
    outs: tuple[Snapshot, ...]
    where: str

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)

    @property
    def inputs(self) -> list[Snapshot]:
        """The tensors among its arguments."""
        return [
            item
            for argument in self.arguments.values()
            for item in (argument if isinstance(argument, list) else [argument])
            if isinstance(item, Snapshot)
        ]

    @property
    def out(self) -> Snapshot:
        return self.outs[0]


@dataclass(kw_only=True)
class AxisRecord:
    """The axes of every tensor that depends on a parameter, and how operations relate them."""

    axes: dict[int, list[Axis]] = field(default_factory=dict)
    stacks: dict[int, Stack] = field(default_factory=dict)
    relations: list[tuple[Operand, ...]] = field(default_factory=list)
    steps: list[TracedStep] = field(default_factory=list)  # for the analysis once all axes are known
    unstacked: list[Atom] = field(default_factory=list)  # composite axes that were taken apart slice by slice
    # the sources of names and marks
    origins: dict[int, int] = field(default_factory=dict)  # {id of a view of a parameter: id of the parameter}
    readers: list[tuple[int, Axis]] = field(default_factory=list)  # a linear map reads this axis of a parameter
    gains: set[int] = field(default_factory=set)  # parameters that scale
    looked_up: set[int] = field(default_factory=set)  # parameters whose rows are looked up by number
    roles: list[tuple[str, Axis]] = field(default_factory=list)
    consumed: list[Axis] = field(default_factory=list)  # summed over, or mixed; an axis never consumed is unused
    _uniform: dict[int, tuple[frozenset[int], int]] = field(default_factory=dict)
    _constants: dict[int, list[Axis]] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # kept alive, or Python might reuse an id

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on a parameter."""
        return id(tensor) in self.axes or id(tensor) in self.stacks

    def axes_of(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor; those of an input or a constant are pinned."""
        if id(tensor) in self.axes:
            return self.axes[id(tensor)]
        if id(tensor) in self.stacks:
            return self._collapse(tensor)
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = [fresh_axis(n, GIVEN) for n in tensor.shape]
            self._kept.append(tensor)
        return self._constants[id(tensor)]

    def _collapse(self, tensor: Tensor) -> list[Axis]:
        """Replace a stack by ordinary axes: its slices move alike from now on."""
        stack = self.stacks.pop(id(tensor))
        first, *others = stack.parts
        for other in others:
            for x, y in zip(first, other, strict=True):
                unify(x, y, "slices of one tensor")
        axes = list(first)
        axes.insert(stack.dim, fresh_axis(len(stack.parts), "slices of one tensor", numbers=True))
        self.axes[id(tensor)] = axes
        return axes

    def set(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Set the axes of a tensor."""
        assert len(axes) == tensor.dim(), (len(axes), tensor.shape)
        self.stacks.pop(id(tensor), None)
        self.axes[id(tensor)] = list(axes)
        self._kept.append(tensor)

    def set_stack(self, tensor: Tensor, stack: Stack) -> None:
        """Record that a tensor is a stack; one of a single slice has ordinary axes."""
        if len(stack.parts) == 1:
            axes = list(stack.parts[0])
            axes.insert(stack.dim, ())
            self.set(tensor, axes)
        else:
            self.axes.pop(id(tensor), None)
            self.stacks[id(tensor)] = stack
            self._kept.append(tensor)

    def pin(self, tensors: Iterable[Tensor], why: str) -> None:
        """Pin all axes of the given tensors."""
        for tensor in tensors:
            for axis in self.axes_of(tensor):
                pin(axis, why)

    def set_pinned(self, tensor: Tensor, why: str) -> None:
        """Give a tensor new axes, all of them pinned."""
        self.set(tensor, [fresh_axis(n, why) for n in tensor.shape])

    def set_uniform(self, tensor: Tensor, dims: Iterable[int]) -> None:
        """Record that the values of a tensor are constant along these dimensions, for all inputs."""
        self._uniform[id(tensor)] = frozenset(dims), tensor._version
        self._kept.append(tensor)

    def uniform_dims(self, tensor: Tensor) -> frozenset[int]:
        """The dimensions along which a tensor is constant, so that it restricts no order there.

        Any write to the tensor, or to a view of it, ends that.
        """
        dims, version = self._uniform.get(id(tensor), (frozenset(), 0))
        if not dims or tensor._version != version:
            return frozenset()
        if tensor.is_meta:
            return dims
        constant = frozenset(d for d in dims if torch.equal(tensor, tensor.narrow(d, 0, 1).expand_as(tensor)))
        for d in dims - constant:
            pin(self.axes_of(tensor)[d], "written to outside of any PyTorch operation")
        return constant

    def add_step(self, call: Call, uniform: dict[int, frozenset[int]]) -> None:
        """Keep a call to which its rule has been applied.

        Args:
            call: the call.
            uniform: the uniform dimensions of its arguments, by id, before the call, as it may have written to them.
        """

        def take(value: Any, is_out: bool = False) -> Any:
            if isinstance(value, Tensor):
                return Snapshot(
                    tensor=id(value),
                    shape=tuple(value.shape),
                    axes=tuple(self.axes[id(value)]) if id(value) in self.axes else None,
                    stack=self.stacks.get(id(value)),
                    uniform=frozenset() if is_out else uniform.get(id(value), frozenset()),
                    origin=self.origin_of(value),
                    floating=value.is_floating_point(),
                )
            return [take(item, is_out) for item in value] if isinstance(value, list | tuple) else value

        outs = tuple(take(out, is_out=True) for out in call.outs)
        arguments = {name: take(value) for name, value in call.arguments.items()}
        self.steps.append(TracedStep(name=call.name, arguments=arguments, outs=outs, where=call.where))

    def relate(self, *operands: Operand) -> None:
        """Record which indices of one operation run over which axes of its tensors."""
        self.relations.append(operands)

    def origin_of(self, tensor: Tensor) -> int | None:
        """The id of the parameter of which a tensor is a view, if it is one."""
        return self.origins.get(id(tensor))


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    """Iterate over all tensors in nested tuples, lists and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
