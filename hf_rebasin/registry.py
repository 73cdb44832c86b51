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
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_type_hints

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
BaseUse = Literal["none", "optional", "required"]
PieceKind = Literal["elements", "rows", "tensors"]
# Keyword arguments of a merge method that are not parameters: see `hf_rebasin.merging.pieces`.
FILLED_IN = frozenset({"base", "uniforms", "offset", "shape", "lookup", "transposed", "whole", "seed"})
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
            are the parameters of the method, with their defaults, and those of `FILLED_IN` that it asks for.
        prepare: `prepare(pieces, *, …)` passes over the pieces of whole tensors first, any number of times; `merge`
            gets what it returns as `whole`.
        finish: `finish(merged, models, data, *, …)` works on the entire merge, with data.
        base: `BASE`, whether the method works on differences from a base model: then its tensors are differences, and
            so is its result. With "optional" they are the models' own tensors if there is no base.
        pieces: `PIECES`, what a piece has to hold: "elements" if every element of the result depends only on the same
            element of the tensors, "rows" if it depends on its row (the last axis), "tensors" if on all of them.
        keeps: `KEEPS`, the parameters under which identical models give that model, and weights (1, 0, …) the first
            one; None if there are none.
        symmetric: `SYMMETRIC`, whether the order of the models makes no difference, apart from rounding.
        mergekit: `MERGEKIT`, the parameters that give mergekit's numbers where the defaults differ from it.
        extra_copies: `EXTRA_COPIES`, the additional memory that `finish` needs, in copies of a model.
        verb: `VERB`, two words for `finish`: while it runs, and afterwards ("refitting", "refitted").
    """

    name: str
    merge: Callable[..., Tensor]
    prepare: Callable[..., Any] | None = None
    finish: Callable[..., Any] | None = None
    base: BaseUse = "none"
    pieces: PieceKind = "tensors"
    keeps: Mapping[str, Any] | None = field(default_factory=dict)
    symmetric: bool = True
    mergekit: Mapping[str, Any] = field(default_factory=dict)
    extra_copies: int = 0
    verb: tuple[str, str] = ("", "")

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the method under the names that users write, `{name: type}`.

        `lambda_` is written as `lambda`, which Python reserves.
        """
        keywords = keywords_of(self.merge)
        return {name.removesuffix("_"): kind for name, kind in keywords.items() if name not in FILLED_IN}

    @property
    def per_model(self) -> dict[str, str]:
        """Parameters that have one value per model, `{singular: plural}`: `{"weight": "weights"}`.

        Users write the plural for a list of all values, and the singular for one model, or for all models alike.
        """
        return {singular(name): name for name, kind in self.parameters.items() if is_per_model(kind)}

    @property
    def streams(self) -> bool:
        """Whether tensors are merged in pieces, so that none is in memory as a whole."""
        return self.pieces != "tensors"

    def keywords_for(self, target: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the values, by the names that users write, that a function of the method takes."""
        return {
            keyword: values[keyword.removesuffix("_")]
            for keyword in inspect.signature(target).parameters
            if keyword.removesuffix("_") in values
        }


def singular(plural: str) -> str:
    """Return the singular of a plural: `singular("densities") == "density"`, `singular("weights") == "weight"`."""
    return f"{plural.removesuffix('ies')}y" if plural.endswith("ies") else plural.removesuffix("s")


def is_per_model(kind: Any) -> bool:
    """Whether a parameter's type is a sequence of numbers, one per model."""
    return any(get_args(member) in ((float,), (float, ...)) for member in (kind, *get_args(kind)))


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
    for part in (part for part in fields(contract) if part.name != "name"):
        attribute = next((spelling for spelling in (part.name, part.name.upper()) if spelling in defined), None)
        if attribute is not None:
            values[part.name] = getattr(module, attribute)
            defined.discard(attribute)
            continue
        expected = part.name if "Callable" in str(part.type) else part.name.upper()
        if near := difflib.get_close_matches(expected, defined, n=1, cutoff=MISSPELLING_CUTOFF):
            raise PluginError(
                f"{kind} {name!r} defines {near[0]}, which is not a part of its contract; write {expected}, "
                f"or _{near[0]} for a helper"
            )
        if part.default is MISSING and part.default_factory is MISSING:
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
    known: Mapping[str, Any], given: Mapping[str, Any], read: ValueReader = coerce_value
) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert keyword arguments to their types, which are `known`: `{"t": "1e-1"}` becomes `{"t": 0.1}`.

    Returns:
        The values, and `{keyword: message}` for the arguments that are wrong.
    """
    values, mistakes = dict[str, Any](), dict[str, str]()
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
    owner: str, known: Mapping[str, Any], given: Mapping[str, Any], read: ValueReader = coerce_value
) -> dict[str, Any]:
    """Convert keyword arguments to their types; OptionError lists everything that is wrong with those of `owner`."""
    values, mistakes = read_keywords(known, given, read)
    if mistakes:
        raise OptionError(f"{owner}: {'; '.join(f'{keyword}: {message}' for keyword, message in mistakes.items())}")
    return values
