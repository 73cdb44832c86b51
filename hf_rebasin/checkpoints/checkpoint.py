"""Checkpoints: a folder, a Hub repository, a module or a state dict as one thing with on-disk names.

Three names for one tensor meet here and nowhere else. The *disk* key is what the file says, the *module* key what
`state_dict()` of the installed transformers says, and the *canonical* key what tables are written for: the disk key
without the base model's prefix and without old spellings.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, listed
from ..text import byte_size
from . import hub
from .cache import cache_file, read_answer, store_answer
from .conversion import ClassLayout, class_layout, describe_wrappers, unwrap, without_old_spellings
from .folder import (
    copy_side_files,
    list_module_folders,
    list_module_weights,
    list_side_files,
    read_tensors,
    write_checksums,
    write_tensors,
)
from .formats import ADAPTER_CONFIG, dequantising_call, explain_adapter_beside, refuse_pointers, refuse_unmerged
from .json_files import read_json, record_dtype
from .lazy import InMemory, Lazy, Tensors, lazy_parts, pin_parts
from .loading import Loading, describe_misfit, refuse_worse_loading
from .model_classes import (
    build_config,
    build_without_weights,
    copy_config,
    fill_module,
    find_class,
    find_named_class,
    find_quantisation,
    find_ties,
    is_recomputed,
    load_module,
    module_names,
    read_config,
    refuse_shapeless,
    require_module_names,
    stored_state,
    to_disk_keys,
)
from .precision import all_finite, compute_dtype
from .target import refuse_target, replace_folder, resolve_target

Prefix: TypeAlias = str | tuple[str, ...] | None  # what comes before the base model's keys; None is the class's own

logger = logging.getLogger(__name__)

LOADING_RULES = 1  # raised when what `loading` finds changes, so that older answers are not used


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A model's tensors under their on-disk names, with everything that makes them a model.

    A checkpoint of a folder or Hub id is lazy: opening it reads headers alone, and whatever is made from it
    (`Alignment.apply`, `merge`) is computed when `save` or `model` asks for it, tensor by tensor.

    Args:
        tensors: `{disk key: tensor}`, a tied tensor once. Lazy ones are read each time they are asked for.
        given_config: the transformers configuration; by default the one that `written` describes.
        name: the name that messages use: a path, a Hub id, a class.
        given_ties: `{disk key that is not stored: the disk key whose tensor it shares}`; by default those of the class
            that the configuration names.
        folder: folder with its other files (tokenizer, generation settings); `save` copies them.
        template: the module it came from; `model()` makes a copy of it.
        sources: all folders it was made from; `save` never overwrites them.
        written: contents of the folder's `config.json` when it was opened.
        commit: full hash of the Hub commit that was opened; None unless it is a single model of the Hub.
        absent_rows: `{disk key: (axis, indices)}` of rows, now zero, for tokens that only another model has, whose
            vocabulary this one was given; a merge takes them from its first model.
        submodels: `{sub-folder: model}` of the parts with weights of their own that the folder's `modules.json` names,
            such as the `2_Dense` of a sentence transformer; merged and saved with the model.
        origin: the model as it was opened, whose keys and configuration this one was made with; None for itself.
        complete: called with the folder that `save` writes, to change more in it than weights, such as a template.

    Example:
        >>> checkpoint = Checkpoint.open("google-bert/bert-base-uncased")
        >>> checkpoint.tensors["bert.embeddings.LayerNorm.gamma"].shape
        torch.Size([768])
        >>> checkpoint.state("bert.")["embeddings.LayerNorm.weight"].shape  # by its canonical key
        torch.Size([768])
    """

    tensors: Mapping[str, Tensor]
    given_config: Any = None
    name: str = "a state dict"
    given_ties: Mapping[str, str] | None = None
    folder: Path | None = None
    template: nn.Module | None = None
    sources: tuple[Path, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    absent_rows: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    submodels: Mapping[str, Checkpoint] = field(default_factory=dict)
    origin: Checkpoint | None = None
    complete: Callable[[Path], object] | None = None

    def __repr__(self) -> str:
        size = byte_size(sum(part.nbytes for part in self.parts.values()))
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        commit = f" at {self.commit[:7]}" if self.commit else ""
        return f"Checkpoint({self.name}{commit}: {len(self.parts)} tensors, {size}, {dtypes or 'no floats'})"

    @staticmethod
    def open(
        source: Source,
        revision: str | None = None,
        token: str | None = None,
        *,
        values: bool = True,
        progress: bool = False,
    ) -> Checkpoint:
        """Open a folder, a Hub id, a module or a state dict; a checkpoint is returned as it is.

        Args:
            source: any of these; a Hub id may be `id@revision`.
            revision: branch, tag or commit of a Hub id.
            token: Hub token to use instead of the stored one.
            values: False is for planning: of a Hub model that is not cached, only small files are downloaded, and
                shapes come from the headers of its weights, whose values then cannot be read.
            progress: whether to show the Hub's progress bars.

        Raises:
            CheckpointError: nothing is there, there are no weights, or a shard is missing, unreadable or cut short.
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
                    f"not a state dict: {listed(map(repr, other))} are not tensors; give the part that holds tensors"
                )
            return Checkpoint(dict(source))
        try:
            folder = Path(source).expanduser()
        except RuntimeError as error:
            raise CheckpointError(f"{source} cannot be a folder: {error}") from error
        if folder.is_file():
            raise CheckpointError(f"{source} is a file, and a model is a folder; give the one that it is in")
        if folder.is_dir() and revision is not None:
            raise CheckpointError(f"{source} is a local folder, which has no revision {revision!r}")
        commit, parts = None, None
        if not folder.is_dir():
            folder, commit, parts = hub.fetch_model(str(source), revision, token, values=values, progress=progress)
        side_files = list_side_files(folder)  # refuses links that lead out of the folder
        weights = [*folder.glob("model*"), *folder.glob("pytorch_model*"), *list_module_weights(folder)]
        refuse_pointers(folder, [*side_files, *weights])
        tensors: Mapping[str, Lazy] = read_tensors(folder) if parts is None else parts
        written = read_config(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            raise explain_adapter_beside(str(source), read_json(folder / ADAPTER_CONFIG), commit)
        if "auto_map" not in written:  # else its own code may have layers with adapters
            refuse_unmerged(str(source), {key: part.shape for key, part in tensors.items()})
        return Checkpoint(
            Tensors(_unwrap(tensors, written, folder, str(source))),
            name=str(source),
            folder=folder,
            sources=(folder,),
            written=written,
            commit=commit,
            submodels=_open_submodels(folder, str(source)),
        )

    # --- what it is ----------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> Mapping[str, Lazy]:
        """`{disk key: lazy tensor}`: shape, dtype and origin of every tensor, without reading any."""
        return lazy_parts(self.tensors)

    @cached_property
    def config(self) -> Any:
        """The transformers configuration; None where there is none, or none that transformers knows."""
        if self.given_config is not None:
            return self.given_config
        return build_config(self.written, self.folder)

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """`{disk key that is not stored: the disk key whose tensor it shares}`."""
        return {target: source for target, source in self.declared_ties.items() if target not in self.tensors}

    @cached_property
    def declared_ties(self) -> Mapping[str, str]:
        """`ties`, with the tied tensors that the file stores all the same."""
        if self.given_ties is not None:
            return self.given_ties
        if self.config is None:
            return {}
        layout = class_layout(self.config, len(self.parts))
        spelled = {name: key for key, name in layout.usual_names(self.parts).items()}
        return {spelled.get(target, target): spelled.get(source, source) for target, source in layout.ties.items()}

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The configuration as it is written, which may leave out the defaults of its class."""
        return dict(self.written if self.given_config is None else self.given_config.to_dict())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration with its defaults, or as it is written where transformers does not know its type."""
        return dict(self.config.to_dict()) if self.config is not None else self.raw_config

    # --- names ---------------------------------------------------------------------------------------------------

    def canonical(self, prefix: Prefix = None) -> dict[str, str]:
        """`{canonical key: disk key}`; without a prefix, the class's own base prefix.

        Tensors that old versions stored and new ones recompute (attention masks, position ids, rotary frequencies)
        have no canonical key. Two disk keys for one tensor raise CheckpointError.
        """
        disk_keys: dict[str, str] = {}
        for key, part in self.parts.items():
            if not is_recomputed(key, part) and key not in self.passed_over:
                name = self.canonical_key(key, prefix)
                if name in disk_keys:
                    raise CheckpointError(
                        f"{self.name}: {key!r} and {disk_keys[name]!r} are two keys for one tensor, {name!r}"
                    )
                disk_keys[name] = key
        return disk_keys

    def canonical_key(self, key: str, prefix: Prefix = None) -> str:
        """Return the canonical key of a disk key."""
        key = self.usual_names.get(key, key)
        prefixes = self.base_prefix if prefix is None else prefix
        for alternative in (prefixes,) if isinstance(prefixes, str) else prefixes:
            if alternative and key.startswith(alternative):
                return key[len(alternative) :]
        return key

    @cached_property
    def layout(self) -> ClassLayout | None:
        """The class that loads its files, without weights; None where none is known, or its code is not that class's.

        A module has the keys that its class writes, so its class is not asked.
        """
        if self.template is not None or "auto_map" in self.raw_config:
            return None
        try:
            return None if self.config is None else class_layout(self.config, len(self.parts))
        except CheckpointError:  # which is noted where an output is to be loaded: `loading`
            return None

    @cached_property
    def usual_names(self) -> dict[str, str]:
        """`{disk key: disk key that save_pretrained writes for the tensor}`, for those that are spelled otherwise."""
        if self.layout is not None:
            names = self.layout.usual_names(self.parts)
        else:
            names = dict(zip(self.parts, without_old_spellings(self.parts), strict=True))
        return {key: name for key, name in names.items() if key != name}

    @cached_property
    def passed_over(self) -> Collection[str]:
        """Its disk keys that its class declares to be of no account, as they are recomputed."""
        return () if self.layout is None else self.layout.ignored(self.parts)

    @cached_property
    def unused(self) -> Collection[str]:
        """Its disk keys that its class has no use for, such as a value head, or a pooler of another class."""
        if self.layout is None:
            return ()
        return self.parts.keys() - self.layout.find_tensors(self.parts).keys() - set(self.passed_over)

    @cached_property
    def owner(self) -> Any:
        """The class of its module; None where none is known."""
        if self.template is not None:
            return type(self.template)
        return None if self.config is None else find_class(self.config)

    @cached_property
    def base_prefix(self) -> str:
        """The prefix that transformers gives the base model's keys in a model with a head: `"bert."`."""
        prefix = getattr(self.owner, "base_model_prefix", "")
        return f"{prefix}." if prefix else ""

    def state(self, prefix: Prefix = None) -> Tensors:
        """`{canonical key: tensor}`; lazy tensors are read each time they are asked for."""
        return Tensors({name: self.parts[key] for name, key in self.canonical(prefix).items()})

    def shapes(self, prefix: Prefix = None) -> dict[str, tuple[int, ...]]:
        """`{canonical key: shape}`."""
        return {name: self.parts[key].shape for name, key in self.canonical(prefix).items()}

    def with_parts(self, parts: Mapping[str, Lazy], **other: Any) -> Checkpoint:
        """Return the checkpoint with other values, given by disk keys, and other fields.

        What is computed from folders alone stays to be computed; what depends on a tensor in memory, which somebody
        may change, is computed now.
        """
        tensors = pin_parts(dict(self.parts) | dict(parts))
        return replace(self, **{"tensors": tensors, "origin": self.origin or self, **other})

    def apart(self, keys: Mapping[str, str]) -> Checkpoint:
        """Return the model with some tied tensors stored separately: `{disk key to store: whose tensor it shared}`."""
        parts = dict(self.parts) | {target: self.parts[source] for target, source in keys.items()}
        remaining = {target: source for target, source in self.declared_ties.items() if target not in keys}
        other: dict[str, Any] = {"tensors": Tensors(parts), "given_ties": remaining, "origin": self.origin or self}
        absent = {target: self.absent_rows[source] for target, source in keys.items() if source in self.absent_rows}
        other["absent_rows"] = {**self.absent_rows, **absent}
        if self.given_config is not None:
            other["given_config"] = copy.deepcopy(self.given_config)
            other["given_config"].tie_word_embeddings = False
        elif self.written:
            other["written"] = {**self.written, "tie_word_embeddings": False}
        return replace(self, **other)

    # --- values --------------------------------------------------------------------------------------------------

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of its floating-point tensors, except those that are recomputed anyway."""
        return {p.dtype for key, p in self.parts.items() if p.dtype.is_floating_point and not is_recomputed(key, p)}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype to compute in: float32, or a wider one among its own."""
        return compute_dtype(*self.dtypes)

    def refuse_quantised(self) -> None:
        """Raise CheckpointError for a quantised model."""
        for submodel in self.submodels.values():
            submodel.refuse_quantised()
        if why := find_quantisation(self.parts, self.raw_config):
            narrow = any(dtype.itemsize == 1 for dtype in self.dtypes)
            call = dequantising_call(self.name, self.raw_config, narrow)
            raise CheckpointError(
                f"{self.name} is quantised ({why}), and quantised weights cannot be moved or averaged; "
                f"use the original{f', or write it in a wider dtype: {call}' if call else ''}"
            )

    def refuse_broken(self) -> None:
        """Raise CheckpointError for a quantised model, or for a tensor with NaN or Inf, naming the first one."""
        self.refuse_quantised()
        for submodel in self.submodels.values():
            submodel.refuse_broken()
        for part in self.parts.values():
            if part.dtype.is_floating_point and not all(map(all_finite, part.chunks())):
                self.refuse_values(part)

    def refuse_values(self, part: Lazy) -> None:
        """Raise CheckpointError if this tensor has NaN or Inf in it, with its key and their number."""
        key = next((key for key, other in self.parts.items() if other is part), "a tensor")
        bad = sum((~torch.isfinite(chunk)).sum().item() for chunk in part.chunks())
        if bad:
            raise CheckpointError(
                f"{self.name}: {key} {part.shape} has {bad} values that are NaN or infinite of {part.numel}; a merge "
                "would spread them. Repair or replace that tensor first"
            )

    @cached_property
    def loading(self) -> Loading | str:
        """What does not fit when it is loaded into the class that its configuration names; or why none does."""
        if not self.raw_config:
            return "it has no configuration, which would name one"
        if "auto_map" in self.raw_config:
            return "its code is its own, and not run here"
        file = self._loading_file()
        if file is not None and (answer := Loading.from_answer(read_answer(file))) is not None:
            return answer
        try:
            if self.config is None:
                return f"this transformers does not know its type ({self.raw_config.get('model_type')})"
            if find_named_class(self.config) is None:
                return f"its config.json names {listed(self.config.architectures or ()) or 'none'}"
            loading = class_layout(self.config, len(self.parts)).load(self.parts)
        except CheckpointError as error:
            return str(error)
        if file is not None:
            store_answer(file, loading.to_answer())
        return loading

    def _loading_file(self) -> Path | None:
        """Return where `loading` is remembered, as it takes seconds to import transformers; None for modules."""
        if self.given_config is not None or self.template is not None or not self.written:
            return None
        tensors = sorted((key, str(part.dtype), list(part.shape)) for key, part in self.parts.items())
        packages = [version("transformers"), version("torch"), LOADING_RULES]
        return cache_file("loading", [packages, dict(self.written), tensors])

    def refuse_unloadable(self) -> None:
        """Raise CheckpointError for a model that from_pretrained refuses, as its class has tensors of other shapes.

        Missing and unexpected tensors do not matter: a base model may come without a pooler, or with a value head.
        """
        loading = self.loading
        if isinstance(loading, Loading) and (loading.mismatched or loading.failed):
            raise CheckpointError(f"{self.name} does not load: {describe_misfit(loading, self.config)}")

    def _check_output(self, folder: Path, out: str | os.PathLike[str]) -> None:
        """Refuse a written folder that transformers loads less well than the model it was made of."""
        written, origin = Checkpoint.open(folder), self.origin or self
        if isinstance(written.loading, Loading):
            before = origin.loading if isinstance(origin.loading, Loading) else written.loading
            misfit = written.loading.mismatched or written.loading.failed  # else there is no need to build it
            config = written.config if misfit else None
            refuse_worse_loading(written.loading, before, config, str(out), origin.name)
        elif self.raw_config:
            logger.info("%s was not checked against a class: %s", out, written.loading)

    # --- out -----------------------------------------------------------------------------------------------------

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """Return a module: a copy of the one it came from, or one of the class that its configuration names.

        Args:
            dtype: dtype of the module's parameters; by default the one of the tensors.

        Raises:
            CheckpointError: no class is known, or tensors are missing or of another shape.
        """
        if self.template is not None and (module_keys := module_names(self.template)) is not None:
            return fill_module(self.template, self.tensors, module_keys, dtype)
        if self.config is None:
            raise CheckpointError(
                f"{self.name} has no configuration that transformers knows, so no module can be built"
            )
        if dtype is None:
            dtype = next(iter(self.dtypes)) if len(self.dtypes) == 1 else torch.float32
        # transformers makes parameters of the very tensors it is given, which may be somebody else's
        tensors = {
            key: part.owned_copy().tensor if isinstance(part, InMemory) else part.read()
            for key, part in self.parts.items()
        }
        return load_module(self.owner, self.config, tensors, dtype, self.name)

    def skeleton(self) -> tuple[nn.Module, dict[str, str]]:
        """Return a module of this checkpoint's class, for its forward pass, and `{module key: disk key}`.

        It is the module that the checkpoint came from, or else one without weights.

        Raises:
            CheckpointError: no class is known, or one that does not store its tensors one by one.
        """
        module = self.template
        if module is None:
            if self.config is None:
                raise CheckpointError(f"{self.name} has no class that transformers knows, and so no forward pass")
            module = build_without_weights(self.config, len(self.parts))
        stored = {name: key for key, name in self.usual_names.items()}
        return module, {key: stored.get(name, name) for name, key in require_module_names(module).items()}

    def save(
        self,
        out: str | os.PathLike[str],
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        progress: bool = False,
        beside: Callable[[Path], object] | None = None,
    ) -> Path:
        """Write an ordinary folder: weights in safetensors, configuration, and the other files of `folder`.

        Lazy tensors are computed on the way, a chunk or a tensor at a time. The folder is written next to the target
        and renamed at the end, so the target is complete or absent. Its `SHA256SUMS` is for `sha256sum --check`.
        `beside` is called with the folder when everything else is in it, to write more.

        Raises:
            TargetExistsError: the target exists and `overwrite` is not set, or it holds files that are not a model's.
            NoSpaceError: the disk has no room for it.
            CheckpointError: an input cannot be read to its end, a merge has NaN or Inf, or the output would not load
                into the class that its configuration names; nothing is written.
        """
        refuse_target(out, overwrite, self.sources)
        self._refuse_missing_submodels()
        with replace_folder(resolve_target(out)) as partial:
            self._write_side_files(partial)
            checksums = write_tensors(partial, self.parts, max_shard_size, progress)
            for path, submodel in self.submodels.items():
                (partial / path).mkdir(parents=True, exist_ok=True)
                written = write_tensors(partial / path, submodel.parts, max_shard_size, progress)
                checksums |= {f"{path}/{file}": digest for file, digest in written.items()}
            write_checksums(partial, checksums)
            if self.complete is not None:
                self.complete(partial)
            self._check_output(partial, out)
            if beside is not None:
                beside(partial)
        return Path(out)

    def _refuse_missing_submodels(self) -> None:
        """Raise CheckpointError if the folder names parts with weights of their own that this checkpoint lacks."""
        named = [] if self.folder is None else list_module_folders(self.folder)
        if missing := [path for path in named if path not in self.submodels]:
            raise CheckpointError(
                f"{self.name} has no weights for {listed(missing)}, which {self.folder} comes with; give them "
                "(submodels=), as Checkpoint.open does"
            )

    def _write_side_files(self, folder: Path) -> None:
        if self.folder is not None:
            copy_side_files(self.folder, folder, self.written)
        if self.given_config is not None and (self.folder is None or self.template is not None):
            self.given_config.save_pretrained(folder)
            generation = getattr(self.template, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(folder)
        if len(self.dtypes) == 1:
            (dtype,) = self.dtypes
            misleading = {part.dtype for part in self.parts.values() if part.dtype.is_floating_point} != {dtype}
            changed = self.origin is not None and self.origin.dtypes != {dtype}  # other engines read it there alone
            record_dtype(folder / "config.json", str(dtype).removeprefix("torch."), add=misleading or changed)


def _unwrap(parts: Mapping[str, Lazy], written: Mapping[str, Any], folder: Path, name: str) -> dict[str, Lazy]:
    """Return the tensors of a folder without what training tools put around their modules, which is said."""

    def layout() -> ClassLayout | None:
        return Checkpoint(Tensors(parts), folder=folder, written=written).layout

    names = unwrap(parts, layout)
    if names:
        logger.info("%s: %s is taken off %d of %d tensors", name, describe_wrappers(names), len(names), len(parts))
    return {names.get(key, key): part for key, part in parts.items()}


Source: TypeAlias = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor] | Checkpoint


def _open_submodels(folder: Path, name: str) -> dict[str, Checkpoint]:
    """Open the parts of a model that lie in sub-folders of their own."""
    submodels = {}
    for path in list_module_folders(folder):
        try:
            tensors = Tensors(read_tensors(folder / path))
        except CheckpointError as error:
            raise CheckpointError(f"{path} of {name}, which modules.json names, cannot be merged: {error}") from error
        submodels[path] = Checkpoint(tensors, name=f"{name}/{path}", sources=(folder,))
    return submodels


def _of_module(module: nn.Module) -> Checkpoint:
    """Open a module as a checkpoint of its own class."""
    refuse_shapeless(module)
    config = copy_config(module)
    origin = "" if config is None else config.name_or_path or ""
    tensors = {key: tensor.detach() for key, tensor in to_disk_keys(module, stored_state(module)).items()}
    # the folder that it was loaded from has its tokenizer
    folder = Path(origin) if origin and Path(origin).is_dir() else None
    name = type(module).__name__ + f" of {origin}" * bool(origin)
    return Checkpoint(
        tensors,
        config,
        name,
        find_ties(module),
        folder,
        module,
        sources=(folder,) if folder else (),
        submodels=_open_submodels(folder, name) if folder else {},
    )
