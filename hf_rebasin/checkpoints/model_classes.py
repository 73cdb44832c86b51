"""Classes of transformers, and modules: which tensors they tie, and what they call on disk what they hold.

The names of a module may change from one version of transformers to the next; those on disk stay.
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

from ..errors import CheckpointError, shown, some
from .folder import read_json
from .lazy import Lazy

# What GPTQ, AWQ, bitsandbytes and compressed-tensors store beside or instead of weights.
QUANTISED = (".qweight", ".qzeros", ".weight_packed", ".absmax", ".SCB", ".weight_scale", ".weight_scale_inv")

# Of these transformers makes lists and modules, as many as a configuration says; no model has as many as this.
COUNTED = {
    re.compile("(layer|block|depth|stage)s?$"): 2000,
    re.compile("(expert|indice|codebook)s$"): 10_000,
    re.compile("labels$"): 100_000,
}
LARGEST = 2**63  # of other numbers


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` of a folder says, empty if there is none.

    Raises:
        CheckpointError: it is no JSON, or what is read of it is not of its kind.
    """
    said = read_json(folder / "config.json")
    kinds = {"model_type": str, "architectures": list, "id2label": dict, "dtype": str, "torch_dtype": str}
    for key, kind in kinds.items():
        value = said.get(key)
        sound = value is None or isinstance(value, kind)
        if sound and isinstance(value, list):
            sound = all(isinstance(name, str) for name in value)
        if not sound:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {shown(value)}, which transformers does not write"
            )
    if not all(str(row).isdecimal() for row in said.get("id2label") or ()):
        raise CheckpointError(
            f"{folder / 'config.json'}: the keys of id2label are no numbers: {shown(said['id2label'])}"
        )
    for name, number in _whole_numbers(said):
        most = next((most for counted, most in COUNTED.items() if counted.search(name)), LARGEST)
        if abs(number) > most:
            raise CheckpointError(
                f"{folder / 'config.json'}: {name} is {number:.3g}, which is more than any model has"
            )
    return said


