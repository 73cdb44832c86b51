"""Transformers classes and modules: building and filling them, the tensors they tie, and their names on disk.

Module keys may change from one version of transformers to the next; disk keys stay.
"""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, listed, quoted
from .json_files import read_json
from .lazy import Lazy

# Suffixes of tensors that GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt, MXFP4, HQQ and quanto store beside
# weights or instead of them.
QUANTISED_SUFFIXES = (
    *(".qweight", ".qzeros", ".weight_packed", ".absmax", ".SCB", ".weight_scale", ".weight_scale_inv"),
    *(".weight_scale_2", "_proj_blocks", ".W_q", ".weight._data"),
)

# Options that make transformers build that many list entries or modules; no model has more than this.
COUNT_LIMITS = {
    re.compile("(layer|block|depth|stage)s?$"): 2000,
    re.compile("(expert|indice|codebook)s$"): 10_000,
    re.compile("labels$"): 100_000,
}
LARGEST_NUMBER = 2**63  # for all other numbers


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a folder; empty if there is none.

    Raises:
        CheckpointError: it is not JSON, or a value that is used here has the wrong type or an impossible size.
    """
    content = read_json(folder / "config.json")
    kinds = {"model_type": str, "architectures": list, "id2label": dict, "dtype": str, "torch_dtype": str}
    for key, kind in kinds.items():
        value = content.get(key)
        sound = value is None or isinstance(value, kind)
        if sound and isinstance(value, list):
            sound = all(isinstance(name, str) for name in value)
        if not sound:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {quoted(value)}, which transformers does not write"
            )
    if not all(str(label).isdecimal() for label in content.get("id2label") or ()):
        raise CheckpointError(
            f"{folder / 'config.json'}: the keys of id2label are not numbers: {quoted(content['id2label'])}"
        )
    for name, number in _integers(content):
        limit = next((limit for pattern, limit in COUNT_LIMITS.items() if pattern.search(name)), LARGEST_NUMBER)
        if abs(number) > limit:
            raise CheckpointError(
                f"{folder / 'config.json'}: {name} is {number:.3g}, which is more than any model has"
            )
    return content


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield (key, number) for the integers in a configuration and in the configurations nested in it."""
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, list):
        for entry in value:
            yield from _integers(entry, name)
    elif isinstance(value, dict) and (not name or name.endswith("config")):
        for key, entry in value.items():
            yield from _integers(entry, key)


