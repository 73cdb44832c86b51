"""How far a model between two others is from saying what the two say, without labels.

For a sample, or a token, or a pixel, KL((1 − λ) p + λ p′ ‖ p̄): p and p′ are the softmax of the two models' outputs
over classes, p̄ that of the model with weights (1 − λ) θ + λ g · θ′, whose BatchNorm layers go by the batch. Classes
are the last axis, of images the one after the first. Where there is one number only, or the model's `problem_type`
says that its outputs are no classes, the mean square of (1 − λ) y + λ y′ − ȳ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .computing import Computing, by_batch_statistics
from .errors import OptionError
from .inputs import answers, evaluating, mask_in, no_classes, run

State: TypeAlias = "Mapping[str, Tensor]"
Said: TypeAlias = "tuple[list[Tensor], list[Tensor]]"


class Divergence:
    """What two models say, and how far what is between them is from it; all by one module with other tensors in it.

    Args:
        module: in evaluation mode, on the device; its BatchNorm layers are told to go by the batch.
        names: `{canonical key: its own key}`.
        ends: the two models, by canonical keys.
        device: where batches are brought.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str], ends: Sequence[State], device: Any = None):
        by_batch_statistics(module)
        self.module, self.ends, self.computing = module, ends, Computing(module, names, run, device)

    def said(self, batch: Any) -> Said:
        """What the two say to a batch, each with its own BatchNorm statistics."""
        with evaluating(self.module):
            a, b = (self._answers(state, batch) for state in self.ends)
        return a, b

    def of(self, state: State, at: float, batch: Any, said: Said | None = None) -> Tensor:
        """One number for every sample, with gradients to `state`, the model at λ = `at`; `said` is what `said` gave.

        Raises:
            OptionError: the model says nothing that could be compared.
        """
        a, b = self.said(batch) if said is None else said
        found = self._answers(state, batch)
        if not found:
            raise OptionError(f"{type(self.module).__name__} gives no numbers that could be compared; give a loss")
        apart = _squared if no_classes(self.module) else _apart
        return torch.cat([apart(x, y, z, at).flatten() for x, y, z in zip(a, b, found, strict=True)])

    def _answers(self, state: State, batch: Any) -> list[Tensor]:
        """(…, classes), in float32 or wider."""
        found = answers(self.computing(state, batch), mask_in(batch))
        wide = [y.to(torch.promote_types(y.dtype, torch.float32)) for y in found]
        return [y.movedim(1, -1) if y.dim() > 3 else y if y.dim() > 1 else y[:, None] for y in wide]


def _apart(a: Tensor, b: Tensor, y: Tensor, at: float) -> Tensor:
    if y.shape[-1] == 1:
        return _squared(a, b, y, at)
    shares = [math.log(share) if share else -math.inf for share in (1 - at, at)]  # at an end, that end alone
    logs = torch.logaddexp(a.log_softmax(-1) + shares[0], b.log_softmax(-1) + shares[1])
    p = logs.exp()
    return torch.where(p > 0, p * (logs - y.log_softmax(-1)), 0).sum(-1)  # 0 · log 0 is 0, of what is masked out


def _squared(a: Tensor, b: Tensor, y: Tensor, at: float) -> Tensor:
    return (a.lerp(b, at) - y).square().mean(-1)
