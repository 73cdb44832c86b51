"""Mistakes in recipes that types do not catch: names, parameters and options that do not fit each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from .. import registry
from ..errors import OptionError, UnknownNameError, nearest, quoted
from ..merging.parameters import read_parameter, varies
from ..registry import MergeMethod, keywords_of, read_keywords
from .mergekit import tolerated_parameters

logger = logging.getLogger(__name__)


def find_mistakes(raw: Mapping[str, Any], align_fields: Collection[str]) -> list[str]:
    """Return a message for every mistake in a recipe that its types do not catch.

    Args:
        raw: content of the recipe, in this package's own keys.
        align_fields: keys of `align` that are not options of its solver.
    """
    return [*_method_mistakes(raw), *_align_mistakes(raw.get("align"), align_fields), *_missing_data(raw)]


def _option_conflicts(solver: Callable[..., Any], options: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message if options of a solver contradict each other, or name something unknown."""
    try:
        solver(**options)
    except (OptionError, UnknownNameError) as error:
        yield f"align: {error}"


def fits_whole_models(method: str) -> bool:
    """Tell whether a merge method fits the whole merge to data; False if there is no such method."""
    with suppress(UnknownNameError):
        return registry.merge_method(method).finish is not None
    return False


def _missing_data(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every key that needs data if there are none, or whole models if there are backbones."""
    cut = next((key for key in ("slices", "modules") if raw.get(key)), None)
    if cut is not None:
        whole = {
            "merge_method": fits_whole_models(str(raw.get("merge_method", "linear"))),
            "refit": bool(raw.get("refit")),
            "recalibrate": raw.get("recalibrate") == "repair",
        }
        for key in (key for key, fits in whole.items() if fits):
            yield f"{key}: it fits whole models to data; name them under models, not under {cut}"
    needs_data = {
        "refit": bool(raw.get("refit")),
        "merge_method": fits_whole_models(str(raw.get("merge_method", "linear"))),
        "recalibrate": raw.get("recalibrate") == "repair",
    }
    for key in (key for key, needed in needs_data.items() if needed and raw.get("backbone_only")):
        yield f"{key}: it runs whole models, so it cannot be combined with backbone_only"
    with suppress(UnknownNameError):
        for path, name, options in solvers_in(raw.get("align")):
            needs_data[path] = registry.solver(name).data == "required"
            if "cost" in keywords_of(registry.solver(name)):
                from ..solving.gradient_descent import WEIGHT_COSTS

                cost = path.removesuffix("solver") + "cost"
                needs_data[cost] = options.get("cost") not in (None, *WEIGHT_COSTS)
    for key in (key for key, needed in needs_data.items() if needed and not raw.get("data")):
        yield f"{key}: it needs data, and there are none; name them (data)"


def solvers_in(align: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (path in the recipe, solver, options) of the solver of `align`, and of those that it starts from."""
    path = "align"
    while isinstance(align, Mapping):
        yield f"{path}.solver", str(align.get("solver", "weight_matching")), align
        path, align = f"{path}.start", align.get("start")
    if isinstance(align, str) and align != "identity":
        yield path, align, {}


def _method_mistakes(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield mistakes in the merge method, its parameters on all levels, and the base model."""
    try:
        method = registry.merge_method(str(raw.get("merge_method", "linear")))
    except UnknownNameError as error:
        yield f"merge_method: {error}"
        return
    ignored: dict[str, list[str]] = {}
    any_varying, plural_given = [], False
    per_model_given: list[str] = []
    for path, level, of_one in _levels(raw):
        for parameter, value in level.items():
            where = f"{path}.{parameter}"
            if parameter == "int8_mask":  # how mergekit stores masks, of which there are none here
                continue
            known = set(method.per_model) if of_one else {*method.parameters, *method.per_model}
            if parameter in method.per_model.values() and not of_one:
                plural_given = True
            if parameter in known:
                kind = float | None if parameter in method.per_model else method.parameters[parameter]
                try:
                    if varies(read_parameter(kind, value)):
                        any_varying.append(where)
                except ValueError as error:
                    yield f"{where}: {error}"
                if parameter in method.per_model:
                    per_model_given.append(parameter)
            elif raw.get("convention") == "mergekit" and parameter in tolerated_parameters():
                ignored.setdefault(str(parameter), []).append(path)
            else:
                yield _unknown_parameter(method, path, str(parameter), of_one)
    for parameter, paths in ignored.items():
        logger.info("%s does nothing in %s (%s); mergekit passes over it, too", parameter, method.name, paths[0])
    file_level = raw.get("parameters")
    if plural_given and isinstance(file_level, Mapping):
        for one_model in dict.fromkeys(per_model_given):
            if method.per_model[one_model] in file_level:
                yield f"parameters.{method.per_model[one_model]}: given twice, here and with the models"
    if any_varying and (raw.get("refit") or method.finish is not None or raw.get("recalibrate") == "repair"):
        yield f"{any_varying[0]}: fits to data take one number for all tensors; give one number, or fit nothing"
    yield from _base_mistakes(raw, method)


def _levels(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield (path, parameters, whether they are those of one model) of all levels of a recipe."""
    for path, part, of_one in _parts(raw, ""):
        parameters = part.get("parameters")
        if isinstance(parameters, Mapping):
            yield f"{path}parameters", parameters, of_one


def _parts(raw: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    yield path, raw, False
    for key, of_one in (("models", True), ("sources", True), ("slices", False)):
        entries = raw.get(key)
        for i, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
            if isinstance(entry, Mapping):
                where = f"{path}{key}.{i}."
                yield from [(where, entry, True)] if of_one else _parts(entry, where)
    modules = raw.get("modules")
    for name, part in modules.items() if isinstance(modules, Mapping) else ():
        if isinstance(part, Mapping):
            yield from _parts(part, f"{path}modules.{name}.")


def _unknown_parameter(method: MergeMethod, path: str, parameter: str, of_one: bool) -> str:
    known = [*method.per_model] if of_one else [*method.parameters, *method.per_model]
    if of_one and parameter in method.parameters:
        return f"{path}.{parameter}: {method.name} takes one {parameter} for all models; give it under parameters"
    if of_one and not known:
        return (
            f"{path}.{parameter}: {method.name} takes no {parameter} per model; its parameters are "
            f"{', '.join(method.parameters)}"
        )
    return f"{path}.{parameter}: no such parameter of {method.name}{nearest(parameter, known)}"


def _base_mistakes(raw: Mapping[str, Any], method: MergeMethod) -> Iterator[str]:
    """Yield mistakes in the base model, and in the bases of single models."""
    base = raw.get("base_model")
    entries = [part for path, part, of_one in _parts(raw, "") if of_one]
    listed_models = raw.get("models")
    plain = listed_models if isinstance(listed_models, list | tuple) else ()
    entries += [{"model": entry} for entry in plain if isinstance(entry, str)]
    names = [entry["model"] for entry in entries if isinstance(entry.get("model"), str)]
    if method.base == "required" and base is None:
        yield (
            f"base_model: {method.name} merges differences from the model that was fine-tuned, and none is named; "
            "name it here, or by --base"
        )
    if any(entry.get("base") is not None for entry in entries) and (method.base == "none" or base is None):
        yield (
            f"base: {method.name} merges whole models; only methods that merge differences from a base_model, such as "
            "task_arithmetic, use the base of a model"
            if method.base == "none"
            else "base: the base of a model is aligned to base_model; name that, too"
        )
    if base is not None and method.base == "none" and entries:
        pinned = [f"{entry['model']}@{entry['revision']}" for entry in entries if "revision" in entry]
        if base not in (*names, *pinned) and base not in [name.rpartition("@")[0] for name in names]:
            weight = "; to average it with the others, list it with a weight" if "weight" in method.per_model else ""
            yield f"base_model: {quoted(base)} is not one of the models{nearest(str(base), names)}{weight}"
    if raw.get("convention") == "mergekit":
        yield from _repetitions(raw)


def _repetitions(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every list of models, or of the sources of a slice, that has a model twice."""
    for path, part, of_one in _parts(raw, ""):
        for key in () if of_one else ("models", "sources"):
            entries = part.get(key)
            names = []
            for entry in entries if isinstance(entries, list | tuple) else ():
                name, revision = entry, None
                if isinstance(entry, Mapping):
                    name, revision = entry.get("model"), entry.get("revision")
                names.append(name if revision is None else f"{name}@{revision}")
            if twice := [name for i, name in enumerate(names) if isinstance(name, str) and name in names[:i]]:
                yield f"{path}{key}: {twice[0]} is listed twice; give it once, with the sum of its weights"


def _align_mistakes(align: Any, align_fields: Collection[str]) -> Iterator[str]:
    """Yield mistakes in the solver and its options."""
    if not isinstance(align, Mapping):
        return
    try:
        solver = registry.solver(str(align.get("solver", "weight_matching")))
    except UnknownNameError as error:
        yield f"align.solver: {error}"
        return
    options, mistakes = read_keywords(keywords_of(solver), {k: v for k, v in align.items() if k not in align_fields})
    for option, message in mistakes.items():
        yield f"align.{option}: {message}"
    if not mistakes:
        yield from _option_conflicts(solver, options)
