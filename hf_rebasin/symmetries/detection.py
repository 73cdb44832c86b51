"""Detection: the spec of a checkpoint, from the table of its family or inferred from its forward pass."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import registry
from ..checkpoints.canonical import CanonicalView
from ..checkpoints.checkpoint import Checkpoint, Source
from ..errors import MismatchError, SpecError, listed
from ..modules.forward import Inputs, example_inputs
from .binding import bind, bind_to
from .patterns import READER, Leaf, format_pattern, leaves, map_leaves, parse_pattern
from .spec import Norm, Shape, Spec
from .table import Table, table_for

logger = logging.getLogger(__name__)


def detect_spec(checkpoint: Checkpoint, inputs: Inputs | None = None) -> Spec:
    """Return the spec of a checkpoint, from the table of its family or else inferred.

    Raises:
        MismatchError: there is neither a table nor a forward pass with known inputs.
        SpecError: the table does not fit its tensors, or the forward pass cannot be run without weights.
    """
    table = table_for(checkpoint.config)
    return bind_to(table, checkpoint) if table is not None else infer_checkpoint(checkpoint, inputs)


def infer_checkpoint(checkpoint: Checkpoint, inputs: Inputs | None = None) -> Spec:
    """Infer the spec of a checkpoint from its module's forward pass, on example inputs unless some are given.

    Raises:
        MismatchError: the checkpoint has no module, or no inputs are known for it.
        SpecError: the forward pass cannot be run without weights.
    """
    from .infer.inference import infer_table

    if checkpoint.template is None and checkpoint.config is None:
        raise MismatchError(
            f"{checkpoint.name} has tensors only, and no forward pass to infer its symmetries from; in Python, give a "
            "module for one of the two, or its symmetries (spec=); or merge without alignment (--no-align)"
        )
    module, disk = checkpoint.skeleton()
    if inputs is None:
        if checkpoint.config is None:
            raise MismatchError(
                f"the symmetries of {checkpoint.name} are inferred from its forward pass; "
                "give inputs for it (inputs=): a tensor, a tuple of them, or a dictionary of keyword arguments"
            )
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        examples = example_inputs(checkpoint.config, torch.Generator().manual_seed(0))
        inputs = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in examples.items()
        }
    view = CanonicalView(checkpoint)
    canonical = {key: name for name, key in view.keys.items()}
    keys = {key: canonical[stored] for key, stored in disk.items() if stored in canonical}
    if unwritable := [key for key in keys.values() if not re.fullmatch(r"[^*<>{}\s]+", key)]:
        raise SpecError(
            f"{listed(map(repr, unwritable))}: names with * < > {{ }} or spaces cannot be written in a table; "
            "rename them"
        )
    ties = view.ties
    if missing := sorted(set(ties.values()) - set(canonical.values())):
        raise SpecError(f"{checkpoint.name} lacks {listed(missing)}, which another of its tensors is tied to")
    inference = infer_table(module, inputs, keys, ties)
    if inference.unused:
        logger.warning(
            "%s does not use %s on these inputs; these tensors are held, so other uses of them may not stay exact",
            type(module).__name__,
            listed(inference.unused),
        )
    # nothing is known of tensors that a file has beyond those of its class
    extra = {name: "no part of its class" for name in canonical.values() if name not in inference.table.rows}
    shapes = view.shapes
    rows = {name: inference.table.rows.get(name) or ", ".join("_" * len(shape)) for name, shape in shapes.items()}
    rows = {
        name: _name_string_axes(row, inference.pins.get(name, ()), shapes[name], checkpoint)
        for name, row in rows.items()
    }
    named = {leaf.name for row in rows.values() for axis in parse_pattern(row) for leaf in leaves(axis)}
    groups = {name: "held" for name in ("vocab", "label") if name in named}
    rows |= {target: rows[source] for target, source in ties.items() if target not in rows}
    rows |= {target: _mark_reader(rows[target], inference.table, target) for target in ties}
    table = replace(
        inference.table, rows=rows, groups=groups | dict(inference.table.groups), prefix=checkpoint.base_prefix
    )
    spec = bind(table, shapes, ties)
    pins = {name: (reason,) * len(shapes[name]) for name, reason in extra.items()}
    return replace(spec, pins=dict(inference.pins) | pins, activations=inference.activations)


def _mark_reader(row: str, table: Table, target: str) -> str:
    """Mark the rotated axes of a tied tensor's row as readers if it reads a norm."""
    norm_readers = table.norms.values()
    readers = {reader for keys in norm_readers for reader in ([keys] if isinstance(keys, str) else keys)}
    if target.removesuffix(".weight") not in readers:
        return row

    def marked(leaf: Leaf) -> Leaf:
        has_group = leaf.name is not None and leaf.name in table.groups
        rotates = has_group and registry.group(table.group_of(str(leaf.name))[0]).rotates
        return replace(leaf, mark=READER) if rotates else leaf

    return format_pattern(tuple(map_leaves(axis, marked) for axis in parse_pattern(row)))


