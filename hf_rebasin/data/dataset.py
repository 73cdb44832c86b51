"""Rows of a dataset: where they are, which split, which column; streamed, and the same each time they are read.

Images stay bytes until somebody asks for them, so passing over a row costs next to nothing.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import OptionError, nearest, some

Row: TypeAlias = dict[str, Any]
Files: TypeAlias = str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]]

READERS = ("arrow", "csv", "imagefolder", "json", "parquet", "text", "webdataset")
LABELS = ("label", "labels", "fine_label")
CONTENTS = {
    "text": ("text", "sentence", "content", "document", "review", "sms", "tweet"),
    "image": ("image", "img", "picture", "pixel_values", "jpg", "png"),
}


@dataclass(frozen=True, eq=False)
class Rows:
    """What a dataset holds in one split; every `iter` begins anew.

    Args:
        name: what messages call it.
        stream: of `datasets`, with images left undecoded.
        kinds: `{column: "text", "image", or what else it holds}`.
        features: `{column: its type in datasets}`; empty where files do not say.
        repository: its id on the Hub; None for local files.
        commit: of the repository; None for local files, and offline where the cache does not say.
        tokens: `{repository: token}` for images that lie there one by one.
    """

    name: str
    stream: Any = field(repr=False)
    kinds: Mapping[str, str]
    features: Mapping[str, Any] = field(repr=False)
    repository: str | None = None
    commit: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.stream)

    def column(self, named: str | None, kind: str) -> str:
        """The column of texts or images: the one that is named, else the only sensible one.

        Raises:
            OptionError: no such column, one of something else, or several that it could be.
        """
        if named is not None:
            self.refuse_missing(named)
            if self.kinds[named] != kind:
                raise OptionError(
                    f"column {named!r} of {self.name} holds {self.kinds[named]}, and the model takes {kind}"
                )
            return named
        possible = [column for column, held in self.kinds.items() if held == kind and column not in LABELS]
        usual = [column for column in possible if column.lower() in CONTENTS[kind]]
        if len(usual or possible) != 1:
            held = ", ".join(f"{column} ({what})" for column, what in self.kinds.items())
            which = f"several columns of {kind}" if possible else f"no column of {kind}, which the model takes"
            raise OptionError(f"{self.name} has {which}; say which is meant (column) of {held}")
        return (usual or possible)[0]

    def label_column(self) -> str | None:
        """The column with a usual name for labels, if there is one.

        Raises:
            OptionError: there are several.
        """
        found = [column for column in LABELS if column in self.kinds]
        if len(found) > 1:
            raise OptionError(f"{self.name} has several columns of labels; say which is meant (labels): {some(found)}")
        return found[0] if found else None

    def refuse_missing(self, column: str) -> None:
        """Raise OptionError for a column that there is not."""
        if column not in self.kinds:
            raise OptionError(f"{self.name} has no column {column!r}{nearest(column, self.kinds)}")

    def image(self, value: Any) -> Any:
        """A PIL image of what a column of images holds."""
        import datasets

        try:
            return datasets.Image().decode_example(value, token_per_repo_id=dict(self.tokens))
        except Exception as error:  # whatever the code reading it stumbles on
            path = value.get("path") if isinstance(value, dict) else None
            raise OptionError(f"an image of {self.name} ({path or 'no name'}) cannot be read: {error}") from error


def open_rows(
    dataset: str,
    *,
    name: str | None = None,
    files: Files | None = None,
    revision: str | None = None,
    split: str = "train",
    streaming: bool = True,
    shuffle: int = 0,
    seed: int = 0,
    token: str | None = None,
) -> Rows:
    """Open a dataset and read its first rows; the arguments are those of `hf_rebasin.data.batches.DataSettings`.

    Raises:
        OptionError: no such dataset, revision, configuration or split; files that cannot be read, or without rows.
    """
    place = _place(dataset, files, revision, token)
    found = _saved(dataset, name, place) or _splits(dataset, name, place, streaming, token)
    if split not in found:
        raise OptionError(f"{dataset} has no split {split!r}{nearest(split, found)}")
    stream = found[split]
    if hasattr(stream, "to_iterable_dataset"):  # it is not streamed already
        stream = stream.to_iterable_dataset()
    if stream.features is not None:
        stream = stream.decode(False)
    if shuffle:
        stream = stream.shuffle(seed=seed, buffer_size=shuffle)
    try:
        first = list(islice(iter(stream), 16))
    except Exception as error:  # a broken file raises whatever the code reading it stumbles on
        raise OptionError(f"{dataset} cannot be read: {_line(error)}") from error
    if not first:
        raise OptionError(f"split {split!r} of {dataset} has no rows")
    features = dict(stream.features or {})
    kinds = {column: _kind(features.get(column), [row.get(column) for row in first]) for column in first[0]}
    tokens = {place.repository: token} if place.repository and token else {}
    commit = place.commit or _in_the_cache(dataset, name, place)
    return Rows(dataset, stream, kinds, features, place.repository, commit, tokens)


@dataclass(frozen=True)
class _Place:
    """What `load_dataset` is told."""

    path: str
    files: Any = None
    repository: str | None = None
    revision: str | None = None
    commit: str | None = None


def _place(dataset: str, files: Files | None, revision: str | None, token: str | None) -> _Place:
    local = Path(dataset).expanduser()
    globbed = glob.has_magic(dataset) and not local.exists()
    if local.exists() or globbed:
        if revision is not None:
            raise OptionError(f"{dataset} is here and has no revision {revision!r}; only what is on the Hub has")
        if local.is_dir():
            return _Place(str(local.absolute()), _patterns(files))
        if files is not None:
            raise OptionError(f"{dataset} names files already; say them there or in files, not in both")
        return _Place(*_file_or_glob(dataset, local, globbed))
    if "/" not in dataset and dataset in READERS:
        if files is None:
            raise OptionError(f"{dataset} reads files; say which (files)")
        return _Place(dataset, _patterns(files))
    repository, at, said = dataset.rpartition("@")
    if at and revision is not None:
        raise OptionError(f"{dataset} has a revision, and {revision!r} is said, too; say one of them")
    repository = repository if at else dataset
    wanted = said if at else revision
    return _Place(repository, _patterns(files), repository, wanted, _commit(repository, wanted, token))


def _file_or_glob(dataset: str, local: Path, globbed: bool) -> tuple[str, str]:
    """The folder it is in, and the pattern from there."""
    if not globbed:
        return str(local.absolute().parent), glob.escape(local.name)
    parts = local.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:fixed])
    if not any(Path(found).is_file() for found in glob.iglob(str(local), recursive=True)):
        raise OptionError(f"{dataset} matches no file")
    return str(folder.absolute()), str(Path(*parts[fixed:]))


def _patterns(files: Files | None) -> Any:
    """What `datasets` calls data_files; of a folder, all that is in it."""
    if isinstance(files, Mapping):
        return {split: _patterns(those) for split, those in files.items()}
    if isinstance(files, str):
        return str(Path(files) / "**") if Path(files).is_dir() else files
    return None if files is None else [_patterns(one) for one in files]


def _commit(repository: str, revision: str | None, token: str | None) -> str | None:
    """The commit of a repository on the Hub; None where the Hub is not asked, because this is offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    try:
        return str(HfApi(token=token).dataset_info(repository, revision=revision).sha)
    except OfflineModeIsEnabled:
        return None
    except RevisionNotFoundError as error:
        raise OptionError(f"the dataset {repository} has no revision {revision!r} on the Hub") from error
    except Exception as error:  # of the Hub, of a connection, of a name that cannot be one
        beside = Path(repository).parent
        known = [*READERS, *(str(beside / path.name) for path in (beside.iterdir() if beside.is_dir() else ()))]
        close = nearest(repository, known)
        raise OptionError(
            f"{repository!r} is neither a file or folder here nor a dataset on the Hub that can be read "
            f"({type(error).__name__}){close if 'did you mean' in close else ''}"
        ) from error


