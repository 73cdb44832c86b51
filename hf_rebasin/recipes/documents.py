"""Recipes of several documents: merges that go into other merges.

    name: two
    models: [{model: org/a}, {model: org/b}]
    merge_method: slerp
    ---
    models: [{model: two}, {model: org/c}]
    merge_method: linear

A document with a name is merged first, and the name, used as a model, means its result. The result of the file is
that of the document without a name, or of the last one if all have names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import hub
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import read_json, write_utf8
from ..errors import CheckpointError, RebasinError, RecipeError, listed, quoted
from .recipe import Recipe, read_recipe_file


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document of a recipe file.

    Args:
        name: name by which other documents use its result; None if it has none.
        recipe: the recipe.
    """

    name: str | None
    recipe: Recipe

    def inputs(self, names: Sequence[str]) -> list[str]:
        """Return those names that the recipe uses as models."""
        used = {entry.model for entry in self.recipe.in_order()}
        return [name for name in names if name in used]

    def with_results_in(self, folder: Path, names: Sequence[str]) -> Recipe:
        """Return the recipe with the folders of results in place of their names."""
        ids = [(entry.model, entry.revision) for entry in self.recipe.in_order()]
        return self.recipe.renamed({i: (str(folder / i[0]), None) if i[0] in names else i for i in ids})


def read_documents(path: str | os.PathLike[str]) -> list[Document]:
    """Read all documents of a YAML file, in an order in which every one comes after those whose results it uses.

    Raises:
        RecipeError: mistakes in a document, or documents that use each other in a circle or cannot be told apart.
    """
    contents = read_recipe_file(path) or [None]
    documents = []
    for i, raw in enumerate(contents):
        where = str(path) if len(contents) == 1 else f"document {i + 1} of {path}"
        name = raw.get("name") if isinstance(raw, Mapping) else None
        if name is not None and not _is_file_name(name):
            raise RecipeError(f"{where}: name {quoted(name)} cannot be the name of a folder")
        documents.append(Document(name=name, recipe=Recipe.from_dict(raw, name=where)))
    if len(documents) == 1:
        return documents
    unnamed = [document for document in documents if document.name is None]
    if len(unnamed) > 1:
        raise RecipeError(f"{path} has {len(unnamed)} documents without a name; at most one may be without")
    names = [document.name for document in documents if document.name is not None]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise RecipeError(f"{path} has several documents with the name {quoted(twice[0])}")
    return _sort(documents, unnamed[0] if unnamed else documents[-1], names, str(path))


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\\" not in name


def _sort(documents: Sequence[Document], last: Document, names: Sequence[str], path: str) -> list[Document]:
    done: list[Document] = []
    waiting = [document for document in documents if document is not last] + [last]
    while waiting:
        finished = {document.name for document in done}
        ready = [d for d in waiting if set(d.inputs(names)) <= finished and (d is not last or len(waiting) == 1)]
        if not ready:
            circle = [document.name or "the one without a name" for document in waiting]
            raise RecipeError(f"{path}: documents use each other's results in a circle: {listed(circle)}")
        done.append(ready[0])
        waiting.remove(ready[0])
    return done


def is_unchanged(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder holds the result of a recipe, and neither has changed since `remember` was called."""
    try:
        return read_json(_memory(folder)) == _describe(folder, recipe)
    except (CheckpointError, OSError):
        return False


def remember(folder: Path, recipe: Recipe) -> None:
    """Write down, beside a folder, of which recipe and which files it is the result."""
    write_utf8(_memory(folder), json.dumps(_describe(folder, recipe), indent=2) + "\n")


def _memory(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _describe(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Describe a result by its recipe, and by the commits or the sizes and times of all files."""
    inputs = {}
    for entry in recipe.in_order():
        path = Path(entry.model).expanduser()
        key = f"{entry.model}@{entry.revision}" if entry.revision else entry.model
        inputs[key] = _files(path) if path.is_dir() else _commit(entry.model, entry.revision)
    content = recipe.model_dump(mode="json", exclude={"publish", "evaluate"})
    return {"recipe": content, "inputs": inputs, "result": _files(folder)}


def _commit(model: str, revision: str | None) -> str | None:
    with hub.pin_commits():
        try:
            return Checkpoint.open(model, revision=revision, values=False).commit
        except RebasinError:
            return None


def _files(folder: Path) -> dict[str, list[int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