def _name_string_axes(row: str, pins: Sequence[str | None], shape: Shape, checkpoint: Checkpoint) -> str:
    """Name the held axes of a row that run over tokens or labels, so that they can be matched by string."""
    config = getattr(checkpoint.config, "text_config", checkpoint.config)
    other_sizes = {getattr(config, name, None) for name in ("max_position_embeddings", "type_vocab_size")}
    axes = list(parse_pattern(row))
    for d, (axis, reason) in enumerate(zip(axes, pins, strict=False)):
        is_output = reason is not None and reason.startswith("an output")
        if axis == Leaf(None) and (is_output or (reason is not None and reason.endswith("looked up by number"))):
            if shape[d] == getattr(config, "vocab_size", None) and shape[d] not in other_sizes:
                axes[d] = Leaf("vocab")
            elif is_output and d == 0 and shape[d] == len(checkpoint.settings.get("id2label") or ()):
                axes[d] = Leaf("label") if "Classification" in str(checkpoint.config.architectures) else axes[d]
    return format_pattern(tuple(axes))


def render_spec(spec: Spec, checkpoint: Checkpoint) -> str:
    """Write a spec as the text of a spec file, with stars and braces; the text must bind to the same spec."""
    from .infer.spec_file import render_spec_file

    def fits(table: Table) -> bool:
        try:
            other = bind_to(table, checkpoint)
        except SpecError:
            return False
        blocks = {tensor.bound: tensor.blocks for tensor in other.tensors}
        same = other.symmetries == spec.symmetries and all(blocks[t.bound] == t.blocks for t in spec.tensors)
        return same and sort_readers(other.norms) == sort_readers(spec.norms)

    def sort_readers(norms: Sequence[Norm]) -> set[Norm]:
        return {replace(norm, readers=tuple(sorted(norm.readers))) for norm in norms}

    return render_spec_file(spec.table, checkpoint.config, checkpoint.owner.__name__, fits)


def spec_for(source: Source, table: Table | None = None, inputs: Inputs | None = None) -> Spec:
    """Return the symmetries of a model, from the table of its family or else inferred from its forward pass.

    Args:
        source: a folder, Hub id, module, state dict or checkpoint.
        table: table to use instead of the family's.
        inputs: inputs of the forward pass, used if there is no table; see `infer_spec`.

    Returns:
        The `Spec` of the model.

    Raises:
        MismatchError: there is neither a table nor a module with inputs.
        SpecError: the table does not fit (the message names the key, its shape and the row), or inference fails.

    Example:
        >>> spec = spec_for("google-bert/bert-base-uncased")
        >>> spec.symmetries["head.0"]
        Symmetry(name='head.0', kind='permutation', size=12, contexts=())
    """
    checkpoint = Checkpoint.open(source)
    return detect_spec(checkpoint, inputs) if table is None else bind_to(table, checkpoint)


def infer_spec(model: Source, inputs: Inputs | None = None) -> Spec:
    """Infer the symmetries of any module from its forward pass.

    The forward pass runs once on shapes alone, without weights and in milliseconds. Every operation determines which
    axes move together, which are composed of others, and which depend on their order. Axes of an operation without a
    rule are held, so a symmetry may be missed, but none is wrong.

    Args:
        model: a module, whose weights are neither read nor changed; or a folder or Hub id of a transformers model.
        inputs: inputs of its forward pass: a tensor, a tuple of positional or a dictionary of keyword arguments. By
            default random tokens or images for a transformers model. Branches that these inputs do not take are not
            seen, and tensors used only there are held.

    Returns:
        A `Spec` whose `pins` name the operation that pinned each held axis, and whose `activations` give the
        symmetries of the modules' outputs.

    Raises:
        MismatchError: no inputs are known.
        SpecError: the forward pass fails, or needs values that depend on the weights.

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
    return infer_checkpoint(Checkpoint.open(model), inputs)
