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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import registry
from ..alignment.compatibility import is_aspect
from ..alignment.limits import Groups, Limits
from ..alignment.rows import Vocabulary
from ..data.batches import DataSettings
from ..errors import OptionError, RecipeError, nearest
from ..merging.parameters import REQUIRED, Convention, Layered, PerModel, ResolvedMethod, make_resolved, read_parameter
from ..registry import MergeMethod
from .mergekit import Dtype, translate
from .mistakes import find_mistakes
from .yaml_reader import MAX_BYTES, read_yaml_documents


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Parameters = dict[str, Any]


class _Named(_StrictModel):
    """What names a model: a string, or a mapping with `model`."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, raw: Any) -> Any:
        entry = {"model": raw} if isinstance(raw, str) else raw
        if isinstance(entry, Mapping) and isinstance(entry.get("model"), str) and "revision" not in entry:
            model, revision = split_name(entry["model"])
            if revision is not None:
                return {**entry, "model": model, "revision": revision}
        return entry


def split_name(name: str) -> tuple[str, str | None]:
    """Split `id@revision` into its parts; a path that exists is left whole."""
    model, at, revision = name.rpartition("@")
    return (model, revision) if at and not Path(name).exists() else (name, None)


def join_name(name: str, revision: str | None) -> str:
    """Return `id@revision`, or the name alone without a revision."""
    return name if revision is None else f"{name}@{revision}"


class ModelEntry(_Named):
    """One model of a recipe; a plain string is short for `{model: string}`, and `id@revision` for both.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        base: the model it was fine-tuned from, if that is not the recipe's `base_model`; aligned to that, it carries
            the difference over.
        layer_range: all of its layers, `[0, number]`; only `slices` cut layers out.
        parameters: parameters of the merge method for this model, such as `weight`; they may vary by tensor.
    """

    model: str
    revision: str | None = None
    base: str | None = None
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = {}


class SliceSource(_Named):
    """Layers of one model, from the first number of `layer_range` up to, and without, the second."""

    model: str
    revision: str | None = None
    layer_range: tuple[int, int]
    parameters: Parameters = {}


class Slice(_StrictModel):
    """Layers of the result, merged from equally many layers of every source."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _check_lengths(self) -> Slice:
        lengths = {source.layer_range[1] - source.layer_range[0] for source in self.sources}
        if len(lengths) > 1:
            ranges = "; ".join(f"{source.model} {list(source.layer_range)}" for source in self.sources)
            raise ValueError(f"sources of a slice need equally many layers each, got {ranges}")
        return self


