"""Reader and diagonal marks, tested in the full groups because permutations do not notice a wrong mark.

The models get unit norms (gain 1, bias 0), so that rotations need no gauge. Then a random element of every declared
group must keep the function, and every wrong mark must change it.
"""

from dataclasses import replace

import pytest
import torch
from conftest import ALL_OR_SOME, TINY, sample_cases
from moved_outputs import outputs_moved, unmoved

from hf_rebasin import Alignment, Checkpoint, RebasinError, spec_for
from hf_rebasin.symmetries.binding import bind_to
from hf_rebasin.symmetries.patterns import format_pattern, leaves, map_leaves, parse_pattern
from hf_rebasin.symmetries.table import table_for

# The softmax cancels a key bias, whatever acts on it.
CANCELLED = {
    "encoder.layer.*.attention.self.key.bias": {1},
    "encoder.layer.*.attention.attention.key.bias": {1},
    "transformer.layer.*.attention.k_lin.bias": {1},
    "h.*.attn.c_attn.bias": {3},
    "layers.*.attention.query_key_value.bias": {6},
    "decoder.layers.*.self_attn.k_proj.bias": {1},
    "encoder.layers.*.self_attn.k_proj.bias": {1},
    "text_model.encoder.layers.*.self_attn.k_proj.bias": {1},
    "vision_model.encoder.layers.*.self_attn.k_proj.bias": {1},
}


def change(model, table):
    """Return the relative change of the outputs under random elements of all declared groups, and its bound."""
    checkpoint, _, before, float32_inside = unmoved(model)
    generator = torch.Generator().manual_seed(0)
    spec = bind_to(table, checkpoint)
    elements = Alignment.random(spec, generator).elements
    after = outputs_moved(model, spec, elements)
    return ((before - after).abs().max() / before.abs().max()).item(), 1e-5 if float32_inside else 1e-10


def unit_norms(model):
    model = Checkpoint.open(model).model()
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and not isinstance(module, torch.nn.BatchNorm2d):
                for name, value in (("weight", 1), ("bias", 0)):
                    if getattr(module, name, None) is not None:
                        getattr(module, name).fill_(value)
    return model


def with_mark(axes, at, mark):
    count = iter(range(100))
    return [map_leaves(axis, lambda x: replace(x, mark=mark) if next(count) == at else x) for axis in axes]


def wrong_marks(table, row):
    """Yield (leaf, change, table with one wrong mark) for every leaf on which marks matter for its group."""
    axes = parse_pattern(table.rows[row])
    for at, leaf in enumerate(leaf for axis in axes for leaf in leaves(axis)):
        if leaf.name is None:
            continue
        kind = table.group_of(leaf.name.replace("*", "0"))[0]
        if kind in ("held", "permutation", "centred") or (kind == "orthogonal" and leaf.mark != "~"):
            continue  # a rotation is its own dual, and a centred one leaves gains of 1 as they are
        for mark in {"", "'", "~"} - {leaf.mark}:
            new = with_mark(axes, at, mark)
            yield (
                at,
                f"{leaf} marked {mark or 'nothing'}",
                replace(table, rows={**table.rows, row: format_pattern(tuple(new))}),
            )


@pytest.mark.parametrize("name", list(TINY))
def test_the_declared_groups_keep_the_function(name):
    model = unit_norms(TINY[name])
    relative, bound = change(model, table_for(model.config))
    assert relative <= bound


@ALL_OR_SOME
@pytest.mark.parametrize("name", sorted({name.split("-")[0] for name in TINY}))
def test_every_wrong_mark_is_seen(name, everything):
    todo, kinds = {}, set()
    models = [unit_norms(model) for key, model in TINY.items() if key.startswith(f"{name}-")]
    for model in models:
        table = table_for(model.config)
        spec = spec_for(model)
        kinds |= {symmetry.kind for symmetry in spec.symmetries.values()}
        for row in {tensor.row for tensor in spec.tensors}:
            for leaf, change_made, mutant in wrong_marks(table, row):
                todo.setdefault((row, leaf, change_made), []).append((model, mutant))

    def is_seen(model, mutant):
        try:
            relative, _ = change(model, mutant)
        except RebasinError:
            return True
        return relative > 1e-4

    unseen = [case for case in sample_cases(todo, everything, models) if not any(is_seen(*way) for way in todo[case])]
    assert len(todo) >= 10 or kinds <= {"held", "permutation"}
    assert [case for case in unseen if case[1] not in CANCELLED.get(case[0], ())] == []
