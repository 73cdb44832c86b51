"""Folders: which tensors they have, and writing them so that a target is complete or absent."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, NoSpaceError, OptionError, TargetExistsError, some

if TYPE_CHECKING:
    from .lazy import Lazy

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OLD_INDEX, OLD_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
SUMS = "SHA256SUMS"
PROVENANCE, CARD = "rebasin.json", "README.md"
# What says how a model was made; a merge of it has its own.
MADE = (PROVENANCE, "recipe.yaml", "alignment*.safetensors", "report.json", "report*.png")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
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

# What makes a tokenizer, and what else says what its tokens mean.
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
BESIDE_IT = ("*tokenizer*", "added_tokens.json", "special_tokens_map.json", "merges.txt")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is none."""
    try:
        said = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{file} holds a {type(said).__name__}, not an object")
    return said


def read_tensors(folder: Path) -> dict[str, Lazy]:
    """All tensors of a folder, not read yet; those of old `.bin` files, which say no places, are.

    Raises:
        CheckpointError: there are no weights, or only an adapter's; a shard is missing, unreadable, cut short or said
            to lie elsewhere; the index names tensors that are not there.
    """
    from .tensor_files import read_file, read_pickle

    found = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    for single, index, read in ((SINGLE, INDEX, read_file), (OLD_SINGLE, OLD_INDEX, read_pickle)):
        if single in found:
            return dict(read(folder / single))
        if index in found:
            return _read_shards(folder, index, read)
    if not set(found).isdisjoint(ADAPTER):
        base = read_json(folder / ADAPTER[0]).get("base_model_name_or_path", "its base model")
        raise CheckpointError(
            f"{folder} is an adapter of {base}, not a model: merge it into that model first (merge_and_unload of "
            "peft) and save the result"
        )
    raise CheckpointError(
        f"{folder} has no {SINGLE} and no {INDEX}, only {some(found) or 'nothing'}; save the model with "
        "save_pretrained of transformers to get one"
    )


def _read_shards(folder: Path, index: str, read: Callable[[Path], Mapping[str, Lazy]]) -> dict[str, Lazy]:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / index} has no weight_map that says which tensor is in which file")
    tensors: dict[str, Lazy] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / index} points outside its folder: {name!r}")
        # a tensor may be in several files; the index says in which it counts
        tensors |= {key: part for key, part in read(folder / name).items() if places.get(key, name) == name}
    if missing := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{folder / index} names tensors that its files have not: {some(missing)}")
    return tensors


