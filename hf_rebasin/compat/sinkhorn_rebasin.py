"""`RebasinNet`: relaxed alignments as a torch module, with the interface of the Sinkhorn re-basin package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..alignment.alignment import Alignment
from ..alignment.elements.permutations import random_orders, solve_assignment
from ..alignment.elements.relaxation import Relaxation
from ..alignment.limits import Limits
from ..alignment.relaxed_alignment import RelaxedAlignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import copy_module, module_names
from ..checkpoints.precision import compute_dtype
from ..errors import CheckpointError, MismatchError, OptionError, SpecError, listed, nearest
from ..modules.forward import Inputs
from ..symmetries.detection import spec_for
from ..symmetries.spec import Spec
from ..symmetries.table import Table, canonical_view

OPERATORS = {"implicit": True, "unrolled": False}
PERMUTATION_TYPES = ("mat_mul", "broadcast")


class RebasinNet(nn.Module):
    """A module with a permutation of its units that is learned by gradients, with any loss and any optimizer.

    Each symmetry of the model has a latent matrix X. In train mode, units are mixed by the doubly stochastic matrix
    S_τ(X): exp(X / τ), whose columns and rows are scaled to sums of 1 in turn; its gradient comes from the equations
    of the fixed point. In eval mode, units are permuted by the assignment that maximises Σᵢ X[i, order[i]], which
    leaves the model's function exactly the same. The symmetries are found as in `align`, so any module will do:
    BatchNorm statistics, residual streams, attention heads and the units within each head are permuted, too.

    The method is from "Re-basin via implicit Sinkhorn differentiation" (Guerrero Peña et al. 2023, arXiv 2212.12042),
    whose package has this interface; the losses are in `hf_rebasin.loss`.

    Args:
        model: any module. It is copied, and never changed.
        input_shape: shape of a batch of floating-point inputs, including the batch dimension, such as (1, 28 * 28).
        tau: temperature of the Sinkhorn operator; the lower, the closer to a permutation.
        l: factor of the latents; it acts as if `tau` were divided by it.
        n_iter: number of iterations of the Sinkhorn operator.
        operator: "implicit" for gradients from the equations of the fixed point, "unrolled" for gradients through all
            iterations.
        permutation_type: "mat_mul" or "broadcast"; no difference here, as eval mode never multiplies by matrices.
        inputs: batch of inputs instead of `input_shape`: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments. A transformers model needs neither.
        spec: symmetries, or a table of them, to use instead of those that `spec_for` finds.
        hold: names of symmetries, or patterns such as `hidden.*`, that are not permuted.
        generator: generator of the noise in the initial latents; by default torch's own.

    Attributes:
        p: latents, an `nn.ParameterList` to give to an optimizer: (n, n) for a symmetry of n units, preceded by the
            sizes of the symmetries it is nested in, such as (heads, n, n) for the units of every head. Initially
            I + 0.1 · N(0, 1).
        symmetries: names of the symmetries, one per latent.
        spec: spec of the symmetries.
        model: copy of the model that is permuted; its parameters take no gradients.
        tau, l, n_iter, operator: as given; they may be changed at any time.

    Raises:
        OptionError: `model` is not a module, `input_shape` is not a shape, or an option is out of its range.
        MismatchError: the module needs inputs and none are given, or the spec belongs to another model.
        SpecError: the forward pass fails on these inputs, or nothing in the model can be permuted.
        CheckpointError: the weights are quantised.
        UnknownNameError: `hold` names a symmetry that the model does not have.

    Example: permute 16 hidden units, and recover their order.

        >>> model_a = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        >>> pi_model_a = RebasinNet(model_a, input_shape=(1, 8))
        >>> pi_model_a.p[0].shape
        torch.Size([16, 16])
        >>> pi_model_a.random_init()
        >>> model_b = pi_model_a.eval()()  # the same function as model_a, with other weights
        >>> pi_model_a.identity_init()
        >>> criterion = DistL2Loss(model_b)
        >>> optimizer = torch.optim.AdamW(pi_model_a.p.parameters(), lr=0.1)
        >>> for step in range(50):
        ...     loss = criterion(pi_model_a.train()())  # soft permutations
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> criterion(pi_model_a.eval()())  # hard permutations
        tensor(0.)
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int] | None = None,
        *,
        tau: float = 1.0,
        l: float = 1.0,  # noqa: E741 (the name in the original package)
        n_iter: int = 20,
        operator: str = "implicit",
        permutation_type: str = "mat_mul",
        inputs: Inputs | None = None,
        spec: Spec | Table | None = None,
        hold: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise OptionError(f"the model is a {type(model).__name__}; give a torch module")
        if not (tau > 0 and l > 0 and n_iter >= 1):
            raise OptionError(f"tau = {tau}, l = {l}, n_iter = {n_iter}; give positive values")
        for name, value, known in (
            ("operator", operator, OPERATORS),
            ("permutation_type", permutation_type, PERMUTATION_TYPES),
        ):
            if value not in known:
                raise OptionError(f"unknown {name} {value!r}{nearest(str(value), known)}")
        self.tau, self.l, self.n_iter, self.operator = tau, l, n_iter, operator
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        generated = None if input_shape is None else _random_inputs(input_shape, inputs, first.dtype)
        try:
            resolved = _resolve_spec(model, spec, inputs if generated is None else generated)
        except SpecError as error:
            if generated is None:
                raise
            raise SpecError(
                f"{error}\n  with floats of input_shape = {tuple(generated.shape)}, whose first dimension is the "
                "batch; a model that takes anything else needs inputs="
            ) from error
        self._takes_rows = generated is not None and generated.dim() == 2
        self.spec, _ = Limits("permutation", hold=tuple(hold)).on(resolved, {})
        checkpoint, by_disk_key = Checkpoint.open(model), module_names(model)
        checkpoint.refuse_quantised()
        if by_disk_key is None:
            raise CheckpointError(f"{type(model).__name__} stores its tensors in another form than it computes with")
        canonical_keys = canonical_view(checkpoint, self.spec.table).keys
        self._module_keys = {key: by_disk_key[disk] for key, disk in canonical_keys.items()}
        relaxed = RelaxedAlignment.identity(
            self.spec,
            Relaxation(
                generator=generator or torch.default_generator,
                noise=0.1,
                device=first.device,
                dtype=compute_dtype(first.dtype),
            ),
        )
        self.symmetries = tuple(relaxed.elements)
        if not self.symmetries:
            pinned = {key: next(filter(None, reasons)) for key, reasons in self.spec.pins.items() if any(reasons)}
            held = [f"{key} ({reason})" for key, reason in pinned.items()]
            raise SpecError(f"{type(model).__name__} has nothing to permute; held: {listed(held) or 'all'}")
        self.p = nn.ParameterList(relaxed.permuting)
        self.model = copy_module(model).requires_grad_(False)
        self.train()

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return the permuted module, or its outputs for the given inputs.

        Returns:
            Without inputs, a new module of the model's class, in the mode of this one. In train mode, gradients flow
            from its parameters to `p`, but not from buffers such as running statistics; in eval mode, from neither.
            With inputs, the outputs of that module; a single row may lack the batch dimension.
        """
        module = self._rebased()
        if x is None and not args and not kwargs:
            return module
        if self._takes_rows and isinstance(x, Tensor) and x.dim() == 1:
            x = x[None]
        return module(*(() if x is None else (x,)), *args, **kwargs)

    @torch.no_grad()
    def identity_init(self) -> None:
        """Set the latents to I: the identity permutation."""
        for latent in self.p:
            latent.copy_(torch.eye(latent.shape[-1]))

    @torch.no_grad()
    def random_init(self, generator: torch.Generator | None = None) -> None:
        """Set the latents to random permutation matrices, drawn from `generator` or torch's own."""
        for latent in self.p:
            *batch, n, _ = latent.shape
            order = random_orders(tuple(batch), n, generator or torch.default_generator)
            latent.copy_(torch.eye(n)[order])

    @torch.no_grad()
    def update_batchnorm(self, model: nn.Module) -> None:
        """Copy the BatchNorm statistics of a module of the same kind as the original one.

        Raises:
            MismatchError: the module has other BatchNorm layers.
        """
        ours, theirs = _batchnorm_buffers(self.model), _batchnorm_buffers(model)
        if {key: buffer.shape for key, buffer in ours.items()} != {key: b.shape for key, b in theirs.items()}:
            raise MismatchError(
                f"BatchNorm statistics differ: {listed(ours) or 'none'} here, {listed(theirs) or 'none'} in that model"
            )
        for key, buffer in ours.items():
            buffer.copy_(theirs[key])

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over the latents, the only parameters that are learned."""
        return self.p.parameters(recurse)

    def alignment(self) -> Alignment:
        """Return the permutations of eval mode, to save, compose, or apply to a checkpoint."""
        return self._relaxed().hard()

    def _relaxed(self) -> RelaxedAlignment:
        """Return the relaxed alignment of the current latents, on their current device."""
        relaxation = _GivenLatents(
            generator=torch.default_generator,
            temperature=self.tau / self.l,
            iterations=self.n_iter,
            implicit=OPERATORS[self.operator],
            latents=(latent.to(compute_dtype(latent.dtype)) for latent in self.p),
        )
        return RelaxedAlignment.identity(self.spec, relaxation)

    def _rebased(self) -> nn.Module:
        """Return the permuted module, which shares no tensor with any other."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        tensors |= dict(self.model.named_buffers(remove_duplicate=False))
        state = {key: tensors[module_key] for key, module_key in self._module_keys.items()}
        relaxed = self._relaxed()
        moved: Mapping[str, Tensor]
        moved = relaxed.apply(state) if self.training else relaxed.hard().on(self.spec.within(state), state)
        replacements = {}
        for key, old in state.items():
            new = torch.empty_like(old)
            if isinstance(old, nn.Parameter):
                # in place: the copy stays a parameter, while a tensor with a gradient history cannot become one
                replacements[id(old)] = nn.Parameter(new, requires_grad=False).copy_(moved[key])
            else:
                replacements[id(old)] = new.copy_(moved[key].detach())
        return copy_module(self.model, replacements)