class ModulePart(_StrictModel):
    """How one part of the models is merged, such as the text decoder of a vision-language model."""

    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _check_content(self) -> ModulePart:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give either models or slices")
        return self


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
        slices: in place of `models`, the layers of the result, each merged from layers of the models.
        modules: in place of `models`, the models of every part: `{vision_tower: {models: …}, text_decoder: …}`.
        merge_method: name of a file of `hf_rebasin/merging/methods/`.
        base_model: the model that stays fixed and comes first; by default the first one. Methods that merge
            differences take them from it, and it need not be one of the models then.
        parameters: parameters of the merge method, such as `t`; numbers may vary by tensor, see
            `hf_rebasin.merging.parameters`.
        convention: whose rules hold where this package and mergekit differ, `own` or `mergekit`; by default mergekit's
            for files that have none but mergekit's keys, see docs/methods.md.
        seed: seed of merge methods that draw random numbers.
        align: how the other models are brought to the first one's coordinates; `false` leaves them as they are.
        assume: aspects that are taken as equal without checking: `config` (or one setting, `config:KEY`), `labels`,
            `vocabulary`.
        vocabulary: which rows of tokens the result has where the models have other tokens, or other numbers of rows:
            `first` for the first model's, its own ones where another model has none; `common` to cut its padding to
            the rows that all models have. By default such models are refused.
        backbone_only: keep the first model's head; the other models may have another head, or none.
        dtype: dtype of the result; by default the first model's. By mergekit's convention, models are rounded to it
            before they are merged, and by default every tensor has the narrowest dtype that all models fit into.
        out_dtype: dtype of the result, if it is not `dtype`.
        chat_template: chat template of the result: a name (`chatml`), Jinja text, or `auto`, the models' most frequent
            one; by default the first model's.
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

    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: dict[str, ModulePart] = {}
    merge_method: str = "linear"
    base_model: str | None = None
    parameters: Parameters = {}
    convention: Convention = "own"
    seed: int = Field(default=0, ge=0, lt=2**63)
    align: AlignSettings | None = AlignSettings()
    assume: tuple[Aspect, ...] = ()
    vocabulary: Vocabulary | None = None
    backbone_only: bool = False
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    chat_template: str | None = None
    data: DataSettings | None = None
    refit: RefitSettings | None = None
    recalibrate: Literal["statistics", "repair"] | None = "statistics"
    evaluate: EvaluateSettings | None = None
    publish: PublishSettings | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Recipe:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if not given:
            raise ValueError("models: name at least one model here, or under slices or modules")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        return self

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

    @field_validator("align", mode="before")
    @classmethod
    def _expand_align(cls, align: Any) -> Any:
        return {True: {}, False: None}.get(align, align) if isinstance(align, bool) else align

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Recipe:
        """Read a YAML recipe; a single RecipeError lists all its mistakes."""
        documents = read_recipe_file(path)
        if len(documents) > 1:
            raise RecipeError(
                f"{path} has {len(documents)} documents, separated by ---; read_documents in "
                "hf_rebasin.recipes.documents reads them all"
            )
        return Recipe.from_dict(documents[0] if documents else None, name=str(path))

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
            mistakes += _mistakes_in(error)
        mistakes += find_mistakes(raw, AlignSettings.model_fields)
        if mistakes or recipe is None:
            lines = "".join(f"\n  {mistake}" for mistake in mistakes)
            raise RecipeError(f"{name} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:{lines}")
        return recipe

    @property
    def method(self) -> MergeMethod:
        """The merge method."""
        return registry.merge_method(self.merge_method)

    def renamed(self, names: Mapping[tuple[str, str | None], tuple[str, str | None]]) -> Recipe:
        """Return the recipe with other names and revisions of its models: `{(name, revision): (name, revision)}`."""

        def rename(raw: Any) -> Any:
            if isinstance(raw, list | tuple):
                return [rename(item) for item in raw]
            if not isinstance(raw, dict):
                return raw
            renamed = {key: rename(value) for key, value in raw.items() if key != "parameters"}
            if isinstance(raw.get("model"), str):
                name, revision = names[raw["model"], raw.get("revision")]
                renamed |= {"model": name, "revision": revision}
            if isinstance(raw.get("base"), str):
                renamed["base"] = join_name(*names[split_name(raw["base"])])
            return renamed | ({"parameters": raw["parameters"]} if "parameters" in raw else {})

        parts = self.model_dump(include={"models", "slices", "modules"})
        update = {key: rename(value) for key, value in parts.items()}
        if self.base_model is not None:
            base = self._base_entry()
            update["base_model"] = join_name(*names[base.model, base.revision])
        return Recipe.model_validate({**self.model_dump(), **update})

    def in_order(self) -> tuple[ModelEntry, ...]:
        """Return all models that are read, each once: the fixed one first, and the models' own bases last."""
        entries = self._listed()
        base = None if self.base_model is None else self._base_entry()
        ordered = [*([] if base is None else [base]), *entries]
        ordered += [ModelEntry.model_validate(entry.base) for entry in entries if entry.base is not None]
        unique: dict[tuple[str, str | None], ModelEntry] = {}
        for entry in ordered:
            kept = unique.setdefault((entry.model, entry.revision), entry)
            if kept.base is None and entry.base is not None:
                unique[entry.model, entry.revision] = entry
        return tuple(unique.values())

    def _listed(self) -> list[ModelEntry]:
        """Return the entries of all models that are merged, wherever they stand."""
        parts: list[ModulePart | Recipe] = [*self.modules.values(), self]
        entries = [entry for part in parts for entry in part.models]
        sources = [source for part in parts for piece in part.slices for source in piece.sources]
        return [*entries, *(ModelEntry(model=source.model, revision=source.revision) for source in sources)]

    def _base_entry(self) -> ModelEntry:
        """Return the entry of the base model, which may be named without its revision."""
        assert self.base_model is not None
        names = (self.base_model, split_name(self.base_model)[0])
        listed_entries = self._listed()
        for entry in listed_entries:
            if self.base_model in (entry.model, f"{entry.model}@{entry.revision}"):
                return entry
        return next((e for e in listed_entries if e.model in names), ModelEntry.model_validate(self.base_model))

    def merged(self) -> tuple[ModelEntry, ...]:
        """Return the entries of `models` that are merged, without the base if differences are.

        Otherwise the base comes first, which matters to methods that interpolate from it.
        """
        if self.base_model is None:
            return self.models
        base = self._base_entry()
        is_base = [(entry.model, entry.revision) == (base.model, base.revision) for entry in self.models]
        others = [entry for entry, fixed in zip(self.models, is_base, strict=True) if not fixed]
        first = [] if self.method.base != "none" else [e for e, f in zip(self.models, is_base, strict=True) if f]
        return (*first, *others)

    @property
    def merges_differences(self) -> bool:
        """Whether the merge method gets differences from the base model."""
        return self.method.base != "none" and self.base_model is not None

    @property
    def result_dtype(self) -> torch.dtype | None:
        """Dtype of the result; None for the first model's, or by mergekit's convention one that fits all models."""
        name = self.out_dtype or self.dtype
        return None if name is None else getattr(torch, name)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """Dtype that models are rounded to before they are merged; None if they are not."""
        return None if self.dtype is None or self.convention == "own" else getattr(torch, self.dtype)

    @property
    def fits(self) -> bool:
        """Whether layers are fitted to data."""
        return self.refit is not None or self.method.finish is not None

    def resolved_method(self) -> ResolvedMethod:
        """Return the merge method with its parameters for `models`."""
        entries = self.merged()
        order = [self.models.index(entry) for entry in entries]
        return self.resolve([[entry.parameters] for entry in entries], [self.parameters], order)

    def resolve(
        self,
        of_models: Sequence[Sequence[Mapping[str, Any]]],
        of_all: Sequence[Mapping[str, Any]],
        order: Sequence[int] = (),
    ) -> ResolvedMethod:
        """Return the merge method with parameters that are given on several levels, the innermost first.

        Args:
            of_models: for every model the levels that are its own.
            of_all: levels of all models: those of a slice, of a module, of the recipe.
            order: numbers of the models in the recipe, by which lists of one value per model are read.
        """
        method = self.method
        values: dict[str, Any] = {}
        for name, kind in method.parameters.items():
            one_model = next((word for word, plural in method.per_model.items() if plural == name), None)
            if one_model is None:
                levels = [read_parameter(kind, level[name]) for level in of_all if name in level]
                if levels:
                    values[name] = levels[0] if len(levels) == 1 else Layered(tuple(levels))
                continue
            if name in of_all[-1]:
                numbers = of_all[-1][name]
                if order and isinstance(numbers, list | tuple) and len(numbers) == len(self.models):
                    numbers = [numbers[i] for i in order]
                values[name] = read_parameter(kind, numbers)
                continue
            chains = [[level[one_model] for level in (*own, *of_all) if one_model in level] for own in of_models]
            if any(chains):
                values[name] = PerModel(tuple(_read_chain(name, chain, self.convention) for chain in chains))
        return make_resolved(method, values, convention=self.convention, seed=self.seed)


