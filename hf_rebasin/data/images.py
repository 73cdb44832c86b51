"""Images as a model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import without_weights
from ..errors import CheckpointError, MismatchError, some
from .dataset import Row, Rows

GREY = ("1", "L", "I", "F", "I;16")


@dataclass(frozen=True)
class Images:
    """One image a row.

    Args:
        rows: which decode them.
        column: of the rows.
        processor: the model's own.
        channels: that the model takes; None where it does not say.
        labels: of rows.
    """

    rows: Rows = field(repr=False)
    column: str
    processor: Any = field(repr=False)
    channels: int | None
    labels: Callable[[Sequence[Row]], Tensor] | None = None
    unit = "rows"

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def units(self, rows: Iterable[Row]) -> Iterator[Row]:
        return iter(rows)

    def batch(self, rows: Sequence[Row], _number: int) -> dict[str, Tensor]:
        """`pixel_values` (rows, channels, height, width), and `labels`."""
        images = [self._fitting(self.rows.image(row[self.column])) for row in rows]
        try:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError, RuntimeError) as error:
            kinds = sorted({f"{image.width}x{image.height} {image.mode}" for image in images})
            raise MismatchError(
                f"the image processor of the model cannot make a batch of images of {some(kinds)}: {error}"
            ) from error
        return {"pixel_values": pixels} | ({"labels": self.labels(rows)} if self.labels else {})

    def _fitting(self, image: Any) -> Any:
        """With the model's channels, where nothing is lost by it."""
        if self.channels == 3:
            return image.convert("RGB")
        if self.channels == 1 and image.mode in GREY:
            return image.convert("L") if image.mode == "1" else image
        if self.channels not in (None, len(image.getbands())):
            raise MismatchError(
                f"column {self.column!r} has images of {len(image.getbands())} channels ({image.mode}), and the model "
                f"takes {self.channels} (num_channels)"
            )
        return image


def images_for(
    checkpoint: Checkpoint, rows: Rows, column: str, labels: Callable[[Sequence[Row]], Tensor] | None
) -> Images:
    """How images are made ready for a model, by the image processor in its folder.

    Raises:
        CheckpointError: no image processor.
    """
    from transformers import AutoImageProcessor

    if checkpoint.folder is None or not any(checkpoint.folder.glob("*processor_config.json")):
        raise CheckpointError(
            f"{checkpoint.name} comes without an image processor (preprocessor_config.json); save the one it was "
            "trained with into its folder"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever the code reading it stumbles on
        raise CheckpointError(f"the image processor of {checkpoint.name} cannot be loaded: {error}") from error
    return Images(rows, column, processor, getattr(_seeing(checkpoint), "num_channels", None), labels)


def _seeing(checkpoint: Checkpoint) -> Any:
    """The part of a configuration that is about images."""
    return getattr(checkpoint.config, "vision_config", checkpoint.config)


def refuse_size(checkpoint: Checkpoint, pixels: Tensor) -> None:
    """Raise MismatchError for images of a size that the model does not take.

    Some say a size and take any, so where it is another the model is asked, without its weights.
    """
    size = getattr(_seeing(checkpoint), "image_size", None)
    sides = (size, size) if isinstance(size, int) else size
    if sides is None or tuple(sides) == tuple(pixels.shape[-2:]):
        return
    try:
        with torch.no_grad():
            without_weights(checkpoint.config, len(checkpoint.parts))(pixel_values=pixels.to("meta"))
    except (ValueError, RuntimeError) as error:
        raise MismatchError(
            f"the image processor of {checkpoint.name} makes images of {tuple(pixels.shape[-2:])}, and the model "
            f"takes {tuple(sides)} (image_size): {error}"
        ) from error
