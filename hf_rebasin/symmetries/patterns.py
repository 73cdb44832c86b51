"""The pattern language of tables: how the axes of tensors are labelled with symmetries.

    table   := { key : pattern }
    key     := part ("." part)*      {a,b} is expanded first, as text
    part    := literal | "*" (digits: a scope) | "<name>" (digits: an axis over keys)
    pattern := "" | axis ("," axis)*
    axis    := term ("+" term)*      "+" lays blocks end to end
    term    := leaf | "(" prod ("+" prod)* ")"
    prod    := term+                 a composite axis, outer first: index = a * |b| + b; binds tighter than "+"
    leaf    := "_" | integer | name mark?   held | held, of this size | a symmetry, the same wherever it is named
    name    := word ("." (word | integer | "*"))*
    mark    := "'" reader (acted on by the inverse transpose) | "~" diagonal (only the permutation part acts)

`"(head.* qk.*), residual'"` is a matrix whose rows run over heads and, within a head, over query-key units, and whose
columns read the residual stream. A name with n stars takes the digits of the first n stars of its key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from ..errors import PatternError

NAME = r"[a-z][a-z0-9_]*(?:\.(?:[a-z][a-z0-9_]*|\d+|\*))*"
_END = r"(?=[\s(),+]|$)"
_LEAF = re.compile(rf"(?P<name>{NAME})(?P<mark>['~]?){_END}|(?P<size>\d+){_END}|(?P<held>_){_END}")

_BRACES = re.compile(r"\{([^{}]*)\}")

READER, DIAGONAL = "'", "~"
# No table needs more, but patterns also come from untrusted files, and a short one can stand for a billion blocks.
MAX_DEPTH, MAX_BLOCKS = 50, 1000


@dataclass(frozen=True)
class Leaf:
    """One symmetry with its mark; or, without a name, a held axis of a known or unknown size."""

    name: str | None
    mark: str = ""
    size: int | None = None

    def __str__(self) -> str:
        return (self.name or ("_" if self.size is None else str(self.size))) + self.mark


@dataclass(frozen=True)
class Product:
    """A composite axis, outer first."""

    items: tuple[Node, ...]

    def __str__(self) -> str:
        return "(" + " ".join(f"({c})" if isinstance(c, Sum) else str(c) for c in self.items) + ")"


@dataclass(frozen=True)
class Sum:
    """Blocks placed end to end."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))


Node: TypeAlias = Leaf | Product | Sum


def children(node: Node) -> tuple[Node, ...]:
    """The direct parts of a node; none for a leaf."""
    if isinstance(node, Leaf):
        return ()
    return node.items if isinstance(node, Product) else node.terms


def leaves(node: Node) -> Iterator[Leaf]:
    """The leaves of an axis, from left to right."""
    if isinstance(node, Leaf):
        yield node
    for child in children(node):
        yield from leaves(child)


def map_leaves(node: Node, change: Callable[[Leaf], Leaf]) -> Node:
    """Return a node with `change` applied to its leaves."""
    if isinstance(node, Leaf):
        return change(node)
    return type(node)(tuple(map_leaves(c, change) for c in children(node)))


def unmarked(node: Node) -> Node:
    """Return an axis without its reader and diagonal marks."""
    return map_leaves(node, lambda leaf: Leaf(leaf.name, "", leaf.size))


def fill_axis_stars(node: Node, stars: tuple[str, ...]) -> Node:
    """Fill the stars of all names of an axis: `ff.*` with the stars ("3",) becomes `ff.3`."""
    return map_leaves(node, lambda leaf: Leaf(fill_stars(leaf.name, stars), leaf.mark) if leaf.name else leaf)


def fill_stars(name: str, stars: tuple[str, ...]) -> str:
    """Fill the stars of a name with those of its key: `fill_stars("mid.*.*", ("3", "5", "0"))` is `mid.3.5`.

    Raises:
        ValueError: the key has fewer stars than the name.
    """
    count = name.count("*")
    if count > len(stars):
        raise ValueError(f"axis {name!r} has {count} stars, but its key only {len(stars)}")
    for star in stars[:count]:
        name = name.replace("*", star, 1)
    return name


def _tokenise(text: str) -> list[tuple[str, Leaf | None, int]]:
    """Return (kind, leaf, position) for every token."""
    tokens: list[tuple[str, Leaf | None, int]] = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
        elif text[position] in "(),+":
            tokens.append((text[position], None, position))
            position += 1
        else:
            match = _LEAF.match(text, position)
            if match is None:
                raise PatternError("not a name, an integer, '_' or one of ( ) , +", text, position)
            size = int(match["size"]) if match["size"] else None
            tokens.append(("leaf", Leaf(match["name"], match["mark"] or "", size), position))
            position = match.end()
    return [*tokens, ("end", None, len(text))]


