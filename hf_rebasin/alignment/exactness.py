"""Exactness checks: move a model by a random alignment and compare its outputs."""

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
from ..modules.forward import Inputs, example_inputs, output_tensors, run_module
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec
from ..symmetries.table import families
from .alignment import Alignment
from .gauge import downcast


@dataclass(frozen=True, kw_only=True)
class Check:
    """The effect of one random alignment on a model's outputs, computed in float64.

    Args:
        name: name of the model.
        moved: number of symmetries that the random alignment moves; in a small group an element may be the identity.
        symmetries: number of symmetries that can move.
        difference: max |f(x; g·θ) − f(x; θ)| over all outputs.
        scale: max |f(x; θ)|.
        float32_inside: whether the model computes parts in float32, as RMSNorm in transformers does.
        dtype: narrowest dtype in which its tensors are stored.
        stored: the difference once the moved tensors are rounded to that dtype.
        bfloat16: for comparison, the difference between the unmoved model's outputs in bfloat16 and float32; NaN where
            it cannot be computed.
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
        """The number to judge, max |Δ output| / max |output|, as errors grow with the output."""
        return self.difference / self.scale

    @property
    def bound(self) -> float:
        """The largest relative difference allowed: 1e-10, or 1e-5 if the model computes in float32 inside."""
        return 1e-5 if self.float32_inside else 1e-10

    @property
    def holds(self) -> bool:
        """Whether the function is the same within the bound."""
        return self.relative <= self.bound

    def __str__(self) -> str:
        inside = ", float32 inside" if self.float32_inside else ""
        return (
            f"{self.name}: moved {self.moved} of {self.symmetries} symmetries at random; max|Δ output| = "
            f"{self.difference:.1e} of {self.scale:.3g}, relative {self.relative:.1e} {'≤' if self.holds else '>'} "
            f"{self.bound:.0e} "
            f"(float64{inside}): {'the function is the same' if self.holds else 'THE FUNCTION CHANGED'}"
            f"{self._rounding_note()}"
        )

    def _rounding_note(self) -> str:
        if self.dtype is torch.float64:
            return ""
        dtype, gap = str(self.dtype).removeprefix("torch."), self.bfloat16 / self.scale
        comparison = "" if math.isnan(gap) else f"; the model itself differs by {gap:.1e} between bfloat16 and float32"
        return f". Stored in {dtype}, it is the same to {self.stored / self.scale:.1e}{comparison}"


def check(source: Source, *, spec: Spec | None = None, inputs: Inputs | None = None, seed: int = 0) -> Check:
    """Move a model by random elements of the full groups of all its symmetries, and compare its outputs.

    Everything is computed in float64, so that only rounding errors remain. The effect of rounding the moved model to
    its own dtype is reported separately.

    Args:
        source: a folder, Hub id, module or checkpoint.
        spec: symmetries of the model; by default from the table of its family, or else inferred from its forward pass.
        inputs: inputs of the forward pass: a tensor, a tuple of positional or a dictionary of keyword arguments; by
            default random tokens or images that fit a transformers configuration.
        seed: seed of the random elements and the random inputs.

    Returns:
        The differences between the outputs, as a `Check`.

    Raises:
        CheckpointError: the outputs are not finite or all zeros.
        MismatchError: the model needs inputs, and none are given.

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
    # the module, not the file: a file may hold tensors that its class does not use, such as a pooler
    spec = spec or detect_spec(Checkpoint.open(model), inputs)
    alignment = Alignment.random(spec, generator)
    if inputs is None:
        inputs = example_inputs(_config_of(model), generator)
    moved = alignment.apply(Checkpoint.open(model))
    dtypes = checkpoint.dtypes or {torch.float64}
    narrowest = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    rounded = None if narrowest is torch.float64 else _round_to(moved, narrowest).model(torch.float64).eval()
    moved = moved.model(torch.float64).eval()  # before a forward pass, which may change buffers
    before, float32_inside = compute_outputs(model, inputs)
    if not before.any():
        raise CheckpointError(f"{checkpoint.name} returns only zeros, which would prove nothing; train it first")
    after, _ = compute_outputs(moved, inputs)
    stored = before if rounded is None else compute_outputs(rounded, inputs)[0]
    return Check(
        name=checkpoint.name,
        moved=len(alignment.moved),
        symmetries=len(spec.free),
        difference=(before - after).abs().max().item(),
        scale=before.abs().max().item(),
        float32_inside=float32_inside,
        dtype=narrowest,
        stored=(before - stored).abs().max().item(),
        bfloat16=math.nan if narrowest is torch.float64 else _bfloat16_gap(checkpoint, inputs),
    )


