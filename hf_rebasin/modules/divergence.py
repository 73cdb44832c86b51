"""How far a model between others is from saying what these say, without labels.

For a sample, or a token, or a pixel, KL(Σ wᵢ pᵢ ‖ p̄): pᵢ is the softmax of the outputs of model i over classes, p̄ that
of the model between them, whose BatchNorm layers go by the batch; wᵢ are the shares, 1 − λ and λ of two. Classes are
the last axis, of images the one after the first. Where there is one number only, the model has no head, or its
`problem_type` says that its outputs are no classes, the mean square of Σ wᵢ yᵢ − ȳ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .forward import answers, evaluating, has_no_head, mask_in, no_classes, run
from .functional import Computing, by_batch_statistics

State: TypeAlias = "Mapping[str, Tensor]"
Said: TypeAlias = "list[list[Tensor]]"  # of every end


class Divergence:
    """What models say, and how far what is between them is from it; all by one module with other tensors in it.

    Args:
        module: in evaluation mode, on the device; its BatchNorm layers are told to go by the batch.
        names: `{canonical key: its own key}`.
        ends: the models, by canonical keys.
        device: where batches are brought.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str], ends: Sequence[State], device: Any = None):
        by_batch_statistics(module)
        self.module, self.ends, self.computing = module, ends, Computing(module, names, run, device)
        self.classes = not no_classes(module)  # a forward pass with labels in it may say otherwise

    def said(self, batch: Any) -> Said:
        """What the ends say to a batch, each with its own BatchNorm statistics."""
        with evaluating(self.module):
            return [numbers_in(self.computing(state, batch), batch) for state in self.ends]

    def of(self, state: State, shares: Sequence[float], batch: Any, said: Said | None = None) -> Tensor:
        """One number for every sample, with gradients to `state`; `shares` of the ends, `said` is what `said` gave.

        Raises:
            OptionError: the model says nothing that could be compared.
        """
        said = self.said(batch) if said is None else said
        return apart(said, self.computing(state, batch), shares, batch, self.classes)


def apart(said: Said, answer: Any, shares: Sequence[float], batch: Any, classes: bool = True) -> Tensor:
    """One number for every sample: how far an answer is from what was said.

    Args:
        said: `numbers_in` what every end answered.
        answer: what a model in between gave for the same batch.
        shares: of the ends.
        batch: what they read.
        classes: False where outputs are no scores of classes of which one is right.

    Raises:
        OptionError: there are no numbers in the answer.
    """
    found = numbers_in(answer, batch)
    if not found:
        raise OptionError(
            f"what the model says, a {type(answer).__name__}, has no numbers in it that could be compared; where "
            "labels or a loss can be given, give these"
        )
    of_each = _apart if classes and not has_no_head(answer) else _squared
    each = zip(zip(*said, strict=True), found, strict=True)
    return torch.cat([of_each(of_ends, y, shares).flatten() for of_ends, y in each])


def numbers_in(answer: Any, batch: Any) -> list[Tensor]:
    """(…, classes), in float32 or wider."""
    found = answers(answer, mask_in(batch))
    wide = [y.to(torch.promote_types(y.dtype, torch.float32)) for y in found]
    return [y.movedim(1, -1) if y.dim() > 3 else y if y.dim() > 1 else y[:, None] for y in wide]


def _apart(ends: Sequence[Tensor], y: Tensor, shares: Sequence[float]) -> Tensor:
    if y.shape[-1] == 1:
        return _squared(ends, y, shares)
    weighted = [x.log_softmax(-1) + math.log(w) for x, w in zip(ends, shares, strict=True) if w]
    logs = functools.reduce(torch.logaddexp, weighted)
    p = logs.exp()
    return torch.where(p == 0, 0, p * (logs - y.log_softmax(-1))).sum(-1)  # 0 · log 0 is 0; NaN stays


def _squared(ends: Sequence[Tensor], y: Tensor, shares: Sequence[float]) -> Tensor:
    return (torch.stack([w * x for x, w in zip(ends, shares, strict=True)]).sum(0) - y).square().mean(-1)
