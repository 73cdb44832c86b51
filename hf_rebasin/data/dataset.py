"""Rows of a dataset: finding them, and choosing split and columns; they are streamed, and the same in every pass.

Images are decoded only on demand, so skipping a row costs next to nothing.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import OptionError, listed, nearest

DatasetRow: TypeAlias = dict[str, Any]
Files: TypeAlias = str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]]

FILE_READERS = ("arrow", "csv", "imagefolder", "json", "parquet", "text", "webdataset")
LABEL_COLUMNS = ("label", "labels", "fine_label")
CONTENT_COLUMNS = {
    "text": ("text", "sentence", "content", "document", "review", "sms", "tweet"),
    "image": ("image", "img", "picture", "pixel_values", "jpg", "png"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """The rows of one split of a dataset; every `iter` starts from the first.

    Args:
        name: name of the dataset in messages.
        stream: dataset of `datasets`, with images not decoded.
        kinds: `{column: "text", "image", or another type}`.
        features: `{column: its feature in datasets}`; empty if the files do not declare any.
        repository: id on the Hub; None for local files.
        commit: commit of the repository; None for local files, and if offline the cache does not tell.
        tokens: `{repository: token}` for images that are separate files there.
    """

    name: str
    stream: Any = field(repr=False)
    kinds: Mapping[str, str]
    features: Mapping[str, Any] = field(repr=False)
    repository: str | None = None
    commit: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[DatasetRow]:
        return iter(self.stream)

    def choose_column(self, column: str | None, kind: str) -> str:
        """Return the column of texts or images: the given one, or else the only one that makes sense.

        Raises:
            OptionError: no such column, one of another kind, or several candidates.
        """
        if column is not None:
            self.refuse_missing(column)
            if self.kinds[column] != kind:
                raise OptionError(
                    f"column {column!r} of {self.name} holds {self.kinds[column]}, and the model takes {kind}"
                )
            return column
        possible = [name for name, held in self.kinds.items() if held == kind and name not in LABEL_COLUMNS]
        usual = [name for name in possible if name.lower() in CONTENT_COLUMNS[kind]]
        if len(usual or possible) != 1:
            columns = ", ".join(f"{name} ({held})" for name, held in self.kinds.items())
            problem = f"several columns of {kind}" if possible else f"no column of {kind}, which the model takes"
            raise OptionError(f"{self.name} has {problem}; say which is meant (column) of {columns}")
        return (usual or possible)[0]

    def find_label_column(self) -> str | None:
        """Return the column with a usual name for labels, if there is one.

        Raises:
            OptionError: there are several.
        """
        columns = [column for column in LABEL_COLUMNS if column in self.kinds]
        if len(columns) > 1:
            raise OptionError(
                f"{self.name} has several columns of labels; say which is meant (labels): {listed(columns)}"
            )
        return columns[0] if columns else None

    def refuse_missing(self, column: str) -> None:
        """Raise OptionError for a column that does not exist."""
        if column not in self.kinds:
            raise OptionError(f"{self.name} has no column {column!r}{nearest(column, self.kinds)}")

    def decode_image(self, value: Any) -> Any:
        """Decode a value of a column of images to a PIL image."""
        import datasets

        try:
            return datasets.Image().decode_example(value, token_per_repo_id=dict(self.tokens))
        except Exception as error:  # decoders raise errors of any type
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
    """Open a dataset and read its first rows.

    The arguments are the fields of `hf_rebasin.data.batches.DataSettings`, and a token for the Hub.

    Raises:
        OptionError: no such dataset, revision, configuration or split; files that cannot be read, or without rows.
    """
    source = _locate(dataset, files, revision, token)
    splits = _load_saved(dataset, name, source) or _load_splits(dataset, name, source, streaming, token)
    if split not in splits:
        raise OptionError(f"{dataset} has no split {split!r}{nearest(split, splits)}")
    stream = splits[split]
    if hasattr(stream, "to_iterable_dataset"):  # it is not a stream already
        stream = stream.to_iterable_dataset()
    if stream.features is not None:
        stream = stream.decode(False)
    if shuffle:
        stream = stream.shuffle(seed=seed, buffer_size=shuffle)
    try:
        first = list(islice(iter(stream), 16))
    except Exception as error:  # broken files raise errors of any type
        raise OptionError(f"{dataset} cannot be read: {_one_line(error)}") from error
    if not first:
        raise OptionError(f"split {split!r} of {dataset} has no rows")
    features = dict(stream.features or {})
    kinds = {column: _column_kind(features.get(column), [row.get(column) for row in first]) for column in first[0]}
    return Rows(
        name=dataset,
        stream=stream,
        kinds=kinds,
        features=features,
        repository=source.repository,
        commit=source.commit or _find_cached_commit(dataset, name, source),
        tokens={source.repository: token} if source.repository and token else {},
    )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Arguments of `datasets.load_dataset`, and where on the Hub the rows are from."""

    path: str
    files: Any = None
    repository: str | None = None
    revision: str | None = None
    commit: str | None = None


