"""Comparison of two models: fine-tunes of one base, trained apart, or different architectures."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from string import ascii_letters

import torch
from torch import Tensor
from tqdm import tqdm

from ..alignment.compatibility import make_compatible, match_labels, refuse_other_architecture, same_token
from ..alignment.correspondence import match_keys, tensors_equal, untie_like
from ..alignment.rows import Vocabulary, give_rows, match_rows, match_vocabularies, same_tokenizer
from ..alignment.settings import refuse_other_settings
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.folder import tokenizer_folder
from ..checkpoints.lazy import Lazy
from ..errors import CheckpointError, MismatchError, SpecError
from ..modules.functional import Device
from ..solving.problem import Problem
from ..solving.similarity import weight_similarity
from ..symmetries.detection import detect_spec
from ..symmetries.spec import Spec, Unit
from ..symmetries.table import canonical_view
from ..text import family_of, layer_name, spread, without_advice

SAME = "the same"
UNITS_PER_FAMILY = 4  # units compared in every family, spread over the depth; the others are like them


class Verdict(enum.Enum):
    """The verdict on two models; its value says what to do, and `Comparison.advice` adds the numbers behind it."""

    EQUAL = "equal: nothing to align, nothing to merge"
    SAME_BASE = "same base, do not align: merge them as they are"
    BETWEEN = "neither of one base nor unrelated: merge them both ways, and measure"
    TRAINED_APART = "trained apart: align before merging"
    DIFFERENT = "different architecture: they cannot be merged"


@dataclass(frozen=True)
class Nearness:
    """Relative distance and cosine between some tensors of two models, flattened into one vector per model.

    Args:
        distance: ‖A − B‖ / ‖A‖.
        cosine: ⟨A, B⟩ / (‖A‖ ‖B‖).
        elements: number of elements.
    """

    distance: float
    cosine: float
    elements: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How well the units of one symmetry match the same-index units of the other model, with nothing moved.

    Args:
        units: number of units, in all contexts.
        own: number of units whose most similar unit in the other model has the same index.
        chance: expected value of `own` if the order of the units were random.
        ratio: Σᵢ Sᵢᵢ / Σᵢ maxⱼ Sᵢⱼ, the similarity under the identity over an upper bound; at most 1. NaN if no two
            units are similar at all.
    """

    units: int
    own: int
    chance: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models side by side.

    Args:
        findings: `{aspect: finding}` for architecture, settings, labels, tokenizer, tensors and symmetries.
        difference: first difference that forbids a merge; None if there is none.
        whole: nearness of all matrices together (vectors that start from zeros or ones are near in any two models).
        cosine: median cosine of the matrices, see `Cosines`.
        parts: nearness of all tensors, by layer, in the order of the file.
        standings: standing of the units, by symmetry; in large families only some.
        alignable: whether their symmetries are known.
        rotated: whether the residual stream has a larger group than the permutations.
        equal: whether all tensors are equal.
        backbone_only: whether the two have different heads, which are left out.
        vocabulary: which rows of tokens to ask for if not all of the two match; None if nothing is to be chosen.
    """

    findings: Mapping[str, str]
    difference: str | None = None
    whole: Nearness | None = None
    cosine: float = 0.0
    parts: Mapping[str, Nearness] = field(default_factory=dict)
    standings: Mapping[str, Standing] = field(default_factory=dict)
    alignable: bool = False
    rotated: bool = False
    equal: bool = False
    backbone_only: bool = False
    vocabulary: Vocabulary | None = None

    @property
    def units(self) -> int:
        """The number of units that were compared."""
        return sum(standing.units for standing in self.standings.values())

    @property
    def own(self) -> int:
        """The number of units whose most similar unit in the other model has the same index."""
        return sum(standing.own for standing in self.standings.values())

    @property
    def chance(self) -> float:
        """The expected value of `own` if the order of the units were random."""
        return sum(standing.chance for standing in self.standings.values())

    @property
    def at_home(self) -> float | None:
        """The share of units that match best unmoved, corrected for chance; None if there are no units."""
        return (self.own - self.chance) / (self.units - self.chance) if self.units > self.chance else None

    @property
    def verdict(self) -> Verdict:
        """The verdict by the units, or by the median cosine of the matrices if no symmetries are known."""
        if self.difference is not None or self.whole is None:
            return Verdict.DIFFERENT
        if self.equal:
            return Verdict.EQUAL
        share = self.cosine if self.at_home is None else self.at_home
        if share >= 0.5:
            return Verdict.SAME_BASE
        noise = 3 * math.sqrt(self.chance) / max(self.units, 1)  # three standard deviations
        return Verdict.TRAINED_APART if share <= max(0.1, noise) else Verdict.BETWEEN

    @property
    def advice(self) -> str:
        """The verdict in a sentence, with the numbers behind it and what to do."""
        if self.difference is not None or self.whole is None:
            return f"different architecture: {self.difference}"
        if self.at_home is None:
            why = f"no symmetries are known, and the median cosine of their matrices is {self.cosine:.2f}"
        else:
            why = f"{self.own} of {self.units} units are most alike to the one in the same place"
        text = f"{self.verdict.value}; {why}, relative distance {self.whole.distance:.2g}"
        if self.verdict in (Verdict.TRAINED_APART, Verdict.BETWEEN) and not self.alignable:
            return f"{text}. They cannot be aligned, and a merge of them as they are may be useless: measure it"
        if self.verdict in (Verdict.TRAINED_APART, Verdict.BETWEEN) and self.rotated:
            text += (
                ". By weight_matching, which also rotates its residual stream; measure the merge before it is trusted"
            )
        elif self.verdict is Verdict.TRAINED_APART:
            text += ". By weight_matching, which permutes units"
        return text


def compare_checkpoints(
    fixed: Checkpoint, moving: Checkpoint, *, device: Device = None, progress: bool = False
) -> Comparison:
    """Compare two open checkpoints, reading their tensors one after the other."""
    findings: dict[str, str] = {}
    matched, vocabulary = _match_rows(fixed, moving)
    difference = _compare_descriptions(fixed, moving, matched, findings)
    if difference is not None:
        return Comparison(findings=findings, difference=difference)
    moving = matched
    with suppress(MismatchError):  # already among the findings
        moving = make_compatible(fixed, moving, ["config", "vocabulary"])  # label rows in the order of the fixed model
    backbone_only = False
    fixed = untie_like(fixed, [moving])
    try:
        moving_parts = match_keys(fixed, moving)
        findings["tensors"] = "the same keys and shapes"
    except MismatchError as error:
        try:
            moving_parts, backbone_only = match_keys(fixed, moving, backbone_only=True), True
            findings["tensors"] = f"other heads, which merge --backbone-only leaves out: {_reason(error)}"
        except MismatchError:
            findings["tensors"] = "different"
            return Comparison(findings=findings, difference=_reason(error))
    fixed_parts = {key: fixed.parts[key] for key in moving_parts if fixed.parts[key].dtype.is_floating_point}
    integers_equal = all(
        tensors_equal(fixed.parts[key], part) for key, part in moving_parts.items() if key not in fixed_parts
    )
    products = {
        key: _products(part, moving_parts[key])
        for key, part in tqdm(
            fixed_parts.items(), desc="comparing", unit="tensor", leave=False, disable=None if progress else True
        )
    }
    for key, product in products.items():
        if not product.isfinite().all():
            fixed.refuse_values(fixed_parts[key])
            moving.refuse_values(moving_parts[key])
    matrices = [key for key in fixed_parts if len(fixed_parts[key].shape) > 1] or list(fixed_parts)
    layers: dict[str, list[str]] = {}
    for key in fixed_parts:
        layers.setdefault(layer_name(key), []).append(key)
    standings: dict[str, Standing] = {}
    alignable = rotated = False
    try:
        spec = detect_spec(fixed)
        alignable = True
        rotated = any(symmetry.rotates for symmetry in spec.symmetries.values())
        findings["symmetries"] = str(spec) + (", inferred from its forward pass" if spec.pins else "")
        standings = dict(_measure_standings(spec, fixed, moving_parts, device, progress))
    except (MismatchError, SpecError, CheckpointError) as error:
        findings["symmetries"] = f"not known: {without_advice(str(error))}"
    return Comparison(
        findings=findings,
        whole=_nearness(products, matrices),
        cosine=_median_cosine(products, matrices),
        parts={layer: _nearness(products, keys) for layer, keys in layers.items()},
        standings=standings,
        alignable=alignable,
        rotated=rotated,
        equal=integers_equal
        and not backbone_only
        and vocabulary is None
        and findings.get("labels", SAME) == SAME
        and all(_nearness(products, [key]).distance == 0 for key in fixed_parts),
        backbone_only=backbone_only,
        vocabulary=vocabulary,
    )


def _match_rows(fixed: Checkpoint, moving: Checkpoint) -> tuple[Checkpoint, Vocabulary | None]:
    """Return the moving model with the token rows of the fixed one, and the choice that this takes, if any."""
    choices: tuple[Vocabulary | None, ...] = (None, "first")
    for vocabulary in choices if fixed.raw_config and moving.raw_config else ():
        with suppress(MismatchError):  # already among the findings
            refuse_other_architecture(fixed, moving)
            rows = match_rows(fixed, moving, vocabulary)
            return (moving if rows is None else give_rows(moving, rows, fixed)), vocabulary
    return moving, None


def _compare_descriptions(
    fixed: Checkpoint, moving: Checkpoint, matched: Checkpoint, findings: dict[str, str]
) -> str | None:
    """Compare configurations, labels and tokenizers; return the first difference that forbids a merge, if any.

    `matched` is the moving model with the token rows of the fixed one, whose number is a setting, too.
    """
    if not fixed.raw_config or not moving.raw_config:
        findings["architecture"] = "not said by both, so the tensors alone are compared"
        return None
    try:
        refuse_other_architecture(fixed, moving)
        findings["architecture"] = " ".join(
            fixed.raw_config.get("architectures") or [fixed.raw_config.get("model_type", "")]
        )
        refuse_other_settings(fixed, matched, same_token=partial(same_token, fixed, moving))
        findings["settings"] = "the same, but for what does not change the function"
    except MismatchError as error:
        findings["settings" if "architecture" in findings else "architecture"] = "different"
        return without_advice(str(error))
    findings["labels"] = _describe_order(lambda: match_labels(fixed, moving), SAME)
    findings["tokenizer"] = _compare_tokenizers(fixed, moving)
    return None


def _describe_order(find_order: Callable[[], list[int] | None], same: str) -> str:
    try:
        order = find_order()
    except MismatchError as error:
        return f"different: {without_advice(str(error))}"
    return same if order is None else f"{same}, in another order: its rows are matched by string"


def _compare_tokenizers(fixed: Checkpoint, moving: Checkpoint) -> str:
    have = [checkpoint for checkpoint in (fixed, moving) if tokenizer_folder(checkpoint.folder) is not None]
    if len(have) < 2:
        return "neither has one" if not have else f"only {have[0].name} has one, so not compared"
    if same_tokenizer(fixed, moving):
        return "the same, byte by byte"
    return _describe_order(lambda: match_vocabularies(fixed, moving), "the same strings")


def _reason(error: MismatchError) -> str:
    """The difference that an error names, without what to do about it."""
    return without_advice(str(error).partition("; ")[2])


def _products(fixed: Lazy, moving: Lazy, at_most: int | None = None) -> Tensor:
    """Return (‖A‖², ‖B‖², ‖A − B‖², ⟨A, B⟩, number of elements), of at most so many elements in the middle."""
    products = torch.zeros(5, dtype=torch.float64)
    if at_most is None or fixed.numel <= at_most:
        chunks: Iterable[tuple[Tensor, Tensor]] = zip(fixed.chunks(), moving.chunks(), strict=True)
    else:
        start = (fixed.numel - at_most) // 2
        chunks = [(fixed.ready().chunk(start, start + at_most), moving.ready().chunk(start, start + at_most))]
    for a, b in chunks:
        x, y = a.double().cpu(), b.double().cpu()
        products += torch.stack([x.dot(x), y.dot(y), (x - y).square().sum(), x.dot(y), torch.tensor(float(len(x)))])
    return products


def _nearness(products: Mapping[str, Tensor], keys: list[str]) -> Nearness:
    a, b, d, ab, n = sum((products[key] for key in keys), torch.zeros(5, dtype=torch.float64)).tolist()
    lengths = math.sqrt(a) * math.sqrt(b)
    cosine = ab / lengths if lengths else float(a == b)
    return Nearness(math.sqrt(d) / math.sqrt(a) if a else (math.inf if d else 0.0), cosine, int(n))


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Cosines between the matrices of two models.

    Args:
        median: half of the numbers are in pairs that are at least as alike. Unlike the cosine of all of them together,
            it does not depend on a few with large values, such as position embeddings that nobody trains.
        lowest: of the pair that is least alike.
    """

    median: float
    lowest: float


