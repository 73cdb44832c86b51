"""Do two models mean the same? Configurations, labels and vocabularies, compared before any weight is touched."""

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
from ..checkpoints.folder import tokenizer_files, tokenizer_folder
from ..errors import MismatchError, SpecError, some
from ..symmetries.detection import spec_of
from ..symmetries.spec import Spec
from ..symmetries.table import table_for
from .alignment import act
from .groups import Element
from .groups.permutation import Element as Permutation

logger = logging.getLogger(__name__)
Assumption = Literal["config", "labels", "vocabulary"]

# Settings that may differ without the weights meaning something else: training, bookkeeping, decoding. Labels and
# token ids are compared by string instead. Whatever is not listed here has to be equal.
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
    "tie_word_embeddings",  # the tensors say it
)


def paired(
    fixed: Checkpoint, moving: Checkpoint, assume: Iterable[Assumption] = (), *, backbone_only: bool = False
) -> Checkpoint:
    """The moving model with its vocabulary and label rows in the fixed model's order.

    Args:
        fixed: the model whose configuration and tokenizer the result will have.
        moving: the other.
        assume: what is taken to be the same without looking: "config", "labels", "vocabulary".
        backbone_only: only their base models are to be brought together, so their heads may differ.

    Raises:
        MismatchError: they cannot mean the same; says in what they differ.
    """
    assume = set(assume)
    if not fixed.said or not moving.said:
        return moving  # plain modules and state dicts come without a word of what they mean
    refuse_other_architecture(fixed, moving, assume | ({"config"} if backbone_only else set()))
    if "config" not in assume and _flat(fixed.said) != _flat(moving.said):
        refuse_other_settings(fixed, moving)
    orders: dict[str, list[int]] = {}
    # What is written alike means the same; only where it is not are classes, tables and tokenizers asked.
    asked = []
    if not (backbone_only or "labels" in assume or _same_labels(fixed, moving)):
        asked.append(("labels", "label", labels))
    if not ("vocabulary" in assume or same_tokenizer(fixed, moving)):
        asked.append(("vocabulary", "vocab", vocabularies))
    spec = _spec_or_none(fixed) if asked else None
    for what, name, compare in asked:
        if spec is None or name in spec.symmetries:
            order = compare(fixed, moving)
            if order is not None and spec is None:
                raise MismatchError(
                    f"{moving.name} has the {what} of {fixed.name} in another order, and no table says which rows "
                    "these are"
                )
            if order is not None:
                orders[name] = order
    if not orders:
        return moving
    return _reordered(moving, orders, fixed)


def _reordered(moving: Checkpoint, orders: Mapping[str, list[int]], fixed: Checkpoint) -> Checkpoint:
    """The moving model with its label and token rows in the fixed one's order, and so with its labels and tokens."""
    spec = spec_of(moving)
    elements: dict[str, Element] = {}
    for name, order in orders.items():
        rows = list(range(spec.symmetries[name].size))  # an embedding may have more rows than there are tokens
        if len(order) > len(rows):
            raise MismatchError(f"{fixed.name} numbers {len(order)} {name} rows, {moving.name} has {len(rows)}")
        rows[: len(order)] = order
        if sorted(rows) != list(range(len(rows))):
            raise MismatchError(f"the {name} rows of {moving.name} are numbered with other gaps than in {fixed.name}")
        elements[name] = Permutation(torch.tensor(rows))
    state = act(spec, elements, moving.state(spec.table.prefix))
    given = {"given_config": fixed.config} if "label" in orders else {}
    folder = fixed.folder if "vocab" in orders else moving.folder
    return replace(moving.with_state(state, spec.table.prefix), folder=folder, **given)


def _spec_or_none(checkpoint: Checkpoint) -> Spec | None:
    """The spec, where a table describes the model; merging without alignment needs none."""
    try:
        return spec_of(checkpoint) if table_for(checkpoint.config) is not None else None
    except SpecError:
        return None


def refuse_other_architecture(fixed: Checkpoint, moving: Checkpoint, assume: Set[str] = frozenset()) -> None:
    for what in ("model_type", "architectures"):
        a, b = fixed.said.get(what), moving.said.get(what)
        if a and b and a != b and (what == "model_type" or "config" not in assume):
            raise MismatchError(
                f"{moving.name} is another architecture than {fixed.name}: {what} is {b}, not {a}"
                + (
                    ". If its weights mean the same all the same, say so (--assume config)"
                    if what == "architectures"
                    else ""
                )
            )


