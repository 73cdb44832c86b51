"""`LerpSimple`: the best model on the lines between modules, with the interface of the `rebasin` package."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.model_classes import copy_module
from ..errors import OptionError, nearest
from ..merging.recalibration import recalibrate
from ..modules.functional import Device
from .in_memory import merge_modules, refuse_unless_alike

BETTER = {"min": operator.lt, "max": operator.gt}


class LerpSimple:
    """Evaluate models on the line from each given model to the next, and keep the best.

    All parameters and buffers are interpolated, including running statistics; integers are those of the nearer end.
    The constructor evaluates the given models, `interpolate` those in between. Only copies in evaluation mode are
    evaluated, so the given models never change; at most two copies are alive at a time, the current and the best.

    Args:
        models: two or more modules of one kind.
        eval_fn: function of (model, device) that returns a metric, such as a mean loss.
        eval_mode: whether the best model has the lowest ("min") or the highest ("max") metric.
        train_dataloader: batches for recomputing the BatchNorm statistics of every interpolated model, each time over
            all of them. A batch is a tensor, a tuple or list that contains the inputs, or a mapping of keyword
            arguments.
        devices: one device per model, on which its copy is evaluated; passed to `eval_fn`. By default the model's own.
        device_interp: device of the interpolated models; by default the nearer end's.
        input_indices: indices of the model's positional arguments in a batch.
        savedir: folder to which `interpolate` writes the state dict of the best model with `torch.save`.
        save_all: save all interpolated models as well.
        verbose: show a progress bar (on a terminal).

    Attributes:
        best_model: a copy of the best model so far, in evaluation mode; the first of equally good ones.
        best_metric: metric of the best model.
        best_model_name: `model_0.pt`, or `interp_models_0_1_perc_0.5.pt` for λ = ½ between the first two.
        metrics_models: metrics of the given models.
        metrics_interpolated: metrics of all interpolated models, in the order of `metrics`.
        metrics: after `interpolate`, `{λ: metric}` for every line, including λ = 0 and λ = 1.

    Raises:
        OptionError: there are fewer than two models, `eval_mode` is unknown, there is not one device per model,
            `save_all` is set without `savedir`, or `eval_fn` does not return a number.
        MismatchError: the models' tensors differ in names or shapes.

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
            raise OptionError(f"unknown eval_mode {eval_mode!r}{nearest(str(eval_mode), BETTER)}")
        if devices is not None and len(devices) != len(models):
            raise OptionError(f"got {len(devices)} devices for {len(models)} models; give one device per model")
        self.models, self.eval_fn, self.eval_mode = models, eval_fn, eval_mode
        self.train_dataloader, self.input_indices = train_dataloader, input_indices
        self.devices: Sequence[Device] = [None] * len(models) if devices is None else devices
        self.device_interp, self.verbose = device_interp, verbose
        self.savedir, self.save_all = savedir, save_all
        _resolve_savedir(savedir, save_all)

        self.best_model: nn.Module | None = None
        self.best_metric, self.best_model_name = math.nan, ""
        self.metrics: list[dict[float, float]] = []
        self.metrics_models = [
            self._evaluate(copy_module(model).to(device).eval(), device, f"model_{i}.pt")
            for i, (model, device) in enumerate(zip(models, self.devices, strict=True))
        ]

    @property
    def metrics_interpolated(self) -> list[float]:
        """Metrics of the interpolated models, line by line."""
        return [metric for line in self.metrics for t, metric in line.items() if 0 < t < 1]

    def interpolate(self, steps: int = 20, savedir: Path | str | None = None, save_all: bool | None = None) -> None:
        """Evaluate `steps` evenly spaced models between each given model and the next, and replace `metrics`.

        If `steps` is even, one more is evaluated, so that the midpoint is always included.

        Args:
            steps: number of models between two given ones.
            savedir: folder to use instead of the constructor's.
            save_all: setting to use instead of the constructor's.

        Raises:
            OptionError: `steps` is negative, `save_all` is set without `savedir`, or the dataloader yields nothing.
        """
        if steps < 0:
            raise OptionError(f"got steps = {steps}; give the number of models between two given ones, such as 9")
        save_all = self.save_all if save_all is None else save_all
        folder = _resolve_savedir(self.savedir if savedir is None else savedir, save_all)
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
        """Interpolate, evaluate and perhaps save the model at λ = t between model i and the next."""
        near, far, distance = (i, i + 1, t) if t <= 0.5 else (i + 1, i, 1 - t)
        device = self.devices[near] if self.device_interp is None else self.device_interp
        model = merge_modules([self.models[near], self.models[far]], "lerp", t=distance).to(device).eval()
        if self.train_dataloader is not None:
            recalibrate(model, (self._inputs(batch, device) for batch in self.train_dataloader))
        name = f"interp_models_{i}_{i + 1}_perc_{t:.6g}.pt"
        if folder is not None:
            torch.save(model.state_dict(), folder / name)
        return self._evaluate(model, device, name)

    def _inputs(self, batch: Any, device: Device) -> Any:
        """Return the model inputs in a batch, on the model's device."""

        def move(value: Any) -> Any:
            return value if device is None or not isinstance(value, Tensor) else value.to(device)

        if isinstance(batch, Mapping):
            return {name: move(value) for name, value in batch.items()}
        if isinstance(batch, Sequence):
            indices = [self.input_indices] if isinstance(self.input_indices, int) else self.input_indices
            return [move(batch[index]) for index in indices]
        return move(batch)

    def _evaluate(self, model: nn.Module, device: Device, name: str) -> float:
        """Return a model's metric, and keep the model if the best so far is worse, NaN or missing."""
        result = self.eval_fn(model, device)
        try:
            metric = float(result.detach() if isinstance(result, Tensor) else result)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"eval_fn returned {type(result).__name__} for {name.removesuffix('.pt')}; it has to return one number"
            ) from error
        if self.best_model is None or math.isnan(self.best_metric) or BETTER[self.eval_mode](metric, self.best_metric):
            self.best_model, self.best_metric, self.best_model_name = model, metric, name
        return metric


def _resolve_savedir(savedir: Path | str | None, save_all: bool) -> Path | None:
    """Return `savedir` as a path; raise OptionError where `save_all` needs one."""
    if save_all and savedir is None:
        raise OptionError("save_all is set without savedir; give a folder to save to")
    return None if savedir is None else Path(savedir)
