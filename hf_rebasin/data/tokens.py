"""Texts as a model takes them: one a row, or packed into blocks."""

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
from ..checkpoints.model_classes import without_weights
from ..errors import CheckpointError, MismatchError, OptionError
from .dataset import Row

LONGEST = 512  # tokens, unless more are asked for
MASKED = 0.15  # of the tokens of a block, as BERT was trained
IGNORED = -100  # by the losses of transformers
AT_ONCE = 32  # texts that are tokenised together


@dataclass(frozen=True)
class Tokens:
    """A model's own tokenizer, and how much of a text the model takes.

    Args:
        tokenizer: of transformers.
        length: tokens at most, special ones among them.
        pad: the token that fills up rows, left out by their masks; None where there is none.
    """

    tokenizer: Any = field(repr=False)
    length: int
    pad: int | None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, with special tokens, cut to length."""
        return self._tokenised(texts, truncation=True, max_length=self.length)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, without special tokens, whole."""
        return self._tokenised(texts, add_special_tokens=False)

    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        (whole,), (inside,) = self._tokenised(["a"]), self.plain(["a"])
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(inside)] == inside)
        return whole[:start], whole[start + len(inside) :]

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (rows, longest)."""
        longest = max(map(len, rows))
        pad = 0 if self.pad is None else self.pad  # where there is none, rows are never of several lengths
        ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def _tokenised(self, texts: Sequence[str], **how: Any) -> list[list[int]]:
        said = self.tokenizer(list(texts), return_attention_mask=False, verbose=False, **how)
        return [list(ids) for ids in said["input_ids"]]


@dataclass(frozen=True)
class Single:
    """One text a row, padded to the longest of its batch.

    Args:
        tokens: how texts are tokenised.
        column: of the rows.
        labels: of rows.
        shift: what an encoder-decoder's decoder reads where there are no labels, of what its encoder reads.
    """

    tokens: Tokens
    column: str
    labels: Callable[[Sequence[Row]], Tensor] | None = None
    shift: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    unit = "rows"

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def units(self, rows: Iterable[Row]) -> Iterator[Row]:
        return iter(rows)

    def batch(self, rows: Sequence[Row], _number: int) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, and `labels` or `decoder_input_ids`."""
        batch = self.tokens.padded(_some_tokens(self.tokens, rows, self.column))
        if self.labels is not None:
            batch["labels"] = self.labels(rows)
        elif self.shift is not None:
            batch["decoder_input_ids"] = self.shift(batch["input_ids"])
        return batch


@dataclass(frozen=True)
class Targets:
    """Texts that an encoder-decoder is to give."""

    tokens: Tokens
    column: str

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """(rows, longest) tokens; the loss looks at no padding."""
        target = self.tokens.padded(_some_tokens(self.tokens, rows, self.column))
        return target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)