def refuse_target(out: str | os.PathLike[str], overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Raise TargetExistsError unless a folder can be written there without losing anything that is not to be replaced.

    Args:
        out: the folder to be written.
        overwrite: whether a model that is there may be replaced.
        sources: folders that are read; the target may be none of them, nor hold one.
    """
    target = resolved(out)
    put_back(target)
    for source in sources:
        place = source.resolve()
        if target == place or target in place.parents or place in _beside(target):
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


def resolved(out: str | os.PathLike[str]) -> Path:
    """Where a folder really is; links are followed."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise TargetExistsError(f"{out} cannot be a folder: {error}") from error


def _is_of_a_model(path: Path) -> bool:
    """Whether it is one of the things that `save` or `save_pretrained` writes."""
    if path.is_dir():
        return _is_side_folder(path)
    name = path.name
    if name.startswith(".") and name.endswith(".partial"):  # what a killed run was writing (`write_whole`)
        name = name[1 : -len(".partial")]
    return is_side_file(name) or is_weights(name) or is_made(name)


def is_weights(name: str) -> bool:
    """Whether it is a file of weights as `save` writes them, or the index of several."""
    return fnmatch.fnmatch(name, "model*.safetensors") or name == INDEX


def is_side_file(name: str) -> bool:
    """Whether it goes along with weights."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES)


def is_made(name: str) -> bool:
    """Whether it says how a model was made, and what it is."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in (*MADE, SUMS, CARD))


def _is_side_folder(path: Path) -> bool:
    """A folder of small files: further chat templates, a part of a sentence transformer."""
    inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return bool(inside) and not path.name.startswith(".") and all(is_side_file(file.name) for file in inside)


def side_files(folder: Path) -> list[Path]:
    """What a model needs besides its weights, and what goes along with a merge of it.

    Raises:
        CheckpointError: one is no file, or a link to somewhere else: whoever gave the model away could so have a file
            of yours copied, and published with the merge. Links in a cache of the Hub are none of these; and weights
            may be links to anywhere, as what is read there is tensors or nothing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is gone, with the tokenizer and all else that belongs to the weights")
    found = []
    for path in sorted(folder.iterdir()):
        if is_side_file(path.name) and not path.is_dir():
            if path.exists() and not path.is_file():  # a device without an end, a pipe that nobody writes to
                raise CheckpointError(f"{path} is no file")
            found += [path] if path.is_file() else []
        elif _is_side_folder(path):
            found += [file for file in sorted(path.rglob("*")) if file.is_file()]
    place = folder.resolve()
    for file in found:
        target = file.resolve()
        if not (target.is_relative_to(place) or _in_a_cache(target, place)):
            raise CheckpointError(
                f"{file} is a link to {target}, outside of the model's folder, and would be copied into what is "
                "written; put a copy in its place if it belongs there"
            )
    return found


def tokenizer_folder(folder: Path | None) -> Path | None:
    """The folder, if a tokenizer can be loaded from it."""
    return folder if folder and _named(folder, TOKENIZER_FILES) else None


def tokenizer_files(folder: Path) -> set[str]:
    """The names of all files that say what the tokens of a model are."""
    return _named(folder, (*TOKENIZER_FILES, *BESIDE_IT))


def _named(folder: Path, patterns: Iterable[str]) -> set[str]:
    return {file.name for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def _in_a_cache(target: Path, folder: Path) -> bool:
    """Whether a link of a folder leads to where the Hub's client keeps the files of its snapshots."""
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    return any(target.is_relative_to(own) for own in (*blobs, Path(HF_HUB_CACHE).resolve()))


def copy_side_files(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Copy what a model needs besides its weights; its configuration as it is given, where that is another by now."""
    for file in side_files(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if config and config != read_json(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def name_dtype(config: Path, dtype: str) -> None:
    """The configuration names the dtype of the weights, so that "auto" loads what was written."""
    said = read_json(config)
    known = not said.keys().isdisjoint(("model_type", "dtype", "torch_dtype"))
    if known and said.get("dtype", said.get("torch_dtype")) != dtype:
        said.pop("torch_dtype", None)
        config.write_text(json.dumps(said | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")


def write_tensors(folder: Path, parts: Mapping[str, Lazy], max_shard_size: str, progress: bool = False) -> None:
    """Stream tensors to safetensors files, in shards with an index where they are larger than one, and their sha256.

    Raises:
        NoSpaceError: the disk has less room than they need (before anything is written), or runs full.
    """
    from tqdm import tqdm

    from .precision import one_thread
    from .tensor_files import write_file

    if not parts:
        raise CheckpointError("there are no tensors to be written")
    total = sum(part.nbytes for part in parts.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise NoSpaceError(f"{folder.parent} has {free / 1e9:.2f} GB left, and {total / 1e9:.2f} GB are to be written")
    shards = _shards(parts, max_shard_size)
    sums = {}
    with (
        one_thread(),
        tqdm(
            total=total, desc="writing", unit="B", unit_scale=True, leave=False, disable=None if progress else True
        ) as bar,
    ):
        for file, names in shards.items():
            sums[file] = write_file(folder / file, {name: parts[name] for name in names}, bar.update)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": sum(part.numel for part in parts.values()), "total_size": total},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / SUMS).write_text("".join(f"{digest}  {file}\n" for file, digest in sums.items()))


def write_whole(path: Path, content: bytes) -> None:
    """Beside the target first, so that the target is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _shards(parts: Mapping[str, Lazy], max_shard_size: str) -> dict[str, list[str]]:
    """`{file: names}`, as transformers cuts them."""
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        cut = split_state_dict_into_shards_factory(
            cast("dict[str, Any]", parts),
            get_storage_size=lambda part: part.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise OptionError(f"max_shard_size {max_shard_size!r} is no size, such as '5GB'") from error
    return dict(cut.filename_to_tensors)


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
    killed are cleaned up first; those of a run that goes on, or of somebody else, raise TargetExistsError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _beside(target)
    for leftover in (partial, old):
        _refuse_unless_left_over(leftover, target)
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    with _locked(partial, target):
        own = partial.stat().st_ino
        try:
            yield partial
            if not partial.exists() or partial.stat().st_ino != own:
                raise TargetExistsError(f"{partial} was taken away while it was written to")
            if target.exists():
                target.rename(old)
            try:
                partial.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
        finally:
            if partial.exists() and partial.stat().st_ino == own:
                shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_unless_left_over(folder: Path, target: Path) -> None:
    """Raise TargetExistsError if a folder is not one that a killed run left behind."""
    if not folder.exists():
        return
    inside = [f for f in sorted(folder.rglob("*")) if f.is_file()] if folder.is_dir() else [folder]
    foreign = [f.name for f in inside if not _is_of_a_model(f)]
    if foreign:
        raise TargetExistsError(
            f"{folder} is where {target.name} would be prepared, and holds what is not a model's ({some(foreign)}); "
            "name another target, or move it"
        )
    with _locked(folder, target):
        pass


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """A folder that one run at a time works in; the system forgets the lock when the run ends, however it does."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetExistsError(f"another run is writing {target}; wait for it, or name another") from error
        except OSError:  # a file system without locks, as some that are shared; then there is none
            pass
        yield
    finally:
        os.close(descriptor)