def _whole_numbers(said: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """(key, number) of all that are in a configuration, and in the configurations in it."""
    if isinstance(said, int):
        yield name, said
    elif isinstance(said, list):
        for one in said:
            yield from _whole_numbers(one, name)
    elif isinstance(said, dict) and (not name or name.endswith("config")):
        for key, one in said.items():
            yield from _whole_numbers(one, key)


def config_of(said: Mapping[str, Any], folder: Path | None) -> Any:
    """The transformers configuration that a `config.json` says; None for what transformers does not know."""
    if "model_type" not in said:
        return None
    from transformers import CONFIG_MAPPING

    if said["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[said["model_type"]].from_dict(_without_code(said))
    except Exception as error:  # of whatever the code of some hundred families stumbles on
        raise CheckpointError(f"transformers cannot use the config.json of {folder}: {error}") from error
    config.name_or_path = str(folder or "")
    return config


def quantised(parts: Mapping[str, Lazy], said: Mapping[str, Any]) -> str | None:
    """What shows that a model is quantised; None if nothing does."""
    kinds = {part.dtype for key, part in parts.items() if part.dtype.is_floating_point and not recomputed(key, part)}
    narrow = sorted(str(kind) for kind in kinds if kind.itemsize < 2)
    packed = [
        key
        for key, part in parts.items()
        if key.endswith(QUANTISED) or (key.endswith("weight") and part.dtype.itemsize == 1 and len(part.shape) > 1)
    ]
    if narrow or packed:
        return some(narrow or packed, 1)
    return None if said.get("quantization_config") is None else "its configuration says so"


def recomputed(key: str, part: Lazy) -> bool:
    """Buffers that old versions of transformers stored: causal masks, position ids, rotary frequencies."""
    if re.search(r"(^|\.)(attn|attention)\.(masked_)?bias$", key):
        return len(part.shape) in (0, 4)
    return re.search(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$", key) is not None


def own_config(module: nn.Module) -> Any:
    """A module's configuration with the module's class, not that of the file it was read from; None if it has none."""
    if not hasattr(module, "base_model_prefix"):
        return None
    config: Any = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    return config


def _without_code(said: Any) -> Any:
    """A copy that asks for no code of the Hub: some name a repository there for their attention or experts."""
    if isinstance(said, list):
        return [_without_code(one) for one in said]
    if not isinstance(said, dict):
        return said
    return {k: _without_code(v) for k, v in said.items() if not ("_implementation" in k and "/" in str(v))}


def class_of(config: Any) -> Any:
    """The class a configuration names, else the bare model of its type."""
    import transformers

    for name in config.architectures or []:
        named = getattr(transformers, name, None)
        if isinstance(named, type) and getattr(named, "config_class", None) is type(config):
            return named
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise CheckpointError(
            f"this transformers ({transformers.__version__}) has no class {some(config.architectures or ['?'])}"
        ) from None


def without_weights(config: Any, tensors: int) -> Any:
    """A module of the class a configuration names, on the meta device; `tensors` is how many the checkpoint has."""
    owner = class_of(config)
    try:
        with torch.device("meta"), _no_more_parts(tensors):
            return owner(copy.deepcopy(config)).eval()
    except Exception as error:  # of whatever the code of some hundred families stumbles on
        raise CheckpointError(f"{owner.__name__} cannot be built from its configuration: {error!r}") from error


@contextmanager
def _no_more_parts(tensors: int, elements: int | None = None) -> Iterator[None]:
    """ValueError for a module with many more parts, or elements in them, than the checkpoint has tensors.

    A configuration can say a billion layers, or a size of a billion, which would all be made before anything is
    compared.
    """
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    own, parts, size = threading.get_ident(), 0, 0
    most, largest = 10_000 + 20 * tensors, math.inf if elements is None else 10**8 + 4 * elements

    def count(module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        nonlocal parts, size
        if threading.get_ident() != own:  # modules that other threads build meanwhile are theirs
            return
        parts, size = parts + 1, size + (part.numel() if isinstance(part, Tensor) else 0)
        if parts > most or size > largest:
            what = f"{most} parts" if parts > most else f"{largest:.3g} elements"
            raise ValueError(f"it would have more than {what}, and the checkpoint has {tensors} tensors")

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


def copied(module: nn.Module, instead: Mapping[int, Tensor] | None = None) -> Any:
    """A deep copy of a module, with other tensors for some, given by their ids."""
    memo: dict[int, Any] = dict(instead or {})
    for part in module.modules():  # what a hook computed from parameters is no leaf, which deepcopy would refuse
        memo |= {id(t): t.detach().clone() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(module, memo)


def _tied(model: Any) -> dict[str, str]:
    """`{module key that is not stored: module key it shares}`, as transformers declares it, else as memory shows."""
    state = model.state_dict()
    if hasattr(model, "all_tied_weights_keys"):  # declared; but loading unequal tensors unties them
        declared = model.all_tied_weights_keys.items()
        return {target: kept for target, kept in declared if state[target].data_ptr() == state[kept].data_ptr()}
    first: dict[Any, str] = {}
    tied = {}
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for key, tensor in state.items():
        if tensor.numel():
            place = id(own.get(key, tensor)) if tensor.is_meta else tensor.data_ptr()  # no memory, no place in it
            kept = first.setdefault((place, tensor.shape, tensor.stride()), key)
            if kept != key:
                tied[key] = kept
    return tied


def ties_of(model: Any) -> dict[str, str]:
    """The same by disk keys."""
    tied = _tied(model)
    if not tied:
        return {}
    state = model.state_dict()
    # A tied key shares its tensor, so it is told apart by giving it one of its own.
    distinct = {key: torch.empty(1, device="meta") if key in tied else tensor for key, tensor in state.items()}
    names = {id(tensor): key for key, tensor in to_disk(model, distinct).items()}
    return {names[id(distinct[target])]: names[id(distinct[kept])] for target, kept in tied.items()}


def class_ties(config: Any, tensors: int) -> dict[str, str]:
    """The ties of the class a configuration names, by disk keys; `tensors` is how many the checkpoint has."""
    return ties_of(without_weights(config, tensors))


def to_disk(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by disk keys; what is only renamed stays the same tensor object."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "base_model_prefix"):
        return dict(state)
    from transformers.core_model_loading import revert_weight_conversion

    return cast("dict[str, Tensor]", revert_weight_conversion(model, dict(state)))


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by module keys, with a tied tensor once."""
    tied = _tied(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def module_names(model: nn.Module) -> dict[str, str] | None:
    """`{disk key: module key}`; None where a conversion does more than rename."""
    state = stored(model)
    names = {id(tensor): key for key, tensor in state.items()}
    disk = to_disk(model, state)
    if len(disk) != len(state) or not all(id(tensor) in names for tensor in disk.values()):
        return None
    return {key: names[id(tensor)] for key, tensor in disk.items()}


def one_by_one(model: nn.Module) -> dict[str, str]:
    """`module_names` of a module that has to have them."""
    names = module_names(model)
    if names is None:
        raise CheckpointError(f"{type(model).__name__} stores its tensors otherwise than it computes with them")
    return names


def refuse_shapeless(module: nn.Module) -> None:
    """Raise CheckpointError for a module whose shapes are known only once it has run."""
    lazy = [n for n, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise CheckpointError(
            f"{type(module).__name__} has no {some(lazy)} yet; run it once, so that shapes are known"
        )


def separated(model: Any, keys: Collection[str]) -> dict[str, str]:
    """Give tied tensors one of their own, in place; `{disk key: module key}` of them."""
    found = {}
    for key in _tied(model):
        (name,) = to_disk(model, {key: model.state_dict()[key]})
        if name in keys:
            path, _, attribute = key.rpartition(".")
            module = model.get_submodule(path)
            shared = getattr(module, attribute)
            setattr(module, attribute, nn.Parameter(shared.detach().clone(), shared.requires_grad))
            found[name] = key
    if set(found) != set(keys):
        raise CheckpointError(f"{type(model).__name__} has no tied {some(set(keys) - set(found))} to be told apart")
    if getattr(model, "config", None) is not None:
        model.config.tie_word_embeddings = False
    return found


def filled(
    template: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype | None
) -> nn.Module:
    """A copy of a module with other tensors, by disk keys; `names` are its `module_names`."""
    model: Any = copied(template)
    if apart := set(tensors) - names.keys():  # tied there, but not here
        names = {**names, **separated(model, apart)}
    if dtype is torch.float64:  # for checking; else what is not stored (rotary frequencies) keeps its precision
        model = model.double()
    places = dict(model.named_parameters(remove_duplicate=False))
    places |= dict(model.named_buffers(remove_duplicate=False))
    for key, tensor in tensors.items():
        place = places[names[key]]  # a tied one is one object under two names
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        place.data = tensor.to(place.device, kind, copy=True)
    return model


def loaded(owner: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> Any:
    """A module of a class of transformers with tensors by disk keys; `name` is what messages call it."""
    elements = sum(tensor.numel() for tensor in tensors.values())
    try:
        with _without_bars(), _no_more_parts(len(tensors), elements):
            model, info = owner.from_pretrained(
                None, config=copy.deepcopy(config), state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # of whatever the code of some hundred families stumbles on
        raise CheckpointError(f"{name} does not load: {_why_not(config, tensors) or error}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            raise CheckpointError(f"{name} does not load: {what.replace('_', ' ')} {some(map(str, info[what]))}")
    return model.eval()


def _why_not(config: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is of another shape than the configuration says."""
    try:
        skeleton = without_weights(config, len(tensors))
    except CheckpointError as error:
        return str(error)
    for key, part in to_disk(skeleton, stored(skeleton)).items():
        if key in tensors and part.shape != tensors[key].shape:
            return f"{key} is {tuple(tensors[key].shape)}, and its configuration says {tuple(part.shape)}"
    return None


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bar of transformers, which shows one for tensors that are in memory already."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
