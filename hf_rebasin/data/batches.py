"""Data as a description: which rows of which dataset, made into batches by the model's own tokenizer or processor.

    dataset: stanfordnlp/imdb@main
    split: test
    samples: 512

Whatever is wrong with it is said when it is opened, before a model computes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import count, islice
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, MismatchError, OptionError, some
from .dataset import Files, Rows, open_rows
from .images import images_for, refuse_size
from .labels import classes_of
from .tokens import Blocks, Single, Targets, shift_of, tokens_of


class DataSettings(BaseModel):
    """Which data, and how much of it.

    Args:
        dataset: an id on the Hub, `id@revision`, a folder (of files, or of images, `imagefolder`), a file, a pattern
            such as `data/*.jsonl`, or with `files` one of `csv`, `json`, `parquet`, `text`, `imagefolder`, `arrow`,
            `webdataset`.
        name: the configuration, where a dataset has several.
        files: the files in it: a pattern, several, or `{split: patterns}`.
        revision: a branch, a tag or a commit on the Hub.
        split: such as `train`, `validation`, `test`.
        column: of texts or images; by default the only sensible one.
        labels: the column of labels; by default `label`, `labels` or `fine_label` where there is one and the model has
            use for it. `false` leaves labels out.
        samples: how many rows at most; of language models, which take text in blocks, how many blocks.
        batch_size: rows or blocks at a time.
        max_length: tokens of a text or block; by default what tokenizer and model take, 512 at most.
        seed: of the order of rows and of masked tokens.
        shuffle: how many rows are held to draw the next one from; 0 takes rows as they come.
        streaming: read what is needed, when it is; otherwise everything is downloaded and kept first.

    Example: in a recipe, or wherever YAML says data.

        dataset: dair-ai/emotion       # 20,000 short texts with one of six labels each
        name: split
        revision: main
        split: validation
        column: text
        labels: label                  # matched with the model's own by their names
        samples: 256                   # 256 = 16 * 16: sixteen batches
        batch_size: 16
        max_length: 64
        shuffle: 1000
        seed: 1
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(min_length=1)
    name: str | None = None
    files: Files | None = None
    revision: str | None = None
    split: str = Field(default="train", min_length=1)
    column: str | None = None
    labels: str | Literal[False] | None = None
    samples: int = Field(default=1024, gt=0)
    batch_size: int = Field(default=16, gt=0)
    max_length: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    shuffle: int = Field(default=0, ge=0)
    streaming: bool = True

    @field_validator("files")
    @classmethod
    def _some_files(cls, files: Files | None) -> Files | None:
        if files is not None and (not files or (not isinstance(files, str) and "" in files)):
            raise ValueError("names no files")
        return files