def _round_to(moved: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """Round the floating-point tensors of a checkpoint to a dtype."""
    parts = {k: downcast(p, dtype) if p.dtype.is_floating_point else p for k, p in moved.parts.items()}
    return moved.with_parts(parts)


def _bfloat16_gap(checkpoint: Checkpoint, inputs: Inputs) -> float:
    """Return max |Δ output| between bfloat16 and float32; NaN if an operation does not support bfloat16."""

    def run_in(dtype: torch.dtype) -> Tensor:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        model = checkpoint.model(dtype).to(dtype).eval()
        return compute_outputs(model, tree_map_only(Tensor, cast, inputs))[0]

    try:
        return (run_in(torch.bfloat16) - run_in(torch.float32)).abs().max().item()
    except (RuntimeError, CheckpointError):
        return math.nan


def tiny_models() -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, model) for every TINY configuration of every table, random and far from initialisation."""
    import transformers

    for file in families():
        for i, settings in enumerate(file.tiny):
            config = transformers.AutoConfig.for_model(**({"model_type": file.model_types[0], **settings}))
            torch.manual_seed(i)
            model = getattr(transformers, config.architectures[0])(config).double().eval()
            scramble(model, torch.Generator().manual_seed(i))
            yield f"{file.name}-{i}-{config.architectures[0]}", model


@torch.no_grad()
def scramble(model: nn.Module, generator: torch.Generator) -> None:
    """Scale weights by 10 and randomise norms, biases and statistics: at initialisation, errors in tables can hide."""

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(10) if parameter.any() else parameter.copy_(0.2 * noise(parameter))
        else:
            is_gain = name.endswith("weight")
            parameter.copy_(1 + 0.4 * noise(parameter) if is_gain else 0.5 * noise(parameter))
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if batch_norms:  # noise around the true statistics, so that the signal reaches the output
        for norm in batch_norms:
            norm.momentum = 1.0
        run_module(model.train(), example_inputs(_config_of(model), generator))
        model.eval()
        for norm in batch_norms:
            mean, var = norm.running_mean, norm.running_var
            if mean is not None and var is not None:
                mean.add_(0.3 * mean.std() * noise(mean))
                var.mul_(0.6 + 0.8 * torch.rand(var.shape, generator=generator, dtype=torch.float64)).add_(1e-3)


@torch.no_grad()
def compute_outputs(model: nn.Module, inputs: Inputs) -> tuple[Tensor, bool]:
    """Return all floating-point outputs as one vector, and whether a float64 value was rounded to float32."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")  # grouped matrix products do not support float64
    with _Float32Spy() as spy:
        outputs = [tensor for tensor in output_tensors(run_module(model, inputs)) if tensor.is_floating_point()]
    if not outputs:
        raise CheckpointError(
            f"{type(model).__name__} returns no floating-point tensor, so there is nothing to compare"
        )
    flat = torch.cat([tensor.reshape(-1) for tensor in outputs]).double()
    if not torch.isfinite(flat).all():
        raise CheckpointError(f"{type(model).__name__} returns outputs that are NaN or infinite")
    return flat, spy.float32_used


def _config_of(model: nn.Module) -> Any:
    if not hasattr(model, "config"):
        raise MismatchError(
            f"{type(model).__name__} is not a transformers model, so its inputs have to be given (inputs=)"
        )
    return model.config


class _Float32Spy(TorchDispatchMode):
    """Records whether a float64 value was rounded to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.float32_used = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and out.numel():
            self.float32_used |= any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return out