@dataclass(frozen=True)
class Blocks:
    """Texts one after the other, with the end-of-text token after each where there is one, cut into equal blocks.

    What is left at the end is no block, unless there is no other.

    Args:
        tokens: how texts are tokenised.
        column: of the rows.
        labelled: whether blocks come with labels, and with masks where `masked`.
        masked: whether the model fills in masked tokens, not the next one.
        seed: of the masks, which are the same in every pass.
    """

    tokens: Tokens
    column: str
    labelled: bool = True
    masked: bool = False
    seed: int = 0

    @property
    def unit(self) -> str:
        return f"blocks of {self.tokens.length} tokens"

    def units(self, rows: Iterable[Row]) -> Iterator[list[int]]:
        """Blocks of tokens."""
        before, after = self.tokens.around() if self.masked else ([], [])
        room = self.tokens.length - len(before) - len(after)
        end = self.tokens.tokenizer.eos_token_id
        texts = (text for row in rows if (text := _text(row, self.column)).strip())
        held: list[int] = []
        came = False
        while together := list(islice(texts, AT_ONCE)):
            for ids in self.tokens.plain(together):
                held += ids if end is None else [*ids, end]
                whole = len(held) // room * room
                for start in range(0, whole, room):
                    yield [*before, *held[start : start + room], *after]
                came = came or whole > 0
                held = held[whole:]
        if held and not came:
            yield [*before, *held, *after]

    def batch(self, blocks: Sequence[Sequence[int]], number: int) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, and `labels` of the tokens that are to be predicted."""
        batch = self.tokens.padded(blocks)
        if self.labelled and not self.masked:
            batch["labels"] = batch["input_ids"].clone()
        elif self.labelled:
            ids = batch["input_ids"]
            hidden = self._hidden(ids, number)
            batch["labels"] = ids.masked_fill(~hidden, IGNORED)
            batch["input_ids"] = ids.masked_fill(hidden, self.tokens.tokenizer.mask_token_id)
        return batch

    def _hidden(self, ids: Tensor, number: int) -> Tensor:
        """Which tokens of a batch are masked: 15 % of each block, at least one, drawn by seed and number alone."""
        generator = torch.Generator().manual_seed(Random(f"{self.seed} {number}").getrandbits(63))
        tokenizer = self.tokens.tokenizer
        special = torch.tensor(sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id}))
        ordinary = ~torch.isin(ids, special)
        drawn = torch.rand(ids.shape, generator=generator).masked_fill(~ordinary, -1.0)
        many = (ordinary.sum(1, keepdim=True) * MASKED).round().clamp(min=1)
        return ordinary & (drawn.argsort(1, descending=True).argsort(1) < many)


def _text(row: Row, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise OptionError(f"column {column!r} has {text!r} in a row, which is no text; leave such rows out")
    return text


def _some_tokens(tokens: Tokens, rows: Sequence[Row], column: str) -> list[list[int]]:
    texts = [_text(row, column) for row in rows]
    found = tokens.ids(texts)
    for text, ids in zip(texts, found, strict=True):
        if not ids:
            raise OptionError(f"column {column!r} has {text!r} in a row, of which the tokenizer makes no token")
    return found


def tokens_of(checkpoint: Checkpoint, max_length: int | None, needs: str = "") -> Tokens:
    """The tokenizer in a model's folder.

    Args:
        checkpoint: whose model is to take what it makes.
        max_length: of a text; None for as much as the model and the tokenizer take, up to 512.
        needs: `"pad"` where rows are of several lengths, `"mask"` where tokens are masked.

    Raises:
        CheckpointError: no tokenizer, or one without a token that is needed.
        MismatchError: tokens or texts that the model has no embeddings for.
    """
    from transformers import AutoTokenizer

    folder, config, name = tokenizer_folder(checkpoint.folder), checkpoint.config, checkpoint.name
    if folder is None:
        raise CheckpointError(f"{name} comes without a tokenizer; save the one it was trained with into its folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever the code reading it stumbles on
        raise CheckpointError(f"the tokenizer of {name} cannot be loaded: {error!r}") from error
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    known = getattr(config, "vocab_size", None)
    if known is None:
        raise CheckpointError(f"{name} does not say how many tokens it knows (vocab_size in config.json)")
    if highest >= known:
        raise MismatchError(
            f"the tokenizer of {name} has tokens up to {highest} ({token!r}), and the model {known} "
            "(vocab_size); one of the two is of another model"
        )
    pads = (getattr(config, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((one for one in pads if isinstance(one, int) and 0 <= one < known), None)
    if needs == "pad" and pad is None:
        raise CheckpointError(
            f"the tokenizer of {name} has neither a pad token nor an end-of-text token to fill up rows with; name one "
            "in its tokenizer_config.json, or take one row at a time (batch_size: 1)"
        )
    if needs == "mask" and tokenizer.mask_token_id is None:
        raise CheckpointError(f"the tokenizer of {name} has no mask token; go without labels (labels: false)")
    length = _length(checkpoint, tokenizer, max_length)
    if length <= tokenizer.num_special_tokens_to_add():
        raise OptionError(f"max_length {length} leaves no room for text beside the special tokens of {name}")
    return Tokens(tokenizer, length, pad)


def _length(checkpoint: Checkpoint, tokenizer: Any, max_length: int | None) -> int:
    positions = getattr(checkpoint.config, "max_position_embeddings", None)
    if positions is not None:
        for key, part in without_weights(checkpoint.config, len(checkpoint.parts)).named_modules():
            if "position" in key and isinstance(part, nn.Embedding) and part.padding_idx is not None:
                positions = min(positions, part.num_embeddings - part.padding_idx - 1)  # as RoBERTa counts
    if max_length is None:
        return min(LONGEST, tokenizer.model_max_length, positions or LONGEST)
    if positions is not None and max_length > positions:
        raise MismatchError(f"max_length is {max_length}, and {checkpoint.name} has {positions} positions")
    return max_length


def shift_of(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor] | None:
    """What a decoder reads, of what it is to say: the model's own shift; None where it has or needs none."""
    if "decoder_input_ids" not in signature(checkpoint.owner.forward).parameters:
        return None
    module = without_weights(checkpoint.config, len(checkpoint.parts))
    own = getattr(module, "prepare_decoder_input_ids_from_labels", None) or getattr(module, "_shift_right", None)
    if own is None:
        return None  # BART's bare model shifts what its encoder reads

    def shift(ids: Tensor) -> Tensor:
        shifted: Tensor = own(ids)
        return shifted

    return shift
