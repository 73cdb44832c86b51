"""Texts of rows as inputs of a model: one per row, or packed into blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import islice
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import tokenizer_folder
from ..checkpoints.model_classes import build_without_weights
from ..errors import CheckpointError, MismatchError, OptionError
from ..tokenizers.vocabulary import open_tokenizer
from .dataset import DatasetRow

DEFAULT_MAX_LENGTH = 512  # tokens
MASKED_SHARE = 0.15  # of the tokens of a block, as in the training of BERT
IGNORE_INDEX = -100  # does not count in the losses of transformers
TEXTS_AT_ONCE = 32  # that are tokenised together


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of a model, and how much text the model takes.

    Args:
        pretrained: tokenizer of transformers.
        length: maximal number of tokens, special ones included.
        pad: id of the token that fills up rows, masked there; None if there is none.
    """

    pretrained: Any = field(repr=False)
    length: int
    pad: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts with special tokens, cut to the maximal length."""
        return self._tokenise(texts, truncation=True, max_length=self.length)

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode whole texts without special tokens."""
        return self._tokenise(texts, add_special_tokens=False)

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and after a text."""
        (whole,), (inside,) = self._tokenise(["a"]), self.encode_whole(["a"])
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(inside)] == inside)
        return whole[:start], whole[start + len(inside) :]

    def pad_rows(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, (rows, longest)."""
        longest = max(map(len, rows))
        pad = 0 if self.pad is None else self.pad  # without a pad token, all rows have one length
        ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def _tokenise(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        encoding = self.pretrained(list(texts), return_attention_mask=False, verbose=False, **options)
        return [list(ids) for ids in encoding["input_ids"]]


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Batches of one text per row, padded to the longest of the batch.

    Args:
        tokenizer: tokenizer of the model.
        column: column of the texts.
        labels: function that reads the labels of rows; None for batches without labels.
        shift: function that makes the decoder's input from the encoder's; used for batches without labels.
    """

    tokenizer: TextTokenizer
    column: str
    labels: Callable[[Sequence[DatasetRow]], Tensor] | None = None
    shift: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    unit = "rows"

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def units(self, rows: Iterable[DatasetRow]) -> Iterator[DatasetRow]:
        return iter(rows)

    def make_batch(self, rows: Sequence[DatasetRow], _number: int) -> dict[str, Tensor]:
        """Make `input_ids` and `attention_mask`, and `labels` or `decoder_input_ids`."""
        batch = self.tokenizer.pad_rows(_encode_rows(self.tokenizer, rows, self.column))
        if self.labels is not None:
            batch["labels"] = self.labels(rows)
        elif self.shift is not None:
            batch["decoder_input_ids"] = self.shift(batch["input_ids"])
        return batch


@dataclass(frozen=True)
class TargetTexts:
    """A reader of the texts that an encoder-decoder is to generate."""

    tokenizer: TextTokenizer
    column: str

    def __call__(self, rows: Sequence[DatasetRow]) -> Tensor:
        """Return the tokens of rows, (rows, longest); the loss ignores padding."""
        target = self.tokenizer.pad_rows(_encode_rows(self.tokenizer, rows, self.column))
        return target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORE_INDEX)


@dataclass(frozen=True, kw_only=True)
class PackedTexts:
    """Batches of equal blocks, cut from all texts one after the other.

    Each text is followed by the end-of-text token, if there is one. The tokens that are left at the end are dropped,
    unless they are the only block.

    Args:
        tokenizer: tokenizer of the model.
        column: column of the texts.
        labelled: whether blocks come with labels, and, if `masked`, with masked tokens.
        masked: whether the model fills in masked tokens, and does not predict the next one.
        seed: seed of the masks, which are the same in every pass.
    """

    tokenizer: TextTokenizer
    column: str
    labelled: bool = True
    masked: bool = False
    seed: int = 0

    @property
    def unit(self) -> str:
        return f"blocks of {self.tokenizer.length} tokens"

    def units(self, rows: Iterable[DatasetRow]) -> Iterator[list[int]]:
        """Iterate over blocks of tokens."""
        before, after = self.tokenizer.special_tokens() if self.masked else ([], [])
        room = self.tokenizer.length - len(before) - len(after)
        end = self.tokenizer.pretrained.eos_token_id
        texts = (text for row in rows if (text := _text_in(row, self.column)).strip())
        left: list[int] = []
        empty = True
        while chunk := list(islice(texts, TEXTS_AT_ONCE)):
            for ids in self.tokenizer.encode_whole(chunk):
                left += ids if end is None else [*ids, end]
                whole = len(left) // room * room
                for start in range(0, whole, room):
                    yield [*before, *left[start : start + room], *after]
                empty = empty and whole == 0
                left = left[whole:]
        if left and empty:
            yield [*before, *left, *after]

    def make_batch(self, blocks: Sequence[Sequence[int]], number: int) -> dict[str, Tensor]:
        """Make `input_ids` and `attention_mask`, and `labels` of the tokens to be predicted."""
        batch = self.tokenizer.pad_rows(blocks)
        if self.labelled and not self.masked:
            batch["labels"] = batch["input_ids"].clone()
        elif self.labelled:
            ids = batch["input_ids"]
            hidden = self._choose_masked(ids, number)
            batch["labels"] = ids.masked_fill(~hidden, IGNORE_INDEX)
            batch["input_ids"] = ids.masked_fill(hidden, self.tokenizer.pretrained.mask_token_id)
        return batch

    def _choose_masked(self, ids: Tensor, number: int) -> Tensor:
        """Choose the masked tokens of a batch by seed and number alone: 15 % of each block, and at least one."""
        generator = torch.Generator().manual_seed(Random(f"{self.seed} {number}").getrandbits(63))
        tokenizer = self.tokenizer.pretrained
        special = torch.tensor(sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id}))
        ordinary = ~torch.isin(ids, special)
        drawn = torch.rand(ids.shape, generator=generator).masked_fill(~ordinary, -1.0)
        count = (ordinary.sum(1, keepdim=True) * MASKED_SHARE).round().clamp(min=1)
        return ordinary & (drawn.argsort(1, descending=True).argsort(1) < count)


def _text_in(row: DatasetRow, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise OptionError(f"column {column!r} has {text!r} in a row, which is not text; leave such rows out")
    return text


def _encode_rows(tokenizer: TextTokenizer, rows: Sequence[DatasetRow], column: str) -> list[list[int]]:
    texts = [_text_in(row, column) for row in rows]
    encoded = tokenizer.encode(texts)
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise OptionError(f"column {column!r} has {text!r} in a row, which the tokenizer makes no tokens of")
    return encoded


def load_tokenizer(checkpoint: Checkpoint, max_length: int | None, needs: str = "") -> TextTokenizer:
    """Load the tokenizer in a model's folder.

    Args:
        checkpoint: checkpoint of the model.
        max_length: maximal tokens of a text; None for as many as the model and the tokenizer take, up to 512.
        needs: token that is needed: `"pad"` if rows differ in length, `"mask"` if tokens are masked.

    Raises:
        CheckpointError: no tokenizer, or one without a token that is needed.
        MismatchError: tokens or texts that the model has no embeddings for.
    """
    folder, config, name = tokenizer_folder(checkpoint.folder), checkpoint.config, checkpoint.name
    if folder is None:
        raise CheckpointError(f"{name} comes without a tokenizer; save the one it was trained with into its folder")
    try:
        tokenizer = open_tokenizer(folder)
    except CheckpointError as error:
        raise CheckpointError(f"the tokenizer of {name} cannot be loaded: {error}") from error
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    known = getattr(config, "vocab_size", None)
    if known is None:
        raise CheckpointError(f"{name} does not say how many tokens it knows (vocab_size in config.json)")
    if highest >= known:
        raise MismatchError(
            f"the tokenizer of {name} has tokens up to {highest} ({token!r}), and the model {known} "
            "(vocab_size); one of the two belongs to another model"
        )
    pads = (getattr(config, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((pad for pad in pads if isinstance(pad, int) and 0 <= pad < known), None)
    if needs == "pad" and pad is None:
        raise CheckpointError(
            f"the tokenizer of {name} has neither a pad token nor an end-of-text token to fill up rows with; name one "
            "in its tokenizer_config.json, or take one row at a time (batch_size: 1)"
        )
    if needs == "mask" and tokenizer.mask_token_id is None:
        raise CheckpointError(f"the tokenizer of {name} has no mask token; leave labels out (labels: false)")
    length = _choose_length(checkpoint, tokenizer, max_length)
    if length <= tokenizer.num_special_tokens_to_add():
        raise OptionError(f"max_length {length} leaves no room for text besides the special tokens of {name}")
    return TextTokenizer(pretrained=tokenizer, length=length, pad=pad)


def _choose_length(checkpoint: Checkpoint, tokenizer: Any, max_length: int | None) -> int:
    positions = getattr(checkpoint.config, "max_position_embeddings", None)
    if positions is not None:
        for key, part in build_without_weights(checkpoint.config, len(checkpoint.parts)).named_modules():
            if "position" in key and isinstance(part, nn.Embedding) and part.padding_idx is not None:
                positions = min(positions, part.num_embeddings - part.padding_idx - 1)  # as RoBERTa counts
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, tokenizer.model_max_length, positions or DEFAULT_MAX_LENGTH)
    if positions is not None and max_length > positions:
        raise MismatchError(f"max_length is {max_length}, and {checkpoint.name} has {positions} positions")
    return max_length


def find_decoder_shift(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor] | None:
    """Find the model's own function from a decoder's targets to its inputs; None if it has or needs none."""
    if "decoder_input_ids" not in signature(checkpoint.owner.forward).parameters:
        return None
    module = build_without_weights(checkpoint.config, len(checkpoint.parts))
    shift_right = getattr(module, "prepare_decoder_input_ids_from_labels", None) or getattr(
        module, "_shift_right", None
    )
    if shift_right is None:
        return None  # BART's bare model shifts the encoder's input by itself

    def shift(ids: Tensor) -> Tensor:
        shifted: Tensor = shift_right(ids)
        return shifted

    return shift