def _in_the_cache(dataset: str, name: str | None, place: _Place) -> str | None:
    """Offline, the commit that the rows are of: `datasets` takes what it loaded last, whatever is asked for."""
    if place.repository is None:
        return None
    import datasets
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import RevisionResolutionError

    hashed = datasets.load_dataset_builder(place.path, name, data_files=place.files).hash or ""
    commit = hashed if re.fullmatch("[0-9a-f]{40}", hashed) else None
    if place.revision is None:
        return commit
    try:
        wanted = resolve_revision(
            place.repository, repo_type="dataset", revision=place.revision, local_files_only=True
        ).resolved
    except RevisionResolutionError:  # a branch or tag that nobody asked the Hub for
        return commit
    if wanted != commit:
        raise OptionError(
            f"{dataset} at {place.revision} ({wanted}) is not in the cache of datasets, which has "
            f"{commit or 'a version of it that it does not name'}, and this is offline (HF_HUB_OFFLINE is set)"
        )
    return commit


def _saved(dataset: str, name: str | None, place: _Place) -> Mapping[str, Any] | None:
    """The splits of what `save_to_disk` of `datasets` wrote; None where a folder is something else."""
    if not any((Path(place.path) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return None
    if name is not None or place.files is not None:
        raise OptionError(f"{dataset} was written by save_to_disk and has no configurations or files to choose from")
    import datasets

    saved = datasets.load_from_disk(place.path)
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}


def _splits(dataset: str, name: str | None, place: _Place, streaming: bool, token: str | None) -> Mapping[str, Any]:
    import datasets

    said: dict[str, Any] = {"data_files": place.files, "revision": place.commit, "token": token}
    try:
        return dict(datasets.load_dataset(place.path, name, streaming=streaming, **said))
    except Exception as error:  # of datasets, of the Hub, of a connection, of a file
        if isinstance(error, ValueError):
            known = datasets.get_dataset_config_names(place.path, **said)
            if name is not None and name not in known:
                raise OptionError(f"{dataset} has no configuration {name!r} (name){nearest(name, known)}") from error
            if name is None and len(known) > 1:
                raise OptionError(f"{dataset} has several configurations; say which (name): {some(known)}") from error
        raise OptionError(f"{dataset} cannot be opened: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """An error of somebody else's, and what it was caused by, cut to a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' * (len(text) > 200)}"


def _kind(feature: Any, values: Sequence[Any]) -> str:
    """What a column holds, by its type in `datasets`, else by its first values."""
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    if kind == "Value":
        return "text" if "string" in feature.dtype else str(feature.dtype)
    if feature is not None:
        return kind
    found = sorted({type(value).__name__ for value in values if value is not None})
    return "text" if found == ["str"] else " or ".join(found) or "nothing"
