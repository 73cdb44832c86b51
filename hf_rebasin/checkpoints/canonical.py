"""Canonical keys: those that tables are written for, without the base model's prefix and without old spellings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, Prefix
from .lazy import Lazy, Tensors, lazy_parts
from .model_classes import require_module_names


@dataclass(frozen=True)
class CanonicalView:
    """A checkpoint by its canonical keys.

    Args:
        checkpoint: the model.
        prefix: what its disk keys may begin with (`"bert."`), one or several alternatives; None for the base prefix of
            its class.

    Example:
        >>> view = CanonicalView(Checkpoint.open("google-bert/bert-base-uncased"), "bert.")
        >>> view.keys["embeddings.LayerNorm.weight"]
        'bert.embeddings.LayerNorm.gamma'
    """

    checkpoint: Checkpoint
    prefix: Prefix = None

    @cached_property
    def keys(self) -> dict[str, str]:
        """`{canonical key: disk key}`."""
        return self.checkpoint.canonical(self.prefix)

    @property
    def state(self) -> Tensors:
        """`{canonical key: tensor}`, read each time they are asked for where they are lazy."""
        return self.select(self.checkpoint.parts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{canonical key: shape}`."""
        return {name: self.checkpoint.parts[key].shape for name, key in self.keys.items()}

    @property
    def ties(self) -> dict[str, str]:
        """`Checkpoint.ties` by canonical keys."""
        rename = self.checkpoint.canonical_key
        return {
            rename(target, self.prefix): rename(source, self.prefix) for target, source in self.checkpoint.ties.items()
        }

    def select(self, parts: Mapping[str, Lazy]) -> Tensors:
        """Rename tensors from disk keys to canonical keys; tensors that the model does not have are left out."""
        return Tensors({name: parts[key] for name, key in self.keys.items() if key in parts})

    def with_state(self, state: Mapping[str, Tensor]) -> Checkpoint:
        """Return the checkpoint with other values, given by canonical keys; every one of its keys needs a value."""
        parts = lazy_parts(state)
        return self.checkpoint.with_parts({key: parts[name] for name, key in self.keys.items()})

    def untied(self, keys: Collection[str], ties: Mapping[str, str]) -> Checkpoint:
        """Return the checkpoint with some tied tensors, by canonical keys, stored separately; so says its config."""
        disk = {self.rename(target): target for target in self.checkpoint.declared_ties}
        return self.checkpoint.apart({disk.get(key, key): self.keys[ties[key]] for key in keys})

    def module(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, str]]:
        """Return `Checkpoint.model(dtype)`, and `{canonical key: module key}`.

        Raises:
            CheckpointError: no class is known, or one that does not store its tensors one by one.
        """
        module = self.checkpoint.model(dtype)
        by_disk_key, names = require_module_names(module), self.checkpoint.usual_names
        # of a module that was loaded, the keys may be those of its file or the usual ones
        return module, {
            key: by_disk_key[disk if disk in by_disk_key else names.get(disk, disk)] for key, disk in self.keys.items()
        }

    def rename(self, key: str) -> str:
        """Return the canonical key of a disk key."""
        return self.checkpoint.canonical_key(key, self.prefix)
