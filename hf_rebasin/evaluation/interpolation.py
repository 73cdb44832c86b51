"""The line between two models: what its models are worth, and the barrier on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..alignment.correspondence import untied_like
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.lazy import Here, Tensors
from ..errors import OptionError, nearest
from ..merging.merge import combine
from ..modules.forward import refuse_read_once
from .barrier import halfway, highest, mean_over, rises
from .metrics import Measured, evaluate

Measure: TypeAlias = Callable[[nn.Module], Measured]
Prepare: TypeAlias = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Curve:
    """Loss and metrics on the line from one model to another, both ends included.

    Args:
        at: λ, from 0 to 1.
        loss: there.
        metrics: `{name: values there}`.
    """

    at: tuple[float, ...]
    loss: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def accuracy(self) -> tuple[float, ...]:
        return self.of("accuracy")

    def of(self, name: str) -> tuple[float, ...]:
        """The values of a metric, or of the loss; OptionError for what was not measured."""
        if name == "loss":
            return self.loss
        if name not in self.metrics:
            raise OptionError(f"{name!r} was not measured on this line{nearest(name, ['loss', *self.metrics])}")
        return self.metrics[name]

    @property
    def barrier(self) -> float:
        """max over λ of C((1−λ)θ_A + λθ_B) − [(1−λ)C(θ_A) + λC(θ_B)]; 0 where the line never rises above its ends.

        NaN where the loss is somewhere.
        """
        return highest(rises(self.at, self.loss))

    @property
    def error_barrier(self) -> float:
        """The same of the error rate, 1 − accuracy."""
        return highest(rises(self.at, [1 - accuracy for accuracy in self.accuracy]))

    @property
    def area(self) -> float:
        """∫₀¹ of the same difference over λ by the trapezoid rule: its mean, below 0 where the line sags."""
        return mean_over(self.at, rises(self.at, self.loss))

    @property
    def middle(self) -> dict[str, float]:
        """The loss and every metric at λ = ½, or next to it."""
        i = halfway(self.at)
        return {"loss": self.loss[i], **{name: values[i] for name, values in self.metrics.items()}}

    @property
    def best(self) -> float:
        """The λ of the lowest loss."""
        return self.best_by("loss")

    def best_by(self, name: str) -> float:
        """The λ of the lowest loss or perplexity, or of the highest value of any other metric; of equals, the first.

        Raises:
            OptionError: it was not measured, or is NaN everywhere.
        """
        sign = 1 if name in ("loss", "perplexity") else -1
        values = {t: sign * value for t, value in zip(self.at, self.of(name), strict=True) if not math.isnan(value)}
        if not values:
            raise OptionError(f"{name!r} is NaN on the whole line, so no model on it is the best")
        return min(values, key=lambda t: values[t])


def interpolate(
    fixed: Source,
    moving: Source,
    measure: Measure | Iterable[Any],
    *,
    points: int = 25,
    prepare: Prepare | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Curve:
    """Measure the models on the line between two, ends included.

    There is one model in memory, whichever are the ends: for every λ its tensors are computed one at a time, by the
    merge method lerp, and written over those it had. λ = 0 is the fixed model bit for bit, and λ = 1 the moving one in
    the dtypes of the fixed; whole numbers are the fixed model's. (What a class fuses that is apart on disk, as the
    experts of Mixtral, cannot be written over; such a model is built anew for every λ.)

    Args:
        fixed: the model at λ = 0: a folder, Hub id, module or checkpoint; neither is changed.
        moving: the model at λ = 1.
        measure: what is measured: a callable of a module that gives a `Measured`, or the data for `evaluate`.
        points: how many, ends included; an odd number has the midpoint among them.
        prepare: what is done to every model first, ends included, such as recomputing BatchNorm statistics; its
            tensors may be changed in place.
        device: where they are measured; by default on the CPU, or where a module is.
        progress: show a progress bar (on a terminal).

    Raises:
        OptionError: fewer than two points, data that can be read only once.
        MismatchError: models whose tensors differ in names or shapes.
        CheckpointError: no class is known, or NaN or Inf in one of them.

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
    copy, found = _Copy(_ends(fixed, moving), device), []
    for t in tqdm(at, desc="interpolating", unit="model", disable=None if progress else True):
        copy.move_to(t)
        if prepare is not None:
            prepare(copy.module)
        one = measure(copy.module) if callable(measure) else evaluate(copy.module, measure)
        if not isinstance(one, Measured):
            raise OptionError(f"measure gave {type(one).__name__}; it has to return a Measured, as evaluate does")
        found.append(one)
    metrics = {name: tuple(one.metrics[name] for one in found) for name in found[0].metrics}
    return Curve(tuple(at), tuple(one.loss for one in found), metrics)


