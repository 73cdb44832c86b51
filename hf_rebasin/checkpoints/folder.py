"""Model folders: list and read their files, and write them so that a target is complete or absent."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, NoSpaceError, OptionError, TargetExistsError, listed

if TYPE_CHECKING:
    from .lazy import Lazy

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OLD_INDEX, OLD_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
CHECKSUMS = "SHA256SUMS"
PROVENANCE, CARD = "rebasin.json", "README.md"
# Records of how a model was made; a merge of it gets its own.
RECORD_FILES = (PROVENANCE, "recipe.yaml", "alignment*.safetensors", "report.json", "report*.png")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Files of a model besides its weights: configuration, generation settings, tokenizer, processor, code, parts of a
# sentence transformer. They are copied into a merge, and only they, weights and records may be overwritten.
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

# A tokenizer can be loaded from any of the first; the others also affect what its tokens mean.
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
TOKENIZER_EXTRAS = ("*tokenizer*", "added_tokens.json", "special_tokens_map.json", "merges.txt")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if there is no such file."""
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def read_tensors(folder: Path) -> dict[str, Lazy]:
    """Open all tensors of a folder without reading their values; only `.bin` files of torch < 1.6 are read at once.

    Raises:
        CheckpointError: there are no weights, or only an adapter's; a shard is missing, unreadable, truncated or
            outside the folder; the index names tensors that do not exist.
    """
    from .tensor_files import read_file, read_pickle

    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    for single, index, read in ((SINGLE, INDEX, read_file), (OLD_SINGLE, OLD_INDEX, read_pickle)):
        if single in names:
            return dict(read(folder / single))
        if index in names:
            return _read_shards(folder, index, read)
    if not set(names).isdisjoint(ADAPTER_FILES):
        base = read_json(folder / ADAPTER_FILES[0]).get("base_model_name_or_path", "its base model")
        raise CheckpointError(
            f"{folder} is an adapter of {base}, not a model: merge it into that model first (merge_and_unload of "
            "peft) and save the result"
        )
    raise CheckpointError(
        f"{folder} has no {SINGLE} and no {INDEX}, only {listed(names) or 'nothing'}; save the model with "
        "save_pretrained of transformers to get one"
    )


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


