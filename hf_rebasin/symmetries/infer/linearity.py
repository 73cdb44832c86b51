"""A second pass over the operations: which of them are linear, along which axes.

The first pass found the axes that every operation moves together. Now that all axes are known, each operation is asked
whether a matrix may act where so far a permutation does. An operation without a rule here bends all axes it touches,
so a larger group may be missed, but none is invented.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from .norms import Norms
from .record import Snapshot, TracedStep
from .sides import AtomPlace, Sides
from .unification import Atom

Terms: TypeAlias = list[tuple[Snapshot, str]]


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """One sum over an axis that two tensors share."""

    places: tuple[AtomPlace, AtomPlace]  # the atom in either tensor
    parameters: tuple[int | None, int | None]  # the parameter that either tensor is a view of
    where: str  # the module that contracts
    scaled: bool  # whether one of the tensors has been multiplied by a number


@dataclass(kw_only=True)
class LinearityAnalysis:
    """What has been found in the operations so far: linked places, norms and contractions."""

    sides: Sides = field(default_factory=Sides)
    norms: Norms = field(init=False)
    contractions: dict[Atom, list[Contraction]] = field(default_factory=dict)
    looked_up_rows: list[tuple[AtomPlace, AtomPlace]] = field(
        default_factory=list
    )  # (in a table, in rows read from it)
    scaled: set[int] = field(default_factory=set)  # tensors multiplied by a number, and those computed from them alone

    def __post_init__(self) -> None:
        self.norms = Norms(sides=self.sides)

    def read(self, step: TracedStep) -> None:
        """Apply the rule of one operation."""
        name = step.name if step.name in LINEARITY_RULES else step.name.removesuffix("_")
        apply = LINEARITY_RULES.get(name, _bend_all)
        if name != step.name and apply in (_view, _permute):
            apply = _bend_all  # in place: the snapshot of the input has the axes of the output
        for tensor in (*step.inputs, *step.outs):
            self.sides.track_stack(tensor)
            if tensor.tensor in self.norms.squares and apply not in (_reduce, _copy):
                self.sides.bend(tensor)
        apply(self, step)
        if len(step.inputs) == 1 and (name in ("mul", "div") or step.inputs[0].tensor in self.scaled):
            self.scaled |= {out.tensor for out in step.outs}
        is_unary = len(step.inputs) == len(step.outs) == 1 and step.out.shape == step.inputs[0].shape
        if is_unary and step.inputs[0].tensor in self.norms.lengths:
            self.norms.lengths.add(step.out.tensor)

    def broadcast(self, step: TracedStep, terms: Sequence[Snapshot], product: bool) -> None:
        """Apply an elementwise sum or product, linear along an axis that all summands or exactly one factor have."""
        for d in range(-len(step.out.shape), 0):
            operands = [(t, len(t.shape) + d) for t in terms if len(t.shape) >= -d and t.has(len(t.shape) + d)]
            out = step.out, len(step.out.shape) + d
            if operands and len(operands) == (1 if product else len(terms)):
                for t, e in operands:
                    self.sides.link_axes(t, e, *out)
            else:
                for t, e in (*operands, out):
                    self.sides.bend(t, [e])

    def contract(self, step: TracedStep, factors: Terms, out: tuple[Snapshot, str], added: Terms) -> None:
        """Apply a sum of products over the labels that the output lacks, to which other terms may be added."""
        for label in dict.fromkeys("".join(labels for _, labels in (*factors, out))):
            multiplied, summed = (
                [(t, labels.index(label)) for t, labels in terms if label in labels and t.has(labels.index(label))]
                for terms in (factors, added)
            )
            kept = [(out[0], out[1].index(label))] if label in out[1] else []
            if not kept and len(multiplied) == 2:
                self._add_contraction(step, *multiplied)
            elif kept and len(multiplied) == 1 and len(summed) == len(added):
                for t, d in (*multiplied, *summed):
                    self.sides.link_axes(t, d, *kept[0])
            else:
                for t, d in (*multiplied, *summed, *kept):
                    self.sides.bend(t, [d])

    def _add_contraction(self, step: TracedStep, first: tuple[Snapshot, int], second: tuple[Snapshot, int]) -> None:
        """Link two axes that are contracted: each moves as the inverse transpose of the other."""
        a, b = self.sides.places_at(*first), self.sides.places_at(*second)
        self.sides.link_places(a, b, opposite=True)
        tensors = first[0], second[0]
        for (atom, x), (_, y) in zip(a, b, strict=False):
            contraction = Contraction(
                places=(x, y),
                parameters=(tensors[0].origin, tensors[1].origin),
                where=step.where,
                scaled=any(t.tensor in self.scaled for t in tensors),
            )
            self.contractions.setdefault(atom, []).append(contraction)


LinearityRule: TypeAlias = Callable[[LinearityAnalysis, TracedStep], None]
LINEARITY_RULES: dict[str, LinearityRule] = {}


def linearity_rule(names: str) -> Callable[[LinearityRule], LinearityRule]:
    """Register the decorated function as the rule of these ATen operations."""

    def register(function: LinearityRule) -> LinearityRule:
        LINEARITY_RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def _bend_all(analysis: LinearityAnalysis, step: TracedStep) -> None:
    for tensor in (*step.inputs, *step.outs):
        analysis.sides.bend(tensor)


# --- one output element for each input element -----------------------------------------------------------------------


@linearity_rule("_to_copy alias clone contiguous detach lift lift_fresh lift_fresh_copy neg zero")
def _copy(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """The values are kept, up to precision and sign."""
    x, out = step.inputs[0], step.out
    if not out.floating:
        return _bend_all(analysis, step)
    for tensors in (analysis.norms.squares, analysis.norms.normalised):
        if x.tensor in tensors:
            tensors.add(out.tensor)
    for d in range(len(x.shape)):
        analysis.sides.link_axes(x, d, out, d)
    return None


@linearity_rule("copy")
def _copy_into(analysis: LinearityAnalysis, step: TracedStep) -> None:
    analysis.broadcast(step, [step["src"]], product=False)


@linearity_rule("add sub")
def _add(analysis: LinearityAnalysis, step: TracedStep) -> None:
    if len(step.inputs) < 2:  # a number is added to every element
        return _bend_all(analysis, step)
    return analysis.broadcast(step, step.inputs, product=False)


@linearity_rule("mul")
def _multiply(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Linear for a number, or a tensor constant along the axis; may also be a square, or the gain of a norm."""
    factors = step.inputs
    if len({t.tensor for t in factors}) < len(factors):
        return _square(analysis, step)
    normalised = any(t.tensor in analysis.norms.normalised for t in factors)
    if (
        normalised
        and len(factors) == 2
        and analysis.norms.note_gain(step, *sorted(factors, key=lambda t: len(t.shape)))
    ):
        return None
    analysis.broadcast(step, factors, product=True)
    if any(t.tensor in analysis.norms.lengths for t in factors) or (normalised and len(factors) == 1):
        analysis.norms.normalised.add(step.out.tensor)
    return None


