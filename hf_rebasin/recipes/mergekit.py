"""Translate mergekit's files of the `models:` form into recipes, and refuse what recipes do not support.

Gradients, filters and most keys are the same in both. mergekit ignores unknown keys; here they are mistakes, as in any
recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeAlias, get_args

from .. import registry
from ..errors import UnknownNameError, nearest

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]

UNSUPPORTED_METHODS = {  # of mergekit; suggesting the nearest known name for them would mislead
    *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"),
    *("karcher", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "sce"),
    *("task_arithmetic", "ties"),
}
NO_SLICES = "layers are not cut out of models here; list the whole models under models, without layer_range"
NO_ADAPTERS = (
    "adapters are not merged; merge it into its base first (merge_and_unload in peft) and name what that saved"
)
NO_UNION = "vocabularies are not united here; leave it out, and the merge has the tokenizer of the first model"
NO_TOKENS = "tokens are not added or changed here; leave it out, and change the tokenizer of the result"
NO_TEMPLATE = "the merge has the chat template of the first model; leave it out, and set another one on its tokenizer"


def describe_missing_method(method: str) -> str:
    """Return the refusal of a method that only mergekit has; empty for any other name."""
    known = ", ".join(registry.names("merge method"))
    return f"{method!r} of mergekit is not here; known: {known}" if method in UNSUPPORTED_METHODS else ""


def translate(raw: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Translate the content of a mergekit file; return the recipe, and a message for each part that is refused."""
    recipe, refused = dict(raw), list[str]()
    recipe.pop("name", None)  # names one of several merges in a file
    for key in ("slices", "modules"):
        if recipe.pop(key, None) is not None:
            refused.append(f"{key}: {NO_SLICES}")
    if isinstance(models := recipe.get("models"), list | tuple):
        recipe["models"] = [_read_entry(model, f"models.{i}", refused) for i, model in enumerate(models)]
    if recipe.get("base_model") is not None:
        recipe["base_model"] = _read_entry({"model": recipe["base_model"]}, "base_model", refused)["model"]
    _add_base_model(recipe)
    _spread_parameters(recipe)
    refused += _read_tokenizer(recipe)
    if recipe.pop("chat_template", None) is not None:
        refused.append(f"chat_template: {NO_TEMPLATE}")
    refused += _read_dtype(recipe)
    return recipe, refused


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
    return entry


def _model_names(recipe: Mapping[Any, Any]) -> list[Any]:
    models = recipe.get("models")
    entries = models if isinstance(models, list | tuple) else ()
    return [entry.get("model") if isinstance(entry, Mapping) else entry for entry in entries]


def _add_base_model(recipe: dict[Any, Any]) -> None:
    """List the base model first if the method takes two models and the base is not one of the entries."""
    base, names = recipe.get("base_model"), _model_names(recipe)
    with suppress(UnknownNameError):
        known = registry.merge_method(str(recipe.get("merge_method", "linear"))).parameters
        if isinstance(base, str) and len(names) == 1 and base != names[0] and "weights" not in known:
            recipe["models"] = [base, *recipe["models"]]


def _spread_parameters(recipe: dict[Any, Any]) -> None:
    """Give a weight for all models to those without one, and to the tensors that their own filters leave out."""
    if not isinstance(recipe.get("parameters"), Mapping):
        return
    parameters = dict(recipe["parameters"])
    parameters.pop("int8_mask", None)  # a storage format for masks, which no method here has
    if isinstance(recipe.get("models"), list) and parameters.get("weight") is not None:
        general = parameters.pop("weight")
        recipe["models"] = [_with_weight(entry, general) for entry in recipe["models"]]
    recipe["parameters"] = parameters


def _with_weight(raw: Any, general: Any) -> Any:
    entry = dict(raw) if isinstance(raw, Mapping) else {"model": raw}
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, Mapping):
        return entry
    weight = parameters.get("weight")
    if weight is None:
        weight = general
    elif isinstance(weight, list) and all(
        isinstance(item, Mapping) and (item.get("filter") or "*") != "*" for item in weight
    ):
        filtered = isinstance(general, list) and any(isinstance(item, Mapping) for item in general)
        weight = [*weight, *(general if filtered else [{"value": general}])]
    return entry | {"parameters": {**parameters, "weight": weight}}


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
    base = recipe.get("base_model") or next(iter(_model_names(recipe)), None)
    if source == "union":
        yield f"{where}: {NO_UNION}"
    elif source not in (None, "base") and str(source).removeprefix("model:") != base:
        yield f"{where}: {source!r} is not the first model, whose tokenizer the merge has; make it the base_model"
    elif source is not None:  # mergekit matches rows by token then, and takes those of the base where another has none
        recipe.setdefault("vocabulary", "first")


def _read_dtype(recipe: dict[Any, Any]) -> Iterator[str]:
    """Take `out_dtype`, the dtype of the result; a `dtype` next to it is only the one mergekit computes in."""
    out, known = recipe.pop("out_dtype", None), get_args(Dtype)
    if out is not None and out not in known:
        yield f"out_dtype: {out!r} is not one of {', '.join(known)}"
    elif out is not None and recipe.get("dtype") in (None, *known):
        recipe["dtype"] = out
