"""Settings of layers: the configuration of a model that is put together from layers of another one.

A `config.json` speaks of layers in many ways: how many there are, a list with an entry for each, the numbers of some
of them, the number of the first ones that are dense, a period. All but the last can be rewritten for any choice of
layers. What a period, or the code of a class, then makes of the layers is not guessed but looked at: the class is
built without weights from both configurations, and every layer has to be what it was.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..errors import CheckpointError, OptionError, listed, quoted
from .layer_comparison import refuse_other_layers
from .model_classes import build_config, build_without_weights

MAIN_COUNT = "num_hidden_layers"  # what transformers calls it in every class, whatever the class's own name is
# Names under which configurations of transformers 5 have numbers of layers; nested ones have any of them, too.
COUNTS = re.compile(
    r"((num|n)_)?(hidden_|encoder_|decoder_)?layers|n_layer|num_layer|depth|(en|de)coder_num_(hidden_)?layers"
)
SUBCONFIGS = re.compile(r".*_config|encoder|decoder")
INDICES = re.compile(r"(layers|blocks|indices|indexes|idxs|layer_ids)$")  # names of lists of layers, by their numbers
FIRST = re.compile(r"first_|window_layers$|dense_layers$|hash_layers$|start_index$")  # so many first ones are special
LAST = re.compile(r"_last_|shared_layers$")  # so many last ones are special
END = re.compile(r"layer_end_index$")  # the number of the last one that is special
# A layer is special by its number modulo one of these.
PERIODS = re.compile(r"period|offset|interval|every|pattern|_freq|(sparse|layer)_step$|layer_group_size|frequency$")
STAGES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")  # of backbones: one per layer
PARTS_PER_LAYER = 2000  # at most, of a module; expert by expert


def layer_counts(content: Mapping[str, Any]) -> dict[str, int]:
    """Return `{setting: number of layers}` of a configuration, and of the configurations in it, by dotted names.

    Settings that a `config.json` leaves out have the defaults of their class, and one setting has one name.

    Example:
        >>> layer_counts({"text_config": {"num_hidden_layers": 32}, "vision_config": {"depth": 24}})
        {'text_config.num_hidden_layers': 32, 'vision_config.depth': 24}
    """
    return dict(_layer_counts(_with_defaults(content)))


def _layer_counts(settings: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, int]]:
    aliases = _aliases(settings)
    for name, value in settings.items():
        if isinstance(value, Mapping) and SUBCONFIGS.fullmatch(name):
            yield from _layer_counts(value, f"{where}{name}.")
        elif type(value) is int and value > 0 and COUNTS.fullmatch(name) and name not in aliases:
            yield f"{where}{name}", value


def main_count(content: Mapping[str, Any]) -> str | None:
    """Return the setting that says how many layers a model has, or its language model; None where nothing does."""
    settings = _with_defaults(content)
    for part, where in ((settings, ""), (settings.get("text_config"), "text_config.")):
        if isinstance(part, Mapping):
            own = _aliases(part).get(MAIN_COUNT, MAIN_COUNT)
            names = [own, *(name.rpartition(".")[2] for name, _ in _layer_counts(part) if "." not in name)]
            for name in names:
                if type(part.get(name)) is int:
                    return f"{where}{name}"
    return None


def config_of_layers(config: Mapping[str, Any], layers: Sequence[int], setting: str | None = None) -> dict[str, Any]:
    """Return the configuration of a model whose layer i was layer `layers[i]` of the model that a configuration is of.

    Args:
        config: content of its `config.json`.
        layers: numbers of its layers, in any order and any number of times.
        setting: dotted name of the setting that counts these layers; by default the one that `main_count` finds.

    Raises:
        CheckpointError: a setting makes other layers of them by their new numbers, and cannot be rewritten; or another
            tensor than those of layers depends on how many there are.
        OptionError: a layer that the model does not have.

    Example:
        >>> config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "mlp_only_layers": [0]}
        >>> config_of_layers(config, [0, 1, 0])
        {'num_hidden_layers': 3, 'layer_types': ['a', 'b', 'a'], 'mlp_only_layers': [0, 2]}
    """
    content = select_settings(config, layers, setting)
    setting = setting or main_count(config) or ""
    if (before := _build(config)) is None or (after := _build(content)) is None:
        _refuse_broken_periods(_part(config, setting), layers)
        return content
    old, new = (build_without_weights(built, PARTS_PER_LAYER * len(layers)) for built in (before, after))
    settings = _part(_with_defaults(config), setting)
    cause = listed(f"{key}: {settings[key]}" for key in _periods(settings))
    refuse_other_layers(old, new, settings[setting.rpartition(".")[2]], layers, cause)
    return content


def select_settings(config: Mapping[str, Any], layers: Sequence[int], setting: str | None = None) -> dict[str, Any]:
    """Return what `config_of_layers` does, without building the class to see whether its layers are what they were."""
    setting = setting or main_count(config)
    settings, known = _with_defaults(config), _build(config) is not None
    if setting is None:
        raise CheckpointError("the configuration does not say how many layers there are")
    whole = copy.deepcopy(settings if setting.partition(".")[0] not in config and "." in setting else dict(config))
    before = _part(settings, setting)
    name = setting.rpartition(".")[2]
    count = before[name]
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise OptionError(f"there are {count} layers, and no layer {outside[0]}; the first one is 0")
    if not layers:
        raise OptionError("no layers are left; a model needs one at least")
    if list(layers) == list(range(count)):
        return copy.deepcopy(dict(config))
    expected = _settings_of_layers(before, name, layers)
    part, aliases = _part(whole, setting), _aliases(before)
    for key in list(part):
        if (own := aliases.get(key, key)) in expected:
            part[key] = part[key] if _equal(expected[own], before[own]) else expected[own]
        elif key in STAGES:
            del part[key]  # of the last layer alone, as by default
    if all(aliases.get(key, key) != name for key in part):
        part[name] = len(layers)
    if known:
        _write_defaults(whole, setting, expected, before)
    return whole


def _settings_of_layers(before: Mapping[str, Any], name: str, layers: Sequence[int]) -> dict[str, Any]:
    """Return the settings of a configuration, with its defaults, for a choice of its layers."""
    count = before[name]
    same_count = {name, *(alias for alias, own in _aliases(before).items() if own == name)}
    defaults = _class_defaults(before)
    expected: dict[str, Any] = {}
    for key, value in before.items():
        if key in same_count:
            expected[key] = len(layers)
        elif key in STAGES:
            _refuse_inner_stages(key, value, count)
        elif isinstance(value, list | tuple):
            expected[key] = _select_list(key, list(value), count, layers, _default_list(defaults, key, name))
        elif isinstance(value, str) and len(value) == count and "pattern" in key:
            expected[key] = "".join(value[layer] for layer in layers)
        elif isinstance(value, Mapping) and _is_by_layer(key, value, count):
            entries = {int(layer): entry for layer, entry in value.items()}
            width = min(len(str(layer)) for layer in value)  # of numbers such as 05
            expected[key] = {f"{i:0{width}}": entries[layer] for i, layer in enumerate(layers) if layer in entries}
        elif type(value) is int:
            expected[key] = _select_threshold(key, value, count, layers)
        else:
            expected[key] = value
    return expected


def _default_list(defaults: Mapping[str, Any], key: str, name: str) -> tuple[list[Any], bool | None]:
    """Return a list as the class has it by default, and whether that has an entry per layer; None if it is empty."""
    default = defaults.get(key)
    entries = list(default) if isinstance(default, list | tuple) else []
    return entries, len(entries) == defaults.get(name) if entries else None


def _select_list(
    key: str, value: list[Any], count: int, layers: Sequence[int], default: tuple[list[Any], bool | None]
) -> list[Any]:
    """Return a list of a configuration for a choice of layers: entries by layer, numbers of layers, or a pattern."""
    if _are_indices(key, value, count, default[0]):
        return [i for i, layer in enumerate(layers) if layer in value]
    if key.endswith("source_layers") and len(value) == count:  # each layer names another one
        return [next((j for j in range(i, -1, -1) if layers[j] == value[layer]), i) for i, layer in enumerate(layers)]
    if len(value) == count and default[1] is not False:
        return [value[layer] for layer in layers]
    if value and all(isinstance(entry, str) for entry in value) and key.endswith(("types", "type")):
        entries = [value[layer % len(value)] for layer in layers]  # repeated until there are enough
        return value if entries == [value[i % len(value)] for i in range(len(layers))] else entries
    if value and all(_is_run(entry) for entry in value):
        entries = [kind for kinds, times in value for kind in kinds * times]
        chosen = [entries[layer] for layer in layers if layer < len(entries)]
        return value if chosen == entries or len(entries) != count else [[chosen, 1]]
    return value


def _are_indices(key: str, value: Sequence[Any], count: int, default: Sequence[Any]) -> bool:
    """Whether a list has the numbers of some layers, in order."""
    if not INDICES.search(key) or not _is_increasing(value) or not all(0 <= number < count for number in value):
        return False
    if len(value) == count <= 2 < len(default):
        return _is_increasing(default)  # [0, 1] could also say no and yes
    return True


def _is_increasing(value: Sequence[Any]) -> bool:
    return all(type(number) is int for number in value) and all(a < b for a, b in pairwise(value))


def _is_run(entry: Any) -> bool:
    """Whether an entry of a list is a pattern, and how many times it is repeated."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], list) and type(entry[1]) is int