class _Parser:
    def __init__(self, text: str):
        self.text, self.tokens, self.i, self.depth = text, _tokenise(text), 0, 0

    @property
    def kind(self) -> str:
        return self.tokens[self.i][0]

    def fail(self, message: str) -> PatternError:
        return PatternError(message, self.text, self.tokens[self.i][2])

    def term(self) -> Node:
        kind, leaf, _ = self.tokens[self.i]
        if leaf is not None:
            self.i += 1
            return leaf
        if kind != "(":
            raise self.fail(f"expected an axis, got {'the end' if kind == 'end' else repr(kind)}")
        if self.depth == MAX_DEPTH:
            raise self.fail(f"more than {MAX_DEPTH} nested parentheses")
        self.i, self.depth = self.i + 1, self.depth + 1
        node = self.sum_of(self.product)
        if self.kind != ")":
            raise self.fail("expected ')'")
        self.i, self.depth = self.i + 1, self.depth - 1
        return node

    def product(self) -> Node:
        items = [self.term()]
        while self.kind in ("leaf", "("):
            items.append(self.term())
        return items[0] if len(items) == 1 else Product(tuple(items))

    def sum_of(self, part: Callable[[], Node]) -> Node:
        terms = [part()]
        while self.kind == "+":
            self.i += 1
            terms.append(part())
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def pattern(self) -> tuple[Node, ...]:
        axes = [self.sum_of(self.term)]
        while self.kind == ",":
            self.i += 1
            axes.append(self.sum_of(self.term))
        if self.kind != "end":
            raise self.fail("a composite axis needs parentheses, a new axis a comma")
        if (blocks := math.prod(map(_count_blocks, axes))) > MAX_BLOCKS:
            raise self.fail(f"{blocks} blocks, more than {MAX_BLOCKS}")
        return tuple(axes)


def _count_blocks(node: Node) -> int:
    """Return the number of blocks that an axis is cut into."""
    if isinstance(node, Leaf):
        return 1
    return (math.prod if isinstance(node, Product) else sum)(map(_count_blocks, children(node)))


@cache
def parse_pattern(text: str) -> tuple[Node, ...]:
    """Parse a pattern into one node per axis; "" is a scalar.

    `parse_pattern("r, (h (a + b'))")` is `(Leaf r, Product(h, Sum(a, b')))`.

    Raises:
        PatternError: the text is not a pattern; the error points at the first character that does not fit.
    """
    return _Parser(text).pattern() if text.strip() else ()


def format_pattern(axes: tuple[Node, ...]) -> str:
    """Write a pattern as text, the inverse of `parse_pattern`."""
    return ", ".join(map(str, axes))


def expand_braces(text: str) -> list[str]:
    """Expand braces as text and from left to right: `expand_braces("a.{b,c}") == ["a.b", "a.c"]`."""
    keys = [text] if text.count("{") <= MAX_DEPTH else []
    while 0 < len(keys) <= MAX_BLOCKS and any(map(_BRACES.search, keys)):
        keys = [expanded for key in keys for expanded in _expand_first(key)]
    if not 0 < len(keys) <= MAX_BLOCKS:
        raise PatternError(f"more than {MAX_DEPTH} braces, or more than {MAX_BLOCKS} keys from them", text, 0)
    return keys


def _expand_first(text: str) -> list[str]:
    """Expand the first braces."""
    match = _BRACES.search(text)
    if not match:
        return [text]
    return [text[: match.start()] + choice.strip() + text[match.end() :] for choice in match[1].split(",")]


@dataclass(frozen=True)
class KeyPattern:
    """A compiled key, with `"*"` or an axis name for each of its wildcards, in order."""

    text: str
    regex: re.Pattern[str]
    wildcards: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that run over keys, as in `experts.<expert.*>.w1.weight`."""
        return tuple(w for w in self.wildcards if w != "*")

    def match(self, key: str) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """Return (digits of the stars, index along the key axes) of a key; None if it does not match."""
        match = self.regex.fullmatch(key)
        if match is None:
            return None
        digits = list(zip(self.wildcards, match.groups(), strict=True))
        return tuple(d for w, d in digits if w == "*"), tuple(int(d) for w, d in digits if w != "*")

    def bound(self, stars: tuple[str, ...]) -> str:
        """Return the key with its stars filled in: `a.*.<b.*>.c` with ("3",) is `a.3.<b.3>.c`."""
        text = fill_stars(re.sub(r"<[^<>]*>", "<>", self.text), stars)
        for axis in self.axes:
            text = text.replace("<>", f"<{fill_stars(axis, stars)}>", 1)
        return text


@cache
def compile_key(text: str) -> KeyPattern:
    """Compile a key whose braces are expanded."""
    if adjacent := re.search(r"[*>][*<]", text):
        raise PatternError("two wildcards side by side: where the first ends is ambiguous", text, adjacent.start())
    wildcards, regex = [], ""
    for piece in re.split(r"(\*|<[^<>]*>)", text):
        if piece == "*":
            wildcards.append("*")
            regex += r"(\d+)"
        elif piece.startswith("<"):
            if not re.fullmatch(NAME, piece[1:-1]):
                raise PatternError("not an axis name between < and >", text, text.index(piece))
            wildcards.append(piece[1:-1])
            regex += r"(\d+)"
        else:
            regex += re.escape(piece)
    return KeyPattern(text, re.compile(regex), tuple(wildcards))