def matrix_cosines(fixed: Mapping[str, Lazy], moving: Mapping[str, Lazy], at_most: int | None = None) -> Cosines:
    """Measure the cosines between the matrices of two models.

    Args:
        fixed: tensors of one model.
        moving: those of the other, by the same keys.
        at_most: number of elements that are looked at in every matrix, from its middle; by default all of them.
    """
    keys = [key for key, part in moving.items() if part.dtype.is_floating_point and len(part.shape) > 1]
    products = {key: _products(fixed[key], moving[key], at_most) for key in keys}
    lowest = min((_nearness(products, [key]).cosine for key in keys), default=1.0)
    return Cosines(median=_median_cosine(products, keys), lowest=lowest)


def _median_cosine(products: Mapping[str, Tensor], keys: Iterable[str]) -> float:
    """Return the median cosine of pairs of tensors, each of which counts as often as it has numbers."""
    pairs = sorted((_nearness(products, [key]) for key in keys), key=lambda pair: pair.cosine)
    middle, seen = sum(pair.elements for pair in pairs) / 2, 0
    for pair in pairs:
        seen += pair.elements
        if seen >= middle:
            return pair.cosine
    return 1.0


def _measure_standings(
    spec: Spec, fixed: Checkpoint, moving_parts: Mapping[str, Lazy], device: Device, progress: bool
) -> Iterator[tuple[str, Standing]]:
    view = canonical_view(fixed, spec.table)
    moving = view.select(moving_parts)
    matched = spec.within(moving).restricted()
    problem = Problem(matched, view.state, moving, torch.Generator(), device)
    for unit in tqdm(
        _sample_units(matched), desc="symmetries", unit="unit", leave=False, disable=None if progress else True
    ):
        similarity, _ = weight_similarity(problem, unit, {})
        for name in unit.names:
            if name in spec.free and (along := _similarity_along(spec, name, similarity)) is not None:
                best = along.amax(-1)
                at_home = along.diagonal(dim1=-2, dim2=-1)
                n = along.shape[-1]
                own = int(((at_home >= best) & (best > 0)).sum())  # dead units resemble all others equally
                ratio = _ratio(at_home, best)
                yield name, Standing(units=best.numel(), own=own, chance=best.numel() / n, ratio=ratio)


