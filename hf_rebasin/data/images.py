"""Images of rows as inputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import build_without_weights
from ..errors import CheckpointError, MismatchError, listed
from .dataset import DatasetRow, Rows

GREYSCALE_MODES = ("1", "L", "I", "F", "I;16")


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """Batches of one image per row.

    Args:
        rows: rows that the images are from.
        column: column of the images.
        processor: image processor of the model.
        channels: number of channels that the model takes; None if its configuration does not say.
        labels: function that reads the labels of rows; None for batches without labels.
    """

    rows: Rows = field(repr=False)
    column: str
    processor: Any = field(repr=False)
    channels: int | None
    labels: Callable[[Sequence[DatasetRow]], Tensor] | None = None
    unit = "rows"

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def units(self, rows: Iterable[DatasetRow]) -> Iterator[DatasetRow]:
        return iter(rows)

    def make_batch(self, rows: Sequence[DatasetRow], _number: int) -> dict[str, Tensor]:
        """Make `pixel_values` (rows, channels, height, width), and `labels`."""
        images = [self._with_channels(self.rows.decode_image(row[self.column])) for row in rows]
        try:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError, RuntimeError) as error:
            kinds = sorted({f"{image.width}x{image.height} {image.mode}" for image in images})
            raise MismatchError(
                f"the image processor of the model cannot make a batch of images of {listed(kinds)}: {error}"
            ) from error
        return {"pixel_values": pixels} | ({"labels": self.labels(rows)} if self.labels else {})

    def _with_channels(self, image: Any) -> Any:
        """Convert an image to the model's number of channels, where nothing is lost by it."""
        if self.channels == 3:
            return image.convert("RGB")
        if self.channels == 1 and image.mode in GREYSCALE_MODES:
            return image.convert("L") if image.mode == "1" else image
        if self.channels not in (None, len(image.getbands())):
            raise MismatchError(
                f"column {self.column!r} has images of {len(image.getbands())} channels ({image.mode}), and the model "
                f"takes {self.channels} (num_channels)"
            )
        return image


def prepare_images(
    checkpoint: Checkpoint, rows: Rows, column: str, labels: Callable[[Sequence[DatasetRow]], Tensor] | None
) -> ImageRows:
    """Prepare batches of images with the image processor in a model's folder.

    Raises:
        CheckpointError: no image processor, or one that cannot be loaded.
    """
    from transformers import AutoImageProcessor

    if checkpoint.folder is None or not any(checkpoint.folder.glob("*processor_config.json")):
        raise CheckpointError(
            f"{checkpoint.name} comes without an image processor (preprocessor_config.json); save the one it was "
            "trained with into its folder"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # broken files raise errors of any type
        raise CheckpointError(f"the image processor of {checkpoint.name} cannot be loaded: {error}") from error
    channels = getattr(_vision_config(checkpoint), "num_channels", None)
    return ImageRows(rows=rows, column=column, processor=processor, channels=channels, labels=labels)


def _vision_config(checkpoint: Checkpoint) -> Any:
    """Return the part of a configuration that describes images."""
    return getattr(checkpoint.config, "vision_config", checkpoint.config)


def refuse_wrong_size(checkpoint: Checkpoint, pixels: Tensor) -> None:
    """Raise MismatchError for images of a size that the model does not take.

    Some models configure a size and take any, so where sizes differ, the model is run without its weights.
    """
    size = getattr(_vision_config(checkpoint), "image_size", None)
    sides = (size, size) if isinstance(size, int) else size
    if sides is None or tuple(sides) == tuple(pixels.shape[-2:]):
        return
    try:
        with torch.no_grad():
            build_without_weights(checkpoint.config, len(checkpoint.parts))(pixel_values=pixels.to("meta"))
    except (ValueError, RuntimeError) as error:
        raise MismatchError(
            f"the image processor of {checkpoint.name} makes images of {tuple(pixels.shape[-2:])}, and the model "
            f"takes {tuple(sides)} (image_size): {error}"
        ) from error
