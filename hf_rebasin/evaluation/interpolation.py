"""Interpolation: measuring the models on the line between two, and taking one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..alignment.correspondence import untie_like
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.lazy import InMemory, Tensors
from ..errors import OptionError
from ..merging.merge import combine
from ..modules.forward import refuse_read_once
from .barrier import Curve
from .metrics import Measured, evaluate

MeasureModel: TypeAlias = Callable[[nn.Module], Measured]
PrepareModel: TypeAlias = Callable[[nn.Module], object]


def interpolate(
    fixed: Source,
    moving: Source,
    measure: MeasureModel | Iterable[Any],
    *,
    points: int = 25,
    prepare: PrepareModel | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Curve:
    """Measure the models on the line between two, both ends included.

    Only one model is in memory at a time, whatever the ends are: for every λ its tensors are computed one by one with
    the merge method lerp and written over the previous ones. λ = 0 is the fixed model bit for bit, and λ = 1 the
    moving one in the dtypes of the fixed; integer tensors are the fixed model's. (Where a class fuses weights that are
    separate on disk, such as the experts of Mixtral, they cannot be overwritten; such a model is rebuilt for every λ.)

    Args:
        fixed: the model at λ = 0: a folder, Hub id, module or checkpoint; neither model is changed.
        moving: the model at λ = 1.
        measure: a callable that takes a module and returns a `Measured`, or the data for `evaluate`.
        points: number of models to measure, ends included; an odd number includes the midpoint.
        prepare: called with every model before it is measured, ends included, for example to recompute BatchNorm
            statistics; it may change tensors in place.
        device: device to measure on; by default the CPU, or where a module already is.
        progress: show a progress bar (on a terminal).

    Returns:
        A `Curve`: `.at` (λ), `.loss`, `.metrics`, `.barrier`, `.middle`, `.best`.

    Raises:
        OptionError: fewer than two points, or data that can be read only once.
        MismatchError: models whose tensors differ in names or shapes.
        CheckpointError: a model of unknown class, or NaN or Inf in one of the models.

    Example:
        >>> curve = interpolate("a", "b", loader)
        >>> curve.barrier, curve.middle["accuracy"]
        >>> between("a", "b", curve.best_by("accuracy")).save("best")
    """
    if points < 2:
        raise OptionError(f"got points = {points}; a line has two ends, so give 2 or more")
    if not callable(measure):
        refuse_read_once(measure)
    at = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    model, results = _MovingModel(_open_ends(fixed, moving), device), []
    for t in tqdm(at, desc="interpolating", unit="model", disable=None if progress else True):
        model.move_to(t)
        if prepare is not None:
            prepare(model.module)
        result = measure(model.module) if callable(measure) else evaluate(model.module, measure)
        if not isinstance(result, Measured):
            raise OptionError(
                f"measure returned {type(result).__name__}; it has to return a Measured, as evaluate does"
            )
        results.append(result)
    metrics = {name: tuple(result.metrics[name] for result in results) for name in results[0].metrics}
    return Curve(tuple(at), tuple(result.loss for result in results), metrics)


def between(
    fixed: Source,
    moving: Source,
    t: float,
    *,
    prepare: PrepareModel | None = None,
    device: torch.device | str | None = None,
) -> Checkpoint:
    """Take one model on the line, as `interpolate` measures it; lazy, except for what `prepare` changes.

    Args:
        fixed: the model at λ = 0, which provides the configuration and other files of the result.
        moving: the model at λ = 1.
        t: λ, such as the `best` of a curve.
        prepare: the callable given to `interpolate`, if any; it is applied once more, to a module in memory.
        device: device of that module.

    Raises:
        MismatchError: models whose tensors differ in names or shapes.
        CheckpointError: NaN or Inf in one of the models, when values are computed.

    Example:
        >>> curve = interpolate("a", "b", loader, prepare=renew)
        >>> between("a", "b", curve.best, prepare=renew).save("best")
    """
    checkpoint = combine([Checkpoint.open(fixed), Checkpoint.open(moving)], "lerp", {"t": t})
    if prepare is None:
        return checkpoint
    module = checkpoint.model().to(device)
    prepare(module)
    prepared, changed = Checkpoint.open(module).state(), {}
    for name, key in checkpoint.canonical().items():
        part = checkpoint.parts[key]
        if name in prepared:  # a tied tensor that a file stores nevertheless is not
            value = prepared[name].to("cpu", part.dtype)
            if not torch.equal(value, part.read().cpu()):
                changed[key] = InMemory.of(value)
    return checkpoint.with_parts(changed)


def _open_ends(fixed: Source, moving: Source) -> list[Checkpoint]:
    """Open both models; tensors that only one of them ties are stored separately."""
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    return [_assume_unchanged(untie_like(a, [b])), _assume_unchanged(b)]


def _assume_unchanged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors in memory marked as its own, so that merges of them stay lazy.

    Nobody changes them while the line is measured.
    """
    parts = {
        k: replace(part, owned=True) if isinstance(part, InMemory) else part for k, part in checkpoint.parts.items()
    }
    return replace(checkpoint, tensors=Tensors(parts))


class _MovingModel:
    """The one model in memory, which is moved along the line."""

    def __init__(self, ends: Sequence[Checkpoint], device: torch.device | str | None):
        self.ends, self.device = ends, device
        self.module: Any = None
        self.targets: dict[str, Tensor] = {}  # the module's tensors, by disk key
        self.rest: list[tuple[Tensor, Tensor]] = []  # tensors that are not stored, and their values

    def move_to(self, t: float) -> None:
        """Give the module the tensors at λ = `t`, and evaluation mode."""
        checkpoint = combine(self.ends, "lerp", {"t": t})
        if self.targets:
            self._overwrite(checkpoint)
        else:
            self.module = None  # freed before the next one is built
            self.module = checkpoint.model().to(self.device)
            self._find_targets(checkpoint)
        self.module.eval()

    def _find_targets(self, checkpoint: Checkpoint) -> None:
        """Find the module's tensor for every disk key; none if the module lacks some of the checkpoint's tensors."""
        module_tensors = [*self.module.parameters(), *self.module.buffers()]
        memory = {_storage_pointer(tensor) for tensor in module_tensors}
        module_state = Checkpoint.open(self.module).state()
        disk_keys = {
            name: key
            for name, key in checkpoint.canonical().items()
            if name in module_state or key not in checkpoint.declared_ties
        }
        if not all(name in module_state and _storage_pointer(module_state[name]) in memory for name in disk_keys):
            return
        self.targets = {key: module_state[name] for name, key in disk_keys.items()}
        written = set(map(_storage_pointer, self.targets.values()))
        self.rest = [
            (tensor, tensor.detach().clone()) for tensor in module_tensors if _storage_pointer(tensor) not in written
        ]

    @torch.no_grad()
    def _overwrite(self, checkpoint: Checkpoint) -> None:
        for key, target in self.targets.items():
            target.copy_(checkpoint.tensors[key])
        for target, value in self.rest:
            if not torch.equal(target, value):  # an expanded buffer cannot be written, and need not be either
                target.copy_(value)


def _storage_pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