def between(
    fixed: Source,
    moving: Source,
    t: float,
    *,
    prepare: Prepare | None = None,
    device: torch.device | str | None = None,
) -> Checkpoint:
    """One model on the line, as `interpolate` measures it: lazy, but for what `prepare` changes.

    Args:
        fixed: the model at λ = 0, whose files it takes.
        moving: the model at λ = 1.
        t: λ, such as the `best` of a curve.
        prepare: what was done to every model on the line; it is done once more, to a module in memory.
        device: where that is.

    Raises:
        MismatchError: models whose tensors differ in names or shapes.
        CheckpointError: NaN or Inf in one of them, when values are computed.

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
        if name in prepared:  # a tied tensor that a file stores all the same is not
            value = prepared[name].to("cpu", part.dtype)
            if not torch.equal(value, part.read().cpu()):
                changed[key] = Here.of(value)
    return checkpoint.with_parts(changed)


def _ends(fixed: Source, moving: Source) -> list[Checkpoint]:
    """Both models, with what either ties and the other does not stored apart; what is in memory is taken to stay."""
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    return [_lasting(untied_like(a, [b])), _lasting(b)]


def _lasting(checkpoint: Checkpoint) -> Checkpoint:
    """Nobody changes tensors while they are measured, so what is computed from them can wait."""
    parts = {k: replace(part, own=True) if isinstance(part, Here) else part for k, part in checkpoint.parts.items()}
    return replace(checkpoint, tensors=Tensors(parts))


class _Copy:
    """The one model that is moved along a line."""

    def __init__(self, ends: Sequence[Checkpoint], device: torch.device | str | None):
        self.ends, self.device = ends, device
        self.module: Any = None
        self.places: dict[str, Tensor] = {}  # its own tensors by disk keys
        self.rest: list[tuple[Tensor, Tensor]] = []  # those that are not stored, and their values

    def move_to(self, t: float) -> None:
        here = combine(self.ends, "lerp", {"t": t})
        if self.places:
            self._overwrite(here)
        else:
            self.module = None  # before there is another
            self.module = here.model().to(self.device)
            self._find_places(here)
        self.module.eval()

    def _find_places(self, here: Checkpoint) -> None:
        """Where the tensors of a checkpoint lie in the module; nowhere, if some of them have no place of their own."""
        own = [*self.module.parameters(), *self.module.buffers()]
        memory = {_memory(tensor) for tensor in own}
        there = Checkpoint.open(self.module).state()
        names = {name: key for name, key in here.canonical().items() if name in there or key not in here.declared_ties}
        if not all(name in there and _memory(there[name]) in memory for name in names):
            return
        self.places = {key: there[name] for name, key in names.items()}
        written = set(map(_memory, self.places.values()))
        self.rest = [(tensor, tensor.detach().clone()) for tensor in own if _memory(tensor) not in written]

    @torch.no_grad()
    def _overwrite(self, here: Checkpoint) -> None:
        for key, place in self.places.items():
            place.copy_(here.tensors[key])
        for place, value in self.rest:
            if not torch.equal(place, value):  # an expanded buffer cannot be written, and need not be
                place.copy_(value)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