def matching(alpha: Tensor) -> Tensor:
    """Return the permutation matrix P nearest to a matrix, which maximises Σᵢⱼ P[i, j] · alpha[i, j].

    Args:
        alpha: matrices (*batch, n, n), such as a latent of `RebasinNet.p`.

    Returns:
        P, with the shape, dtype and device of `alpha`; P @ W has the rows of W in the order of eval mode.

    Raises:
        OptionError: `alpha` is not a tensor of square matrices.

    Example: the diagonal sums to 1 + 1 = 2, the other permutation to 2 + 3 = 5.

        >>> matching(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    if not isinstance(alpha, Tensor) or alpha.dim() < 2 or alpha.shape[-1] != alpha.shape[-2]:
        actual = f"shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else type(alpha).__name__
        raise OptionError(f"matching needs square matrices, got {actual}")
    order = solve_assignment(alpha.detach())
    return torch.eye(alpha.shape[-1], dtype=alpha.dtype)[order].to(alpha.device)


@dataclass(frozen=True, kw_only=True)
class _GivenLatents(Relaxation):
    """A relaxation that takes its latents, one after the other, from an iterator."""

    latents: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def latent(self, batch: tuple[int, ...], n: int) -> Tensor | None:
        return None if n == 1 else next(self.latents)


def _batchnorm_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of all BatchNorm layers, by name."""
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return {f"{name}.{key}": buffer for name, norm in norms for key, buffer in norm.named_buffers()}


def _random_inputs(input_shape: Sequence[int], inputs: Inputs | None, dtype: torch.dtype) -> Tensor:
    """Return random inputs of the given shape; OptionError if `inputs` are given, too."""
    if inputs is not None:
        raise OptionError("got both input_shape and inputs; give one of the two")
    sizes = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise OptionError(f"input_shape = {input_shape!r}; give the sizes of one batch, such as (1, 28 * 28)")
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _resolve_spec(model: nn.Module, spec: Spec | Table | None, inputs: Inputs | None) -> Spec:
    """Return the symmetries of a model, as given or as `spec_for` finds them."""
    if not isinstance(spec, Spec):
        return spec_for(model, spec, inputs)
    shapes = canonical_view(Checkpoint.open(model), spec.table).shapes
    for key, shape in spec.shapes.items():
        if shapes.get(key) != shape:
            raise MismatchError(f"{type(model).__name__} has {shapes.get(key)} for {key!r}, which is {shape} in spec")
    return spec
