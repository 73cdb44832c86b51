"""Compatibility of two models: configurations, labels and vocabularies, compared before any weight is read."""

from __future__ import annotations

import filecmp
import fnmatch
import logging
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import list_tokenizer_files, tokenizer_folder
from ..errors import MismatchError, SpecError, listed
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec
from ..symmetries.table import canonical_view, table_for
from .action import act
from .groups import Element
from .groups.permutation import Element as Permutation

logger = logging.getLogger(__name__)
Assumption = Literal["config", "labels", "vocabulary"]

# Settings that may differ between models with compatible weights: training, bookkeeping, decoding. Labels and tokens
# are compared by string instead. All settings that are not listed here must be equal.
HARMLESS = (
    "*drop*",
    "*pdrop",
    "initializer_*",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "*id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "gradient_checkpointing",
    "*_token_id",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "chunk_size_feed_forward",
    "*attn_implementation*",
    "*experts_implementation*",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "_commit_hash",
    "model_card*",
    "tie_word_embeddings",  # visible in the tensors
)


def make_compatible(
    fixed: Checkpoint, moving: Checkpoint, assume: Iterable[Assumption] = (), *, backbone_only: bool = False
) -> Checkpoint:
    """Bring the vocabulary and label rows of the moving model into the fixed model's order.

    Args:
        fixed: model whose configuration and tokenizer the result will have.
        moving: model whose rows are reordered.
        assume: parts assumed to match without a comparison: "config", "labels", "vocabulary".
        backbone_only: whether only the base models will be merged, so that the heads may differ.

    Raises:
        MismatchError: the models are not compatible; the message names the differences.
    """
    assume = set(assume)
    if not fixed.raw_config or not moving.raw_config:
        return moving  # plain modules and state dicts have no configuration
    refuse_other_architecture(fixed, moving, assume | ({"config"} if backbone_only else set()))
    if "config" not in assume and _flatten(fixed.raw_config) != _flatten(moving.raw_config):
        refuse_other_settings(fixed, moving)
    orders: dict[str, list[int]] = {}
    # Equal files are compatible; classes, tables and tokenizers are loaded only where the files differ.
    comparisons = []
    if not (backbone_only or "labels" in assume or _same_labels(fixed, moving)):
        comparisons.append(("labels", "label", match_labels))
    if not ("vocabulary" in assume or same_tokenizer(fixed, moving)):
        comparisons.append(("vocabulary", "vocab", match_vocabularies))
    spec = _spec_or_none(fixed) if comparisons else None
    for part, name, compare in comparisons:
        if spec is None or name in spec.symmetries:
            order = compare(fixed, moving)
            if order is not None and spec is None:
                raise MismatchError(
                    f"{moving.name} has the {part} of {fixed.name} in another order, and no table says which rows "
                    "to reorder"
                )
            if order is not None:
                orders[name] = order
    if not orders:
        return moving
    return _reorder_rows(moving, orders, fixed)


def _reorder_rows(moving: Checkpoint, orders: Mapping[str, list[int]], fixed: Checkpoint) -> Checkpoint:
    """Reorder the label and token rows of the moving model, which takes over the labels and tokens with them."""
    spec = detect_spec(moving)
    elements: dict[str, Element] = {}
    for name, order in orders.items():
        rows = list(range(spec.symmetries[name].size))  # an embedding may have more rows than there are tokens
        if len(order) > len(rows):
            raise MismatchError(f"{fixed.name} numbers {len(order)} {name} rows, but {moving.name} has {len(rows)}")
        rows[: len(order)] = order
        if sorted(rows) != list(range(len(rows))):
            raise MismatchError(
                f"the numbers of the {name} rows of {moving.name} have other gaps than in {fixed.name}"
            )
        elements[name] = Permutation(torch.tensor(rows))
    view = canonical_view(moving, spec.table)
    state = act(spec, elements, view.state)
    given = {"given_config": fixed.config} if "label" in orders else {}
    folder = fixed.folder if "vocab" in orders else moving.folder
    return replace(view.with_state(state), folder=folder, **given)


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
            hint = ". If their weights are compatible nevertheless, say so (--assume config)"
            raise MismatchError(
                f"{moving.name} has another architecture than {fixed.name}: {setting} is {b}, not {a}"
                f"{hint if setting == 'architectures' else ''}"
            )


