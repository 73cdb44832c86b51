"""Read YAML within bounds: no key twice, nothing huge, and errors that say where they are.

Anchors and aliases are allowed, but counted as if they were written out: otherwise a file of a kilobyte could stand
for a billion values.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from ..errors import OptionError

MAX_BYTES = 100_000  # a recipe has a few thousand
MAX_VALUES = 10_000
MAX_DEPTH = 50  # nested mappings and lists
MAX_DIGITS = 100  # of an integer


def read_yaml(text: str | bytes, name: str = "the text") -> Any:
    """Read a YAML document.

    Args:
        text: the document; bytes in UTF-8, or in UTF-16 with a byte order mark.
        name: name of the document in messages.

    Raises:
        OptionError: invalid YAML, a repeated key, or a document that is longer, deeper or larger than any recipe.

    Example:
        >>> read_yaml("{weights: &w [1, 2], others: [*w, *w]}")
        {'weights': [1, 2], 'others': [[1, 2], [1, 2]]}
    """
    documents = read_yaml_documents(text, name)
    if len(documents) > 1:
        raise OptionError(f"{name} has {len(documents)} documents, separated by ---, where one is wanted")
    return documents[0] if documents else None


def read_yaml_documents(text: str | bytes, name: str = "the text") -> list[Any]:
    """Read all documents of a YAML text, which lines of `---` separate; see `read_yaml`."""
    if len(text) > MAX_BYTES:
        raise OptionError(f"{name} is too long to be a recipe: {len(text)} characters of at most {MAX_BYTES}")
    try:
        loader = _Loader(text)
        loader.name = name
        documents = []
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            _refuse_large(node, name)
            documents.append(loader.construct_document(node))
        return documents
    except RecursionError as error:
        raise OptionError(f"{name} is nested deeper than {MAX_DEPTH} mappings and lists") from error
    except yaml.YAMLError as error:
        raise OptionError(f"{name} cannot be read as YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """A loader that refuses repeated keys, and whose errors all say where they are."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > MAX_DEPTH:  # here already, as scanning for the ends of many collections is slow
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # constructors raise anything, such as ValueError for the date 2001-99-99
            message = f"this is not a valid {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    message = f"the key {key.value!r} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)  # type: ignore[arg-type]

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise ValueError(f"{len(node.value)} digits")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refuse_large(node: yaml.Node, name: str) -> None:
    """Raise OptionError if a document has more values or levels than any recipe, with all aliases written out."""
    known: dict[int, tuple[int, int]] = {}  # by the id of a node, as an alias is the very node that it stands for

    def extent(node: yaml.Node, above: int) -> tuple[int, int]:
        """Return the number of values in a node, and its depth."""
        if above > MAX_DEPTH:
            raise OptionError(
                f"{name} is nested deeper than {MAX_DEPTH} mappings and lists, or contains itself by an alias"
            )
        if id(node) not in known:
            items = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = [(item,) if isinstance(item, yaml.Node) else item for item in items]
            extents = [extent(child, above + 1) for pair in pairs for child in pair]
            known[id(node)] = (
                1 + sum(count for count, _ in extents),
                1 + max((depth for _, depth in extents), default=0),
            )
        count, depth = known[id(node)]
        if count > MAX_VALUES or above + depth > MAX_DEPTH + 1:
            raise OptionError(
                f"{name} is larger than a recipe can be: {count} values in {depth} levels, with all aliases written "
                f"out, of at most {MAX_VALUES} and {MAX_DEPTH}"
            )
        return count, depth

    extent(node, 0)