def build_config(content: Mapping[str, Any], folder: Path | None) -> Any:
    """Build the transformers configuration from the content of a `config.json`; None for an unknown model type."""
    if "model_type" not in content:
        return None
    from transformers import CONFIG_MAPPING

    if content["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[content["model_type"]].from_dict(_without_code(content))
    except Exception as error:  # the code of several hundred families may raise anything
        raise CheckpointError(f"transformers cannot use the config.json of {folder}: {error}") from error
    config.name_or_path = str(folder or "")
    return config


def find_quantisation(parts: Mapping[str, Lazy], config: Mapping[str, Any]) -> str | None:
    """Return what shows that a model is quantised; None if nothing does."""
    kinds = {
        part.dtype for key, part in parts.items() if part.dtype.is_floating_point and not is_recomputed(key, part)
    }
    narrow = sorted(str(kind) for kind in kinds if kind.itemsize < 2)
    packed = [
        key
        for key, part in parts.items()
        if key.endswith(QUANTISED_SUFFIXES)
        or (key.endswith("weight") and part.dtype.itemsize == 1 and len(part.shape) > 1)
    ]
    if narrow or packed:
        return listed(narrow or packed, 1)
    return None if config.get("quantization_config") is None else "its configuration says so"


def is_recomputed(key: str, part: Lazy) -> bool:
    """Whether it is a buffer that old transformers stored: a causal mask, position ids, rotary frequencies."""
    if re.search(r"(^|\.)(attn|attention)\.(masked_)?bias$", key):
        return len(part.shape) in (0, 4)
    return re.search(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$", key) is not None


def copy_config(module: nn.Module) -> Any:
    """Copy a module's configuration, with the module's own class as its architecture; None if it has none."""
    if not hasattr(module, "base_model_prefix"):
        return None
    config: Any = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    return config


def _without_code(value: Any) -> Any:
    """Copy a configuration without the Hub repositories that some name for the code of their attention or experts."""
    if isinstance(value, list):
        return [_without_code(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_code(v) for k, v in value.items() if not ("_implementation" in k and "/" in str(v))}


def find_class(config: Any) -> Any:
    """Return the class a configuration names, else the bare model of its type."""
    import transformers

    if (owner := find_named_class(config)) is not None:
        return owner
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise CheckpointError(
            f"this transformers ({transformers.__version__}) has no class {listed(config.architectures or ['?'])}"
        ) from None


def find_named_class(config: Any) -> Any:
    """Return the class that a configuration names; None where this transformers has none of that name for its type."""
    import transformers

    for name in config.architectures or []:
        owner = getattr(transformers, name, None)
        if isinstance(owner, type) and getattr(owner, "config_class", None) is type(config):
            return owner
    return None


def build_without_weights(config: Any, tensors: int) -> Any:
    """Build a module of the class a configuration names, on the meta device.

    Args:
        config: transformers configuration.
        tensors: number of tensors of the checkpoint, which limits the size of the module.
    """
    owner = find_class(config)
    try:
        with torch.device("meta"), limited_size(tensors):
            return owner(copy.deepcopy(config)).eval()
    except Exception as error:  # the code of several hundred families may raise anything
        raise CheckpointError(f"{owner.__name__} cannot be built from its configuration: {error!r}") from error


@contextmanager
def limited_size(tensors: int, elements: int | None = None) -> Iterator[None]:
    """Raise ValueError for a module with many more parts, or elements, than the checkpoint has.

    A configuration may ask for a billion layers, or for a size of a billion, which would all be allocated before
    anything is compared.
    """
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    this_thread, parts, size = threading.get_ident(), 0, 0
    max_parts, max_size = 10_000 + 20 * tensors, math.inf if elements is None else 10**8 + 4 * elements

    def count(module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        nonlocal parts, size
        if threading.get_ident() != this_thread:  # the hooks are global; other threads may build modules meanwhile
            return
        parts, size = parts + 1, size + (part.numel() if isinstance(part, Tensor) else 0)
        if parts > max_parts or size > max_size:
            limit = f"{max_parts} parts" if parts > max_parts else f"{max_size:.3g} elements"
            raise ValueError(f"it would have more than {limit}, and the checkpoint has {tensors} tensors")

    hooks = [
        register_module_module_registration_hook(count),
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def copy_module(module: nn.Module, instead: Mapping[int, Tensor] | None = None) -> Any:
    """Copy a module deeply; `instead` maps ids of its tensors to those that replace them."""
    memo: dict[int, Any] = dict(instead or {})
    for part in module.modules():  # deepcopy refuses tensors that are not leaves, such as those computed by a hook
        memo |= {id(t): t.detach().clone() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(module, memo)


def _find_module_ties(model: Any) -> dict[str, str]:
    """Return `{module key that is not stored: module key it is tied to}`, as declared, else as memory is shared."""
    state = model.state_dict()
    if hasattr(model, "all_tied_weights_keys"):  # declared; but loading unequal tensors unties them
        declared = model.all_tied_weights_keys.items()
        return {target: source for target, source in declared if state[target].data_ptr() == state[source].data_ptr()}
    first: dict[Any, str] = {}
    tied = {}
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for key, tensor in state.items():
        if tensor.numel():
            identity = (
                id(named.get(key, tensor)) if tensor.is_meta else tensor.data_ptr()
            )  # meta tensors have no memory
            source = first.setdefault((identity, tensor.shape, tensor.stride()), key)
            if source != key:
                tied[key] = source
    return tied


def find_ties(model: Any) -> dict[str, str]:
    """Return the ties of a module by disk keys: `{key that is not stored: key it is tied to}`."""
    tied = _find_module_ties(model)
    if not tied:
        return {}
    state = model.state_dict()
    # Tensors are identified by their ids, so each tied key gets a tensor of its own.
    distinct = {key: torch.empty(1, device="meta") if key in tied else tensor for key, tensor in state.items()}
    disk_keys = {id(tensor): key for key, tensor in to_disk_keys(model, distinct).items()}
    return {disk_keys[id(distinct[target])]: disk_keys[id(distinct[source])] for target, source in tied.items()}


def to_disk_keys(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict to disk keys; a tensor that is only renamed stays the same object."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "base_model_prefix"):
        return dict(state)
    from transformers.core_model_loading import revert_weight_conversion

    return cast("dict[str, Tensor]", revert_weight_conversion(model, dict(state)))


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module with each tied tensor only once."""
    tied = _find_module_ties(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def module_names(model: nn.Module) -> dict[str, str] | None:
    """Return `{disk key: module key}`; None where the conversion does more than rename."""
    state = stored_state(model)
    module_keys = {id(tensor): key for key, tensor in state.items()}
    disk = to_disk_keys(model, state)
    if len(disk) != len(state) or not all(id(tensor) in module_keys for tensor in disk.values()):
        return None
    return {key: module_keys[id(tensor)] for key, tensor in disk.items()}


def require_module_names(model: nn.Module) -> dict[str, str]:
    """Return the `module_names` of a module, or raise CheckpointError where it has none."""
    module_keys = module_names(model)
    if module_keys is None:
        raise CheckpointError(f"{type(model).__name__} stores its tensors in another layout than it computes with")
    return module_keys


def refuse_shapeless(module: nn.Module) -> None:
    """Raise CheckpointError for a module with lazy parameters, whose shapes are unknown until it has run."""
    lazy = [n for n, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise CheckpointError(
            f"{type(module).__name__} has not initialised {listed(lazy)} yet; run it once, so that shapes are known"
        )


def untie(model: Any, keys: Collection[str]) -> dict[str, str]:
    """Untie tensors of a module in place and return their `{disk key: module key}`."""
    untied = {}
    for key in _find_module_ties(model):
        (name,) = to_disk_keys(model, {key: model.state_dict()[key]})
        if name in keys:
            path, _, attribute = key.rpartition(".")
            module = model.get_submodule(path)
            shared = getattr(module, attribute)
            setattr(module, attribute, nn.Parameter(shared.detach().clone(), shared.requires_grad))
            untied[name] = key
    if set(untied) != set(keys):
        raise CheckpointError(f"{type(model).__name__} has no tied {listed(set(keys) - set(untied))} to untie")
    if getattr(model, "config", None) is not None:
        model.config.tie_word_embeddings = False
    return untied


def fill_module(
    template: nn.Module, tensors: Mapping[str, Tensor], module_keys: Mapping[str, str], dtype: torch.dtype | None
) -> nn.Module:
    """Return a copy of a module with other tensors.

    Args:
        template: module to copy.
        tensors: its tensors, by disk keys.
        module_keys: its `module_names`, by disk keys.
        dtype: dtype of its floating-point tensors; by default the dtypes of `tensors`.
    """
    model: Any = copy_module(template)
    if untied := set(tensors) - module_keys.keys():  # tied in the template alone
        module_keys = {**module_keys, **untie(model, untied)}
    if dtype is torch.float64:  # for checks; else buffers that are not stored (rotary frequencies) keep their dtype
        model = model.double()
    targets = dict(model.named_parameters(remove_duplicate=False))
    targets |= dict(model.named_buffers(remove_duplicate=False))
    for key, tensor in tensors.items():
        target = targets[module_keys[key]]  # a tied parameter is one object under two names
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        target.data = tensor.to(target.device, kind, copy=True)
    return model


def load_module(owner: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> Any:
    """Load tensors, by disk keys, into a module of a transformers class; `name` stands for it in error messages."""
    elements = sum(tensor.numel() for tensor in tensors.values())
    try:
        with quiet_transformers(), limited_size(len(tensors), elements):
            model, info = owner.from_pretrained(
                None, config=copy.deepcopy(config), state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # the code of several hundred families may raise anything
        raise CheckpointError(f"{name} does not load: {_first_mismatch(config, tensors) or error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise CheckpointError(
                f"{name} does not load: {problem.replace('_', ' ')} {listed(map(str, info[problem]))}"
            )
    return model.eval()


def _first_mismatch(config: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor whose shape differs from the one its configuration implies."""
    try:
        skeleton = build_without_weights(config, len(tensors))
    except CheckpointError as error:
        return str(error)
    for key, part in to_disk_keys(skeleton, stored_state(skeleton)).items():
        if key in tensors and part.shape != tensors[key].shape:
            return f"{key} is {tuple(tensors[key].shape)}, and its configuration says {tuple(part.shape)}"
    return None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide what transformers shows while it loads: a progress bar, even for tensors in memory, and its own report."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
