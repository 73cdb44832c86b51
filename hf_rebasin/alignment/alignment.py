"""Alignments: one group element per symmetry, which together move a model's weights but not its function."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from .. import registry
from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.folder import write_atomically
from ..checkpoints.lazy import Tensors, lazy_parts
from ..errors import CheckpointError, MismatchError, PatternError, SpecError, listed
from ..symmetries.binding import bind, read_spec, untie_spec
from ..symmetries.detection import detect_spec
from ..symmetries.patterns import Leaf
from ..symmetries.spec import LabelledTensor, Spec
from ..symmetries.table import canonical_view, table_for
from ..text import family_of, overview
from .action import act, act_along, element_class, element_shape, identity_element
from .gauge import downcast, find_gauges, fold_gains, gauge_vectors, unfold_gains, upcast
from .groups import Element
from .limits import refuse_moved_outputs

FORMAT = "hf_rebasin.alignment.v1"
GAUGES = ("GAUGE", "ORIGIN")  # prefixes of stored gauge vectors; names of symmetries are in lower case
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, repr=False)
class Alignment:
    """One group element for each symmetry of a spec; a symmetry without an element stays as it is.

    `g.apply(model)` returns a new model of the same kind that computes the same function. `h.compose(g)` acts like g,
    then h; `g.inverse()` undoes g. `g[symmetry]` is the element of a symmetry.

    Args:
        spec: the symmetries, and the axes of tensors that they act on.
        elements: `{symmetry: element}`.
        gauge: `{canonical key: vector}`, the gains and biases given to the norms of rotated streams; their readers
            compensate for them (`hf_rebasin.alignment.gauge`). By default a model keeps its own.
        origin: gains and biases of the model the alignment was found for, which the inverse restores.

    Example: the two-layer network of `Table` with reordered hidden units. `order[i]` is the old index of unit i.

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
    elements: Mapping[str, Element]
    gauge: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return overview(f"Alignment({self})", self._moved_families())

    def __str__(self) -> str:
        gauge = f", into the gauge of {len(self.gauge)} vectors" if self.gauge else ""
        return f"{len(self.moved)} of {len(self.elements)} symmetries moved{gauge}"

    def _moved_families(self) -> list[tuple[str, str, str]]:
        """Return rows (symmetries, group, how many moved), one for all names that differ only in their numbers."""
        moved, counts = set(self.moved), dict[tuple[str, str], list[bool]]()
        for name in self.elements:
            family = family_of(name), family_of(self.spec.symmetries[name].group)
            counts.setdefault(family, []).append(name in moved)
        return [(*family, f"{sum(each)} of {len(each)} moved") for family, each in counts.items()]

    # --- construction --------------------------------------------------------------------------------------------

    @staticmethod
    def identity(spec: Spec) -> Alignment:
        """Return the alignment that moves nothing: an identity element for every symmetry that can move."""
        return Alignment(spec, {name: identity_element(spec, name) for name in spec.symmetries if name in spec.free})

    @staticmethod
    def random(spec: Spec, generator: torch.Generator) -> Alignment:
        """Draw a random element for every symmetry that can move."""
        free = [name for name in spec.symmetries if name in spec.free]  # in an order that does not depend on hashes
        return Alignment(spec, {n: element_class(spec, n).random(*element_shape(spec, n), generator) for n in free})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Alignment:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: the file is not a valid alignment.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as an alignment: {error}") from error
        if FORMAT not in metadata:
            raise CheckpointError(f"{path} is not an alignment: its metadata has {sorted(metadata)}, not {FORMAT!r}")
        try:
            spec = read_spec(metadata[FORMAT])
        except (SpecError, PatternError) as error:
            raise CheckpointError(f"the spec in {path} cannot be read: {error}") from error
        stored: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.partition("/")
            stored.setdefault(name, {})[part] = tensor
        gauges = [stored.pop(name, {}) for name in GAUGES]
        norms = {key: spec.shapes[key] for gauge in find_gauges(spec) for key in gauge.keys}
        for key, vector in (item for vectors in gauges for item in vectors.items()):
            if norms.get(key) != vector.shape or not (vector.is_floating_point() and vector.isfinite().all()):
                raise CheckpointError(f"{path} has an invalid gauge vector {key!r} {tuple(vector.shape)}")
        unknown = sorted(stored.keys() - spec.free)
        if unknown:
            raise CheckpointError(f"{path} has elements of {listed(unknown)}, which cannot move in its spec")
        elements: dict[str, Element] = {}
        for name in spec.symmetries:
            if name in stored:
                try:
                    elements[name] = element_class(spec, name).read(stored[name], *element_shape(spec, name))
                except ValueError as error:
                    raise CheckpointError(f"{path}: the element of {name!r} is invalid: {error}") from error
        return Alignment(spec, elements, *gauges)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file: elements as `symmetry/part`, gauges as `GAUGE/key`, the spec in its metadata."""
        from safetensors.torch import save

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}/{part}": t.contiguous() for n, e in self.elements.items() for part, t in e.tensors().items()}
        for name, gauge in zip(GAUGES, (self.gauge, self.origin), strict=True):
            tensors |= {f"{name}/{key}": vector.contiguous() for key, vector in gauge.items()}
        # one entry only: safetensors writes several in random order, and equal alignments should give equal bytes
        write_atomically(path, save(tensors, metadata={FORMAT: self.spec.to_json()}))
        return path

    # --- the group -----------------------------------------------------------------------------------------------

    def __getitem__(self, symmetry: str) -> Element:
        return self.elements[symmetry]

    @property
    def moved(self) -> list[str]:
        """The names of the symmetries that this alignment moves."""
        return [name for name, element in self.elements.items() if not element.is_identity()]

    def inverse(self) -> Alignment:
        """Return the alignment that undoes this one."""
        elements: dict[str, Element] = {}
        for name in self.spec.symmetries:  # contexts first: an inverse is indexed by the old indices of its contexts
            if name in self.elements:
                elements[name] = self._reindexed(self.elements[name].inverse(), name, elements)
        return Alignment(self.spec, elements, self.origin, self.gauge)

    def compose(self, first: Alignment) -> Alignment:
        """Return the alignment that acts like `first` and then like this one."""
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
        """Return an element with its context indices moved by the elements of its contexts."""
        contexts = self.spec.symmetries[name].contexts
        outermost_first = [context for context in self.spec.symmetries if context in contexts]

        def reindex(tensor: Tensor) -> Tensor:
            for context in outermost_first:
                if context in outer:
                    position = contexts.index(context)
                    inside = tuple(contexts.index(c) for c in self.spec.symmetries[context].contexts)
                    tensor = act_along(tensor, outer[context], position, inside, "")
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
        """Move a model and return the result; the target is not changed.

        Args:
            target: a folder, Hub id or checkpoint, a module, or a state dict with on-disk names. If the model's family
                has a table, the model may be of another class than the one the alignment was found for, as long as it
                has the same symmetries.

        Returns:
            A module or state dict like the target; otherwise a checkpoint, whose tensors are moved when they are read
            or saved. Tensors that no moving symmetry touches are passed on unchanged.

        Raises:
            MismatchError: the model has a symmetry that is missing or different in the alignment; the message names
                the first. The alignment may have more symmetries than the model, such as a pooler's.
        """
        checkpoint = Checkpoint.open(target)
        spec = self._spec_for(checkpoint)
        refuse_moved_outputs(checkpoint, spec, self.moved)
        rotated = {norm.stream for norm in spec.gauged} & set(self.moved)
        if keys := spec.untied_by(rotated):
            checkpoint = canonical_view(checkpoint, spec.table).untied(keys, spec.ties)
            spec = untie_spec(spec, keys)
        view = canonical_view(checkpoint, spec.table)
        moved = view.with_state(self.on(spec, view.state))
        if isinstance(target, nn.Module):
            return moved.model()
        return dict(moved.tensors) if isinstance(target, Mapping) else moved

    def on(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensors:
        """Return g · state by canonical keys, lazily, for a spec that fits both the alignment and the state.

        Tensors that are only permuted keep their values. All others are computed in float64 (float32 for half
        precision) and rounded once; norms that read a rotated stream are folded and unfolded.
        """
        moving = {name: element for name, element in self.elements.items() if not element.is_identity()}
        mixed = {name for name, element in moving.items() if not element.EXACT}  # these compute new values
        if not mixed:
            return act(spec, moving, state)
        parts = dict(lazy_parts(state))
        rotated = [gauge for gauge in find_gauges(spec) if gauge.norm.stream in moving]
        target = {**gauge_vectors(rotated, state), **self.gauge}
        touched = {key for t in spec.tensors if not t.names.isdisjoint(mixed) for key in t.keys.values()}
        touched |= {key for gauge in rotated for key in gauge.shifted_biases}
        wide = {key: upcast(part) if key in touched else part for key, part in parts.items()}
        moved = act(spec, moving, Tensors(fold_gains(rotated, wide, moving, target)))
        unfolded = unfold_gains(rotated, moved.parts, target)
        return Tensors({key: downcast(part, parts[key].dtype) for key, part in unfolded.items()})

    def _spec_for(self, checkpoint: Checkpoint) -> Spec:
        """Return the target's own spec if its family has a table, else the stored one on the target's shapes."""
        if table_for(checkpoint.config) is not None:
            spec = detect_spec(checkpoint)
            own_symmetries = self.spec.symmetries  # the alignment may have been found in smaller groups
            smaller = [
                name
                for name, symmetry in spec.symmetries.items()
                if name in own_symmetries and own_symmetries[name].kind == registry.group(symmetry.kind).permutations
            ]
            spec = spec.restricted(smaller)
            own_rows = self.spec.table.rows
            unknown = [key for key in spec.table.rows if key not in own_rows]
            if 2 * len(unknown) > len(spec.table.rows):
                raise MismatchError(
                    f"the alignment was found for another architecture: of the {len(spec.table.rows)} tensors of "
                    f"{checkpoint.name}, it does not know {len(unknown)}, such as {unknown[0]!r}"
                )
            if all(own_rows.get(key, row) == row for key, row in spec.table.rows.items()):  # of the same table
                spec.refuse_unless_within(self.spec, checkpoint.name)
                return spec
        view = canonical_view(checkpoint, self.spec.table)
        shapes = view.shapes
        # tensors of the spec that the target ties, as the moving model of the search did
        joined = {key: source for key, source in view.ties.items() if key in self.spec.shapes and source in shapes}
        resized: set[str] = set()  # symmetries that nothing moves, such as rows of tokens
        for tensor in self.spec.tensors:
            for key in tensor.keys.values():
                carries = f"carries {' and '.join(map(repr, sorted(tensor.names))) or 'no symmetry'}"
                if key in joined:
                    continue
                if key not in shapes:
                    raise MismatchError(f"{checkpoint.name} has no tensor {key!r}, which {carries}")
                names = self._resized_in(tensor, self.spec.shapes[key], shapes[key])
                resized |= names
                if shapes[key] != self.spec.shapes[key] and not names:
                    raise MismatchError(
                        f"{checkpoint.name}: {key!r}, which {carries}, is {shapes[key]}, but "
                        f"{self.spec.shapes[key]} in the alignment"
                    )
        if joined:
            return bind(self.spec.table, shapes, {**self.spec.ties, **joined})
        if tied := [key for key in shapes if key in self.spec.ties and key not in self.spec.shapes]:
            # a tied tensor stored separately here, as in a module's state dict: the table has a row for it
            return bind(self.spec.table, shapes, {t: k for t, k in self.spec.ties.items() if t not in tied})
        more = next((key for key in shapes if key not in self.spec.shapes), None)
        if more is not None:
            raise MismatchError(f"{checkpoint.name} has a tensor {more!r} that the alignment does not know")
        if not resized:
            return self.spec
        sizes = {name: size for name, size in self.spec.table.sizes.items() if name not in resized}
        return bind(replace(self.spec.table, sizes=sizes), shapes, self.spec.ties)

    def _resized_in(self, tensor: LabelledTensor, own: tuple[int, ...], other: tuple[int, ...]) -> set[str]:
        """Return the symmetries along which alone two shapes of a tensor differ, if none of them can be moved."""
        names = set()
        for node, length, length_of_other in zip(tensor.axes[-len(own) :], own, other, strict=False):
            if length != length_of_other:
                if not isinstance(node, Leaf) or node.name is None or node.name in self.spec.free:
                    return set()
                names.add(node.name)
        return names if len(own) == len(other) else set()