def _is_by_layer(key: str, value: Mapping[Any, Any], count: int) -> bool:
    """Whether the keys of a mapping are numbers of layers."""
    numbers = [int(number) for number in value if str(number).isdecimal()]
    return bool(numbers) and "layer" in key and len(numbers) == len(value) and max(numbers) < count


def _select_threshold(key: str, value: int, count: int, layers: Sequence[int]) -> int:
    """Return how many first or last layers are special, for a choice of layers; as it was where they are scattered."""
    if END.search(key) and 0 <= value < count:
        return _select_threshold("first_", value + 1, count, layers) - 1
    if value < 0 or not (FIRST.search(key) or LAST.search(key)):
        return value
    if value >= count:
        return max(value, len(layers))  # all
    first = FIRST.search(key) is not None
    special = [layer < value if first else layer >= count - value for layer in layers]
    number = sum(special)
    return number if all(special[:number] if first else special[len(special) - number :]) else value


def _refuse_inner_stages(key: str, value: Any, count: int) -> None:
    """Raise CheckpointError for a backbone that gives out more than its last layer."""
    if key.endswith("out_indices") and value and list(value) not in ([count], [-1]):
        raise CheckpointError(f"{key} is {quoted(value)}: it numbers layers whose outputs are used, so none can go")


def _write_defaults(
    whole: dict[str, Any], setting: str, expected: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Write out settings that the class would derive otherwise from the new number of layers."""
    for attempt in range(2):
        try:
            after = _part(_with_defaults(whole), setting)
        except CheckpointError:  # its defaults do not fit the new number
            if attempt:
                raise
            after = before
        other = [key for key, value in expected.items() if key not in after or not _equal(after[key], value)]
        if not other:
            return
        if attempt:
            value, wanted = _first_difference(after.get(other[0]), expected[other[0]])
            raise CheckpointError(
                f"{listed(other)} cannot be what these layers need: {quoted(wanted)}, and the class makes it "
                f"{quoted(value)}, by {listed(_periods(expected)) or 'the number of layers'}"
            )
        _part(whole, setting).update({key: expected[key] for key in other})


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping) and all(str(key).isdecimal() for key in (*a, *b)):
        return {int(key): value for key, value in a.items()} == {int(key): value for key, value in b.items()}
    return bool(a == b)


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Return two values, or of two lists of one length the first entries that differ, with their number."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        i = next(i for i, (first, second) in enumerate(zip(a, b, strict=True)) if not _equal(first, second))
        return f"{a[i]} at {i}", f"{b[i]} at {i}"
    return a, b


# --- numbers that decide what a layer is ---------------------------------------------------------------------------


def _periods(settings: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that say which layers are special by their numbers."""
    by_number = (PERIODS, FIRST, LAST, END)
    names = [key for key, value in settings.items() if type(value) is int and value > 0]
    return [key for key in names if any(pattern.search(key) for pattern in by_number)]


def _refuse_broken_periods(settings: Mapping[str, Any], layers: Sequence[int]) -> None:
    """Raise CheckpointError for a period that a choice of layers breaks, where no class can be asked."""
    if any(key.endswith(("layer_types", "block_type")) for key in settings):
        return  # which decides
    for key in _periods(settings):
        period = settings[key]
        shifted = any(layer % period != i % period for i, layer in enumerate(layers))
        if PERIODS.search(key) and "offset" not in key and shifted:
            raise CheckpointError(
                f"{key} is {period}, so what a layer does may depend on its number; choose layers whose numbers "
                f"change by multiples of {period}"
            )


# --- configurations ------------------------------------------------------------------------------------------------


def _build(content: Mapping[str, Any]) -> Any:
    """Build the configuration; None where transformers does not know its class, or the model has its own code."""
    return None if "auto_map" in content else build_config(_with_words(content), None)


def _with_words(value: Any) -> Any:
    """Return a value with words for keys, as in JSON; configurations number their labels."""
    if isinstance(value, list | tuple):
        return [_with_words(entry) for entry in value]
    return {str(key): _with_words(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    config = _build(content)
    if config is None:
        return dict(content)
    settings = dict(config.to_dict())
    count = getattr(config, MAIN_COUNT, None)
    if type(count) is int and not any(COUNTS.fullmatch(name) for name in settings):
        settings[MAIN_COUNT] = count  # which some classes compute
    return settings


def _config_class(settings: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    return CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None


def _aliases(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return `{other name of a setting: the class's own name}`."""
    owner = _config_class(settings)
    return {} if owner is None else {a: b for a, b in owner.attribute_map.items() if a != b}


def _class_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the class has by itself; none where it is not known."""
    try:
        return {} if _config_class(settings) is None else _with_defaults({"model_type": settings["model_type"]})
    except CheckpointError:
        return {}


def _part(content: Any, setting: str) -> Any:
    """Return the configuration that a setting is in, by the setting's dotted name."""
    for name in setting.split(".")[:-1]:
        content = content[name]
    return content
