"""Losses of a permuted module: its distance to a fixed one, or the loss of an interpolation of the two.

They have the interface of `rebasin.loss` in the package of "Re-basin via implicit Sinkhorn differentiation" (Guerrero
Peña et al. 2023, arXiv 2212.12042, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.model_classes import copy_module
from ..errors import MismatchError, OptionError
from ..modules.forward import Inputs, run_module
from ..modules.functional import use_batch_statistics


class _FixedModelLoss(nn.Module):
    """A loss that refers to a fixed module without owning it.

    The fixed module is not a submodule: it does not follow the loss's mode and device, and is not in its state dict.
    """

    def __init__(self, modela: nn.Module | None = None) -> None:
        super().__init__()
        self.set_model(modela)

    @property
    def modela(self) -> nn.Module | None:
        """The fixed module."""
        return self._fixed[0]

    def set_model(self, modela: nn.Module | None) -> None:
        """Replace the fixed module."""
        if modela is not None and not isinstance(modela, nn.Module):
            raise OptionError(f"the model is a {type(modela).__name__}; give a torch module")
        self._fixed = (modela,)  # in a tuple, so that it is not registered

    def _pairs(self, modelb: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return (fixed parameter without gradients, parameter of `modelb`) for all parameters, in order."""
        if self.modela is None:
            raise OptionError(f"{type(self).__name__} has no model to compare with; call set_model(model) first")
        ours, theirs = list(self.modela.named_parameters()), list(modelb.named_parameters())
        if len(ours) != len(theirs):
            raise MismatchError(f"{len(ours)} parameters in the fixed model, {len(theirs)} in the other")
        for (our_name, a), (their_name, b) in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                raise MismatchError(
                    f"{our_name} is {tuple(a.shape)} in the fixed model, {their_name} {tuple(b.shape)} in the other"
                )
        return [(a.detach().to(b.device), b) for (_, a), (_, b) in zip(ours, theirs, strict=True)]