def refuse_other_settings(fixed: Checkpoint, moving: Checkpoint) -> None:
    a, b = _flat(fixed.settings), _flat(moving.settings)
    # what only one says and its class does not know is a remnant of another version, and computes nothing
    known = a.keys() | b.keys()
    if fixed.config is not None:
        known = (a.keys() & b.keys()) | _flat(type(fixed.config)().to_dict()).keys()
    differ = sorted(key for key in known if a.get(key) != b.get(key))
    if differ:
        said = some(f"{key} is {b.get(key)!r}, not {a.get(key)!r}" for key in differ)
        raise MismatchError(
            f"{moving.name} computes something else than {fixed.name} with the same weights: {said}. If that does not "
            "matter here, say so (--assume config)"
        )


def _flat(settings: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """All settings that matter, flat: `{"hidden_act": "gelu", "vision_config.num_heads": 12}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if any(fnmatch.fnmatch(key, pattern) for pattern in HARMLESS):
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{inside}{key}.")
        elif not (inside == "" and key in ("architectures", "model_type")):
            flat[inside + key] = value
    return flat


def _matched(
    a: Mapping[str, int], b: Mapping[str, int], what: str, fixed: Checkpoint, moving: Checkpoint
) -> list[int] | None:
    """For each of a's rows the row of b with the same string; None where the order is the same."""
    if a == b:
        return None
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    if only_a or only_b:
        raise MismatchError(
            f"{moving.name} and {fixed.name} have different {what}: only the first has "
            f"{some(map(repr, only_b)) or 'none'}; only the second has {some(map(repr, only_a)) or 'none'}. If the "
            f"rows mean the same all the same, say so (--assume {what})"
        )
    order = list(range(max(a.values()) + 1))
    for string, row in a.items():
        order[row] = b[string]
    return order


def _same_labels(fixed: Checkpoint, moving: Checkpoint) -> bool:
    return all(fixed.said.get(key) == moving.said.get(key) for key in ("id2label", "num_labels", "_num_labels"))


def labels(fixed: Checkpoint, moving: Checkpoint) -> list[int] | None:
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
            f"({some(shapes) or 'though their shapes are the same'}); that of {fixed.name} can be kept "
            "(--backbone-only)"
        )
    for mine, theirs, nameless in ((a, b, fixed), (b, a, moving)):
        if mine != theirs and all(re.fullmatch(r"LABEL_\d+", label) for label in mine):
            raise MismatchError(
                f"{nameless.name} does not name its labels, the other does ({some(map(repr, theirs))}); if they "
                "mean the same in the same order, say so (--assume labels)"
            )
    return _matched(a, b, "labels", fixed, moving)


def same_tokenizer(fixed: Checkpoint, moving: Checkpoint) -> bool:
    """Whether both come with the same files of a tokenizer, byte by byte, or as folders without one."""
    a, b = tokenizer_folder(fixed.folder), tokenizer_folder(moving.folder)
    if a is None or b is None:
        return a is b and fixed.given_config is None and moving.given_config is None
    mine, theirs = tokenizer_files(a), tokenizer_files(b)
    return mine == theirs and all(filecmp.cmp(a / name, b / name, shallow=False) for name in mine)


def vocabularies(fixed: Checkpoint, moving: Checkpoint) -> list[int] | None:
    a, b = tokenizer_folder(fixed.folder), tokenizer_folder(moving.folder)
    # of a folder it is known that there is none; a module may have lost sight of its own
    names = [getattr(c.given_config, "name_or_path", None) for c in (fixed, moving)]
    if a is None and b is None and any(names):
        logger.warning(
            "no tokenizer of %s or %s is here, so the vocabularies were not compared", fixed.name, moving.name
        )
    if a is None and b is None:
        return None
    if a is None or b is None:
        without = fixed if a is None else moving
        logger.warning("%s comes without a tokenizer, so the vocabularies were not compared", without.name)
        return None
    return _matched(_tokens(a), _tokens(b), "vocabulary", fixed, moving)


def _tokens(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        return dict(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception as error:  # a broken file raises whatever the code reading it stumbles on
        raise MismatchError(
            f"the tokenizer in {folder} cannot be loaded ({error!r}), so the vocabularies cannot be compared; if they "
            "are the same, say so (--assume vocabulary)"
        ) from error
