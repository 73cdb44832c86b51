"""Are two models of one base, trained apart, or different things, and is aligning them worth it?"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from string import ascii_letters

import torch
from torch import Tensor
from tqdm import tqdm

from ..alignment.compatibility import (
    labels,
    paired,
    refuse_other_architecture,
    refuse_other_settings,
    same_tokenizer,
    vocabularies,
)
from ..alignment.correspondence import equal, lined_state, lined_up, untied_like
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.folder import tokenizer_folder
from ..checkpoints.lazy import Lazy
from ..errors import CheckpointError, MismatchError, SpecError
from ..modules.functional import Device
from ..solving.problem import Problem
from ..solving.similarity import weight_similarity
from ..symmetries.detection import spec_of
from ..symmetries.spec import Spec, Unit
from ..symmetries.table import ROTATING
from ..text import family_of, spread

SAME = "the same"
UNITS = 4  # of every family of symmetries, spread over the depth; the others are like them


class Verdict(enum.Enum):
    """What to make of two models; the value says what to do. `Comparison.advice` adds the numbers it rests on."""

    EQUAL = "equal: nothing to align, nothing to merge"
    SAME_BASE = "same base, do not align: merge them as they are"
    BETWEEN = "neither of one base nor unrelated: merge them both ways, and measure"
    TRAINED_APART = "trained apart: align before merging"
    DIFFERENT = "different architecture: they cannot be merged"


@dataclass(frozen=True)
class Nearness:
    """How near the tensors of one part of two models are, as vectors.

    Args:
        distance: ‖A − B‖ / ‖A‖.
        cosine: ⟨A, B⟩ / (‖A‖ ‖B‖).
        elements: how many numbers there are.
    """

    distance: float
    cosine: float
    elements: int


@dataclass(frozen=True)
class Standing:
    """How the units of one symmetry stand to each other, everything else left as it is.

    Args:
        units: how many there are, in all contexts.
        own: how many are no more alike to any other than to the one in the same place.
        chance: how many that would be if their order meant nothing.
        ratio: Σᵢ Sᵢᵢ / Σᵢ maxⱼ Sᵢⱼ, the identity against what no alternative can exceed; 1 is the most. NaN where no
            units are alike at all.
    """

    units: int
    own: int
    chance: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Args:
        findings: `{what: what was found}` for architecture, settings, labels, tokenizer, tensors and symmetries.
        difference: the first thing that forbids a merge; None if nothing does.
        whole: nearness of all matrices (what is trained from zeros and ones is near in any two models).
        parts: the same for all tensors, by layer, in the order of the file.
        standings: by symmetry; of large families some.
        rotated: whether its stream has a larger group than the permutations.
        equal: whether all tensors are the same.
        backbone_only: whether they have other heads, which are left out.
    """

    findings: Mapping[str, str]
    difference: str | None = None
    whole: Nearness | None = None
    parts: Mapping[str, Nearness] = field(default_factory=dict)
    standings: Mapping[str, Standing] = field(default_factory=dict)
    rotated: bool = False
    equal: bool = False
    backbone_only: bool = False

    @property
    def units(self) -> int:
        """How many units were looked at."""
        return sum(standing.units for standing in self.standings.values())

    @property
    def own(self) -> int:
        """How many of them are no more alike to any other than to the one in the same place."""
        return sum(standing.own for standing in self.standings.values())

    @property
    def chance(self) -> float:
        """How many that would be if their order meant nothing."""
        return sum(standing.chance for standing in self.standings.values())

    @property
    def at_home(self) -> float | None:
        """The share of units that are best where they are, beyond what chance gives; None if there are no units."""
        return (self.own - self.chance) / (self.units - self.chance) if self.units > self.chance else None

    @property
    def verdict(self) -> Verdict:
        """By the units; where no symmetries are known, by the cosine of all matrices."""
        if self.difference is not None or self.whole is None:
            return Verdict.DIFFERENT
        if self.equal:
            return Verdict.EQUAL
        share = self.whole.cosine if self.at_home is None else self.at_home
        if share >= 0.5:
            return Verdict.SAME_BASE
        luck = 3 * math.sqrt(self.chance) / max(self.units, 1)  # three standard deviations
        return Verdict.TRAINED_APART if share <= max(0.1, luck) else Verdict.BETWEEN

    @property
    def advice(self) -> str:
        """The verdict in a sentence, with the numbers it rests on and what to do."""
        if self.difference is not None or self.whole is None:
            return f"different architecture: {self.difference}"
        if self.at_home is None:
            why = f"no symmetries are known, and the cosine of their matrices is {self.whole.cosine:.2f}"
        else:
            why = f"{self.own} of {self.units} units are most alike to the one in the same place"
        said = f"{self.verdict.value}; {why}, relative distance {self.whole.distance:.2g}"
        if self.verdict in (Verdict.TRAINED_APART, Verdict.BETWEEN) and self.rotated:
            said += (
                ". By weight_matching, which also rotates its residual stream; measure the merge before it is trusted"
            )
        elif self.verdict is Verdict.TRAINED_APART:
            said += ". By weight_matching, which permutes units"
        return said


