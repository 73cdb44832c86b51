"""Which tensor of one model stands for which of another, by the keys of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..checkpoints.checkpoint import Checkpoint, Prefix
from ..checkpoints.lazy import Lazy, Tensors
from ..checkpoints.model_classes import recomputed
from ..errors import MismatchError, some
from ..symmetries.table import table_for


def equal(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors are the same, read chunk by chunk."""
    return one is other or all(torch.equal(a, b) for a, b in zip(one.chunks(), other.chunks(), strict=True))


def head_of(checkpoint: Checkpoint, prefix: str) -> set[str]:
    """The disk keys that do not belong to the base model; none where no key says that there is a head."""
    inside = {key for key in checkpoint.parts if key.startswith(prefix)}
    return set(checkpoint.parts) - inside if inside else set()


def untied_like(first: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint:
    """The first model, with what it ties and another one knowingly does not stored apart; if there is any.

    That a file stores for a tie what its own class would not look at is not knowing.
    """
    apart: dict[str, str] = {}
    with_more = [other for other in others if not other.parts.keys() <= first.parts.keys()]
    for target, kept in first.ties.items() if with_more else ():
        for other in with_more:
            there = target in other.parts and kept in other.parts and target not in other.declared_ties
            if there and not equal(other.parts[target], other.parts[kept]):
                apart[target] = kept
    return first.apart(apart) if apart else first


def lined_up(
    first: Checkpoint,
    other: Checkpoint,
    prefix: Prefix = None,
    *,
    backbone_only: bool = False,
) -> dict[str, Lazy]:
    """The other's tensors by the first's disk keys; a tied tensor may be stored by one and not by the other.

    What old versions of transformers stored and new ones recompute is left out, and so is the head if only the
    backbone is wanted. Where both files have the same keys nothing else is looked at, no class and no configuration.

    Raises:
        MismatchError: tensors that are missing, left over, stored apart though tied in the first, or of another shape.
    """
    ties: Mapping[str, str] = {}
    if first.parts.keys() == other.parts.keys():
        mine = {key: key for key, part in first.parts.items() if not recomputed(key, part)}
        theirs = {key: other.parts[key] for key in mine}
    else:
        if prefix is None:  # that of the table also knows old spellings; a state dict has none of its own
            table = table_for(first.config)
            prefix = first.base_prefix if table is None else table.prefix or first.base_prefix
        mine, theirs = first.canonical(prefix), dict(other.state(prefix).parts)
        ties = first.canonical_ties(prefix)
        for target, kept in other.canonical_ties(prefix).items():
            if target in mine and target not in theirs and kept in theirs:
                theirs[target] = theirs[kept]
    if backbone_only:
        mine, theirs = _backbones(first, other, mine, theirs, prefix)
    missing = [key for key in mine if key not in theirs]
    left = [key for key in theirs if key not in mine]
    extra = [key for key in left if ties.get(key) not in mine]
    untied = [key for key in left if ties.get(key) in mine and not equal(theirs[key], theirs[ties[key]])]
    kinds = [
        f"{key} {theirs[key].dtype} instead of {first.parts[disk].dtype}"
        for key, disk in mine.items()
        if key in theirs and theirs[key].dtype.is_floating_point != first.parts[disk].dtype.is_floating_point
    ]
    shapes = [
        f"{key} {theirs[key].shape} instead of {first.parts[disk].shape}"
        for key, disk in mine.items()
        if key in theirs and theirs[key].shape != first.parts[disk].shape
    ]
    problems = [
        f"{what}: {some(keys)}"
        for what, keys in (
            ("it lacks", missing),
            (f"it has what {first.name} lacks", extra),
            (f"it has values of its own for what {first.name} ties", untied),
            ("it has other shapes", shapes),
            ("it has other kinds of numbers", kinds),
        )
        if keys
    ]
    if problems:
        hint = f". Where only the heads differ, that of {first.name} can be kept (--backbone-only)"
        raise MismatchError(
            f"{other.name} cannot be merged into {first.name}; {'; '.join(problems)}{'' if backbone_only else hint}"
        )
    return {disk: theirs[key] for key, disk in mine.items()}


def lined_state(first: Checkpoint, lined: Mapping[str, Lazy], prefix: str | tuple[str, ...]) -> Tensors:
    """What was lined up, by the first's canonical keys; for solvers and alignments."""
    return Tensors({name: lined[key] for name, key in first.canonical(prefix).items() if key in lined})


def _backbones(
    first: Checkpoint,
    other: Checkpoint,
    mine: Mapping[str, str],
    theirs: Mapping[str, Lazy],
    prefix: Prefix,
) -> tuple[dict[str, str], dict[str, Lazy]]:
    """Both without their heads."""
    base, theirs = first.base_prefix, dict(theirs)
    if not base:
        raise MismatchError(f"no class is known of {first.name}, so its head cannot be told from its backbone")
    heads = head_of(first, base)
    kept = {key for key, disk in mine.items() if disk in heads}
    for target, source in first.declared_ties.items():  # a head that is the embedding, stored once more
        one, two = (next((k for k, disk in mine.items() if disk == said), None) for said in (target, source))
        if one in kept and two in theirs and two not in kept and equal(first.parts[target], first.parts[source]):
            kept.discard(one)
            theirs[one] = theirs[two]
    left_out = {id(other.parts[key]) for key in head_of(other, base)}
    return (
        {key: disk for key, disk in mine.items() if key not in kept},
        {key: part for key, part in theirs.items() if key not in kept and id(part) not in left_out},
    )
