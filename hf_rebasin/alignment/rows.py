"""Rows of tokens: which row of another model belongs to each row of the first, and what becomes of all others.

Rows are matched by the strings of their tokens. A row that only one model has is not averaged with anything: the merge
has the first model's own row, and an other model's row goes. Rows beyond the tokens are padding and are matched by
their number.
"""

from __future__ import annotations

import filecmp
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import list_tokenizer_files, tokenizer_folder
from ..checkpoints.lazy import Lazy
from ..errors import CheckpointError, MismatchError, listed
from ..tokenizers.vocabulary import read_tokens, same_vocabulary
from .token_axes import (
    NO_ROW,
    Axes,
    count_rows,
    find_rows,
    find_token_axes,
    overwrite_rows,
    sizes_may_differ,
    take_rows,
    with_vocabulary_size,
)

logger = logging.getLogger(__name__)
MOST_TOKENS = 100_000_000
Vocabulary = Literal["first", "common"]


@dataclass(frozen=True, kw_only=True)
class RowMatch:
    """Which row of another model belongs to each row of the first one's vocabulary.

    Args:
        rows: for every row of the first model, the row of the other, or NO_ROW.
        sizes: the number of rows of both.
        axes: the tensors that have these rows.
        only_fixed: the tokens, by row, that only the first model has.
        only_moving: the tokens, by row, that only the other model has.
        shared: the rows of the first model, and of the other, of the tokens that both have.
        unread: why rows are matched by their number; empty if tokens were compared.
    """

    rows: Sequence[int]
    sizes: tuple[int, int]
    axes: Axes
    only_fixed: Mapping[str, int]
    only_moving: Mapping[str, int]
    shared: tuple[Collection[int], Collection[int]]
    unread: str = ""

    @property
    def absent(self) -> tuple[int, ...]:
        """The rows of the first model that the other does not have."""
        return tuple(row for row, other in enumerate(self.rows) if other == NO_ROW)

    @property
    def is_identity(self) -> bool:
        """Whether all rows belong together as they are."""
        return self.sizes[0] == self.sizes[1] and list(self.rows) == list(range(self.sizes[0]))

    @property
    def agrees(self) -> bool:
        """Whether both models have the same rows, perhaps in another order, so that nobody needs to choose."""
        return self.sizes[0] == self.sizes[1] and not (self.absent or self.only_fixed or self.only_moving)

    @property
    def matches(self) -> bool:
        """Whether any row that means something belongs to one of the other model."""
        return bool(self.shared[0]) if not self.unread else len(self.absent) < len(self.rows)

    @property
    def is_extension(self) -> bool:
        """Whether tokens that only one model has were added at the end, behind all that both have."""
        pairs = zip((self.only_fixed, self.only_moving), self.shared, strict=True)
        return all(min(only.values(), default=0) > max(shared, default=-1) for only, shared in pairs if only)


# --- tokens ----------------------------------------------------------------------------------------------------------


def same_tokenizer(fixed: Checkpoint, moving: Checkpoint) -> bool:
    """Whether both have the same tokenizer files, byte by byte, or are folders without a tokenizer."""
    a, b = tokenizer_folder(fixed.folder), tokenizer_folder(moving.folder)
    if a is None or b is None:
        return a is b and fixed.given_config is None and moving.given_config is None
    names = list_tokenizer_files(a)
    return names == list_tokenizer_files(b) and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def find_token_order(fixed: Checkpoint, moving: Checkpoint) -> list[int] | None:
    """Return, for each row of the fixed model's tokens, the row of the same token in the moving model.

    A row is NO_ROW (-1) where the moving model has no such token. None if every token has the same row in both, or if
    that is not known, because a tokenizer is missing.

    Raises:
        MismatchError: a tokenizer cannot be loaded.
    """
    tokens = _read_both(fixed, moving)
    if isinstance(tokens, str) or tokens[0] == tokens[1]:
        return None
    a, b = tokens
    if (last := max(a.values(), default=-1)) >= MOST_TOKENS:  # a list of so many rows would fill the memory
        raise MismatchError(
            f"the tokenizer of {fixed.name} has a token number {last}, which is more than any model has"
        )
    order = list(range(last + 1))
    for token, row in a.items():
        order[row] = b.get(token, NO_ROW)
    return order


