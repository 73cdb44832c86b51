"""Plug-ins: tables, groups, solvers and merge methods, each of them a file that is known by its file name.

To add one, add a file to the folder of its kind. Its contract is the type that a look-up returns: `TableFile`,
`Group`, `MergeMethod` or `SolverClass`. A look-up refuses a file that lacks a part of its contract.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, get_type_hints

from .errors import OptionError, PluginError, UnknownNameError, nearest, quoted

if TYPE_CHECKING:
    from torch import Tensor

Permutations = Literal["permutation", "held"]
Kind = Literal["table", "group", "solver", "merge method"]
FOLDERS: dict[Kind, str] = {
    "table": "symmetries.specs",
    "group": "alignment.groups",
    "solver": "solving.solvers",
    "merge method": "merging.methods",
}
DataUse = Literal["none", "optional", "required"]
MISSPELLING_CUTOFF = 0.75  # how similar a name must be to one of the contract to count as a misspelling of it


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """A file of `symmetries/specs/`, which describes the tensors of an architecture family.

    Args:
        name: name of the file.
        model_types: `MODEL_TYPES`, the `model_type` of every transformers configuration it describes.
        tiny: `TINY`, configuration settings small enough for tests, at least one per supported class.
        table: `table(config)` returns `{key: pattern}`.
        groups: `groups(config)` returns `{symmetry: kind}`.
        sizes: `sizes(config)` returns `{axis: size}` where the shapes leave it open.
        norms: `norms(config)` returns `{norm: its readers}`.
        reasons: `reasons(config)` returns `{symmetry: why its group is not larger}`.
        prefix: `PREFIX`, the prefix or prefixes that keys may have, or a function `prefix(config)`.
    """

    name: str
    table: Callable[[Any], Mapping[str, str]]
    groups: Callable[[Any], Mapping[str, str]]
    model_types: Sequence[str] = ()
    tiny: Sequence[Mapping[str, Any]] = ()
    sizes: Callable[[Any], Mapping[str, int]] = lambda config: {}
    norms: Callable[[Any], Mapping[str, str | list[str]]] = lambda config: {}
    reasons: Callable[[Any], Mapping[str, str]] = lambda config: {}
    prefix: str | tuple[str, ...] | Callable[[Any], str | tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """A file of `alignment/groups/`, which defines how an axis may move.

    Args:
        name: name of the file, which tables refer to.
        element: its class `Element`; see `hf_rebasin.alignment.groups.Element` for the attributes below.
        permutations: subgroup of its permutations, "permutation" or "held".
        rotates: whether norms stand between an axis and its readers, so that moving it needs a gauge.
        signed: whether it has signs, which do not reach axes that are marked diagonal.
        moves_one: whether an axis of size 1 can move.
        size: the only size such an axis can have; None if any size will do.
    """

    name: str
    element: type[Any]
    permutations: Permutations
    rotates: bool
    signed: bool
    moves_one: bool
    size: int | None


class SolverClass(Protocol):
    """The class `Solver` of a file of `solving/solvers/`, a frozen dataclass whose fields are its options."""

    data: ClassVar[DataUse]  # whether it uses data

    def __call__(self, **options: Any) -> Any: ...

    @staticmethod
    def memory(model: int, *, data: bool) -> int:
        """Return the bytes it needs in addition to similarities; `model` is the size of one model in float32."""

    def solve(self, problem: Any) -> Any:
        """Return the `Solution` of a `Problem`."""


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A file of `merging/methods/`, which merges the tensors of one key and may then work on the entire merge.

    Args:
        name: name of the file.
        merge: `merge(tensors, *, …)` merges the tensors of one key, in the order of the models; its keyword arguments
            are the parameters of the method, with their defaults.
        sums: `sums(tensors)` returns statistics of whole tensors that add up over pieces of them. A method that has
            it is streamed, and called as `merge(tensors, sums, *, …)`.
        finish: `finish(merged, models, data, *, …)` works on the entire merge, with data.
        elementwise: `ELEMENTWISE`, whether every element of the result depends only on the same element of the
            tensors; such a method is streamed in chunks, and gets flat pieces of the tensors.
        extra_copies: `EXTRA_COPIES`, the additional memory that `finish` needs, in copies of a model.
        verb: `VERB`, two words for `finish`: while it runs, and afterwards ("refitting", "refitted").
    """

    name: str
    merge: Callable[..., Tensor]
    sums: Callable[[Sequence[Tensor]], Tensor] | None = None
    finish: Callable[..., Any] | None = None
    elementwise: bool = False
    extra_copies: int = 0
    verb: tuple[str, str] = ("", "")

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the method, `{name: type}`."""
        return keywords_of(self.merge)

    @property
    def streams(self) -> bool:
        """Whether tensors are merged in chunks, so that none is in memory as a whole."""
        return self.elementwise or self.sums is not None


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Return the sorted names of all plug-ins of a kind: `names("merge method") == ("distil", "lerp", …)`."""
    folder = Path(__file__).parent.joinpath(*FOLDERS[kind].split("."))
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


@cache
def table_file(name: str) -> TableFile:
    """Look up the spec file of an architecture family; see `_load` for the errors it raises."""
    file = _read("table", name, TableFile)
    for part, why in (("MODEL_TYPES", "by which it is found"), ("TINY", "models that the tests build")):
        if not getattr(file, part.lower()):
            raise PluginError(f"table {name!r} lacks {part}, {why}")
    return file


