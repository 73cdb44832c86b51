"""Text for screens and files: tables, sizes, layer names, and what is cut out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import TypeVar
from unicodedata import normalize

Item = TypeVar("Item")

# Signs that code pages such as cp1252 lack, in characters that every encoding has.
SPELLINGS = dict(
    zip(
        "λΔ→−–‖÷⁄×…≤≥∞",
        ["lambda", "delta", "->", "-", "-", "||", "/", "/", "x", "...", "<=", ">=", "inf"],
        strict=True,
    )
)


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """Yield rows as lines, in columns two spaces apart; the columns in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def overview(head: str, rows: Sequence[Sequence[str]], widest: int = 40, most: int = 8) -> str:
    """Return a heading and the first rows of a table under it, for the `repr` of an object that has many parts."""
    shown = [[c if len(c) <= widest else f"{c[: widest - 1]}…" for c in row] for row in rows[:most]]
    more = [f"… and {len(rows) - most} more"] if len(rows) > most else []
    return "\n".join([head, *(f"  {line}" for line in [*(columns(shown) if shown else ()), *more])])


def html_overview(head: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a heading and a table under it as HTML, with all rows, for notebooks."""
    cells = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    heads = "".join(f"<th>{escape(title)}</th>" for title in titles)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(cells)}</tbody></table>" if rows else ""
    return f"<p>{escape(head)}</p>{table}"


def byte_size(total: int) -> str:
    """Return a number of bytes with its unit: `1.0 GB`."""
    unit, scale = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6) if total >= 1e6 else ("kB", 1e3)
    return f"{total / scale:.1f} {unit}"


def printable(text: str) -> str:
    r"""Escape control characters: names in a file may hold sequences that move a terminal's cursor.

    Example:
        >>> printable("a\x1b[2J")
        'a\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def spell_out(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks by others that mean the same, as an error handler of `codecs`.

    Example:
        >>> codecs.register_error("spell_out", spell_out)
        >>> "λ → ½".encode("ascii", "spell_out")
        b'lambda -> 1/2'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spell_character, error.object[error.start : error.end])), error.end


def _spell_character(character: str) -> str:
    parts = "".join(SPELLINGS.get(part, part) for part in normalize("NFKD", character))
    spelled = parts.encode("ascii", "ignore").decode()  # without accents
    return spelled or character.encode("ascii", "backslashreplace").decode()


def family_of(name: str) -> str:
    """Replace numbered components by stars: ff.3 belongs to ff.*, but fc1.3 to fc1.*."""
    return re.sub(r"(?<=\.)\d+(?=[.\s:,]|$)", "*", name)


def layer_of(key: str) -> tuple[str, int] | None:
    """Return the stack and the number of a tensor's layer, by the first numbered component of its key.

    Example:
        >>> layer_of("bert.encoder.layer.3.output.dense.weight"), layer_of("bert.pooler.dense.weight")
        (('bert.encoder.layer.', 3), None)
    """
    match = re.match(r"(.*?)(?:(?<=\.)|^)(\d+)\.", key)
    return (match[1], int(match[2])) if match else None


# Names of tensors that are used before the first layer. All others without a layer (last norms, heads) come after it.
BEFORE_LAYERS = re.compile(
    r"embed(?!_out)|(^|\.)(wte|wpe|shared|cls_token|project_in|pre_layrnorm|stem|conv_stem|conv1|bn1)(\.|$)"
)


def layer_name(key: str) -> str:
    """Return the layer of a tensor, such as `encoder.layer.3`, or its module if no layer has a number: `pooler`."""
    layer = layer_of(key)
    return f"{layer[0]}{layer[1]}" if layer else key.rpartition(".")[0] or key


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """Return at most `limit` items, evenly spaced, the first and the last one among them."""
    k = min(limit, len(items))
    return [items[round(i * (len(items) - 1) / max(k - 1, 1))] for i in range(k)]


def shorten_path(name: str) -> str:
    """Cut an absolute path, which means nothing elsewhere, to its last two components; leave any other name as it is.

    Example:
        >>> shorten_path("/data/runs/vit/seed-0"), shorten_path("me/vit-seed-0")
        ('vit/seed-0', 'me/vit-seed-0')
    """
    bare = name.removeprefix("file://")
    kind: type[PurePath] = PureWindowsPath if re.match(r"[A-Za-z]:[\\/]|\\\\", bare) else PurePosixPath
    path = kind(bare)
    if not path.is_absolute() and not bare.startswith("~"):
        return name
    parts = [part for part in path.parts if part != path.anchor and not part.startswith("~")]
    return "/".join(parts[-2:])


def without_secrets(text: str) -> str:
    """Redact tokens of the Hub: whatever looks like one, and the one in the environment."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "hf_…")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}|\bhf_(?:oauth|jwt)_[\w.-]+|(?<=Bearer )[^\s'\"]+", "hf_…", text)


_PATHS = re.compile(r"""(?<![\w.~/<\\])(?:file://)?~?(?:[A-Za-z]:)?(?:[/\\][^\s/\\'"`<>|:;,()\[\]{}]+)+[/\\]?""")


def without_advice(text: str) -> str:
    """Cut the clauses at the end of a message that say which options help.

    Example:
        >>> without_advice("b has other labels than a; if the rows match, say so (--assume labels)")
        'b has other labels than a'
    """
    return re.sub(r"[;.] (?:(?![;.] ).)*[ (]--[a-z].*", "", text, flags=re.DOTALL)


def replace_names(text: str, names: Mapping[str, str]) -> str:
    """Replace names wherever they occur in a text, the longest first.

    Example:
        >>> replace_names("runs/a moves as runs/a/base", {"runs/a": "a", "runs/a/base": "base"})
        'a moves as base'
    """
    ordered = sorted(names, key=lambda name: (-len(name), name))
    pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
    return pattern.sub(lambda match: names[match[0]], text)


def shorten_paths(text: str) -> str:
    """Cut every absolute path in a text to its last two components; names with blanks are not recognised as one."""
    return _PATHS.sub(lambda match: shorten_path(match[0]), text)
