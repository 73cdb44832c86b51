"""Folders: reading models from them, and writing them so that a target is complete or absent."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, TargetExistsError, some

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What a model is besides its weights: configuration, generation settings, tokenizer, processor, code, and the parts of
# a sentence transformer. These go along with a merge, and these alone may be overwritten.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "*processing_*.py",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
)


def download(repo: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*SIDE_FILES, INDEX, "model*.safetensors"]
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{repo!r} is neither a folder here nor a repository on the Hub that can be read ({type(error).__name__})"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is none."""
    try:
        said = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{file} holds a {type(said).__name__}, not an object")
    return said


def read_tensors(folder: Path) -> dict[str, Tensor]:
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
        files = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} points outside its folder: {name!r}")
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
    return tensors


def refuse_target(out: str | os.PathLike[str], overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Raise TargetExistsError unless a folder can be written there without losing anything that is not to be replaced.

    Args:
        out: the folder to be written.
        overwrite: whether a model that is there may be replaced.
        sources: folders that are read; the target may be none of them, nor hold one.
    """
    target = Path(out).resolve()
    for source in sources:
        if target == source.resolve() or target in source.resolve().parents:
            raise TargetExistsError(f"{out} is or holds {source}, which is read; name another folder")
    if target == Path.cwd():
        raise TargetExistsError(f"{out} is the folder you are in; name one to be made")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise TargetExistsError(f"{out} is already there; name another folder, or overwrite it (--overwrite)")
    if not target.is_dir():
        raise TargetExistsError(f"{out} is a file, and a model is a folder; name another")
    foreign = [f.name for f in sorted(target.iterdir()) if not _is_of_a_model(f)]
    if foreign or not any((target / name).exists() for name in (SINGLE, INDEX, "config.json")):
        raise TargetExistsError(
            f"{out} holds what is not a model's ({some(foreign) or 'no weights and no configuration'}), so it is not "
            "overwritten; name another folder"
        )


def _is_of_a_model(path: Path) -> bool:
    """Whether it is one of the things that `save` or `save_pretrained` writes."""
    if path.is_dir():
        return _is_side_folder(path)
    name = path.name
    return _is_side_file(name) or fnmatch.fnmatch(name, "model*.safetensors") or name in (INDEX, "README.md")


def _is_side_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES)


def _is_side_folder(path: Path) -> bool:
    """A folder of small files: further chat templates, a part of a sentence transformer."""
    inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return bool(inside) and not path.name.startswith(".") and all(_is_side_file(file.name) for file in inside)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy what a model needs besides its weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and _is_side_file(file.name):
            shutil.copyfile(file, folder / file.name)
        elif _is_side_folder(file):
            shutil.copytree(file, folder / file.name)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: str) -> None:
    """Write safetensors, in shards with an index where they are larger than one."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # a state dict may hold one tensor under two keys; a file holds two
        ready[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    split = split_torch_state_dict_into_shards(
        ready, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, keys in split.filename_to_tensors.items():
        save_file({key: ready[key] for key in keys}, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # as other files here; safetensors makes them private
    if split.is_sharded:
        total = {"total_parameters": sum(t.numel() for t in ready.values())}
        index = {"metadata": split.metadata | total, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _beside(target: Path) -> tuple[Path, Path]:
    return target.parent / f".{target.name}.partial", target.parent / f".{target.name}.old"


def put_back(target: Path) -> None:
    """Where a run was killed in the middle of an exchange, put back what was there before."""
    _, old = _beside(target)
    if old.exists() and not target.exists():
        old.rename(target)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A partial folder beside the target that takes its place at the end, or is removed if anything fails.

    What was there before is kept aside until then, and put back if the exchange fails. Leftovers of a run that was
    killed are cleaned up first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _beside(target)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
