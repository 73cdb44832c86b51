"""Compatibility of two models: configurations, labels and vocabularies, compared before any weight is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TypeAlias, get_args

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import read_modules
from ..checkpoints.json_files import read_json
from ..errors import CheckpointError, MismatchError, OptionError, SpecError, listed
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec
from ..symmetries.table import canonical_view, table_for
from ..text import without_advice
from .action import act
from .correspondence import match_keys, untie_like
from .evidence import flatten
from .groups import Element
from .groups.permutation import Element as Permutation
from .rows import Vocabulary, cut_to_common, find_row_match, find_token_order, give_rows, match_rows
from .settings import refuse_other_settings

logger = logging.getLogger(__name__)

ASPECTS = ("config", "labels", "vocabulary")
Assumption: TypeAlias = str  # one of these, or "config:KEY" for one setting


def make_compatible(
    fixed: Checkpoint,
    moving: Checkpoint,
    assume: Iterable[Assumption] = (),
    *,
    vocabulary: Vocabulary | None = None,
    backbone_only: bool = False,
) -> Checkpoint:
    """Bring the vocabulary and label rows of the moving model into the fixed model's order.

    Args:
        fixed: model whose configuration and tokenizer the result will have.
        moving: model whose rows are reordered.
        assume: parts assumed to match without a comparison: "config", or "config:KEY" for one setting, "labels",
            "vocabulary".
        vocabulary: what becomes of token rows that only one model has; "first" and "common" give the moving model the
            rows of the fixed one (see `Checkpoint.absent_rows`), None refuses them. For "common" the fixed model has
            to be cut before (`match_models`).
        backbone_only: whether only the base models will be merged, so that the heads may differ.

    Raises:
        MismatchError: the models are not compatible; the message names the differences.
    """
    assume = set(assume)
    if not fixed.raw_config or not moving.raw_config:
        return moving  # plain modules and state dicts have no configuration
    refuse_other_architecture(fixed, moving, assume | ({"config"} if backbone_only else set()))
    rows = match_rows(fixed, moving, vocabulary, assumed="vocabulary" in assume)
    matched = moving if rows is None else give_rows(moving, rows, fixed)
    if "config" not in assume and flatten(fixed.raw_config) != flatten(matched.raw_config):
        keys = [part.partition(":")[2] for part in assume if part.startswith("config:")]
        refuse_other_settings(fixed, matched, keys, partial(same_token, fixed, moving))
    if "config" not in assume:
        _note_other_modules(fixed, moving)
    # Equal labels are compatible; the class and its table are loaded only where they differ.
    if backbone_only or "labels" in assume or _same_labels(fixed, moving):
        return matched
    spec = _spec_or_none(fixed)
    order = match_labels(fixed, moving) if spec is None or "label" in spec.symmetries else None
    if order is None:
        return matched
    if spec is None:
        raise MismatchError(
            f"{moving.name} has the labels of {fixed.name} in another order, and no table says which rows to reorder"
        )
    return _reorder_labels(matched, order, fixed)


def _note_other_modules(fixed: Checkpoint, moving: Checkpoint) -> None:
    """Note what follows the models, such as a pooling or the activation of a Dense, where it is set otherwise in one.

    It is not refused: what versions of sentence-transformers leave out of these files has defaults of its own.
    """
    if fixed.folder is None or moving.folder is None:
        return
    differ = []
    for name in read_modules(fixed.folder):
        try:
            a, b = (read_json(folder / name / "config.json") for folder in (fixed.folder, moving.folder))
        except CheckpointError:  # not a JSON object, which is for its own package to say
            continue
        differ += [f"{name}/{key}" for key in sorted(a.keys() | b.keys()) if a and b and a.get(key) != b.get(key)]
    if differ:
        logger.warning(
            "modules that follow %s are set otherwise in %s, and the merge has them as the first: %s",
            *(fixed.name, moving.name, listed(differ)),
        )


def match_models(
    first: Checkpoint,
    others: Sequence[Checkpoint],
    assume: Iterable[Assumption] = (),
    *,
    vocabulary: Vocabulary | None = None,
    backbone_only: bool = False,
) -> tuple[Checkpoint, list[Checkpoint]]:
    """Return the models to be merged with rows of labels and tokens in the first model's order.

    The first model changes only with `vocabulary="common"`, which cuts its padding to the rows that all models have.
    See `make_compatible` for the arguments.

    Raises:
        OptionError: an unknown word in `assume` or for `vocabulary`.
        MismatchError: the models are not compatible.
    """
    assume, matched = set(assume), []
    _refuse_unknown(assume, vocabulary)
    if vocabulary == "common":
        with _advice_where_it_helps(first, others):
            first = cut_to_common(first, others)
    match = partial(make_compatible, first, assume=assume, vocabulary=vocabulary, backbone_only=backbone_only)
    for other in others:
        with _advice_where_it_helps(first, [other]):
            matched.append(match(other))
    return first, matched


def is_aspect(word: str) -> bool:
    """Whether a word stands for something that can be assumed equal."""
    return word in ASPECTS or word.startswith("config:")


def _refuse_unknown(assume: Set[Assumption], vocabulary: object) -> None:
    """Raise OptionError for words that stand for nothing, which would otherwise go unnoticed."""
    unknown = sorted(word for word in assume if not is_aspect(word))
    if unknown:
        raise OptionError(
            f"nothing called {listed(map(repr, unknown))} can be assumed; there are {listed(map(repr, ASPECTS))}, and "
            "'config:KEY' for one setting"
        )
    if vocabulary is not None and vocabulary not in get_args(Vocabulary):
        raise OptionError(f"vocabulary is {vocabulary!r}; it may be {' or '.join(map(repr, get_args(Vocabulary)))}")


@contextmanager
def _advice_where_it_helps(first: Checkpoint, others: Sequence[Checkpoint]) -> Iterator[None]:
    """Replace the advice of a refusal inside the block where tensors do not fit each other whatever is assumed."""
    try:
        yield
    except MismatchError as error:
        for other in others:
            if misfit := _describe_misfit(first, other):
                raise MismatchError(f"{without_advice(str(error))}. {misfit}") from error
        raise


def _describe_misfit(first: Checkpoint, other: Checkpoint) -> str:
    """Say why the tensors of two models cannot be merged, whichever rows and heads are kept; empty if they can."""
    try:
        rows = find_row_match(first, other, assumed=True)
        matched = other if rows is None else give_rows(other, rows, first)
        first, misfit = untie_like(first, [matched]), ""
        for backbone_only in (True, False):
            try:
                match_keys(first, matched, backbone_only=backbone_only)
            except MismatchError as error:
                misfit = str(error)
            else:
                return ""
    except CheckpointError:  # needs values or a class that are not there
        return ""
    return misfit


def _reorder_labels(moving: Checkpoint, order: Sequence[int], fixed: Checkpoint) -> Checkpoint:
    """Reorder the label rows of the moving model, which takes over the labels with them."""
    spec = detect_spec(moving)
    size = spec.symmetries["label"].size
    if sorted(order) != list(range(size)):
        raise MismatchError(
            f"{fixed.name} numbers {len(order)} labels, in which {moving.name} has other gaps or more rows ({size})"
        )
    view = canonical_view(moving, spec.table)
    elements: dict[str, Element] = {"label": Permutation(torch.tensor(order))}
    return replace(view.with_state(act(spec, elements, view.state)), given_config=fixed.config)


def same_token(fixed: Checkpoint, moving: Checkpoint, a: int, b: int) -> bool:
    """Whether two ids stand for the same token, in vocabularies of another order."""
    order = find_token_order(fixed, moving)
    return order is not None and 0 <= a < len(order) and order[a] == b


def _spec_or_none(checkpoint: Checkpoint) -> Spec | None:
    """Return the spec of a model that a table describes, else None: merging without alignment needs no spec."""
    try:
        return detect_spec(checkpoint) if table_for(checkpoint.config) is not None else None
    except SpecError:
        return None


def refuse_other_architecture(fixed: Checkpoint, moving: Checkpoint, assume: Set[str] = frozenset()) -> None:
    """Raise MismatchError for models of different types, or of different classes unless "config" is assumed."""
    for setting in ("model_type", "architectures"):
        a, b = fixed.raw_config.get(setting), moving.raw_config.get(setting)
        if a and b and a != b and (setting == "model_type" or "config" not in assume):
            hint = "" if setting == "model_type" else f". {_advise_on_classes(fixed, moving)}"
            raise MismatchError(
                f"{moving.name} has another architecture than {fixed.name}: {setting} is {b}, not {a}{hint}"
            )


def _advise_on_classes(fixed: Checkpoint, moving: Checkpoint) -> str:
    """Say how models of one type and two classes can be merged: as they are, or without their heads."""
    try:
        match_keys(fixed, moving)
    except MismatchError:
        with suppress(MismatchError):
            match_keys(fixed, moving, backbone_only=True)
            return f"A merge can keep the head of {fixed.name} and leave out the other (--backbone-only)"
    return "If their weights are compatible nevertheless, say so (--assume config)"


def _same_labels(fixed: Checkpoint, moving: Checkpoint) -> bool:
    return all(
        fixed.raw_config.get(key) == moving.raw_config.get(key) for key in ("id2label", "num_labels", "_num_labels")
    )


def match_labels(fixed: Checkpoint, moving: Checkpoint) -> list[int] | None:
    """Return, for each label of the fixed model, its row in the moving one; None if the order is the same.

    Raises:
        MismatchError: the labels differ, or one model does not name its labels.
    """
    a, b = (
        {str(label): int(row) for row, label in (c.settings.get("id2label") or {}).items()} for c in (fixed, moving)
    )
    if len(a) != len(b):
        shapes = [
            f"{key} {moving.parts[key].shape} instead of {part.shape}"
            for key, part in fixed.parts.items()
            if key in moving.parts and moving.parts[key].shape != part.shape
        ]
        raise MismatchError(
            f"{moving.name} has {len(b)} labels and {fixed.name} has {len(a)}, so their heads cannot be averaged "
            f"({listed(shapes) or 'though their shapes are the same'}); the head of {fixed.name} can be kept "
            "(--backbone-only)"
        )
    for labels, other, nameless in ((a, b, fixed), (b, a, moving)):
        if labels != other and all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
            raise MismatchError(
                f"{nameless.name} does not name its labels, the other does ({listed(map(repr, other))}); if the "
                "rows match, say so (--assume labels)"
            )
    if a == b:
        return None
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    if only_a or only_b:
        raise MismatchError(
            f"{moving.name} and {fixed.name} have different labels: only the first has "
            f"{listed(map(repr, only_b)) or 'none'}; only the second has {listed(map(repr, only_a)) or 'none'}. If "
            "the rows match nevertheless, say so (--assume labels)"
        )
    order = list(range(max(a.values()) + 1))
    for label, row in a.items():
        order[row] = b[label]
    return order
