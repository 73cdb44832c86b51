"""`LerpSimple`: lines between modules and the best model on them, under the interface of the `rebasin` package."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.model_classes import copied
from ..errors import OptionError, nearest
from ..merging.recalibration import recalibrate
from .in_memory import Device, merged, refuse_unless_alike

BETTER = {"min": operator.lt, "max": operator.gt}


class LerpSimple:
    """Evaluate the lines from each module to the next, and keep the best model on them.

    All parameters and buffers are interpolated, running statistics too; whole numbers are those of the nearer end.
    The given models are evaluated at once, those between them by `interpolate`. What is evaluated is always a copy in
    evaluation mode, and no more than one and the best are kept: the given models are never changed.

    Args:
        models: two modules of one kind or more.
        eval_fn: gives a number for (model, device), such as a mean loss.
        eval_mode: whether the best model has the lowest ("min") or the highest ("max") number.
        train_dataloader: batches from which BatchNorm statistics of every model in between are recomputed, all of
            them each time. A batch is a tensor, a tuple or list with inputs in it, or a mapping of keyword arguments.
        devices: one per model, where its copies are evaluated; `eval_fn` gets it. By default where the model is.
        device_interp: the same for models in between; by default that of the nearer end.
        input_indices: where in a batch the positional arguments of the model are.
        savedir: a folder for the state dict of the best model, written by `interpolate` with `torch.save`.
        save_all: save all models in between as well.
        verbose: show a progress bar (on a terminal).

    Attributes:
        best_model: a copy of the best model so far, in evaluation mode; of equals, the first.
        best_metric: its number.
        best_model_name: `model_0.pt`, or `interp_models_0_1_perc_0.5.pt` for λ = ½ between the first two.
        metrics_models: the numbers of the given models.
        metrics_interpolated: those of all models in between, in the order of `metrics`.
        metrics: after `interpolate`, `{λ: number}` for every line, λ = 0 and λ = 1 included.

    Raises:
        OptionError: fewer than two models, an unknown `eval_mode`, not one device per model, `save_all` without
            `savedir`, an `eval_fn` that does not give a number.
        MismatchError: models whose tensors differ in names or shapes.

    Example:
        >>> lerp = LerpSimple([model_a, model_b], accuracy, eval_mode="max", train_dataloader=train_dl)
        >>> lerp.interpolate(steps=3)
        >>> list(lerp.metrics[0])
        [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> lerp.best_metric == max(lerp.metrics[0].values())
        True
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        eval_fn: Callable[[nn.Module, Any], Any],
        eval_mode: str = "min",
        train_dataloader: Iterable[Any] | None = None,
        devices: Sequence[Device] | None = None,
        device_interp: Device = None,
        input_indices: Sequence[int] | int = 0,
        savedir: Path | str | None = None,
        save_all: bool = False,
        verbose: bool = False,
    ) -> None:
        refuse_unless_alike(models)
        if eval_mode not in BETTER:
            raise OptionError(f"no eval_mode {eval_mode!r}{nearest(str(eval_mode), BETTER)}")
        if devices is not None and len(devices) != len(models):
            raise OptionError(f"got {len(devices)} devices for {len(models)} models; give one device per model")
        self.models, self.eval_fn, self.eval_mode = models, eval_fn, eval_mode
        self.train_dataloader, self.input_indices = train_dataloader, input_indices
        self.devices: Sequence[Device] = [None] * len(models) if devices is None else devices
        self.device_interp, self.verbose = device_interp, verbose
        self.savedir, self.save_all = savedir, save_all
        _folder(savedir, save_all)

        self.best_model: nn.Module | None = None
        self.best_metric, self.best_model_name = math.nan, ""
        self.metrics: list[dict[float, float]] = []
        self.metrics_models = [
            self._evaluate(copied(model).to(device).eval(), device, f"model_{i}.pt")
            for i, (model, device) in enumerate(zip(models, self.devices, strict=True))
        ]

    @property
    def metrics_interpolated(self) -> list[float]:
        """The numbers of the models in between, line after line."""
        return [metric for line in self.metrics for t, metric in line.items() if 0 < t < 1]

    def interpolate(self, steps: int = 20, savedir: Path | str | None = None, save_all: bool | None = None) -> None:
        """Evaluate `steps` models between each given model and the next, evenly spaced; one more if that is even.

        So the middle is always among them; `metrics` begins anew.

        Args:
            steps: how many models in between.
            savedir: instead of the constructor's.
            save_all: instead of the constructor's.

        Raises:
            OptionError: a negative number of steps, or `save_all` without `savedir`; a dataloader that gives nothing.
        """
        if steps < 0:
            raise OptionError(f"got steps = {steps}; give the number of models in between, such as 9")
        save_all = self.save_all if save_all is None else save_all
        folder = _folder(self.savedir if savedir is None else savedir, save_all)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        intervals = 2 * (steps // 2 + 1)
        self.metrics = [{0.0: metric} for metric in self.metrics_models[:-1]]
        points = [(i, k / intervals) for i in range(len(self.metrics)) for k in range(1, intervals)]
        for i, t in tqdm(points, desc="interpolating", unit="model", disable=None if self.verbose else True):
            self.metrics[i][t] = self._visit(i, t, folder if save_all else None)
        for line, end in zip(self.metrics, self.metrics_models[1:], strict=True):
            line[1.0] = end
        if folder is not None and self.best_model is not None:
            torch.save(self.best_model.state_dict(), folder / self.best_model_name)

    def _visit(self, i: int, t: float, folder: Path | None) -> float:
        """Make, evaluate and perhaps save the model at λ = t between model i and the next."""
        near, far, way = (i, i + 1, t) if t <= 0.5 else (i + 1, i, 1 - t)
        device = self.devices[near] if self.device_interp is None else self.device_interp
        model = merged([self.models[near], self.models[far]], "lerp", t=way).to(device).eval()
        if self.train_dataloader is not None:
            recalibrate(model, (self._inputs(batch, device) for batch in self.train_dataloader))
        name = f"interp_models_{i}_{i + 1}_perc_{t:.6g}.pt"
        if folder is not None:
            torch.save(model.state_dict(), folder / name)
        return self._evaluate(model, device, name)

    def _inputs(self, batch: Any, device: Device) -> Any:
        """What of a batch goes into the model, where the model is."""

        def there(value: Any) -> Any:
            return value if device is None or not isinstance(value, Tensor) else value.to(device)

        if isinstance(batch, Mapping):
            return {name: there(value) for name, value in batch.items()}
        if isinstance(batch, Sequence):
            places = [self.input_indices] if isinstance(self.input_indices, int) else self.input_indices
            return [there(batch[place]) for place in places]
        return there(batch)

    def _evaluate(self, model: nn.Module, device: Device, name: str) -> float:
        """The number of a model, which becomes the best one if there is none yet, or NaN or a worse number."""
        given = self.eval_fn(model, device)
        try:
            metric = float(given.detach() if isinstance(given, Tensor) else given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"eval_fn gave {type(given).__name__} for {name.removesuffix('.pt')}; it has to return one number"
            ) from error
        if self.best_model is None or math.isnan(self.best_metric) or BETTER[self.eval_mode](metric, self.best_metric):
            self.best_model, self.best_metric, self.best_model_name = model, metric, name
        return metric


def _folder(savedir: Path | str | None, save_all: bool) -> Path | None:
    if save_all and savedir is None:
        raise OptionError("save_all, but no savedir: say in which folder")
    return None if savedir is None else Path(savedir)