def refuse_other_settings(fixed: Checkpoint, moving: Checkpoint) -> None:
    """Raise MismatchError for models whose settings change what they compute."""
    a, b = _flatten(fixed.settings), _flatten(moving.settings)
    # a setting that only one of them has, and its class does not know, is a remnant of another version without effect
    known = a.keys() | b.keys()
    if fixed.config is not None:
        known = (a.keys() & b.keys()) | _flatten(type(fixed.config)().to_dict()).keys()
    differ = sorted(key for key in known if a.get(key) != b.get(key))
    if differ:
        differences = listed(f"{key} is {b.get(key)!r}, not {a.get(key)!r}" for key in differ)
        raise MismatchError(
            f"{moving.name} computes something else than {fixed.name} with the same weights: {differences}. If that "
            "does not matter here, say so (--assume config)"
        )


def _flatten(settings: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Flatten all settings that matter: `{"hidden_act": "gelu", "vision_config.num_heads": 12}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if any(fnmatch.fnmatch(key, pattern) for pattern in HARMLESS):
            continue
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{inside}{key}.")
        elif not (inside == "" and key in ("architectures", "model_type")):
            flat[inside + key] = value
    return flat


def _match_rows(
    a: Mapping[str, int], b: Mapping[str, int], part: str, fixed: Checkpoint, moving: Checkpoint
) -> list[int] | None:
    """Return, for each row of a, the row of b with the same string; None if the order is the same."""
    if a == b:
        return None
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    if only_a or only_b:
        raise MismatchError(
            f"{moving.name} and {fixed.name} have different {part}: only the first has "
            f"{listed(map(repr, only_b)) or 'none'}; only the second has {listed(map(repr, only_a)) or 'none'}. If "
            f"the rows match nevertheless, say so (--assume {part})"
        )
    order = list(range(max(a.values()) + 1))
    for string, row in a.items():
        order[row] = b[string]
    return order


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
    return _match_rows(a, b, "labels", fixed, moving)


def same_tokenizer(fixed: Checkpoint, moving: Checkpoint) -> bool:
    """Whether both have the same tokenizer files, byte by byte, or are folders without a tokenizer."""
    a, b = tokenizer_folder(fixed.folder), tokenizer_folder(moving.folder)
    if a is None or b is None:
        return a is b and fixed.given_config is None and moving.given_config is None
    names = list_tokenizer_files(a)
    return names == list_tokenizer_files(b) and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def match_vocabularies(fixed: Checkpoint, moving: Checkpoint) -> list[int] | None:
    """Return, for each token of the fixed model, its row in the moving one; None if the order is the same or unknown.

    Raises:
        MismatchError: the vocabularies differ, or a tokenizer cannot be loaded.
    """
    a, b = tokenizer_folder(fixed.folder), tokenizer_folder(moving.folder)
    # a folder has no tokenizer if none is in it; a module may have been loaded from a folder with one
    names = [getattr(c.given_config, "name_or_path", None) for c in (fixed, moving)]
    if a is None and b is None and any(names):
        logger.warning(
            "neither %s nor %s comes with a tokenizer, so the vocabularies were not compared", fixed.name, moving.name
        )
    if a is None and b is None:
        return None
    if a is None or b is None:
        without = fixed if a is None else moving
        logger.warning("%s comes without a tokenizer, so the vocabularies were not compared", without.name)
        return None
    return _match_rows(_read_tokens(a), _read_tokens(b), "vocabulary", fixed, moving)


def _read_tokens(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        return dict(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception as error:  # broken files raise all kinds of exceptions
        raise MismatchError(
            f"the tokenizer in {folder} cannot be loaded ({error!r}), so the vocabularies cannot be compared; if they "
            "are the same, say so (--assume vocabulary)"
        ) from error