def _ratio(at_home: Tensor, best: Tensor) -> float:
    return at_home.sum().item() / best.sum().item() if best.sum() > 0 else math.nan


def _similarity_along(spec: Spec, name: str, similarity: Mapping[tuple[str, ...], Tensor]) -> Tensor | None:
    """The similarity along one symmetry, of shape (*contexts, n, n), with all others at the identity."""
    contexts = spec.symmetries[name].contexts
    along: Tensor | None = None
    for names, tensor in similarity.items():
        if name in names:
            of_fixed = dict(zip(names, ascii_letters, strict=False))
            of_moving = "".join("Z" if other == name else of_fixed[other] for other in names)
            out = "".join(of_fixed[context] for context in contexts) + of_fixed[name] + "Z"
            part = torch.einsum(f"{''.join(of_fixed.values())}{of_moving}->{out}", tensor)
            along = part if along is None else along + part
    return along


def _sample_units(spec: Spec) -> list[Unit]:
    """Some units of every family, the first and the last among them."""
    families: dict[str, list[Unit]] = {}
    for unit in spec.units:
        families.setdefault(family_of(unit.outer), []).append(unit)
    return [unit for units in families.values() for unit in spread(units, UNITS_PER_FAMILY)]


def compare(fixed: Source, moving: Source, *, device: Device = None, progress: bool = False) -> Comparison:
    """Compare two models: are they fine-tunes of one base, trained apart, or of different architectures?

    Every tensor is read once. For some symmetries of every family, the units are counted that are most similar to the
    unit of the same index. In fine-tunes of one base these are nearly all units, and aligning could only harm; in
    models that were trained apart they are as few as expected by chance.

    Args:
        fixed: the first model: a folder, Hub id, module, state dict or checkpoint.
        moving: the second model.
        device: device to compute similarities on, such as `accelerator.device`.
        progress: show progress bars (on a terminal).

    Returns:
        A `Comparison`: `.verdict`, `.advice` (the verdict in a sentence), and the numbers behind it.

    Raises:
        CheckpointError: a model that cannot be read, is quantised, or contains NaN or Inf.

    Example: a model and the same model in other coordinates compute the same, yet hardly any unit has its old index.

        >>> g = Alignment.random(spec_for(model), torch.Generator().manual_seed(0))
        >>> compare(model, g.apply(model)).verdict
        <Verdict.TRAINED_APART: 'trained apart: align before merging'>
        >>> compare(model, model).verdict
        <Verdict.EQUAL: 'equal: nothing to align, nothing to merge'>
    """
    a, b = Checkpoint.open(fixed), Checkpoint.open(moving)
    for checkpoint in (a, b):
        checkpoint.refuse_quantised()
    return compare_checkpoints(a, b, device=device, progress=progress)
