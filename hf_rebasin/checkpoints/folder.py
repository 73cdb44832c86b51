"""Model folders: list and read their files, and write them so that a target is complete or absent."""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, NoSpaceError, OptionError, TargetExistsError, listed
from .formats import explain_missing_weights
from .side_files import (
    affects_tokens,
    folders_with_weights,
    is_known_side_file,
    is_leftover_folder,
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
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MODULES = "modules.json"  # the parts of a sentence transformer, with the sub-folders that they are in
# Everything in a folder with this file is ours: a run is writing or removing it, or was killed meanwhile.
MARKER = ".hf-rebasin"

# Keys of a configuration that say in which dtype its weights are; the second is the older one.
DTYPE_KEYS = ("dtype", "torch_dtype")
# How transformers 5 writes the numbers that JSON has not; older versions wrote the bare words.
FLOAT_TAG = "__float__"
SPECIAL_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if there is no such file.

    Infinity and NaN are the same number as old versions of transformers write them (`Infinity`) and as new ones do
    (`{"__float__": "Infinity"}`).
    """
    spelled = _read_spelling(file)
    try:
        return {key: _decode_floats(value) for key, value in spelled.items()}
    except RecursionError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error


def _read_spelling(file: Path) -> dict[str, Any]:
    """Read a JSON object with the floats as they are spelled in the file; empty if there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _decode_floats(value: Any) -> Any:
    """Replace `{"__float__": "Infinity"}`, and what transformers writes for -Infinity and NaN, by the number."""
    if isinstance(value, list):
        return [_decode_floats(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(FLOAT_TAG) if len(value) == 1 else None
    if isinstance(tag, str) and tag in SPECIAL_FLOATS:
        return SPECIAL_FLOATS[tag]
    return {key: _decode_floats(entry) for key, entry in value.items()}


def update_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object into a file; what stays equal keeps its order and spelling, or all of it its bytes."""
    before = _read_spelling(file)
    after = _keep_spelling(before, content)
    if not file.is_file() or _differ(before, after):
        _write_text(file, json.dumps(after, indent=2, sort_keys=not before) + "\n")


def _keep_spelling(before: Any, after: Any) -> Any:
    """Return a decoded value as it is spelled in `before`, as far as they are equal."""
    if not _differ(_decode_floats(before), after):
        return before
    if not isinstance(before, dict) or not isinstance(after, Mapping):
        return after
    keys = [*(key for key in before if key in after), *(key for key in after if key not in before)]
    return {key: _keep_spelling(before[key], after[key]) if key in before else after[key] for key in keys}


def _differ(a: Any, b: Any) -> bool:
    """Whether two JSON values differ; NaN is equal to itself, and true is not 1."""
    return json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True)


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
    raise explain_missing_weights(str(folder), [*names, *inside], partial(read_json, folder / ADAPTER_FILES[0]))


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
    foreign = _list_foreign(target)
    if foreign or not any((target / name).exists() for name in (SINGLE, INDEX, "config.json")):
        content = f"entries that do not belong to a model ({listed(foreign)})" if foreign else "no model"
        raise TargetExistsError(f"{out} holds {content}, so it is not overwritten; name another folder")


def resolve_target(out: str | os.PathLike[str]) -> Path:
    """Resolve the path of a folder to be written, following links."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError) as error:  # circular links
        raise TargetExistsError(f"{out} cannot be a folder: {error}") from error


def _list_foreign(folder: Path) -> list[str]:
    """List the entries of a folder that are not a model's: those that `save` and `save_pretrained` do not write.

    A file that went along has any name; it is known by its sha256 in the records of the folder, unless it was changed.
    """
    recorded, modules = _read_recorded(folder), set[str]()
    with suppress(CheckpointError):
        modules.update(read_modules(folder))
    foreign = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            known = any(path.iterdir()) or name in modules  # some modules of a sentence transformer have no files
        else:
            known = path.is_file() and (_is_named_by_model(name) or _is_recorded(path, recorded.get(name)))
        if not known:
            foreign.append(name)
    return foreign


def _is_named_by_model(name: str) -> bool:
    """Whether `save` or `save_pretrained` writes a file of this name, given from the model's folder."""
    place = PurePosixPath(name)
    final = place.with_name(_final_name(place.name))
    if is_record_file(final.as_posix()) or (is_weights(final.name) and not final.parent.parts):
        return True
    hidden = any(part.startswith(".") for part in final.parent.parts)
    return is_known_side_file(final.name) and not hidden


def _is_recorded(file: Path, digest: str | None) -> bool:
    from .tensor_files import sha256_of

    return digest is not None and sha256_of(file) == digest


def _read_recorded(folder: Path) -> dict[str, str]:
    """Return `{file: sha256}` of what a folder says that was written into it; empty where that cannot be read."""
    recorded: dict[str, str] = {}
    with suppress(CheckpointError, ValueError, OSError):
        recorded.update(read_checksums(folder))
        outputs = read_json(folder / PROVENANCE).get("outputs")
        recorded.update(outputs if isinstance(outputs, dict) else {})
    return recorded


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
    _write_text(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums.items())))


def _final_name(name: str) -> str:
    """Return the name that a file gets in the end, also for one that a killed run left (`write_atomically`)."""
    partial = name.startswith(".") and name.endswith(".partial")
    return name[1 : -len(".partial")] if partial else name


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


def record_dtype(config: Path, dtype: str, *, add: bool = False) -> None:
    """Write the dtype of the weights into a configuration file, so that "auto" loads the dtype that was saved.

    Args:
        config: the `config.json` of a model.
        dtype: dtype of all its weights.
        add: whether to add an entry where there is none; without one, the dtype is read from the weights.
    """
    content = read_json(config)
    changed = _with_dtype(content, dtype)
    if add and "model_type" in content and content.keys().isdisjoint(DTYPE_KEYS):
        changed["dtype"] = dtype
    if content:
        update_json(config, changed)


def _with_dtype(value: Any, dtype: str) -> Any:
    """Return a configuration with another dtype wherever it names one, also in the configurations of its parts."""
    if isinstance(value, list):
        return [_with_dtype(entry, dtype) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: dtype if key in DTYPE_KEYS and isinstance(entry, str) else _with_dtype(entry, dtype)
        for key, entry in value.items()
    }


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
        _write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return checksums


def _write_text(file: Path, text: str) -> None:
    """Write a text with the same bytes on every system, as they are hashed."""
    file.write_bytes(text.encode())


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
    if old.exists() and not target.exists() and not (old / MARKER).exists():  # with it, old was being removed
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
        if leftover.exists():
            _refuse_unless_leftover(leftover, target)
            _remove_folder(leftover)
    partial.mkdir()
    (partial / MARKER).touch()
    with _lock_folder(partial, target):
        inode = partial.stat().st_ino
        try:
            yield partial
            if not partial.exists() or partial.stat().st_ino != inode:
                raise TargetExistsError(f"{partial} was removed while it was being written")
            (partial / MARKER).unlink()
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
                _remove_folder(partial)
    if old.exists():
        _remove_folder(old)


def _remove_folder(folder: Path) -> None:
    """Remove a folder of ours as far as possible, its marker last: what a killed run leaves of it is known as ours."""
    marker = folder / MARKER
    with suppress(OSError):
        marker.touch()
    for path in folder.iterdir():
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path != marker:
                path.unlink()
    with suppress(OSError):
        marker.unlink(missing_ok=True)
        folder.rmdir()


def _refuse_unless_leftover(folder: Path, target: Path) -> None:
    """Raise TargetExistsError for an existing folder that a killed run did not leave behind."""
    if folder.is_symlink() or not folder.is_dir():
        foreign = [folder.name]
    else:
        foreign = [] if (folder / MARKER).is_file() else _list_foreign(folder)
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