def match_vocabularies(fixed: Checkpoint, moving: Checkpoint) -> list[int] | None:
    """Return, for each token of the fixed model, its row in the moving one; None if the order is the same or unknown.

    Raises:
        MismatchError: the vocabularies differ, or a tokenizer cannot be loaded.
    """
    tokens = _read_both(fixed, moving)
    if not isinstance(tokens, str) and tokens[0].keys() != tokens[1].keys():
        only = [{token: a[token] for token in a.keys() - b.keys()} for a, b in (tokens, tokens[::-1])]
        raise MismatchError(
            f"{moving.name} and {fixed.name} have different vocabularies; {_describe_only(fixed, moving, *only)}"
        )
    return find_token_order(fixed, moving)


# `{token: row}` of the fixed model and of the moving one
Tokens: TypeAlias = tuple[Mapping[str, int], Mapping[str, int]]
SAME_TOKENS = "their tokenizers are the same"


def _read_both(fixed: Checkpoint, moving: Checkpoint) -> Tokens | str:
    """Return the tokens of both models by row, or why they were not compared."""
    a, b = tokenizer_folder(fixed.folder), tokenizer_folder(moving.folder)
    # a folder has no tokenizer if none is in it; a module may have been loaded from a folder with one
    names = [getattr(c.given_config, "name_or_path", None) for c in (fixed, moving)]
    if a is None and b is None:
        if any(names):
            logger.warning(
                "neither %s nor %s comes with a tokenizer, so the vocabularies were not compared",
                fixed.name,
                moving.name,
            )
        return "neither comes with a tokenizer"
    if a is None or b is None:
        without = fixed if a is None else moving
        logger.warning("%s comes without a tokenizer, so the vocabularies were not compared", without.name)
        return f"{without.name} comes without a tokenizer"
    if same_tokenizer(fixed, moving) or same_vocabulary(a, b):
        return SAME_TOKENS
    return _read_tokens_of(fixed), _read_tokens_of(moving)


def _read_tokens_of(checkpoint: Checkpoint) -> Mapping[str, int]:
    folder = tokenizer_folder(checkpoint.folder)
    assert folder is not None
    try:
        return read_tokens(folder)
    except CheckpointError as error:
        raise MismatchError(
            f"{error}, so the vocabularies cannot be compared; if they are the same, say so (--assume vocabulary)"
        ) from error


# --- matching --------------------------------------------------------------------------------------------------------


def match_rows(
    fixed: Checkpoint, moving: Checkpoint, vocabulary: Vocabulary | None = None, *, assumed: bool = False
) -> RowMatch | None:
    """Match the rows of the tokens of two models; None if they all belong together as they are.

    Args:
        fixed: model whose rows the result will have; cut already if those of both are to be kept (`cut_to_common`).
        moving: the other model.
        vocabulary: what to do with rows that only one model has: "first" and "common" keep the fixed model's; None
            refuses them.
        assumed: whether rows are taken to belong together by their number, without comparing tokens.

    Raises:
        MismatchError: rows differ, and nobody said what to do, or no row belongs to another; or it is not known which
            tensors have them.
    """
    match = find_row_match(fixed, moving, assumed=assumed)
    if match is None or match.agrees:
        return match
    if vocabulary is None or not match.matches or (vocabulary == "common" and match.only_fixed):
        raise MismatchError(_describe_mismatch(fixed, moving, match, vocabulary))
    logger.info("%s", _describe_match(fixed, moving, match))
    return match


