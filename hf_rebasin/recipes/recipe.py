"""Recipes: a merge as a YAML file, in mergekit's words plus `align`, `data`, `refit`, `recalibrate`,
`evaluate` and `publish`.

    models:
      - model: me/bert-seed-0
      - model: me/bert-seed-1
        parameters: {weight: 0.5}
    merge_method: linear
    align: {solver: weight_matching, seed: 0}
    dtype: bfloat16

Everything that is wrong with a recipe is said at once, before anything is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import registry
from ..alignment.limits import Groups, Limits
from ..data.batches import DataSettings
from ..errors import OptionError, RecipeError, UnknownNameError, nearest, shown
from ..merging.parameters import Varying, reading
from ..registry import knobs_of, read_knobs
from .mergekit import Dtype, not_here, translated
from .yaml_reader import LONGEST, read_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelParameters(_Strict):
    """What a recipe may say about one model; a weight may be another one for other tensors."""

    weight: Any = None

    @field_validator("weight")
    @classmethod
    def _numbers(cls, said: Any) -> Any:
        value = reading(float | None, said)
        return said if isinstance(value, Varying) else value  # a recipe is written as it was said


class ModelEntry(_Strict):
    """One model of a recipe; a plain string is short for `{model: string}`, and `id@revision` for both."""

    model: str
    revision: str | None = None
    parameters: ModelParameters = ModelParameters()


class AlignSettings(BaseModel):
    """How the models are aligned before they are merged; further keys are knobs of the solver."""

    model_config = ConfigDict(frozen=True, extra="allow")

    solver: str = "weight_matching"
    seed: int = Field(default=0, ge=0, lt=2**63)
    groups: Groups = "full"
    keep_tied: bool = False
    hold: tuple[str, ...] = ()

    def limits(self) -> Limits:
        return Limits(self.groups, self.keep_tied, self.hold)

    def knobs(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RefitSettings(_Strict):
    """How the layers of a merge are fitted to what the merged models say; see `hf_rebasin.merging.methods.refit`."""

    ridge: float = Field(default=1e-3, gt=0)


class EvaluateSettings(DataSettings):
    """What a merge is measured on: data, and how many points of the line between two models (0: none)."""

    points: int = Field(default=25, ge=0)
    metrics: tuple[str, ...] | None = None

    @field_validator("points")
    @classmethod
    def _two_ends(cls, points: int) -> int:
        if points == 1:
            raise ValueError("a line has two ends; give 2 or more points, or 0 for no line")
        return points


class PublishSettings(_Strict):
    """Where a merge is published; see `hf_rebasin.publish`."""

    to: str
    private: bool = True
    license: str | None = None
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None


class Recipe(_Strict):
    """A merge, said completely.

    Args:
        models: folders or Hub ids; the first gives keys, shapes, dtypes, configuration and tokenizer.
        merge_method: a file of `hf_rebasin/merging/methods/`.
        base_model: which of the models stays fixed and comes first; by default the first.
        parameters: of the merge method, such as `t`; numbers may vary by tensor (`hf_rebasin.merging.parameters`).
        align: how the other models are brought to the first one's coordinates; `false` leaves them as they are.
        assume: what is taken for the same without looking: `config`, `labels`, `vocabulary`.
        backbone_only: keep the first model's head; the others may have another, or none.
        dtype: of the result, by default that of the first model.
        data: what is looked at while merging, by solvers, `refit` and `recalibrate`. Solvers that descend a loss take
            labels where there are any.
        refit: fit the layers of the merge to what the merged models say; `true`, or `{ridge: …}`.
        recalibrate: `statistics` (of BatchNorm layers; with data the default), `repair`, or `false`.
        evaluate: what the merge is measured on, `{split: test}` or whatever else is different from `data`.
        publish: the repository that the merge goes to, `org/name`, or `{to: …, license: …}`.

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
    assume: tuple[Literal["config", "labels", "vocabulary"], ...] = ()
    backbone_only: bool = False
    dtype: Dtype | None = None
    data: DataSettings | None = None
    refit: RefitSettings | None = None
    recalibrate: Literal["statistics", "repair"] | None = "statistics"
    evaluate: EvaluateSettings | None = None
    publish: PublishSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _evaluate_like_data(cls, said: Any) -> Any:
        """What `evaluate` does not say is as in `data`, but that there are no labels: a loss needs them."""
        data, evaluate = (said.get(key) for key in ("data", "evaluate"))
        data = {"dataset": data} if isinstance(data, str) else data
        if isinstance(data, Mapping) and isinstance(evaluate, Mapping) and "dataset" not in evaluate:
            alike = {name: value for name, value in data.items() if (name, value) != ("labels", False)}
            return {**said, "evaluate": {**alike, **evaluate}}
        return said

    @field_validator("data", "evaluate", mode="before")
    @classmethod
    def _short_data(cls, said: Any) -> Any:
        return {"dataset": said} if isinstance(said, str) else said

    @field_validator("publish", mode="before")
    @classmethod
    def _short_publish(cls, said: Any) -> Any:
        return {"to": said} if isinstance(said, str) else said

    @field_validator("refit", mode="before")
    @classmethod
    def _refit_or_not(cls, said: Any) -> Any:
        return {True: {}, False: None}[said] if isinstance(said, bool) else said

    @field_validator("recalibrate", mode="before")
    @classmethod
    def _recalibrate_or_not(cls, said: Any) -> Any:
        return {True: "statistics", False: None}[said] if isinstance(said, bool) else said

    @field_validator("models", mode="before")
    @classmethod
    def _short_entries(cls, models: Any) -> Any:
        def entry(said: Any) -> Any:
            said = {"model": said} if isinstance(said, str) else said
            if isinstance(said, dict) and isinstance(said.get("model"), str) and not Path(said["model"]).exists():
                model, at, revision = said["model"].rpartition("@")
                if at and "revision" not in said:
                    return said | {"model": model, "revision": revision}
            return said

        return [entry(said) for said in models] if isinstance(models, list | tuple) else models

    @field_validator("align", mode="before")
    @classmethod
    def _switch(cls, align: Any) -> Any:
        return {True: {}, False: None}.get(align, align) if isinstance(align, bool) else align

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Recipe:
        """Read a YAML recipe; all its mistakes raise one RecipeError."""
        try:
            with open(path, "rb") as file:
                said = read_yaml(file.read(LONGEST + 1), str(path))
        except OSError as error:
            raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
        except OptionError as error:
            raise RecipeError(str(error)) from error
        return Recipe.from_dict(said, name=str(path))

    @staticmethod
    def from_dict(said: Any, name: str = "the recipe") -> Recipe:
        """Check a recipe; all its mistakes raise one RecipeError."""
        if not isinstance(said, Mapping):
            raise RecipeError(f"{name} is no mapping of keys to values")
        said, mistakes = translated(said)
        try:
            recipe = Recipe.model_validate(said)
        except ValidationError as error:
            recipe = None
            found = _mistakes_in(error)
            mistakes += [one for one in found if not mistakes or one != "models: field required"]  # but slices of some
        mistakes += [*_unknown_names(said), *_without_data(said)]
        if mistakes or recipe is None:
            lines = "".join(f"\n  {mistake}" for mistake in mistakes)
            raise RecipeError(f"{name} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:{lines}")
        return recipe

    def in_order(self) -> tuple[ModelEntry, ...]:
        """The models, the fixed one first."""
        return tuple(self.models[i] for i in self._order())

    def _order(self) -> list[int]:
        def said(entry: ModelEntry) -> tuple[str, str]:
            return entry.model, f"{entry.model}@{entry.revision}"

        return sorted(range(len(self.models)), key=lambda i: self.base_model not in (None, *said(self.models[i])))

    @property
    def fits(self) -> bool:
        """Whether layers are fitted to data."""
        return self.refit is not None or finishes(self.merge_method)

    def method_knobs(self) -> dict[str, Any]:
        """The parameters of the merge method; weights that are said per model become its `weights`."""
        weights = [entry.parameters.weight for entry in self.in_order()]
        if all(weight is None for weight in weights):
            knobs = dict(self.parameters)
            if len(knobs.get("weights") or ()) == len(self.models):  # they are said in the order of the models
                knobs["weights"] = [knobs["weights"][i] for i in self._order()]
            return knobs
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


