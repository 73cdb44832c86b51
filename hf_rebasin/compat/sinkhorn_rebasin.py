"""`RebasinNet`: relaxed alignments as a torch module, with the interface of the package of Sinkhorn re-basin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..alignment.alignment import Alignment
from ..alignment.elements.permutations import assigned, random_orders
from ..alignment.elements.relaxation import Softening
from ..alignment.limits import Limits
from ..alignment.relaxed_alignment import RelaxedAlignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import copied, module_names
from ..errors import CheckpointError, MismatchError, OptionError, SpecError, nearest, some
from ..modules.forward import Inputs
from ..symmetries.detection import spec_for
from ..symmetries.spec import Spec
from ..symmetries.table import Table

OPERATORS = {"implicit": True, "unrolled": False}
PERMUTATION_TYPES = ("mat_mul", "broadcast")


class RebasinNet(nn.Module):
    """A module whose units are in an order that can be learned by gradients, with any loss and any optimizer.

    Every symmetry of the model has a latent matrix X. In train mode, units are mixed by the doubly stochastic matrix
    S_τ(X), exp(X / τ) with its columns and rows scaled to sums of 1 in turn; its gradient comes from the equations of
    the fixed point. In eval mode, they are permuted by the assignment that maximises Σᵢ X[i, order[i]]: exactly the
    same function as that of the model. Which axes move together is known as in `align`, so any module will do:
    BatchNorm statistics, residual streams, attention heads and units inside each of them move, too.

    From "Re-basin via implicit Sinkhorn differentiation" (Guerrero Peña et al. 2023, arXiv 2212.12042), whose package
    has this interface; the losses are in `hf_rebasin.loss`.

    Args:
        model: any module. It is copied, and never changed.
        input_shape: of one batch of floating-point inputs, the batch dimension too, such as (1, 28 * 28).
        tau: temperature of the Sinkhorn operator; the lower, the nearer to permutations.
        l: a factor of the latents, as if `tau` were divided by it.
        n_iter: iterations of the Sinkhorn operator.
        operator: "implicit" for gradients by the equations of its fixed point, "unrolled" for those through all its
            iterations.
        permutation_type: "mat_mul" or "broadcast", which are the same here: eval mode never multiplies by matrices.
        inputs: instead of `input_shape`, a batch of inputs: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments. A transformers model needs neither.
        spec: the symmetries, or a table of them, instead of those that `spec_for` finds.
        hold: names of symmetries, or patterns as `hidden.*`, that stay as they are.
        generator: of the noise in the latents at the start; by default torch's own.

    Attributes:
        p: the latents, an `nn.ParameterList` for an optimizer: (n, n) for a symmetry of n things, with the sizes of
            what it is nested in before that, (heads, n, n) for the units of every head. At first I + 0.1 · N(0, 1).
        symmetries: the name of the symmetry of each of them.
        spec: what the symmetries are.
        model: the copy of the model that is moved; its parameters take no gradients.
        tau, l, n_iter, operator: as given; they may be changed at any time.

    Raises:
        OptionError: no module, an `input_shape` that is no shape, or a knob that cannot be.
        MismatchError: no inputs for a module that needs some, or a spec of another model.
        SpecError: a forward pass that fails on such inputs, or a model in which nothing can be permuted.
        CheckpointError: quantised weights.
        UnknownNameError: `hold` names no symmetry.

    Example: 16 hidden units, put in another order and brought back.

        >>> model_a = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        >>> pi_model_a = RebasinNet(model_a, input_shape=(1, 8))
        >>> pi_model_a.p[0].shape
        torch.Size([16, 16])
        >>> pi_model_a.random_init()
        >>> model_b = pi_model_a.eval()()  # the function of model_a, with other weights
        >>> pi_model_a.identity_init()
        >>> criterion = DistL2Loss(model_b)
        >>> optimizer = torch.optim.AdamW(pi_model_a.p.parameters(), lr=0.1)
        >>> for step in range(50):
        ...     loss = criterion(pi_model_a.train()())  # of soft permutations
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> criterion(pi_model_a.eval()())  # of hard ones
        tensor(0.)
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int] | None = None,
        *,
        tau: float = 1.0,
        l: float = 1.0,  # noqa: E741 (its name in the other package)
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
            raise OptionError(f"got a {type(model).__name__} for a model; give a torch module")
        if not (tau > 0 and l > 0 and n_iter >= 1):
            raise OptionError(f"tau = {tau}, l = {l}, n_iter = {n_iter}; give positive ones")
        for said, known in ((operator, OPERATORS), (permutation_type, PERMUTATION_TYPES)):
            if said not in known:
                raise OptionError(f"no {said!r}{nearest(str(said), known)}")
        self.tau, self.l, self.n_iter, self.operator = tau, l, n_iter, operator
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        drawn = None if input_shape is None else _drawn(input_shape, inputs, first.dtype)
        try:
            own = _spec(model, spec, inputs if drawn is None else drawn)
        except SpecError as error:
            if drawn is None:
                raise
            raise SpecError(
                f"{error}\n  with floats of input_shape = {tuple(drawn.shape)}, of which the first is the batch "
                "dimension; a model of anything else needs inputs="
            ) from error
        self._one_row = drawn is not None and drawn.dim() == 2
        self.spec, _ = Limits("permutation", hold=tuple(hold)).on(own, {})
        checkpoint, names = Checkpoint.open(model), module_names(model)
        checkpoint.refuse_quantised()
        if names is None:
            raise CheckpointError(f"{type(model).__name__} stores its tensors otherwise than it computes with them")
        self._names = {key: names[disk] for key, disk in checkpoint.canonical(self.spec.table.prefix).items()}
        relaxed = RelaxedAlignment.identity(
            self.spec,
            Softening(generator or torch.default_generator, noise=0.1, device=first.device, dtype=_wide(first.dtype)),
        )
        self.symmetries = tuple(relaxed.elements)
        if not self.symmetries:
            held = [f"{key} ({next(filter(None, why))})" for key, why in self.spec.pins.items() if any(why)]
            raise SpecError(f"{type(model).__name__} has nothing to permute; held are {some(held) or 'all'}")
        self.p = nn.ParameterList(relaxed.permuting)
        self.model = copied(model).requires_grad_(False)
        self.train()

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The re-based module, or what it says for inputs.

        Returns:
            Without inputs, a new module of the model's class, in the mode of this one. In train mode, its parameters
            carry gradients to `p`; buffers, such as running statistics, move without. In eval mode nothing does. With
            inputs, its answer; one row of a batch may come without its dimension.
        """
        module = self._rebased()
        if x is None and not args and not kwargs:
            return module
        if self._one_row and isinstance(x, Tensor) and x.dim() == 1:
            x = x[None]
        return module(*(() if x is None else (x,)), *args, **kwargs)

    @torch.no_grad()
    def identity_init(self) -> None:
        """Latents I: every unit in its place."""
        for latent in self.p:
            latent.copy_(torch.eye(latent.shape[-1]))

    @torch.no_grad()
    def random_init(self, generator: torch.Generator | None = None) -> None:
        """Latents that are random permutation matrices, drawn from `generator` or torch's own."""
        for latent in self.p:
            *batch, n, _ = latent.shape
            order = random_orders(tuple(batch), n, generator or torch.default_generator)
            latent.copy_(torch.eye(n)[order])

    @torch.no_grad()
    def update_batchnorm(self, model: nn.Module) -> None:
        """Take the BatchNorm statistics of a module like the one this was made of.

        Raises:
            MismatchError: other BatchNorm layers.
        """
        ours, theirs = _statistics(self.model), _statistics(model)
        if {key: buffer.shape for key, buffer in ours.items()} != {key: b.shape for key, b in theirs.items()}:
            raise MismatchError(
                f"other BatchNorm statistics: {some(ours) or 'none'} in this model, {some(theirs) or 'none'} in that"
            )
        for key, buffer in ours.items():
            buffer.copy_(theirs[key])

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The latents alone: nothing else is learned."""
        return self.p.parameters(recurse)

    def alignment(self) -> Alignment:
        """The permutations of eval mode, to save, compose, or apply to a checkpoint."""
        return self._relaxed().hard()

    def _relaxed(self) -> RelaxedAlignment:
        """The relaxed alignment of the latents as they are now, wherever they were moved to."""
        softening = _Given(
            torch.default_generator,
            temperature=self.tau / self.l,
            iterations=self.n_iter,
            implicit=OPERATORS[self.operator],
            latents=(latent.to(_wide(latent.dtype)) for latent in self.p),
        )
        return RelaxedAlignment.identity(self.spec, softening)

    def _rebased(self) -> nn.Module:
        """A new module, all of whose tensors are its own."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        tensors |= dict(self.model.named_buffers(remove_duplicate=False))
        state = {key: tensors[name] for key, name in self._names.items()}
        relaxed = self._relaxed()
        moved: Mapping[str, Tensor]
        moved = relaxed.apply(state) if self.training else relaxed.hard().on(self.spec.within(state), state)
        instead = {}
        for key, old in state.items():
            new = torch.empty_like(old)
            if isinstance(old, nn.Parameter):
                # written in place, so it stays a parameter; assigned, what has a history could not be one
                instead[id(old)] = nn.Parameter(new, requires_grad=False).copy_(moved[key])
            else:
                instead[id(old)] = new.copy_(moved[key].detach())
        return copied(self.model, instead)


