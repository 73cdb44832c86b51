"""Evidence: what the settings of a class do, found out by trying them in small models of it.

One setting at a time takes several legal values, some of which take effect at the length of the inputs (a sliding
window of 4,096 tokens and one of 32,768 are equal on 16 tokens, windows of 2 and 4 are not). Where a class cannot be
tried, whether its code reads the setting decides.
"""

from __future__ import annotations

import ast
import fnmatch
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.cache import cache_file, read_answer, store_answer
from ..errors import CheckpointError
from ..modules.miniature import Miniature, Trial

# Settings that are compared elsewhere (labels, ties and tokens by what is stored), or that only say how a model was
# made or what its outputs are packed in.
NOT_COMPARED = (
    *("architectures", "model_type", "auto_map", "_name_or_path", "name_or_path", "_commit_hash", "model_card*"),
    *("transformers_version", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings"),
    *("id2label", "*_id2label", "label2id", "num_labels", "_num_labels", "task_specific_params"),
    *("*attn_implementation*", "*experts_implementation*", "return_dict", "output_attentions", "output_hidden_states"),
)
# Where nothing can be tried, settings of these names are known to matter in training and generation alone, though
# code reads them.
TRAINING = (
    *("*drop*", "initializer_*", "use_cache", "problem_type", "finetuning_task", "gradient_checkpointing"),
    *("chunk_size_feed_forward", "output_router_logits", "router_aux_loss_coef"),
    *(f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start", "forced_*")),
)
TRAINING_REASON = "its name is that of a setting for training or generation"
ABSENT: Any = object()  # in place of the value of a setting that is not there
SMALL = (0, 1, 2, 3, 4, 8)  # numbers that take effect on inputs of 16 tokens, if they ever do
SHORT = 8
TOKEN_ID = re.compile(r"token_(id|index)$")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
SHARED_CODE = ("modeling_rope_utils", "masking_utils", "activations", "modeling_attn_mask_utils")
METHOD = 2  # changes with what is tried, so that earlier answers are not used


@dataclass(frozen=True)
class Effect:
    """The effect of one setting on a class.

    Args:
        matters: whether it changes what the same weights compute.
        why: how that is known.
    """

    matters: bool
    why: str


def flatten(settings: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Flatten all settings that are compared: `{"hidden_act": "gelu", "vision_config.num_heads": 12}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if any(fnmatch.fnmatch(key, pattern) for pattern in NOT_COMPARED):
            continue
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            flat |= flatten(value, f"{inside}{key}.")
        else:
            flat[inside + key] = list(value) if isinstance(value, tuple) else value
    return flat


class Evidence:
    """Effects of settings on a class, tried in miniatures of two models, each time with one setting changed.

    Args:
        owner: transformers class; None where there is none.
        settings: settings of the two models.
        parameters: number of parameters of the larger one.
        code: files of source code of the class where they come with the models.
    """

    def __init__(self, owner: Any, settings: Sequence[Mapping[str, Any]], parameters: int, code: Sequence[str] = ()):
        self.owner, self.settings, self.parameters, self.code = owner, settings, parameters, code

    def effect_of(self, key: str, *values: Any) -> Effect:
        """Return the effect of a setting, of which `values` are known to occur."""
        if self.owner is None:
            return self._guess(key)
        content = self._stored
        if key not in content:
            effect = self._try(key, values)
            content[key] = [effect.matters, effect.why]
            self._store(content)
        return Effect(*content[key])

    def _guess(self, key: str) -> Effect:
        """Judge a setting of a class that cannot be run, by its code and its name."""
        if not self.code:
            is_training = _is_for_training(key)
            return Effect(not is_training, TRAINING_REASON if is_training else "there is no class to try it in")
        effect = self._read(key, "\n".join(self.code), "the code next to the model")
        if effect.matters or not (owners := {owner for text in self.code for owner in _imported_classes(text)}):
            return effect
        code = "\n".join(map(_source_of, sorted(owners, key=repr)))
        return self._read(key, code, "the code next to the model, or that of transformers which it builds on,")

    def _read(self, key: str, code: str, where: str) -> Effect:
        """Judge a setting by whether code reads it."""
        if _is_for_training(key):
            return Effect(False, TRAINING_REASON)
        name = key.rpartition(".")[2]
        names = {
            name,
            *(alias for alias, real in getattr(self._config_class, "attribute_map", {}).items() if real == name),
        }
        reads = any(re.search(rf"\b{re.escape(alias)}\b", code) for alias in names)
        return Effect(reads, f"{where} {'reads' if reads else 'does not read'} it")

    @property
    def _config_class(self) -> Any:
        return getattr(self.owner, "config_class", None)

    @cached_property
    def contexts(self) -> list[tuple[Miniature, Mapping[str, Any], Trial]]:
        """The miniatures of both models, each with settings that it is tried in and what it computes with them.

        Each is tried as it is, and with lengths short enough to take effect.
        """
        contexts: list[tuple[Miniature, Mapping[str, Any], Trial]] = []
        for settings in self.settings[:1] if self.settings[0] == self.settings[1] else self.settings:
            miniature = Miniature(self.owner, settings, self.parameters)
            contexts.append((miniature, miniature.settings, miniature.base))
            short, trial = _with_short_lengths(miniature)
            if trial is not miniature.base:
                contexts.append((miniature, short, trial))
        return contexts

    def _try(self, key: str, values: Sequence[Any]) -> Effect:
        try:
            contexts = self.contexts
        except CheckpointError:
            why = f"no small {self.owner.__name__} can be run, and its code"
            return self._read(key, _source_of(self.owner), why)
        name, legal, untried = self.owner.__name__, 0, False
        for miniature, settings, base in contexts:
            untried = untried or bool(miniature.base.untried and not key.startswith("text_config."))
            for value in candidates(key, (_at(settings, key), *values), miniature.inputs):
                try:
                    trial = miniature.try_settings(_with(settings, key, value))
                except Exception:  # a value that the class does not allow
                    continue
                legal += 1
                if change := _difference(base, trial):
                    return Effect(True, f"the {change} of a small {name} change with it")
        if not legal:
            return self._read(key, _source_of(self.owner), f"no other value can be tried, and the code of {name}")
        if untried:
            return self._read(key, _source_of(self.owner), f"not all of a small {name} can be run, and its code")
        return Effect(False, f"nothing changes in a small {name}")

    # --- what was tried before -----------------------------------------------------------------------------------

    @cached_property
    def _file(self) -> Path:
        import transformers

        asked = [transformers.__version__, self.owner.__module__, self.owner.__qualname__, METHOD]
        return cache_file("settings", [asked, [flatten(settings) for settings in self.settings]])

    @cached_property
    def _stored(self) -> dict[str, Any]:
        try:
            content = read_answer(self._file)
            return {key: [bool(matters), str(why)] for key, (matters, why) in content.items()}
        except (ValueError, TypeError, AttributeError):  # nothing was tried, or not by this version
            return {}

    def _store(self, content: Mapping[str, Any]) -> None:
        store_answer(self._file, content)


def candidates(key: str, values: Sequence[Any], inputs: Mapping[str, Any]) -> list[Any]:
    """Return values to try for a setting: those that occur, and others of their kinds, small ones among them."""
    tried: list[Any] = list(values)
    for value in values:
        if isinstance(value, bool):
            tried += [not value]
        elif isinstance(value, int):
            if TOKEN_ID.search(key):
                ids = inputs.get("input_ids")
                tried += [] if ids is None else ids.reshape(-1)[[0, 3, 5, -1]].tolist()
            tried += [*SMALL, value - 1, value + 1, value * 2, value // 2]
        elif isinstance(value, float):
            tried += [value * 2, value / 2, value + 1, 0.5, 1.0, 2.0, 0.0]
        elif isinstance(value, str):
            tried += ACTIVATIONS if value in ACTIVATIONS else []
        elif isinstance(value, list) and value:
            tried += [value[::-1], value[:1] * len(value), value[-1:] * len(value), value[:-1]]
            if all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value):
                tried += [[entry + 1 for entry in value], [entry * 2 for entry in value], [1] * len(value)]
    if any(value is None or value is ABSENT for value in values):  # a number, mostly
        tried += [*SMALL, 0.5, True, [1, 2]]
    unique: list[Any] = []
    for value in tried[1:]:
        if not any(type(value) is type(other) and value == other for other in [tried[0], *unique]):
            unique.append(value)
    return unique


def _with_short_lengths(miniature: Miniature) -> tuple[Mapping[str, Any], Trial]:
    """Return settings in which every length that only longer inputs reach takes effect, and what they compute."""
    settings, base = miniature.settings, miniature.base
    for key, value in flatten(settings).items():
        if isinstance(value, int) and not isinstance(value, bool) and value > SHORT:
            try:
                short = _with(settings, key, SHORT)
                if _difference(base, trial := miniature.try_settings(short)) and trial.tensors == base.tensors:
                    settings, base = short, trial
            except Exception:
                continue
    return settings, base


def _difference(a: Trial, b: Trial) -> str:
    """Return what differs between two trials; empty if nothing does."""
    if any(b.tensors.get(name, shape) != shape for name, shape in a.tensors.items()):
        return "tensors"  # one that comes or goes counts if it has an effect on the outputs
    if not _equal(list(a.buffers.values()), list(b.buffers.values())) or a.buffers.keys() != b.buffers.keys():
        return "buffers"
    return "" if _equal(a.outputs, b.outputs) else "outputs"


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5)
        for x, y in zip(a, b, strict=True)
    )


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return ABSENT
        value = value[name]
    return value


def _with(settings: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return settings with another value at a key, or without it."""
    name, _, rest = key.partition(".")
    changed = dict(settings)
    if rest:
        inner = changed.get(name)
        changed[name] = _with(inner if isinstance(inner, Mapping) else {}, rest, value)
    elif value is ABSENT:
        changed.pop(name, None)
    else:
        changed[name] = value
    return changed


def _is_for_training(key: str) -> bool:
    return any(fnmatch.fnmatch(key.rpartition(".")[2], pattern) for pattern in TRAINING)


def _imported_classes(code: str) -> Iterator[Any]:
    """Yield the classes of transformers, models and their layers, that code imports by name."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of another Python, or nested too deeply
        return
    for node in nodes:
        if (
            not isinstance(node, ast.ImportFrom)
            or node.level
            or (node.module or "").partition(".")[0] != "transformers"
        ):
            continue
        for alias in node.names:
            owner = None
            with suppress(ImportError, RuntimeError, AttributeError):  # of another version, or with missing libraries
                owner = getattr(import_module(str(node.module)), alias.name)
            if isinstance(owner, type) and re.match(r"transformers\.models\..*modeling_", owner.__module__):
                yield owner


@lru_cache
def _source_of(owner: Any) -> str:
    """Return the source code of a class and of what it computes with, without that of its configuration."""
    names = [base.__module__ for base in owner.__mro__ if base.__module__.startswith("transformers.models.")]
    modules = [sys.modules[name] for name in dict.fromkeys(names)]
    for module in list(modules):  # modelling code of other models that it is composed of
        used = (getattr(value, "__module__", None) for value in vars(module).values() if isinstance(value, type))
        modules += [
            sys.modules[name] for name in dict.fromkeys(used) if name and ".modeling_" in name and name in sys.modules
        ]
    modules += [sys.modules[f"transformers.{name}"] for name in SHARED_CODE if f"transformers.{name}" in sys.modules]
    return "\n".join(inspect.getsource(module) for module in dict.fromkeys(modules))
