"""Model folders: the files that they consist of, by what each is for, and how these are read and written."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, NoSpaceError, OptionError, listed
from .formats import ADAPTER_CONFIG, explain_missing_weights
from .json_files import read_json, update_json, write_utf8
from .side_files import (
    affects_tokens,
    folders_with_weights,
    is_leftover_folder,
    is_pickled,
    is_tokenizer_file,
    select_files,
    select_weights,
)

if TYPE_CHECKING:
    from .lazy import Lazy

logger = logging.getLogger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OLD_INDEX, OLD_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
CHECKSUMS = "SHA256SUMS"
PROVENANCE, RECIPE, CARD = "rebasin.json", "recipe.yaml", "README.md"
# Inference engines load every safetensors file at the top of a folder, so alignments lie in a sub-folder of it.
RECORDS, REPORT = "rebasin", "report.json"
_RECORDED = ("alignment*.safetensors", REPORT, "report*.png")
# Records of how a model was made; a merge of it gets its own. Older versions wrote all of them at the top.
RECORD_FILES = (PROVENANCE, RECIPE, *(f"{RECORDS}/{pattern}" for pattern in _RECORDED), *_RECORDED)
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
MODULES = "modules.json"  # the parts of a sentence transformer, with the sub-folders that they are in
# Everything in a folder with this file is ours: a run is writing or removing it, or was killed meanwhile.
MARKER = ".hf-rebasin"


def read_tensors(folder: Path) -> dict[str, Lazy]:
    """Open all tensors of a folder without reading their values; only `.bin` files of torch < 1.6 are read at once.

    Raises:
        CheckpointError: there are no weights, or only those of another format or an adapter; a shard is missing,
            unreadable, truncated or outside the folder; the index names tensors that do not exist.
    """
    from .tensor_files import read_file, read_pickle

    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    for single, index, read in ((SINGLE, INDEX, read_file), (OLD_SINGLE, OLD_INDEX, read_pickle)):
        if single in names:
            return dict(read(folder / single))
        if index in names:
            return _read_shards(folder, index, read)
    if MODULES in names and (inside := list_module_folders(folder)):
        raise CheckpointError(
            f"{folder} has no weights of its own: they are in {listed(inside)}, which {MODULES} names; merge "
            f"{folder / inside[0]} itself, and put the result there in a copy of {folder}"
        )
    inside = [file.relative_to(folder).as_posix() for file in folder.glob("*/*")] if names else []
    raise explain_missing_weights(str(folder), [*names, *inside], partial(read_json, folder / ADAPTER_CONFIG))


def _read_shards(folder: Path, index: str, read: Callable[[Path], Mapping[str, Lazy]]) -> dict[str, Lazy]:
    weight_map = read_json(folder / index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{folder / index} has no weight_map that says which tensor is in which file")
    tensors: dict[str, Lazy] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / index} points outside its folder: {name!r}")
        # a tensor may be in several files; the index says which one counts
        tensors |= {key: part for key, part in read(folder / name).items() if weight_map.get(key, name) == name}
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(f"{folder / index} names tensors that are missing from its files: {listed(missing)}")
    return tensors


def read_checksums(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, sha256) from the `SHA256SUMS` of a folder."""
    file = folder / CHECKSUMS
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        digest, _, name = line.partition("  ")
        yield name, digest


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the `SHA256SUMS` of a folder, of all its files; some were hashed while they were written."""
    from .tensor_files import sha256_of

    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    checksums = {name: known.get(name) or sha256_of(folder / name) for name in names if name != MARKER}
    write_utf8(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums.items())))


def is_weights(name: str) -> bool:
    """Whether `save` gives this name to a weight file, or to the index of several."""
    return fnmatch.fnmatch(name, "model*.safetensors") or name == INDEX


def is_record_file(name: str) -> bool:
    """Whether a file records how a model was made, or has its checksums or its card; named from the model's folder."""
    return matches_path(name, (*RECORD_FILES, CHECKSUMS, CARD))


