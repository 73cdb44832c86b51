"""Write an inferred spec as a spec file, the way a person would: with stars, braces and names."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

from ...errors import SpecError
from ..patterns import Leaf, Node, format_pattern, leaves, map_leaves, parse_pattern
from ..table import Table

_Value = TypeVar("_Value")
TableCheck: TypeAlias = Callable[[Table], bool]  # whether a table means the same for the model as the inferred one


def render_spec_file(table: Table, config: Any, class_name: str, fits: TableCheck) -> str:
    """Return the text of a spec file that means the same as a bound table.

    Args:
        table: literal table, as returned by `infer_table` or `bind`.
        config: transformers configuration from which `sizes` may be read; None for other modules.
        class_name: class of the model.
        fits: function that tells whether a shorter table still means the same.

    Raises:
        SpecError: the text does not mean the same, which would be a bug.
    """
    rows = _add_braces(_add_stars({key: parse_pattern(pattern) for key, pattern in table.rows.items()}))
    sizes, norms = _size_globs(table.sizes), _norm_globs(table.norms)
    short = Table(rows=rows, groups=_group_globs(table.groups), sizes=sizes, norms=norms, prefix=table.prefix)
    if not fits(short):
        raise SpecError(f"the table of {class_name} cannot be written with stars; please report this")
    short = _drop_sizes(short, fits)
    for name in sorted(
        short.sizes, key=lambda name: name.startswith("head")
    ):  # heads last: their number is in the configuration
        fewer = replace(short, sizes={other: size for other, size in short.sizes.items() if other != name})
        short = fewer if fits(fewer) else short
    text = _render(short, config, class_name)
    if not fits(Table.of(_load_text(text), config)):
        raise SpecError(f"the spec file of {class_name} does not say what was inferred; please report this")
    return text


def _load_text(text: str) -> ModuleType:
    """Execute the text of a spec file as a module."""
    module = ModuleType("written")
    exec(compile(text, "<spec file>", "exec"), module.__dict__)
    return module


# --- stars ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row of a table: its key, split at the dots, and its pattern."""

    parts: tuple[str, ...]
    axes: tuple[Node, ...]


def _add_stars(rows: Mapping[str, tuple[Node, ...]]) -> dict[str, str]:
    """Merge rows that are the same in every layer into rows with stars."""
    starred: dict[str, str] = {}
    for form, axes_by_key in _by_form(rows).items():
        similar = [_Row(tuple(key.split(".")), axes) for key, axes in axes_by_key.items()]
        stars = tuple(i for i, part in enumerate(form.split(".")) if part == "*")
        starred |= _fewest_rows(similar, stars if len(similar) > 1 else ())
    return starred


def _fewest_rows(rows: list[_Row], stars: tuple[int, ...]) -> dict[str, str]:
    """The fewest rows for keys that differ only in the numbers at `stars`.

    That is one row if one pattern fits all keys; else one row with literal exceptions, or the shortest result of
    writing one of the numbers out.
    """
    common = _common_pattern(rows, stars)
    if common is not None:
        return {_starred_key(rows[0], stars): common}
    candidates: list[dict[str, str]] = []
    for row in rows:
        similar = [other for other in rows if _common_pattern([row, other], stars) is not None]
        pattern = _common_pattern(similar, stars)
        if pattern is not None and 2 * len(similar) > len(rows):
            exceptions = {".".join(other.parts): format_pattern(other.axes) for other in rows if other not in similar}
            candidates.append({_starred_key(row, stars): pattern} | exceptions)
    for star in stars:
        by_number: dict[str, list[_Row]] = {}
        for row in rows:
            by_number.setdefault(row.parts[star], []).append(row)
        rest = tuple(s for s in stars if s != star)
        merged: dict[str, str] = {}
        for same in by_number.values():
            merged |= _fewest_rows(same, rest if len(same) > 1 else ())
        candidates.append(merged)
    return min(candidates, key=len)


def _starred_key(row: _Row, stars: tuple[int, ...]) -> str:
    """The key of a row with its numbers at `stars` replaced by stars."""
    return ".".join("*" if i in stars else part for i, part in enumerate(row.parts))


def _common_pattern(rows: list[_Row], stars: tuple[int, ...]) -> str | None:
    """The pattern with stars that fits all of these rows, if there is one."""
    first, *others = rows
    common = _starred_names(first, stars)
    for other in others:
        forms = _starred_names(other, stars)
        if _nameless(other) != _nameless(first) or not all(a & b for a, b in zip(common, forms, strict=True)):
            return None
        common = [a & b for a, b in zip(common, forms, strict=True)]
    names = iter([_most_starred(forms) for forms in common])
    axes = (map_leaves(a, lambda leaf: replace(leaf, name=next(names)) if leaf.name else leaf) for a in first.axes)
    return format_pattern(tuple(axes))


