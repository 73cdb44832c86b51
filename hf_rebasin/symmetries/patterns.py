"""The language of axis patterns: text in, tuples out. Knows no tensor.

    table   := { key : pattern }
    key     := part ("." part)*      {a,b} is expanded textually first
    part    := literal | "*" (digits: a scope) | "<name>" (digits: an axis over keys)
    pattern := "" | axis ("," axis)*
    axis    := term ("+" term)*      "+" lays blocks end to end
    term    := leaf | "(" prod ("+" prod)* ")"
    prod    := term+                 a composite axis, outer first: index = a * |b| + b; binds tighter than "+"
    leaf    := "_" | integer | name mark?   held | held, of this size | a symmetry, the same one everywhere it is said
    name    := word ("." (word | integer | "*"))*
    mark    := "'" reader (acted on by the inverse transpose) | "~" diagonal (only the permutation part acts)

`"(head.* qk.*), residual'"` is a matrix whose rows run over heads and, inside a head, over query-key units, and whose
columns read the residual stream. A name with n stars takes the first n stars of its key.
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
# No table needs more; but patterns also come from files that others wrote, and a short one can say a billion blocks.
DEEPEST, MOST_BLOCKS = 50, 1000


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
    """Blocks laid end to end."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))


Node: TypeAlias = Leaf | Product | Sum


def children(node: Node) -> tuple[Node, ...]:
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
    if isinstance(node, Leaf):
        return change(node)
    return type(node)(tuple(map_leaves(c, change) for c in children(node)))


def unmarked(node: Node) -> Node:
    """The same axis without reader and diagonal marks."""
    return map_leaves(node, lambda leaf: Leaf(leaf.name, "", leaf.size))


def scoped(node: Node, stars: tuple[str, ...]) -> Node:
    """`ff.*` under the stars ("3",) is `ff.3`."""
    return map_leaves(node, lambda leaf: Leaf(scope(leaf.name, stars), leaf.mark) if leaf.name else leaf)


def scope(name: str, stars: tuple[str, ...]) -> str:
    """A name takes the first stars of its key: `scope("mid.*.*", ("3", "5", "0"))` is `mid.3.5`.

    Raises ValueError where the key has fewer stars than the name.
    """
    wanted = name.count("*")
    if wanted > len(stars):
        raise ValueError(f"axis {name!r} has {wanted} stars, its key only {len(stars)}")
    for star in stars[:wanted]:
        name = name.replace("*", star, 1)
    return name


def _tokens(text: str) -> list[tuple[str, Leaf | None, int]]:
    found: list[tuple[str, Leaf | None, int]] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text[at] in "(),+":
            found.append((text[at], None, at))
            at += 1
        else:
            match = _LEAF.match(text, at)
            if match is None:
                raise PatternError("not a name, an integer, '_' or one of ( ) , +", text, at)
            size = int(match["size"]) if match["size"] else None
            found.append(("leaf", Leaf(match["name"], match["mark"] or "", size), at))
            at = match.end()
    return [*found, ("end", None, len(text))]


class _Parser:
    def __init__(self, text: str):
        self.text, self.tokens, self.i, self.depth = text, _tokens(text), 0, 0

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
        if self.depth == DEEPEST:
            raise self.fail(f"more than {DEEPEST} parentheses in each other")
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
        if (blocks := math.prod(map(_blocks_of, axes))) > MOST_BLOCKS:
            raise self.fail(f"{blocks} blocks, more than {MOST_BLOCKS}")
        return tuple(axes)


def _blocks_of(node: Node) -> int:
    """Into how many blocks an axis is cut."""
    if isinstance(node, Leaf):
        return 1
    return (math.prod if isinstance(node, Product) else sum)(map(_blocks_of, children(node)))


@cache
def parse(text: str) -> tuple[Node, ...]:
    """One node per axis: `parse("r, (h (a + b'))")` is `(Leaf r, Product(h, Sum(a, b')))`; "" is a scalar.

    Raises PatternError, which points at the first character that does not fit.
    """
    return _Parser(text).pattern() if text.strip() else ()


def show(axes: tuple[Node, ...]) -> str:
    """The inverse of `parse`."""
    return ", ".join(map(str, axes))


def braces(text: str) -> list[str]:
    """`braces("a.{b,c}") == ["a.b", "a.c"]`, textually and from left to right."""
    found = [text] if text.count("{") <= DEEPEST else []
    while 0 < len(found) <= MOST_BLOCKS and any(map(_BRACES.search, found)):
        found = [whole for one in found for whole in _expanded(one)]
    if not 0 < len(found) <= MOST_BLOCKS:
        raise PatternError(f"more than {DEEPEST} braces, or than {MOST_BLOCKS} keys that they stand for", text, 0)
    return found


def _expanded(text: str) -> list[str]:
    """The same for the first braces."""
    match = _BRACES.search(text)
    if not match:
        return [text]
    return [text[: match.start()] + choice.strip() + text[match.end() :] for choice in match[1].split(",")]


@dataclass(frozen=True)
class Key:
    """A compiled key: `"*"` or an axis name for each of its wildcards, in order."""

    text: str
    regex: re.Pattern[str]
    wildcards: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that run over keys, as in `experts.<expert.*>.w1.weight`."""
        return tuple(w for w in self.wildcards if w != "*")

    def match(self, key: str) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """(digits of the stars, index along the key axes), or None."""
        match = self.regex.fullmatch(key)
        if match is None:
            return None
        caught = list(zip(self.wildcards, match.groups(), strict=True))
        return tuple(d for w, d in caught if w == "*"), tuple(int(d) for w, d in caught if w != "*")

    def bound(self, stars: tuple[str, ...]) -> str:
        """The key with its stars filled in: `a.*.<b.*>.c` under ("3",) is `a.3.<b.3>.c`."""
        text = scope(re.sub(r"<[^<>]*>", "<>", self.text), stars)
        for axis in self.axes:
            text = text.replace("<>", f"<{scope(axis, stars)}>", 1)
        return text


@cache
def compile_key(text: str) -> Key:
    """Compile one key (braces already expanded)."""
    if beside := re.search(r"[*>][*<]", text):
        raise PatternError("two wildcards side by side: where the first ends cannot be seen", text, beside.start())
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
    return Key(text, re.compile(regex), tuple(wildcards))
