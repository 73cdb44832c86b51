"""An inferred spec as a spec file, as a person would write it: with stars, braces and names."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

from ...errors import SpecError
from ..patterns import Leaf, Node, leaves, map_leaves, parse, show
from ..table import Table

_Said = TypeVar("_Said")
Fits: TypeAlias = Callable[[Table], bool]  # whether a table says the same of the model as what was inferred


def spec_file(table: Table, config: Any, class_name: str, fits: Fits) -> str:
    """The text of a spec file that says what a bound table says.

    Args:
        table: literal, as `infer` or `bind` gives it.
        config: the transformers configuration that `sizes` may be read off; None for other modules.
        class_name: the class that was looked at.
        fits: tells for a shorter table whether it still means the same.

    Raises:
        SpecError: the text does not mean the same, which would be a mistake of ours.
    """
    rows = _braced(_starred({key: parse(pattern) for key, pattern in table.rows.items()}))
    sizes, norms = _globs_of_sizes(table.sizes), _globs_of_norms(table.norms)
    short = Table(rows, _globs(table.groups), sizes, norms, table.prefix)
    if not fits(short):
        raise SpecError(f"the table of {class_name} cannot be written with stars; please report this")
    short = _without_numbers(short, fits)
    for name in sorted(short.sizes, key=lambda name: name.startswith("head")):  # keep the heads: they are configured
        fewer = replace(short, sizes={other: size for other, size in short.sizes.items() if other != name})
        short = fewer if fits(fewer) else short
    text = _text(short, config, class_name)
    if not fits(Table.of(_module(text), config)):
        raise SpecError(f"the spec file of {class_name} does not say what was inferred; please report this")
    return text


def _module(text: str) -> ModuleType:
    module = ModuleType("written")
    exec(compile(text, "<spec file>", "exec"), module.__dict__)
    return module


# --- stars ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A key cut at its dots, and its pattern."""

    parts: tuple[str, ...]
    axes: tuple[Node, ...]


def _starred(rows: Mapping[str, tuple[Node, ...]]) -> dict[str, str]:
    """Rows that say the same in every layer, once."""
    found: dict[str, str] = {}
    for form, keys in _by_form(rows).items():
        alike = [_Row(tuple(key.split(".")), axes) for key, axes in keys.items()]
        digits = tuple(i for i, part in enumerate(form.split(".")) if part == "*")
        found |= _fewest(alike, digits if len(alike) > 1 else ())
    return found


def _fewest(rows: list[_Row], stars: tuple[int, ...]) -> dict[str, str]:
    """The fewest rows for keys that differ at most in the numbers at `stars`: one, if one pattern fits all of them;
    or one with exceptions, which are literal; or the shortest of the ways to write one of the numbers out."""
    whole = _pattern(rows, stars)
    if whole is not None:
        return {_key(rows[0], stars): whole}
    found: list[dict[str, str]] = []
    for row in rows:
        like = [other for other in rows if _pattern([row, other], stars) is not None]
        pattern = _pattern(like, stars)
        if pattern is not None and 2 * len(like) > len(rows):
            others = {".".join(r.parts): show(r.axes) for r in rows if r not in like}
            found.append({_key(row, stars): pattern} | others)
    for star in stars:
        apart: dict[str, list[_Row]] = {}
        for row in rows:
            apart.setdefault(row.parts[star], []).append(row)
        rest = tuple(s for s in stars if s != star)
        together: dict[str, str] = {}
        for same in apart.values():
            together |= _fewest(same, rest if len(same) > 1 else ())
        found.append(together)
    return min(found, key=len)


def _key(row: _Row, stars: tuple[int, ...]) -> str:
    return ".".join("*" if i in stars else part for i, part in enumerate(row.parts))


def _pattern(rows: list[_Row], stars: tuple[int, ...]) -> str | None:
    """The pattern with stars that means every one of these rows, if there is one."""
    first, *others = rows
    ways = _ways(first, stars)
    for other in others:
        theirs = _ways(other, stars)
        if _skeleton(other) != _skeleton(first) or not all(a & b for a, b in zip(ways, theirs, strict=True)):
            return None
        ways = [a & b for a, b in zip(ways, theirs, strict=True)]
    names = iter([_best(way) for way in ways])
    axes = (map_leaves(a, lambda leaf: replace(leaf, name=next(names)) if leaf.name else leaf) for a in first.axes)
    return show(tuple(axes))