class _DistanceLoss(_FixedModelLoss):
    def forward(self, modelb: nn.Module) -> Tensor:
        """Return the distance of `modelb`, a scalar tensor from which gradients flow to its parameters."""
        pairs = self._pairs(modelb)
        total = torch.stack([self.tensor_distance(a, b).to(pairs[0][1].device) for a, b in pairs]).sum()
        return total / sum(a.numel() for a, _ in pairs)

    def tensor_distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return what two tensors contribute to the sum."""
        raise NotImplementedError


class DistL2Loss(_DistanceLoss):
    """Mean squared difference of all parameters, Σ (a - b)² / N; it recovers planted permutations.

    Args:
        modela: the fixed module. The loss keeps a reference to it, and changes nothing about it, not even
            `requires_grad`. Parameters are compared in order.

    Raises:
        OptionError: `modela` is not a module, or is not set when the loss is called.
        MismatchError: the parameters of the two modules differ in number or shape; the message names the first.

    Example: weights 1, 3 and 0, 1 are (1² + 2²) / 2 = 2.5 apart.

        >>> criterion = DistL2Loss(model_b)
        >>> criterion(pi_model_a()).backward()  # fills the gradients of pi_model_a.p
    """

    def tensor_distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum()


class DistL1Loss(_DistanceLoss):
    """Mean absolute difference of all parameters, Σ |a - b| / N.

    Args:
        modela: the fixed module. The loss keeps a reference to it, and changes nothing about it, not even
            `requires_grad`. Parameters are compared in order.

    Raises:
        OptionError: `modela` is not a module, or is not set when the loss is called.
        MismatchError: the parameters of the two modules differ in number or shape; the message names the first.

    Example: weights 1, 3 and 0, 1 are (1 + 2) / 2 = 1.5 apart.

        >>> criterion = DistL1Loss(model_b)
        >>> criterion(pi_model_a()).backward()  # fills the gradients of pi_model_a.p
    """

    def tensor_distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().sum()


class DistCosineLoss(_DistanceLoss):
    """Sum of the cosine distances of all parameter tensors by the number N of weights, Σ (1 - ⟨a, b⟩ / ‖a‖‖b‖) / N.

    Norms are those of whole tensors; their product is taken to be at least 1e-8, so a tensor of zeros adds 1.

    Args:
        modela: the fixed module. The loss keeps a reference to it, and changes nothing about it, not even
            `requires_grad`. Parameters are compared in order.

    Raises:
        OptionError: `modela` is not a module, or is not set when the loss is called.
        MismatchError: the parameters of the two modules differ in number or shape; the message names the first.

    Example: tensors (3, 4) and (4, 3) have the cosine 24 / 25, and the loss is (1 - 0.96) / 2 = 0.02.

        >>> criterion = DistCosineLoss(model_b)
        >>> criterion(pi_model_a()).backward()  # fills the gradients of pi_model_a.p
    """

    def tensor_distance(self, a: Tensor, b: Tensor) -> Tensor:
        return 1 - (a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)).clamp_min(1e-8)


class _InterpolationLoss(_FixedModelLoss):
    def __init__(self, modela: nn.Module | None = None, criterion: Callable[[Any, Any], Tensor] | None = None) -> None:
        super().__init__(modela)
        self.criterion = nn.MSELoss() if criterion is None else criterion

    def forward(self, modelb: nn.Module, input: Inputs, target: Any) -> Tensor:
        """Return the loss of an interpolation of the two modules; `input` has the forms that `infer_spec` takes."""
        t = self.weight()
        points = {id(b): torch.lerp(b, a.to(b.dtype), t) for a, b in self._pairs(modelb)}
        between = copy_module(modelb, points)
        use_batch_statistics(between)
        return self.criterion(run_module(between, input), target)

    def weight(self) -> float:
        """Return the weight of the fixed module, from 0 to 1."""
        raise NotImplementedError


class MidLoss(_InterpolationLoss):
    """Loss halfway between two modules, C(½ (θ_A + π θ_B)), which is low under linear mode connectivity.

    BatchNorm layers use batch statistics in either mode, since neither end's running statistics fit the midpoint;
    otherwise the merged module is in the mode of the one the loss is called with. Neither module changes.

    Args:
        modela: the fixed module. The loss keeps a reference to it, and changes nothing about it.
        criterion: function of (model outputs, target) that returns the loss; by default `nn.MSELoss()`.

    Raises:
        OptionError: `modela` is not a module, or is not set when the loss is called.
        MismatchError: the parameters of the two modules differ in number or shape; the message names the first.

    Example: weights 1 and 3 have the midpoint 2: for input 1 and target 0, the squared error is 4.

        >>> criterion = MidLoss(model_b, criterion=nn.CrossEntropyLoss())
        >>> criterion(pi_model_a(), images, labels).backward()  # fills the gradients of pi_model_a.p
    """

    def weight(self) -> float:
        return 0.5


class RndLoss(_InterpolationLoss):
    """Loss at a random point between two modules, C((1-λ) θ_A + λ π θ_B) with a new λ ~ U(0, 1) in every call.

    λ is drawn from torch's own generator, so `torch.manual_seed` makes it reproducible. BatchNorm layers use batch
    statistics, as in `MidLoss`. Neither module changes.

    Args:
        modela: the fixed module. The loss keeps a reference to it, and changes nothing about it.
        criterion: function of (model outputs, target) that returns the loss; by default `nn.MSELoss()`.

    Raises:
        OptionError: `modela` is not a module, or is not set when the loss is called.
        MismatchError: the parameters of the two modules differ in number or shape; the message names the first.

    Example: between weights 1 and 3, the weight at λ = ¼ is 1.5: for input 1 and target 0, the squared error is 2.25.

        >>> criterion = RndLoss(model_b, criterion=nn.CrossEntropyLoss())
        >>> criterion(pi_model_a(), images, labels).backward()  # fills the gradients of pi_model_a.p
    """

    def weight(self) -> float:
        return torch.rand(()).item()
