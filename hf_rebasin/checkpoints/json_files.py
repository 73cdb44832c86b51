"""JSON files of models: read with the numbers that JSON has not, and changed without touching what stays equal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

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
        write_utf8(file, json.dumps(after, indent=2, sort_keys=not before) + "\n")


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


def write_utf8(file: Path, text: str) -> None:
    """Write a text with the same bytes on every system, as they are hashed."""
    file.write_bytes(text.encode())
