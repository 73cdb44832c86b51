"""Miniatures: small random models of a transformers class, on which the effect of its settings is tried."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.json_files import DTYPE_KEYS
from ..checkpoints.model_classes import limited_size
from ..checkpoints.precision import single_thread
from ..errors import CheckpointError, listed
from .forward import evaluation_mode, example_inputs, output_tensors, run_module

LARGEST = 4_000_000  # parameters of a model that is tried in its own size; a trial of it takes some 50 ms
LIMIT = 10_000  # tensors of a model; settings that ask for many more are not tried
LENGTH = 16  # tokens of the texts that it is tried on
VOCABULARY = 1024
DEPTHS = (2, 3, 4, 6, 8, 12, 16)
SCALES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
# Names of sizes, in the configurations of transformers.
LAYERS = re.compile(r"^(n|num)_(\w+_)?layers?$|^(encoder|decoder|hidden)_layers$|^depth$|^n_layer$")
EXPERTS = re.compile(r"^(n|num)_(local_|routed_)?experts$")
WIDTHS = re.compile(r"((size|dim|width|rank|channels|embd|inner|model)s?|(^|_)d_[a-z]+)$")
OTHER_SIZES = re.compile(r"image|patch|window|vocab|chunk|codebook|block|kernel|batch|num_channels|in_channels")


@dataclass(frozen=True)
class Trial:
    """What a miniature computes.

    Args:
        tensors: `{name: shape}` of everything that a file stores for it.
        buffers: what it computes from its settings alone, such as rotary frequencies.
        outputs: its outputs.
        untried: parts that took no part in them, such as the vision tower of a model that was given text alone.
    """

    tensors: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, Tensor]
    outputs: tuple[Tensor, ...]
    untried: frozenset[str] = frozenset()


class Miniature:
    """A class with settings that make it small, and inputs on which it runs.

    Args:
        owner: transformers class.
        settings: settings of the model that it is a miniature of: `to_dict()` of its configuration.
        parameters: number of its parameters.

    Raises:
        CheckpointError: no small version can be built and run.
    """

    def __init__(self, owner: Any, settings: Mapping[str, Any], parameters: int):
        self.owner = owner
        problem: Exception = ValueError("its sizes cannot be reduced")
        for version in _versions(owner, _without_dtypes(settings), parameters):
            try:
                self.settings = dict(version)
                with _quiet(), _seeded(), single_thread():
                    model = self._build(self.settings)
                    self.state = _random_state(model, model.state_dict().keys())
                    model.load_state_dict(self.state)
                    self.inputs = _find_inputs(model)
                self.base = self.try_settings(self.settings, coverage=True)
                if all(bool(x.isfinite().all()) for x in self.base.outputs):
                    return
                problem = ValueError("its outputs are not finite")
            except Exception as error:  # the code of several hundred families may raise anything
                problem = error
        raise CheckpointError(f"no small {owner.__name__} can be run: {problem!r}")

    def _build(self, settings: Mapping[str, Any]) -> Any:
        with limited_size(LIMIT, LARGEST):
            return self.owner(self.owner.config_class.from_dict(dict(settings))).eval()

    def try_settings(self, settings: Mapping[str, Any], coverage: bool = False) -> Trial:
        """Build and run the class with other settings, the weights being the same where they fit.

        Whatever its class raises for settings that are not legal is passed on.
        """
        with _quiet(), _seeded(), single_thread():
            model = self._build(settings)
            stored = model.state_dict()
            tensors = {name: tuple(tensor.shape) for name, tensor in stored.items()}
            if any(name in self.state and self.state[name].shape != shape for name, shape in tensors.items()):
                return Trial(tensors, {}, ())
            added = _random_state(model, tensors.keys() - self.state.keys())
            model.load_state_dict(self.state | added, strict=False)
            buffers = {name: x.clone() for name, x in model.named_buffers() if name not in stored}
            untried: frozenset[str] = frozenset()
            if coverage:
                untried = _untried_parts(model, self.inputs)
            with evaluation_mode(model), _seeded():
                outputs = tuple(x.detach() for x in output_tensors(run_module(model, self.inputs)))
        return Trial(tensors, buffers, outputs, untried)


def _without_dtypes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without dtypes: a part that names its own is built in that one, and all inputs are float32."""
    return {
        key: _without_dtypes(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in DTYPE_KEYS
    }


def _versions(owner: Any, settings: Mapping[str, Any], parameters: int) -> Iterator[Mapping[str, Any]]:
    """Yield smaller versions of settings, each with all kinds of tensors, the one that changes least first."""
    if parameters <= LARGEST:
        yield settings
        return
    kinds = _kinds(_on_meta(owner, settings))
    larger: list[tuple[int, Mapping[str, Any]]] = []
    smaller: Mapping[str, Any]
    for scale in SCALES:
        for depth in DEPTHS:
            smaller = _resize(settings, depth, scale)
            try:
                model = _on_meta(owner, smaller)
            except Exception:  # sizes that do not go together
                continue
            if _kinds(model) == kinds:
                count = sum(p.numel() for p in model.parameters())
                if count <= LARGEST:
                    yield smaller
                elif count <= 10 * LARGEST:
                    larger.append((count, smaller))
                break
    for _, smaller in sorted(larger, key=lambda version: version[0]):
        yield smaller


def _on_meta(owner: Any, settings: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"), _quiet(), limited_size(LIMIT):
        model: nn.Module = owner(owner.config_class.from_dict(dict(settings)))
    return model


def _kinds(model: nn.Module) -> set[str]:
    """The names of a model's tensors, without the numbers of layers."""
    return {re.sub(r"\d+", "#", name) for name in model.state_dict()}


def _resize(settings: Mapping[str, Any], depth: int, scale: float) -> dict[str, Any]:
    """Return settings with at most `depth` layers (more where they are of more kinds) and widths times `scale`."""
    layers = max((v for k, v in settings.items() if LAYERS.search(k) and isinstance(v, int)), default=0)
    per_layer = [v for v in settings.values() if isinstance(v, list) and layers > 1 and len(v) == layers]
    for kinds in per_layer:  # the shortest beginning with all kinds of layers
        depth = max(depth, 1 + max((kinds.index(kind) for kind in kinds), default=0))
    smaller: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            smaller[key] = _resize(value, depth, scale)
        elif LAYERS.search(key) and isinstance(value, int):
            smaller[key] = min(value, depth)
        elif isinstance(value, list) and layers > 1 and len(value) == layers:
            smaller[key] = value[:depth]
        elif EXPERTS.search(key) and isinstance(value, int):
            smaller[key] = min(value, 16)
        elif key == "depths" and isinstance(value, list):
            smaller[key] = [min(n, depth) for n in value]
        elif key.endswith("vocab_size") and isinstance(value, int):
            smaller[key] = min(value, VOCABULARY)
        elif re.search(r"token_(id|index)$", key) and isinstance(value, int) and value >= VOCABULARY:
            smaller[key] = VOCABULARY - 1 - value % (VOCABULARY // 2)
        elif WIDTHS.search(key) and not OTHER_SIZES.search(key) and not key.startswith(("num_", "max_")):
            smaller[key] = _scaled(value, scale)
        elif key == "mrope_section":
            smaller[key] = _scaled(value, scale, least=1)
        else:
            smaller[key] = value
    return smaller


def _scaled(value: Any, scale: float, least: int = 4) -> Any:
    if isinstance(value, list):
        return [_scaled(entry, scale, least) for entry in value]
    if isinstance(value, int) and not isinstance(value, bool) and value > least:
        return max(least, math.ceil(value * scale))
    return value


@torch.no_grad()
def _random_state(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Draw values for tensors of a model at a scale at which nothing saturates and everything has an effect."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in names:
            continue
        value = tensor.detach().clone()
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                value = noise / math.sqrt(max(1, tensor.numel() // tensor.shape[0]))
            else:
                value = 1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise
        state[name] = shared.setdefault(id(tensor), value.to(tensor.dtype))
    return state


def _find_inputs(model: Any) -> dict[str, Any]:
    """Return inputs that a model runs on: all kinds that it takes if they are known, else a text alone."""
    generator = torch.Generator().manual_seed(0)
    model.config.architectures = [type(model).__name__]
    problems = []
    for inputs in _candidates(model, generator):
        cast = {k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
        try:
            with evaluation_mode(model), _seeded():
                if any(True for _ in output_tensors(run_module(model, cast))):
                    return cast
        except Exception as error:  # the code of several hundred families may raise anything
            problems.append(repr(error))
    raise CheckpointError(f"no inputs are known on which {type(model).__name__} runs: {listed(problems)}")


def _candidates(model: Any, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    config, main = model.config, model.main_input_name
    if main in ("input_values", "input_features"):
        yield from _sounds(model, generator)
    if hasattr(config, "encoder") and hasattr(config, "decoder"):  # composed of two models
        inputs: dict[str, Any] = dict(example_inputs(config.encoder, generator))
        yield inputs | {
            "decoder_input_ids": torch.randint(config.decoder.vocab_size, (2, LENGTH), generator=generator)
        }
        return
    inputs = dict(example_inputs(config, generator))
    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        yield from _with_image_grid(model, inputs, generator)
    if "input_ids" in inputs:
        inputs["input_ids"] = _with_one_end(inputs["input_ids"], getattr(config, "eos_token_id", None))
    if {"input_ids", "pixel_values"} <= inputs.keys() and hasattr(model, "get_image_features"):
        yield from _with_image_tokens(model, inputs)
    if "decoder_input_ids" in inputs and not model.can_generate():  # it makes them of its inputs
        yield {name: x for name, x in inputs.items() if name != "decoder_input_ids"}
    yield inputs
    if "input_ids" in inputs:
        yield inputs | {"use_cache": False}
        yield {name: x for name, x in inputs.items() if "pixel" not in name}


def _with_one_end(ids: Tensor, end: Any) -> Tensor:
    """Return token ids of which the last of each row, and no other, is the end token."""
    if not isinstance(end, int):
        return ids
    return torch.cat([torch.where(ids[:, :-1] == end, (end + 1) % (int(ids.max()) + 1), ids[:, :-1]), ids[:, -1:]], 1)


def _sounds(model: Any, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Yield waves, or spectra with time on either axis."""
    config, main = model.config, model.main_input_name
    more: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "vocab_size", None):
        more["decoder_input_ids"] = torch.randint(config.vocab_size, (2, LENGTH // 2), generator=generator)
    shapes: list[tuple[int, ...]] = [(2, 2000), (2, 1, 2000)]
    if main == "input_features":
        names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size")
        bins = next((value for name in names if (value := getattr(config, name, None))), 80)
        frames = 2 * (getattr(config, "max_source_positions", None) or 32)
        shapes = [(2, bins, frames), (2, frames, bins)]
    for shape in shapes:
        yield {main: torch.randn(shape, generator=generator), **more}


def _with_image_grid(model: Any, inputs: Mapping[str, Any], generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Yield inputs with images as rows of patches, as models that take images of any size have them."""
    vision = getattr(model.config, "vision_config", None)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    patch, frames = getattr(vision, "patch_size", 0), getattr(vision, "temporal_patch_size", 1)
    side = 2 * getattr(vision, "spatial_merge_size", 1)
    token = getattr(model.config, "image_token_id", None)
    if token is None or "input_ids" not in inputs:
        return
    ids = torch.where(inputs["input_ids"] == token, (token + 1) % 7, inputs["input_ids"])[:1]
    ids = torch.cat([ids[:, :2], torch.full((1, 4), token), ids[:, 2:]], 1)
    yield {
        "input_ids": ids,
        "pixel_values": torch.randn(side * side, channels * frames * patch * patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (ids == token).int(),
    }


def _with_image_tokens(model: Any, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield inputs whose text has a place for every feature of its images."""
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    try:
        with torch.no_grad():
            features = model.get_image_features(pixel_values=inputs["pixel_values"].float())
    except Exception:  # it takes more than pixels
        return
    joined = getattr(features, "pooler_output", features)  # of all images together, or one tensor for each
    tensors = [x for x in output_tensors(joined) if x.is_floating_point()]
    if token is None or not tensors:
        return
    count = sum(x.numel() // x.shape[-1] for x in tensors) // 2
    ids = inputs["input_ids"]
    ids = torch.where(ids == token, (token + 1) % 7, ids)
    yield {**inputs, "input_ids": torch.cat([ids[:, :2], torch.full((2, count), token), ids[:, 2:]], 1)}


def _untried_parts(model: nn.Module, inputs: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of towers, and of other direct parts, that take no part in a forward pass."""
    from transformers import PreTrainedModel

    called: set[nn.Module] = set()  # and so were those that share their parameters
    hooks = [part.register_forward_hook(lambda part, *_: called.add(part)) for part in model.modules()]
    try:
        with evaluation_mode(model), _seeded():
            run_module(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    direct = set(model.children())
    used = {id(p) for part in called for p in part.parameters(recurse=False)}
    return frozenset(
        name
        for name, part in model.named_modules()
        if (part in direct or (isinstance(part, PreTrainedModel) and part is not model))
        and (parameters := list(part.parameters()))
        and called.isdisjoint(part.modules())
        and used.isdisjoint(map(id, parameters))
    )


@contextmanager
def _seeded() -> Iterator[None]:
    """Make everything random inside the block the same each time, and leave the generator of the user alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, which warns of settings that are only tried, and of kernels that are not installed."""
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
