"""Symmetry tables with one wrong row, which the laws have to detect."""

import itertools
import re
from dataclasses import replace
from random import Random

from hf_rebasin import registry
from hf_rebasin.symmetries.patterns import (
    Leaf,
    Product,
    Sum,
    children,
    format_pattern,
    leaves,
    map_leaves,
    parse_pattern,
    unmarked,
)


def mutations(table, row):
    """Yield (leaf or None, description, table with one wrong row): held, renamed, reversed or missing."""
    axes = parse_pattern(table.rows[row])
    others = {x.name for text in table.rows.values() for axis in parse_pattern(text) for x in leaves(axis) if x.name}

    def pick_others(leaf):
        """Return names to confuse a leaf with; of names that differ only in block numbers, one at random."""
        kinds = {}
        for name in sorted(others - {leaf.name}):
            if name.count("*") == leaf.name.count("*"):
                kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        return [Random(f"{row} {kind}").choice(names) for kind, names in kinds.items()]

    def change_leaf(at, change):
        count = itertools.count()
        return [map_leaves(axis, lambda leaf: change(leaf) if next(count) == at else leaf) for axis in axes]

    def table_with(new):
        return replace(table, rows={**table.rows, row: format_pattern(tuple(new))})

    for at, leaf in enumerate(leaf for axis in axes for leaf in leaves(axis)):
        if leaf.name is None or registry.group(table.group_of(leaf.name.replace("*", "0"))[0]).permutations == "held":
            continue
        yield at, f"{leaf} held", table_with(change_leaf(at, lambda _: Leaf(None)))
        for other in pick_others(leaf):
            new = change_leaf(at, lambda x, other=other: Leaf(other, x.mark))
            yield at, f"{leaf} replaced by {other}", table_with(new)
    for i, axis in enumerate(axes):
        if isinstance(axis, Product | Sum):
            reversed_axis = type(axis)(children(axis)[::-1])
            if unmarked(reversed_axis) == unmarked(axis):
                continue  # permutations do not see marks; tests/symmetries/test_marks.py covers them
            yield None, f"{axis} reversed", table_with([*axes[:i], reversed_axis, *axes[i + 1 :]])
    rest = {key: pattern for key, pattern in table.rows.items() if key != row}
    yield None, "missing", replace(table, rows=rest)
