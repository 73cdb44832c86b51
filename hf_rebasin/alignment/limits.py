"""Limits on what an alignment moves, set by the user or by the weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, TypeAlias

from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MismatchError, OptionError, UnknownNameError, listed, nearest
from ..symmetries.spec import Spec
from ..symmetries.table import table_for
from .correspondence import head_keys
from .gauge import MIN_RELATIVE_GAIN, find_gauges

Groups: TypeAlias = Literal["full", "permutation"]


@dataclass(frozen=True)
class Limits:
    """The limits that a user sets on an alignment.

    Args:
        groups: "full" for the largest groups that preserve the function, "permutation" for the permutations in them.
        keep_tied: whether to only permute a stream if rotating it would untie a head and an embedding.
        hold: names of symmetries, or patterns such as `ff.*`, that stay as they are.
    """

    groups: Groups = "full"
    keep_tied: bool = False
    hold: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.groups not in ("full", "permutation"):
            raise OptionError(f"groups = {self.groups!r}; it must be 'full' or 'permutation'")

    def on(self, spec: Spec, moving: Mapping[str, Tensor] | None) -> tuple[Spec, list[str]]:
        """Return the limited spec, and notes on which groups were reduced for which reason.

        Without the values of the moving model (None), the limits that they set are not known yet.

        Raises:
            UnknownNameError: an entry of `hold` does not match any symmetry.
        """
        spec = self._hold(spec)
        if self.groups == "permutation":
            return spec.restricted(), []
        reasons = {}
        for gauge in find_gauges(spec):
            if moving is not None and not gauge.divides(moving):
                name, least = gauge.norm.gain, moving[gauge.norm.gain].abs().min().item()
                reasons[gauge.norm.stream] = (
                    f"the bias of {name.removesuffix('.weight')} would have to be divided by its gain, which is as "
                    f"small as {least:.1g} somewhere (less than {MIN_RELATIVE_GAIN:g} of the largest)"
                )
        for norm in spec.gauged if self.keep_tied else ():
            if tied := spec.untied_by([norm.stream]):
                reasons[norm.stream] = f"{listed(tied)} stays tied"
        notes = [f"{stream} is only permuted: {reason}" for stream, reason in reasons.items()]
        return spec.restricted(reasons), notes

    def _hold(self, spec: Spec) -> Spec:
        names: list[str] = []
        for pattern in self.hold:
            matches = [name for name in spec.symmetries if name == pattern or fnmatch(name, pattern)]
            if not matches:
                raise UnknownNameError(f"no symmetry {pattern!r} to hold{nearest(pattern, spec.symmetries)}")
            names += matches
        return spec.limited(dict.fromkeys(names, "held"))


def refuse_moved_outputs(checkpoint: Checkpoint, spec: Spec, names: Collection[str]) -> None:
    """Refuse to move what the sub-models of a checkpoint read: the outputs of its base model, without its head.

    Args:
        checkpoint: the model to be moved.
        spec: its symmetries.
        names: names of the symmetries that may move.

    Raises:
        MismatchError: one of them would move these outputs.
    """
    if not checkpoint.submodels:
        return
    read = sorted(_output_symmetries(checkpoint, spec) & set(names))
    if read:
        holds = " ".join(f"--hold {name}" for name in read) if len(read) < 4 else "--hold '*'"
        raise MismatchError(
            f"{listed(checkpoint.submodels)} of {checkpoint.name} reads the outputs of its base model, which the "
            f"alignment would move ({listed(read)}); hold them ({holds}), or merge without alignment (--no-align)"
        )


def _output_symmetries(checkpoint: Checkpoint, spec: Spec) -> set[str]:
    """Return the symmetries that a table holds for the base model alone; all of them where a head has no table."""
    base = copy.copy(checkpoint.config)
    if base is not None:
        base.architectures = None
    table = table_for(base)
    if table is None:
        return set(spec.free) if head_keys(checkpoint, checkpoint.base_prefix) else set()
    return {name for name in spec.free if table.group_of(name)[0] == "held"}


def untying_note(spec: Spec, streams: Iterable[str]) -> str | None:
    """Return a note on the tied tensors that rotating these streams unties; None if there are none."""
    tied = spec.untied_by(set(streams))
    if not tied:
        return None
    sources = sorted({spec.ties[target] for target in tied})
    return f"{listed(tied)} is stored apart from {listed(sources)}, as the last norm's gain goes into it"
