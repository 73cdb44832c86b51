"""Forward hooks that last for a `with` block, and the inputs and outputs of layers that they record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .distributed import shard_with_owners
from .forward import attention_mask_of, run_module
from .functional import move_batch

LayerCalls: TypeAlias = Mapping[str, list[tuple[Tensor, Tensor]]]  # {layer: its (input, output), call after call}
BatchCalls: TypeAlias = tuple[list[LayerCalls], Tensor | None]  # of every model, and the attention mask
CACHE_BYTES = 256 << 20  # of recorded tensors that are kept for further passes


@dataclass(kw_only=True)
class RecordedCalls:
    """Inputs and outputs of layers in several models, batch by batch, with the attention masks of the batches.

    Args:
        models: models to run.
        layers: names of the layers, the same in all models.
        calls: number of calls of these layers after which a forward pass ends.
        batches: inputs, which can be read again; each process takes its share.
        device: device that batches are moved to.
        dtype: dtype that their floating-point tensors are cast to; by default they keep their own.
        cached: whether there will be further passes in which these inputs and outputs are the same. They are then kept
            if they need little memory, so that the models need not run again.
        own: whether models after the first, which reads all, read their own batches only, if batches are `OwnBatches`.
    """

    models: Sequence[nn.Module]
    layers: Sequence[str]
    calls: int
    batches: Iterable[Any]
    device: Any = None
    dtype: torch.dtype | None = None
    cached: bool = False
    own: bool = False
    cache: list[BatchCalls] | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[BatchCalls]:
        if self.cache is not None:
            yield from self.cache
            return
        cache: list[BatchCalls] = []
        room = CACHE_BYTES if self.cached else 0
        for owner, batch in shard_with_owners(self.batches):
            batch = move_batch(batch, self.device, self.dtype)
            readers = None if owner is None or not self.own else (0, owner + 1)
            recorded = [
                record_calls(model, self.layers, batch, self.calls)
                if readers is None or i in readers
                else {layer: [] for layer in self.layers}
                for i, model in enumerate(self.models)
            ]
            entry = recorded, attention_mask_of(batch)
            room -= sum(x.nbytes + y.nbytes for calls in recorded for pairs in calls.values() for x, y in pairs)
            if room >= 0:
                cache.append(entry)
            else:
                cache.clear()
            yield entry
        if room >= 0 and self.cached:
            self.cache = cache


class _AllRecorded(Exception):
    """Ends a forward pass when all calls are recorded."""


def record_calls(module: nn.Module, layers: Sequence[str], batch: Any, calls: int) -> LayerCalls:
    """Record inputs and outputs of layers in a forward pass, which ends after so many calls of them."""
    recorded: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    calls_left = calls

    def record(layer: str, x: Tensor, y: Tensor) -> None:
        nonlocal calls_left
        calls_left -= 1
        # what follows may write to these tensors; nothing follows the last call
        recorded[layer].append((x.clone(), y.clone()) if calls_left else (x, y))
        if not calls_left:
            raise _AllRecorded

    try:
        with forward_hooks(module, layers, after=record):
            run_module(module, batch)
    except _AllRecorded:
        pass
    return recorded


@contextmanager
def forward_hooks(
    module: nn.Module,
    names: Iterable[str],
    *,
    before: Callable[[str, Any], Any] | None = None,
    after: Callable[[str, Any, Any], Any] | None = None,
) -> Iterator[None]:
    """Call functions at every call of some submodules, for the duration of a `with` block.

    Args:
        module: module that is run in the block.
        names: names of its submodules, in the order in which hooks are registered.
        before: called with (name, first input); what it returns does not count.
        after: called with (name, first input, output); what it returns replaces the output, unless it is None.
    """

    def pre_hook(name: str, function: Callable[[str, Any], Any]) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            function(name, _first_input(args, kwargs))

        return hook

    def post_hook(name: str, function: Callable[[str, Any, Any], Any]) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            return function(name, _first_input(args, kwargs), output)

        return hook

    handles = []
    try:
        for name in names:
            part = module.get_submodule(name)
            if before is not None:
                handles.append(part.register_forward_pre_hook(pre_hook(name, before), with_kwargs=True))
            if after is not None:
                handles.append(part.register_forward_hook(post_hook(name, after), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)
