"""Tables with one row wrong: what a law has to notice."""

import itertools
import re
from dataclasses import replace
from random import Random

from hf_rebasin.symmetries.patterns import Leaf, Product, Sum, children, leaves, map_leaves, parse, show, unmarked
from hf_rebasin.symmetries.table import KINDS


def mutations(table, row):
    """(leaf or None, what was done, the table with one row wrong): held, exchanged, turned round, left out."""
    axes = parse(table.rows[row])
    others = {x.name for text in table.rows.values() for axis in parse(text) for x in leaves(axis) if x.name}

    def of_every_kind(leaf):
        """What it may be taken for: of names that differ by their numbers only (one for every block) a random one."""
        kinds = {}
        for name in sorted(others - {leaf.name}):
            if name.count("*") == leaf.name.count("*"):
                kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        return [Random(f"{row} {kind}").choice(names) for kind, names in kinds.items()]

    def changed(at, change):
        count = itertools.count()
        return [map_leaves(axis, lambda leaf: change(leaf) if next(count) == at else leaf) for axis in axes]

    def table_with(new):
        return replace(table, rows={**table.rows, row: show(tuple(new))})

    for at, leaf in enumerate(leaf for axis in axes for leaf in leaves(axis)):
        if leaf.name is None or KINDS[table.group_of(leaf.name.replace("*", "0"))[0]] == "held":
            continue
        yield at, f"{leaf} held", table_with(changed(at, lambda _: Leaf(None)))
        for other in of_every_kind(leaf):
            new = changed(at, lambda x, other=other: Leaf(other, x.mark))
            yield at, f"{leaf} taken for {other}", table_with(new)
    for i, axis in enumerate(axes):
        if isinstance(axis, Product | Sum):
            turned = type(axis)(children(axis)[::-1])
            if unmarked(turned) == unmarked(axis):
                continue  # permutations do not feel marks; tests/test_marks.py does
            yield None, f"{axis} turned round", table_with([*axes[:i], turned, *axes[i + 1 :]])
    rest = {key: pattern for key, pattern in table.rows.items() if key != row}
    yield None, "left out", replace(table, rows=rest)
