"""The spec of a checkpoint: by the table of its family, or inferred from its forward pass."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..checkpoints.checkpoint import Checkpoint, Source
from ..errors import MismatchError, SpecError, some
from ..modules.forward import Inputs, example_inputs
from .binding import bind, bind_to
from .patterns import READER, Leaf, leaves, map_leaves, parse, show
from .spec import Norm, Shape, Spec
from .table import ROTATING, Table, table_for

logger = logging.getLogger(__name__)


def spec_of(checkpoint: Checkpoint, inputs: Inputs | None = None) -> Spec:
    """The spec of a checkpoint: by the table of its family, or inferred where there is none.

    Raises:
        MismatchError: there is neither a table nor a forward pass.
        SpecError: the table does not fit its tensors, or the forward pass cannot be run without weights.
    """
    table = table_for(checkpoint.config)
    return bind_to(table, checkpoint) if table is not None else inferred(checkpoint, inputs)


def inferred(checkpoint: Checkpoint, inputs: Inputs | None = None) -> Spec:
    """The spec that the forward pass of a checkpoint's module shows, on inputs that are made up if none are given.

    Raises:
        MismatchError: there is no module, or no inputs are known for it.
        SpecError: the forward pass cannot be run without weights.
    """
    from .infer.inference import infer

    if checkpoint.template is None and checkpoint.config is None:
        raise MismatchError(
            f"{checkpoint.name} is only tensors, without a forward pass that could show its symmetries; give a module "
            "for one of the two, or its symmetries (spec=), or merge without alignment (--no-align)"
        )
    module, disk = checkpoint.skeleton()
    if inputs is None:
        if checkpoint.config is None:
            raise MismatchError(
                f"the symmetries of {checkpoint.name} are read off its forward pass; give inputs for one (inputs=): a "
                "tensor, a tuple of them, or a dictionary of keyword arguments"
            )
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        made_up = example_inputs(checkpoint.config, torch.Generator().manual_seed(0))
        inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in made_up.items()}
    canonical = {key: name for name, key in checkpoint.canonical().items()}
    keys = {key: canonical[stored] for key, stored in disk.items() if stored in canonical}
    if odd := [key for key in keys.values() if not re.fullmatch(r"[^*<>{}\s]+", key)]:
        raise SpecError(
            f"{some(map(repr, odd))}: names with * < > {{ }} or spaces cannot be said in a table; rename them"
        )
    ties = checkpoint.canonical_ties()
    if gone := sorted(set(ties.values()) - set(canonical.values())):
        raise SpecError(f"{checkpoint.name} lacks {some(gone)}, which another of its tensors is tied to")
    found = infer(module, inputs, keys, ties)
    if found.unused:
        logger.warning(
            "%s does not use %s on these inputs; that stays as it is, and would no longer fit where it is used",
            type(module).__name__,
            some(found.unused),
        )
    # what a file has beyond its class: nothing is known of it
    more = {name: "no part of its class" for name in canonical.values() if name not in found.table.rows}
    shapes = checkpoint.shapes()
    rows = {name: found.table.rows.get(name) or ", ".join("_" * len(shape)) for name, shape in shapes.items()}
    rows = {name: _by_string(row, found.pins.get(name, ()), shapes[name], checkpoint) for name, row in rows.items()}
    named = {leaf.name for row in rows.values() for axis in parse(row) for leaf in leaves(axis)}
    groups = {name: "held" for name in ("vocab", "label") if name in named}
    rows |= {target: rows[kept] for target, kept in ties.items() if target not in rows}
    rows |= {target: _reading(rows[target], found.table, target) for target in ties}
    table = replace(found.table, rows=rows, groups=groups | dict(found.table.groups), prefix=checkpoint.base_prefix)
    spec = bind(table, shapes, ties)
    pins = {name: tuple(why for _ in shapes[name]) for name, why in more.items()}
    return replace(spec, pins=dict(found.pins) | pins, activations=found.activations)


def _reading(row: str, table: Table, target: str) -> str:
    """The row of a tied tensor: where it reads a norm, it reads the stream."""
    readers = {reader for said in table.norms.values() for reader in ([said] if isinstance(said, str) else said)}
    if target.removesuffix(".weight") not in readers:
        return row

    def marked(leaf: Leaf) -> Leaf:
        turned = leaf.name is not None and leaf.name in table.groups and table.group_of(leaf.name)[0] in ROTATING
        return replace(leaf, mark=READER) if turned else leaf

    return show(tuple(map_leaves(axis, marked) for axis in parse(row)))


def _by_string(row: str, pins: Sequence[str | None], shape: Shape, checkpoint: Checkpoint) -> str:
    """A row whose held axes run over tokens or labels names them, so that they can be matched by string."""
    config = getattr(checkpoint.config, "text_config", checkpoint.config)
    others = {getattr(config, name, None) for name in ("max_position_embeddings", "type_vocab_size")}
    axes = list(parse(row))
    for d, (axis, why) in enumerate(zip(axes, pins, strict=False)):
        output = why is not None and why.startswith("an output")
        if axis == Leaf(None) and (output or (why is not None and why.endswith("looked up by number"))):
            if shape[d] == getattr(config, "vocab_size", None) and shape[d] not in others:
                axes[d] = Leaf("vocab")
            elif output and d == 0 and shape[d] == len(checkpoint.settings.get("id2label") or ()):
                axes[d] = Leaf("label") if "Classification" in str(checkpoint.config.architectures) else axes[d]
    return show(tuple(axes))


def written(spec: Spec, checkpoint: Checkpoint) -> str:
    """A spec as the text of a spec file, with stars and braces; it is read back, and has to say the same."""
    from .infer.spec_file import spec_file

    def fits(table: Table) -> bool:
        try:
            other = bind_to(table, checkpoint)
        except SpecError:
            return False
        blocks = {tensor.bound: tensor.blocks for tensor in other.tensors}
        alike = other.symmetries == spec.symmetries and all(blocks[t.bound] == t.blocks for t in spec.tensors)
        return alike and _said(other.norms) == _said(spec.norms)

    def _said(norms: Sequence[Norm]) -> set[Norm]:
        return {replace(norm, readers=tuple(sorted(norm.readers))) for norm in norms}

    return spec_file(spec.table, checkpoint.config, checkpoint.owner.__name__, fits)


def spec_for(source: Source, table: Table | None = None, inputs: Inputs | None = None) -> Spec:
    """The symmetries of a model: by the table of its family, or inferred where no file of `symmetries/specs/` fits.

    Args:
        source: a folder, Hub id, module, state dict or checkpoint.
        table: to be used instead.
        inputs: of the forward pass that is looked at where there is no table; see `infer_spec`.

    Raises:
        MismatchError: there is neither a table nor a module with inputs.
        SpecError: the table does not fit (names the key, its shape and the row), or nothing can be inferred.

    Example:
        >>> spec = spec_for("google-bert/bert-base-uncased")
        >>> spec.symmetries["head.0"]
        Symmetry(name='head.0', kind='permutation', size=12, contexts=())
    """
    checkpoint = Checkpoint.open(source)
    return spec_of(checkpoint, inputs) if table is None else bind_to(table, checkpoint)


def infer_spec(model: Source, inputs: Inputs | None = None) -> Spec:
    """The symmetries of any module, read off its own forward pass.

    The forward pass is run once on shapes alone, without weights and in milliseconds; every operation says which axes
    move together, which are composed of others, and which hang on an order. What an operation without a rule touches
    is held: a symmetry may be missed, but none is made up. All that is found are permutations.

    Args:
        model: a module, neither changed nor read; or a folder or Hub id of a transformers model.
        inputs: of its forward pass: a tensor, a tuple of positional or a dictionary of keyword arguments. For a
            transformers model random tokens or images are made up. A branch that these inputs do not take is not seen,
            and what it alone uses is held.

    Returns:
        A `Spec` whose `pins` say for every axis that is held which operation pinned it, and whose `activations` say
        which modules' outputs carry which symmetry.

    Raises:
        MismatchError: no inputs are known.
        SpecError: the forward pass fails, or asks for values that hang on the weights.

    Example: the hidden units of two linear layers.

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> spec = infer_spec(model, torch.zeros(1, 8))
        >>> spec.table.rows
        {'0.weight': 'hidden.0, _', '0.bias': 'hidden.0', '2.weight': "_, hidden.0'", '2.bias': '_'}
        >>> spec.pins["2.bias"]
        ('an output of the model',)
        >>> spec.activations["1"]
        '_, hidden.0'
    """
    return inferred(Checkpoint.open(model), inputs)
