"""Translate mergekit's files into recipes, and refuse what recipes do not support.

Most keys are the same in both. mergekit ignores unknown keys; here they are mistakes, as in any recipe. What a file
means where the two differ is its `convention`: mergekit's if it has nothing that changes a merge but mergekit's own
keys, and that of this package otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeAlias, get_args

from .. import registry
from ..errors import UnknownNameError, nearest
from ..registry import MergeMethod

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]

# Keys that make a file a recipe of this package; those that are left out do not change what is merged.
OWN_KEYS = ("vocabulary", "backbone_only", "data", "refit", "recalibrate")
NO_ADAPTERS = (
    "adapters are not merged; merge it into its base first (merge_and_unload in peft) and name what that saved"
)
NO_UNION = "vocabularies are not united here; leave it out, and the merge has the tokenizer of the first model"
NO_TOKENS = "tokens are not added or changed here; leave it out, and change the tokenizer of the result"


def translate(raw: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Translate the content of a mergekit file; return the recipe, and a message for each part that is refused."""
    recipe, refused = dict(raw), list[str]()
    recipe.pop("name", None)  # names one of several merges in a file
    if recipe.get("parameters", {}) is None:
        del recipe["parameters"]
    _name_convention(recipe)
    if recipe["convention"] == "mergekit":
        recipe = _lift_default(_with_plain_values(recipe))
    if isinstance(models := recipe.get("models"), list | tuple):
        recipe["models"] = [_read_entry(model, f"models.{i}", refused) for i, model in enumerate(models)]
    if isinstance(slices := recipe.get("slices"), list | tuple):
        recipe["slices"] = [_read_slice(piece, f"slices.{i}", refused) for i, piece in enumerate(slices)]
    if isinstance(modules := recipe.get("modules"), Mapping):
        recipe["modules"] = {name: _read_module(part, f"modules.{name}", refused) for name, part in modules.items()}
    if recipe.get("base_model") is not None:
        recipe["base_model"] = _read_entry({"model": recipe["base_model"]}, "base_model", refused)["model"]
    with suppress(UnknownNameError):
        method = registry.merge_method(str(recipe.get("merge_method", "linear")))
        recipe = _without_prefix(recipe, f"{method.name}_", method)
        _add_base_model(recipe, method)
    refused += _read_tokenizer(recipe)
    refused += _read_dtype(recipe)
    return recipe, refused


def _name_convention(recipe: dict[Any, Any]) -> None:
    """Write down whose conventions a file follows, if it does not say so."""
    entries = recipe.get("models")
    models = [model for model in entries if isinstance(model, Mapping)] if isinstance(entries, list | tuple) else []
    parameters = recipe.get("parameters")
    own = (
        any(key in recipe for key in OWN_KEYS)
        or not isinstance(recipe.get("align", False), bool)
        or any("base" in model for model in models)
        or (isinstance(parameters, Mapping) and "weights" in parameters)
    )
    recipe.setdefault("convention", "own" if own else "mergekit")


def _with_plain_values(raw: Any) -> Any:
    """Return the content of a file with the values of all `parameters` as recipes write them.

    mergekit also takes a single entry with a filter for a list of them, and one number in a list for the number.
    """
    if isinstance(raw, list | tuple):
        return [_with_plain_values(item) for item in raw]
    if not isinstance(raw, Mapping):
        return raw
    return {
        key: {name: _read_value(content) for name, content in value.items()}
        if key == "parameters" and isinstance(value, Mapping)
        else _with_plain_values(value)
        for key, value in raw.items()
    }


def _read_value(value: Any) -> Any:
    entries = [value] if isinstance(value, Mapping) and "value" in value else value
    if not isinstance(entries, list | tuple):
        return entries
    if len(entries) == 1 and not isinstance(entries[0], list | tuple | Mapping):
        return entries[0]
    if all(isinstance(entry, str | int | float) for entry in entries):
        with suppress(ValueError):  # YAML reads 1e-3 as a word
            return [float(entry) if isinstance(entry, str) else entry for entry in entries]
    return [{**e, "value": _read_value(e["value"])} if isinstance(e, Mapping) and "value" in e else e for e in entries]