def matches_path(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path within a folder has one of some patterns, in which `*` stands for no slash."""
    return any(fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def list_record_files(folder: Path) -> list[Path]:
    """List the files of a model's folder that record how it was made, with its checksums and its card."""
    files = [file for part in (folder, folder / RECORDS) if part.is_dir() for file in sorted(part.iterdir())]
    return [file for file in files if file.is_file() and is_record_file(file.relative_to(folder).as_posix())]


def list_side_files(folder: Path) -> list[Path]:
    """List the files of a model that go along into a merge of it: all but its weights and known leftovers.

    Raises:
        CheckpointError: one is not a regular file, or links outside the folder: the author of a model could otherwise
            have a file of the user's copied, and published with the merge. Links within the Hub's cache are allowed.
            Weights may be links to anywhere, as only tensors are read from them.
    """
    return [folder / name for name in select_in(folder)[0]]


def select_in(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return `select_side_files` of a local folder, after checking what it selects."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is gone, with the tokenizer and everything else that belongs to the weights")
    names, left = select_side_files(list_sizes(folder), read_modules(folder))
    for name in names:
        file = folder / name
        if not file.is_file():  # an endless device, a pipe that nobody writes to
            raise CheckpointError(f"{file} is not a file")
        _refuse_link_outside(file, folder)
    return names, left


def select_side_files(sizes: Mapping[str, int], modules: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Return `select_files` without the records of how the model was made: a merge of it gets its own."""
    records = {name for name in sizes if is_record_file(name) or name.startswith(f"{RECORDS}/")}
    return select_files({name: size for name, size in sizes.items() if name not in records}, modules)


def list_sizes(folder: Path) -> dict[str, int]:
    """Return `{path inside the folder: bytes}` of its files; folders that are always left are not entered.

    Raises:
        CheckpointError: a folder in it is a link that leads out of it.
    """
    sizes: dict[str, int] = {}

    def walk(inner: Path, linked: bool = False) -> None:
        for path in sorted(inner.iterdir()):
            name = path.relative_to(folder).as_posix()
            if not path.is_dir():
                if path.exists():  # a link may lead nowhere
                    sizes[name] = path.stat().st_size
            elif not is_leftover_folder(name):
                _refuse_link_outside(path, folder)
                is_link = path.is_symlink()  # links within links, and those to a folder above, would never end
                if not is_link or not (linked or path.resolve() in map(Path.resolve, path.parents)):
                    walk(path, linked or is_link)

    walk(folder)
    return sizes


def _refuse_link_outside(path: Path, folder: Path) -> None:
    root, target = folder.resolve(), path.resolve()
    if not (target.is_relative_to(root) or _in_hub_cache(target, root)):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the model's folder, and would be copied into the output; "
            "replace it by a copy if it belongs there, or remove it"
        )


def read_modules(folder: Path) -> list[str]:
    """Read the sub-folders that `modules.json` names, in its order; empty for a model without that file.

    Raises:
        CheckpointError: it is not a list of modules, or names a folder outside the model's.
    """
    file = folder / MODULES
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        paths = [PurePosixPath(module["path"]) for module in content]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is not a list of modules with their paths: {error!r}") from error
    if strange := [path.as_posix() for path in paths if not path.as_posix().isprintable() or "\\" in path.as_posix()]:
        raise CheckpointError(f"{file} names impossible folders: {listed(map(repr, strange))}")
    if outside := [path for path in paths if path.is_absolute() or ".." in path.parts]:
        raise CheckpointError(f"{file} points outside its folder: {listed(map(str, outside))}")
    return list(dict.fromkeys(path.as_posix() for path in paths if path.parts))


def list_module_folders(folder: Path) -> list[str]:
    """List the sub-folders with weights of their own that `modules.json` names."""
    modules = read_modules(folder)
    return folders_with_weights(list_sizes(folder), modules) if modules else []


def list_module_weights(folder: Path) -> list[Path]:
    """List the files of weights in the sub-folders that `modules.json` names."""
    inside = [folder / name for name in list_module_folders(folder)]
    return [module / name for module in inside for name in select_weights(file.name for file in module.iterdir())]


def tokenizer_folder(folder: Path | None) -> Path | None:
    """Return the folder if a tokenizer can be loaded from it, else None."""
    names = [file.name for file in folder.iterdir() if file.is_file()] if folder and folder.is_dir() else []
    return folder if any(map(is_tokenizer_file, names)) else None


def list_tokenizer_files(folder: Path) -> set[str]:
    """List the names of all files that define the tokens of a model."""
    return {file.name for file in folder.iterdir() if affects_tokens(file.name) and file.is_file()}


def _in_hub_cache(target: Path, folder: Path) -> bool:
    """Whether a link in a folder leads to where the Hub client keeps the files of its snapshots."""
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    return any(target.is_relative_to(cache) for cache in (*blobs, Path(HF_HUB_CACHE).resolve()))


def copy_side_files(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Copy the side files of a model into a folder, with `config` as the configuration unless it is empty."""
    names, left = select_in(source)
    report_left(str(source), left)
    if pickled := [name for name in names if is_pickled(PurePosixPath(name).name)]:
        logger.warning(
            "%s: %s: pickled objects are not merged, and go along as they are; fit them again to the result if they "
            "belong to the weights",
            *(source, listed(pickled)),
        )
    for name in names:
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
    for name in read_modules(source):  # one without files, such as a normalisation, is an empty folder or none
        (folder / name).mkdir(parents=True, exist_ok=True)
    if config:
        update_json(folder / "config.json", config)


def report_left(source: str, left: Mapping[str, str]) -> None:
    """Log what of a model does not go along although its name does not tell that it belongs to something else."""
    if left:
        entries = listed(f"{name} ({why})" for name, why in left.items())
        logger.warning("%s: left behind: %s; copy into the merge what the model needs", source, entries)


def write_tensors(
    folder: Path, parts: Mapping[str, Lazy], max_shard_size: str, progress: bool = False
) -> dict[str, str]:
    """Stream tensors to safetensors files, in several shards with an index if need be.

    Returns:
        `{file: sha256}`.

    Raises:
        NoSpaceError: the disk has too little room for them (checked before anything is written), or fills up.
    """
    from tqdm import tqdm

    from .precision import single_thread
    from .tensor_files import write_file

    if not parts:
        raise CheckpointError("there are no tensors to write")
    total = sum(part.nbytes for part in parts.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise NoSpaceError(f"{folder.parent} has {free / 1e9:.2f} GB left, but {total / 1e9:.2f} GB are to be written")
    shards = _split_into_shards(parts, max_shard_size)
    checksums = {}
    with (
        single_thread(),
        tqdm(
            total=total, desc="writing", unit="B", unit_scale=True, leave=False, disable=None if progress else True
        ) as bar,
    ):
        for file, names in shards.items():
            checksums[file] = write_file(folder / file, {name: parts[name] for name in names}, bar.update)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": sum(part.numel for part in parts.values()), "total_size": total},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        write_utf8(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return checksums


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file next to its target and rename it, so that the target is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _split_into_shards(parts: Mapping[str, Lazy], max_shard_size: str) -> dict[str, list[str]]:
    """Return `{file: names}`, split as transformers does it."""
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split = split_state_dict_into_shards_factory(
            cast("dict[str, Any]", parts),
            get_storage_size=lambda part: part.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise OptionError(f"max_shard_size {max_shard_size!r} is not a size such as '5GB'") from error
    return dict(split.filename_to_tensors)