def compared(fixed: Checkpoint, moving: Checkpoint, *, device: Device = None, progress: bool = False) -> Comparison:
    """Compare two checkpoints; tensors are read one after the other."""
    findings: dict[str, str] = {}
    difference = _meaning(fixed, moving, findings)
    if difference is not None:
        return Comparison(findings, difference)
    with suppress(MismatchError):  # is among the findings
        moving = paired(fixed, moving)  # token and label rows in the order of the fixed model
    backbone_only = False
    fixed = untied_like(fixed, [moving])
    try:
        theirs = lined_up(fixed, moving)
        findings["tensors"] = "the same keys and shapes"
    except MismatchError as error:
        try:
            theirs, backbone_only = lined_up(fixed, moving, backbone_only=True), True
            findings["tensors"] = f"other heads, which are left out here (--backbone-only): {_differs(error)}"
        except MismatchError:
            findings["tensors"] = "different"
            return Comparison(findings, _differs(error))
    mine = {key: fixed.parts[key] for key in theirs if fixed.parts[key].dtype.is_floating_point}
    others_equal = all(equal(fixed.parts[key], part) for key, part in theirs.items() if key not in mine)
    sums = {
        key: _sums(one, theirs[key])
        for key, one in tqdm(
            mine.items(), desc="comparing", unit="tensor", leave=False, disable=None if progress else True
        )
    }
    for key, total in sums.items():
        if not total.isfinite().all():
            fixed.refuse_values(mine[key])
            moving.refuse_values(theirs[key])
    matrices = [key for key in mine if len(mine[key].shape) > 1] or list(mine)
    layers: dict[str, list[str]] = {}
    for key in mine:
        layers.setdefault(_layer(key), []).append(key)
    standings: dict[str, Standing] = {}
    rotated = False
    try:
        spec = spec_of(fixed)
        rotated = any(symmetry.kind in ROTATING for symmetry in spec.symmetries.values())
        findings["symmetries"] = str(spec) + (", inferred from its forward pass" if spec.pins else "")
        standings = dict(_standings(spec, fixed, theirs, device, progress))
    except (MismatchError, SpecError, CheckpointError) as error:
        findings["symmetries"] = f"not known: {error}"
    return Comparison(
        findings,
        whole=_nearness(sums, matrices),
        parts={layer: _nearness(sums, keys) for layer, keys in layers.items()},
        standings=standings,
        rotated=rotated,
        equal=others_equal
        and not backbone_only
        and findings.get("labels", SAME) == SAME
        and all(near.distance == 0 for near in (_nearness(sums, [key]) for key in mine)),
        backbone_only=backbone_only,
    )


def _meaning(fixed: Checkpoint, moving: Checkpoint, findings: dict[str, str]) -> str | None:
    """Find what two models say they are; the first difference that forbids a merge, if there is one."""
    if not fixed.said or not moving.said:
        findings["architecture"] = "not said by both, so the tensors alone are compared"
        return None
    try:
        refuse_other_architecture(fixed, moving)
        findings["architecture"] = " ".join(fixed.said.get("architectures") or [fixed.said.get("model_type", "")])
        refuse_other_settings(fixed, moving)
        findings["settings"] = "the same, but for what does not change the function"
    except MismatchError as error:
        findings["settings" if "architecture" in findings else "architecture"] = "different"
        return str(error).partition(". If ")[0]
    findings["labels"] = _found(lambda: labels(fixed, moving), SAME)
    findings["tokenizer"] = _tokenizers(fixed, moving)
    return None


def _found(compare: Callable[[], list[int] | None], same: str) -> str:
    try:
        order = compare()
    except MismatchError as error:
        return f"different: {error}"
    return same if order is None else f"{same}, in another order: its rows are matched by string"


def _tokenizers(fixed: Checkpoint, moving: Checkpoint) -> str:
    with_one = [c for c in (fixed, moving) if tokenizer_folder(c.folder) is not None]
    if len(with_one) < 2:
        return "none with either" if not with_one else f"only with {with_one[0].name}, so not compared"
    if same_tokenizer(fixed, moving):
        return "the same, byte by byte"
    return _found(lambda: vocabularies(fixed, moving), "the same strings")


def _differs(error: MismatchError) -> str:
    return str(error).partition("; ")[2].partition(". Where only")[0]


