"""What may move between two models: less than their symmetries allow, where a user or the weights say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, TypeAlias

from torch import Tensor

from ..errors import OptionError, UnknownNameError, nearest, some
from ..symmetries.spec import Spec
from .gauge import SMALL, gauges

Groups: TypeAlias = Literal["full", "permutation"]


@dataclass(frozen=True)
class Limits:
    """What a user allows to move.

    Args:
        groups: "full" for the largest groups under which the function stays, "permutation" for the permutations in
            them.
        keep_tied: only permute a stream where rotating it would mean that a head and an embedding, stored once, become
            two tensors.
        hold: names of symmetries, or patterns as `ff.*`, that stay as they are.
    """

    groups: Groups = "full"
    keep_tied: bool = False
    hold: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.groups not in ("full", "permutation"):
            raise OptionError(f"groups = {self.groups!r}; it is 'full' or 'permutation'")

    def on(self, spec: Spec, moving: Mapping[str, Tensor] | None) -> tuple[Spec, list[str]]:
        """(the spec with the groups that are left, what was left out for which reason)

        Without the values of the moving model, which are elsewhere, what they leave out is not known yet.

        Raises:
            UnknownNameError: `hold` names no symmetry.
        """
        spec = self._held(spec)
        if self.groups == "permutation":
            return spec.restricted(), []
        reasons = {}
        for gauge in gauges(spec):
            if moving is not None and not gauge.divides(moving):
                name, least = gauge.norm.gain, moving[gauge.norm.gain].abs().min().item()
                reasons[gauge.norm.stream] = (
                    f"the bias of {name.removesuffix('.weight')} would have to be divided by its gain, which is as "
                    f"small as {least:.1g} somewhere (less than {SMALL:g} of the largest)"
                )
        for norm in spec.gauged if self.keep_tied else ():
            if tied := spec.untied_by([norm.stream]):
                reasons[norm.stream] = f"{some(tied)} stays tied"
        notes = [f"{stream} is only permuted: {why}" for stream, why in reasons.items()]
        return spec.restricted(reasons), notes

    def _held(self, spec: Spec) -> Spec:
        names: list[str] = []
        for pattern in self.hold:
            found = [name for name in spec.symmetries if name == pattern or fnmatch(name, pattern)]
            if not found:
                raise UnknownNameError(f"no symmetry {pattern!r} to hold{nearest(pattern, spec.symmetries)}")
            names += found
        return spec.limited(dict.fromkeys(names, "held"))


def kept_apart(spec: Spec, streams: Iterable[str]) -> str | None:
    """What is said of tied tensors that are stored apart once these streams are rotated."""
    tied = spec.untied_by(set(streams))
    if not tied:
        return None
    kept = sorted({spec.ties[target] for target in tied})
    return f"{some(tied)} is stored apart from {some(kept)}, as the last norm's gain goes into it"
