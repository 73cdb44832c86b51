"""Composition of a merge: which tensors of which models are merged together, by which parameters.

A merge of whole models has one part. `slices` make a part of every range of layers, and `modules` one of every module;
their results together are the merge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layer_settings import config_of_layers, select_settings
from ..checkpoints.layers import cut_layers, find_stack
from ..checkpoints.lazy import Tensors
from ..checkpoints.parts import module_keys
from ..errors import MismatchError, OptionError
from ..merging.merge import combine
from ..merging.parameters import PerModel, ResolvedMethod, resolve_method
from ..text import layer_of
from .recipe import ModelEntry, Recipe, Slice, SliceSource


@dataclass(frozen=True, kw_only=True)
class MergePart:
    """A part of a merge, whose tensors are merged from the same models by the same parameters.

    Args:
        models: the models, or what is cut out of them.
        resolved: the merge method with its parameters.
        base: what differences are taken from; None for methods that merge no differences.
        origins: for every model what its own difference is taken from; None without a base.
        own_names: for every model `{key of the result: its key in that model}`; None if they are the same.
    """

    models: tuple[Checkpoint, ...]
    resolved: ResolvedMethod
    base: Checkpoint | None = None
    origins: tuple[Checkpoint, ...] | None = None
    own_names: tuple[Mapping[str, str], ...] | None = None

    @property
    def first(self) -> Checkpoint:
        """The model whose keys the part has."""
        return self.models[0] if self.base is None else self.base

    def combine(
        self, dtype: torch.dtype | None, *, input_dtype: torch.dtype | None = None, backbone_only: bool = False
    ) -> Checkpoint:
        """Merge the models of the part; see `hf_rebasin.merging.merge.combine`."""
        return combine(
            self.models,
            self.resolved,
            base=self.base,
            origins=self.origins,
            own_names=self.own_names,
            dtype=dtype,
            input_dtype=input_dtype,
            backbone_only=backbone_only,
        )

    def names(self) -> set[str]:
        """Return the names of its tensors, in the result and in the models."""
        own = {name for names in self.own_names or () for name in names.values()}
        return own | {*self.first.parts, *self.first.declared_ties}

    def restrict(self, keys: Collection[str], count: int | None = None) -> MergePart:
        """Return the part with some of its tensors only, and with the first models only."""
        models = self.models[:count]
        values = {
            name: replace(value, values=value.values[:count]) if isinstance(value, PerModel) else value
            for name, value in self.resolved.values.items()
        }
        return replace(
            self,
            models=tuple(restrict(model, keys) for model in models),
            base=None if self.base is None else restrict(self.base, keys),
            origins=None if self.origins is None else tuple(restrict(model, keys) for model in self.origins[:count]),
            own_names=None if self.own_names is None else self.own_names[:count],
            resolved=replace(self.resolved, values=values),
        )


def compose(recipe: Recipe, models: Sequence[Checkpoint]) -> list[MergePart]:
    """Return the parts of a merge.

    Args:
        recipe: the recipe.
        models: its models, in the order of `Recipe.in_order`, in the same coordinates.

    Raises:
        OptionError: layers or parts that the models do not have.
    """
    opened = {(entry.model, entry.revision): model for entry, model in zip(recipe.in_order(), models, strict=True)}
    if recipe.modules:
        keys = module_keys(models[0], list(recipe.modules))
        parts = []
        for name, module in recipe.modules.items():
            inner = recipe.model_copy(
                update={
                    "modules": {},
                    "models": _with_base(recipe, module.models),
                    "slices": module.slices,
                    "parameters": module.parameters,
                }
            )
            of_module = _compose_one(inner, opened, [module.parameters, recipe.parameters], keys[name])
            if len(of_module) > 1 or of_module[0].own_names is not None:
                raise OptionError(
                    f"modules.{name}.slices: of a part of a model all layers are merged, and none are cut out; name "
                    "whole models under models"
                )
            parts.append(of_module[0].restrict(keys[name]))
        return parts
    return _compose_one(recipe, opened, [recipe.parameters])


def _with_base(recipe: Recipe, models: Sequence[ModelEntry]) -> tuple[ModelEntry, ...]:
    """List the base model with the models of a module, where a method of two models interpolates from it."""
    base = recipe.base_model
    if base is None or recipe.method.base != "none" or len(models) != 1 or "t" not in recipe.method.parameters:
        return tuple(models)
    entry = next(entry for entry in recipe.in_order() if base in (entry.model, f"{entry.model}@{entry.revision}"))
    return (entry, *models)


def _compose_one(
    recipe: Recipe,
    opened: Mapping[tuple[str, str | None], Checkpoint],
    of_all: Sequence[Mapping[str, Any]],
    keys: Collection[str] | None = None,
) -> list[MergePart]:
    base_entry = recipe.in_order()[0] if recipe.base_model is not None else None
    base = None if base_entry is None or not recipe.merges_differences else opened[_id(base_entry)]
    if recipe.slices:
        return _compose_slices(recipe, opened, of_all, base, keys)
    entries = recipe.merged()
    if base is not None and not entries:
        return [_copy_of(base)]
    origins = None
    if base is not None:
        own = [None if entry.base is None else ModelEntry.model_validate(entry.base) for entry in entries]
        origins = tuple(base if entry is None else opened[_id(entry)] for entry in own)
    for entry in entries:
        _refuse_cut(entry, opened[_id(entry)], keys)
    order = [recipe.models.index(entry) for entry in entries]
    resolved = recipe.resolve([[entry.parameters] for entry in entries], of_all, order)
    models = tuple(opened[_id(entry)] for entry in entries)
    return [MergePart(models=models, resolved=resolved, base=base, origins=origins)]


def _id(entry: ModelEntry | SliceSource) -> tuple[str, str | None]:
    return entry.model, entry.revision


def _copy_of(base: Checkpoint, own_names: tuple[Mapping[str, str], ...] | None = None) -> MergePart:
    """Return the part of a merge of differences in which there is no model but the base: the base itself."""
    return MergePart(models=(base,), resolved=resolve_method("passthrough", {}), own_names=own_names)


def _refuse_cut(entry: ModelEntry, model: Checkpoint, keys: Collection[str] | None) -> None:
    """Refuse layers of a model that is merged as a whole."""
    if entry.layer_range is not None and entry.layer_range != (0, count := find_stack(model, keys).count):
        raise OptionError(
            f"models: {entry.model} has {count} layers, and layer_range names {list(entry.layer_range)} of them; "
            "layers are cut out under slices"
        )


def _compose_slices(
    recipe: Recipe,
    opened: Mapping[tuple[str, str | None], Checkpoint],
    of_all: Sequence[Mapping[str, Any]],
    base: Checkpoint | None,
    keys: Collection[str] | None,
) -> list[MergePart]:
    at, parts, slices = 0, list[MergePart](), recipe.slices
    whole = len(slices) == 1 and all(
        source.layer_range == (0, find_stack(opened[_id(source)], keys).count) for source in slices[0].sources
    )
    for i, piece in enumerate(slices):
        merged, base_source = _split_sources(recipe, piece, opened, base, keys)
        resolved = recipe.resolve([[source.parameters] for source in merged], [piece.parameters, *of_all])
        sources = [*merged, *([] if base_source is None else [base_source])]
        if whole:
            models, own_names = [opened[_id(source)] for source in sources], None
        else:
            cuts = [
                cut_layers(
                    opened[_id(source)],
                    *source.layer_range,
                    at,
                    before=i == 0,
                    after=i == len(slices) - 1,
                    keys=keys,
                )
                for source in sources
            ]
            models, own_names = [cut for cut, _ in cuts], tuple(names for _, names in cuts[: len(merged) or 1])
        part = MergePart(
            models=tuple(models[: len(merged)]),
            resolved=resolved,
            base=None if base_source is None else models[-1],
            own_names=own_names,
        )
        if not merged:
            part = _copy_of(models[-1], own_names)
        parts.append(part)
        at += piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
    return _without_surplus(recipe, parts)


def _split_sources(
    recipe: Recipe,
    piece: Slice,
    opened: Mapping[tuple[str, str | None], Checkpoint],
    base: Checkpoint | None,
    keys: Collection[str] | None,
) -> tuple[list[SliceSource], SliceSource | None]:
    """Return the sources that are merged, and the source of the base that differences are taken from."""
    sources = list(piece.sources)
    if recipe.base_model is None:
        return sources, None
    fixed = recipe.in_order()[0]
    own = [source for source in sources if _id(source) == _id(fixed)]
    others = [source for source in sources if _id(source) != _id(fixed)]
    if base is None:
        return [*own, *others], None
    if own:
        return others, own[0]
    ranges = {source.layer_range for source in others}
    if len(ranges) > 1 or find_stack(base, keys).count != find_stack(opened[_id(others[0])], keys).count:
        raise OptionError(
            f"slices: {recipe.merge_method} takes differences from {fixed.model}, and it is not clear from which of "
            "its layers; list it among the sources of the slice, with its layer_range"
        )
    return others, SliceSource(model=fixed.model, revision=fixed.revision, layer_range=others[0].layer_range)


def _without_surplus(recipe: Recipe, parts: list[MergePart]) -> list[MergePart]:
    """Merge what comes after the last layer from as many models as what comes before the first one, as mergekit does.

    Raises:
        OptionError: by the convention of this package, if the numbers differ.
    """
    first, last = parts[0], parts[-1]
    counts = [len(part.models) + (part.base is not None) for part in (first, last)]
    if counts[1] <= counts[0]:
        return parts
    if recipe.convention == "own":
        raise OptionError(
            f"slices: the first one has {counts[0]} sources and the last one {counts[1]}; give them "
            "equally many, as embeddings come from the first and the head from the last"
        )
    layered = {key for key in last.first.parts if layer_of(key) is not None}
    rest = [key for key in last.first.parts if key not in layered]
    if last.base is not None and first.base is None:
        return [*parts[:-1], last.restrict(layered), _copy_of(last.base).restrict(rest)]
    return [*parts[:-1], last.restrict(layered), last.restrict(rest, len(first.models))]


def restrict(model: Checkpoint, keys: Collection[str]) -> Checkpoint:
    """Return a model with some of its tensors only."""
    return replace(
        model,
        tensors=Tensors({key: part for key, part in model.parts.items() if key in keys}),
        given_ties={target: source for target, source in model.declared_ties.items() if source in keys},
        absent_rows={key: rows for key, rows in model.absent_rows.items() if key in keys},
        submodels={},
        origin=model.origin or model,
    )


def join(recipe: Recipe, parts: Sequence[MergePart], merged: Sequence[Checkpoint], first: Checkpoint) -> Checkpoint:
    """Put the merged parts together.

    Args:
        recipe: the recipe.
        parts: the parts.
        merged: the merge of each of them.
        first: the model whose configuration and other files the result has.

    Raises:
        MismatchError: the parts leave tensors of the model out.
    """
    if len(merged) == 1 and parts[0].own_names is None and not recipe.modules:
        return merged[0]
    tensors = {key: part for result in merged for key, part in result.parts.items()}
    written: dict[str, Any] = dict(first.written)
    if recipe.modules:
        if missing := first.parts.keys() - tensors.keys():
            raise MismatchError(f"modules: no part has {', '.join(sorted(missing)[:5])} of {first.name}")
    else:
        layers = _layers_of(recipe)
        wholes = [model.origin or model for part in parts for model in part.models]
        written = config_of_layers(_deepen(first, wholes, max(layers)), layers)
    return replace(
        first,
        tensors=Tensors(tensors),
        written=written,
        given_config=None,
        given_ties=None,
        name=f"{recipe.merge_method} of {', '.join(dict.fromkeys(entry.model for entry in recipe.in_order()))}",
        sources=tuple(source for result in merged for source in result.sources),
        commit=None,
        origin=first.origin or first,
    )


def _layers_of(recipe: Recipe) -> list[int]:
    """Return the number that every layer of the result has in its model, of the first source of its slice."""
    return [layer for piece in recipe.slices for layer in range(*piece.sources[0].layer_range)]


def _deepen(first: Checkpoint, models: Sequence[Checkpoint], last: int) -> dict[str, Any]:
    """Return the configuration of the first model, with as many layers as a deeper one if it does not have the last.

    Raises:
        OptionError: the deeper model has other layers, not only more of them.
    """
    written: dict[str, Any] = dict(first.written)
    count = find_stack(first).count
    if last < count:
        return written
    deepest = max(models, key=lambda model: find_stack(model).count)
    deep = dict(deepest.written)
    of_depth = {key for key, value in config_of_layers(deep, [0]).items() if deep.get(key) != value}
    deepened = {**written, **{key: deep[key] for key in of_depth if key in deep}}
    if select_settings(deepened, range(count)) != written:
        raise OptionError(
            f"slices: the configuration of the merge is that of {first.name}, which has {count} layers and none with "
            f"number {last}, and those of {deepest.name} are others; name the deepest of the models as base_model"
        )
    return deepened
