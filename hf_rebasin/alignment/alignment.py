"""Alignments: one group element per symmetry. What a solver finds, and what moves a model without changing it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from .. import registry
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.folder import write_whole
from ..checkpoints.lazy import Computed, Tensors, parts_of
from ..errors import CheckpointError, MismatchError, PatternError, SpecError, some
from ..symmetries.binding import bind, read_spec, untied
from ..symmetries.detection import spec_of
from ..symmetries.spec import Block, Dim, Labelled, Spec
from ..symmetries.table import KINDS, table_for
from .elements.relaxation import Acting
from .gauge import folded, gauges, narrowed, unfolded, vectors, widened
from .groups import Element

FORMAT = "hf_rebasin.alignment.v1"
GAUGES = ("GAUGE", "ORIGIN")  # what vectors are stored under; names of symmetries are in lower case
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Alignment:
    """One group element for each symmetry of a spec; those without one stay as they are.

    `g.apply(model)` is a new model of the same kind with the same function. `h.compose(g)` acts like g, then h;
    `g.inverse()` undoes g. Elements are addressed by the names of their symmetries.

    Args:
        spec: what the symmetries are, and which axes of which tensors they act on.
        elements: `{symmetry: element}`.
        gauge: `{canonical key: vector}`, the gains and biases that norms get whose stream is rotated; their readers
            make up for them (`hf_rebasin.alignment.gauge`). By default a model keeps its own.
        origin: the same of the model it was found for; what the inverse gives back.

    Example: the two-layer network of `Table`, hidden units in another order. `order[i]` is where unit i came from.

        >>> g = Alignment.random(spec, torch.Generator().manual_seed(0))
        >>> g["hidden"].order.shape
        torch.Size([16])
        >>> moved = g.apply(state)            # rows of 0.weight and 0.bias, columns of 2.weight
        >>> torch.equal(moved["0.bias"], state["0.bias"][g["hidden"].order])
        True
        >>> g.inverse().apply(moved)["0.bias"].equal(state["0.bias"])
        True
    """

    spec: Spec
    elements: Mapping[str, Element] = field(repr=False)
    gauge: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    origin: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    # --- making one ----------------------------------------------------------------------------------------------

    @staticmethod
    def identity(spec: Spec) -> Alignment:
        """The alignment that moves nothing: an identity element for every symmetry that could move."""
        return Alignment(spec, {name: identity_of(spec, name) for name in spec.symmetries if name in spec.free})

    @staticmethod
    def random(spec: Spec, generator: torch.Generator) -> Alignment:
        """A random element of every symmetry that can move, drawn from `generator`."""
        free = [name for name in spec.symmetries if name in spec.free]  # in an order that does not hang on hashes
        return Alignment(spec, {n: group_of(spec, n).random(*extent(spec, n), generator) for n in free})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Alignment:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is no alignment.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as an alignment: {error}") from error
        if FORMAT not in metadata:
            raise CheckpointError(f"{path} is not an alignment: its metadata has {sorted(metadata)}, not {FORMAT!r}")
        try:
            spec = read_spec(metadata[FORMAT])
        except (SpecError, PatternError) as error:
            raise CheckpointError(f"{path} says of its symmetries what cannot be read: {error}") from error
        stored: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.partition("/")
            stored.setdefault(name, {})[part] = tensor
        given = [stored.pop(name, {}) for name in GAUGES]
        norms = {key: spec.shapes[key] for gauge in gauges(spec) for key in gauge.vectors}
        for key, vector in (item for one in given for item in one.items()):
            if norms.get(key) != vector.shape or not (vector.is_floating_point() and vector.isfinite().all()):
                raise CheckpointError(f"{path} has a gauge for {key!r} {tuple(vector.shape)}, which its spec has not")
        unknown = sorted(stored.keys() - spec.free)
        if unknown:
            raise CheckpointError(f"{path} has elements of {some(unknown)}, which its spec does not let move")
        elements: dict[str, Element] = {}
        for name in spec.symmetries:
            if name in stored:
                try:
                    elements[name] = group_of(spec, name).read(stored[name], *extent(spec, name))
                except ValueError as error:
                    raise CheckpointError(f"{path}: the element of {name!r} is broken: {error}") from error
        return Alignment(spec, elements, *given)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: elements as `symmetry/part`, gauges as `GAUGE/key`, the spec in its metadata."""
        from safetensors.torch import save

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}/{part}": t.contiguous() for n, e in self.elements.items() for part, t in e.tensors().items()}
        for name, gauge in zip(GAUGES, (self.gauge, self.origin), strict=True):
            tensors |= {f"{name}/{key}": vector.contiguous() for key, vector in gauge.items()}
        # one entry only: safetensors writes several in random order, and the same alignment is to be the same bytes
        write_whole(path, save(tensors, metadata={FORMAT: self.spec.to_json()}))
        return path

    # --- the group -----------------------------------------------------------------------------------------------

    def __getitem__(self, symmetry: str) -> Element:
        return self.elements[symmetry]

    @property
    def moved(self) -> list[str]:
        """The symmetries that this alignment does not leave as they are."""
        return [name for name, element in self.elements.items() if not element.is_identity()]

    def inverse(self) -> Alignment:
        """The alignment that undoes this one."""
        elements: dict[str, Element] = {}
        for name in self.spec.symmetries:  # contexts first: an inverse is indexed by where its context came from
            if name in self.elements:
                elements[name] = self._reindexed(self.elements[name].inverse(), name, elements)
        return Alignment(self.spec, elements, self.origin, self.gauge)

    def compose(self, first: Alignment) -> Alignment:
        """The alignment that acts like `first` and then like this one."""
        self.spec.refuse_unless_within(first.spec, "the alignment that acts first")
        first.spec.refuse_unless_within(self.spec, "the alignment that acts second")
        elements: dict[str, Element] = {}
        for name in self.spec.symmetries:
            before, after = first.elements.get(name), self.elements.get(name)
            if before is not None:
                before = self._reindexed(before, name, self.elements)
            both = after.compose(before) if after is not None and before is not None else after or before
            if both is not None:
                elements[name] = both
        gauge, origin = {**first.gauge, **self.gauge}, {**self.origin, **first.origin}
        return Alignment(self.spec, elements, gauge, origin)

    def _reindexed(self, element: Element, name: str, outer: Mapping[str, Element]) -> Element:
        """An element whose context indices are moved by the elements of its contexts."""
        contexts = self.spec.symmetries[name].contexts
        outermost_first = [context for context in self.spec.symmetries if context in contexts]

        def reindex(tensor: Tensor) -> Tensor:
            for context in outermost_first:
                if context in outer:
                    place = contexts.index(context)
                    inside = tuple(contexts.index(c) for c in self.spec.symmetries[context].contexts)
                    tensor = _act_along(tensor, outer[context], place, inside, "")
            return tensor

        return element.map(reindex)

    # --- acting --------------------------------------------------------------------------------------------------

    @overload
    def apply(self, target: str | os.PathLike[str] | Checkpoint) -> Checkpoint: ...

    @overload
    def apply(self, target: Module) -> Module: ...

    @overload
    def apply(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def apply(self, target: Source) -> Any:
        """Move a model; the target stays as it is.

        Args:
            target: a folder, Hub id or checkpoint, a module, or a state dict with on-disk names. A model whose family
                has a table may be of another class than the one the alignment was found on, as long as it has the same
                symmetries.

        Returns:
            The same kind of thing, a checkpoint for a folder or Hub id, whose tensors are moved when they are read or
            saved. Tensors that no moving symmetry touches are passed on as they are.

        Raises:
            MismatchError: the model has symmetries that the alignment has not, or others; names the first. What the
                alignment has beyond the model's (a pooler the class leaves out) is not needed.
        """
        checkpoint = Checkpoint.open(target)
        spec = self._spec_for(checkpoint)
        rotated = {norm.stream for norm in spec.gauged} & set(self.moved)
        if keys := spec.untied_by(rotated):
            checkpoint = checkpoint.untied(keys, spec.ties, spec.table.prefix)
            spec = untied(spec, keys)
        moved = checkpoint.with_state(self.on(spec, checkpoint.state(spec.table.prefix)), spec.table.prefix)
        if isinstance(target, nn.Module):
            return moved.model()
        return dict(moved.tensors) if isinstance(target, Mapping) else moved

    def on(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensors:
        """g · state, by canonical keys, each tensor computed when it is asked for, for a spec that fits both.

        What only changes places is moved as it is. The rest is computed in float64 (float32 for half precision), norms
        in front of a rotated stream folded and unfolded, and rounded once.
        """
        moving = {name: element for name, element in self.elements.items() if not element.is_identity()}
        mixed = {name for name, element in moving.items() if not element.EXACT}
        if not mixed:
            return act(spec, moving, state)
        parts = dict(parts_of(state))
        turned = [gauge for gauge in gauges(spec) if gauge.norm.stream in moving]
        into = {**vectors(turned, state), **self.gauge}
        touched = {key for t in spec.tensors if not t.names.isdisjoint(mixed) for key in t.keys.values()}
        touched |= {key for gauge in turned for key in gauge.shifted}
        wide = {key: widened(part) if key in touched else part for key, part in parts.items()}
        moved = act(spec, moving, Tensors(folded(turned, wide, moving, into)))
        done = unfolded(turned, moved.parts, into)
        return Tensors({key: narrowed(part, parts[key].dtype) for key, part in done.items()})

    def _spec_for(self, checkpoint: Checkpoint) -> Spec:
        """The target's own spec if its family has a table, else the embedded one on the target's shapes."""
        if table_for(checkpoint.config) is not None:
            spec = spec_of(checkpoint)
            mine = self.spec.symmetries  # the alignment may have been found in smaller groups
            smaller = [n for n, s in spec.symmetries.items() if n in mine and mine[n].kind == KINDS[s.kind]]
            spec = spec.restricted(smaller)
            own = self.spec.table.rows
            unknown = [key for key in spec.table.rows if key not in own]
            if 2 * len(unknown) > len(spec.table.rows):
                raise MismatchError(
                    f"the alignment was found for another architecture: of {len(spec.table.rows)} tensors of "
                    f"{checkpoint.name} it knows {len(unknown)} not, such as {unknown[0]!r}"
                )
            if all(own.get(key, row) == row for key, row in spec.table.rows.items()):  # else it has a table of its own
                spec.refuse_unless_within(self.spec, checkpoint.name)
                return spec
        shapes = checkpoint.shapes(self.spec.table.prefix)
        for tensor in self.spec.tensors:
            for key in tensor.keys.values():
                carries = f"carries {' and '.join(map(repr, sorted(tensor.names))) or 'no symmetry'}"
                if key not in shapes:
                    raise MismatchError(f"{checkpoint.name} has no tensor {key!r}, which {carries}")
                if shapes[key] != self.spec.shapes[key]:
                    raise MismatchError(
                        f"{checkpoint.name}: {key!r}, which {carries}, is {shapes[key]}, in the alignment "
                        f"{self.spec.shapes[key]}"
                    )
        if tied := [key for key in shapes if key in self.spec.ties and key not in self.spec.shapes]:
            # stored twice here, as in a module's state dict: the table has a row for it
            return bind(self.spec.table, shapes, {t: k for t, k in self.spec.ties.items() if t not in tied})
        more = next((key for key in shapes if key not in self.spec.shapes), None)
        if more is not None:
            raise MismatchError(f"{checkpoint.name} has a tensor {more!r}, of which the alignment knows nothing")
        return self.spec


def act(spec: Spec, elements: Mapping[str, Element], state: Mapping[str, Tensor]) -> Tensors:
    """g · state, by canonical keys, each tensor computed when it is asked for.

    Outer symmetries act first; an inner element is indexed by the new outer place.
    """
    moving = {name: element for name, element in elements.items() if not element.is_identity()}
    parts = dict(parts_of(state))
    moved = dict(parts)
    for tensor in spec.tensors:
        if tensor.names.isdisjoint(moving):
            continue
        if _hang_on_data(tensor):  # which key comes here is decided inside the tensors: all of them are looked at
            inputs = [parts[key] for key in tensor.keys.values()]
            for index, key in tensor.keys.items():
                compute = partial(_moved_together, spec, moving, tensor, index)
                moved[key] = Computed(parts[key].shape, parts[key].dtype, inputs, compute)
        else:
            for index, key in tensor.keys.items():
                source, one, inside = _of_one_key(spec, moving, tensor, index)
                part = parts[source]
                moved[key] = Computed(part.shape, part.dtype, [part], partial(_moved, spec, inside, one))
    return Tensors(moved)


def _moved(spec: Spec, elements: Mapping[str, Element], tensor: Labelled, inputs: Sequence[Tensor]) -> Tensor:
    return act_on(spec, elements, tensor, inputs[0].contiguous())


def _hang_on_data(tensor: Labelled) -> bool:
    """Whether an axis over keys has a context that is an axis inside the tensors."""
    n = len(next(iter(tensor.keys)))
    return any(place >= n for block in tensor.blocks for dim in block.dims[:n] for place in dim.contexts)


def _moved_together(
    spec: Spec, elements: Mapping[str, Element], tensor: Labelled, index: tuple[int, ...], inputs: Sequence[Tensor]
) -> Tensor:
    stacked = tensor.gather(dict(zip(tensor.keys.values(), inputs, strict=True)))
    return act_on(spec, elements, tensor, stacked)[index].clone()


def _of_one_key(
    spec: Spec, elements: Mapping[str, Element], tensor: Labelled, index: tuple[int, ...]
) -> tuple[str, Labelled, Mapping[str, Element]]:
    """(the key whose tensor comes to this place along the key axes, the tensor of one key, what moves inside it)."""
    if not index:
        return tensor.key, tensor, elements
    n = len(index)
    counts = tensor.shape[:n]
    places = torch.arange(math.prod(counts)).reshape(counts)
    for name, place, dim in _in_order(spec, tensor.blocks[0]):  # in all blocks the same, as keys are not cut
        if place < n and name in elements:
            places = _act_along(places, elements[name], place, dim.contexts, "")
    source = tuple(int(i) for i in torch.unravel_index(places[index], counts))
    inside = dict(elements)
    for name, place, dim in (found for block in tensor.blocks for found in _in_order(spec, block)):
        if place >= n and name in elements and any(context < n for context in dim.contexts):
            at = tuple(index[context] if context < n else slice(None) for context in dim.contexts)
            inside[name] = elements[name].map(itemgetter(at))

    def cut(dim: Dim) -> Dim:
        return replace(dim, axis=dim.axis - n, contexts=tuple(place - n for place in dim.contexts if place >= n))

    blocks = tuple(Block(b.offset, tuple(map(cut, b.dims[n:]))) for b in tensor.blocks)
    one = replace(tensor, keys={(): tensor.keys[source]}, shape=tensor.shape[n:], axes=tensor.axes[n:], blocks=blocks)
    return one.key, one, inside


def act_on(spec: Spec, elements: Mapping[str, Element], tensor: Labelled, x: Tensor) -> Tensor:
    """g · x for one labelled tensor, as a new tensor."""
    out = torch.empty_like(x)
    for block in tensor.blocks:
        block.view(out).copy_(act_on_block(spec, elements, block, block.view(x)))
    return out


def act_on_block(
    spec: Spec, elements: Mapping[str, Acting], block: Block, x: Tensor, still: Iterable[int] = ()
) -> Tensor:
    """g · x for one block; `x` has the block's dimensions, of which those in `still` are not acted on."""
    for name, place, dim in _in_order(spec, block):
        if name in elements and place not in still:
            x = _act_along(x, elements[name], place, dim.contexts, dim.mark)
    return x


def _in_order(spec: Spec, block: Block) -> list[tuple[str, int, Dim]]:
    """The labelled dimensions of a block, contexts first, then by name: a file's order of keys rounds nothing else."""
    dims = [(dim.name, place, dim) for place, dim in enumerate(block.dims) if dim.name]
    return sorted(dims, key=lambda dim: (len(spec.symmetries[dim[0]].contexts), dim[0], dim[1]))


def _act_along(x: Tensor, element: Acting, place: int, contexts: tuple[int, ...], mark: str) -> Tensor:
    """Act on dimension `place` of x, whose contexts are the dimensions `contexts`."""
    front = [*contexts, place]
    where = list(range(len(front)))
    return element.act(x.movedim(front, where), mark).movedim(where, front)


def group_of(spec: Spec, name: str) -> type[Element]:
    """The class of the group a symmetry moves under."""
    kind = spec.symmetries[name].kind
    return cast("type[Element]", registry.find("groups", "permutation" if kind == "held" else kind).Element)


def identity_of(spec: Spec, name: str) -> Element:
    """The element of a symmetry that moves nothing."""
    return group_of(spec, name).identity(*extent(spec, name))


def extent(spec: Spec, name: str) -> tuple[tuple[int, ...], int]:
    """(sizes of the contexts, size) of a symmetry."""
    symmetry = spec.symmetries[name]
    return tuple(spec.symmetries[c].size for c in symmetry.contexts), symmetry.size