def publishing(**said: Any) -> PublishSettings:
    """Settings with these values; OptionError lists what is wrong with them."""
    try:
        return PublishSettings(**said)
    except ValidationError as error:
        raise OptionError(f"publish: {'; '.join(_mistakes_in(error))}") from error


def _mistakes_in(error: ValidationError) -> list[str]:
    return [_mistake(e["loc"], e["type"], e["msg"]) for e in error.errors()]


def _mistake(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    path = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        words = [str(part) for part in loc[:-1] if isinstance(part, str)]
        known = _MODELS[words[-1] if words else ""].model_fields
        return f"{path}: no such key{nearest(str(loc[-1]), known)}"
    message = message.removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]}"


def _unfitting(solver: Callable[..., Any], knobs: Mapping[str, Any]) -> Iterator[str]:
    """Knobs whose values do not go together, or name what there is not."""
    try:
        solver(**knobs)
    except (OptionError, UnknownNameError) as error:
        yield f"align: {error}"


def finishes(method: str) -> bool:
    """Whether a merge method goes on with the whole merge, looking at data; not if there is no such method."""
    with suppress(UnknownNameError):
        return hasattr(registry.find("merge_methods", method), "finish")
    return False


def _without_data(said: Mapping[str, Any]) -> Iterator[str]:
    """What needs data where there are none, or whole models where there are backbones."""
    needing = {
        "refit": bool(said.get("refit")),
        "merge_method": finishes(str(said.get("merge_method", "linear"))),
        "recalibrate": said.get("recalibrate") == "repair",
    }
    for key in (key for key, needed in needing.items() if needed and said.get("backbone_only")):
        yield f"{key}: it computes with whole models, so backbone_only cannot go with it"
    with suppress(UnknownNameError):
        for place, name, _ in solvers_in(said.get("align")):
            needing[place] = getattr(registry.find("solvers", name).Solver, "NEEDS_DATA", False)
    for key in (key for key, needed in needing.items() if needed and not said.get("data")):
        yield f"{key}: it looks at data, and there are none; say which (data)"