def matching(alpha: Tensor) -> Tensor:
    """The permutation matrix nearest to a matrix: the P that maximises Σᵢⱼ P[i, j] · alpha[i, j].

    Args:
        alpha: (*batch, n, n), such as a latent of `RebasinNet.p`.

    Returns:
        P, of the shape, dtype and device of `alpha`; P @ W has the rows of W in the order in which eval mode has them.

    Raises:
        OptionError: no square matrices.

    Example: the diagonal has 1 + 1 = 2, the other permutation 2 + 3 = 5.

        >>> matching(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    if not isinstance(alpha, Tensor) or alpha.dim() < 2 or alpha.shape[-1] != alpha.shape[-2]:
        said = f"shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else type(alpha).__name__
        raise OptionError(f"matching needs square matrices, got {said}")
    order = assigned(alpha.detach())
    return torch.eye(alpha.shape[-1], dtype=alpha.dtype)[order].to(alpha.device)


@dataclass(frozen=True)
class _Given(Softening):
    """Relaxes with latents that are there already, one after the other."""

    latents: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def latent(self, batch: tuple[int, ...], n: int) -> Tensor | None:
        return None if n == 1 else next(self.latents)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of its BatchNorm layers."""
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    return {f"{name}.{key}": buffer for name, norm in norms for key, buffer in norm.named_buffers()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What latents are computed in: half precision cannot hold sums of 1."""
    return torch.promote_types(dtype, torch.float32)


def _drawn(input_shape: Sequence[int], inputs: Inputs | None, dtype: torch.dtype) -> Tensor:
    """Inputs of a shape."""
    if inputs is not None:
        raise OptionError("got both input_shape and inputs; give one of the two")
    sizes = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise OptionError(f"input_shape = {input_shape!r}; give the sizes of one batch, such as (1, 28 * 28)")
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _spec(model: nn.Module, spec: Spec | Table | None, inputs: Inputs | None) -> Spec:
    """The symmetries of a model, as given or found."""
    if not isinstance(spec, Spec):
        return spec_for(model, spec, inputs)
    shapes = Checkpoint.open(model).shapes(spec.table.prefix)
    for key, shape in spec.shapes.items():
        if shapes.get(key) != shape:
            raise MismatchError(f"{type(model).__name__} has {shapes.get(key)} for {key!r}, which is {shape} in spec")
    return spec
