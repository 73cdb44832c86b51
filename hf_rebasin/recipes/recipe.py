"""Recipes: merges described in YAML, in mergekit's keys and a few more.

The further keys are `align`, `data`, `refit`, `recalibrate`, `evaluate` and `publish`.

    models:
      - model: me/bert-seed-0
      - model: me/bert-seed-1
        parameters: {weight: 0.5}
    merge_method: linear
    align: {solver: weight_matching, seed: 0}
    dtype: bfloat16

All mistakes in a recipe are reported at once, before anything is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import registry
from ..alignment.compatibility import is_aspect
from ..alignment.limits import Groups, Limits
from ..alignment.rows import Vocabulary
from ..data.batches import DataSettings
from ..errors import OptionError, RecipeError, UnknownNameError, nearest, quoted
from ..merging.parameters import ResolvedMethod, Varying, read_parameter, resolve_method
from ..registry import keywords_of, read_keywords
from .mergekit import Dtype, describe_missing_method, translate
from .yaml_reader import MAX_BYTES, read_yaml


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelParameters(_StrictModel):
    """Parameters of one model of a recipe; a weight may vary by tensor."""

    weight: Any = None

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, raw: Any) -> Any:
        value = read_parameter(float | None, raw)
        return raw if isinstance(value, Varying) else value  # so that a recipe is written as it was read


class ModelEntry(_StrictModel):
    """One model of a recipe; a plain string is short for `{model: string}`, and `id@revision` for both."""

    model: str
    revision: str | None = None
    parameters: ModelParameters = ModelParameters()


class AlignSettings(BaseModel):
    """How the models are aligned before they are merged; further keys are options of the solver."""

    model_config = ConfigDict(frozen=True, extra="allow")

    solver: str = "weight_matching"
    seed: int = Field(default=0, ge=0, lt=2**63)
    groups: Groups = "full"
    keep_tied: bool = False
    hold: tuple[str, ...] = ()

    def limits(self) -> Limits:
        """Return the limits of what the solver may move."""
        return Limits(self.groups, self.keep_tied, self.hold)

    def options(self) -> dict[str, Any]:
        """Return the options of the solver."""
        return dict(self.model_extra or {})


class RefitSettings(_StrictModel):
    """How the layers of a merge are fitted to the outputs of the merged models; see `hf_rebasin.refit`."""

    ridge: float = Field(default=1e-3, gt=0)


class EvaluateSettings(DataSettings):
    """Data that a merge is measured on, and the number of points on the line between two models (0: no line)."""

    points: int = Field(default=25, ge=0)
    metrics: tuple[str, ...] | None = None

    @field_validator("points")
    @classmethod
    def _check_points(cls, points: int) -> int:
        if points == 1:
            raise ValueError("a line has two ends; give 2 or more points, or 0 for no line")
        return points


def _check_aspect(aspect: str) -> str:
    if not is_aspect(aspect):
        raise ValueError("input should be 'config', 'config:KEY' for one setting, 'labels' or 'vocabulary'")
    return aspect


Aspect = Annotated[str, AfterValidator(_check_aspect)]


class PublishSettings(_StrictModel):
    """Where a merge is published; see `hf_rebasin.publish`."""

    to: str
    private: bool = True
    license: str | None = None
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None


class Recipe(_StrictModel):
    """A complete description of a merge.

    Args:
        models: folders or Hub ids; the first gives keys, shapes, dtypes, configuration and tokenizer.
        merge_method: name of a file of `hf_rebasin/merging/methods/`.
        base_model: the model that stays fixed and comes first; by default the first one.
        parameters: parameters of the merge method, such as `t`; numbers may vary by tensor, see
            `hf_rebasin.merging.parameters`.
        align: how the other models are brought to the first one's coordinates; `false` leaves them as they are.
        assume: aspects that are taken as equal without checking: `config` (or one setting, `config:KEY`), `labels`,
            `vocabulary`.
        vocabulary: which rows of tokens the result has where the models have other tokens, or other numbers of rows:
            `first` for the first model's, its own ones where another model has none; `common` to cut its padding to
            the rows that all models have. By default such models are refused.
        backbone_only: keep the first model's head; the other models may have another head, or none.
        dtype: dtype of the result; by default the first model's.
        data: data that solvers, `refit` and `recalibrate` use while merging. Solvers that minimise a loss use labels
            if there are any.
        refit: fit the layers of the merge to the outputs of the merged models; `true`, or `{ridge: …}`.
        recalibrate: `statistics` (of BatchNorm layers; the default with data), `repair`, or `false`.
        evaluate: data that the merge is measured on: `{split: test}`, or whatever else differs from `data`.
        publish: repository that the merge is published to, `org/name`, or `{to: …, license: …}`.

    Example:
        >>> recipe = Recipe.from_dict({"models": ["a", "b"], "merge_method": "lerp", "parameters": {"t": 0.3}})
        >>> recipe.align.solver
        'weight_matching'
        >>> Recipe.from_dict({"models": ["a", "b"], "merge_metod": "lerp"})
        Traceback (most recent call last):
        hf_rebasin.errors.RecipeError: the recipe has 1 mistake:
          merge_metod: no such key; did you mean 'merge_method'?
    """

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    merge_method: str = "linear"
    base_model: str | None = None
    parameters: dict[str, Any] = {}
    align: AlignSettings | None = AlignSettings()
    assume: tuple[Aspect, ...] = ()
    vocabulary: Vocabulary | None = None
    backbone_only: bool = False
    dtype: Dtype | None = None
    data: DataSettings | None = None
    refit: RefitSettings | None = None
    recalibrate: Literal["statistics", "repair"] | None = "statistics"
    evaluate: EvaluateSettings | None = None
    publish: PublishSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete_evaluate(cls, raw: Any) -> Any:
        """Complete `evaluate` by the keys of `data`, except `labels: false`, as a loss needs labels."""
        data, evaluate = (raw.get(key) for key in ("data", "evaluate"))
        data = {"dataset": data} if isinstance(data, str) else data
        if isinstance(data, Mapping) and isinstance(evaluate, Mapping) and "dataset" not in evaluate:
            defaults = {name: value for name, value in data.items() if (name, value) != ("labels", False)}
            return {**raw, "evaluate": {**defaults, **evaluate}}
        return raw

    @field_validator("data", "evaluate", mode="before")
    @classmethod
    def _expand_data(cls, raw: Any) -> Any:
        return {"dataset": raw} if isinstance(raw, str) else raw

    @field_validator("publish", mode="before")
    @classmethod
    def _expand_publish(cls, raw: Any) -> Any:
        return {"to": raw} if isinstance(raw, str) else raw

    @field_validator("refit", mode="before")
    @classmethod
    def _expand_refit(cls, raw: Any) -> Any:
        return {True: {}, False: None}[raw] if isinstance(raw, bool) else raw

    @field_validator("recalibrate", mode="before")
    @classmethod
    def _expand_recalibrate(cls, raw: Any) -> Any:
        return {True: "statistics", False: None}[raw] if isinstance(raw, bool) else raw

    @field_validator("models", mode="before")
    @classmethod
    def _expand_models(cls, models: Any) -> Any:
        def expand(entry: Any) -> Any:
            entry = {"model": entry} if isinstance(entry, str) else entry
            if isinstance(entry, dict) and isinstance(entry.get("model"), str) and not Path(entry["model"]).exists():
                model, at, revision = entry["model"].rpartition("@")
                if at and "revision" not in entry:
                    return entry | {"model": model, "revision": revision}
            return entry

        return [expand(entry) for entry in models] if isinstance(models, list | tuple) else models

    @field_validator("align", mode="before")
    @classmethod
    def _expand_align(cls, align: Any) -> Any:
        return {True: {}, False: None}.get(align, align) if isinstance(align, bool) else align

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Recipe:
        """Read a YAML recipe; a single RecipeError lists all its mistakes."""
        try:
            with open(path, "rb") as file:
                raw = read_yaml(file.read(MAX_BYTES + 1), str(path))
        except OSError as error:
            raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
        except OptionError as error:
            raise RecipeError(str(error)) from error
        return Recipe.from_dict(raw, name=str(path))

    @staticmethod
    def from_dict(raw: Any, name: str = "the recipe") -> Recipe:
        """Check a recipe; a single RecipeError lists all its mistakes."""
        if not isinstance(raw, Mapping):
            raise RecipeError(f"{name} is not a mapping of keys to values")
        raw, mistakes = translate(raw)
        try:
            recipe = Recipe.model_validate(raw)
        except ValidationError as error:
            recipe = None
            invalid = _mistakes_in(error)  # slices, which are refused already, stand in place of models
            mistakes += [mistake for mistake in invalid if not mistakes or mistake != "models: field required"]
        mistakes += [*_unknown_names(raw), *_missing_data(raw)]
        if mistakes or recipe is None:
            lines = "".join(f"\n  {mistake}" for mistake in mistakes)
            raise RecipeError(f"{name} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:{lines}")
        return recipe

    def in_order(self) -> tuple[ModelEntry, ...]:
        """Return the models, the fixed one first."""
        return tuple(self.models[i] for i in self._order())

    def _order(self) -> list[int]:
        def names(entry: ModelEntry) -> tuple[str, str]:
            return entry.model, f"{entry.model}@{entry.revision}"

        return sorted(range(len(self.models)), key=lambda i: self.base_model not in (None, *names(self.models[i])))

    @property
    def fits(self) -> bool:
        """Whether layers are fitted to data."""
        return self.refit is not None or registry.merge_method(self.merge_method).finish is not None

    def resolved_method(self) -> ResolvedMethod:
        """Return the merge method with its parameters."""
        return resolve_method(self.merge_method, self.method_parameters())

    def method_parameters(self) -> dict[str, Any]:
        """Return the parameters of the merge method; weights of single models become its `weights`."""
        weights = [entry.parameters.weight for entry in self.in_order()]
        if all(weight is None for weight in weights):
            parameters = dict(self.parameters)
            if len(parameters.get("weights") or ()) == len(self.models):  # listed in the order of the recipe
                parameters["weights"] = [parameters["weights"][i] for i in self._order()]
            return parameters
        return {"weights": [1.0 if weight is None else weight for weight in weights], **self.parameters}


_MODELS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "models": ModelEntry,
    "parameters": ModelParameters,
    "data": DataSettings,
    "refit": RefitSettings,
    "evaluate": EvaluateSettings,
    "publish": PublishSettings,
}


def make_publish_settings(**values: Any) -> PublishSettings:
    """Make settings of values; OptionError lists everything that is wrong with them."""
    try:
        return PublishSettings(**values)
    except ValidationError as error:
        raise OptionError(f"publish: {'; '.join(_mistakes_in(error))}") from error


def _mistakes_in(error: ValidationError) -> list[str]:
    return [_mistake(e["loc"], e["type"], e["msg"]) for e in error.errors()]


def _mistake(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    path = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        parents = [str(part) for part in loc[:-1] if isinstance(part, str)]
        known = _MODELS[parents[-1] if parents else ""].model_fields
        return f"{path}: no such key{nearest(str(loc[-1]), known)}"
    message = message.removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]}"


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


def _unknown_names(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield mistakes that types do not catch, in methods, solvers, parameters, options and the base model."""
    method = raw.get("merge_method", "linear")
    parameters = raw.get("parameters") or {}
    try:
        merge = registry.merge_method(str(method)).merge
        known = keywords_of(merge)
        values, mistakes = read_keywords(merge, parameters if isinstance(parameters, Mapping) else {}, read_parameter)
        for parameter, message in mistakes.items():
            yield f"parameters.{parameter}: {message}"
        models = raw.get("models")
        entries = [m for m in models if isinstance(m, Mapping)] if isinstance(models, list | tuple) else []
        weighted = [m for m in entries if isinstance(m.get("parameters"), Mapping) and "weight" in m["parameters"]]
        if weighted and "weights" not in known:
            yield f"models: {method} takes no weight per model; its parameters are {', '.join(known)}"
        if weighted and isinstance(parameters, Mapping) and "weights" in parameters:
            yield "parameters.weights: weights are given twice, here and with the models"
        varying = [f"parameters.{parameter}" for parameter, value in values.items() if isinstance(value, Varying)]
        varying += ["models.parameters.weight"] * any(isinstance(m["parameters"]["weight"], list) for m in weighted)
        if varying and (raw.get("refit") or fits_whole_models(str(method)) or raw.get("recalibrate") == "repair"):
            yield f"{varying[0]}: fits to data take one number for all tensors; give one number, or fit nothing"
    except UnknownNameError as error:
        yield f"merge_method: {describe_missing_method(str(method)) or error}"
    align = raw.get("align")
    if isinstance(align, Mapping):
        try:
            solver = registry.solver(str(align.get("solver", "weight_matching")))
            align_fields = AlignSettings.model_fields
            options, mistakes = read_keywords(solver, {k: v for k, v in align.items() if k not in align_fields})
            for option, message in mistakes.items():
                yield f"align.{option}: {message}"
            if not mistakes:
                yield from _option_conflicts(solver, options)
        except UnknownNameError as error:
            yield f"align.solver: {error}"
    base, models = raw.get("base_model"), raw.get("models")
    if base is not None and isinstance(models, list):
        named = [m.get("model") if isinstance(m, Mapping) else m for m in models]
        names = [name for name in named if isinstance(name, str)]
        pinned = [f"{m['model']}@{m['revision']}" for m in models if isinstance(m, Mapping) and "revision" in m]
        if base not in (*names, *pinned) and base not in [name.rpartition("@")[0] for name in names]:
            yield f"base_model: {quoted(base)} is not one of the models{nearest(str(base), names)}"