def _lift_default(recipe: dict[Any, Any]) -> dict[Any, Any]:
    """Return a file whose only module is `default`, which has all tensors, without that level."""
    modules = recipe.get("modules")
    if not isinstance(modules, Mapping) or list(modules) != ["default"] or "models" in recipe or "slices" in recipe:
        return recipe
    inner, outer = modules["default"], recipe.get("parameters") or {}
    own = inner.get("parameters") or {} if isinstance(inner, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(outer, Mapping):
        return recipe
    twice = [own[key] for key in own if key in outer]
    if any(isinstance(entry, Mapping) for value in twice if isinstance(value, list) for entry in value):
        return recipe  # filters may leave tensors to the outer level
    rest = {key: value for key, value in recipe.items() if key not in ("modules", "parameters")}
    return {**rest, **inner, "parameters": {**outer, **own}}


def _read_entry(raw: Any, where: str, refused: list[str]) -> Any:
    """Translate an entry of `models`; mergekit itself writes `{model: {model: {path: …, revision: …}}}`."""
    if not isinstance(raw, Mapping):
        return _read_entry({"model": raw}, where, refused)["model"]
    entry, model = dict(raw), raw.get("model")
    if isinstance(model, Mapping):
        parts = {key: value for key, value in model.items() if value is not None}
        if parts.pop("lora", None) is not None:
            refused.append(f"{where}: {NO_ADAPTERS}")
        path = parts.pop("model") if isinstance(parts.get("model"), Mapping) else {}
        parts |= {key: value for key, value in path.items() if value is not None}
        if parts.keys() <= {"path", "revision"} and "path" in parts:  # validation of the recipe reports anything else
            entry |= {"model" if key == "path" else key: value for key, value in parts.items()}
    name = entry["model"] if isinstance(entry.get("model"), str) else ""
    if "+" in name and not os.path.exists(name):
        refused.append(f"{where}: {name}: {NO_ADAPTERS}")
    if entry.get("parameters", {}) is None:
        del entry["parameters"]
    return entry


def _read_slice(raw: Any, where: str, refused: list[str]) -> Any:
    """Translate an entry of `slices`."""
    if not isinstance(raw, Mapping) or not isinstance(sources := raw.get("sources"), list | tuple):
        return raw
    entries = [_read_entry(entry, f"{where}.sources.{i}", refused) for i, entry in enumerate(sources)]
    return {**{key: value for key, value in raw.items() if value is not None}, "sources": entries}


def _read_module(raw: Any, where: str, refused: list[str]) -> Any:
    """Translate an entry of `modules`."""
    if not isinstance(raw, Mapping):
        return raw
    part = dict(raw)
    if isinstance(models := part.get("models"), list | tuple):
        part["models"] = [_read_entry(model, f"{where}.models.{i}", refused) for i, model in enumerate(models)]
    if isinstance(slices := part.get("slices"), list | tuple):
        part["slices"] = [_read_slice(piece, f"{where}.slices.{i}", refused) for i, piece in enumerate(slices)]
    return part


def _without_prefix(raw: Any, prefix: str, method: MergeMethod) -> Any:
    """Return all `parameters` in a file without the name of the method in front: `nuslerp_flatten` is `flatten`."""
    if isinstance(raw, list | tuple):
        return [_without_prefix(item, prefix, method) for item in raw]
    if not isinstance(raw, Mapping):
        return raw
    return {
        key: {
            name.removeprefix(prefix) if str(name).removeprefix(prefix) in method.parameters else name: content
            for name, content in value.items()
        }
        if key == "parameters" and isinstance(value, Mapping)
        else _without_prefix(value, prefix, method)
        for key, value in raw.items()
    }


def _model_names(recipe: Mapping[Any, Any]) -> list[Any]:
    models = recipe.get("models")
    entries = models if isinstance(models, list | tuple) else ()
    return [entry.get("model") if isinstance(entry, Mapping) else entry for entry in entries]


def _add_base_model(recipe: dict[Any, Any], method: MergeMethod) -> None:
    """List the base model among the models where mergekit makes it one of them, of methods that merge no differences.

    Of two models that a number `t` lies between, the base is the first; in an average it is one more model, which
    needs a weight then.
    """
    base, names = recipe.get("base_model"), _model_names(recipe)
    if method.base != "none" or not isinstance(base, str) or not names or base in names:
        return
    parameters = recipe.get("parameters")
    weighted = isinstance(parameters, Mapping) and parameters.get("weight") is not None
    if "t" in method.parameters and len(names) == 1:
        recipe["models"] = [base, *recipe["models"]]
    elif recipe["convention"] == "mergekit" and (weighted or method.name != "linear"):
        recipe["models"] = [*recipe["models"], base]


def tolerated_parameters() -> frozenset[str]:
    """Return the names of parameters that mergekit's files may have for any method, and that it ignores for others."""
    known = {"density", "rescale", "embed_slerp"}  # the last is in many files, and does nothing in any version
    for name in registry.names("merge method"):
        method = registry.merge_method(name)
        known |= method.parameters.keys() | method.per_model.keys()
        known |= {f"{name}_{parameter}" for parameter in method.parameters}
    return frozenset(known)


def _read_tokenizer(recipe: dict[Any, Any]) -> Iterator[str]:
    """Replace the source of the tokenizer by `vocabulary`, and yield a message if it is not the first model."""
    source, settings = recipe.pop("tokenizer_source", None), recipe.pop("tokenizer", None)
    where = "tokenizer_source" if settings is None else "tokenizer"
    if source is not None and settings is not None:
        yield "tokenizer: given twice, here and as tokenizer_source"
        return
    if isinstance(settings, Mapping):
        for key in (key for key, value in settings.items() if key != "source" and value):
            known = ("source", "tokens", "pad_to_multiple_of")
            yield f"tokenizer.{key}: {NO_TOKENS if key in known else f'no such key{nearest(str(key), known)}'}"
        source = settings.get("source")
    elif settings is not None:
        source = settings
    if isinstance(source, Mapping):
        source = _read_entry({"model": source}, where, [])["model"]
    base = recipe.get("base_model") or _first_model(recipe)
    if source == "union":
        yield f"{where}: {NO_UNION}"
    elif source not in (None, "base") and str(source).removeprefix("model:") != base:
        yield f"{where}: {source!r} is not the first model, whose tokenizer the merge has; make it the base_model"
    elif source is not None:  # mergekit matches rows by token then, and takes those of the base where another has none
        recipe.setdefault("vocabulary", "first")


def _first_model(recipe: Any) -> Any:
    """Return the name of the first model in a file, wherever it stands."""
    if isinstance(recipe, Mapping):
        if isinstance(recipe.get("model"), str):
            return recipe["model"]
        parts = [recipe[key] for key in ("models", "slices", "sources", "modules") if recipe.get(key)]
        return next(iter(map(_first_model, parts)), None) if parts else _first_model([*recipe.values()])
    if isinstance(recipe, list | tuple):
        return next(iter(filter(None, map(_first_model, recipe))), None)
    return recipe if isinstance(recipe, str) else None


def _read_dtype(recipe: dict[Any, Any]) -> Iterator[str]:
    """Check the dtypes; in recipes of this package, where sums are always wide, `out_dtype` is the dtype."""
    known = get_args(Dtype)
    out, dtype = recipe.get("out_dtype"), recipe.get("dtype")
    if out is not None and out not in known:
        recipe.pop("out_dtype")
        yield f"out_dtype: {out!r} is not one of {', '.join(known)}"
    elif recipe["convention"] != "mergekit" and "out_dtype" in recipe and dtype in (None, *known):
        recipe["dtype"] = recipe.pop("out_dtype") or dtype
