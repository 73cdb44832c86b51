"""Run a module's own forward pass without its weights, applying the rules to every operation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from ...checkpoints.model_classes import copy_module
from ...errors import SpecError
from ...modules.forward import output_tensors, run_module
from ...modules.hooks import forward_hooks
from .aten import FILLED, apply_rule
from .record import AxisRecord, Call, tensors_in
from .unification import Atom, Axis, flat_atoms, fresh_axis, leaf_atoms, pin, root, sum_of

# Axes of parameters that start as equal blocks: {(name, axis): (sizes of the factors before, number of blocks)}.
InitialBlocks = dict[tuple[str, int], tuple[tuple[int, ...], int]]


@dataclass(kw_only=True)
class Trace:
    """A forward pass: the axes of every parameter and of every module's output, and the record of its operations."""

    record: AxisRecord
    parameters: dict[str, list[Axis]]  # by module key, in the order in which they were first used
    unused: list[str]  # keys of parameters that the forward pass does not use
    outputs: dict[str, list[Axis]]  # by module
    names: dict[int, str]  # {id of a parameter, as in the record: its key}


def trace_module(module: nn.Module, inputs: Any, kept: set[str], blocks: InitialBlocks) -> Trace:
    """Run a module on inputs, with shapes in place of its parameters and stored buffers.

    Whatever does not depend on them (inputs, masks, positions) is computed with its values, so the forward pass may
    branch on its inputs.

    Args:
        module: any module; it is not changed.
        inputs: inputs of its forward pass.
        kept: keys of the tensors whose axes are traced.
        blocks: axes of parameters that start as equal blocks.

    Raises:
        SpecError: the forward pass fails, or asks for a value that depends on the weights.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise SpecError(
            f"{type(module).__name__} is compiled, which hides its operations; give the module it was compiled from"
        )
    record = AxisRecord()
    hollow, tensors = _hollow_copy(module)
    with torch.inference_mode(False):
        inputs = tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), inputs)  # a model may write to them
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        if name in kept and id(tensor) not in names:
            record.set(tensor, _initial_axes(name, tensor, blocks))
            record.origins[id(tensor)] = id(tensor)
            names[id(tensor)] = name
    tracer = _Tracer(record, names)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # a single, opaque operation
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            tracer.watch(hollow),
            _OneDevice(record),
            tracer,
        ):
            out = run_module(hollow, inputs)
    except SpecError:
        raise
    except Exception as error:  # a model's code may raise anything
        raise SpecError(
            f"the symmetries of {type(module).__name__} cannot be inferred: its forward pass, run without weights, "
            f"fails in {tracer.where}: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    record.pin((t for t in output_tensors(out) if record.knows(t)), "an output of the model")
    parameters = {names[i]: record.axes[i] for i in tracer.used}
    unused = [name for i, name in names.items() if i not in tracer.used]
    for name in unused:
        record.pin([tensors[name]], "the forward pass does not use it")
        parameters[name] = record.axes_of(tensors[name])
    for name, tensor in module.state_dict().items():
        if name not in tensors and isinstance(tensor, Tensor):
            parameters[name] = [fresh_axis(n, "not a floating-point tensor") for n in tensor.shape]
    consumed = {atom for axis in record.consumed for atom in leaf_atoms(axis)}
    for axes in parameters.values():
        for atom in (atom for axis in axes for atom in leaf_atoms(axis)):
            if atom not in consumed:  # e.g. the last rows of a position table, which longer inputs would read
                pin((atom,), "nothing reads it on these inputs")
    return Trace(record=record, parameters=parameters, unused=unused, outputs=tracer.outputs, names=names)


def _initial_axes(name: str, tensor: Tensor, blocks: InitialBlocks) -> list[Axis]:
    """The axes of a parameter before the forward pass."""
    axes = [fresh_axis(n) for n in tensor.shape]
    for d, n in enumerate(tensor.shape):
        if (name, d) in blocks:
            before, count = blocks[name, d]
            outer = tuple(atom for size in before for atom in fresh_axis(size))
            inner = n // math.prod(before) // count
            axes[d] = (*outer, *sum_of([fresh_axis(inner) for _ in range(count)]))
    return axes


def _hollow_copy(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Copy a module, in evaluation mode, with shapes in place of its floating-point parameters and stored buffers.

    All other tensors are on the CPU. Returns the copy, and its tensors without values by their keys.
    """
    stored = set(module.state_dict())
    hollow: dict[int, Tensor] = {}
    everything: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    everything |= {n: b for n, b in module.named_buffers(remove_duplicate=False) if n in stored}
    names = {name: tensor for name, tensor in everything.items() if tensor.is_floating_point()}
    for tensor in names.values():
        if id(tensor) not in hollow:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            is_parameter = isinstance(tensor, nn.Parameter)
            hollow[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    copy = copy_module(module, hollow).eval()
    for part in copy.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.cpu()
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False  # a cache is not an output whose order matters
    return copy, {name: hollow[id(tensor)] for name, tensor in names.items()}


@cache
def _schema_arguments(op: Any) -> list[tuple[str, Any]]:
    """The (name, default) pairs of an operation's arguments."""
    return [(a.name, a.default_value if a.has_default_value() else None) for a in op._schema.arguments]


@cache
def _written_arguments(op: Any) -> list[str]:
    """The arguments an operation writes to; changing only their shape (`squeeze_`) does not count."""
    if torch.Tag.inplace_view in op.tags:
        return []
    return [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


@cache
def _shares_memory(op: Any) -> bool:
    """Whether an operation writes to its arguments, or returns something that shares memory with them."""
    return op._schema.is_mutable or any(out.alias_info is not None for out in op._schema.returns)


class _Tracer(TorchDispatchMode):
    """Intercepts every ATen operation of a forward pass, and applies the rules to it."""

    def __init__(self, record: AxisRecord, names: Mapping[int, str]):
        super().__init__()
        self.record, self.names = record, names
        self.used: dict[int, None] = {}
        self.outputs: dict[str, list[Axis]] = {}
        self.path: list[str] = []
        self.lost: set[int] = set()  # storages whose values were lost: something without values was written there
        self.shapes: dict[Any, Any] = {}  # outputs of operations by the shapes of their arguments: layers repeat them

    @property
    def where(self) -> str:
        """The innermost module that runs."""
        return self.path[-1] if self.path else "the model"

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Keep track of the module that runs, and of the axes of every module's output."""
        called_again: set[str] = set()

        def enter(name: str, _input: Any) -> None:
            self.path.append(name)

        def leave(name: str, _input: Any, out: Any) -> None:
            self.path.pop()
            out = out[0] if isinstance(out, tuple | list) and out else out
            if name in self.outputs or name in called_again:
                called_again.add(name)  # called more than once, so it has no single output
                self.outputs.pop(name, None)
            elif isinstance(out, Tensor) and self.record.knows(out):
                self.outputs[name] = list(self.record.axes_of(out))

        names = [name for name, _ in module.named_modules() if name]
        with forward_hooks(module, names, before=enter, after=leave):
            yield

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = op._schema.name.partition("::")[2]
        known = False
        without_values = False
        for tensor in tensors_in((args, kwargs)):
            known |= self.record.knows(tensor)
            without_values |= self._lacks_values(tensor)
            if id(tensor) in self.names:
                self.used.setdefault(id(tensor))
        if name in ("index", "index_put_", "index_put", "_unsafe_index"):
            args = (args[0], _masks_to_indices(args[1]), *args[2:])
        filled = name in FILLED
        hollow = without_values and not filled
        declared = _schema_arguments(op)
        if not hollow and (kwargs.get("device") is not None or (filled and any(n == "device" for n, _ in declared))):
            kwargs["device"] = torch.device("cpu")
        strides = args[0].stride() if name == "as_strided_" else None  # before the call
        out = self._run_on_shapes(op, args, kwargs) if hollow else op(*args, **kwargs)
        if name in ("empty", "empty_like", "new_empty", "empty_strided") and not out.is_meta:
            out.zero_()
        if name in ("expand", "repeat") and not known:
            new = out.dim() - args[0].dim()
            self.record.set_uniform(out, [d for d in range(out.dim()) if d < new or args[0].shape[d - new] == 1])
        if known or filled:
            arguments = dict(declared) | kwargs
            arguments |= {key: value for (key, _), value in zip(declared, args, strict=False)}
            if strides is not None:
                arguments["strides_before"] = strides
            written = tuple(tensors_in(arguments[name] for name in _written_arguments(op)))
            why = f"{name} in {self.where}"
            call = Call(name=name, arguments=arguments, out=out, why=why, written=written, where=self.where)
            apply_rule(self.record, call)
        return out

    def _lacks_values(self, tensor: Tensor) -> bool:
        return tensor.is_meta or (bool(self.lost) and tensor.untyped_storage().data_ptr() in self.lost)

    def _run_on_shapes(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on shapes alone; a tensor with values that it writes to loses them."""
        stand_ins: dict[int, Tensor] = {}

        def to_shape(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return stand_ins.setdefault(id(tensor), tensor.to("meta"))
            return tensor

        key = _shape_key(op, args, kwargs)
        if key is not None and key in self.shapes:
            return _empty_like(self.shapes[key])
        hollow_args, hollow_kwargs = tree_map_only(Tensor, to_shape, (args, kwargs))
        if hollow_kwargs.get("device") is not None:
            hollow_kwargs["device"] = torch.device("meta")
        if op._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"):
            raise SpecError(
                f"the forward pass asks for a value in {self.where} ({op}) that depends on the weights, so it is not "
                "the same computation for all weights, and no symmetry can be inferred"
            )
        out = op(*hollow_args, **hollow_kwargs)
        if key is not None:
            self.shapes[key] = out
        if stand_ins:
            by_id = {id(t): t for t in tensors_in((args, kwargs))}
            originals = {id(stand_in): by_id[i] for i, stand_in in stand_ins.items()}

            def restore(tensor: Tensor) -> Tensor:
                if id(tensor) not in originals:
                    return tensor
                self.lost.add(originals[id(tensor)].untyped_storage().data_ptr())
                return originals[id(tensor)]

            out = tree_map_only(Tensor, restore, out)
        return out


class _OneDevice(TorchFunctionMode):
    """Passes shapes alone to functions that compare devices before any of their operations can be intercepted."""

    NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention", "quantile", "nanquantile")

    def __init__(self, record: AxisRecord):
        super().__init__()
        self.record = record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.NAMES:
            args, kwargs = tree_map_only(Tensor, self._to_shape, (args, kwargs))
        return function(*args, **kwargs)

    def _to_shape(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta or not tensor.is_floating_point():  # integers may be lengths
            return tensor
        with _disable_current_modes():
            shape = tensor.to("meta")
            if self.record.knows(tensor):
                self.record.set(shape, self.record.axes_of(tensor))
                self.record.set_uniform(shape, self.record.uniform_dims(tensor))
        return shape


def _shape_key(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Everything an operation's output shapes depend on; None where it shares memory, or its arguments have values."""

    def key_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_meta:
                raise TypeError
            return value.shape, value.stride(), value.dtype
        return tuple(map(key_of, value)) if isinstance(value, list | tuple) else (type(value), value)  # 1 is not 1.0

    if _shares_memory(op):
        return None
    try:
        key = (op, key_of(args), tuple((name, key_of(value)) for name, value in kwargs.items()))
        hash(key)
    except TypeError:
        return None
    return key


def _empty_like(out: Any) -> Any:
    """New tensors with the shapes of an operation's outputs."""
    if isinstance(out, Tensor):
        return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    return type(out)(map(_empty_like, out)) if isinstance(out, list | tuple) else out


def _masks_to_indices(indices: Any) -> list[Any]:
    """Replace masks among indices by the numbers they select: how many these are, a shape does not tell."""
    numbers: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype is torch.bool and not index.is_meta:
            numbers += index.nonzero(as_tuple=True)
        else:
            numbers.append(index)
    return numbers


def missing_blocks(trace: Trace, blocks: InitialBlocks) -> InitialBlocks:
    """Axes of parameters that were taken apart slice by slice, but do not start as blocks yet.

    A second pass that starts with these blocks can give each slice axes of its own.
    """
    unstacked = {id(root(atom)) for atom in trace.record.unstacked}
    missing: InitialBlocks = {}
    for name, axes in trace.parameters.items():
        for d, axis in enumerate(axes):
            atoms: list[Atom] = flat_atoms(axis)
            for i, atom in enumerate(atoms[:-1]):
                others = (a for a in atoms if a is not atom)
                if id(atom) in unstacked and (name, d) not in blocks and not any(a.parts for a in others):
                    missing[name, d] = (tuple(a.size for a in atoms[:i]), atom.size)
                    break
    return missing