def find_row_match(fixed: Checkpoint, moving: Checkpoint, *, assumed: bool = False) -> RowMatch | None:
    """Find which rows of two models belong together, whatever is to become of the others; see `match_rows`."""
    tokens = "their tokens are taken as the same" if assumed else _read_both(fixed, moving)
    unlike = not isinstance(tokens, str) and tokens[0] != tokens[1]
    if not unlike and not sizes_may_differ(fixed, moving):
        return None
    known = find_token_axes(fixed, moving)
    axes = {**(find_token_axes(moving, fixed) or {}), **(known or {})}
    size_a, size_b = (count_rows(checkpoint, axes) for checkpoint in (fixed, moving))
    if size_a is None or size_b is None:
        if not unlike or known == {}:  # a model without tokens
            return None
        raise MismatchError(
            f"{moving.name} and {fixed.name} have different tokens or another order of them, and neither a table nor "
            "a class says which tensors have a row for every token; if the rows belong together by their number, say "
            "so (--assume vocabulary)"
        )
    if tokens == SAME_TOKENS and size_a != size_b:  # tells tokens from padding
        with suppress(MismatchError):
            tokens = (_read_tokens_of(fixed), _read_tokens_of(moving))
    match = _correspond(tokens, (size_a, size_b), axes)
    return None if match.agrees and match.is_identity else match


def _correspond(tokens: Tokens | str, sizes: tuple[int, int], axes: Axes) -> RowMatch:
    """Match rows by the strings of tokens, and rows that no token has by their number."""
    size_a, size_b = sizes
    # a token may be numbered beyond the rows, where somebody added it without giving the model a row for it
    a, b = (
        {token: row for token, row in named.items() if row < size}
        for named, size in zip(({}, {}) if isinstance(tokens, str) else tokens, sizes, strict=True)
    )
    taken = set(b.values())
    rows = [row if row < size_b and row not in taken else NO_ROW for row in range(size_a)]
    for token, row in a.items():
        rows[row] = b.get(token, NO_ROW)
    shared = a.keys() & b.keys()
    return RowMatch(
        rows=rows,
        sizes=sizes,
        axes=axes,
        only_fixed={token: row for token, row in a.items() if token not in shared},
        only_moving={token: row for token, row in b.items() if token not in shared},
        shared=([a[token] for token in shared], [b[token] for token in shared]),
        unread=tokens if isinstance(tokens, str) else "",
    )


# --- what the first model has ----------------------------------------------------------------------------------------


