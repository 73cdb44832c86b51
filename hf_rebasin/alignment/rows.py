"""Rows of tokens: which row of another model belongs to each row of the first, and what becomes of all others.

Rows are matched by the strings of their tokens. A row that only one model has is not averaged with anything: the merge
has the first model's own row, and an other model's row goes. Rows beyond the tokens are padding and are matched by
their number.
"""

from __future__ import annotations

import copy
import filecmp
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import list_tokenizer_files, tokenizer_folder
from ..checkpoints.lazy import Computed, Lazy
from ..checkpoints.model_classes import build_without_weights, copy_module, to_disk_keys
from ..errors import CheckpointError, MismatchError, SpecError, listed
from ..symmetries.detection import detect_spec
from ..symmetries.patterns import Leaf
from ..symmetries.table import canonical_view, table_for
from ..tokenizers.vocabulary import read_tokens, same_vocabulary

logger = logging.getLogger(__name__)
Vocabulary = Literal["first", "common"]
Axes: TypeAlias = Mapping[str, int]  # {canonical key of a tensor with a row for every token: axis of these rows}
NO_ROW = -1  # in place of a row that the other model does not have
GROWTH = 64  # tokens that a class is given more to see which of its tensors grow; all usual paddings divide it


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
    order = list(range(max(a.values(), default=-1) + 1))
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
    if not unlike and not _sizes_may_differ(fixed, moving):
        return None
    known = find_token_axes(fixed, moving)
    axes = {**(find_token_axes(moving, fixed) or {}), **(known or {})}
    size_a, size_b = (_count_rows(checkpoint, axes) for checkpoint in (fixed, moving))
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


def _sizes_may_differ(fixed: Checkpoint, moving: Checkpoint) -> bool:
    """Whether configurations or shapes hint at other numbers of rows, without building a class."""
    sizes = [_vocabulary_sizes(checkpoint.raw_config) for checkpoint in (fixed, moving)]
    if sizes[0] != sizes[1]:  # a file may leave out the default of its class
        sizes = [_vocabulary_sizes(checkpoint.settings) for checkpoint in (fixed, moving)]
    return sizes[0] != sizes[1] or any(
        part.shape != moving.parts[key].shape for key, part in fixed.parts.items() if key in moving.parts
    )


