"""Reader and diagonal marks: permutations cannot notice a wrong one, so the declared groups are drawn here in full.

The models get unit norms (gain 1, bias 0), so that rotations need no gauge. Then a random element of every declared
group must keep the function, and every wrong mark must change it.
"""

from dataclasses import replace

import pytest
import torch
from conftest import ALL_OR_SOME, TINY, drawn
from test_laws import outputs_moved, unmoved

from hf_rebasin import Alignment, Checkpoint, RebasinError, spec_for
from hf_rebasin.symmetries.binding import bind_to
from hf_rebasin.symmetries.patterns import leaves, map_leaves, parse, show
from hf_rebasin.symmetries.table import table_for

# A key bias is cancelled by the softmax, whatever acts on it.
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
    """Relative change of the outputs under a random element of every declared group."""
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
    """(leaf, what was done, the table with one mark changed) for every leaf whose group feels its mark."""
    axes = parse(table.rows[row])
    for at, leaf in enumerate(leaf for axis in axes for leaf in leaves(axis)):
        if leaf.name is None:
            continue
        kind = table.group_of(leaf.name.replace("*", "0"))[0]
        if kind in ("held", "permutation", "centred") or (kind == "orthogonal" and leaf.mark != "~"):
            continue  # the dual of a rotation is itself, and a centred one keeps a gain of ones as it is
        for mark in {"", "'", "~"} - {leaf.mark}:
            new = with_mark(axes, at, mark)
            yield at, f"{leaf} marked {mark or 'nothing'}", replace(table, rows={**table.rows, row: show(tuple(new))})


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
            for leaf, what, mutant in wrong_marks(table, row):
                todo.setdefault((row, leaf, what), []).append((model, mutant))

    def is_seen(model, mutant):
        try:
            relative, _ = change(model, mutant)
        except RebasinError:
            return True
        return relative > 1e-4

    unseen = [case for case in drawn(todo, everything, models) if not any(is_seen(*way) for way in todo[case])]
    assert len(todo) >= 10 or kinds <= {"held", "permutation"}
    assert [case for case in unseen if case[1] not in CANCELLED.get(case[0], ())] == []