def _skeleton(row: _Row) -> str:
    return show(tuple(map_leaves(axis, lambda leaf: replace(leaf, name=leaf.name and "x")) for axis in row.axes))


def _ways(row: _Row, stars: tuple[int, ...]) -> list[set[str]]:
    """For every name in a row the ways to write it with the stars of the key."""
    numbers = [row.parts[i] for i in stars]
    return [_numbered(leaf.name, numbers) for axis in row.axes for leaf in leaves(axis) if leaf.name]


def _best(patterns: Iterable[str]) -> str:
    """The one with the most stars; they all mean the same."""
    return max(sorted(patterns), key=lambda pattern: pattern.count("*"))


def _numbered(name: str, numbers: Iterable[str]) -> set[str]:
    """The ways to write a name with stars for the first of these numbers: `ff.3.0` under (3, 1) is also `ff.*.0`."""
    numbers = list(numbers)
    found = {name}
    parts = name.split(".")

    def go(at: int, used: int, said: list[str]) -> None:
        if at == len(parts):
            found.add(".".join(said))
            return
        go(at + 1, used, [*said, parts[at]])
        if used < len(numbers) and parts[at] == numbers[used]:
            go(at + 1, used + 1, [*said, "*"])

    go(0, 0, [])
    return found


def _braced(rows: Mapping[str, str]) -> dict[str, str]:
    """Rows whose keys differ in one word and say the same, as one: `self.{query,key}.weight`."""
    found = [(key.split("."), pattern) for key, pattern in rows.items()]
    longest = max((len(parts) for parts, _ in found), default=0)
    for place in range(1, longest + 1):
        merged: dict[Any, tuple[list[str], list[str], str]] = {}
        for parts, pattern in found:
            at = len(parts) - place
            word = parts[at] if at >= 0 else "*"
            alike: Any = (parts, pattern)
            if not re.search(r"[{*]", word):
                alike = (parts[:at], parts[at + 1 :], pattern)
            merged.setdefault(repr(alike), (parts, [], pattern))[1].append(word)
        found = []
        for parts, words, pattern in merged.values():
            at = len(parts) - place
            if len(words) > 1:
                parts = [*parts[:at], "{" + ",".join(words) + "}", *parts[at + 1 :]]
            found.append((parts, pattern))
    return {".".join(parts): pattern for parts, pattern in found}


def _globs(said: Mapping[str, str]) -> dict[str, str]:
    """`{"qk.*": "permutation in head.*"}` where that is so of all; names that differ in it are literal."""
    found: dict[str, str] = {}
    for form, names in _by_form(said).items():
        ways = []
        for name, value in names.items():
            numbers = [part for part in name.split(".") if part.isdigit()]
            words = ([word] if word == "in" else _numbered(word, numbers) for word in value.split())
            ways.append({" ".join(way) for way in itertools.product(*words)})
        common = set.intersection(*ways)
        found |= {form: _best(common)} if common else names
    return found


def _globs_of_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for form, names in _by_form(sizes).items():
        found |= {form: next(iter(names.values()))} if len(set(names.values())) == 1 else names
    return found


def _globs_of_norms(said: Mapping[str, str | list[str]]) -> dict[str, str | list[str]]:
    """`{"h.*.ln_1": "h.*.attn.c_attn"}` where that is so in every layer."""
    found: dict[str, str | list[str]] = {}
    for form, norms in _by_form(said).items():
        alike = {tuple(name.split(".")): [r] if isinstance(r, str) else sorted(r) for name, r in norms.items()}
        stars = tuple(i for i, part in enumerate(form.split(".")) if part == "*")
        for name, readers in _fewest_norms(alike, stars if len(alike) > 1 else ()).items():
            braced = list(_braced(dict.fromkeys(readers, "")))
            found[name] = braced[0] if len(braced) == 1 else braced
    return found