@linearity_rule("div")
def _divide(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Linear for a number, or a tensor constant along the axis."""
    if step["rounding_mode"] is not None or not isinstance(step["self"], Snapshot):
        return _bend_all(analysis, step)
    for divisor in step.inputs[1:]:
        analysis.sides.bend(divisor)
        if divisor.tensor in analysis.norms.lengths:
            analysis.norms.normalised.add(step.out.tensor)
    return analysis.broadcast(step, step.inputs, product=True)


@linearity_rule("zeros zeros_like new_zeros")
def _zeros(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Zeros stay zero under every matrix, so they restrict nothing."""


# --- norms -----------------------------------------------------------------------------------------------------------


@linearity_rule("square pow")
def _square(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """An orthogonal matrix keeps Σ x², but nothing else that is computed from squares."""
    if not analysis.norms.note_square(step):
        _bend_all(analysis, step)


@linearity_rule("mean sum")
def _reduce(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Linear along the axes that are kept; the mean or sum of squares over the whole last axis is a length."""
    x, out, n = step.inputs[0], step.out, len(step.inputs[0].shape)
    dims = step["dim"]
    dims = range(n) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % n for d in dims if n}
    if x.tensor in analysis.norms.squares and gone == {n - 1}:
        analysis.norms.lengths.add(out.tensor)
    else:
        analysis.sides.bend(x, range(n) if x.tensor in analysis.norms.squares else sorted(gone))
    kept = [d for d in range(n) if step["keepdim"] or d not in gone]
    for e, d in enumerate(kept):
        if d not in gone:
            analysis.sides.link_axes(x, d, out, e)


@linearity_rule("native_layer_norm _fused_rms_norm")
def _layer_norm(analysis: LinearityAnalysis, step: TracedStep) -> None:
    if not analysis.norms.note_fused(step):
        _bend_all(analysis, step)


# --- contractions ----------------------------------------------------------------------------------------------------


def _product_rule(factors: dict[str, str], out: str, added: str = "") -> LinearityRule:
    """Make the rule of a product.

    Args:
        factors: labels of each factor by the name of its argument.
        out: labels of the output.
        added: name of the summand, which has the last labels of the output.
    """

    def apply(analysis: LinearityAnalysis, step: TracedStep) -> None:
        summands = [(step[added], out[len(out) - len(step[added].shape) :])] if added else []
        analysis.contract(step, [(step[name], labels) for name, labels in factors.items()], (step.out, out), summands)

    return apply


LINEARITY_RULES |= {
    "mm": _product_rule({"self": "ik", "mat2": "kj"}, "ij"),
    "bmm": _product_rule({"self": "nik", "mat2": "nkj"}, "nij"),
    "mv": _product_rule({"self": "ik", "vec": "k"}, "i"),
    "addmm": _product_rule({"mat1": "ik", "mat2": "kj"}, "ij", "self"),
    "baddbmm": _product_rule({"batch1": "nik", "batch2": "nkj"}, "nij", "self"),
}


@linearity_rule("linear")
def _linear(analysis: LinearityAnalysis, step: TracedStep) -> None:
    x, bias = step["input"], step["bias"]
    before = "abcdefgh"[: len(x.shape) - 1]
    added = [(bias, "j")] if bias is not None else []
    analysis.contract(step, [(x, before + "k"), (step["weight"], "jk")], (step.out, before + "j"), added)


@linearity_rule("convolution")
def _convolution(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Channels are contracted; nothing is linear along positions and kernels."""
    if step["groups"] != 1 or step["transposed"]:
        return _bend_all(analysis, step)
    n, bias = len(step["input"].shape) - 2, step["bias"]
    factors = [(step["input"], "ni" + "pqr"[:n]), (step["weight"], "oi" + "uvw"[:n])]
    return analysis.contract(step, factors, (step.out, "no" + "xyz"[:n]), [(bias, "o")] if bias is not None else [])


# --- views and indices -----------------------------------------------------------------------------------------------


@linearity_rule("view _unsafe_view reshape _reshape_alias unflatten squeeze unsqueeze")
def _view(analysis: LinearityAnalysis, step: TracedStep) -> None:
    if math.prod(step["self"].shape) != math.prod(step.out.shape):
        return _bend_all(analysis, step)
    return analysis.sides.link_view(step["self"], step.out)


@linearity_rule("t transpose permute")
def _permute(analysis: LinearityAnalysis, step: TracedStep) -> None:
    x, n = step["self"], len(step["self"].shape)
    order = list(range(n))
    if step.name == "permute":
        order = [d % n for d in step["dims"]]
    elif n > 1:
        i, j = (0, 1) if step.name == "t" else (step["dim0"], step["dim1"])
        order[i], order[j] = order[j], order[i]
    for e, d in enumerate(order):
        analysis.sides.link_axes(x, d, step.out, e)


@linearity_rule("expand")
def _expand(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Expanded values are constant along the new axis, which a matrix would not preserve."""
    x, out = step["self"], step.out
    new = len(out.shape) - len(x.shape)
    for d, size in enumerate(out.shape):
        if d >= new and x.shape[d - new] == size:
            analysis.sides.link_axes(x, d - new, out, d)
        else:
            analysis.sides.bend(out, [d])


def _link_slice(
    analysis: LinearityAnalysis, step: TracedStep, dim: int, start: int, out: Snapshot, gone: bool = False
) -> None:
    """Link an output that is a slice of an axis from `start` on; with `gone`, one index of it, without that axis."""
    x, sides = step["self"], analysis.sides
    for d in range(len(x.shape)):
        e = d - (gone and d > dim)
        if x.stack is not None and x.stack.dim == dim:
            for slice_index in out.slices:
                if d != dim:
                    sides.link_places(
                        sides.places_at(x, d, start + (slice_index or 0)), sides.places_at(out, e, slice_index)
                    )
        elif d != dim:
            sides.link_axes(x, d, out, e)
        elif not gone:
            sides.link_part(x, out, d, start)


@linearity_rule("slice")
def _slice(analysis: LinearityAnalysis, step: TracedStep) -> None:
    dim, start = step["dim"] % len(step["self"].shape), step["start"] or 0
    size = step["self"].shape[dim]
    if step["step"] not in (None, 1):
        return _bend_all(analysis, step)
    return _link_slice(analysis, step, dim, min(max(start + size if start < 0 else start, 0), size), step.out)


@linearity_rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk")
def _split(analysis: LinearityAnalysis, step: TracedStep) -> None:
    dim, start = step["dim"] % len(step["self"].shape), 0
    for out in step.outs:
        _link_slice(analysis, step, dim, start, out)
        start += out.shape[dim]


@linearity_rule("select unbind")
def _select(analysis: LinearityAnalysis, step: TracedStep) -> None:
    dim = step["dim"] % len(step["self"].shape)
    size = step["self"].shape[dim]
    for i, out in enumerate(step.outs):
        _link_slice(analysis, step, dim, step["index"] % size if step.name == "select" else i, out, gone=True)


@linearity_rule("cat")
def _cat(analysis: LinearityAnalysis, step: TracedStep) -> None:
    dim, start = step["dim"] % len(step.out.shape), 0
    for t in step["tensors"]:
        if len(t.shape) < len(step.out.shape):  # a legacy empty tensor, of shape (0,)
            continue
        for d in range(len(t.shape)):
            if d == dim:
                analysis.sides.link_part(step.out, t, d, start)
            else:
                analysis.sides.link_axes(t, d, step.out, d)
        start += t.shape[dim]


@linearity_rule("stack")
def _stack(analysis: LinearityAnalysis, step: TracedStep) -> None:
    dim = step["dim"] % len(step.out.shape)
    for slice_index, t in zip(step.out.slices, step["tensors"], strict=True):
        for d in range(len(t.shape)):
            analysis.sides.link_places(
                analysis.sides.places_at(t, d), analysis.sides.places_at(step.out, d + (d >= dim), slice_index)
            )


@linearity_rule("embedding")
def _embedding(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Rows are looked up by number; they are not linked to the table yet, which may be a tied head, too."""
    weight, out, sides = step["weight"], step.out, analysis.sides
    places = zip(sides.places_at(weight, 1), sides.places_at(out, len(out.shape) - 1), strict=True)
    analysis.looked_up_rows += [(in_table, in_rows) for (_, in_table), (_, in_rows) in places]


@linearity_rule("index _unsafe_index index_select")
def _index(analysis: LinearityAnalysis, step: TracedStep) -> None:
    """Indexed dimensions are read by number; the others are kept."""
    n, indices = len(step["self"].shape), step["indices"]
    if indices is None:
        indices = [None] * (step["dim"] % n) + [step["index"]]
    indexed = [d for d, index in enumerate(indices) if index is not None]
    new = max(len(indices[d].shape) for d in indexed)
    first = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0  # where the new axes go
    kept = [d for d in range(n) if d not in indexed]
    for e, d in enumerate(kept):
        analysis.sides.link_axes(step["self"], d, step.out, e + (new if e >= first else 0))