def _nameless(row: _Row) -> str:
    """The pattern of a row with all its names replaced by the same one."""
    return format_pattern(
        tuple(map_leaves(axis, lambda leaf: replace(leaf, name=leaf.name and "x")) for axis in row.axes)
    )


def _starred_names(row: _Row, stars: tuple[int, ...]) -> list[set[str]]:
    """For every name in a row, the ways to write it with the stars of the key."""
    numbers = [row.parts[i] for i in stars]
    return [_starred_forms(leaf.name, numbers) for axis in row.axes for leaf in leaves(axis) if leaf.name]


def _most_starred(patterns: Iterable[str]) -> str:
    """The pattern with the most stars, of several that mean the same."""
    return max(sorted(patterns), key=lambda pattern: pattern.count("*"))


def _starred_forms(name: str, numbers: Iterable[str]) -> set[str]:
    """The ways to write a name with stars for the first of these numbers: `ff.3.0` with (3, 1) is also `ff.*.0`."""
    numbers = list(numbers)
    forms = {name}
    parts = name.split(".")

    def extend(at: int, used: int, form: list[str]) -> None:
        if at == len(parts):
            forms.add(".".join(form))
            return
        extend(at + 1, used, [*form, parts[at]])
        if used < len(numbers) and parts[at] == numbers[used]:
            extend(at + 1, used + 1, [*form, "*"])

    extend(0, 0, [])
    return forms


def _add_braces(rows: Mapping[str, str]) -> dict[str, str]:
    """Merge rows with the same pattern whose keys differ in one word: `self.{query,key}.weight`."""
    split_rows = [(key.split("."), pattern) for key, pattern in rows.items()]
    longest = max((len(parts) for parts, _ in split_rows), default=0)
    for from_end in range(1, longest + 1):
        merged: dict[Any, tuple[list[str], list[str], str]] = {}
        for parts, pattern in split_rows:
            at = len(parts) - from_end
            word = parts[at] if at >= 0 else "*"
            rest: Any = (parts, pattern)
            if not re.search(r"[{*]", word):
                rest = (parts[:at], parts[at + 1 :], pattern)
            merged.setdefault(repr(rest), (parts, [], pattern))[1].append(word)
        split_rows = []
        for parts, words, pattern in merged.values():
            at = len(parts) - from_end
            if len(words) > 1:
                parts = [*parts[:at], "{" + ",".join(words) + "}", *parts[at + 1 :]]
            split_rows.append((parts, pattern))
    return {".".join(parts): pattern for parts, pattern in split_rows}


def _group_globs(groups: Mapping[str, str]) -> dict[str, str]:
    """Merge groups that are the same in every layer: `{"qk.*": "permutation in head.*"}`; others stay literal."""
    globs: dict[str, str] = {}
    for form, by_name in _by_form(groups).items():
        forms = []
        for name, group in by_name.items():
            numbers = [part for part in name.split(".") if part.isdigit()]
            words = ([word] if word == "in" else _starred_forms(word, numbers) for word in group.split())
            forms.append({" ".join(choice) for choice in itertools.product(*words)})
        common = set.intersection(*forms)
        globs |= {form: _most_starred(common)} if common else by_name
    return globs


def _size_globs(sizes: Mapping[str, int]) -> dict[str, int]:
    """Merge sizes that are the same in every layer."""
    globs: dict[str, int] = {}
    for form, by_name in _by_form(sizes).items():
        globs |= {form: next(iter(by_name.values()))} if len(set(by_name.values())) == 1 else by_name
    return globs


def _norm_globs(norms: Mapping[str, str | list[str]]) -> dict[str, str | list[str]]:
    """Merge norms that are the same in every layer: `{"h.*.ln_1": "h.*.attn.c_attn"}`."""
    globs: dict[str, str | list[str]] = {}
    for form, by_name in _by_form(norms).items():
        similar = {tuple(name.split(".")): [r] if isinstance(r, str) else sorted(r) for name, r in by_name.items()}
        stars = tuple(i for i, part in enumerate(form.split(".")) if part == "*")
        for name, readers in _fewest_norms(similar, stars if len(similar) > 1 else ()).items():
            braced = list(_add_braces(dict.fromkeys(readers, "")))
            globs[name] = braced[0] if len(braced) == 1 else braced
    return globs


