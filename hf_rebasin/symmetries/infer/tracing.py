"""Running a module's own forward pass without its weights, and asking the rules about every operation."""

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

from ...checkpoints.model_classes import copied
from ...errors import SpecError
from ...modules.forward import outputs_in, run
from .aten import FILLED, apply_rule
from .record import Call, Record, tensors_in
from .unification import Atom, Axis, flat, fresh, leaves, pin, root, sum_of

# Axes of parameters to begin with as equal blocks: {(name, axis): (sizes of the factors before, number of blocks)}.
Blocks = dict[tuple[str, int], tuple[tuple[int, ...], int]]


@dataclass
class Traced:
    """A forward pass: the axes of every parameter and of every module's output, and what was recorded on the way."""

    record: Record
    parameters: dict[str, list[Axis]]  # by module key, in the order in which they were first used
    unused: list[str]
    outputs: dict[str, list[Axis]]
    names: dict[int, str]  # parameter by id, as the record says them


def trace(module: nn.Module, inputs: Any, kept: set[str], blocks: Blocks) -> Traced:
    """Run a module on inputs, its parameters and the buffers in `kept` as shapes alone.

    What does not hang on them (inputs, masks, positions) is computed with its values, so that a forward pass may ask
    what its inputs look like.

    Raises:
        SpecError: the forward pass fails, or asks for a value that hangs on the weights.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise SpecError(
            f"{type(module).__name__} is compiled and hides its operations; give the module it was made of"
        )
    record = Record()
    twin, tensors = _hollow(module)
    with torch.inference_mode(False):
        inputs = tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), inputs)  # a model may write to them
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        if name in kept and id(tensor) not in names:
            record.set(tensor, _first_axes(name, tensor, blocks))
            record.origins[id(tensor)] = id(tensor)
            names[id(tensor)] = name
    run_ = _Run(record, names)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operation that nobody could see into
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            run_.watching(twin),
            _OneDevice(record),
            run_,
        ):
            out = run(twin, inputs)
    except SpecError:
        raise
    except Exception as error:  # whatever the code of a model raises
        raise SpecError(
            f"the symmetries of {type(module).__name__} cannot be inferred: its forward pass, run without weights, "
            f"fails in {run_.where}: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    record.pin((t for t in outputs_in(out) if record.knows(t)), "an output of the model")
    by_name = {names[i]: record.axes[i] for i in run_.used}
    unused = [name for i, name in names.items() if i not in run_.used]
    for name in unused:
        record.pin([tensors[name]], "the forward pass does not use it")
        by_name[name] = record.of(tensors[name])
    for name, tensor in module.state_dict().items():
        if name not in tensors and isinstance(tensor, Tensor):
            by_name[name] = [fresh(n, "not a floating-point tensor") for n in tensor.shape]
    consumed = {atom for axis in record.consumed for atom in leaves(axis)}
    for axes in by_name.values():
        for atom in (atom for axis in axes for atom in leaves(axis)):
            if atom not in consumed:  # the end of a table of positions; more of it on other inputs
                pin((atom,), "nothing reads it on these inputs")
    return Traced(record, by_name, unused, run_.outputs, names)


def _first_axes(name: str, tensor: Tensor, blocks: Blocks) -> list[Axis]:
    axes = [fresh(n) for n in tensor.shape]
    for d, n in enumerate(tensor.shape):
        if (name, d) in blocks:
            before, count = blocks[name, d]
            outer = tuple(atom for size in before for atom in fresh(size))
            inner = n // math.prod(before) // count
            axes[d] = (*outer, *sum_of([fresh(inner) for _ in range(count)]))
    return axes


def _hollow(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a module in evaluation mode whose parameters and stored buffers are shapes alone: those that move,
    which whole numbers do not. Everything else is on the CPU."""
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
    twin = copied(module, hollow).eval()
    for part in twin.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.cpu()
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False  # a cache is nothing that a model computes
    return twin, {name: hollow[id(tensor)] for name, tensor in names.items()}


@cache
def _parameters_of(op: Any) -> list[tuple[str, Any]]:
    return [(a.name, a.default_value if a.has_default_value() else None) for a in op._schema.arguments]


