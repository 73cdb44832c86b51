"""Merging checkpoints that share their coordinates, one key at a time, with the keys and dtypes of the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import registry
from .checkpoint import Checkpoint, Prefix
from .classes import recomputed
from .errors import CheckpointError, MismatchError, OptionError, some
from .knobs import knobs_for
from .lazy import Computed, Here, Lazy, Tensors, all_finite, rounded
from .table import table_for
from .varying import Varying, reading, resolved

logger = logging.getLogger(__name__)


def combine(
    checkpoints: Sequence[Checkpoint],
    method: str,
    knobs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    backbone_only: bool = False,
) -> Checkpoint:
    """Merge checkpoints tensor by tensor; those of folders when the result is saved or asked for.

    Sums are taken in float64 (in float32 for half precision) and rounded once, to the dtype that the first model has
    for that key or to `dtype`. What is no floating-point tensor (token ids, batch counts) is the first model's.

    Args:
        checkpoints: the models; the first gives keys, shapes, dtypes, configuration and tokenizer.
        method: a file of `merge_methods/`.
        knobs: its keyword arguments; numbers may be others for other tensors, see `hf_rebasin.varying`.
        dtype: of the floating-point tensors of the result.
        backbone_only: keep the first model's head; the others may have another, or none.

    Raises:
        CheckpointError: a quantised model. When values are computed: NaN or Inf in a model, or in the result (an
            overflow of `dtype`).
        MismatchError: tensors that are missing, left over or of another shape.
        UnknownNameError, OptionError: the method or a knob.
    """
    methods_with(method, knobs or {}, len(checkpoints))
    module = registry.find("merge_methods", method)
    sums = getattr(module, "sums", None)
    elementwise = getattr(module, "ELEMENTWISE", False) or sums is not None
    given, *others = checkpoints
    first = untied_like(given, others)
    if apart := [key for key in first.parts if key not in given.parts]:
        logger.info("%s of the merge is stored apart, as one of the models has it so", some(apart))
    checkpoints = [first, *others]
    lined = [lined_up(first, checkpoint, backbone_only=backbone_only) for checkpoint in checkpoints]
    merges = methods_with(method, knobs or {}, len(checkpoints), averaged(first, lined[-1]))
    parts: dict[str, Lazy] = {}
    for key, one in first.parts.items():
        if not one.dtype.is_floating_point:
            if key in lined[-1]:  # they all have the same keys
                _refuse_if_it_matters(key, [model[key] for model in lined], checkpoints)
        elif key in lined[-1]:
            inputs = [model[key] for model in lined]
            compute = _Merge(key, merges[key], inputs, checkpoints, one.dtype if dtype is None else dtype)
            prepare = None if sums is None else partial(compute.with_sums, sums)
            parts[key] = Computed(one.shape, compute.dtype, inputs, compute, elementwise, prepare)
        elif not recomputed(key, one):  # of the head that is kept
            alone = _Merge(key, lambda tensors: tensors[0], [one], checkpoints, one.dtype if dtype is None else dtype)
            parts[key] = Computed(one.shape, alone.dtype, [one], alone, True)
        if isinstance(one, Here) and key not in parts:  # whoever holds it may change it later
            parts[key] = one.kept()
    return first.with_parts(
        parts,
        name=f"{method} of {', '.join(c.name for c in checkpoints)}",
        sources=tuple(source for c in checkpoints for source in c.sources),
        commit=None,
    )


@dataclass(frozen=True)
class _Merge:
    """What is done to the tensors of one key, or to a chunk of each."""

    key: str
    merge: Callable[..., Tensor]
    inputs: Sequence[Lazy]
    checkpoints: Sequence[Checkpoint]
    dtype: torch.dtype

    @property
    def half(self) -> bool:
        """Whether all is half precision, so that sums in float32 are exact enough."""
        return max(self.dtype.itemsize, *(part.dtype.itemsize for part in self.inputs)) <= 2

    def _widened(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        wide = torch.float32 if self.half else torch.float64
        return [tensor.to(wide) for tensor in tensors]

    def with_sums(self, sums: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Lazy]) -> _Merge:
        """The same for chunks, with what has to be known of the whole tensors."""
        total = torch.zeros((), dtype=torch.float64)
        for chunks in zip(*(one.chunks() for one in inputs), strict=True):
            total = total + sums(self._widened(chunks))
        return replace(self, merge=lambda tensors: self.merge(tensors, total))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        values = self._widened(tensors)
        for value, part, checkpoint in zip(values, self.inputs, self.checkpoints, strict=False):
            if not all_finite(value):
                checkpoint.refuse_values(part)
        merged = self.merge(values)
        out = rounded(merged, self.dtype)
        if self.half and not all_finite(out):  # bfloat16 reaches as far as float32, so sums of masks do not fit that
            merged = self.merge([value.double() for value in values])
            out = rounded(merged, self.dtype)
        if not all_finite(out):
            raise CheckpointError(
                f"{self.key} of the merge has values that do not fit {self.dtype} (up to {merged.abs().max():.3g}); "
                "write a wider dtype"
            )
        return out


def _refuse_if_it_matters(key: str, parts: Sequence[Lazy], checkpoints: Sequence[Checkpoint]) -> None:
    """Whole numbers are not averaged, so apart from counts they have to be the same: quantised weights are not."""
    for part, checkpoint in zip(parts, checkpoints, strict=True):
        if not key.endswith("num_batches_tracked") and not equal(part, parts[0]):
            raise MismatchError(
                f"{key} ({part.dtype}) differs between {checkpoints[0].name} and {checkpoint.name}, and what is no "
                "floating-point number is not averaged; if the models are quantised, merge the originals"
            )


def equal(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors are the same, read chunk by chunk."""
    return one is other or all(torch.equal(a, b) for a, b in zip(one.chunks(), other.chunks(), strict=True))


