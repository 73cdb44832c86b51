"""Divergence of a model's outputs from those of the models it lies between (its ends), without labels.

For a sample, a token or a pixel it is KL(p̄ ‖ p): p is the softmax over classes of the model's outputs, and p̄ = Σ wᵢ pᵢ
mixes those of the ends by their shares wᵢ, which are 1 − λ and λ for two. The model's BatchNorm layers normalise by
the batch. Which axis runs over classes says `forward.class_axis`. Where there is only one number, the model has no
head, or its `problem_type` says that its outputs are not classes, it is the mean square of ȳ − y, with ȳ = Σ wᵢ yᵢ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..checkpoints.precision import compute_dtype
from ..errors import OptionError
from .forward import attended_outputs, evaluation_mode, has_no_classes, has_no_head, run_module
from .functional import FunctionalCall, use_batch_statistics

StateDict: TypeAlias = "Mapping[str, Tensor]"
EndOutputs: TypeAlias = "list[list[Tensor]]"  # the `comparable_outputs` of every end


class Divergence:
    """The outputs of several models, and the divergence of models between them, all computed by one module.

    Args:
        module: module in evaluation mode, on the device; its BatchNorm layers are set to normalise by the batch.
        module_keys: `{canonical key: module key}`.
        ends: models to compare with, as state dicts with canonical keys.
        device: device that batches are moved to.
    """

    def __init__(
        self, module: nn.Module, module_keys: Mapping[str, str], ends: Sequence[StateDict], device: Any = None
    ):
        use_batch_statistics(module)
        self.module, self.ends, self.call = module, ends, FunctionalCall(module, module_keys, run_module, device)
        self.classes = not has_no_classes(module)  # before a forward pass with labels sets `problem_type`

    def outputs_of_ends(self, batch: Any) -> EndOutputs:
        """Compute the outputs of the ends for a batch, each with its own BatchNorm statistics."""
        with evaluation_mode(self.module):
            return [comparable_outputs(self.module, self.call(state, batch), batch) for state in self.ends]

    def per_sample(
        self, state: StateDict, shares: Sequence[float], batch: Any, of_ends: EndOutputs | None = None
    ) -> Tensor:
        """Compute one number for every sample, with gradients to `state`.

        Args:
            state: model between the ends, by canonical keys.
            shares: shares of the ends in the mixture.
            batch: inputs of the forward pass.
            of_ends: the result of `outputs_of_ends` for the batch; computed by default.

        Raises:
            OptionError: the model returns no numbers that could be compared.
        """
        of_ends = self.outputs_of_ends(batch) if of_ends is None else of_ends
        return divergence_per_sample(self.module, of_ends, self.call(state, batch), shares, batch, self.classes)


def divergence_per_sample(
    module: nn.Module,
    of_ends: EndOutputs,
    outputs: Any,
    shares: Sequence[float],
    batch: Any,
    classes: bool = True,
) -> Tensor:
    """Compute how far a model's outputs are from those of the ends: one number for every sample.

    Args:
        module: the module that computed all outputs.
        of_ends: `comparable_outputs` of every end.
        outputs: what a model in between returned for the same batch.
        shares: shares of the ends in the mixture.
        batch: the batch that all of them read.
        classes: False where outputs are not scores of classes of which one is right.

    Raises:
        OptionError: outputs without numbers.
    """
    tensors = comparable_outputs(module, outputs, batch)
    if not tensors:
        raise OptionError(
            f"the model returns a {type(outputs).__name__} without any numbers that could be compared; if there are "
            "labels or a loss, pass these"
        )
    measure = _kl_divergence if classes and not has_no_head(outputs) else _squared_error
    pairs = zip(zip(*of_ends, strict=True), tensors, strict=True)
    return torch.cat([measure(ends, y, shares).flatten() for ends, y in pairs])


def comparable_outputs(module: nn.Module, outputs: Any, batch: Any) -> list[Tensor]:
    """Return the outputs that count as (…, classes), in float32 or wider."""
    wide = [y.to(compute_dtype(y.dtype)) for y in attended_outputs(module, outputs, batch)]
    return [y if y.dim() > 1 else y[:, None] for y in wide]


def _kl_divergence(ends: Sequence[Tensor], y: Tensor, shares: Sequence[float]) -> Tensor:
    if y.shape[-1] == 1:
        return _squared_error(ends, y, shares)
    weighted = [x.log_softmax(-1) + math.log(w) for x, w in zip(ends, shares, strict=True) if w]
    logs = functools.reduce(torch.logaddexp, weighted)
    p = logs.exp()
    return torch.where(p == 0, 0, p * (logs - y.log_softmax(-1))).sum(-1)  # 0 · log 0 is 0; NaN stays


def _squared_error(ends: Sequence[Tensor], y: Tensor, shares: Sequence[float]) -> Tensor:
    return (torch.stack([w * x for x, w in zip(ends, shares, strict=True)]).sum(0) - y).square().mean(-1)
