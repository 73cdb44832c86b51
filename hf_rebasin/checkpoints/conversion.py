"""Conversion: which tensor of its class transformers makes of every tensor of a file, and what it leaves out.

Files of one class have many spellings: those of older versions, with and without the prefix of the base model, experts
one by one or stacked. transformers loads all of them, by patterns that each class declares. What it makes of a name is
asked of it here, on the meta device, so that two files are lined up as it would load them, whatever their spelling.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError, listed
from .lazy import InMemory, Lazy
from .loading import Loading
from .model_classes import build_without_weights, find_class, find_ties, quiet_transformers, to_disk_keys

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

REMEMBERED = 8  # layouts, and sets of keys of each layout
KEPT_RESULTS = 2  # results of conversions that are kept: experts are read in turns from two stacks of a layer
# What old versions of torch and transformers called the tensors of layers, of whatever class.
OLD_SPELLINGS = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
# Modules that training tools put around others, and the tools: torch.compile, FSDP, activation checkpointing, Fabric.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
PARALLEL = "module"  # DistributedDataParallel, DataParallel and DeepSpeed: a name that others may use too


class LoadedAs(NamedTuple):
    """What transformers makes of a tensor of a file.

    Args:
        key: the tensor of the module that it becomes, or the first one where it is converted.
        pattern: the source pattern of the converter; None for a tensor that is only renamed.
    """

    key: str
    pattern: str | None


@dataclass(frozen=True, eq=False)
class ClassLayout:
    """The tensors of a transformers class with a configuration, and the names that they may have in files.

    Args:
        config: the configuration.
        module: module of the class, without weights.
    """

    config: Any
    module: Any
    _found: dict[frozenset[str], dict[str, LoadedAs]] = field(default_factory=dict, repr=False)
    _loaded: dict[frozenset[tuple[str, tuple[int, ...]]], Loading] = field(default_factory=dict, repr=False)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the module, without values, by module keys; tied ones under each of their keys."""
        return dict(self.module.state_dict())

    @cached_property
    def ties(self) -> dict[str, str]:
        """`{key that is not stored: key it is tied to}`, by the keys that `save_pretrained` writes."""
        return find_ties(self.module)

    # --- names ---------------------------------------------------------------------------------------------------

    def find_tensors(self, keys: Collection[str]) -> dict[str, LoadedAs]:
        """Return what transformers makes of the tensors of a file, in its order; without those that it leaves out."""
        return _remember(self._found, frozenset(keys), lambda: dict(self._find_tensors(keys)))

    def _find_tensors(self, keys: Collection[str]) -> Iterator[tuple[str, LoadedAs]]:
        """Yield what becomes of every key, decided as `convert_and_load_state_dict_in_model` of transformers does."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(self.module)  # some remember keys, so every file needs its own
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        prefix = self.module.base_model_prefix
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self.state)
            if name not in self.state and key in self.state:
                name, pattern = rename_source_key(key, [], [], prefix, self.state)
            if name in self.state:
                yield key, LoadedAs(name, pattern)

    def _converted(self, keys: Collection[str]) -> dict[str, dict[str, list[str]]]:
        """Return `{module key: {source pattern: keys of a file}}` for what converters make of tensors of a file."""
        groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key, (module_key, pattern) in self.find_tensors(keys).items():
            if pattern is not None:
                groups[module_key][pattern].append(key)
        return groups

    @cached_property
    def _written(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """What `save_pretrained` writes: `{module key: key}` of renamed tensors, and `{key: tensor}` of all others."""
        state = {key: torch.empty_like(tensor) for key, tensor in self.state.items()}
        module_keys, renamed, others = {id(tensor): key for key, tensor in state.items()}, {}, {}
        for key, tensor in to_disk_keys(self.module, state).items():
            if id(tensor) in module_keys:
                renamed[module_keys[id(tensor)]] = key
            else:
                others[key] = tensor
        return renamed, others

    def usual_names(self, keys: Collection[str]) -> dict[str, str]:
        """Return `{key of a file: key that save_pretrained writes for the same tensor}`.

        A tensor for which another number of tensors is written, such as a stack of experts, has its module key. Keys
        that the class has no use for are left out.
        """
        renamed, others = self._written
        names = {
            key: renamed.get(module_key, module_key)
            for key, (module_key, pattern) in self.find_tensors(keys).items()
            if pattern is None
        }
        written = self._converted(others) if len(names) < len(self.find_tensors(keys)) else {}
        for module_key, by_pattern in self._converted(keys).items():
            usual = written.get(module_key, {})
            if module_key in renamed and sum(map(len, by_pattern.values())) == 1:  # perhaps transposed
                usual = {pattern: [renamed[module_key]] for pattern in by_pattern}
            if {p: len(k) for p, k in by_pattern.items()} == {p: len(k) for p, k in usual.items()}:
                for pattern, members in by_pattern.items():
                    names |= dict(zip(members, usual[pattern], strict=True))
        return names

    def ignored(self, keys: Collection[str]) -> set[str]:
        """Return the keys of a file that the class passes over by design: masks, position ids, rotary frequencies."""
        from transformers.utils.loading_report import LoadStateDictInfo

        unexpected = set(keys) - self.find_tensors(keys).keys()
        info = LoadStateDictInfo(set(), set(unexpected), set(), [], {}, set())
        self.module._adjust_missing_and_unexpected_keys(info)
        return unexpected - info.unexpected_keys

    # --- values --------------------------------------------------------------------------------------------------

    def load(self, parts: Mapping[str, Lazy]) -> Loading:
        """Load tensors as transformers does, without their values, and return what does not fit.

        Raises:
            CheckpointError: transformers fails.
        """
        shapes = frozenset((key, part.shape) for key, part in parts.items())
        return _remember(self._loaded, shapes, partial(self._load, parts))

    def _load(self, parts: Mapping[str, Lazy]) -> Loading:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        module = copy.deepcopy(self.module)
        settings = LoadStateDictConfig(
            device_map={"": torch.device("meta")}, weight_mapping=get_model_conversion_mapping(module)
        )
        try:
            with quiet_transformers():
                info, _ = convert_and_load_state_dict_in_model(module, _without_values(parts), settings)
                module.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
                module._adjust_missing_and_unexpected_keys(info)
        except Exception as error:  # the code of several hundred families may raise anything
            raise CheckpointError(f"transformers cannot load it into {type(module).__name__}: {error!r}") from error
        return Loading(
            owner=type(module).__name__,
            missing=frozenset(info.missing_keys),
            unexpected=frozenset(info.unexpected_keys),
            mismatched={key: (tuple(shape), tuple(own)) for key, shape, own in info.mismatched_keys},
            failed=frozenset(info.conversion_errors),
        )

    def module_tensors(self, parts: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors of the module, by module keys, that transformers makes of those of a file, lazily."""
        loaded = self.find_tensors(parts)
        tensors = {name: parts[key] for key, (name, pattern) in loaded.items() if pattern is None}
        results: dict[int, Mapping[str, Tensor]] = {}
        for module_key, by_pattern in self._converted(parts).items():
            inputs = {key: parts[key] for keys in by_pattern.values() for key in keys}
            run = partial(self._convert, module_key, by_pattern)
            tensors |= _Conversion(run, inputs, results).outputs()
        return tensors

    def _convert(
        self, module_key: str, by_pattern: Mapping[str, list[str]], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run the converter of a tensor of the module."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        converters = [t for t in get_model_conversion_mapping(self.module) if isinstance(t, WeightConverter)]
        by_source = {source: converter for converter in converters for source in converter.source_patterns}
        converter = by_source[next(iter(by_pattern))]
        for pattern, keys in by_pattern.items():
            for key in keys:
                converter.add_tensor(module_key, key, pattern, tensors[key])
        try:
            converted = converter.convert(module_key, model=self.module, config=self.config)
        except Exception as error:  # operations of transformers may raise anything for other shapes than they expect
            raise CheckpointError(f"transformers cannot make {module_key} of {listed(tensors)}: {error}") from error
        return {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in converted.items()}

    @cached_property
    def _members(self) -> dict[str, frozenset[str]]:
        """`{module key: all module keys that one conversion makes}`, for those that are written by one."""
        _, others = self._written
        written = {key: InMemory.of(tensor) for key, tensor in others.items()}
        members: dict[str, frozenset[str]] = {}
        for module_key, by_pattern in self._converted(others).items():
            sources = {key: written[key] for keys in by_pattern.values() for key in keys}
            made = frozenset(_Conversion(partial(self._convert, module_key, by_pattern), sources, {}).outputs())
            members |= dict.fromkeys(made, made)
        return members

    def written_tensors(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return what `save_pretrained` writes for tensors of the module, lazily; all of a conversion or none."""
        renamed, _ = self._written
        parts = {renamed[key]: part for key, part in tensors.items() if key in renamed}
        results: dict[int, Mapping[str, Tensor]] = {}
        for members in dict.fromkeys(self._members[key] for key in tensors if key in self._members):
            if members <= tensors.keys():
                inputs = {key: tensors[key] for key in members}
                parts |= _Conversion(partial(to_disk_keys, self.module), inputs, results).outputs()
        return parts

    def conversions(self, keys: Collection[str]) -> list[list[str]]:
        """Return the keys of a file that are converted when it is loaded or written, together where they belong so."""
        renamed, _ = self._written
        groups: dict[frozenset[str], list[str]] = defaultdict(list)
        for key, (module_key, pattern) in self.find_tensors(keys).items():
            if pattern is not None or module_key not in renamed:
                groups[self._members.get(module_key, frozenset([module_key]))].append(key)
        return list(groups.values())


def _without_values(parts: Mapping[str, Lazy]) -> dict[str, Tensor]:
    return {key: torch.empty(part.shape, dtype=part.dtype, device="meta") for key, part in parts.items()}


@dataclass(frozen=True, eq=False)
class _Conversion:
    """A computation of several tensors from several others, done once for all that are asked for in turn.

    Args:
        run: the computation, by names.
        inputs: the tensors that it reads.
        results: the last few results of this conversion and of others, by their identities.
    """

    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    inputs: Mapping[str, Lazy]
    results: dict[int, Mapping[str, Tensor]]

    def outputs(self) -> dict[str, Lazy]:
        """Return all tensors that it computes, lazily."""
        outputs = self.run(_without_values(self.inputs))
        return {key: Converted(tuple(tensor.shape), tensor.dtype, key, self) for key, tensor in outputs.items()}

    def result(self) -> Mapping[str, Tensor]:
        """Run the computation, unless it is one of the last that were run."""
        return _remember(
            self.results, id(self), lambda: self.run({k: part.read() for k, part in self.inputs.items()}), KEPT_RESULTS
        )


@dataclass(frozen=True)
class Converted(Lazy):
    """A tensor that is computed together with others, as experts are from a stack of them."""

    key: str
    conversion: _Conversion

    @property
    def lasting(self) -> bool:
        return all(part.lasting for part in self.conversion.inputs.values())

    def ready(self) -> Lazy:
        return InMemory.of(self.conversion.result()[self.key].contiguous(), owned=True)

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.ready().chunk(start, stop)


def _remember(known: dict[_Key, _Value], key: _Key, make: Callable[[], _Value], most: int = REMEMBERED) -> _Value:
    """Return what is known under a key, or make it and forget the oldest."""
    if key not in known:
        value = make()
        while len(known) >= most:
            known.pop(next(iter(known)))
        known[key] = value
    return known[key]


_layouts: dict[tuple[type, str], ClassLayout] = {}


def class_layout(config: Any, tensors: int) -> ClassLayout:
    """Return the layout of the class that a configuration names, or of the bare model of its type.

    Args:
        config: the configuration.
        tensors: number of tensors of the checkpoint, which limits the size of the module.

    Raises:
        CheckpointError: the class cannot be built.
    """
    settings = {key: value for key, value in config.to_dict().items() if not key.endswith("name_or_path")}
    key = (find_class(config), json.dumps(settings, sort_keys=True, default=str))
    return _remember(_layouts, key, lambda: ClassLayout(config, build_without_weights(config, tensors)))


def unwrap(keys: Collection[str], layout: Callable[[], ClassLayout | None]) -> dict[str, str]:
    """Return `{key: key without the modules that training tools wrap around others}`, for the keys that have such.

    `module` is a name that models use too: it is taken off where the class has no such tensor, and has one without it.

    Args:
        keys: keys of a file.
        layout: returns the class that loads them; it is asked only if a key has a part `module`.

    Raises:
        CheckpointError: two keys would become one.
    """
    names = {key: ".".join(part for part in key.split(".") if part not in WRAPPERS) for key in keys}
    if any(PARALLEL in name.split(".") for name in names.values()) and (known := layout()) is not None:
        names = _without_parallel(names, known)
    changed = {key: name for key, name in names.items() if key != name}
    taken: dict[str, str] = {}
    for key, name in names.items():
        if name in taken:
            raise CheckpointError(
                f"{key!r} and {taken[name]!r} are one tensor, {name!r}, with and without its wrapper"
            )
        taken[name] = key
    return changed


def _without_parallel(names: dict[str, str], layout: ClassLayout) -> dict[str, str]:
    """Take the part `module` off names that the class does not know with it."""
    while all(name.startswith(f"{PARALLEL}.") for name in names.values()) and not layout.find_tensors(names.values()):
        names = {key: name.removeprefix(f"{PARALLEL}.") for key, name in names.items()}
    shorter = {name: ".".join(part for part in name.split(".") if part != PARALLEL) for name in names.values()}
    known = layout.find_tensors({*shorter, *shorter.values()})
    return {key: name if name in known or shorter[name] not in known else shorter[name] for key, name in names.items()}


def describe_wrappers(names: Mapping[str, str]) -> str:
    """Describe what was taken off names, `{key: key without wrappers}`, and which tools had put it there."""
    dropped = {part for key, short in names.items() for part in key.split(".") if part not in short.split(".")}
    tools = sorted({WRAPPERS.get(part, "training in parallel") for part in dropped})
    return f"{listed(f'{part}.' for part in sorted(dropped))} in names, put there by {' and '.join(tools)},"


def without_old_spellings(keys: Iterable[str]) -> Iterator[str]:
    """Yield the keys of a model without a known class as torch and transformers would write them now."""
    keys = list(keys)
    while keys and all(key.startswith(f"{PARALLEL}.") for key in keys):
        keys = [key.removeprefix(f"{PARALLEL}.") for key in keys]
    for key in keys:
        old = next((old for old in OLD_SPELLINGS if key.endswith(old)), None)
        yield key if old is None else key.removesuffix(old) + OLD_SPELLINGS[old]