@cache
def group(name: str) -> Group:
    """Look up a group; "held", which is not a file, is the group in which nothing moves."""
    if name == "held":
        element = group("permutation").element
        return Group(
            name=name, element=element, permutations="held", rotates=False, signed=False, moves_one=False, size=None
        )
    element = _class_in("group", name, "Element", importlib.import_module(f"{__package__}.{FOLDERS['group']}").Element)
    return Group(
        name=name,
        element=element,
        permutations=element.PERMUTATIONS,
        rotates=element.ROTATES,
        signed=element.SIGNED,
        moves_one=element.MOVES_ONE,
        size=element.SIZE,
    )


@cache
def solver(name: str) -> SolverClass:
    """Look up the class of a solver; see `_load` for the errors it raises."""
    return _class_in("solver", name, "Solver", SolverClass)


@cache
def merge_method(name: str) -> MergeMethod:
    """Look up a merge method; see `_load` for the errors it raises."""
    method = _read("merge method", name, MergeMethod)
    if method.finish is not None and not all(method.verb):
        raise PluginError(
            f"merge method {name!r} lacks VERB, two words for what finish does, such as ('refitting', 'refitted')"
        )
    return method


def _load(kind: Kind, name: str) -> ModuleType:
    """Import the module of a plug-in.

    Raises:
        UnknownNameError: there is no plug-in of that name; the message suggests the nearest one.
        PluginError: the plug-in lacks a part of its contract, or misspells it (raised by the callers).
    """
    if name not in names(kind):
        raise UnknownNameError(f"no {kind} {quoted(name)}{nearest(name, names(kind))}")
    return importlib.import_module(f"{__package__}.{FOLDERS[kind]}.{name}")


Contract = TypeVar("Contract", TableFile, MergeMethod)


def _read(kind: Kind, name: str, contract: type[Contract]) -> Contract:
    """Look up a plug-in whose contract consists of functions and constants of a module."""
    return read_plugin(_load(kind, name), kind, name, contract)


def read_plugin(module: ModuleType | SimpleNamespace, kind: Kind, name: str, contract: type[Contract]) -> Contract:
    """Read the contract off a module; PluginError if a part of it is missing or misspelt."""
    values: dict[str, Any] = {}
    defined = {attribute for attribute in vars(module) if not attribute.startswith("_")}
    for field in (field for field in fields(contract) if field.name != "name"):
        attribute = next((spelling for spelling in (field.name, field.name.upper()) if spelling in defined), None)
        if attribute is not None:
            values[field.name] = getattr(module, attribute)
            defined.discard(attribute)
            continue
        expected = field.name if "Callable" in str(field.type) else field.name.upper()
        if near := difflib.get_close_matches(expected, defined, n=1, cutoff=MISSPELLING_CUTOFF):
            raise PluginError(
                f"{kind} {name!r} defines {near[0]}, which is not a part of its contract; write {expected}, "
                f"or _{near[0]} for a helper"
            )
        if field.default is MISSING:
            raise PluginError(f"{kind} {name!r} lacks {expected}, which {contract.__name__} in registry.py describes")
    return contract(name=name, **values)


def _class_in(kind: Kind, name: str, class_name: str, contract: type[Any]) -> Any:
    """Look up a plug-in whose contract is a class that has all attributes of a protocol."""
    plugin = getattr(_load(kind, name), class_name, None)
    if not inspect.isclass(plugin):
        raise PluginError(f"{kind} {name!r} lacks a class {class_name}")
    attributes = {*vars(contract), *inspect.get_annotations(contract)}
    if lacking := sorted(name for name in attributes if not name.startswith("_") and not hasattr(plugin, name)):
        where = f"{contract.__module__}.{contract.__qualname__}"
        raise PluginError(f"{class_name} of {kind} {name!r} lacks {', '.join(lacking)}; see {where}")
    return plugin


def keywords_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return `{keyword: type}` of a merge method (keyword-only arguments) or a solver's dataclass (fields)."""
    hints = get_type_hints(target)  # resolves inherited fields in the modules that define them
    parameters = inspect.signature(target).parameters.values()
    return {p.name: hints[p.name] for p in parameters if inspect.isclass(target) or p.kind is p.KEYWORD_ONLY}


ValueReader = Callable[[Any, Any], Any]


def coerce_value(kind: Any, value: Any) -> Any:
    """Convert a value to a type; ValueError says why it does not fit."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"{quoted(value)} does not fit: {message[0].lower()}{message[1:]}") from error


def read_keywords(
    target: Callable[..., Any], given: Mapping[str, Any], read: ValueReader = coerce_value
) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert keyword arguments to their types: `{"t": "1e-1"}` becomes `{"t": 0.1}`.

    Returns:
        The values, and `{keyword: message}` for the arguments that are wrong.
    """
    known, values, mistakes = keywords_of(target), {}, {}
    for keyword, value in given.items():
        if keyword not in known:
            mistakes[keyword] = f"no such parameter{nearest(str(keyword), known)}"
            continue
        try:
            values[keyword] = read(known[keyword], value)
        except ValueError as error:
            mistakes[keyword] = str(error)
    return values, mistakes


def checked_keywords(
    owner: str, target: Callable[..., Any], given: Mapping[str, Any], read: ValueReader = coerce_value
) -> dict[str, Any]:
    """Convert keyword arguments to their types; OptionError lists everything that is wrong with those of `owner`."""
    values, mistakes = read_keywords(target, given, read)
    if mistakes:
        raise OptionError(f"{owner}: {'; '.join(f'{keyword}: {message}' for keyword, message in mistakes.items())}")
    return values
