"""Incremental learning by re-basin: a new task is learned near the model and a permuted copy of itself.

One episode searches for a permutation π and a small step δ such that the point halfway between the model and its
permuted self, moved by δ, has a low cost; then the model goes part of that way. Such points keep what the model has
learned, as both ends compute the same function, and δ adds what is new.

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
from ..alignment.elements.relaxation import Relaxation
from ..alignment.relaxed_alignment import RelaxedAlignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import copy_module, module_names
from ..checkpoints.precision import compute_dtype
from ..errors import CheckpointError, MismatchError, OptionError
from ..modules.forward import Inputs
from ..modules.functional import FunctionalCall, require_scalar_loss, use_batch_statistics
from ..symmetries.binding import bind_to
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec
from ..symmetries.table import Table, canonical_view


@dataclass(frozen=True)
class Episode:
    """Result of one episode.

    Args:
        module: module after the episode, a copy of the given one in the same mode and with the same gradient flags.
        alignment: π as an exact alignment; `alignment.apply(module)` is a module with the same function.
        history: mean cost of every epoch, including β‖δ‖², at the points where gradients were taken.
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
    """Run one episode of re-basin incremental learning; the given module stays as it is.

        minimise over π and δ   C(½(θ + π(θ)) + δ) + β‖δ‖²,   then   θ ← (1 − α)θ + α·π(θ) + δ

    During the search, π consists of doubly stochastic matrices S_τ(P), one per symmetry, of latent matrices P that
    start at I and are trained by AdamW; in the last step it is the nearest permutation. δ is trained by SGD with
    weight decay and with its gradient clipped elementwise. The method and the defaults are those of arXiv 2212.12042,
    section 4.3.

    The cost is computed in the mode that the module is in, except that BatchNorm uses the statistics of the batch, as
    points in between have no running ones. In the result running statistics are mixed like weights; `recalibrate`
    recomputes them. δ moves the parameters that require gradients. To keep what was learned before, put old data into
    the batches.

    Args:
        module: any module whose symmetries are known from a table or can be inferred from its forward pass. Only the
            permutations in every symmetry's group are used.
        batches: batches of the new task, with replay; a list or a DataLoader, say, that can be read `epochs` times.
        loss: function that returns C, one number, for (module, batch).
        spec: symmetries of the module; by default those in the table of its family, or else those inferred from its
            forward pass.
        inputs: inputs of that forward pass; see `infer_spec`.
        alpha: α, between 0 (only δ) and 1 (all the way to π(θ)).
        beta: β, the weight of ‖δ‖² in the cost.
        epochs: number of passes over all batches.
        lr: learning rate of P.
        noise: standard deviation of the noise that is added to P = I at the start.
        delta_lr: learning rate of δ; 0 for δ = 0.
        delta_decay: weight decay of δ.
        delta_clip: greatest absolute value of a gradient of δ; larger ones are clipped elementwise.
        delta_noise: standard deviation of δ at the start.
        temperature: τ of the Sinkhorn operator.
        iterations: number of iterations of the Sinkhorn operator.
        generator: source of both kinds of noise; by default one with seed 0.
        device: device to compute on; by default the module's. The result is on the module's device.
        progress: whether to show a progress bar (on a terminal).

    Returns:
        An `Episode`: the new module, π, and the cost of every epoch.

    Raises:
        OptionError: an option is out of its range, the batches are empty or can be read only once, or the loss is not
            one number.
        MismatchError, SpecError: the symmetries are unknown, or the spec or table belongs to another model.
        CheckpointError: the module has NaN or Inf in it, or its tensors are stored in another layout than it uses.

    Example: what one episode does to a weight. θ = 1 and its permuted self, whose value here is 3, with δ = 0.1:
    the cost is taken at ½(1 + 3) + 0.1 = 2.1, and the new weight is 0.8 · 1 + 0.2 · 3 + 0.1 = 1.5.

        >>> episode = learn(module, DataLoader(new + replay, 100), cross_entropy_of, inputs=images[:1])
        >>> episode.module  # in place of `module`
        >>> episode.history  # falls
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
        spec = detect_spec(checkpoint, inputs) if spec is None else bind_to(spec, checkpoint)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    relaxation = Relaxation(
        generator=generator,
        permuting="sinkhorn",
        temperature=temperature,
        iterations=iterations,
        noise=noise,
        device=device,
        dtype=compute_dtype(*checkpoint.dtypes),
    )
    near = _Neighbourhood(checkpoint, spec.restricted(), loss, relaxation, delta_noise if delta_lr else None)
    history = []
    candidates = [
        torch.optim.AdamW(near.relaxed.permuting, lr=lr) if near.relaxed.permuting else None,
        torch.optim.SGD(near.delta.values(), lr=delta_lr, weight_decay=delta_decay) if near.delta else None,
    ]
    optimizers = [optimizer for optimizer in candidates if optimizer is not None]
    if not optimizers:
        raise OptionError(
            f"{checkpoint.name} has nothing that permutes, and no parameter to learn; give a module with "
            "parameters that require gradients, and delta_lr above 0"
        )
    disable = None if progress else True
    with tqdm(range(epochs), desc="learning near by", unit="epoch", leave=False, disable=disable) as bar:
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
                    "the batches are empty, or can be read only once; give batches that can be read several times, "
                    "such as a list or a DataLoader"
                )
            history.append(torch.stack(costs).double().mean().item())
            bar.set_postfix(cost=f"{history[-1]:.4g}")
    alignment = near.relaxed.hard()
    return Episode(near.take_step(alignment, alpha), alignment, tuple(history))


class _Neighbourhood:
    """Points near a model: θ, which is not copied, the relaxed π and δ, and a module to compute with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: Spec,
        loss: Callable[[nn.Module, Any], Tensor],
        relaxation: Relaxation,
        delta_noise: float | None,
    ):
        template, view = cast(nn.Module, checkpoint.template), canonical_view(checkpoint, spec.table)
        if (by_disk_key := module_names(template)) is None:
            raise CheckpointError(f"{checkpoint.name} stores its tensors in another layout than it computes with")
        for key, shape in view.shapes.items():
            if spec.shapes.get(key) != shape:
                in_spec = f"is {spec.shapes[key]}" if key in spec.shapes else "is unknown"
                raise MismatchError(f"{checkpoint.name}: {key!r} is {shape} here, and {in_spec} in the spec (spec=)")
        self.module_keys = {key: by_disk_key[stored] for key, stored in view.keys.items()}
        self.original, self.device = view.state, relaxation.device
        self.theta = {key: self.original[key].to(self.device).contiguous() for key in self.module_keys}
        self.template, self.module = template, copy_module(template).to(self.device)
        use_batch_statistics(self.module)
        self.call = FunctionalCall(self.module, self.module_keys, require_scalar_loss(loss), self.device)
        self.relaxed = RelaxedAlignment.identity(spec, relaxation)
        learning = {name for name, p in template.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.delta = {
            key: self._initial_delta(tensor, delta_noise, relaxation.generator)
            for key, tensor in self.theta.items()
            if delta_noise is not None and self.module_keys[key] in learning
        }

    def _initial_delta(self, like: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        start = noise * torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return start.to(like.device, compute_dtype(like.dtype)).requires_grad_()

    def cost(self, batch: Any, beta: float) -> Tensor:
        """Return C(½(θ + π(θ)) + δ) + β‖δ‖² for one batch."""
        between, moved = {}, self.relaxed.apply(self.theta)
        for key, value in self.theta.items():
            if moved[key] is not value and value.is_floating_point():
                value = torch.lerp(value, moved[key], 0.5)
            if key in self.delta:
                value = (value + self.delta[key]).to(value.dtype)
            between[key] = value
        cost: Tensor = self.call(between, batch)
        if not cost.requires_grad:
            raise OptionError("the loss has no gradient; it has to be computed with the module it is given")
        return cost + beta * sum(delta.square().sum() for delta in self.delta.values()) if beta else cost

    @torch.no_grad()
    def take_step(self, alignment: Alignment, alpha: float) -> nn.Module:
        """Return the module at (1 − α)θ + α·π(θ) + δ, computed in float64; integers are those of the nearer end."""
        out = self.module if self.device is None else copy_module(self.template)
        targets = dict(out.named_parameters(remove_duplicate=False)) | dict(out.named_buffers(remove_duplicate=False))
        for part, original in zip(out.modules(), self.template.modules(), strict=True):
            part.training = original.training
        moved = alignment.on(alignment.spec, self.original)
        for key, module_key in self.module_keys.items():
            value, permuted, target = self.original[key], moved[key], targets[module_key]
            if value.is_floating_point():
                value = torch.lerp(value.double(), permuted.double(), alpha)
            elif alpha >= 0.5:
                value = permuted
            target.copy_(value + self.delta[key].to(value) if key in self.delta else value)
        return out