def _fewest_norms(norms: Mapping[tuple[str, ...], list[str]], stars: tuple[int, ...]) -> dict[str, list[str]]:
    """One entry with stars for norms that differ in these numbers, or else as few as there can be."""
    ways = [
        set(itertools.product(*(_numbered(reader, [name[i] for i in stars]) for reader in readers)))
        for name, readers in norms.items()
    ]
    if common := set.intersection(*ways):
        name = ".".join("*" if i in stars else part for i, part in enumerate(next(iter(norms))))
        return {name: list(max(sorted(common), key=lambda way: "".join(way).count("*")))}
    found: list[dict[str, list[str]]] = []
    for star in stars:
        apart: dict[str, dict[tuple[str, ...], list[str]]] = {}
        for parts, readers in norms.items():
            apart.setdefault(parts[star], {})[parts] = readers
        rest = tuple(s for s in stars if s != star)
        together: dict[str, list[str]] = {}
        for same in apart.values():
            together |= _fewest_norms(same, rest if len(same) > 1 else ())
        found.append(together)
    return min(found, key=len)


def _by_form(said: Mapping[str, _Said]) -> dict[str, dict[str, _Said]]:
    """What is said of names and keys that differ in their numbers only, together."""
    forms: dict[str, dict[str, _Said]] = {}
    for name, value in said.items():
        form = ".".join("*" if part.isdigit() else part for part in name.split("."))
        forms.setdefault(form, {})[name] = value
    return forms


def _without_numbers(table: Table, fits: Fits) -> Table:
    """Held axes without their sizes, where the other axes give them."""

    def open_(node: Node) -> Node:
        return map_leaves(node, lambda leaf: leaf if leaf.name else Leaf(None))

    rows = {key: show(tuple(map(open_, parse(pattern)))) for key, pattern in table.rows.items()}
    loose = replace(table, rows=rows)
    return loose if fits(loose) else table


# --- text -----------------------------------------------------------------------------------------------------------


def _text(table: Table, config: Any, class_name: str) -> str:
    model_type = getattr(config, "model_type", None)
    lines = [
        f'"""{class_name}: inferred from its forward pass."""',
        "",
        f"MODEL_TYPES = {_tuple([model_type] if model_type else [])}",
        *([f"PREFIX = {_quoted(table.prefix)}"] if table.prefix else []),
    ]
    if table.sizes:
        lines += _function("sizes", ((_quoted(name), _size(name, n, config)) for name, n in table.sizes.items()))
    lines += _function("table", ((_quoted(key), _quoted(pattern)) for key, pattern in table.rows.items()))
    lines += _function("groups", ((_quoted(name), _quoted(said)) for name, said in table.groups.items()))
    if table.norms:
        lines += _function("norms", ((_quoted(norm), _literal(readers)) for norm, readers in table.norms.items()))
    if config is not None:
        tiny = {"architectures": [class_name], **_settings(config)}
        lines += ["", "", "# make it small: the tests build it", "TINY = [", "    dict("]
        lines += [f"        {key}={_literal(value)}," for key, value in tiny.items()]
        lines += ["    )", "]"]
    return "\n".join(lines) + "\n"


def _function(name: str, items: Iterable[tuple[str, str]]) -> list[str]:
    return ["", "", f"def {name}(config):", "    return {", *(f"        {k}: {v}," for k, v in items), "    }"]


def _quoted(text: Any) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    return repr(value)


def _tuple(items: list[str]) -> str:
    return f"({', '.join(map(_quoted, items))}{',' if len(items) == 1 else ''})"


def _size(name: str, size: int, config: Any) -> str:
    """A number of heads as the configuration calls it, another size as it is."""
    if config is None or not name.startswith(("head", "group")):
        return str(size)
    heads = {k: n for k, n in config.to_dict().items() if "head" in k and "dim" not in k and type(n) is int and n > 0}
    one = [key for key, n in heads.items() if n == size]
    two = [(a, b) for a, b in itertools.permutations(heads, 2) if heads[a] == size * heads[b]]
    if one and (name.startswith("head") or not two):
        return f"config.{max(one, key=lambda key: 'key_value' in key)}"
    return f"config.{two[0][0]} // config.{two[0][1]}" if two else str(size)


def _settings(config: Any) -> dict[str, Any]:
    """What the configuration says beyond its class's defaults."""
    default = type(config)().to_dict()
    skipped = ("architectures", "model_type", "transformers_version", "dtype", "_name_or_path", "id2label", "label2id")
    said = {key: n for key, n in config.to_dict().items() if key not in skipped and n != default.get(key)}
    return said | ({"num_labels": config.num_labels} if len(default["id2label"]) != config.num_labels else {})
