"""Tables: the content of a spec file for one configuration, not yet bound to tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import PatternError, SpecError, nearest
from ..registry import TableFile, read_plugin
from .patterns import KeyPattern, Node, compile_key, expand_braces, fill_stars, parse_pattern

if TYPE_CHECKING:
    from ..checkpoints.canonical import CanonicalView
    from ..checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class PatternRow:
    """One row of a table: a compiled key, its parsed axes, and the key as written."""

    key: KeyPattern
    axes: tuple[Node, ...]
    text: str


@dataclass(frozen=True)
class Table:
    """The symmetries of a model's tensors as text, with the fields of a spec file.

    Args:
        rows: `{key: pattern}` in the language of `hf_rebasin.symmetries.patterns`, for canonical keys.
        groups: `{name: "kind"}` or `{name: "kind in context context"}`; every name in `rows` needs one.
        sizes: `{name: int}` for sizes that the shapes leave open, such as the number of heads.
        norms: `{norm: reader or list of readers}`, the linear maps that read each norm, as keys without `.weight`.
        prefix: prefix that an on-disk key may begin with (`"bert."`), or several alternatives.
        reasons: `{name: why its group is no larger}`, shown to users.

    Example: two linear layers whose hidden units may be permuted. The first weight has the shape (hidden, inputs), so
    its rows are the hidden units, and its columns are held.

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
    def of(file: TableFile | ModuleType | SimpleNamespace, config: Any = None) -> Table:
        """Build the table of a spec file for a configuration."""
        if not isinstance(file, TableFile):
            file = read_plugin(file, "table", "given", TableFile)
        return Table(
            rows=file.table(config),
            groups=file.groups(config),
            sizes=file.sizes(config),
            norms=file.norms(config),
            prefix=file.prefix(config) if callable(file.prefix) else file.prefix,
            reasons=file.reasons(config),
        )

    @cached_property
    def parsed(self) -> tuple[PatternRow, ...]:
        """All rows, with braces expanded and patterns parsed; a duplicate or unreadable row raises SpecError."""
        rows: dict[str, PatternRow] = {}
        for text, pattern in self.rows.items():
            for key in expand_braces(text):
                if key in rows:
                    raise SpecError(f"row {key!r} is written twice: in {rows[key].text!r} and in {text!r}")
                try:
                    rows[key] = PatternRow(compile_key(key), parse_pattern(pattern), text)
                except PatternError as error:
                    raise SpecError(f"row {text!r}: {error}") from error
        return tuple(rows.values())

    @cached_property
    def literal(self) -> dict[str, PatternRow]:
        """The rows without wildcards, by key."""
        return {row.key.text: row for row in self.parsed if not row.key.wildcards}

    @cached_property
    def rows_by_form(self) -> dict[str, list[PatternRow]]:
        """The rows by their key without numbers and wildcards, which leaves few candidates for a key."""
        rows: dict[str, list[PatternRow]] = {}
        for row in self.parsed:
            rows.setdefault(_without_numbers(row.key.text), []).append(row)
        return rows

    def row_for(self, key: str, shape: tuple[int, ...] | None = None) -> PatternRow:
        """Return the row with the fewest wildcards that matches a canonical key.

        Raises:
            SpecError: no row matches, or several with equally many wildcards.
        """
        if key in self.literal:
            return self.literal[key]
        tensor = key if shape is None else f"{key} {tuple(shape)}"
        hits = [row for row in self.rows_by_form.get(_without_numbers(key), ()) if row.key.match(key)]
        if not hits:
            near = get_close_matches(key, [row.key.text for row in self.parsed], n=1, cutoff=0.5)
            raise SpecError(f"no row for {tensor}{f'; the nearest one is {near[0]!r}' if near else ''}")
        fewest = min(len(row.key.wildcards) for row in hits)
        hits = [row for row in hits if len(row.key.wildcards) == fewest]
        if len(hits) > 1:
            raise SpecError(f"{tensor}: {len(hits)} rows match equally well: {[row.key.text for row in hits]}")
        return hits[0]

    def group_of(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Return (kind, contexts) of a bound name."""
        hit = look_up(self.groups, name, "the group")
        if hit is None:
            raise SpecError(f"axis {name!r} has no group{nearest(name, self.groups)}")
        group, stars = hit
        kind, *contexts = re.split(r"\s+in\s+", group.strip())
        kinds = ("held", *registry.names("group"))
        if kind not in kinds or len(contexts) > 1:
            raise SpecError(
                f"group of {name!r} is {group!r}, expected 'kind' or 'kind in context ...'{nearest(kind, kinds)}"
            )
        return kind, tuple(fill_stars(c, stars) for c in " ".join(contexts).split())

    def size_of(self, name: str) -> int | None:
        """Return the size declared for a bound name, if there is one."""
        hit = look_up(self.sizes, name, "the size")
        return hit[0] if hit else registry.group(self.group_of(name)[0]).size


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+|\*|<[^<>]*>", "#", key)


def look_up(globs: Mapping[str, Any], name: str, attribute: str) -> tuple[Any, tuple[str, ...]] | None:
    """Return the value of the matching glob with the fewest stars, and its stars' digits; None if none matches."""
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
        raise SpecError(f"{attribute} of {name!r} is declared twice: {[hit[1] for hit in hits]}")
    return hits[0][2], hits[0][3]


def canonical_view(checkpoint: Checkpoint, table: Table | None = None) -> CanonicalView:
    """Return a checkpoint by the canonical keys of a table, by default the table of its own family.

    Without a table, the prefix is the one of its class; a state dict has none.
    """
    from ..checkpoints.canonical import CanonicalView  # reading tables must not import torch

    if table is not None:
        return CanonicalView(checkpoint, table.prefix)
    family = table_for(checkpoint.config)
    return CanonicalView(checkpoint, (family.prefix or None) if family is not None else None)


def families() -> Iterable[TableFile]:
    """Yield all spec files."""
    return map(registry.table_file, registry.names("table"))


def table_for(config: Any) -> Table | None:
    """Return the table for the `model_type` of a transformers configuration; None if no spec file describes it."""
    model_type = getattr(config, "model_type", None)
    for file in families():
        if model_type in file.model_types:
            return Table.of(file, config)
    return None
