"""Incremental learning by re-basin: a new task is learned near the model and a permuted copy of itself.

One episode looks for a permutation π and a small step δ, such that the point halfway between the model and its
permuted self, moved by δ, has a low cost; then it goes part of that way. Such points hold what the model has learned,
as both ends compute the same, and δ adds what is new.

Re-basin via implicit Sinkhorn differentiation (Guerrero Peña et al. 2023, arXiv 2212.12042), experiment 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..alignment.alignment import Alignment
from ..alignment.elements.relaxation import Softening
from ..alignment.relaxed_alignment import RelaxedAlignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import copied, module_names
from ..errors import CheckpointError, MismatchError, OptionError
from ..modules.forward import Inputs
from ..modules.functional import Computing, by_batch_statistics, one_number
from ..symmetries.binding import bind_to
from ..symmetries.detection import spec_of
from ..symmetries.spec import Spec
from ..symmetries.table import Table


@dataclass(frozen=True)
class Episode:
    """What one episode gave.

    Args:
        module: the module that has learned, a copy of the given one in its mode and with its flags.
        alignment: π, an exact one; `alignment.apply(module)` is a module with the same function.
        history: the mean cost of every epoch, β‖δ‖² included, at the points that were differentiated.
    """

    module: nn.Module
    alignment: Alignment
    history: tuple[float, ...]


def learn(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    spec: Spec | Table | None = None,
    inputs: Inputs | None = None,
    alpha: float = 0.2,
    beta: float = 0.0,
    epochs: int = 5,
    lr: float = 0.1,
    noise: float = 0.0,
    delta_lr: float = 0.05,
    delta_decay: float = 0.1,
    delta_clip: float = 1e-3,
    delta_noise: float = 1e-4,
    temperature: float = 1.0,
    iterations: int = 20,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Episode:
    """One episode of re-basin incremental learning; the given module stays as it is.

        minimise over π and δ   C(½(θ + π(θ)) + δ) + β‖δ‖²,   then   θ ← (1 − α)θ + α·π(θ) + δ

    While it is looked for, π is made of doubly stochastic matrices S_τ(P), one per symmetry, of latent matrices P that
    start at I (AdamW); in the last step it is the nearest permutation. δ is found by SGD with weight decay, its
    gradient clipped number by number. From arXiv 2212.12042 (section 4.3), whose settings are the defaults.

    The cost is taken in the mode that the module is in, but for BatchNorm, which uses the statistics of the batch, as
    none are known in between. In the result running statistics are mixed as weights are; `recalibrate` makes them
    anew. δ moves parameters that require gradients. To keep what was learned before, put old data into the batches.

    Args:
        module: any module whose symmetries a table says, or its forward pass shows. Of every symmetry's group its
            permutations alone are used.
        batches: what can be read `epochs` times, such as a list or a DataLoader: the new task, with replay.
        loss: gives C, one number, for (module, batch).
        spec: the symmetries; by default those of the table of the module's family, or else of its forward pass.
        inputs: for that forward pass; see `infer_spec`.
        alpha: α, between 0 (only δ) and 1 (all the way to π(θ)).
        beta: β, what a squared unit of δ costs.
        epochs: how often all batches are read.
        lr: learning rate of P.
        noise: standard deviation of what is added to P = I at the start.
        delta_lr: learning rate of δ; 0 for δ = 0.
        delta_decay: weight decay of δ.
        delta_clip: the gradient of every number of δ is cut to ± this.
        delta_noise: standard deviation of δ at the start.
        temperature: τ of the Sinkhorn operator.
        iterations: of the same.
        generator: of both kinds of noise; by default one with seed 0.
        device: where to compute; by default where the module is. The result is where the module is.
        progress: show a progress bar (on a terminal).

    Returns:
        An `Episode`: the new module, π, and the cost of every epoch.

    Raises:
        OptionError: an option out of its range, no batches or none the second time, a loss that is not one number.
        MismatchError, SpecError: nothing says what the symmetries are, or the spec or table is of another model.
        CheckpointError: NaN or Inf in the module, or one that stores its tensors otherwise than it computes with them.

    Example: what one episode does to a weight. θ = 1 and its permuted self, which has 3 in this place, with δ = 0.1:
    the cost is taken at ½(1 + 3) + 0.1 = 2.1, and the new weight is 0.8 · 1 + 0.2 · 3 + 0.1 = 1.5.

        >>> found = learn(module, DataLoader(new + replay, 100), cross_entropy_of, inputs=images[:1])
        >>> found.module  # in place of `module`
        >>> found.history  # falls
    """
    for name, value, low in (
        ("beta", beta, 0.0),
        ("epochs", epochs, 1),
        ("lr", lr, 0.0),
        ("noise", noise, 0.0),
        ("delta_lr", delta_lr, 0.0),
        ("delta_decay", delta_decay, 0.0),
        ("delta_clip", delta_clip, 0.0),
        ("delta_noise", delta_noise, 0.0),
    ):
        if not value >= low:
            raise OptionError(f"{name} = {value}; give {low:g} or more")
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha = {alpha}; give a share of the way to the permuted model, between 0 and 1")
    checkpoint = Checkpoint.open(module)
    checkpoint.refuse_broken()
    if not isinstance(spec, Spec):
        spec = spec_of(checkpoint, inputs) if spec is None else bind_to(spec, checkpoint)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    softening = Softening(
        generator, "sinkhorn", temperature, iterations, noise=noise, device=device, dtype=_widest(checkpoint.dtypes)
    )
    near = _Near(checkpoint, spec.restricted(), loss, softening, delta_noise if delta_lr else None)
    history = []
    groups = [
        torch.optim.AdamW(near.relaxed.permuting, lr=lr) if near.relaxed.permuting else None,
        torch.optim.SGD(near.delta.values(), lr=delta_lr, weight_decay=delta_decay) if near.delta else None,
    ]
    optimizers = [optimizer for optimizer in groups if optimizer is not None]
    if not optimizers:
        raise OptionError(
            f"{checkpoint.name} has nothing that permutes, and no parameter that may learn; give one that requires "
            "gradients, and delta_lr above 0"
        )
    quiet = None if progress else True
    with tqdm(range(epochs), desc="learning near by", unit="epoch", leave=False, disable=quiet) as bar:
        for _ in bar:
            costs = []
            for batch in batches:
                with torch.enable_grad():
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    cost = near.cost(batch, beta)
                    cost.backward()
                for delta in near.delta.values():
                    if delta.grad is not None:
                        delta.grad.clamp_(-delta_clip, delta_clip)
                for optimizer in optimizers:
                    optimizer.step()
                costs.append(cost.detach())
            if not costs:
                raise OptionError(
                    "the batches gave none, or not for another epoch; give what can be read several times, such as a "
                    "list or a DataLoader"
                )
            history.append(torch.stack(costs).double().mean().item())
            bar.set_postfix(cost=f"{history[-1]:.4g}")
    alignment = near.relaxed.hard()
    return Episode(near.arrived(alignment, alpha), alignment, tuple(history))


class _Near:
    """The points near a model: θ, which is not copied, the relaxed π and δ, and a module to compute with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: Spec,
        loss: Callable[[nn.Module, Any], Tensor],
        softening: Softening,
        delta_noise: float | None,
    ):
        template, prefix = cast(nn.Module, checkpoint.template), spec.table.prefix
        if (disk := module_names(template)) is None:
            raise CheckpointError(f"{checkpoint.name} stores its tensors otherwise than it computes with them")
        for key, shape in checkpoint.shapes(prefix).items():
            if spec.shapes.get(key) != shape:
                said = f"is {spec.shapes[key]}" if key in spec.shapes else "is unknown"
                raise MismatchError(f"{checkpoint.name}: {key!r} is {shape} here, and {said} in the spec (spec=)")
        self.names = {key: disk[stored] for key, stored in checkpoint.canonical(prefix).items()}
        self.own, self.device = checkpoint.state(prefix), softening.device
        self.theta = {key: self.own[key].to(self.device).contiguous() for key in self.names}
        self.template, self.module = template, copied(template).to(self.device)
        by_batch_statistics(self.module)
        self.computed = Computing(self.module, self.names, one_number(loss), self.device)
        self.relaxed = RelaxedAlignment.identity(spec, softening)
        learning = {name for name, p in template.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.delta = {
            key: self._small(tensor, delta_noise, softening.generator)
            for key, tensor in self.theta.items()
            if delta_noise is not None and self.names[key] in learning
        }

    def _small(self, like: Tensor, size: float, generator: torch.Generator) -> Tensor:
        start = size * torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return start.to(like.device, _widest([like.dtype])).requires_grad_()

    def cost(self, batch: Any, beta: float) -> Tensor:
        """C(½(θ + π(θ)) + δ) + β‖δ‖² of one batch."""
        between, moved = {}, self.relaxed.apply(self.theta)
        for key, value in self.theta.items():
            if moved[key] is not value and value.is_floating_point():
                value = torch.lerp(value, moved[key], 0.5)
            if key in self.delta:
                value = (value + self.delta[key]).to(value.dtype)
            between[key] = value
        cost: Tensor = self.computed(between, batch)
        if not cost.requires_grad:
            raise OptionError("the loss has no gradient; it has to be computed with the module it is given")
        return cost + beta * sum(delta.square().sum() for delta in self.delta.values()) if beta else cost

    @torch.no_grad()
    def arrived(self, alignment: Alignment, alpha: float) -> nn.Module:
        """The module at (1 − α)θ + α·π(θ) + δ, computed in float64 and rounded once; whole numbers nearest."""
        out = self.module if self.device is None else copied(self.template)
        places = dict(out.named_parameters(remove_duplicate=False)) | dict(out.named_buffers(remove_duplicate=False))
        for part, given in zip(out.modules(), self.template.modules(), strict=True):
            part.training = given.training
        moved = alignment.on(alignment.spec, self.own)
        for key, name in self.names.items():
            own, there, place = self.own[key], moved[key], places[name]
            if own.is_floating_point():
                own = torch.lerp(own.double(), there.double(), alpha)
            elif alpha >= 0.5:
                own = there
            place.copy_(own + self.delta[key].to(own) if key in self.delta else own)
        return out


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The widest of some types and float32."""
    return max((torch.float32, *dtypes), key=lambda kind: kind.itemsize)
