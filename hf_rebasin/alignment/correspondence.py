"""Correspondence: which tensor of one model is merged with which tensor of another."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import torch

from ..checkpoints.canonical import CanonicalView
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.lazy import Lazy
from ..checkpoints.model_classes import is_recomputed
from ..errors import CheckpointError, MismatchError, listed
from ..symmetries.table import Table, canonical_view

logger = logging.getLogger(__name__)


def tensors_equal(a: Lazy, b: Lazy) -> bool:
    """Whether two tensors are equal, read chunk by chunk."""
    return a is b or all(torch.equal(*chunks) for chunks in zip(a.chunks(), b.chunks(), strict=True))


def head_keys(checkpoint: Checkpoint, prefix: str) -> set[str]:
    """Return the disk keys outside the base model, and those that its class has no use for.

    None are outside if no key begins with the prefix.
    """
    names = checkpoint.usual_names
    inside = {key for key in checkpoint.parts if names.get(key, key).startswith(prefix)}
    return (set(checkpoint.parts) - inside if inside else set()) | set(checkpoint.unused)


def untie_like(first: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint:
    """Return the first model, with those tensors untied that another model deliberately stores separately.

    A tied tensor that a file stores although its own class ignores it is not stored separately on purpose.
    """
    to_untie: dict[str, str] = {}
    larger = [other for other in others if not other.parts.keys() <= first.parts.keys()]
    for target, source in first.ties.items() if larger else ():
        for other in larger:
            has_both = target in other.parts and source in other.parts and target not in other.declared_ties
            if has_both and not tensors_equal(other.parts[target], other.parts[source]):
                to_untie[target] = source
    return first.apart(to_untie) if to_untie else first


def untie_for_merge(first: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint:
    """Return the model that a merge has the keys of, see `untie_like`; note what it stores separately."""
    separate = untie_like(first, others)
    for target in separate.parts.keys() - first.parts.keys():
        having = [other.name for other in others if target in other.parts]
        logger.info(
            "the merge stores %s separately, though %s ties it to %s, because it differs from that in %s",
            *(target, first.name, first.ties[target], listed(having)),
        )
    return separate


def match_keys(
    first: Checkpoint,
    other: Checkpoint,
    table: Table | None = None,
    *,
    backbone_only: bool = False,
) -> dict[str, Lazy]:
    """Match another model's tensors to the disk keys of the first; either may store a tied tensor once or twice.

    Buffers that old versions of transformers stored and new ones recompute are left out, as are the heads with
    `backbone_only`. If both models have the same keys, neither classes nor configurations are needed.

    Raises:
        MismatchError: tensors are missing, left over, stored separately though tied in the first, or of another shape.
    """
    ties: Mapping[str, str] = {}
    if first.parts.keys() == other.parts.keys():
        disk_keys = {key: key for key, part in first.parts.items() if not is_recomputed(key, part)}
        other_parts = {key: other.parts[key] for key in disk_keys}
    else:
        view = canonical_view(first, table)
        other_view = CanonicalView(other, first.base_prefix if view.prefix is None else view.prefix)
        disk_keys, other_parts, ties = view.keys, dict(other_view.state.parts), view.ties
        for target, source in other_view.ties.items():
            if target in disk_keys and target not in other_parts and source in other_parts:
                other_parts[target] = other_parts[source]
        if not other_parts.keys() <= disk_keys.keys():
            other_parts = _convert_like(disk_keys, other_view, other_parts)
    if backbone_only:
        disk_keys, other_parts = _drop_heads(first, other, disk_keys, other_parts)
    missing = [key for key in disk_keys if key not in other_parts]
    left_over = [key for key in other_parts if key not in disk_keys]
    extra = [key for key in left_over if ties.get(key) not in disk_keys]
    untied = [
        key
        for key in left_over
        if ties.get(key) in disk_keys and not tensors_equal(other_parts[key], other_parts[ties[key]])
    ]
    dtypes = [
        f"{key} {other_parts[key].dtype} instead of {first.parts[disk].dtype}"
        for key, disk in disk_keys.items()
        if key in other_parts and other_parts[key].dtype.is_floating_point != first.parts[disk].dtype.is_floating_point
    ]
    shapes = [
        f"{key} {other_parts[key].shape} instead of {first.parts[disk].shape}"
        for key, disk in disk_keys.items()
        if key in other_parts and other_parts[key].shape != first.parts[disk].shape
    ]
    problems = [
        f"{problem}: {listed(keys)}"
        for problem, keys in (
            ("it lacks", missing),
            (f"it has what {first.name} lacks", extra),
            (f"it has values of its own for what {first.name} ties", untied),
            ("it has other shapes", shapes),
            ("it has other kinds of numbers", dtypes),
        )
        if keys
    ]
    if problems:
        hint = ""
        with suppress(MismatchError, CheckpointError):  # offered only where it helps
            if not backbone_only and match_keys(first, other, table, backbone_only=True):
                hint = f". Where only the heads differ, a merge can keep the head of {first.name} (--backbone-only)"
        raise MismatchError(f"{other.name} cannot be merged into {first.name}; {'; '.join(problems)}{hint}")
    return {disk: other_parts[key] for key, disk in disk_keys.items()}


def _convert_like(wanted: Collection[str], view: CanonicalView, parts: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Return a model's tensors by canonical keys, with those that nobody wants converted to some that are wanted.

    A file may hold the experts of a layer as one tensor, and another one by one: transformers loads both.
    """
    layout, parts = view.checkpoint.layout, dict(parts)
    left_over = [view.keys[key] for key in parts if key in view.keys and key not in wanted]
    if layout is None:
        return parts
    for keys in layout.conversions(view.checkpoint.parts):
        if set(keys) <= set(left_over):
            tensors = layout.module_tensors({key: view.checkpoint.parts[key] for key in keys})
            for made in (tensors, layout.written_tensors(tensors)):
                by_name = {view.rename(key): part for key, part in made.items()}
                if by_name.keys() <= set(wanted):
                    dropped = {view.rename(key) for key in keys}
                    parts = {key: part for key, part in parts.items() if key not in dropped} | by_name
                    break
    return parts