def _layer(key: str) -> str:
    """The first parts of a key, up to its number if it has one: `encoder.layer.3`, `pooler`."""
    numbered = re.match(r".*?\.\d+(?=\.)|\d+(?=\.)", key)
    return numbered[0] if numbered else key.rpartition(".")[0] or key


def _sums(one: Lazy, other: Lazy) -> Tensor:
    """(‖A‖², ‖B‖², ‖A − B‖², ⟨A, B⟩, number of elements)"""
    total = torch.zeros(5, dtype=torch.float64)
    for a, b in zip(one.chunks(), other.chunks(), strict=True):
        x, y = a.double().cpu(), b.double().cpu()
        total += torch.stack([x.dot(x), y.dot(y), (x - y).square().sum(), x.dot(y), torch.tensor(float(len(x)))])
    return total


def _nearness(sums: Mapping[str, Tensor], keys: list[str]) -> Nearness:
    a, b, d, ab, n = sum((sums[key] for key in keys), torch.zeros(5, dtype=torch.float64)).tolist()
    lengths = math.sqrt(a) * math.sqrt(b)
    cosine = ab / lengths if lengths else float(a == b)
    return Nearness(math.sqrt(d) / math.sqrt(a) if a else (math.inf if d else 0.0), cosine, int(n))


def _standings(
    spec: Spec, fixed: Checkpoint, theirs: Mapping[str, Lazy], device: Device, progress: bool
) -> Iterator[tuple[str, Standing]]:
    prefix = spec.table.prefix
    there = lined_state(fixed, theirs, prefix)
    matched = spec.within(there).restricted()
    problem = Problem(matched, fixed.state(prefix), there, torch.Generator(), device)
    for unit in tqdm(
        _some_units(matched), desc="symmetries", unit="unit", leave=False, disable=None if progress else True
    ):
        similarity, _ = weight_similarity(problem, unit, {})
        for name in unit.names:
            if name in spec.free and (along := _along(spec, name, similarity)) is not None:
                best = along.amax(-1)
                at_home = along.diagonal(dim1=-2, dim2=-1)
                n = along.shape[-1]
                own = int(((at_home >= best) & (best > 0)).sum())  # a dead unit is like any other
                yield name, Standing(best.numel(), own, best.numel() / n, _ratio(at_home, best))


def _ratio(at_home: Tensor, best: Tensor) -> float:
    return at_home.sum().item() / best.sum().item() if best.sum() > 0 else math.nan


def _along(spec: Spec, name: str, similarity: Mapping[tuple[str, ...], Tensor]) -> Tensor | None:
    """The similarity along one symmetry, (*contexts, n, n), all others at the identity."""
    contexts = spec.symmetries[name].contexts
    total: Tensor | None = None
    for names, tensor in similarity.items():
        if name in names:
            left = dict(zip(names, ascii_letters, strict=False))
            right = "".join("Z" if other == name else left[other] for other in names)
            out = "".join(left[context] for context in contexts) + left[name] + "Z"
            part = torch.einsum(f"{''.join(left.values())}{right}->{out}", tensor)
            total = part if total is None else total + part
    return total


def _some_units(spec: Spec) -> list[Unit]:
    """Some units of every family, first and last among them."""
    families: dict[str, list[Unit]] = {}
    for unit in spec.units:
        families.setdefault(family_of(unit.outer), []).append(unit)
    return [unit for units in families.values() for unit in spread(units, UNITS)]


def compare(fixed: Source, moving: Source, *, device: Device = None, progress: bool = False) -> Comparison:
    """Look at two models side by side: are they of one base, trained apart, or different things?

    Every tensor is read once, and for some symmetries of every family it is counted how many units are most alike to
    the unit in the same place. In fine-tunes of one base nearly all are, and aligning could only harm; in models that
    were trained apart as few as chance gives.

    Args:
        fixed: a folder, Hub id, module, state dict or checkpoint.
        moving: the other.
        device: where similarities are computed, such as `accelerator.device`.
        progress: show progress bars (on a terminal).

    Returns:
        A `Comparison`: `.verdict`, `.advice` (the verdict in a sentence), and the numbers it rests on.

    Raises:
        CheckpointError: one of them cannot be read, is quantised, or has NaN or Inf in it.

    Example: a model, and the same model moved. The function is the same, and still none of it is in its place.

        >>> g = Alignment.random(spec_for(model), torch.Generator().manual_seed(0))
        >>> compare(model, g.apply(model)).verdict
        <Verdict.TRAINED_APART: 'trained apart: align before merging'>
        >>> compare(model, model).verdict
        <Verdict.EQUAL: 'equal: nothing to align, nothing to merge'>
    """
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    for checkpoint in (a, b):
        checkpoint.refuse_quantised()
    return compared(a, b, device=device, progress=progress)
