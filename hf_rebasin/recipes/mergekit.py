"""mergekit's files of the `models:` form, in the words of a recipe; what they ask for that is not here is refused.

Gradients, filters and most keys are the same in both. mergekit passes over keys it does not know; here they are
mistakes, as everywhere in a recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeAlias, get_args

from .. import registry
from ..errors import UnknownNameError, nearest
from ..registry import knobs_of

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]

METHODS = {  # mergekit's that are not here: names that are near to some of them say something else
    *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"),
    *("karcher", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "sce"),
    *("task_arithmetic", "ties"),
}
SLICES = "layers are not cut out of models here; list the whole models under models, without layer_range"
ADAPTER = "adapters are not merged; merge it into its base first (merge_and_unload in peft) and name what that saved"
UNION = "vocabularies are not united here; leave it out, and the merge has the tokenizer of the first model"
TOKENS = "tokens are not added or changed here; leave it out, and change the tokenizer of the result"
TEMPLATE = "the merge has the chat template of the first model; leave it out, and set another one on its tokenizer"


def not_here(method: str) -> str:
    """What is said of a method that mergekit has and this has not; nothing of any other."""
    known = ", ".join(registry.names("merge_methods"))
    return f"{method!r} of mergekit is not here; known: {known}" if method in METHODS else ""


def translated(said: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """(the same as a recipe, what of it cannot be done here)."""
    recipe, refused = dict(said), list[str]()
    recipe.pop("name", None)  # of one among several merges
    for key in ("slices", "modules"):
        if recipe.pop(key, None) is not None:
            refused.append(f"{key}: {SLICES}")
    if isinstance(models := recipe.get("models"), list | tuple):
        recipe["models"] = [_entry(model, f"models.{i}", refused) for i, model in enumerate(models)]
    if recipe.get("base_model") is not None:
        recipe["base_model"] = _entry({"model": recipe["base_model"]}, "base_model", refused)["model"]
    _add_base(recipe)
    _spread_parameters(recipe)
    refused += _tokenizer(recipe)
    if recipe.pop("chat_template", None) is not None:
        refused.append(f"chat_template: {TEMPLATE}")
    refused += _dtype(recipe)
    return recipe, refused


def _entry(said: Any, where: str, refused: list[str]) -> Any:
    """An entry of a recipe; `{model: {model: {path: …, revision: …}}}` is how mergekit writes what it has read."""
    if not isinstance(said, Mapping):
        return _entry({"model": said}, where, refused)["model"]
    entry, model = dict(said), said.get("model")
    if isinstance(model, Mapping):
        inside = {key: one for key, one in model.items() if one is not None}
        if inside.pop("lora", None) is not None:
            refused.append(f"{where}: {ADAPTER}")
        path = inside.pop("model") if isinstance(inside.get("model"), Mapping) else {}
        inside |= {key: one for key, one in path.items() if one is not None}
        if inside.keys() <= {"path", "revision"} and "path" in inside:  # of anything else it is said what it should be
            entry |= {"model" if key == "path" else key: one for key, one in inside.items()}
    name = entry["model"] if isinstance(entry.get("model"), str) else ""
    if "+" in name and not os.path.exists(name):
        refused.append(f"{where}: {name}: {ADAPTER}")
    return entry


def _names(recipe: Mapping[Any, Any]) -> list[Any]:
    models = recipe.get("models")
    entries = models if isinstance(models, list | tuple) else ()
    return [entry.get("model") if isinstance(entry, Mapping) else entry for entry in entries]


def _add_base(recipe: dict[Any, Any]) -> None:
    """The base is one of the two models of a method that goes from one to another, also where it is no entry."""
    base, names = recipe.get("base_model"), _names(recipe)
    with suppress(UnknownNameError):
        knobs = knobs_of(registry.find("merge_methods", str(recipe.get("merge_method", "linear"))).merge)
        if isinstance(base, str) and len(names) == 1 and base != names[0] and "weights" not in knobs:
            recipe["models"] = [base, *recipe["models"]]


def _spread_parameters(recipe: dict[Any, Any]) -> None:
    """A weight for all models is that of those that say none, and of the tensors for which they say none."""
    if not isinstance(recipe.get("parameters"), Mapping):
        return
    parameters = dict(recipe["parameters"])
    parameters.pop("int8_mask", None)  # how masks are kept that none of the methods here has
    if isinstance(recipe.get("models"), list) and parameters.get("weight") is not None:
        general = parameters.pop("weight")
        recipe["models"] = [_weighted(entry, general) for entry in recipe["models"]]
    recipe["parameters"] = parameters


def _weighted(said: Any, general: Any) -> Any:
    entry = dict(said) if isinstance(said, Mapping) else {"model": said}
    own = entry.get("parameters", {})
    if not isinstance(own, Mapping):
        return entry
    weight = own.get("weight")
    if weight is None:
        weight = general
    elif isinstance(weight, list) and all(
        isinstance(one, Mapping) and (one.get("filter") or "*") != "*" for one in weight
    ):
        filtered = isinstance(general, list) and any(isinstance(one, Mapping) for one in general)
        weight = [*weight, *(general if filtered else [{"value": general}])]
    return entry | {"parameters": {**own, "weight": weight}}


def _tokenizer(recipe: dict[Any, Any]) -> Iterator[str]:
    """What is wrong with the source of the tokenizer, which is the first model."""
    source, more = recipe.pop("tokenizer_source", None), recipe.pop("tokenizer", None)
    where = "tokenizer_source" if more is None else "tokenizer"
    if source is not None and more is not None:
        yield "tokenizer: it is said twice, here and as tokenizer_source"
        return
    if isinstance(more, Mapping):
        for key in (key for key, one in more.items() if key != "source" and one):
            known = ("source", "tokens", "pad_to_multiple_of")
            yield f"tokenizer.{key}: {TOKENS if key in known else f'no such key{nearest(str(key), known)}'}"
        source = more.get("source")
    elif more is not None:
        source = more
    if isinstance(source, Mapping):
        source = _entry({"model": source}, where, [])["model"]
    base = recipe.get("base_model") or next(iter(_names(recipe)), None)
    if source == "union":
        yield f"{where}: {UNION}"
    elif source not in (None, "base") and str(source).removeprefix("model:") != base:
        yield f"{where}: {source!r} is not the first model, whose tokenizer the merge has; make it the base_model"


def _dtype(recipe: dict[Any, Any]) -> Iterator[str]:
    """What is written is `out_dtype`; `dtype` beside it is what mergekit computes in, which here is wide anyway."""
    out, known = recipe.pop("out_dtype", None), get_args(Dtype)
    if out is not None and out not in known:
        yield f"out_dtype: {out!r} is none of {', '.join(known)}"
    elif out is not None and recipe.get("dtype") in (None, *known):
        recipe["dtype"] = out