def averaged(first: Checkpoint, lined: Collection[str]) -> list[str]:
    """The keys of the first model that are merged: floating-point tensors that all have."""
    return [key for key, one in first.parts.items() if one.dtype.is_floating_point and key in lined]


def methods_with(
    name: str, knobs: Mapping[str, Any], models: int, keys: Collection[str] = ()
) -> dict[str, Callable[..., Tensor]]:
    """A merge method with its knobs for every key, tried on that many scalars; what it cannot do raises OptionError.

    Without keys, as long as no model is opened, that is seen for knobs that are the same for all tensors.
    """
    module = registry.find("merge_methods", name)
    values = knobs_for(f"merge method {name!r}", module.merge, knobs, reading)
    varying = [knob for knob, value in values.items() if isinstance(value, Varying)]
    if varying and hasattr(module, "finish"):
        raise OptionError(
            f"merge method {name!r} fits whole models, with one number for all tensors; {some(varying)} cannot vary"
        )
    scalars = [torch.zeros(())] * models
    module.merge(scalars, **{knob: value for knob, value in values.items() if knob not in varying})
    found: dict[str, Callable[..., Tensor]] = {}
    tried: dict[str, Callable[..., Tensor]] = {}
    for key, own in (resolved(values, keys) if keys else {}).items():
        if (said := repr(own)) not in tried:
            tried[said] = partial(module.merge, **own)
            try:
                tried[said](scalars)
            except OptionError as error:
                raise OptionError(f"{key}: {error}" if varying else str(error)) from error
        found[key] = tried[said]
    return found


def finish_with(name: str, knobs: Mapping[str, Any]) -> Callable[..., Checkpoint] | None:
    """What a merge method does to a whole merge, (merge, models, data) → checkpoint, with its knobs; None for most."""
    module = registry.find("merge_methods", name)
    finish = getattr(module, "finish", None)
    return None if finish is None else partial(finish, **knobs_for(f"merge method {name!r}", module.merge, knobs))


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