@cache
def _written(op: Any) -> list[str]:
    """The arguments whose values an operation writes; changing only how they are seen (`squeeze_`) is no writing."""
    if torch.Tag.inplace_view in op.tags:
        return []
    return [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


@cache
def _aliases(op: Any) -> bool:
    """Whether an operation writes, or gives what shares memory with what it got."""
    return op._schema.is_mutable or any(out.alias_info is not None for out in op._schema.returns)


class _Run(TorchDispatchMode):
    """Sees every operation below the module's own code."""

    def __init__(self, record: Record, names: Mapping[int, str]):
        super().__init__()
        self.record, self.names = record, names
        self.used: dict[int, None] = {}
        self.outputs: dict[str, list[Axis]] = {}
        self.path: list[str] = []
        self.lost: set[int] = set()  # storages that were written to without values
        self.shapes: dict[Any, Any] = {}  # what an operation gave on such shapes: layers repeat each other

    @property
    def where(self) -> str:
        return self.path[-1] if self.path else "the model"

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Know which module runs, and keep what each gives."""
        several: set[str] = set()

        def entered(name: str) -> Any:
            return lambda *_: self.path.append(name)

        def left(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, out: Any) -> None:
                self.path.pop()
                out = out[0] if isinstance(out, tuple | list) and out else out
                if name in self.outputs or name in several:
                    several.add(name)  # called more than once, so no output is the module's
                    self.outputs.pop(name, None)
                elif isinstance(out, Tensor) and self.record.knows(out):
                    self.outputs[name] = list(self.record.of(out))

            return hook

        hooks = []
        for name, part in module.named_modules():
            if name:
                hooks += [part.register_forward_pre_hook(entered(name)), part.register_forward_hook(left(name))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = op._schema.name.partition("::")[2]
        known = False
        shapes_only = False
        for tensor in tensors_in((args, kwargs)):
            known |= self.record.knows(tensor)
            shapes_only |= self._is_shape(tensor)
            if id(tensor) in self.names:
                self.used.setdefault(id(tensor))
        if name in ("index", "index_put_", "index_put", "_unsafe_index"):
            args = (args[0], _numbers(args[1]), *args[2:])
        filled = name in FILLED
        hollow = shapes_only and not filled
        declared = _parameters_of(op)
        if not hollow and (kwargs.get("device") is not None or (filled and any(n == "device" for n, _ in declared))):
            kwargs["device"] = torch.device("cpu")
        strides = args[0].stride() if name == "as_strided_" else None  # of before it was called
        out = self._without_values(op, args, kwargs) if hollow else op(*args, **kwargs)
        if name in ("empty", "empty_like", "new_empty", "empty_strided") and not out.is_meta:
            out.zero_()
        if name in ("expand", "repeat") and not known:
            new = out.dim() - args[0].dim()
            self.record.set_uniform(out, [d for d in range(out.dim()) if d < new or args[0].shape[d - new] == 1])
        if known or filled:
            said = dict(declared) | kwargs
            said |= {key: value for (key, _), value in zip(declared, args, strict=False)}
            if strides is not None:
                said["strides_before"] = strides
            written = tuple(tensors_in(said[a] for a in _written(op)))
            apply_rule(self.record, Call(name, said, out, f"{name} in {self.where}", written, self.where))
        return out

    def _is_shape(self, tensor: Tensor) -> bool:
        return tensor.is_meta or (bool(self.lost) and tensor.untyped_storage().data_ptr() in self.lost)

    def _without_values(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on shapes; what it writes to and has values loses them."""
        twins: dict[int, Tensor] = {}

        def shape_of(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return twins.setdefault(id(tensor), tensor.to("meta"))
            return tensor

        key = _signature(op, args, kwargs)
        if key is not None and key in self.shapes:
            return _like(self.shapes[key])
        hollow_args, hollow_kwargs = tree_map_only(Tensor, shape_of, (args, kwargs))
        if hollow_kwargs.get("device") is not None:
            hollow_kwargs["device"] = torch.device("meta")
        if op._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"):
            raise SpecError(
                f"the forward pass asks for a value in {self.where} ({op}) that hangs on the weights, so it is not "
                "the same computation for all of them, and no symmetry can be inferred"
            )
        out = op(*hollow_args, **hollow_kwargs)
        if key is not None:
            self.shapes[key] = out
        if twins:
            given = {id(t): t for t in tensors_in((args, kwargs))}
            back = {id(twin): given[i] for i, twin in twins.items()}

            def original(tensor: Tensor) -> Tensor:
                if id(tensor) not in back:
                    return tensor
                self.lost.add(back[id(tensor)].untyped_storage().data_ptr())
                return back[id(tensor)]

            out = tree_map_only(Tensor, original, out)
        return out


class _OneDevice(TorchFunctionMode):
    """Some functions look at devices before the operations in them are seen: they get shapes alone."""

    NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention", "quantile", "nanquantile")

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.NAMES:
            args, kwargs = tree_map_only(Tensor, self._shape_of, (args, kwargs))
        return function(*args, **kwargs)

    def _shape_of(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta or not tensor.is_floating_point():  # whole numbers may be lengths
            return tensor
        with _disable_current_modes():
            shape = tensor.to("meta")
            if self.record.knows(tensor):
                self.record.set(shape, self.record.of(tensor))
                self.record.set_uniform(shape, self.record.uniform(tensor))
        return shape


def _signature(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation's output shapes hang on; None where memory is shared, or where it gets values."""

    def seen(one: Any) -> Any:
        if isinstance(one, Tensor):
            if not one.is_meta:
                raise TypeError
            return one.shape, one.stride(), one.dtype
        return tuple(map(seen, one)) if isinstance(one, list | tuple) else (type(one), one)  # 1 is not 1.0

    if _aliases(op):
        return None
    try:
        key = (op, seen(args), tuple((name, seen(value)) for name, value in kwargs.items()))
        hash(key)
    except TypeError:
        return None
    return key


def _like(out: Any) -> Any:
    """New tensors of the same shapes."""
    if isinstance(out, Tensor):
        return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    return type(out)(map(_like, out)) if isinstance(out, list | tuple) else out


def _numbers(indices: Any) -> list[Any]:
    """Indices with masks as numbers: a mask picks what is true in it, which a shape does not say."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype is torch.bool and not index.is_meta:
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def wanted_blocks(traced: Traced, blocks: Blocks) -> Blocks:
    """Axes of parameters that were taken apart slice by slice, so that each slice can have axes of its own."""
    taken = {id(root(atom)) for atom in traced.record.unstacked}
    more: Blocks = {}
    for name, axes in traced.parameters.items():
        for d, axis in enumerate(axes):
            atoms: list[Atom] = flat(axis)
            for i, atom in enumerate(atoms[:-1]):
                others = (a for a in atoms if a is not atom)
                if id(atom) in taken and (name, d) not in blocks and not any(a.parts for a in others):
                    more[name, d] = (tuple(a.size for a in atoms[:i]), atom.size)
                    break
    return more
