"""Settings: which differences between two configurations change what the weights compute.

A setting with which a tensor, a buffer or an output of the class ever changes must be equal in both models, whatever
its values are (`evidence`). All others may differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_classes import find_named_class
from ..errors import CheckpointError, MismatchError, listed, nearest
from .evidence import ABSENT, TOKEN_ID, Effect, Evidence, flatten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SettingDifference:
    """A setting that differs between two models.

    Args:
        key: its name, with the names of the parts that it is in: `text_config.sliding_window`.
        fixed: its value in the model that stays.
        moving: its value in the other.
        effect: what it does.
    """

    key: str
    fixed: Any
    moving: Any
    effect: Effect

    def __str__(self) -> str:
        if self.fixed is ABSENT:
            values = f"{self.moving!r}, and not set in the other"
        elif self.moving is ABSENT:
            values = f"not set, and {self.fixed!r} in the other"
        else:
            values = f"{self.moving!r}, not {self.fixed!r}"
        return f"{self.key} is {values} ({self.effect.why})"


def refuse_other_settings(
    fixed: Checkpoint,
    moving: Checkpoint,
    assume: Collection[str] = (),
    same_token: Callable[[int, int], bool] = lambda a, b: False,
) -> None:
    """Raise MismatchError for models whose settings change what they compute; note which others differ.

    Args:
        fixed: model whose settings the merge has.
        moving: other model.
        assume: keys of settings that are taken as equal.
        same_token: whether an id of the fixed model and one of the other, whose rows may be in another order, stand
            for the same token.
    """
    differences = compare_settings(fixed, moving, same_token)
    known = flatten(fixed.settings).keys() | flatten(moving.settings).keys()
    for key in sorted(set(assume) - known):
        raise MismatchError(
            f"--assume config:{key}: neither {fixed.name} nor {moving.name} has that setting{nearest(key, known)}"
        )
    matters = [difference for difference in differences if difference.effect.matters and difference.key not in assume]
    if matters:
        each = " ".join(f"--assume config:{difference.key}" for difference in matters)
        raise MismatchError(
            f"{moving.name} computes something else than {fixed.name} with the same weights: "
            f"{listed(map(str, matters), 9)}. If that does not matter here, say so ({each}; --assume config for all)"
        )
    for why, keys in (
        ("without effect on what is computed", [d.key for d in differences if not d.effect.matters]),
        ("as you say that it does not matter", [d.key for d in differences if d.effect.matters]),
    ):
        if keys:
            text = "settings of %s that differ and are the first model's in the merge, %s: %s"
            logger.info(text, moving.name, why, listed(keys, 9))


def compare_settings(
    fixed: Checkpoint, moving: Checkpoint, same_token: Callable[[int, int], bool] = lambda a, b: False
) -> list[SettingDifference]:
    """List the settings that differ between two models, each with its effect; see `refuse_other_settings`."""
    a, b = flatten(fixed.settings), flatten(moving.settings)
    differ = {
        key: (a.get(key, ABSENT), b.get(key, ABSENT))
        for key in sorted(a.keys() | b.keys())
        if not _same_value(a.get(key, ABSENT), b.get(key, ABSENT))
    }
    evidence = _find_evidence(fixed, moving) if differ else None
    differences = []
    for key, values in differ.items():
        assert evidence is not None
        is_token = TOKEN_ID.search(key) and all(isinstance(value, int) for value in values)
        if is_token and same_token(*values):
            effect = Effect(False, "it is the same token")
        else:
            effect = evidence.effect_of(key, *values)
        differences.append(SettingDifference(key, *values, effect))
    return differences


def _same_value(a: Any, b: Any) -> bool:
    return bool(a == b) or (a != a and b != b)  # NaN


def _find_evidence(fixed: Checkpoint, moving: Checkpoint) -> Evidence:
    """Return what is known of the class of two models; of the code next to them, where transformers has no class.

    A model with code of its own may name a type that transformers knows, but its class is another one.
    """
    settings = (fixed.settings, moving.settings)
    own_code = any("auto_map" in model.raw_config and _names_no_class(model) for model in (fixed, moving))
    if fixed.config is not None and moving.config is not None and not own_code:
        with suppress(CheckpointError):  # a class that this version of transformers does not have
            parameters = max(sum(part.numel for part in model.parts.values()) for model in (fixed, moving))
            return Evidence(fixed.owner, settings, parameters)
    files = [file for model in (fixed, moving) if model.folder for file in sorted(model.folder.rglob("*.py"))]
    return Evidence(None, settings, 0, [file.read_text(encoding="utf-8", errors="replace") for file in files])


def _names_no_class(model: Checkpoint) -> bool:
    return model.config is None or find_named_class(model.config) is None
