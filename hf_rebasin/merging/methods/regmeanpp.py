"""RegMean++: RegMean on the inputs that blocks get in the merge (Nguyen et al. 2025, arXiv 2508.03121).

As in RegMean, W = (Σ wᵢ Gᵢ)⁻¹ Σ wᵢ Gᵢ Wᵢ with Gram matrices Gᵢ of a layer's inputs in model i. In a deep model those
inputs differ from what the layer reads in the merge, as all earlier layers have been merged. So here model i computes
with the blocks of the merge up to the block at hand, which reads their features, and with its own layers inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ...checkpoints.checkpoint import Checkpoint
from ...modules.layerwise import LayerStep
from ...text import layer_name
from ._grams import ALPHA, RIDGE, average_weights, merge_by_grams

PIECES = "elements"
VERB = ("solving for RegMean++", "solved by RegMean++")


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
    """Solve for the weights of linear layers, Conv1D and convolutions, in the order of the forward pass.

    A block is what has the same first number in its name: a layer of a transformer, a stage of a ResNet. While the
    layers of a block are merged, every model computes with its own tensors in this block and in those that still
    come, and with the merge's in all others: in finished blocks, and from the start in embeddings, last norms and
    whatever else is only averaged. So inside a block the inputs of a layer come from the model's own earlier layers,
    in which they may differ from the merge's. A linear map outside of all blocks, such as a head, is a block of its
    own: where models read the same data, it reads the same in all of them, so its weight stays the average.

    Everything else is as in RegMean: models of different tasks should read the inputs of their own tasks, by
    `OwnBatches`, biases and all other tensors stay the average, and BatchNorm statistics are recomputed on the data.

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

    Example: two blocks of one number each, y = b a x, with a = 1 and b = 2 in one model, a = 3 and b = 6 in the other.
    The first block becomes (1 + 3) / 2 = 2, so both models feed 2x to their second blocks, and it becomes
    (4 * 2 + 4 * 6) / (4 + 4) = 4. RegMean has (1 * 2 + 9 * 6) / (1 + 9) = 5.6 there.

        >>> better = finish(merge([a, moved]), [Checkpoint.open(a), Checkpoint.open(moved)], batches)
    """
    label = VERB[0] if progress else ""
    return merge_by_grams(
        merged,
        models,
        data,
        weights=weights,
        alpha=alpha,
        ridge=ridge,
        before=_share_finished_blocks,
        device=device,
        progress=label,
    )


def _share_finished_blocks(step: LayerStep, modules: Sequence[nn.Module]) -> None:
    """Let models compute with the merge's tensors, except in blocks of which a layer is still to be merged."""
    merged, *models = modules
    pending = {_block_of(name) for name in step.pending}
    for path, part in merged.named_modules(remove_duplicate=False):
        if _block_of(path) not in pending:
            for model in models:  # not copied, so that tensors which are tied in the model only come apart
                own = model.get_submodule(path)
                own._parameters.update(part._parameters)
                own._buffers.update(part._buffers)


def _block_of(path: str) -> str:
    """Return the block of a module; a module outside of all blocks is one of its own."""
    return layer_name(f"{path}.weight")