def _vocabulary_sizes(settings: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Return the numbers of tokens that a configuration names, by their path."""
    sizes: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            sizes |= _vocabulary_sizes(value, f"{inside}{key}.")
        elif _is_vocabulary_size(key):
            sizes[inside + key] = value
    return sizes


def _is_vocabulary_size(key: object) -> bool:
    """Whether a setting is a number of tokens; BERT's `type_vocab_size` is a number of segments."""
    return str(key).endswith("vocab_size") and key != "type_vocab_size"


# --- tensors ---------------------------------------------------------------------------------------------------------


def find_token_axes(checkpoint: Checkpoint, other: Checkpoint) -> Axes | None:
    """Find the tensors that have a row for every token: by the table, the class, or else by both configurations.

    A class is built twice without weights, the second time for more tokens: the tensors that grow have such rows.
    Where no class is known, they are the tensors of another length in the other model, if both lengths are the numbers
    of tokens in the configurations. None if none of these tells.
    """
    if checkpoint.config is not None:
        with suppress(SpecError, CheckpointError, MismatchError):
            if table_for(checkpoint.config) is not None:
                tensors = detect_spec(checkpoint).tensors
                return {t.key: axis for t in tensors for axis, node in enumerate(t.axes) if _is_vocab(node)}
        with suppress(CheckpointError):
            if axes := _axes_by_class(checkpoint):
                return axes
    return _axes_by_sizes(checkpoint, other) or None


def _is_vocab(node: Any) -> bool:
    return isinstance(node, Leaf) and node.name == "vocab"


def _axes_by_class(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the tensors of a class that grow with its vocabulary."""
    small, large = (copy.deepcopy(checkpoint.config) for _ in range(2))
    text = large.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        return {}
    text.vocab_size += GROWTH
    shapes = []
    for config in (small, large):
        module = build_without_weights(config, len(checkpoint.parts))
        state = to_disk_keys(module, dict(module.state_dict()))
        shapes.append({checkpoint.canonical_key(key): tuple(tensor.shape) for key, tensor in state.items()})
    grown = {}
    for key, shape in shapes[0].items():
        larger = shapes[1].get(key, shape)
        differ = [axis for axis in range(len(shape)) if shape[axis] != larger[axis]]
        if len(differ) == 1:
            grown[key] = differ[0]
    return grown


def _axes_by_sizes(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, int]:
    """Return the tensors whose lengths differ by model as the vocabularies of the configurations do."""
    sizes = [_vocabulary_sizes(c.settings) for c in (checkpoint, other)]
    pairs = {(sizes[0][key], sizes[1][key]) for key in sizes[0].keys() & sizes[1].keys()}
    keys, keys_of_other = _keys_of(checkpoint, checkpoint), _keys_of(other, checkpoint)
    axes = {}
    for name in keys.keys() & keys_of_other.keys():
        shape, shape_of_other = checkpoint.parts[keys[name]].shape, other.parts[keys_of_other[name]].shape
        if len(shape) == len(shape_of_other):
            differ = [axis for axis in range(len(shape)) if shape[axis] != shape_of_other[axis]]
            if len(differ) == 1 and (shape[differ[0]], shape_of_other[differ[0]]) in pairs:
                axes[name] = differ[0]
    return axes


def _keys_of(checkpoint: Checkpoint, first: Checkpoint) -> dict[str, str]:
    """Return `{canonical key: disk key}` of a checkpoint, by the prefixes of the first model."""
    view = canonical_view(first)
    return checkpoint.canonical(first.base_prefix if view.prefix is None else view.prefix)


def _rows_in(checkpoint: Checkpoint, axes: Axes) -> dict[str, int]:
    """Return `{disk key: axis}` of the tensors of a checkpoint that have a row for every token."""
    keys = _keys_of(checkpoint, checkpoint)
    return {keys[name]: axis for name, axis in axes.items() if name in keys}


def _count_rows(checkpoint: Checkpoint, axes: Axes) -> int | None:
    """Return the number of rows of tokens; None if there are none, or if not all tensors have the same number."""
    counts = {checkpoint.parts[key].shape[axis] for key, axis in _rows_in(checkpoint, axes).items()}
    return counts.pop() if len(counts) == 1 else None


# --- what the first model has ----------------------------------------------------------------------------------------


def cut_to_common(first: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint:
    """Return the first model with only as many rows of tokens as all models have; rows that go must be padding.

    Raises:
        MismatchError: a token of the first model has one of these rows, or no tokenizer says whether one does.
    """
    differing = [other for other in others if other.raw_config and _sizes_may_differ(first, other)]
    if not first.raw_config or not differing:
        return first
    axes = find_token_axes(first, differing[0]) or {}
    size = _count_rows(first, axes)
    sizes = [count for other in differing if (count := _count_rows(other, axes)) is not None]
    if size is None or not sizes or min(sizes) >= size:
        return first
    common = min(sizes)
    if why := _reason_not_to_cut(first, size, common):
        raise MismatchError(f"{why}; keep them (--vocabulary first)")
    logger.info("%s: %d of its %d rows of tokens are cut off, which no token has", first.name, size - common, size)
    parts = {key: _take(first.parts[key], axis, range(common)) for key, axis in _rows_in(first, axes).items()}
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


def with_vocabulary_size(checkpoint: Checkpoint, before: int, after: int) -> Checkpoint:
    """Return a checkpoint whose configuration names another number of tokens, wherever it named the number before."""
    if before == after:
        return checkpoint
    other: dict[str, Any] = {}
    if checkpoint.template is not None:
        template = copy_module(checkpoint.template)
        template.resize_token_embeddings(after, mean_resizing=False)
        other["template"] = template
    if checkpoint.given_config is not None:
        config = copy.deepcopy(checkpoint.given_config)
        config.get_text_config().vocab_size = after
        other["given_config"] = config
    if checkpoint.written:
        other["written"] = _replace_size(checkpoint, before, after)
    return replace(checkpoint, **other)


def _replace_size(checkpoint: Checkpoint, before: int, after: int) -> dict[str, Any]:
    """Return the written configuration with another number of tokens, which it may have left out as a default."""

    def replaced(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: new_value(key, value) for key, value in settings.items()}

    def new_value(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return replaced(value)
        return after if _is_vocabulary_size(key) and value == before else value

    written, config = replaced(checkpoint.written), checkpoint.config
    if written != checkpoint.written or config is None:
        return written
    text = config.get_text_config()
    if text is config:
        return {**written, "vocab_size": after}
    path = next(name for name in config.sub_configs if getattr(config, name) is text)
    return {**written, path: {**written.get(path, {}), "vocab_size": after}}


# --- what the other model has ----------------------------------------------------------------------------------------


def give_rows(moving: Checkpoint, match: RowMatch, fixed: Checkpoint) -> Checkpoint:
    """Return the moving model with the rows and the tokenizer of the fixed one; rows that it lacks are zero."""
    axes = _rows_in(moving, match.axes)
    parts = {key: _take(moving.parts[key], axis, match.rows) for key, axis in axes.items()}
    absent = {key: (axis, match.absent) for key, axis in axes.items()} if match.absent else {}
    given = moving.with_parts(parts, folder=fixed.folder, absent_rows={**moving.absent_rows, **absent})
    return with_vocabulary_size(given, match.sizes[1], match.sizes[0])


def _take(part: Lazy, axis: int, rows: Sequence[int]) -> Lazy:
    """Return some rows of a tensor in another order; NO_ROW ones are zero."""
    shape = (*part.shape[:axis], len(rows), *part.shape[axis + 1 :])
    return Computed(shape, part.dtype, [part], partial(_take_rows, axis, torch.tensor(rows)))


def _take_rows(axis: int, rows: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    (tensor,) = inputs
    taken = tensor.index_select(axis, rows.clamp(min=0).to(tensor.device))
    return taken.index_fill_(axis, (rows < 0).nonzero()[:, 0].to(tensor.device), 0)


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


def overwrite_rows(part: Lazy, source: Lazy, axis: int, rows: Sequence[int], dtype: torch.dtype | None = None) -> Lazy:
    """Return a tensor with some rows of another, in a dtype that holds both unless one is given."""
    dtype = torch.promote_types(part.dtype, source.dtype) if dtype is None else dtype
    return Computed(part.shape, dtype, [part, source], partial(_overwrite, axis, torch.tensor(rows), dtype))


def _overwrite(axis: int, rows: Tensor, dtype: torch.dtype, inputs: Sequence[Tensor]) -> Tensor:
    tensor, source = inputs
    rows = rows.to(tensor.device)
    kept = source.to(tensor.device).index_select(axis, rows).to(dtype)
    return tensor.to(dtype, copy=True).index_copy_(axis, rows, kept)


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
        keys = listed(_rows_in(fixed, match.axes))
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
        (len(match.absent), f"are {fixed.name}'s own", match.only_fixed),
        (match.sizes[1] - merged, "are left out", match.only_moving),
    ):
        if number:
            padding = number - len(only) if not match.unread else 0
            tokens = [_describe_tokens(only)] * bool(only) + [f"{padding} of padding"] * bool(padding)
            text += f"; {number} {name}" + f" ({', '.join(tokens)})" * bool(tokens)
    return text