def solvers_in(align: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Where in a recipe a solver is named, which, and its knobs: that of `align`, and where it starts from, if one."""
    place = "align"
    while isinstance(align, Mapping):
        yield f"{place}.solver", str(align.get("solver", "weight_matching")), align
        place, align = f"{place}.start", align.get("start")
    if isinstance(align, str) and align != "identity":
        yield place, align, {}


def _unknown_names(said: Mapping[str, Any]) -> Iterator[str]:
    """What the types cannot say: methods, solvers and their parameters, and a base that is one of the models."""
    method = said.get("merge_method", "linear")
    parameters = said.get("parameters") or {}
    try:
        merge = registry.find("merge_methods", str(method)).merge
        knobs = knobs_of(merge)
        values, wrong = read_knobs(merge, parameters if isinstance(parameters, Mapping) else {}, reading)
        for knob, message in wrong.items():
            yield f"parameters.{knob}: {message}"
        models = said.get("models")
        entries = [m for m in models if isinstance(m, Mapping)] if isinstance(models, list | tuple) else []
        weighted = [m for m in entries if isinstance(m.get("parameters"), Mapping) and "weight" in m["parameters"]]
        if weighted and "weights" not in knobs:
            yield f"models: {method} takes no weight per model; its parameters are {', '.join(knobs)}"
        if weighted and isinstance(parameters, Mapping) and "weights" in parameters:
            yield "parameters.weights: weights are said twice, here and with the models"
        varying = [f"parameters.{knob}" for knob, value in values.items() if isinstance(value, Varying)]
        varying += ["models.parameters.weight"] * any(isinstance(m["parameters"]["weight"], list) for m in weighted)
        if varying and (said.get("refit") or finishes(str(method)) or said.get("recalibrate") == "repair"):
            yield f"{varying[0]}: what is fitted to data takes one number for all tensors; give that, or fit nothing"
    except UnknownNameError as error:
        yield f"merge_method: {not_here(str(method)) or error}"
    align = said.get("align")
    if isinstance(align, Mapping):
        try:
            solver = registry.find("solvers", str(align.get("solver", "weight_matching"))).Solver
            own = AlignSettings.model_fields
            knobs_given, wrong = read_knobs(solver, {k: v for k, v in align.items() if k not in own})
            for knob, message in wrong.items():
                yield f"align.{knob}: {message}"
            if not wrong:
                yield from _unfitting(solver, knobs_given)
        except UnknownNameError as error:
            yield f"align.solver: {error}"
    base, models = said.get("base_model"), said.get("models")
    if base is not None and isinstance(models, list):
        said_names = [m.get("model") if isinstance(m, Mapping) else m for m in models]
        names = [name for name in said_names if isinstance(name, str)]
        pinned = [f"{m['model']}@{m['revision']}" for m in models if isinstance(m, Mapping) and "revision" in m]
        if base not in (*names, *pinned) and base not in [name.rpartition("@")[0] for name in names]:
            yield f"base_model: {shown(base)} is not one of the models{nearest(str(base), names)}"
