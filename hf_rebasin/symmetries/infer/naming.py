"""Name inferred symmetries by the module that writes them, or by their role."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Words that do not tell one module from another.
GENERIC_WORDS = set("base conv convolution dense fc layer linear model module net proj projection".split())  # noqa: SIM905


@dataclass
class Origin:
    """The role of an atom, and the tensors that write it."""

    role: str | None  # "head", "qk", "ov", "residual", "group"; None for any other
    writers: list[str] = field(default_factory=list)  # keys of the tensors with it as an output axis, in order of use


def choose_names(origins: Sequence[Origin], taken: Sequence[str] = ()) -> list[str]:
    """Choose a distinct name for each symmetry, in the syntax of patterns: words and numbers, separated by dots.

    The numbers are those that all writers have in common, so that the name fits a row with stars: an axis that
    `encoder.layer.3.intermediate.dense` writes is `intermediate.3`, a stream that every layer writes has no number.

    Args:
        origins: origin of each symmetry.
        taken: names that no symmetry may have.
    """
    paths = [_common_path([_module_path(key) for key in origin.writers]) for origin in origins]
    bases = []
    for origin, path in zip(origins, paths, strict=True):
        words = [_to_word(part) for part in path if not part.isdigit()]
        first = [_to_word(part) for part in _module_path(origin.writers[0]) if not part.isdigit()]
        best = next((w for w in (_specific_words(words), _specific_words(first), words, first) if w), None)
        base = origin.role or (best[-1] if best else None) or "hidden"
        bases.append(f"{base}_units" if base in taken else base)
    numbers = [[part for part in path if part.isdigit()] for path in paths]
    names = [".".join([base, *digits]) for base, digits in zip(bases, numbers, strict=True)]
    for name in [name for name, n in Counter(names).items() if n > 1]:
        same = [i for i, other in enumerate(names) if other == name]
        for i, word in zip(same, _distinguishing_words([paths[i] for i in same]), strict=True):
            names[i] = ".".join([f"{word}_{bases[i]}" if word else bases[i], *numbers[i]])
    for name in [name for name, n in Counter(names).items() if n > 1]:
        for n, i in enumerate([i for i, other in enumerate(names) if other == name][1:], 2):
            base, *digits = names[i].split(".")
            candidates = (".".join([f"{base}_{k}", *digits]) for k in itertools.count(n))
            names[i] = next(candidate for candidate in candidates if candidate not in names)
    return names


def _specific_words(words: Iterable[str]) -> list[str]:
    """The words that tell a module from others."""
    return [word for word in words if word and word not in GENERIC_WORDS]


def _module_path(key: str) -> list[str]:
    """The parts of the name of a tensor's module, or of the tensor's own name where it belongs to none."""
    parts = key.split(".")
    if len(parts) > 2 and parts[-3] == "parametrizations":
        return parts[:-3]
    return parts[:-1] or parts


def _common_path(paths: Iterable[list[str]]) -> list[str]:
    """The common prefix of paths, with their last part if they share a word there."""
    paths = list(paths)
    shared = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))]
    if len({tuple(path) for path in paths}) > 1 and len({path[-1] for path in paths}) == 1:
        shared = [*shared, paths[0][-1]] if not paths[0][-1].isdigit() else shared
    return shared


def _to_word(part: str) -> str:
    """Turn a part of a path into a word of a name: `SelfAttention` becomes `selfattention`."""
    return re.sub(r"^[^a-z]+|[^a-z0-9_]", "", part.lower()).rstrip("_")


def _distinguishing_words(paths: Sequence[list[str]]) -> list[str]:
    """The first word of each path that no other path has, or an empty string."""
    words = [[_to_word(part) for part in path if not part.isdigit()] for path in paths]
    return [
        next((w for w in own if w and all(w not in other for j, other in enumerate(words) if j != i)), "")
        for i, own in enumerate(words)
    ]
