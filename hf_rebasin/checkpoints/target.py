"""Target folders: refused where something would be lost, and replaced so that they are complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, TargetExistsError, listed
from .folder import (
    INDEX,
    MARKER,
    PROVENANCE,
    SINGLE,
    is_record_file,
    is_weights,
    read_checksums,
    read_modules,
)
from .json_files import read_json
from .side_files import is_known_side_file


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


def _final_name(name: str) -> str:
    """Return the name that a file gets in the end, also for one that a killed run left (`write_atomically`)."""
    partial = name.startswith(".") and name.endswith(".partial")
    return name[1 : -len(".partial")] if partial else name


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
