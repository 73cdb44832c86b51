"""The law, as a user can run it: move a model at random and compare what it computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..checkpoints.checkpoint import Checkpoint, Source
from ..errors import CheckpointError, MismatchError
from ..modules.forward import Inputs, example_inputs, outputs_in, run
from ..symmetries.detection import spec_of
from ..symmetries.spec import Spec
from ..symmetries.table import families
from .alignment import Alignment
from .gauge import narrowed


@dataclass(frozen=True)
class Check:
    """What one random move did to a model's outputs, all of it in float64.

    Args:
        name: of the model.
        moved: how many symmetries the random element moves; in a small group it may be the identity.
        symmetries: how many there are that can move.
        difference: max |f(x; g·θ) − f(x; θ)| over all outputs.
        scale: max |f(x; θ)|.
        float32_inside: whether the model itself computes parts in float32, as RMSNorm of transformers does.
        dtype: the narrowest in which its tensors are stored.
        stored: the same difference once the moved tensors are rounded to the dtype they are stored in.
        bfloat16: for scale, what computing the unmoved model in bfloat16 instead of float32 changes of its outputs;
            NaN where it cannot be.
    """

    name: str
    moved: int
    symmetries: int
    difference: float
    scale: float
    float32_inside: bool
    dtype: torch.dtype = torch.float64
    stored: float = 0.0
    bfloat16: float = math.nan

    @property
    def relative(self) -> float:
        """max|Δ| / max|output|; errors grow with the output, so this is the number to judge."""
        return self.difference / self.scale

    @property
    def bound(self) -> float:
        """1e-10, or 1e-5 where the model computes in float32 inside."""
        return 1e-5 if self.float32_inside else 1e-10

    @property
    def holds(self) -> bool:
        return self.relative <= self.bound

    def __str__(self) -> str:
        inside = ", float32 inside" if self.float32_inside else ""
        return (
            f"{self.name}: moved {self.moved} of {self.symmetries} symmetries at random; max|Δ output| = "
            f"{self.difference:.1e} of {self.scale:.3g}, relative {self.relative:.1e} {'≤' if self.holds else '>'} "
            f"{self.bound:.0e} "
            f"(float64{inside}): {'the function is the same' if self.holds else 'THE FUNCTION CHANGED'}"
            f"{self._rounded()}"
        )

    def _rounded(self) -> str:
        if self.dtype is torch.float64:
            return ""
        dtype, gap = str(self.dtype).removeprefix("torch."), self.bfloat16 / self.scale
        beside = "" if math.isnan(gap) else f"; the model itself differs by {gap:.1e} between bfloat16 and float32"
        return f". Stored in {dtype}, it is the same to {self.stored / self.scale:.1e}{beside}"


def check(source: Source, *, spec: Spec | None = None, inputs: Inputs | None = None, seed: int = 0) -> Check:
    """Move a model by a random element of all its symmetries, of their full groups, and compare its outputs.

    All is computed in float64, so what is left is rounding; what storing the moved model rounds is said beside it.

    Args:
        source: a folder, Hub id, module or checkpoint.
        spec: its symmetries; by default those of its family's table, or else those its forward pass shows.
        inputs: of the forward pass: a tensor, a tuple of positional or a dictionary of keyword arguments; by default
            random tokens or images that fit a transformers configuration.
        seed: of the random element and the random inputs.

    Raises:
        CheckpointError: outputs that are not finite, or inputs that have to be given.

    Example:
        >>> result = check("google-bert/bert-base-uncased")
        >>> result.holds, result.relative <= 1e-10
        (True, True)
    """
    checkpoint = Checkpoint.open(source)
    generator = torch.Generator().manual_seed(seed)
    model = checkpoint.model(torch.float64).eval()
    if inputs is not None:
        inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    # a file may hold more than its class computes with, such as a pooler: what is checked is what is computed
    spec = spec or spec_of(Checkpoint.open(model), inputs)
    alignment = Alignment.random(spec, generator)
    if inputs is None:
        inputs = example_inputs(_config_of(model), generator)
    moved = alignment.apply(Checkpoint.open(model))
    dtypes = checkpoint.dtypes or {torch.float64}
    narrow = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    kept = None if narrow is torch.float64 else _as_stored(moved, narrow).model(torch.float64).eval()
    moved = moved.model(torch.float64).eval()  # before a run that may change buffers
    before, float32_inside = outputs(model, inputs)
    if not before.any():
        raise CheckpointError(f"{checkpoint.name} gives nothing but zeros, which would prove nothing; train it first")
    after, _ = outputs(moved, inputs)
    stored = before if kept is None else outputs(kept, inputs)[0]
    return Check(
        checkpoint.name,
        len(alignment.moved),
        len(spec.free),
        (before - after).abs().max().item(),
        before.abs().max().item(),
        float32_inside,
        narrow,
        (before - stored).abs().max().item(),
        math.nan if narrow is torch.float64 else _bfloat16_gap(checkpoint, inputs),
    )


def _as_stored(moved: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """Its tensors rounded to a dtype."""
    parts = {k: narrowed(p, dtype) if p.dtype.is_floating_point else p for k, p in moved.parts.items()}
    return moved.with_parts(parts)


def _bfloat16_gap(checkpoint: Checkpoint, inputs: Inputs) -> float:
    """max |Δ output| between the model in bfloat16 and in float32; NaN where an operation knows no bfloat16."""

    def run_in(dtype: torch.dtype) -> Tensor:
        def there(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        model = checkpoint.model(dtype).to(dtype).eval()
        return outputs(model, tree_map_only(Tensor, there, inputs))[0]

    try:
        return (run_in(torch.bfloat16) - run_in(torch.float32)).abs().max().item()
    except (RuntimeError, CheckpointError):
        return math.nan


def tiny_models() -> Iterator[tuple[str, nn.Module]]:
    """(name, model) of every TINY configuration of every table, all of it random and far from initialisation."""
    import transformers

    for module in families():
        for i, said in enumerate(module.TINY):
            config = transformers.AutoConfig.for_model(**({"model_type": module.MODEL_TYPES[0]} | said))
            torch.manual_seed(i)
            model = getattr(transformers, config.architectures[0])(config).double().eval()
            scramble(model, torch.Generator().manual_seed(i))
            yield f"{module.__name__.rpartition('.')[2]}-{i}-{config.architectures[0]}", model


@torch.no_grad()
def scramble(model: nn.Module, generator: torch.Generator) -> None:
    """Weights ×10; norms, biases and statistics random: at initialisation many a wrong table would not be seen."""

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(10) if parameter.any() else parameter.copy_(0.2 * noise(parameter))
        else:
            gain = name.endswith("weight")
            parameter.copy_(1 + 0.4 * noise(parameter) if gain else 0.5 * noise(parameter))
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if batch_norms:  # statistics near the true ones, so that the signal reaches the end, then noise on them
        for norm in batch_norms:
            norm.momentum = 1.0
        run(model.train(), example_inputs(_config_of(model), generator))
        model.eval()
        for norm in batch_norms:
            mean, var = norm.running_mean, norm.running_var
            if mean is not None and var is not None:
                mean.add_(0.3 * mean.std() * noise(mean))
                var.mul_(0.6 + 0.8 * torch.rand(var.shape, generator=generator, dtype=torch.float64)).add_(1e-3)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> tuple[Tensor, bool]:
    """(all floating-point outputs in one vector, whether float32 was computed with on the way)."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")  # one after the other: products of groups know no float64
    with _Float32Spy() as spy:
        given = [tensor for tensor in outputs_in(run(model, inputs)) if tensor.is_floating_point()]
    if not given:
        raise CheckpointError(f"{type(model).__name__} gives no floating-point tensor, so there is nothing to compare")
    flat = torch.cat([tensor.reshape(-1) for tensor in given]).double()
    if not torch.isfinite(flat).all():
        raise CheckpointError(f"{type(model).__name__} gives outputs that are NaN or infinite on random inputs")
    return flat, spy.seen


def _config_of(model: nn.Module) -> Any:
    if not hasattr(model, "config"):
        raise MismatchError(
            f"{type(model).__name__} is no transformers model, so its inputs have to be given (inputs=)"
        )
    return model.config


class _Float32Spy(TorchDispatchMode):
    """Sees whether a float64 value was rounded to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and out.numel():
            self.seen |= any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return out
