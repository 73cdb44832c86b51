"""Names for inferred symmetries: the module that writes the axis, or the part it plays."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Words that say nothing about which module it is.
DULL = set("base conv convolution dense fc layer linear model module net proj projection".split())  # noqa: SIM905


@dataclass
class Origin:
    """Where an atom comes from."""

    role: str | None  # "head", "qk", "ov", "residual", "group", or nothing in particular
    writers: list[str] = field(default_factory=list)  # the tensors it is an output axis of, in order of use


def names_for(origins: Sequence[Origin], taken: Sequence[str] = ()) -> list[str]:
    """One name for each, all different, as patterns want them: words and numbers with dots between.

    The numbers are those that all writers have in common, so that the name fits a row with stars: what
    `encoder.layer.3.intermediate.dense` writes is `intermediate.3`, a stream that every layer writes has none.
    """
    paths = [_common([_module(key) for key in origin.writers]) for origin in origins]
    bases = []
    for origin, path in zip(origins, paths, strict=True):
        words = [_word(part) for part in path if not part.isdigit()]
        first = [_word(part) for part in _module(origin.writers[0]) if not part.isdigit()]
        telling = next((t for t in (_telling(words), _telling(first), words, first) if t), None)
        base = origin.role or (telling[-1] if telling else None) or "hidden"
        bases.append(f"{base}_units" if base in taken else base)
    numbers = [[part for part in path if part.isdigit()] for path in paths]
    found = [".".join([base, *digits]) for base, digits in zip(bases, numbers, strict=True)]
    for name in [name for name, n in Counter(found).items() if n > 1]:
        same = [i for i, other in enumerate(found) if other == name]
        for i, word in zip(same, _distinguishing([paths[i] for i in same]), strict=True):
            found[i] = ".".join([f"{word}_{bases[i]}" if word else bases[i], *numbers[i]])
    for name in [name for name, n in Counter(found).items() if n > 1]:
        for n, i in enumerate([i for i, other in enumerate(found) if other == name][1:], 2):
            base, *digits = found[i].split(".")
            found[i] = next(
                one for one in (".".join([f"{base}_{k}", *digits]) for k in itertools.count(n)) if one not in found
            )
    return found


def _telling(words: Iterable[str]) -> list[str]:
    return [word for word in words if word and word not in DULL]


def _module(key: str) -> list[str]:
    """The module a tensor belongs to, in parts; the tensor's own name where it belongs to none."""
    parts = key.split(".")
    if len(parts) > 2 and parts[-3] == "parametrizations":
        return parts[:-3]
    return parts[:-1] or parts


def _common(paths: Iterable[list[str]]) -> list[str]:
    """What paths have in common: what they begin with, and the last word if it is the same."""
    paths = list(paths)
    shared = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))]
    if len({tuple(path) for path in paths}) > 1 and len({path[-1] for path in paths}) == 1:
        shared = [*shared, paths[0][-1]] if not paths[0][-1].isdigit() else shared
    return shared


def _word(part: str) -> str:
    """A part of a path as a word of a name: `SelfAttention` is `selfattention`."""
    return re.sub(r"^[^a-z]+|[^a-z0-9_]", "", part.lower()).rstrip("_")


def _distinguishing(paths: Sequence[list[str]]) -> list[str]:
    """For each path its first word that no other has, or nothing."""
    words = [[_word(part) for part in path if not part.isdigit()] for path in paths]
    return [
        next((w for w in mine if w and all(w not in other for j, other in enumerate(words) if j != i)), "")
        for i, mine in enumerate(words)
    ]