def refuse_target(out: str | os.PathLike[str], overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Raise TargetExistsError unless a folder can be written without losing anything that must not be replaced.

    Args:
        out: folder to be written.
        overwrite: whether an existing model may be replaced.
        sources: folders that are read; the target must neither be nor contain one of them.
    """
    target = resolve_target(out)
    restore_leftover(target)
    for source in sources:
        origin = source.resolve()
        if target == origin or target in origin.parents or origin in _staging_folders(target):
            raise TargetExistsError(f"{out} is or holds {source}, which is read; name another folder")
    if target == Path.cwd():
        raise TargetExistsError(f"{out} is the current folder; name a new one")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise TargetExistsError(f"{out} already exists; name another folder, or overwrite it (--overwrite)")
    if not target.is_dir():
        raise TargetExistsError(f"{out} is a file, but a model needs a folder; name another")
    foreign = [f.name for f in sorted(target.iterdir()) if not _belongs_to_model(f)]
    if foreign or not any((target / name).exists() for name in (SINGLE, INDEX, "config.json")):
        content = f"entries that do not belong to a model ({listed(foreign)})" if foreign else "no model"
        raise TargetExistsError(f"{out} holds {content}, so it is not overwritten; name another folder")


def resolve_target(out: str | os.PathLike[str]) -> Path:
    """Resolve the path of a folder to be written, following links."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError) as error:  # circular links
        raise TargetExistsError(f"{out} cannot be a folder: {error}") from error


def _belongs_to_model(path: Path) -> bool:
    """Whether a file or folder is one that `save` or `save_pretrained` writes."""
    if path.is_dir():
        return _is_side_folder(path)
    name = path.name
    if name.startswith(".") and name.endswith(".partial"):  # left over from a killed run (`write_atomically`)
        name = name[1 : -len(".partial")]
    return is_side_file(name) or is_weights(name) or is_record_file(name)


def is_weights(name: str) -> bool:
    """Whether `save` gives this name to a weight file, or to the index of several."""
    return fnmatch.fnmatch(name, "model*.safetensors") or name == INDEX


def is_side_file(name: str) -> bool:
    """Whether a file of this name accompanies weights."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES)


def is_record_file(name: str) -> bool:
    """Whether a file of this name records how a model was made, or has its checksums or its card."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in (*RECORD_FILES, CHECKSUMS, CARD))


def _is_side_folder(path: Path) -> bool:
    """Whether a folder holds side files alone, such as chat templates or a part of a sentence transformer."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return bool(files) and not path.name.startswith(".") and all(is_side_file(file.name) for file in files)


def list_side_files(folder: Path) -> list[Path]:
    """List the files that a model needs besides its weights, which are copied into a merge of it.

    Raises:
        CheckpointError: one is not a regular file, or links outside the folder: the author of a model could otherwise
            have a file of the user's copied, and published with the merge. Links within the Hub's cache are allowed.
            Weights may be links to anywhere, as only tensors are read from them.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is gone, with the tokenizer and everything else that belongs to the weights")
    files = []
    for path in sorted(folder.iterdir()):
        if is_side_file(path.name) and not path.is_dir():
            if path.exists() and not path.is_file():  # an endless device, a pipe that nobody writes to
                raise CheckpointError(f"{path} is not a file")
            files += [path] if path.is_file() else []
        elif _is_side_folder(path):
            files += [file for file in sorted(path.rglob("*")) if file.is_file()]
    root = folder.resolve()
    for file in files:
        target = file.resolve()
        if not (target.is_relative_to(root) or _in_hub_cache(target, root)):
            raise CheckpointError(
                f"{file} is a link to {target}, outside the model's folder, and would be copied into the output; "
                "replace it by a copy if it belongs there"
            )
    return files


def tokenizer_folder(folder: Path | None) -> Path | None:
    """Return the folder if a tokenizer can be loaded from it, else None."""
    return folder if folder and _matching_files(folder, TOKENIZER_FILES) else None


def list_tokenizer_files(folder: Path) -> set[str]:
    """List the names of all files that define the tokens of a model."""
    return _matching_files(folder, (*TOKENIZER_FILES, *TOKENIZER_EXTRAS))


def _matching_files(folder: Path, patterns: Iterable[str]) -> set[str]:
    return {file.name for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def _in_hub_cache(target: Path, folder: Path) -> bool:
    """Whether a link in a folder leads to where the Hub client keeps the files of its snapshots."""
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    return any(target.is_relative_to(cache) for cache in (*blobs, Path(HF_HUB_CACHE).resolve()))


def copy_side_files(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Copy the side files of a model into a folder, with `config` as the configuration unless it is empty."""
    for file in list_side_files(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if config and config != read_json(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def record_dtype(config: Path, dtype: str) -> None:
    """Write the dtype of the weights into a configuration file, so that "auto" loads the dtype that was saved."""
    content = read_json(config)
    known = not content.keys().isdisjoint(("model_type", "dtype", "torch_dtype"))
    if known and content.get("dtype", content.get("torch_dtype")) != dtype:
        content.pop("torch_dtype", None)
        config.write_text(json.dumps(content | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")


def write_tensors(folder: Path, parts: Mapping[str, Lazy], max_shard_size: str, progress: bool = False) -> None:
    """Stream tensors to safetensors files with their checksums, in several shards with an index if need be.

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
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / CHECKSUMS).write_text("".join(f"{digest}  {file}\n" for file, digest in checksums.items()))


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


def _staging_folders(target: Path) -> tuple[Path, Path]:
    """Return the folders next to a target for what is being written, and for what it replaces."""
    return target.parent / f".{target.name}.partial", target.parent / f".{target.name}.old"


def restore_leftover(target: Path) -> None:
    """Put the previous folder back if a run was killed between the two renames of `replace_folder`."""
    _, old = _staging_folders(target)
    if old.exists() and not target.exists():
        old.rename(target)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield a partial folder next to the target that replaces it at the end, or is removed if anything fails.

    The previous folder is set aside meanwhile, and put back if the replacement fails. Leftovers of a killed run are
    removed first; those of a run that is still active, or of somebody else, raise TargetExistsError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _staging_folders(target)
    for leftover in (partial, old):
        _refuse_unless_leftover(leftover, target)
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    with _lock_folder(partial, target):
        inode = partial.stat().st_ino
        try:
            yield partial
            if not partial.exists() or partial.stat().st_ino != inode:
                raise TargetExistsError(f"{partial} was removed while it was being written")
            if target.exists():
                target.rename(old)
            try:
                partial.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
        finally:
            if partial.exists() and partial.stat().st_ino == inode:
                shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_unless_leftover(folder: Path, target: Path) -> None:
    """Raise TargetExistsError for an existing folder that a killed run did not leave behind."""
    if not folder.exists():
        return
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()] if folder.is_dir() else [folder]
    foreign = [f.name for f in files if not _belongs_to_model(f)]
    if foreign:
        raise TargetExistsError(
            f"{folder}, where {target.name} would be prepared, holds entries that do not belong to a model "
            f"({listed(foreign)}); name another target, or move it"
        )
    with _lock_folder(folder, target):
        pass


@contextmanager
def _lock_folder(folder: Path, target: Path) -> Iterator[None]:
    """Lock a folder for one run at a time; the system releases the lock however the run ends."""
    try:
        import fcntl
    except ImportError:  # not available on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetExistsError(f"another run is writing {target}; wait for it, or name another") from error
        except OSError:  # a file system without locks, as some shared ones are
            pass
        yield
    finally:
        os.close(descriptor)