class _Preparation(Protocol):
    """How rows become a model's inputs: first what a batch is made of, then the batch."""

    @property
    def column(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def labelled(self) -> bool: ...
    def units(self, rows: Any) -> Iterator[Any]: ...
    def batch(self, units: Any, number: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Batches:
    """Inputs of a model's forward pass, on the CPU; every `iter` gives the same ones, from the first.

    Example:
        >>> settings = DataSettings(dataset="corpus.txt", batch_size=4, max_length=128)
        >>> batches = open_data(settings, Checkpoint.open("openai-community/gpt2"))
        >>> next(iter(batches))["input_ids"].shape
        torch.Size([4, 128])
        >>> batches.describe()
        'corpus.txt, split train, column text: at most 1024 blocks of 128 tokens, labelled'
    """

    settings: DataSettings
    rows: Rows
    preparation: _Preparation

    @property
    def labelled(self) -> bool:
        """Whether batches have `labels`, so that a model gives a loss."""
        return self.preparation.labelled

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.share(0, 1)

    def share(self, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
        """The batches number `rank`, `rank + world`, … of those that `iter` gives.

        Rows of the others are read, but neither tokenised nor decoded. Only where blocks are packed, which begin where
        the last ends, are all texts tokenised.
        """
        units = islice(self.preparation.units(self.rows), self.settings.samples)
        for number in count():
            together = list(islice(units, self.settings.batch_size))
            if not together:
                return
            if number % world == rank:
                yield self.preparation.batch(together, number)

    def describe(self) -> str:
        """One line for reports."""
        said = self.settings
        parts = [said.dataset + (f" at {self.rows.commit}" if self.rows.commit else "")]
        files = said.files.get(said.split, "") if isinstance(said.files, Mapping) else said.files
        parts += [f"files {files if isinstance(files, str) else some(files)}"] if files else []
        parts += [f"configuration {said.name}"] if said.name else []
        parts += [f"split {said.split}", f"column {self.preparation.column}"]
        parts += [f"shuffled by {said.shuffle} with seed {said.seed}"] if said.shuffle else []
        labelled = "labelled" if self.labelled else "without labels"
        return f"{', '.join(parts)}: at most {said.samples} {self.preparation.unit}, {labelled}"


def open_data(settings: DataSettings, checkpoint: Checkpoint, *, token: str | None = None) -> Batches:
    """Open data for a model, and make the first batch of it.

    Args:
        settings: which data.
        checkpoint: of the model, with its tokenizer or image processor in its folder.
        token: for the Hub.

    Raises:
        OptionError: no such dataset, revision, configuration, split or column; rows that cannot be read, or none.
        CheckpointError: a model without a tokenizer or image processor, or of no known class.
        MismatchError: data and model do not fit: tokens, labels, channels or sizes of images.

    Example: 1024 = 64 * 16 rows by default.

        >>> batches = open_data(DataSettings(dataset="stanfordnlp/imdb"), Checkpoint.open("me/bert-for-imdb"))
        >>> len(list(batches))
        64
    """
    kind = _kind(checkpoint)
    rows = open_rows(
        settings.dataset,
        name=settings.name,
        files=settings.files,
        revision=settings.revision,
        split=settings.split,
        streaming=settings.streaming,
        shuffle=settings.shuffle,
        seed=settings.seed,
        token=token,
    )
    column = rows.column(settings.column, kind)
    prepare = _images if kind == "image" else _texts
    batches = Batches(settings, rows, prepare(settings, checkpoint, rows, column))
    first = next(iter(batches), None)
    if first is None:
        raise OptionError(f"column {column!r} of {settings.dataset} has no text but empty ones")
    if "pixel_values" in first:
        refuse_size(checkpoint, first["pixel_values"])
    return batches


def _kind(checkpoint: Checkpoint) -> Literal["text", "image"]:
    """What a model takes."""
    if checkpoint.config is None or checkpoint.owner is None:
        raise CheckpointError(
            f"{checkpoint.name} has no class that transformers knows, so what it takes is not known; give batches"
        )
    takes = signature(checkpoint.owner.forward).parameters
    text, image = "input_ids" in takes, "pixel_values" in takes
    if text == image:
        both = "text and images together" if text else "neither text nor images"
        raise MismatchError(f"{checkpoint.owner.__name__} takes {both}; give batches")
    return "text" if text else "image"


def _images(settings: DataSettings, checkpoint: Checkpoint, rows: Rows, column: str) -> _Preparation:
    labels = _labels(settings, checkpoint, rows, column, checkpoint.owner.__name__.endswith("ForImageClassification"))
    classes = None if labels is None else classes_of(checkpoint.config, rows, labels)
    return images_for(checkpoint, rows, column, classes)


def _texts(settings: DataSettings, checkpoint: Checkpoint, rows: Rows, column: str) -> _Preparation:
    owner = checkpoint.owner.__name__
    masked = owner.endswith("ForMaskedLM")
    if masked or owner.endswith(("ForCausalLM", "LMHeadModel")):
        if settings.labels:
            raise OptionError(f"{owner} predicts its own text and takes no column of labels; leave out labels")
        labelled = settings.labels is not False
        tokens = tokens_of(checkpoint, settings.max_length, "mask" if masked and labelled else "")
        return Blocks(tokens, column, labelled, masked, settings.seed)
    several = settings.batch_size > 1
    classifies, translates = owner.endswith("ForSequenceClassification"), owner.endswith("ForConditionalGeneration")
    labels = _labels(settings, checkpoint, rows, column, classifies or translates)
    if translates and settings.labels is None and labels and rows.kinds[labels] != "text":
        labels = None  # classes, which are nothing to say
    tokens = tokens_of(checkpoint, settings.max_length, "pad" if several else "")
    if classifies and several and getattr(checkpoint.config, "pad_token_id", None) is None:
        raise CheckpointError(
            f"{checkpoint.name} does not say which token fills up rows (pad_token_id in config.json), so {owner} "
            "cannot tell where a text ends; name one, or take one row at a time (batch_size: 1)"
        )
    if labels is None:
        return Single(tokens, column, shift=shift_of(checkpoint))
    if classifies:
        return Single(tokens, column, classes_of(checkpoint.config, rows, labels))
    return Single(tokens, column, Targets(tokens, rows.column(labels, "text")))


def _labels(settings: DataSettings, checkpoint: Checkpoint, rows: Rows, column: str, useful: bool) -> str | None:
    """The column of labels, if there are any."""
    if settings.labels:
        if not useful:
            raise OptionError(f"{checkpoint.owner.__name__} has no use for labels ({settings.labels}); leave them out")
        rows.refuse_missing(settings.labels)
        return settings.labels
    found = rows.label_column() if useful and settings.labels is None else None
    return None if found == column else found
