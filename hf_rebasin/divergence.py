"""How far a model between two others is from saying what the two say, without labels.

For a sample, or a token, KL((1 − λ) p + λ p′ ‖ p̄): p and p′ are the softmax of the two models' outputs along the
last axis, p̄ that of the model with weights (1 − λ) θ + λ g · θ′, whose BatchNorm layers go by the batch. Where the
last axis has one place only, (1 − λ) y + λ y′ − ȳ, squared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .computing import Computing, by_batch_statistics
from .errors import OptionError
from .inputs import answers, evaluating, mask_in, run
from .objective import Device, Forward

State: TypeAlias = "Mapping[str, Tensor]"
Said: TypeAlias = "tuple[list[Tensor], list[Tensor]]"


class Divergence:
    """What two models say, and how far what is between them is from it; all by one module with other tensors in it.

    Args:
        forward: makes the module.
        ends: the two models, by canonical keys.
        device: where it is computed.
    """

    def __init__(self, forward: Forward, ends: Sequence[State], device: Device = None):
        self.module, names = forward.module()
        self.module = self.module.to(device).eval().requires_grad_(False)
        by_batch_statistics(self.module)
        self.ends, self.computing = ends, Computing(self.module, names, run, device)

    def said(self, batch: Any) -> Said:
        """What the two say to a batch, each with its own BatchNorm statistics."""
        with evaluating(self.module):
            a, b = (answers(self.computing(state, batch), mask_in(batch)) for state in self.ends)
        return a, b

    def of(self, state: State, at: float, batch: Any, said: Said | None = None) -> Tensor:
        """One number for every sample, with gradients to `state`, the model at λ = `at`; `said` is what `said` gave.

        Raises:
            OptionError: the model says nothing that could be compared.
        """
        a, b = self.said(batch) if said is None else said
        found = answers(self.computing(state, batch), mask_in(batch))
        if not found:
            raise OptionError(f"{type(self.module).__name__} gives no numbers for these batches; give other data")
        triples = zip(a, b, found, strict=True)
        return torch.cat([_apart(x.double(), y.double(), z.double(), at).flatten() for x, y, z in triples])


def _apart(a: Tensor, b: Tensor, y: Tensor, at: float) -> Tensor:
    if y.shape[-1] == 1:
        return (a.lerp(b, at) - y).square().squeeze(-1)
    shares = [math.log(share) if share else -math.inf for share in (1 - at, at)]  # at an end, that end alone
    logs = torch.logaddexp(a.log_softmax(-1) + shares[0], b.log_softmax(-1) + shares[1])
    return (logs.exp() * (logs - y.log_softmax(-1))).sum(-1)