def _fewest_norms(norms: Mapping[tuple[str, ...], list[str]], stars: tuple[int, ...]) -> dict[str, list[str]]:
    """The fewest entries for norms that differ only in the numbers at `stars`."""
    forms = [
        set(itertools.product(*(_starred_forms(reader, [name[i] for i in stars]) for reader in readers)))
        for name, readers in norms.items()
    ]
    if common := set.intersection(*forms):
        name = ".".join("*" if i in stars else part for i, part in enumerate(next(iter(norms))))
        return {name: list(max(sorted(common), key=lambda readers: "".join(readers).count("*")))}
    candidates: list[dict[str, list[str]]] = []
    for star in stars:
        by_number: dict[str, dict[tuple[str, ...], list[str]]] = {}
        for parts, readers in norms.items():
            by_number.setdefault(parts[star], {})[parts] = readers
        rest = tuple(s for s in stars if s != star)
        merged: dict[str, list[str]] = {}
        for same in by_number.values():
            merged |= _fewest_norms(same, rest if len(same) > 1 else ())
        candidates.append(merged)
    return min(candidates, key=len)


def _by_form(values: Mapping[str, _Value]) -> dict[str, dict[str, _Value]]:
    """Group the values of names (or keys) that differ only in their numbers: `{form with stars: {name: value}}`."""
    forms: dict[str, dict[str, _Value]] = {}
    for name, value in values.items():
        form = ".".join("*" if part.isdigit() else part for part in name.split("."))
        forms.setdefault(form, {})[name] = value
    return forms


def _drop_sizes(table: Table, fits: TableCheck) -> Table:
    """Drop the sizes of held axes if the other axes determine them."""

    def drop(node: Node) -> Node:
        return map_leaves(node, lambda leaf: leaf if leaf.name else Leaf(None))

    rows = {key: format_pattern(tuple(map(drop, parse_pattern(pattern)))) for key, pattern in table.rows.items()}
    without_sizes = replace(table, rows=rows)
    return without_sizes if fits(without_sizes) else table


# --- text -----------------------------------------------------------------------------------------------------------


def _render(table: Table, config: Any, class_name: str) -> str:
    """The text of a table as a spec file."""
    model_type = getattr(config, "model_type", None)
    lines = [
        f'"""{class_name}: inferred from its forward pass."""',
        "",
        f"MODEL_TYPES = {_tuple([model_type] if model_type else [])}",
        *([f"PREFIX = {_quoted(table.prefix)}"] if table.prefix else []),
    ]
    if table.sizes:
        lines += _render_function(
            "sizes", ((_quoted(name), _size_expression(name, n, config)) for name, n in table.sizes.items())
        )
    lines += _render_function("table", ((_quoted(key), _quoted(pattern)) for key, pattern in table.rows.items()))
    lines += _render_function("groups", ((_quoted(name), _quoted(group)) for name, group in table.groups.items()))
    if table.norms:
        lines += _render_function(
            "norms", ((_quoted(norm), _literal(readers)) for norm, readers in table.norms.items())
        )
    if config is not None:
        tiny = {"architectures": [class_name], **_changed_settings(config)}
        lines += ["", "", "# make it small: the tests build it", "TINY = [", "    dict("]
        lines += [f"        {key}={_literal(value)}," for key, value in tiny.items()]
        lines += ["    )", "]"]
    return "\n".join(lines) + "\n"


def _render_function(name: str, items: Iterable[tuple[str, str]]) -> list[str]:
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


def _size_expression(name: str, size: int, config: Any) -> str:
    """A number of heads as an expression of the configuration; any other size as a number."""
    if config is None or not name.startswith(("head", "group")):
        return str(size)
    heads = {k: n for k, n in config.to_dict().items() if "head" in k and "dim" not in k and type(n) is int and n > 0}
    equal = [key for key, n in heads.items() if n == size]
    quotients = [(a, b) for a, b in itertools.permutations(heads, 2) if heads[a] == size * heads[b]]
    if equal and (name.startswith("head") or not quotients):
        return f"config.{max(equal, key=lambda key: 'key_value' in key)}"
    return f"config.{quotients[0][0]} // config.{quotients[0][1]}" if quotients else str(size)


def _changed_settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration that differ from the defaults of its class."""
    default = type(config)().to_dict()
    skipped = ("architectures", "model_type", "transformers_version", "dtype", "_name_or_path", "id2label", "label2id")
    settings = {key: n for key, n in config.to_dict().items() if key not in skipped and n != default.get(key)}
    return settings | ({"num_labels": config.num_labels} if len(default["id2label"]) != config.num_labels else {})
