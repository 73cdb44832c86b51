"""Activation matching: what two models say to the same inputs tells which of their features are alike."""

import pytest
import torch
from conftest import FIRST, TINY, distance, moved_copy, other_seed, run_script, same_tensors
from torch import nn

from hf_rebasin import Alignment, Checkpoint, Status, align, infer_spec, spec_for
from hf_rebasin.activations import collect, slots_of
from hf_rebasin.errors import CheckpointError, OptionError
from hf_rebasin.inputs import example_inputs


def batches_of(model, count=4):
    """Inputs for a TINY model, each from another seed."""

    def batch(seed):
        inputs = example_inputs(model.config, torch.Generator().manual_seed(seed))
        return {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}

    return [batch(seed) for seed in range(count)]


def computing(model):
    checkpoint = Checkpoint.open(model)
    try:
        spec = spec_for(model)
        return spec, *checkpoint.computing(spec.table.prefix), checkpoint.state(spec.table.prefix)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("family", FIRST)
def test_planted_permutations_come_back(family):
    model = TINY[FIRST[family]]
    computing(model)
    moved, _ = moved_copy(model)
    knobs = {"solver": "activation_matching", "groups": "permutation"}
    solution = align(model, moved, data=batches_of(model), **knobs)
    assert solution.status is Status.EQUAL
    assert same_tensors(solution.apply(moved), model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "bert"])
def test_larger_groups(family):
    """A planted element of the full groups, and a model of another seed, which keeps its function."""
    model = TINY[FIRST[family]]
    data = batches_of(model, 8)
    moved, _ = moved_copy(model, groups="full")
    found = align(model, moved, solver="activation_matching", data=data)
    if spec_for(model).gauged:
        assert found.status is Status.EQUAL
    other = other_seed(model)
    solution = align(model, other, solver="activation_matching", data=data)
    assert solution.status is Status.CONVERGED
    assert solution.objective > solution.history[0]
    back = Checkpoint.open(solution.alignment.inverse().apply(solution.apply(other))).tensors
    stored = Checkpoint.open(other).tensors
    assert distance(stored, {key: back[key] for key in stored}) <= 1e-6


def test_half_precision_is_matched_too():
    model = Checkpoint.open(TINY[FIRST["vit"]]).model(torch.bfloat16)
    data = [{k: x.float() for k, x in batch.items()} for batch in batches_of(model)]
    moved, _ = moved_copy(model)
    solution = align(model, moved, solver="activation_matching", groups="permutation", data=data)
    assert same_tensors(solution.apply(moved), model)


def test_the_weights_are_not_looked_at_for_permutations():
    """A net whose activations say one thing and whose weights, by noise in what is never active, say another."""
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    spec = infer_spec(a, torch.zeros(1, 8, dtype=torch.float64))
    order = torch.randperm(12)
    b = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        b[0].weight[:, :4], b[0].bias[:] = a[0].weight[order, :4], a[0].bias[order]
        b[0].weight[:, 4:] *= 50  # of inputs that are always 0
    data = [torch.cat([torch.randn(64, 4), torch.zeros(64, 4)], 1).double()]
    found = align(a, b, solver="activation_matching", spec=spec, data=data)
    (name,) = found.alignment.elements
    assert torch.equal(found.alignment[name].order, order.argsort())
    by_weights = align(a, b, spec=spec)
    assert not torch.equal(by_weights.alignment[name].order, order.argsort())


def test_statistics_do_not_hang_on_the_batch_size():
    model = TINY[FIRST["gpt2"]]
    spec, module, names, state = computing(model)
    tokens = torch.randint(20, (64, 8), generator=torch.Generator().manual_seed(0)) % model.config.vocab_size
    other = Checkpoint.open(other_seed(model)).state(spec.table.prefix)
    one, many = (
        collect(spec, module, names, [state, other], [{"input_ids": x} for x in tokens.split(size)])
        for size in (1, 64)
    )
    for (slot, a), (_, b) in zip(one.slots, many.slots, strict=True):
        assert a.count == b.count == 64 * 8, slot.module
        for part in ("sums", "squares", "cross"):
            torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=1e-10, atol=1e-10)


def test_positions_that_a_mask_leaves_out_do_not_count():
    model = TINY[FIRST["bert"]]
    spec, module, names, state = computing(model)
    tokens = torch.randint(5, model.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, 4:] = 0
    other = tokens.clone()
    other[:, 4:] = 1
    found = [
        collect(spec, module, names, [state, state], [{"input_ids": x, "attention_mask": mask}])
        for x in (tokens, other)
    ]
    for (slot, a), (_, b) in zip(*(f.slots for f in found), strict=True):
        if slot.module.startswith("bert.encoder"):
            torch.testing.assert_close(a.cross, b.cross, msg=slot.module)


def test_where_activations_carry_what():
    """A fused projection, in blocks; only norms of a rotated stream."""
    model = TINY[FIRST["gpt2"]]
    spec, module, names, _ = computing(model)
    assert spec.gauged
    assert {slot.module.rpartition(".")[2] for slot in slots_of(spec, module, names)} == {"ln_1", "ln_2", "ln_f"}
    fused = [s for s in slots_of(spec.restricted(), module, names) if s.module.endswith("h.0.attn.c_attn")]
    assert [s.names for s in fused] == [{"head.0", "qk.0"}, {"head.0", "qk.0"}, {"head.0", "ov.0"}]
    width = model.config.n_embd
    assert [s.places.flatten()[0].item() for s in fused] == [0, width, 2 * width]


def test_what_cannot_be_is_said(bert):
    with pytest.raises(OptionError, match="looks at what models say to data, and there are none"):
        align(bert, other_seed(bert), solver="activation_matching")
    with pytest.raises(OptionError, match="the data gave no batch"):
        align(bert, other_seed(bert), solver="activation_matching", data=[])
    for knobs in ({"weights": 2.0}, {"batches": 0}):
        with pytest.raises(OptionError, match=next(iter(knobs))):
            align(bert, other_seed(bert), solver="activation_matching", data=batches_of(bert, 1), **knobs)


SCRIPT = """
import sys
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
sys.path.insert(0, sys.argv[2])
import torch
from test_activations import FIRST, TINY, batches_of, moved_copy
from hf_rebasin import align
model = TINY[FIRST["gpt2"]]
other, _ = moved_copy(model, groups="full")
torch.manual_seed(0)
with torch.no_grad():
    for p in other.parameters():
        p += 0.05 * p.std(correction=0) * torch.randn_like(p)
for groups in ("permutation", "full"):
    found = align(model, other, solver="activation_matching", data=batches_of(model, 6), groups=groups)
    found.alignment.save(f"{sys.argv[1]}/{groups}-{accelerator.num_processes}-{accelerator.process_index}")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Of a model in other coordinates, with noise: permutations are the same, rotations and bases up to rounding."""
    for processes in (1, 2):
        run_script(SCRIPT, tmp_path, processes)
    for groups in ("permutation", "full"):
        one, first, second = (Alignment.load(tmp_path / f"{groups}-{name}") for name in ("1-0", "2-0", "2-1"))
        for name, element in one.elements.items():
            for part, tensor in element.tensors().items():
                torch.testing.assert_close(first[name].tensors()[part], tensor, rtol=1e-6, atol=1e-6)
                assert torch.equal(first[name].tensors()[part], second[name].tensors()[part])