def cut_to_common(first: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint:
    """Return the first model with only as many rows of tokens as all models have; rows that go must be padding.

    Raises:
        MismatchError: a token of the first model has one of these rows, or no tokenizer says whether one does.
    """
    differing = [other for other in others if other.raw_config and sizes_may_differ(first, other)]
    if not first.raw_config or not differing:
        return first
    axes = find_token_axes(first, differing[0]) or {}
    size = count_rows(first, axes)
    sizes = [count for other in differing if (count := count_rows(other, axes)) is not None]
    if size is None or not sizes or min(sizes) >= size:
        return first
    common = min(sizes)
    if why := _reason_not_to_cut(first, size, common):
        raise MismatchError(f"{why}; keep them (--vocabulary first)")
    logger.info("%s: %d of its %d rows of tokens are cut off, which no token has", first.name, size - common, size)
    parts = {key: take_rows(first.parts[key], axis, range(common)) for key, axis in find_rows(first, axes).items()}
    return with_vocabulary_size(first.with_parts(parts), size, common)


def _reason_not_to_cut(first: Checkpoint, size: int, common: int) -> str:
    """Say why a model needs its rows beyond some number; empty if it does not."""
    needs = f"{first.name} has {size} rows of tokens and cannot be cut to the {common} that all models have"
    if tokenizer_folder(first.folder) is None:
        return f"{needs}, as it comes without a tokenizer that tells padding from tokens"
    try:
        tokens = _read_tokens_of(first)
    except MismatchError as error:
        return f"{needs}: {error.__cause__}"
    named = {token: row for token, row in tokens.items() if common <= row < size}
    return f"{needs}, as its tokenizer has tokens there: {_describe_tokens(named)}" if named else ""


# --- what the other model has ----------------------------------------------------------------------------------------


def give_rows(moving: Checkpoint, match: RowMatch, fixed: Checkpoint) -> Checkpoint:
    """Return the moving model with the rows and the tokenizer of the fixed one; rows that it lacks are zero."""
    axes = find_rows(moving, match.axes)
    parts = {key: take_rows(moving.parts[key], axis, match.rows) for key, axis in axes.items()}
    absent = {key: (axis, match.absent) for key, axis in axes.items()} if match.absent else {}
    given = moving.with_parts(parts, folder=fixed.folder, absent_rows={**moving.absent_rows, **absent})
    return with_vocabulary_size(given, match.sizes[1], match.sizes[0])


def lend_rows(first: Mapping[str, Lazy], matched: Mapping[str, Lazy], other: Checkpoint) -> dict[str, Lazy]:
    """Return the matched tensors of another model with the first model's rows where it has none of its own.

    Args:
        first: `{disk key of the first model: its tensor}`.
        matched: `{disk key of the first model: tensor of the other}`; see `match_keys`.
        other: the other model.
    """
    absent = absent_in(matched, other)
    return {
        key: overwrite_rows(part, first[key], *absent[key]) if key in absent else part for key, part in matched.items()
    }


def absent_in(matched: Mapping[str, Lazy], other: Checkpoint) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the rows that another model does not have, by the disk keys of the first."""
    absent = {id(other.parts[key]): rows for key, rows in other.absent_rows.items()}
    return {key: absent[id(part)] for key, part in matched.items() if id(part) in absent}


# --- sentences -------------------------------------------------------------------------------------------------------


def _describe_only(
    fixed: Checkpoint, moving: Checkpoint, only_fixed: Mapping[str, int], only_moving: Mapping[str, int]
) -> str:
    """Say which tokens only one of two models has."""
    return "; ".join(
        f"only {checkpoint.name} has {_describe_tokens(only)}"
        for checkpoint, only in ((moving, only_moving), (fixed, only_fixed))
        if only
    )


def _describe_tokens(tokens: Mapping[str, int]) -> str:
    """List the first of some tokens, and count all."""
    names = listed(map(repr, sorted(tokens, key=tokens.__getitem__)))
    return names if len(tokens) <= 5 else f"{len(tokens)} tokens: {names}"


def _describe_mismatch(fixed: Checkpoint, moving: Checkpoint, match: RowMatch, vocabulary: Vocabulary | None) -> str:
    """Say which rows only one model has, and what can be done about that."""
    size_a, size_b = match.sizes
    text = f"{moving.name} and {fixed.name} have different vocabularies; "
    if size_a != size_b:
        keys = listed(find_rows(fixed, match.axes))
        text = f"{moving.name} has {size_b} rows of tokens, and {fixed.name} has {size_a} ({keys}); "
    same = "their tokens are the same" + (", but not the gaps between their numbers" if size_a == size_b else "")
    text += match.unread or _describe_only(fixed, moving, match.only_fixed, match.only_moving) or same
    if not match.matches:
        by_number = ". If all rows belong together by their number, say so (--assume vocabulary)"
        return f"{text}. They have no token in common, so they cannot be merged{by_number * (size_a == size_b)}"
    if not match.is_extension:
        text += (
            f". These are two tokenizers, not one with tokens added at its end ({len(match.shared[0])} tokens are in "
            "both), and vocabularies are not united here"
        )
    if vocabulary == "common":
        return f"{text}. The result would lack tokens of {fixed.name}; keep all its rows (--vocabulary first)"
    own = f", {len(match.absent)} of them not averaged" if match.absent else ""
    text += f". Say which rows the result has: --vocabulary first for the {size_a} of {fixed.name}{own}"
    if size_b < size_a and not match.only_fixed and not _reason_not_to_cut(fixed, size_a, size_b):
        text += f", --vocabulary common for the {size_b} that both have"
    if size_a == size_b:
        text += ". If all rows belong together by their number, say so (--assume vocabulary)"
    return text


def _describe_match(fixed: Checkpoint, moving: Checkpoint, match: RowMatch) -> str:
    """Say in a line which rows are averaged, kept and left out."""
    merged = len(match.rows) - len(match.absent)
    text = f"{moving.name}: {merged} of its {match.sizes[1]} rows of tokens are matched"
    text += f" by their number ({match.unread})" if match.unread else " by string"
    for number, name, only in (
        (len(match.absent), f"{fixed.name}'s own", match.only_fixed),
        (match.sizes[1] - merged, "left out", match.only_moving),
    ):
        if number:
            padding = number - len(only) if not match.unread else 0
            tokens = [_describe_tokens(only)] * bool(only) + [f"{padding} of padding"] * bool(padding)
            text += f"; {number} {name}" + f" ({', '.join(tokens)})" * bool(tokens)
    return text
