"""Fisher: average weights by how much a model's predictions depend on them (Matena and Raffel 2022, arXiv 2111.09832).

θ = Σ wᵢ (cᵢ Fᵢ + e) θᵢ / Σ wᵢ (cᵢ Fᵢ + e), element by element. Fᵢ is the diagonal of the Fisher information of model
i, the mean over examples of E(∂ log p(y) / ∂θ)², where labels y are drawn from the model's own predictions p, so none
are needed. By default cᵢ = 1 / ‖Fᵢ‖ over the whole model, as a model that is less sure has a larger F everywhere. The
floor e is relative to the mean of all cᵢ Fᵢ: where a weight matters to no model, it becomes the plain average.

Squares are taken example by example. (The gradient of a whole batch, squared, is the square of a sum, in which
gradients of examples cancel.)
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.precision import all_finite
from ...errors import CheckpointError, OptionError
from ...modules.distributed import all_reduce_numbers, all_reduce_sum, shard_with_owners
from ...modules.divergence import comparable_outputs
from ...modules.forward import attention_mask_of, has_no_head, refuse_read_once, run_module
from ...modules.functional import move_batch
from ...modules.layerwise import keeps_statistics
from ..fitting import (
    average_tensors,
    change_layers,
    load_modules,
    nonnegative_shares,
    refuse_other_owners,
    refuse_submodels,
    with_module_values,
)

logger = logging.getLogger(__name__)

EPSILON = 1e-3
FEW_OUTPUTS = 16  # up to so many numbers per example, the expectation over labels is computed and not sampled
PIECES = "elements"
VERB = ("weighting by Fisher information", "weighted by Fisher information")
EXTRA_COPIES = 3  # two sums over models, and squares of gradients; gradients take the place of the merge

Likelihood = Literal["class", "labels", "numbers"]  # what outputs parametrise: see `score_vectors`


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    epsilon: float = EPSILON,
    samples: int = 1,
) -> Tensor:
    """Average tensors with weights; what is not a parameter of the model stays the average.

    Args:
        tensors: one tensor per model, all of one shape.
        weights: weights of the models, 0 or more; by default equal.
        normalize: divide the Fisher information of every model by its norm over the whole model.
        epsilon: e relative to the mean of all cᵢ Fᵢ.
        samples: labels that are drawn for an example, where outputs are too many for an exact expectation.

    Raises:
        OptionError: weights that are not one per model, are negative or have no positive sum; an epsilon or a number
            of samples that is not above 0.
    """
    return average_tensors(tensors, _checked_shares(weights, len(tensors), epsilon, samples))


def finish(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    epsilon: float = EPSILON,
    samples: int = 1,
    seed: int = 0,
    device: Any = None,
    progress: bool = False,
) -> Checkpoint:
    """Average all parameters of the models by their Fisher information on unlabelled examples.

    If models were fine-tuned on different tasks, give each the inputs of its own task, by `OwnBatches`. On inputs of
    other tasks a model is unsure, so that weights count which matter to none of its own.

    For up to 16 outputs per example, such as the classes of a classifier, the expectation over labels is exact, with
    a backward pass for each of them. Otherwise labels are drawn, for a language model one for every token, and there
    is one backward pass for every draw. Outputs that are not scores of classes count as independent labels (where
    `config.problem_type` says so) or as means of normal distributions (regression, models without a head). Labels in
    the data are ignored.

    Args:
        merged: the average of the models, which is not modified.
        models: models that were merged, in the same coordinates (moved already).
        data: unlabelled batches that can be read again and again, or `OwnBatches`; a few hundred examples suffice. How
            they are batched makes no difference, as every example is run by itself; under `accelerate launch` every
            process takes its share. Positions that an `attention_mask` leaves out do not count.
        weights: weights of the models, 0 or more; by default equal.
        normalize: divide the Fisher information of every model by its norm over the whole model.
        epsilon: e relative to the mean of all cᵢ Fᵢ.
        samples: labels that are drawn for an example, where outputs are too many for an exact expectation.
        seed: seed of the labels, which also depend on the example, so that all models have the same luck.
        device: device of the computation.
        progress: show a progress bar (on a terminal).

    Returns:
        The merge, with the same keys and dtypes. BatchNorm statistics are recomputed on the data.

    Raises:
        OptionError: no data, or data that can be read only once; batches that cannot be taken apart; weights that are
            not one per model, are negative or have no positive sum; an epsilon or a number of samples that is not
            above 0.
        CheckpointError: a model without a known class, or one whose gradients on these data are not finite.

    Example: of two models with equal norms of F, one weight is 2 and 6, with a Fisher information of 1 and 3. It
    becomes (1 * 2 + 3 * 6) / (1 + 3) = 5, up to the floor.

        >>> better = finish(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    shares = _checked_shares(weights, len(models), epsilon, samples)
    refuse_read_once(data)
    refuse_submodels([*models, merged])
    refuse_other_owners(data, len(models))
    modules, dtype = load_modules(models, device)
    likelihoods = [_likelihood_of(module) for module in modules]  # a pass with labels may set `problem_type`
    parameters = [dict(module.named_parameters(remove_duplicate=False)) for module in modules]
    sums = {name: FisherSums(x.detach()) for name, x in parameters[0].items() if x.is_floating_point()}
    means = []
    for number, (model, module, own) in enumerate(zip(models, modules, parameters, strict=True)):
        label = f"{VERB[0]}: {model.name}"
        bar = tqdm(_batches_for(number, data), label, leave=False, disable=None if progress else True)
        batches = (move_batch(batch, device, dtype) for batch in bar)
        squares, mean, norm = _fisher_of(module, batches, likelihoods[number], samples, seed)
        if not math.isfinite(norm):
            raise CheckpointError(
                f"{model.name}: its gradients on these data are not finite; check the data, and whether the model "
                "computes on them by itself"
            )
        factor = 1 / norm if normalize and norm else 1.0
        means.append(factor * mean)
        for name in sums.keys() & own.keys():
            sums[name].add(own[name].detach(), squares[id(own[name])], shares[number] * factor)
    floor = epsilon * sum(means) / len(means) or 1.0
    del squares
    holder = merged.model(torch.float64).to(device)
    for name, target in holder.named_parameters():
        if name in sums and all(name in own for own in parameters):
            target.detach().copy_(sums[name].average([own[name].detach() for own in parameters], shares, floor))
    fitted = with_module_values(merged, holder)
    if not any(keeps_statistics(part) for part in holder.modules()):
        return fitted
    return change_layers(fitted, (), data, lambda step: None, device=device)


class FisherSums:
    """The sums over models that make the average of one tensor, taken from the first model on.

    Args:
        first: the tensor in the first model. Sums are over differences from it, so that where all models agree the
            average is exactly what they agree on.
    """

    def __init__(self, first: Tensor):
        self.first, self.total, self.moved = first, torch.zeros_like(first), torch.zeros_like(first)

    def add(self, tensor: Tensor, fisher: Tensor, factor: float) -> None:
        """Add a model: its tensor and Fisher information, and wᵢ cᵢ."""
        weight = factor * fisher
        self.total += weight
        self.moved += weight * (tensor - self.first)

    def average(self, tensors: Sequence[Tensor], shares: Sequence[float], floor: float) -> Tensor:
        """Return Σ wᵢ (cᵢ Fᵢ + e) θᵢ / Σ wᵢ (cᵢ Fᵢ + e) in float64, for shares w with the sum 1 and a floor e.

        Example: values 2 and 6, F of 1 and 3, both with the factor ½, and no floor: 2 + (½ * 0 + 3/2 * 4) / 2 = 5.
        """
        first = self.first.double()
        plain = sum(share * (tensor.double() - first) for share, tensor in zip(shares, tensors, strict=True))
        return first + (self.moved.double() + floor * plain) / (self.total.double() + floor)


def _batches_for(number: int, data: Iterable[Any]) -> Iterator[Any]:
    return (batch for owner, batch in shard_with_owners(data) if owner in (None, number))


def _fisher_of(
    module: nn.Module, batches: Iterable[Any], likelihood: Likelihood, samples: int, seed: int
) -> tuple[dict[int, Tensor], float, float]:
    """Return F by the `id` of the parameter, its mean over all parameters, and its norm."""
    parameters = [parameter.requires_grad_() for parameter in module.parameters() if parameter.is_floating_point()]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0
    for batch in batches:
        for example in split_examples(batch):
            count += 1
            generator = torch.Generator().manual_seed(_seed_for(example, seed))
            for output, vector in _scores(module, example, likelihood, samples, generator):
                gradients = torch.autograd.grad(output, parameters, vector, retain_graph=True, allow_unused=True)
                for total, gradient in zip(squares, gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)
    for parameter in parameters:
        parameter.requires_grad_(False)
    (count_everywhere,) = all_reduce_numbers([count], parameters[0].device if parameters else None)
    if not count_everywhere:
        raise OptionError("the data yielded no batch")
    squares = [all_reduce_sum(total) / count_everywhere for total in squares]
    if not all(map(all_finite, squares)):
        return {}, math.nan, math.nan
    numel = sum(total.numel() for total in squares)
    mean = sum(total.sum(dtype=torch.float64).item() for total in squares) / max(numel, 1)
    norm = math.hypot(*(torch.linalg.vector_norm(total, dtype=torch.float64).item() for total in squares))
    return {id(p): total for p, total in zip(parameters, squares, strict=True)}, mean, norm


def _scores(
    module: nn.Module, example: Any, likelihood: Likelihood, samples: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs of a module, and vectors that they are multiplied by before gradients are taken and squared."""
    with torch.enable_grad():
        outputs = run_module(module, example)
        tensors = [y for y in comparable_outputs(module, outputs, example) if y.requires_grad and y.numel()]
    for y in tensors:
        kind: Likelihood = "numbers" if has_no_head(outputs) or y.shape[-1] == 1 else likelihood
        flat = y.detach().double().cpu().reshape(-1, y.shape[-1])
        for vector in score_vectors(flat, kind, samples, generator):
            yield y, vector.reshape(y.shape).to(y)


def score_vectors(outputs: Tensor, likelihood: Likelihood, samples: int, generator: torch.Generator) -> list[Tensor]:
    """Return vectors v with Σ (∂ v·z / ∂θ)² = E(∂ log p(y) / ∂θ)², where z are the outputs for one example.

    For classes, v = √p(y) ∂ log p(y) / ∂z for every label y of every position, or v = ∂ log p(y) / ∂z for labels that
    are drawn. Positions are independent given the inputs, so their mixed terms have a mean of 0. The outputs of other
    likelihoods are all independent, with the variance p(1 − p) or 1 of ∂ log p(y) / ∂z; random signs serve as draws.

    Args:
        outputs: z, (positions, classes) in float64.
        likelihood: "class", one of the classes at every position, by softmax; "labels", each of which is there or
            not, by the logistic function; "numbers", means of normal distributions of variance 1.
        samples: draws where outputs are more than `FEW_OUTPUTS`; they count as one together.
        generator: what labels are drawn by.

    Example: for two classes with p = 0.2 and 0.8, v is √0.2 (0.8, −0.8) and √0.8 (−0.2, 0.2).
    """
    exact = outputs.numel() <= FEW_OUTPUTS
    if likelihood != "class":
        p = outputs.sigmoid()
        scale = (p * (1 - p)).sqrt() if likelihood == "labels" else torch.ones_like(outputs)
        if exact:
            return [vector.reshape(outputs.shape) for vector in torch.diag_embed(scale.flatten())]
        signs = [torch.randint(2, outputs.shape, generator=generator, dtype=outputs.dtype) for _ in range(samples)]
        return [scale * (2 * sign - 1) / math.sqrt(samples) for sign in signs]
    p = outputs.softmax(-1)
    if exact:
        vectors = []
        centred = torch.eye(p.shape[-1], dtype=p.dtype) - p[:, None]  # (positions, labels, classes): ∂ log p(y) / ∂z
        for position, of_labels in enumerate(centred * p[..., None].sqrt()):
            for vector in of_labels:
                vectors.append(torch.zeros_like(p))
                vectors[-1][position] = vector
        return vectors
    drawn = []
    for _ in range(samples):
        uniforms = torch.rand(len(p), 1, generator=generator, dtype=p.dtype)
        labels = (p.cumsum(-1) < uniforms).sum(-1).clamp_max(p.shape[-1] - 1)
        vector = -p
        vector[torch.arange(len(p)), labels] += 1
        drawn.append(vector / math.sqrt(samples))
    return drawn


def split_examples(batch: Any) -> Iterator[Any]:
    """Take a batch apart along the first axis of its tensors; each example is a batch of one.

    Tensors whose first axis has length 1 belong to all examples, and so does everything that is not a tensor.

    Raises:
        OptionError: tensors of different lengths.
    """
    if isinstance(batch, Tensor):
        yield from batch.split(1)
        return
    values = batch.values() if isinstance(batch, Mapping) else batch
    lengths = {len(value) for value in values if isinstance(value, Tensor) and value.dim()} - {1}
    if len(lengths) > 1:
        raise OptionError(
            f"Fisher information is a mean over single examples, and the tensors of a batch have {sorted(lengths)} "
            "rows, so it cannot be taken apart; give batches of one example"
        )
    for i in range(max(lengths, default=1)):

        def cut(value: Any, i: int = i) -> Any:
            return value[i : i + 1] if isinstance(value, Tensor) and value.dim() and len(value) > 1 else value

        if isinstance(batch, Mapping):
            yield {key: cut(value) for key, value in batch.items()}
        else:
            yield type(batch)(cut(value) for value in batch)


def _seed_for(example: Any, seed: int) -> int:
    """Return a seed that depends on the example alone, whatever batch it was in; neither labels nor padding count."""
    digest, mask = hashlib.sha256(str(seed).encode()), attention_mask_of(example)
    named = sorted(example.items()) if isinstance(example, Mapping) else enumerate(example)
    for key, value in named:
        if key in ("labels", "attention_mask") or not isinstance(value, Tensor):
            continue
        if mask is not None and value.shape[: mask.dim()] == mask.shape:
            value = value[mask.bool()]
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _likelihood_of(module: nn.Module) -> Likelihood:
    problem_type = getattr(getattr(module, "config", None), "problem_type", None)
    return {"multi_label_classification": "labels", "regression": "numbers"}.get(problem_type, "class")  # type: ignore[arg-type,return-value]


def _checked_shares(weights: Sequence[float] | None, count: int, epsilon: float, samples: int) -> list[float]:
    if not 0 < epsilon < math.inf:
        raise OptionError(f"epsilon = {epsilon}; give a number above 0, such as {EPSILON}")
    if samples < 1:
        raise OptionError(f"samples = {samples}; give 1 or more")
    return nonnegative_shares(weights, count, "every model adds to the average")
