"""Checkpoints: a folder, a Hub repository, a module or a state dict as one thing with on-disk names.

Three names for one tensor meet here and nowhere else. The *disk* key is what the file says, the *module* key what
`state_dict()` of the installed transformers says, and the *canonical* key what tables are written for: the disk key
without the base model's prefix and without old spellings.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from .errors import CheckpointError, TargetExistsError, some

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What a folder needs besides its weights: configuration, generation settings, tokenizer, processor.
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "tokenizer*", "vocab*", "merges*")
NOT_SIDE_FILES = ("*.index.json", "trainer_state.json", "*_results.json")
OLD_SPELLINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's tensors under their on-disk names, with all that makes them a model.

    Args:
        tensors: `{disk key: tensor}`; a tied tensor is there once.
        config: the transformers configuration; None for what transformers does not know.
        name: what messages call it: a path, a Hub id, a class.
        ties: `{disk key that is not stored: the disk key whose tensor it shares}`.
        folder: where its other files are (tokenizer, generation settings); `save` copies them.
        template: the module it came from; `model()` makes a copy of it.

    Example:
        >>> checkpoint = Checkpoint.open("google-bert/bert-base-uncased")
        >>> checkpoint.tensors["bert.embeddings.LayerNorm.gamma"].shape
        torch.Size([768])
        >>> checkpoint.state("bert.")["embeddings.LayerNorm.weight"].shape  # the same, by its canonical key
        torch.Size([768])
    """

    tensors: Mapping[str, Tensor]
    config: Any = None
    name: str = "a state dict"
    ties: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    template: nn.Module | None = field(default=None, repr=False)

    @staticmethod
    def open(source: Source, revision: str | None = None, token: str | None = None) -> Checkpoint:
        """Open a folder, a Hub id, a module, a state dict, or return a checkpoint as it is.

        Raises:
            CheckpointError: nothing there, weights that are not safetensors, a shard that is missing or unreadable.
        """
        if isinstance(source, Checkpoint):
            return source
        if isinstance(source, nn.Module):
            return _of_module(source)
        if isinstance(source, Mapping):
            return Checkpoint(dict(source))
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _download(str(source), revision, token)
        config = _config(folder)
        tensors = _read(folder)
        ties = _class_ties(config) if config is not None else {}
        ties = {target: kept for target, kept in ties.items() if target not in tensors}
        return Checkpoint(tensors, config, str(source), ties, folder)

    # --- names ---------------------------------------------------------------------------------------------------

    def canonical(self, prefix: str | tuple[str, ...] | None = None) -> dict[str, str]:
        """`{canonical key: disk key}`; without a prefix, the class's own base prefix.

        What old versions stored and new ones recompute (attention masks, position ids, rotary frequencies) has no
        canonical key. Two disk keys for one tensor raise CheckpointError.
        """
        names: dict[str, str] = {}
        for key, tensor in self.tensors.items():
            if not _recomputed(key, tensor):
                name = self._canonical(key, prefix)
                if name in names:
                    raise CheckpointError(
                        f"{self.name}: {key!r} and {names[name]!r} are two keys for one tensor, {name!r}"
                    )
                names[name] = key
        return names

    def _canonical(self, key: str, prefix: str | tuple[str, ...] | None) -> str:
        for old, new in OLD_SPELLINGS.items():
            if key.endswith(old):
                key = key.removesuffix(old) + new
        prefixes = self.base_prefix if prefix is None else prefix
        for one in (prefixes,) if isinstance(prefixes, str) else prefixes:
            if one and key.startswith(one):
                return key[len(one) :]
        return key

    @cached_property
    def base_prefix(self) -> str:
        """What transformers puts before the keys of the base model in a model with a head: `"bert."`."""
        prefix = getattr(_class_of(self.config), "base_model_prefix", "") if self.config is not None else ""
        return f"{prefix}." if prefix else ""

    def state(self, prefix: str | tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """`{canonical key: tensor}`."""
        return {name: self.tensors[key] for name, key in self.canonical(prefix).items()}

    def canonical_ties(self, prefix: str | tuple[str, ...] | None = None) -> dict[str, str]:
        """`ties` by canonical keys."""
        return {self._canonical(t, prefix): self._canonical(s, prefix) for t, s in self.ties.items()}

    def with_state(self, state: Mapping[str, Tensor], prefix: str | tuple[str, ...] | None = None) -> Checkpoint:
        """The same checkpoint with other values, given by canonical keys; all its keys must be there."""
        names = self.canonical(prefix)
        return replace(self, tensors=dict(self.tensors) | {key: state[name] for name, key in names.items()})

    # --- values --------------------------------------------------------------------------------------------------

    def refuse_broken(self) -> None:
        """Raise CheckpointError that names the first tensor with NaN or Inf in it."""
        for key, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = (~torch.isfinite(tensor)).sum().item()
                raise CheckpointError(
                    f"{self.name}: {key} {tuple(tensor.shape)} has {bad} values that are NaN or infinite of "
                    f"{tensor.numel()}; a merge would spread them. Repair or replace that tensor first"
                )

    # --- out -----------------------------------------------------------------------------------------------------

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """The module: a copy of the one it came from, else `from_pretrained` of the class its configuration names.

        Args:
            dtype: of the module's parameters; by default that of the tensors.

        Raises:
            CheckpointError: no class is known, or tensors are missing, left over or of another shape.
        """
        if self.template is not None and (names := _module_names(self.template)) is not None:
            return self._into_copy(self.template, names, dtype)
        if self.config is None:
            raise CheckpointError(
                f"{self.name} has no configuration that transformers knows, so no module can be built"
            )
        kinds = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        if dtype is None:
            dtype = kinds.pop() if len(kinds) == 1 else torch.float32
        model, info = _class_of(self.config).from_pretrained(
            None,
            config=copy.deepcopy(self.config),
            state_dict=dict(self.tensors),
            dtype=dtype,
            output_loading_info=True,
        )
        for what in ("missing_keys", "mismatched_keys"):
            if info[what]:
                raise CheckpointError(
                    f"{self.name} does not load: {what.replace('_', ' ')} {some(map(str, info[what]))}"
                )
        return model.eval()

    def _into_copy(self, template: nn.Module, names: Mapping[str, str], dtype: torch.dtype | None) -> nn.Module:
        model = copy.deepcopy(template)
        if dtype is not None:
            model = model.to(dtype)
        state = model.state_dict()  # references: writing to them writes to the model, tied ones at once
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                state[names[key]].copy_(tensor)
        return model

    def save(self, out: str | os.PathLike[str], overwrite: bool = False, max_shard_size: str = "5GB") -> Path:
        """Write an ordinary folder: weights in safetensors, configuration, and the other files of `folder`.

        It is written beside the target and renamed at the end, so the target is complete or absent.

        Raises:
            TargetExistsError: the target is there and `overwrite` is not set, or it is no model folder.
        """
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not overwrite:
                raise TargetExistsError(f"{out} is already there; name another folder, or overwrite it (--overwrite)")
            if not out.is_dir() or not any((out / name).exists() for name in (SINGLE, INDEX, "config.json")):
                raise TargetExistsError(f"{out} is not the folder of a model, so it is not overwritten")
            if self.folder is not None and out.resolve() == self.folder.resolve():
                raise TargetExistsError(f"{out} is what was read; an input is not overwritten")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
        for leftover in (partial, old):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            self._write_side_files(partial)
            self._write_weights(partial, max_shard_size)
            if out.exists():
                out.rename(old)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return out

    def _write_weights(self, folder: Path, max_shard_size: str) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file

        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.tensors.items()}
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        for file, keys in split.filename_to_tensors.items():
            save_file({key: tensors[key] for key in keys}, str(folder / file), metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # as other files here; safetensors makes them private
        if split.is_sharded:
            total = {"total_parameters": sum(t.numel() for t in tensors.values())}
            index = {"metadata": split.metadata | total, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write_side_files(self, folder: Path) -> None:
        if self.folder is not None:
            for file in sorted(self.folder.iterdir()):
                if file.is_file() and _is_side_file(file.name):
                    shutil.copyfile(file, folder / file.name)
        elif self.config is not None:
            self.config.save_pretrained(folder)
            generation = getattr(self.template, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(folder)
        self._write_dtype(folder / "config.json")

    def _write_dtype(self, file: Path) -> None:
        """The configuration names the dtype of the weights, so that "auto" loads what was written."""
        kinds = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        if self.config is not None and file.is_file() and len(kinds) == 1:
            said = json.loads(file.read_text())
            said.pop("torch_dtype", None)
            said["dtype"] = str(kinds.pop()).removeprefix("torch.")
            if said.get("architectures") is None and self.template is not None:
                said["architectures"] = [type(self.template).__name__]
            file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


Source: TypeAlias = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor] | Checkpoint


def _is_side_file(name: str) -> bool:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return matches(SIDE_FILES) and not matches(NOT_SIDE_FILES)


def _recomputed(key: str, tensor: Tensor) -> bool:
    """Buffers that old versions of transformers stored: causal masks, position ids, rotary frequencies."""
    if re.search(r"(^|\.)(attn|attention)\.(masked_)?bias$", key):
        return tensor.dim() in (0, 4)
    return re.search(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$", key) is not None


def _download(repo: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*SIDE_FILES, INDEX, "model*.safetensors"]
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{repo!r} is neither a folder here nor a repository on the Hub that can be read ({type(error).__name__})"
        ) from error


def _config(folder: Path) -> Any:
    """The transformers configuration of a folder; None where there is none, or none that transformers knows."""
    file = folder / "config.json"
    if not file.is_file() or "model_type" not in json.loads(file.read_text()):
        return None
    from transformers import CONFIG_MAPPING, AutoConfig

    return AutoConfig.from_pretrained(folder) if json.loads(file.read_text())["model_type"] in CONFIG_MAPPING else None


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, memory-mapped."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [SINGLE]
    if not (folder / SINGLE).is_file():
        if not (folder / INDEX).is_file():
            found = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
            raise CheckpointError(
                f"{folder} has no {SINGLE} and no {INDEX}, only {some(found) or 'nothing'}; save the model with "
                "save_pretrained of transformers to get one"
            )
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} points outside its folder: {name!r}")
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
    return tensors


def _class_of(config: Any) -> Any:
    """The class a configuration names, else the bare model of its type."""
    import transformers

    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise CheckpointError(
            f"this transformers ({transformers.__version__}) has no class {some(config.architectures or ['?'])}"
        ) from None


def _class_ties(config: Any) -> dict[str, str]:
    """The ties of the class a configuration names, by disk keys; no weights are made."""
    with torch.device("meta"):
        model = _class_of(config)(copy.deepcopy(config))
    return _ties(model)


def _tied(model: Any) -> dict[str, str]:
    """`{module key that is not stored: module key it shares}`, as transformers declares it, else as memory shows."""
    if hasattr(model, "all_tied_weights_keys"):
        return dict(model.all_tied_weights_keys)
    first: dict[tuple[int, torch.Size], str] = {}
    tied = {}
    for key, tensor in model.state_dict().items():
        if tensor.numel():
            kept = first.setdefault((tensor.data_ptr(), tensor.shape), key)
            if kept != key:
                tied[key] = kept
    return tied


def _ties(model: Any) -> dict[str, str]:
    """The same by disk keys."""
    tied = _tied(model)
    if not tied:
        return {}
    state = model.state_dict()
    # A tied key shares its tensor, so it is told apart by giving it one of its own.
    distinct = {key: torch.empty(1, device="meta") if key in tied else tensor for key, tensor in state.items()}
    names = {id(tensor): key for key, tensor in _to_disk(model, distinct).items()}
    return {names[id(distinct[target])]: names[id(distinct[kept])] for target, kept in tied.items()}


def _to_disk(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by disk keys; what is only renamed stays the same tensor object."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "base_model_prefix"):
        return dict(state)
    from transformers.core_model_loading import revert_weight_conversion

    return cast("dict[str, Tensor]", revert_weight_conversion(model, dict(state)))


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by module keys, with a tied tensor once."""
    tied = _tied(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def _module_names(model: nn.Module) -> dict[str, str] | None:
    """`{disk key: module key}`; None where a conversion does more than rename."""
    state = _stored(model)
    names = {id(tensor): key for key, tensor in state.items()}
    disk = _to_disk(model, state)
    if len(disk) != len(state) or not all(id(tensor) in names for tensor in disk.values()):
        return None
    return {key: names[id(tensor)] for key, tensor in disk.items()}


def _of_module(module: nn.Module) -> Checkpoint:
    config = getattr(module, "config", None) if hasattr(module, "base_model_prefix") else None
    if config is not None and not config.architectures:
        config = copy.deepcopy(config)
        config.architectures = [type(module).__name__]
    tensors = {key: tensor.detach() for key, tensor in _to_disk(module, _stored(module)).items()}
    return Checkpoint(tensors, config, type(module).__name__, _ties(module), template=module)
