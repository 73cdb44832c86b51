"""What layers read and give while a module computes, and once more of what was heard before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .distributed import shared_out
from .forward import mask_in, run
from .functional import there

Calls: TypeAlias = Mapping[str, list[tuple[Tensor, Tensor]]]  # by layers: what they read and gave, call after call
Heard: TypeAlias = tuple[list[Calls], Tensor | None]
KEPT = 256 << 20  # bytes of what was heard that are kept for further passes


@dataclass
class Hearing:
    """What layers read and gave in several models, batch by batch, with the masks of the batches.

    Args:
        models: that compute.
        names: of the layers, the same in all of them.
        calls: after so many of theirs a forward pass ends.
        batches: inputs, which can be read again; each process takes its share.
        device: where they are brought.
        dtype: what their floating-point numbers are brought to; by default they stay.
        kept: whether there will be further passes, in which all that these layers read and gave is the same. Where it
            is little it is kept, and the models need not compute it again.
    """

    models: Sequence[nn.Module]
    names: Sequence[str]
    calls: int
    batches: Iterable[Any]
    device: Any = None
    dtype: torch.dtype | None = None
    kept: bool = False
    memory: list[Heard] | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Heard]:
        if self.memory is not None:
            yield from self.memory
            return
        memory: list[Heard] = []
        room = KEPT if self.kept else 0
        for batch in shared_out(self.batches):
            batch = there(batch, self.device, self.dtype)
            one = [heard(model, self.names, batch, self.calls) for model in self.models], mask_in(batch)
            room -= sum(x.nbytes + y.nbytes for calls in one[0] for pairs in calls.values() for x, y in pairs)
            if room >= 0:
                memory.append(one)
            else:
                memory.clear()
            yield one
        if room >= 0 and self.kept:
            self.memory = memory


class _Reached(Exception):
    """All that was to be heard has been heard."""


def heard(module: nn.Module, names: Sequence[str], batch: Any, calls: int) -> Calls:
    """What layers read and gave in a forward pass, which ends after so many calls of them."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    left = calls

    def hear(name: str, x: Tensor, y: Tensor) -> None:
        nonlocal left
        left -= 1
        # the last is done with at once; before that, what follows may change it in place
        found[name].append((x.clone(), y.clone()) if left else (x, y))
        if not left:
            raise _Reached

    try:
        with listening(module, names, hear):
            run(module, batch)
    except _Reached:
        pass
    return found


@contextmanager
def listening(module: nn.Module, names: Iterable[str], hear: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """`hear(name, input, output)` at every call of some layers, while it lasts."""

    def hook(name: str) -> Any:
        def called(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
            hear(name, inputs[0] if inputs else next(iter(named.values()), None), output)

        return called

    handles = [module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
