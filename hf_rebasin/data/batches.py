"""Data by description: which rows of which dataset, made into batches by the model's own tokenizer or processor.

    dataset: stanfordnlp/imdb@main
    split: test
    samples: 512

All errors in a description are reported when data is opened, before a model computes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import count, islice
from typing import Any, Literal, NoReturn, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, MismatchError, OptionError, listed
from .dataset import Files, Rows, open_rows
from .images import prepare_images, refuse_wrong_size
from .labels import make_label_reader
from .tokens import PackedTexts, TargetTexts, TextRows, find_decoder_shift, load_tokenizer

# Classes that labels, or the tokens of a text, are read for; by the ends of their names.
LABELLED = (
    *("ForImageClassification", "ForSequenceClassification", "ForConditionalGeneration"),
    *("ForMaskedLM", "ForCausalLM", "LMHeadModel"),
)


class DataSettings(BaseModel):
    """Which data to use, and how much of it.

    Args:
        dataset: an id on the Hub, `id@revision`, a folder (of files, or of images, `imagefolder`), a file, a pattern
            such as `data/*.jsonl`, or with `files` one of `csv`, `json`, `parquet`, `text`, `imagefolder`, `arrow`,
            `webdataset`.
        name: configuration of the dataset, if it has several.
        files: files of the dataset: a pattern, several, or `{split: patterns}`.
        revision: branch, tag or commit on the Hub.
        split: name of a split, such as `train`, `validation`, `test`.
        column: column of texts or images; by default the only one that makes sense.
        labels: column of labels; by default `label`, `labels` or `fine_label`, if there is one and the model uses
            labels. `false` leaves labels out.
        samples: maximal number of rows, or, for language models, which take text in blocks, of blocks.
        batch_size: rows or blocks per batch.
        max_length: maximal tokens of a text or block; by default what tokenizer and model take, 512 at most.
        seed: seed of the order of rows and of masked tokens.
        shuffle: size of the buffer of rows that the next one is drawn from; 0 takes rows in their order.
        streaming: whether rows are read when they are needed; otherwise everything is downloaded and kept first.

    Example: in a recipe, or wherever data is described in YAML.

        dataset: dair-ai/emotion       # 20,000 short texts with one of six labels each
        name: split
        revision: main
        split: validation
        column: text
        labels: label                  # matched with the model's labels by name
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
    """Makes rows into inputs of a model: first into the units of a batch, then into the batch."""

    @property
    def column(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def labelled(self) -> bool: ...
    def units(self, rows: Any) -> Iterator[Any]: ...
    def make_batch(self, units: Any, number: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Batches:
    """Inputs of a model's forward pass, on the CPU; every `iter` yields the same batches, from the first.

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
        """Whether batches have `labels`, so that a model returns a loss."""
        return self.preparation.labelled

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.iter_shard(0, 1)

    def iter_shard(self, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
        """Iterate over the batches numbered `rank`, `rank + world`, … of those that `iter` yields.

        Rows of the other batches are read, but neither tokenised nor decoded. Only if texts are packed into blocks,
        each of which starts where the last one ends, are all of them tokenised.
        """
        units = islice(self.preparation.units(self.rows), self.settings.samples)
        for number in count():
            chunk = list(islice(units, self.settings.batch_size))
            if not chunk:
                return
            if number % world == rank:
                yield self.preparation.make_batch(chunk, number)

    def describe(self) -> str:
        """Describe the data in one line, for reports."""
        settings = self.settings
        parts = [settings.dataset + (f" at {self.rows.commit}" if self.rows.commit else "")]
        files = settings.files
        files = files.get(settings.split, "") if isinstance(files, Mapping) else files
        parts += [f"files {files if isinstance(files, str) else listed(files)}"] if files else []
        parts += [f"configuration {settings.name}"] if settings.name else []
        parts += [f"split {settings.split}", f"column {self.preparation.column}"]
        parts += [f"shuffled by {settings.shuffle} with seed {settings.seed}"] if settings.shuffle else []
        labelled = "labelled" if self.labelled else "without labels"
        return f"{', '.join(parts)}: at most {settings.samples} {self.preparation.unit}, {labelled}"


def open_data(
    settings: DataSettings, checkpoint: Checkpoint, *, needs_labels: bool = False, token: str | None = None
) -> Batches:
    """Open data for a model, and check it by making the first batch.

    Args:
        settings: which data to open.
        checkpoint: checkpoint of the model, with its tokenizer or image processor in its folder.
        needs_labels: refuse data without labels, as a loss needs them.
        token: access token for the Hub.

    Raises:
        OptionError: no such dataset, revision, configuration, split or column; rows that cannot be read, or none.
        CheckpointError: a model without a tokenizer or image processor, or of an unknown class.
        MismatchError: data that does not fit the model: tokens, labels, channels or sizes of images.

    Example: 1024 = 64 * 16 rows by default.

        >>> batches = open_data(DataSettings(dataset="stanfordnlp/imdb"), Checkpoint.open("me/bert-for-imdb"))
        >>> len(list(batches))
        64
    """
    kind = _input_kind(checkpoint)
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
    column = rows.choose_column(settings.column, kind)
    prepare = _prepare_images if kind == "image" else _prepare_texts
    batches = Batches(settings, rows, prepare(settings, checkpoint, rows, column, needs_labels))
    if needs_labels and not batches.labelled:
        _refuse_unlabelled(batches, checkpoint)
    first = next(iter(batches), None)
    if first is None:
        raise OptionError(f"column {column!r} of {settings.dataset} has only empty texts")
    if "pixel_values" in first:
        refuse_wrong_size(checkpoint, first["pixel_values"])
    return batches


def _refuse_unlabelled(batches: Batches, checkpoint: Checkpoint) -> NoReturn:
    """Raise OptionError for data without labels, and say how they get some, if the model's class uses them."""
    owner = checkpoint.owner.__name__
    problem = f"{batches.describe()}; a loss needs labels"
    if not owner.endswith(LABELLED):
        raise OptionError(f"{problem}, and for {owner} none are read")
    if batches.settings.labels is False:
        raise OptionError(f"{problem}, which are left out")
    columns = [name for name in batches.rows.kinds if name != batches.preparation.column]
    if not columns:
        raise OptionError(f"{problem}, and there is no other column")
    raise OptionError(f"{problem}, so name their column (labels) of {', '.join(columns)}")


def takes_data(checkpoint: Checkpoint) -> bool:
    """Tell whether data can be opened for a model: whether it is of a known class that reads text or images."""
    try:
        _input_kind(checkpoint)
    except (CheckpointError, MismatchError):
        return False
    return True


def _input_kind(checkpoint: Checkpoint) -> Literal["text", "image"]:
    """Tell which kind of input a model takes."""
    if checkpoint.config is None or checkpoint.owner is None:
        raise CheckpointError(
            f"{checkpoint.name} has no class that transformers knows, so its inputs are not known; in Python, give "
            "batches"
        )
    parameters = signature(checkpoint.owner.forward).parameters
    text, image = "input_ids" in parameters, "pixel_values" in parameters
    if text == image:
        both = "text and images together" if text else "neither text nor images"
        raise MismatchError(f"{checkpoint.owner.__name__} takes {both}; in Python, give batches")
    return "text" if text else "image"


def _prepare_images(
    settings: DataSettings, checkpoint: Checkpoint, rows: Rows, column: str, needs_labels: bool
) -> _Preparation:
    classifies = checkpoint.owner.__name__.endswith("ForImageClassification")
    labels = _choose_labels(settings, checkpoint, rows, column, classifies)
    reader = None if labels is None else make_label_reader(checkpoint.config, rows, labels, needed=needs_labels)
    return prepare_images(checkpoint, rows, column, reader)


def _prepare_texts(
    settings: DataSettings, checkpoint: Checkpoint, rows: Rows, column: str, needs_labels: bool
) -> _Preparation:
    owner = checkpoint.owner.__name__
    masked = owner.endswith("ForMaskedLM")
    if masked or owner.endswith(("ForCausalLM", "LMHeadModel")):
        if settings.labels:
            raise OptionError(f"{owner} predicts its own text and takes no column of labels; leave out labels")
        labelled = settings.labels is not False
        tokenizer = load_tokenizer(checkpoint, settings.max_length, "mask" if masked and labelled else "")
        return PackedTexts(tokenizer=tokenizer, column=column, labelled=labelled, masked=masked, seed=settings.seed)
    padded = settings.batch_size > 1
    classifies, translates = owner.endswith("ForSequenceClassification"), owner.endswith("ForConditionalGeneration")
    labels = _choose_labels(settings, checkpoint, rows, column, classifies or translates)
    if translates and settings.labels is None and labels and rows.kinds[labels] != "text":
        labels = None  # classes, which cannot be generated
    tokenizer = load_tokenizer(checkpoint, settings.max_length, "pad" if padded else "")
    if classifies and padded and getattr(checkpoint.config, "pad_token_id", None) is None:
        raise CheckpointError(
            f"{checkpoint.name} does not say which token fills up rows (pad_token_id in config.json), so {owner} "
            "cannot tell where a text ends; name one, or take one row at a time (batch_size: 1)"
        )
    if labels is None:
        return TextRows(tokenizer=tokenizer, column=column, shift=find_decoder_shift(checkpoint))
    if classifies:
        reader = make_label_reader(checkpoint.config, rows, labels, needed=needs_labels)
        return TextRows(tokenizer=tokenizer, column=column, labels=reader)
    targets = TargetTexts(tokenizer, rows.choose_column(labels, "text"))
    return TextRows(tokenizer=tokenizer, column=column, labels=targets)


def _choose_labels(
    settings: DataSettings, checkpoint: Checkpoint, rows: Rows, column: str, useful: bool
) -> str | None:
    """Choose the column of labels, if there is one."""
    if settings.labels:
        if not useful:
            raise OptionError(f"{checkpoint.owner.__name__} has no use for labels ({settings.labels}); leave them out")
        rows.refuse_missing(settings.labels)
        return settings.labels
    labels = rows.find_label_column() if useful and settings.labels is None else None
    return None if labels == column else labels
