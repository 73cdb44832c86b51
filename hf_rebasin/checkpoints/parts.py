"""Parts of models: which tensors belong to the encoder, the language model, the vision tower and so on.

A part is named by a component of its tensors' keys, on disk or in the class: `vision_tower`, `decoder`, or a longer
path such as `model.visual.blocks`. Some parts are called otherwise in recipes for mergekit than in the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from ..errors import OptionError, listed, nearest, quoted
from .checkpoint import Checkpoint
from .model_classes import is_recomputed

REST = "default"  # all tensors that no other part has
# Components that a part may have under another name, the likeliest first, as transformers looks for them, too.
LANGUAGE = ("text_decoder", "language_model", "text_model", "decoder")
VISION = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower", "encoder")
AUDIO = ("audio_tower", "audio_encoder", "speech_encoder")
PROJECTOR = ("multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "merger")
ROLES = (LANGUAGE, VISION, AUDIO, PROJECTOR)
SHARED = "shared"  # the embedding of an encoder and a decoder, with the head


def module_keys(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, frozenset[str]]:
    """Return `{name of a part: disk keys of its tensors}`; each tensor is in one part.

    A part within another one, such as the projector of some vision towers, is taken out of that one if it is named,
    too. The head belongs to the decoder, or to the embedding where that is a part (`shared`); an embedding that
    several parts share is with the first of them. `default` has all others.

    Args:
        checkpoint: the model.
        names: names of its parts: components of its keys, paths, or mergekit's names.

    Raises:
        OptionError: a name is not a part of the model, or several; or a tensor is in none of the parts.

    Example:
        >>> parts = module_keys(whisper, ["encoder", "decoder"])
        >>> sorted(parts["encoder"])[0]
        'model.encoder.conv1.bias'
    """
    if not names:
        raise OptionError("no part of the model is named")
    keys = list(checkpoint.parts)
    spelled = _spellings(checkpoint)
    known = dict.fromkeys(keys, "")  # {key: the named part that it is in}
    depth = dict.fromkeys(keys, -1)
    paths = {name: _find_paths(name, spelled, checkpoint.name) for name in names if name != REST}
    for name, part_paths in paths.items():
        for key in keys:
            within = [path for path in part_paths for spelling in spelled[key] if _is_within(spelling, path)]
            length = max((path.count(".") for path in within), default=-1)
            if length > depth[key]:
                known[key], depth[key] = name, length
    if REST not in names:
        _assign_shared(checkpoint, paths, known)
    left = [key for key, name in known.items() if not name]
    if REST in names:
        known |= dict.fromkeys(left, REST)
    elif left := [key for key in left if not _is_of_no_account(checkpoint, key)]:
        raise OptionError(
            f"{listed(names)}: these parts of {checkpoint.name} do not have {listed(left)}; name the part that has "
            f"them, or {REST} for all that is left"
        )
    return {name: frozenset(key for key, part in known.items() if part == name) for name in names}


def _spellings(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Return `{disk key: its name on disk, and in the class that loads it}`, also for tied tensors."""
    layout = checkpoint.layout
    loaded = {} if layout is None else layout.find_tensors(checkpoint.parts)
    return {key: (key, loaded[key].key) if key in loaded else (key,) for key in checkpoint.parts}


def _is_within(key: str, path: str) -> bool:
    return key.startswith(f"{path}.")


def _find_paths(name: str, spelled: Mapping[str, Sequence[str]], model: str) -> list[str]:
    """Return the paths of the modules that a name stands for."""
    roles = next((role for role in ROLES if name in role), ())
    for alias in (name, *(other for other in roles if other != name)):
        on_disk, in_class = (_outermost(alias, [s[which] for s in spelled.values()]) for which in (0, -1))
        if paths := on_disk or in_class:
            if len(paths) > 1:
                raise OptionError(f"{name} stands for several parts of {model}: {listed(paths)}; give one of these")
            path = paths[0]
            return [path, f"{path.rpartition('.')[0]}.deepstack_{alias}_list".lstrip(".")]  # qwen3-vl has several
    known = {name for s in spelled.values() for key in s for name in key.split(".")[:-1][:2] if not name.isdigit()}
    roles_here = {role[0] for role in ROLES if any(_outermost(alias, _flat(spelled)) for alias in role)}
    raise OptionError(f"{quoted(name)} is not a part of {model}{nearest(name, known | roles_here | {REST})}")


def _flat(spelled: Mapping[str, Sequence[str]]) -> list[str]:
    return [key for spellings in spelled.values() for key in spellings]


def _outermost(name: str, keys: Sequence[str]) -> list[str]:
    """Return the paths to modules of a name, or of a dotted path, as far out as there are any."""
    by_depth: dict[int, dict[str, None]] = {}
    pattern = re.compile(rf"(?:^|\.){re.escape(name)}(?=\.)")
    for key in keys:
        if match := pattern.search(key):
            path = key[: match.end()]
            by_depth.setdefault(path.count("."), {})[path] = None
    return list(by_depth[min(by_depth)]) if by_depth else []


def _assign_shared(checkpoint: Checkpoint, paths: Mapping[str, Sequence[str]], known: dict[str, str]) -> None:
    """Assign the head, and an embedding that parts share, to one of the parts."""
    heads = _find_heads(checkpoint)
    decoder = next((name for name in paths if name == SHARED), None) or next(
        (name for name, part in paths.items() if name in LANGUAGE or part[0].rpartition(".")[2] in LANGUAGE), None
    )
    ties: dict[str, list[str]] = {}
    for target, source in checkpoint.declared_ties.items():
        ties.setdefault(source, []).append(target)
    for key, name in known.items():
        if name:
            continue
        tied = ties.get(key, ())
        sharing = [part for part, ends in paths.items() if any(_is_within(t, end) for t in tied for end in ends)]
        if sharing:
            known[key] = sharing[0]
        elif decoder is not None and key in heads:
            known[key] = decoder


def _find_heads(checkpoint: Checkpoint) -> set[str]:
    """Return the disk keys of the tensors that turn the last hidden state into scores of tokens."""
    heads = {key for key in checkpoint.parts if key.rpartition(".")[2] == "final_logits_bias"}
    layout = checkpoint.layout
    module = None if layout is None else layout.module.get_output_embeddings()
    if layout is None or module is None:
        return heads | {key for key in checkpoint.parts if re.search(r"(^|\.)(lm_head|proj_out|embed_out)\.", key)}
    name = next((name for name, other in layout.module.named_modules() if other is module), None)
    loaded = layout.find_tensors(checkpoint.parts)
    return heads | {key for key, tensor in loaded.items() if name is not None and _is_within(tensor.key, name)}


def _is_of_no_account(checkpoint: Checkpoint, key: str) -> bool:
    return key in checkpoint.passed_over or is_recomputed(key, checkpoint.parts[key])
