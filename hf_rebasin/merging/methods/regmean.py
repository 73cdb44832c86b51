"""RegMean: merge every linear map so that its outputs stay close to the models' (Jin et al. 2022, arXiv 2212.09849).

W = argmin Σ wᵢ ‖Xᵢ W − Xᵢ Wᵢ‖² / nᵢ = (Σ wᵢ Gᵢ)⁻¹ Σ wᵢ Gᵢ Wᵢ, where Xᵢ are the inputs of the layer in model i, nᵢ of
them, and Gᵢ = XᵢᵀXᵢ / nᵢ is their Gram matrix. What a model does to directions in which its inputs never point is of
no account. Gᵢ is replaced by α Gᵢ + (1 − α) diag Gᵢ + r I: an α below 1 trusts correlations of inputs less, and the
ridge r makes the solution unique where there are fewer samples than inputs.

Refit, too, solves least squares, but for the inputs that a layer gets in the merge. RegMean++ stands in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ...checkpoints.checkpoint import Checkpoint
from ._grams import ALPHA, RIDGE, average_weights, merge_by_grams

PIECES = "elements"
VERB = ("solving for RegMean", "solved by RegMean")


def merge(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    alpha: float = ALPHA,
    ridge: float = RIDGE,
) -> Tensor:
    """Average tensors with weights; what is not the weight of a linear map stays the average.

    Args:
        tensors: one tensor per model, all of one shape.
        weights: weights of the models, 0 or more; by default equal.
        alpha: α, how much correlations of inputs count, from 0 (not at all) to 1.
        ridge: r relative to the mean of the diagonal of Gᵢ.

    Raises:
        OptionError: weights that are not one per model, are negative or have no positive sum; an alpha that is not
            between 0 and 1, or a ridge that is not above 0.
    """
    return average_weights(tensors, weights, alpha, ridge)


def finish(
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    alpha: float = ALPHA,
    ridge: float = RIDGE,
    device: Any = None,
    progress: bool = False,
) -> Checkpoint:
    """Solve for the weights of linear layers, Conv1D and convolutions; biases and all other tensors stay the average.

    If models were fine-tuned on different tasks, give each the inputs of its own task, by `OwnBatches`: then Gᵢ says
    which directions matter to task i. If all models read the same inputs, those of other tasks count as much, and the
    result may be worse than the average. There is one pass over the data for every group of layers that read the same
    input, so that only their Gram matrices are in memory. Weights that are tied to others or computed from them stay
    averages, and so do layers that no pass calls; the log names them. BatchNorm statistics are recomputed on the data.

    Args:
        merged: the average of the models, which is not modified.
        models: models that were merged, in the same coordinates (moved already).
        data: unlabelled batches that can be read again and again, or `OwnBatches`; a few hundred examples suffice.
            Under `accelerate launch` every process takes its share. Positions that an `attention_mask` leaves out do
            not count.
        weights: weights of the models, 0 or more; by default equal.
        alpha: α, how much correlations of inputs count, from 0 (not at all) to 1.
        ridge: r relative to the mean of the diagonal of Gᵢ.
        device: device of the computation.
        progress: show a progress bar (on a terminal).

    Returns:
        The merge, with the same keys and dtypes.

    Raises:
        OptionError: no data, or data that can be read only once; weights that are not one per model, are negative or
            have no positive sum; an alpha that is not between 0 and 1, or a ridge that is too small.
        CheckpointError: a model without a known class, or NaN in inputs or outputs of a layer.

    Example: one layer has the weight 2 in one model and 6 in the other. Its inputs, made by layers before it, are 1 in
    the first model and √3 in the second. So the weight becomes (1 * 2 + 3 * 6) / (1 + 3) = 5, and not 4.

        >>> better = finish(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    label = VERB[0] if progress else ""
    return merge_by_grams(
        merged, models, data, weights=weights, alpha=alpha, ridge=ridge, device=device, progress=label
    )