def _locate(dataset: str, files: Files | None, revision: str | None, token: str | None) -> _Source:
    local = Path(dataset).expanduser()
    globbed = glob.has_magic(dataset) and not local.exists()
    if local.exists() or globbed:
        if revision is not None:
            raise OptionError(
                f"{dataset} is a local path and has no revision {revision!r}; only datasets on the Hub have one"
            )
        if local.is_dir():
            return _Source(path=str(local.absolute()), files=_data_files(files))
        if files is not None:
            raise OptionError(f"{dataset} names files already; give them there or in files, not in both")
        folder, pattern = _split_pattern(dataset, local, globbed)
        return _Source(path=folder, files=pattern)
    if "/" not in dataset and dataset in FILE_READERS:
        if files is None:
            raise OptionError(f"{dataset} reads files; say which (files)")
        return _Source(path=dataset, files=_data_files(files))
    before, at, after = dataset.rpartition("@")
    if at and revision is not None:
        raise OptionError(f"{dataset} has a revision, and {revision!r} is given, too; give only one of them")
    repository, revision = (before, after) if at else (dataset, revision)
    return _Source(
        path=repository,
        files=_data_files(files),
        repository=repository,
        revision=revision,
        commit=_find_commit(repository, revision, token),
    )


def _split_pattern(dataset: str, local: Path, globbed: bool) -> tuple[str, str]:
    """Split a file or pattern into its folder and the pattern within it."""
    if not globbed:
        return str(local.absolute().parent), glob.escape(local.name)
    parts = local.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:fixed])
    if not any(Path(path).is_file() for path in glob.iglob(str(local), recursive=True)):
        raise OptionError(f"{dataset} matches no file")
    return str(folder.absolute()), str(Path(*parts[fixed:]))


def _data_files(files: Files | None) -> Any:
    """Return the `data_files` argument of `datasets`; a folder stands for everything in it."""
    if isinstance(files, Mapping):
        return {split: _data_files(patterns) for split, patterns in files.items()}
    if isinstance(files, str):
        return str(Path(files) / "**") if Path(files).is_dir() else files
    return None if files is None else [_data_files(pattern) for pattern in files]


def _find_commit(repository: str, revision: str | None, token: str | None) -> str | None:
    """Ask the Hub for the commit of a repository; None when offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    try:
        return str(HfApi(token=token).dataset_info(repository, revision=revision).sha)
    except OfflineModeIsEnabled:
        return None
    except RevisionNotFoundError as error:
        raise OptionError(f"the dataset {repository} has no revision {revision!r} on the Hub") from error
    except Exception as error:  # from the Hub, the connection, or an impossible name
        parent = Path(repository).parent
        known = [*FILE_READERS, *(str(parent / path.name) for path in (parent.iterdir() if parent.is_dir() else ()))]
        close = nearest(repository, known)
        raise OptionError(
            f"{repository!r} is neither a local file or folder nor a dataset on the Hub that can be read "
            f"({type(error).__name__}){close if 'did you mean' in close else ''}"
        ) from error


def _find_cached_commit(dataset: str, name: str | None, source: _Source) -> str | None:
    """Find the commit that rows are of when offline: `datasets` takes what it loaded last, whatever is asked for."""
    if source.repository is None:
        return None
    import datasets
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import RevisionResolutionError

    hashed = datasets.load_dataset_builder(source.path, name, data_files=source.files).hash or ""
    commit = hashed if re.fullmatch("[0-9a-f]{40}", hashed) else None
    if source.revision is None:
        return commit
    try:
        wanted = resolve_revision(
            source.repository, repo_type="dataset", revision=source.revision, local_files_only=True
        ).resolved
    except RevisionResolutionError:  # a branch or tag that was never resolved online
        return commit
    if wanted != commit:
        raise OptionError(
            f"{dataset} at {source.revision} ({wanted}) is not in the cache of datasets, which has "
            f"{commit or 'a version of it that it does not name'}, and this is offline (HF_HUB_OFFLINE is set)"
        )
    return commit


def _load_saved(dataset: str, name: str | None, source: _Source) -> Mapping[str, Any] | None:
    """Load the splits that `save_to_disk` of `datasets` wrote; None if the path is not such a folder."""
    if not any((Path(source.path) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return None
    if name is not None or source.files is not None:
        raise OptionError(f"{dataset} was written by save_to_disk and has no configurations or files to choose from")
    import datasets

    saved = datasets.load_from_disk(source.path)
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}


def _load_splits(
    dataset: str, name: str | None, source: _Source, streaming: bool, token: str | None
) -> Mapping[str, Any]:
    import datasets

    options: dict[str, Any] = {"data_files": source.files, "revision": source.commit, "token": token}
    try:
        return dict(datasets.load_dataset(source.path, name, streaming=streaming, **options))
    except Exception as error:  # from datasets, the Hub, the connection, or a file
        if isinstance(error, ValueError):
            known = datasets.get_dataset_config_names(source.path, **options)
            if name is not None and name not in known:
                raise OptionError(f"{dataset} has no configuration {name!r} (name){nearest(name, known)}") from error
            if name is None and len(known) > 1:
                raise OptionError(
                    f"{dataset} has several configurations; say which (name): {listed(known)}"
                ) from error
        raise OptionError(f"{dataset} cannot be opened: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """Format the root cause of an error as one short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' * (len(text) > 200)}"


def _column_kind(feature: Any, values: Sequence[Any]) -> str:
    """Tell the kind of a column by its feature in `datasets`, or else by its first values."""
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    if kind == "Value":
        return "text" if "string" in feature.dtype else str(feature.dtype)
    if feature is not None:
        return kind
    types = sorted({type(value).__name__ for value in values if value is not None})
    return "text" if types == ["str"] else " or ".join(types) or "nothing"
