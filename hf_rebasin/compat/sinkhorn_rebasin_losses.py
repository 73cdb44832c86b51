"""Losses of a re-based module: its distance to another one, or what the two compute in between.

The interface is that of the module `rebasin.loss` beside "Re-basin via implicit Sinkhorn differentiation" (Guerrero
Peña et al. 2023, arXiv 2212.12042, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.model_classes import copied
from ..errors import MismatchError, OptionError
from ..modules.forward import Inputs, run
from ..modules.functional import by_batch_statistics


class _ToModel(nn.Module):
    """A loss with a reference to a module that stays as it is, and is no part of the loss: modes, devices and saved
    states of the one are no matter to the other."""

    def __init__(self, modela: nn.Module | None = None) -> None:
        super().__init__()
        self.set_model(modela)

    @property
    def modela(self) -> nn.Module | None:
        """The module that stays."""
        return self._fixed[0]

    def set_model(self, modela: nn.Module | None) -> None:
        """Another module that stays."""
        if modela is not None and not isinstance(modela, nn.Module):
            raise OptionError(f"got a {type(modela).__name__} for a model; give a torch module")
        self._fixed = (modela,)  # in a tuple, so that it is not registered

    def _pairs(self, modelb: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """(of the module that stays, without gradients; of the other one) for all parameters, in their order."""
        if self.modela is None:
            raise OptionError(f"{type(self).__name__} has no model to compare with; call set_model(model) before")
        ours, theirs = list(self.modela.named_parameters()), list(modelb.named_parameters())
        if len(ours) != len(theirs):
            raise MismatchError(f"{len(ours)} parameters in the model that stays, {len(theirs)} in the other")
        for (one, a), (other, b) in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                raise MismatchError(
                    f"{one} is {tuple(a.shape)} in the model that stays, {other} {tuple(b.shape)} in the other"
                )
        return [(a.detach().to(b.device), b) for (_, a), (_, b) in zip(ours, theirs, strict=True)]


class _Distance(_ToModel):
    def forward(self, modelb: nn.Module) -> Tensor:
        """The distance of `modelb`, as a tensor with one number and gradients to its parameters."""
        pairs = self._pairs(modelb)
        total = torch.stack([self.of(a, b).to(pairs[0][1].device) for a, b in pairs]).sum()
        return total / sum(a.numel() for a, _ in pairs)

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        """What two tensors add to the sum."""
        raise NotImplementedError


class DistL2Loss(_Distance):
    """Mean squared difference of all parameters, Σ (a - b)² / N: the cost that finds planted permutations.

    Args:
        modela: the module that stays. It is only referred to and never changed, its `requires_grad` neither;
            parameters are compared in their order.

    Raises:
        OptionError: no module, or none yet.
        MismatchError: the other module has other parameters; names the first.

    Example: weights 1, 3 and 0, 1 are (1² + 2²) / 2 = 2.5 apart.

        >>> criterion = DistL2Loss(model_b)
        >>> criterion(pi_model_a()).backward()  # gradients are in pi_model_a.p
    """

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum()


class DistL1Loss(_Distance):
    """Mean absolute difference of all parameters, Σ |a - b| / N.

    Args:
        modela: the module that stays. It is only referred to and never changed, its `requires_grad` neither;
            parameters are compared in their order.

    Raises:
        OptionError: no module, or none yet.
        MismatchError: the other module has other parameters; names the first.

    Example: weights 1, 3 and 0, 1 are (1 + 2) / 2 = 1.5 apart.

        >>> criterion = DistL1Loss(model_b)
        >>> criterion(pi_model_a()).backward()  # gradients are in pi_model_a.p
    """

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().sum()


class DistCosineLoss(_Distance):
    """What the cosines of all parameter tensors lack, Σ (1 - ⟨a, b⟩ / ‖a‖‖b‖) / N; N is the number of weights.

    The norms are taken of whole tensors, and of their product no less than 1e-8, so a tensor of zeros adds 1.

    Args:
        modela: the module that stays. It is only referred to and never changed, its `requires_grad` neither;
            parameters are compared in their order.

    Raises:
        OptionError: no module, or none yet.
        MismatchError: the other module has other parameters; names the first.

    Example: one tensor, (3, 4) here and (4, 3) there, has the cosine 24 / 25, and the loss is (1 - 0.96) / 2 = 0.02.

        >>> criterion = DistCosineLoss(model_b)
        >>> criterion(pi_model_a()).backward()  # gradients are in pi_model_a.p
    """

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        return 1 - (a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)).clamp_min(1e-8)


class _Between(_ToModel):
    def __init__(self, modela: nn.Module | None = None, criterion: Callable[[Any, Any], Tensor] | None = None) -> None:
        super().__init__(modela)
        self.criterion = nn.MSELoss() if criterion is None else criterion

    def forward(self, modelb: nn.Module, input: Inputs, target: Any) -> Tensor:
        """The loss of the model in between; `input` is what the models are called with, as in `infer_spec`."""
        t = self.place()
        points = {id(b): torch.lerp(b, a.to(b.dtype), t) for a, b in self._pairs(modelb)}
        between = copied(modelb, points)
        by_batch_statistics(between)
        return self.criterion(run(between, input), target)

    def place(self) -> float:
        """How far from the other module to the one that stays, from 0 to 1."""
        raise NotImplementedError


class MidLoss(_Between):
    """The loss halfway between two modules, C(½ (θ_A + π θ_B)): what linear mode connectivity wants to be low.

    BatchNorm layers use the statistics of the batch in either mode, since the running ones of one end are wrong in
    the middle; in all else the mode is that of the module the loss is called with. Neither module changes.

    Args:
        modela: the module that stays. It is only referred to, its `requires_grad` stays as it is, too.
        criterion: gives the loss for (what the model says, target); by default `nn.MSELoss()`.

    Raises:
        OptionError: no module, or none yet.
        MismatchError: the other module has other parameters; names the first.

    Example: one weight, 1 here and 3 there, is 2 halfway: for the input 1 and the target 0 the squared error is 4.

        >>> criterion = MidLoss(model_b, criterion=nn.CrossEntropyLoss())
        >>> criterion(pi_model_a(), images, labels).backward()  # gradients are in pi_model_a.p
    """

    def place(self) -> float:
        return 0.5


class RndLoss(_Between):
    """The loss at a random place between two modules, C((1-λ) θ_A + λ π θ_B) with λ ~ U(0, 1), another in every call.

    λ is drawn from torch's own generator, so `torch.manual_seed` repeats it. BatchNorm layers use the statistics of
    the batch, as in `MidLoss`. Neither module changes.

    Args:
        modela: the module that stays. It is only referred to, its `requires_grad` stays as it is, too.
        criterion: gives the loss for (what the model says, target); by default `nn.MSELoss()`.

    Raises:
        OptionError: no module, or none yet.
        MismatchError: the other module has other parameters; names the first.

    Example: one weight, 1 here and 3 there, is 1.5 at λ = ¼: for the input 1 and the target 0 the error is 2.25.

        >>> criterion = RndLoss(model_b, criterion=nn.CrossEntropyLoss())
        >>> criterion(pi_model_a(), images, labels).backward()  # gradients are in pi_model_a.p
    """

    def place(self) -> float:
        return torch.rand(()).item()
