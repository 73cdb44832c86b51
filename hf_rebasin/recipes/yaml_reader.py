"""YAML as people write it: within bounds, every key once, and what cannot be read is said with its place.

Anchors and aliases are welcome, but what they stand for is counted as if it were written out: a file of a kilobyte may
else say a billion things.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from ..errors import OptionError

LONGEST = 100_000  # bytes: a recipe has a few thousand
MOST = 10_000  # values
DEEPEST = 50  # mappings and lists in each other
DIGITS = 100


def read_yaml(text: str | bytes, name: str = "the text") -> Any:
    """What a YAML document says.

    Args:
        text: the document; bytes in UTF-8, or in UTF-16 with a byte order mark.
        name: what messages call it.

    Raises:
        OptionError: it is no YAML, says a key twice, or is longer, deeper or more than any recipe.

    Example:
        >>> read_yaml("{weights: &w [1, 2], others: [*w, *w]}")
        {'weights': [1, 2], 'others': [[1, 2], [1, 2]]}
    """
    if len(text) > LONGEST:
        raise OptionError(f"{name} is too long to be a recipe: {len(text)} characters of at most {LONGEST}")
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_large(node, name)
        return loader.construct_document(node)
    except RecursionError as error:
        raise OptionError(f"{name} is nested deeper than {DEEPEST} mappings and lists") from error
    except yaml.YAMLError as error:
        raise OptionError(f"{name} cannot be read as YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """One that says where, whatever is wrong with a value."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > DEEPEST:  # said here, as looking for the ends of many takes long
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of whatever makes a date of 2001-99-99
            said = f"this is no {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from error

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    said = f"{key.value!r} is said twice"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)  # type: ignore[arg-type]

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > DIGITS:
            raise ValueError(f"{len(node.value)} digits")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refuse_large(node: yaml.Node, name: str) -> None:
    """Raise OptionError for more values than a recipe has, or deeper ones, with all aliases written out."""
    known: dict[int, tuple[int, int]] = {}  # by node: an alias is the very node that it stands for

    def extent(node: yaml.Node, above: int) -> tuple[int, int]:
        """(values, depth)"""
        if above > DEEPEST:
            raise OptionError(
                f"{name} is nested deeper than {DEEPEST} mappings and lists, or holds itself by an alias"
            )
        if id(node) not in known:
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = [(one,) if isinstance(one, yaml.Node) else one for one in inside]
            found = [extent(one, above + 1) for pair in pairs for one in pair]
            known[id(node)] = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
        count, depth = known[id(node)]
        if count > MOST or above + depth > DEEPEST + 1:
            raise OptionError(
                f"{name} says more than a recipe can: {count} values in {depth} levels, with all aliases written out, "
                f"of at most {MOST} and {DEEPEST}"
            )
        return count, depth

    extent(node, 0)
