"""Checkpoints: a folder, a Hub repository, a module or a state dict as one thing with on-disk names.

Three names for one tensor meet here and nowhere else. The *disk* key is what the file says, the *module* key what
`state_dict()` of the installed transformers says, and the *canonical* key what tables are written for: the disk key
without the base model's prefix and without old spellings.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, some
from . import hub
from .folder import (
    copy_side_files,
    name_dtype,
    read_tensors,
    refuse_target,
    replacing,
    resolved,
    side_files,
    write_tensors,
)
from .lazy import Here, Lazy, Tensors, composed, parts_of
from .model_classes import (
    class_of,
    class_ties,
    config_of,
    filled,
    loaded,
    module_names,
    one_by_one,
    own_config,
    quantised,
    read_config,
    recomputed,
    refuse_shapeless,
    stored,
    ties_of,
    to_disk,
    without_weights,
)
from .precision import all_finite

Prefix: TypeAlias = str | tuple[str, ...] | None  # what comes before the base model's keys; None is the class's own
OLD_SPELLINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's tensors under their on-disk names, with all that makes them a model.

    One of a folder or Hub id is lazy: opening it reads headers alone, and what is made from it (`Alignment.apply`,
    `merge`) is computed when `save` or `model` asks for it, tensor by tensor.

    Args:
        tensors: `{disk key: tensor}`; a tied tensor is there once. Lazy ones are read each time they are asked for.
        given_config: the transformers configuration; by default the one that `written` says.
        name: what messages call it: a path, a Hub id, a class.
        given_ties: `{disk key that is not stored: the disk key whose tensor it shares}`; by default those of the class
            that the configuration names.
        folder: where its other files are (tokenizer, generation settings); `save` copies them.
        template: the module it came from; `model()` makes a copy of it.
        sources: all folders it was made from; `save` never writes over them.
        written: what `config.json` of the folder said when it was opened.
        commit: of the Hub, which was opened, as a whole hash; None for what is not one model of the Hub.

    Example:
        >>> checkpoint = Checkpoint.open("google-bert/bert-base-uncased")
        >>> checkpoint.tensors["bert.embeddings.LayerNorm.gamma"].shape
        torch.Size([768])
        >>> checkpoint.state("bert.")["embeddings.LayerNorm.weight"].shape  # the same, by its canonical key
        torch.Size([768])
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    given_config: Any = field(default=None, repr=False)
    name: str = "a state dict"
    given_ties: Mapping[str, str] | None = field(default=None, repr=False)
    folder: Path | None = None
    template: nn.Module | None = field(default=None, repr=False)
    sources: tuple[Path, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict, repr=False)
    commit: str | None = None

    @staticmethod
    def open(
        source: Source,
        revision: str | None = None,
        token: str | None = None,
        *,
        values: bool = True,
        progress: bool = False,
    ) -> Checkpoint:
        """Open a folder, a Hub id, a module, a state dict, or return a checkpoint as it is.

        Args:
            source: any of these; a Hub id may be `id@revision`.
            revision: branch, tag or commit of a Hub id.
            token: for the Hub, instead of the one that is logged in with.
            values: False is for planning: of a model of the Hub that is not here, only small files are fetched, and
                shapes are read off the headers of its weights, whose values then cannot be read.
            progress: show the Hub's progress bars.

        Raises:
            CheckpointError: nothing there, no weights, a shard that is missing, unreadable or cut short.
            HubError: the Hub refuses (no access, no such revision), or cannot be reached.
        """
        if isinstance(source, Checkpoint):
            return source
        if isinstance(source, nn.Module):
            return _of_module(source)
        if isinstance(source, Mapping):
            other = [key for key, value in source.items() if not isinstance(value, Tensor)]
            if other:
                raise CheckpointError(
                    f"not a state dict: {some(map(repr, other))} are no tensors; give the part that is"
                )
            return Checkpoint(dict(source))
        try:
            folder = Path(source).expanduser()
        except RuntimeError as error:
            raise CheckpointError(f"{source} cannot be a folder: {error}") from error
        if folder.is_dir() and revision is not None:
            raise CheckpointError(f"{source} is a folder here, which has no revision {revision!r}")
        commit, parts = None, None
        if not folder.is_dir():
            folder, commit, parts = hub.fetched(str(source), revision, token, values=values, progress=progress)
        side_files(folder)  # none leads elsewhere
        tensors = Tensors(read_tensors(folder) if parts is None else parts)
        written = read_config(folder)
        return Checkpoint(tensors, name=str(source), folder=folder, sources=(folder,), written=written, commit=commit)

    # --- what it is ----------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> Mapping[str, Lazy]:
        """Shape, dtype and origin of every tensor; asking for them reads nothing."""
        return parts_of(self.tensors)

    @cached_property
    def config(self) -> Any:
        """The transformers configuration; None where there is none, or none that transformers knows."""
        if self.given_config is not None:
            return self.given_config
        return config_of(self.written, self.folder)

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """`{disk key that is not stored: the disk key whose tensor it shares}`."""
        return {target: kept for target, kept in self.declared_ties.items() if target not in self.tensors}

    @cached_property
    def declared_ties(self) -> Mapping[str, str]:
        """The same with what the file stores in spite of it."""
        if self.given_ties is not None:
            return self.given_ties
        return {} if self.config is None else class_ties(self.config, len(self.parts))

    @cached_property
    def said(self) -> dict[str, Any]:
        """The configuration as it is written, without the defaults of its class where those are left out."""
        return dict(self.written if self.given_config is None else self.given_config.to_dict())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration with its defaults; as it is written where transformers does not know it."""
        return dict(self.config.to_dict()) if self.config is not None else self.said

    # --- names ---------------------------------------------------------------------------------------------------

    def canonical(self, prefix: Prefix = None) -> dict[str, str]:
        """`{canonical key: disk key}`; without a prefix, the class's own base prefix.

        What old versions stored and new ones recompute (attention masks, position ids, rotary frequencies) has no
        canonical key. Two disk keys for one tensor raise CheckpointError.
        """
        names: dict[str, str] = {}
        for key, part in self.parts.items():
            if not recomputed(key, part):
                name = self._canonical(key, prefix)
                if name in names:
                    raise CheckpointError(
                        f"{self.name}: {key!r} and {names[name]!r} are two keys for one tensor, {name!r}"
                    )
                names[name] = key
        return names

    def _canonical(self, key: str, prefix: Prefix) -> str:
        for old, new in OLD_SPELLINGS.items():
            if key.endswith(old):
                key = key.removesuffix(old) + new
        prefixes = self.base_prefix if prefix is None else prefix
        for one in (prefixes,) if isinstance(prefixes, str) else prefixes:
            if one and key.startswith(one):
                return key[len(one) :]
        return key

    @cached_property
    def owner(self) -> Any:
        """The class of its module; None where none is known."""
        if self.template is not None:
            return type(self.template)
        return None if self.config is None else class_of(self.config)

    @cached_property
    def base_prefix(self) -> str:
        """What transformers puts before the keys of the base model in a model with a head: `"bert."`."""
        prefix = getattr(self.owner, "base_model_prefix", "")
        return f"{prefix}." if prefix else ""

    def state(self, prefix: Prefix = None) -> Tensors:
        """`{canonical key: tensor}`, read each time they are asked for where they are lazy."""
        return Tensors({name: self.parts[key] for name, key in self.canonical(prefix).items()})

    def shapes(self, prefix: Prefix = None) -> dict[str, tuple[int, ...]]:
        """`{canonical key: shape}`."""
        return {name: self.parts[key].shape for name, key in self.canonical(prefix).items()}

    def canonical_ties(self, prefix: Prefix = None) -> dict[str, str]:
        """`ties` by canonical keys."""
        return {self._canonical(t, prefix): self._canonical(s, prefix) for t, s in self.ties.items()}

    def with_state(self, state: Mapping[str, Tensor], prefix: Prefix = None) -> Checkpoint:
        """The same checkpoint with other values, given by canonical keys; all its keys must be there."""
        names, parts = self.canonical(prefix), parts_of(state)
        return self.with_parts({key: parts[name] for name, key in names.items()})

    def with_parts(self, parts: Mapping[str, Lazy], **other: Any) -> Checkpoint:
        """The same checkpoint with other values, given by disk keys, and other fields.

        What is computed from folders alone stays to be computed; what hangs on a tensor in memory, which somebody may
        change, is computed now.
        """
        return replace(self, tensors=composed(dict(self.parts) | dict(parts)), **other)

    def untied(self, keys: Collection[str], ties: Mapping[str, str], prefix: Prefix = None) -> Checkpoint:
        """The same model with some tied tensors stored apart, by canonical keys; its configuration says so."""
        names = self.canonical(prefix)
        disk = {self._canonical(target, prefix): target for target in self.declared_ties}
        return self.apart({disk.get(key, key): names[ties[key]] for key in keys})

    def apart(self, keys: Mapping[str, str]) -> Checkpoint:
        """The same by disk keys: `{what is to be stored: whose tensor it shared}`."""
        parts = dict(self.parts) | {target: self.parts[kept] for target, kept in keys.items()}
        left = {target: kept for target, kept in self.declared_ties.items() if target not in keys}
        other: dict[str, Any] = {"tensors": Tensors(parts), "given_ties": left}
        if self.given_config is not None:
            other["given_config"] = copy.deepcopy(self.given_config)
            other["given_config"].tie_word_embeddings = False
        elif self.written:
            other["written"] = {**self.written, "tie_word_embeddings": False}
        return replace(self, **other)

    # --- values --------------------------------------------------------------------------------------------------

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of its floating-point tensors, without what is recomputed anyway."""
        return {p.dtype for key, p in self.parts.items() if p.dtype.is_floating_point and not recomputed(key, p)}

    @property
    def wide(self) -> torch.dtype:
        """What to compute with it in: float32, or a wider dtype among its own."""
        kinds = [torch.promote_types(kind, torch.float32) for kind in self.dtypes]
        return max(kinds, key=lambda kind: kind.itemsize, default=torch.float32)

    def refuse_quantised(self) -> None:
        """Raise CheckpointError for a quantised model."""
        if why := quantised(self.parts, self.said):
            raise CheckpointError(
                f"{self.name} is quantised ({why}), and quantised weights cannot be moved or averaged; "
                "use the original"
            )

    def refuse_broken(self) -> None:
        """Raise CheckpointError for a quantised model, or that names the first tensor with NaN or Inf in it."""
        self.refuse_quantised()
        for part in self.parts.values():
            if part.dtype.is_floating_point and not all(map(all_finite, part.chunks())):
                self.refuse_values(part)

    def refuse_values(self, part: Lazy) -> None:
        """Raise CheckpointError if one of its tensors has NaN or Inf in it."""
        key = next((key for key, one in self.parts.items() if one is part), "a tensor")
        bad = sum((~torch.isfinite(chunk)).sum().item() for chunk in part.chunks())
        if bad:
            raise CheckpointError(
                f"{self.name}: {key} {part.shape} has {bad} values that are NaN or infinite of {part.numel}; a merge "
                "would spread them. Repair or replace that tensor first"
            )

    # --- out -----------------------------------------------------------------------------------------------------

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """The module: a copy of the one it came from, else `from_pretrained` of the class its configuration names.

        Args:
            dtype: of the module's parameters; by default that of the tensors.

        Raises:
            CheckpointError: no class is known, or tensors are missing or of another shape.
        """
        if self.template is not None and (names := module_names(self.template)) is not None:
            return filled(self.template, self.tensors, names, dtype)
        if self.config is None:
            raise CheckpointError(
                f"{self.name} has no configuration that transformers knows, so no module can be built"
            )
        if dtype is None:
            dtype = next(iter(self.dtypes)) if len(self.dtypes) == 1 else torch.float32
        # transformers makes parameters of the very tensors it is given, which may be somebody else's
        own = {key: part.kept().tensor if isinstance(part, Here) else part.read() for key, part in self.parts.items()}
        return loaded(self.owner, self.config, own, dtype, self.name)

    def computing(self, prefix: Prefix = None, dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, str]]:
        """`model(dtype)`, and `{canonical key: module key}`.

        Raises:
            CheckpointError: no class is known, or one that does not store its tensors one by one.
        """
        module = self.model(dtype)
        names = one_by_one(module)
        return module, {key: names[disk] for key, disk in self.canonical(prefix).items()}

    def skeleton(self) -> tuple[nn.Module, dict[str, str]]:
        """A module of this checkpoint's class, for its forward pass, and `{module key: disk key}`.

        It is the module that the checkpoint came from, if it did, else one without weights.

        Raises:
            CheckpointError: no class is known, or one that does not store its tensors one by one.
        """
        module = self.template
        if module is None:
            if self.config is None:
                raise CheckpointError(f"{self.name} has no class that transformers knows, and so no forward pass")
            module = without_weights(self.config, len(self.parts))
        return module, {key: disk for disk, key in one_by_one(module).items()}

    def save(
        self,
        out: str | os.PathLike[str],
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        progress: bool = False,
        beside: Callable[[Path], object] | None = None,
    ) -> Path:
        """Write an ordinary folder: weights in safetensors, configuration, and the other files of `folder`.

        What is lazy is computed on the way, a chunk or a tensor at a time. The folder is written beside the target and
        renamed at the end, so the target is complete or absent. `SHA256SUMS` in it is for `sha256sum --check`.
        `beside` is called with the folder when all else is in it, to write more.

        Raises:
            TargetExistsError: the target is there and `overwrite` is not set, or it holds what is not a model's.
            NoSpaceError: the disk has no room for it.
            CheckpointError: an input that cannot be read to its end, or NaN or Inf in a merge; nothing is written.
        """
        refuse_target(out, overwrite, self.sources)
        with replacing(resolved(out)) as partial:
            self._write_side_files(partial)
            write_tensors(partial, self.parts, max_shard_size, progress)
            if beside is not None:
                beside(partial)
        return Path(out)

    def _write_side_files(self, folder: Path) -> None:
        if self.folder is not None:
            copy_side_files(self.folder, folder, self.written)
        if self.given_config is not None and (self.folder is None or self.template is not None):
            self.given_config.save_pretrained(folder)
            generation = getattr(self.template, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(folder)
        if len(self.dtypes) == 1:
            name_dtype(folder / "config.json", str(next(iter(self.dtypes))).removeprefix("torch."))


Source: TypeAlias = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor] | Checkpoint


def _of_module(module: nn.Module) -> Checkpoint:
    """A module under its own class."""
    refuse_shapeless(module)
    config = own_config(module)
    place = "" if config is None else config.name_or_path or ""
    tensors = {key: tensor.detach() for key, tensor in to_disk(module, stored(module)).items()}
    # the folder it was loaded from has its tokenizer
    folder = Path(place) if place and Path(place).is_dir() else None
    name = type(module).__name__ + f" of {place}" * bool(place)
    return Checkpoint(tensors, config, name, ties_of(module), folder, module, sources=(folder,) if folder else ())