def _read_chain(name: str, chain: Sequence[Any], convention: Convention) -> Any:
    """Return the value of one model, from the levels it is given on; None, for the method's default, if it is not."""
    levels = [read_parameter(float | None, raw) for raw in chain]
    if convention == "mergekit" and name not in REQUIRED:
        levels.append(None)
    return levels[0] if len(levels) == 1 else Layered(tuple(levels)) if levels else None


def read_recipe_file(path: str | os.PathLike[str]) -> list[Any]:
    """Return the content of all documents of a YAML file; RecipeError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return read_yaml_documents(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    except OptionError as error:
        raise RecipeError(str(error)) from error


_MODELS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "models": ModelEntry,
    "sources": SliceSource,
    "slices": Slice,
    "modules": ModulePart,
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
    errors = error.errors()
    # a list that only has wrong entries counts as empty, too
    deeper = {e["loc"][:i] for e in errors for i in range(1, len(e["loc"]))}
    return [
        _mistake(e["loc"], e["type"], e["msg"]) for e in errors if e["type"] != "too_short" or e["loc"] not in deeper
    ]


def _mistake(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    path = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        parents = [str(part) for part in loc[:-1] if part in _MODELS]
        known = _MODELS[parents[-1] if parents else ""].model_fields
        return f"{path}: no such key{nearest(str(loc[-1]), known)}"
    message = message.removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]}" if path else message