def match_submodels(first: Checkpoint, other: Checkpoint) -> dict[str, dict[str, Lazy]]:
    """Match the sub-models of two models, by their sub-folders, as `match_keys` matches tensors.

    Raises:
        MismatchError: only one of the two has a sub-folder with weights, or their tensors do not match.
    """
    for having, lacking in ((first, other), (other, first)):
        if paths := [path for path in having.submodels if path not in lacking.submodels]:
            raise MismatchError(
                f"{having.name} has weights of its own in {listed(paths)}, and {lacking.name} has not; the parts that "
                f"{first.name} has after its backbone can be kept as they are (--backbone-only)"
            )
    return {path: match_keys(submodel, other.submodels[path]) for path, submodel in first.submodels.items()}


def _drop_heads(
    first: Checkpoint,
    other: Checkpoint,
    disk_keys: Mapping[str, str],
    other_parts: Mapping[str, Lazy],
) -> tuple[dict[str, str], dict[str, Lazy]]:
    """Return the keys of the first and the tensors of the other, without the tensors of their heads."""
    base, other_parts = first.base_prefix, dict(other_parts)
    if not base:
        raise MismatchError(f"no class is known for {first.name}, so its head cannot be told from its backbone")
    heads = head_keys(first, base)
    dropped = {key for key, disk in disk_keys.items() if disk in heads}
    canonical = {disk: key for key, disk in disk_keys.items()}
    for target, source in first.declared_ties.items():  # a head that is the embedding, stored once more
        tied, kept = canonical.get(target), canonical.get(source)
        if (
            tied in dropped
            and kept in other_parts
            and kept not in dropped
            and tensors_equal(first.parts[target], first.parts[source])
        ):
            dropped.discard(tied)
            other_parts[tied] = other_parts[kept]
    other_head = {id(other.parts[key]) for key in head_keys(other, base)}
    return (
        {key: disk for key, disk in disk_keys.items() if key not in dropped},
        {key: part for key, part in other_parts.items() if key not in dropped and id(part) not in other_head},
    )
