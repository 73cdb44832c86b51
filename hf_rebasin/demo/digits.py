"""scikit-learn's digits: the data that the demo trains and measures on, and leaves behind as a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OptionError

DigitBatch = dict[str, Tensor]
GREY_PER_SHADE = 15  # grey levels in image files for each of the 16 shades


@cache
def load_splits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load ((images, labels) for training, the same for testing): 1297 and 500 images of 8 × 8 pixels in [-1, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise OptionError("the demo needs scikit-learn for its data: pip install 'hf-rebasin[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1234))
    train, test = order[:1297], order[1297:]
    return (x[train], y[train]), (x[test], y[test])


def make_training_batches(generator: torch.Generator) -> Iterator[DigitBatch]:
    """Iterate endlessly over random batches of 64, with a little noise on the pixels."""
    x, y = load_splits()[0]
    while True:
        i = torch.randint(len(x), (64,), generator=generator)
        yield {"pixel_values": x[i] + 0.1 * torch.randn(x[i].shape, generator=generator), "labels": y[i]}


def make_statistics_batches() -> Iterator[DigitBatch]:
    """Iterate over the training images without noise, for BatchNorm statistics."""
    for x in load_splits()[0][0].split(128):
        yield {"pixel_values": x}


def make_evaluation_batches() -> list[DigitBatch]:
    """Return the test images with their labels, as one batch."""
    x, y = load_splits()[1]
    return [{"pixel_values": x, "labels": y}]


def write_digits(folder: Path) -> None:
    """Write the images as a dataset with two splits, for further experiments."""
    import datasets
    from PIL import Image

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("0123456789")))
    folder.mkdir(parents=True, exist_ok=True)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for split, (x, y) in zip(("train", "test"), load_splits(), strict=True):
        images = [
            Image.fromarray(image[0].numpy().astype("uint8")) for image in ((x + 1) * 8 * GREY_PER_SHADE).round()
        ]
        rows = datasets.Dataset.from_dict({"image": images, "label": y.tolist()}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    if not bars:
        datasets.enable_progress_bars()


def write_processor(folder: Path) -> None:
    """Write an image processor that maps images to what the models were trained on: 0 … 240 to -1 … 1."""
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(
        do_resize=False, rescale_factor=1 / (16 * GREY_PER_SHADE), image_mean=[0.5], image_std=[0.5]
    )
    processor.save_pretrained(folder)
