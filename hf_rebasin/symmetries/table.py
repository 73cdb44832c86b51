"""Tables: what a spec file says for one configuration, before any tensor is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

from .. import registry
from ..errors import PatternError, SpecError, nearest
from .patterns import Key, Node, braces, compile_key, parse, scope

# The kinds of group an axis may be declared to move under, and the permutations inside each of them.
KINDS = {
    "held": "held",
    "permutation": "permutation",
    "signed": "permutation",
    "scaled": "permutation",
    "nonzero": "permutation",
    "orthogonal": "permutation",
    "centred": "permutation",
    "invertible": "permutation",
    "rotary": "held",
}
ROTATING = ("orthogonal", "centred")  # need a gauge: norms stand between the stream and its readers
SIGNED = ("signed", "nonzero")
SCALING = ("signed", "scaled", "nonzero", "invertible")  # can move a single thing, too
OWN_SIZE = {"rotary": 2}


@dataclass(frozen=True)
class Row:
    """One row: a compiled key, its parsed axes, and the text it was written as."""

    key: Key
    axes: tuple[Node, ...]
    text: str


@dataclass(frozen=True)
class Table:
    """What the tensors of a model mean, as text; the five fields of a spec file.

    Args:
        rows: `{key: pattern}` in the language of `hf_rebasin.symmetries.patterns`, for canonical keys.
        groups: `{name: "kind"}` or `{name: "kind in context context"}`; every name of `rows` needs one.
        sizes: `{name: int}` for what the shapes leave open, such as the number of heads.
        norms: `{norm: reader or list of readers}`, keys without `.weight`: which linear maps read which norm.
        prefix: what an on-disk key may begin with (`"bert."`); one, or several alternatives.
        reasons: `{name: why its group is no larger}`, for users who ask.

    Example: two linear layers with a hidden layer between them, which may be permuted. The first weight has the shape
    (hidden, inputs), so its rows are the hidden units and its columns are held.

        Table(rows={"0.weight": "hidden, _", "0.bias": "hidden", "2.weight": "_, hidden'", "2.bias": "_"},
              groups={"hidden": "permutation"})
    """

    rows: Mapping[str, str]
    groups: Mapping[str, str]
    sizes: Mapping[str, int] = field(default_factory=dict)
    norms: Mapping[str, str | list[str]] = field(default_factory=dict)
    prefix: str | tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(module: ModuleType, config: Any = None) -> Table:
        """The table a spec file gives for a configuration; `sizes`, `norms`, `reasons` and the prefix may be missing.

        The prefix is `PREFIX`, or `prefix(config)` where it hangs on the configuration.
        """

        def said(name: str) -> Any:
            return getattr(module, name)(config) if hasattr(module, name) else {}

        return Table(
            rows=module.table(config),
            groups=module.groups(config),
            sizes=said("sizes"),
            norms=said("norms"),
            prefix=said("prefix") or getattr(module, "PREFIX", ()),
            reasons=said("reasons"),
        )

    @cached_property
    def parsed(self) -> tuple[Row, ...]:
        """All rows with braces expanded, parsed; a row said twice or unreadable is an error naming it."""
        rows: dict[str, Row] = {}
        for text, pattern in self.rows.items():
            for one in braces(text):
                if one in rows:
                    raise SpecError(f"row {one!r} is written twice: in {rows[one].text!r} and in {text!r}")
                try:
                    rows[one] = Row(compile_key(one), parse(pattern), text)
                except PatternError as error:
                    raise SpecError(f"row {text!r}: {error}") from error
        return tuple(rows.values())

    @cached_property
    def literal(self) -> dict[str, Row]:
        """The rows without wildcards, by their key."""
        return {row.key.text: row for row in self.parsed if not row.key.wildcards}

    @cached_property
    def alike(self) -> dict[str, list[Row]]:
        """The rows by their key without its numbers and wildcards: those that a key can match are few."""
        rows: dict[str, list[Row]] = {}
        for row in self.parsed:
            rows.setdefault(_without_numbers(row.key.text), []).append(row)
        return rows

    def row_for(self, key: str, shape: tuple[int, ...] | None = None) -> Row:
        """The row with the fewest wildcards that matches a canonical key; none or a tie is an error."""
        if key in self.literal:
            return self.literal[key]
        what = key if shape is None else f"{key} {tuple(shape)}"
        hits = [row for row in self.alike.get(_without_numbers(key), ()) if row.key.match(key)]
        if not hits:
            raise SpecError(f"no row for {what}{nearest(key, [row.key.text for row in self.parsed])}")
        fewest = min(len(row.key.wildcards) for row in hits)
        hits = [row for row in hits if len(row.key.wildcards) == fewest]
        if len(hits) > 1:
            raise SpecError(f"{what}: {len(hits)} rows match equally well: {[row.key.text for row in hits]}")
        return hits[0]

    def group_of(self, name: str) -> tuple[str, tuple[str, ...]]:
        """(kind, contexts) of a bound name."""
        hit = lookup(self.groups, name, "the group")
        if hit is None:
            raise SpecError(f"axis {name!r} has no group{nearest(name, self.groups)}")
        said, stars = hit
        kind, *contexts = re.split(r"\s+in\s+", said.strip())
        if kind not in KINDS or len(contexts) > 1:
            raise SpecError(
                f"group of {name!r} is {said!r}, expected 'kind' or 'kind in context ...'{nearest(kind, KINDS)}"
            )
        return kind, tuple(scope(c, stars) for c in " ".join(contexts).split())

    def size_of(self, name: str) -> int | None:
        """The size said for a bound name, if one is."""
        hit = lookup(self.sizes, name, "the size")
        return hit[0] if hit else OWN_SIZE.get(self.group_of(name)[0])


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+|\*|<[^<>]*>", "#", key)


def lookup(globs: Mapping[str, Any], name: str, what: str) -> tuple[Any, tuple[str, ...]] | None:
    """The value of the one glob with the fewest stars that matches a bound name, and the digits its stars caught."""
    if name in globs:
        return globs[name], ()
    hits = []
    for glob, value in globs.items():
        match = compile_key(glob).match(name) if "*" in glob else None
        if match:
            hits.append((glob.count("*"), glob, value, match[0]))
    if not hits:
        return None
    fewest = min(hit[0] for hit in hits)
    hits = [hit for hit in hits if hit[0] == fewest]
    if len(hits) > 1:
        raise SpecError(f"{what} of {name!r} is declared twice: {[hit[1] for hit in hits]}")
    return hits[0][2], hits[0][3]


def families() -> Iterable[ModuleType]:
    """All spec files."""
    return (registry.find("specs", name) for name in registry.names("specs"))


def table_for(config: Any) -> Table | None:
    """The table of a transformers configuration, found by its `model_type`; None where no file describes it."""
    model_type = getattr(config, "model_type", None)
    for module in families():
        if model_type in module.MODEL_TYPES:
            return Table.of(module, config)
    return None
