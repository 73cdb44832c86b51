"""Activation matching: the activations of two models on the same inputs tell which of their features match."""

import copy

import pytest
import torch
from batches import make_batches
from conftest import FIRST, TINY, distance, moved_copy, other_seed, run_script, same_tensors
from torch import nn

from hf_rebasin import Alignment, Checkpoint, Status, align, infer_spec, spec_for
from hf_rebasin.errors import CheckpointError, OptionError
from hf_rebasin.modules.forward import attended_outputs
from hf_rebasin.solving.activations import collect_statistics, find_activation_blocks
from hf_rebasin.solving.problem import Forward, Problem
from hf_rebasin.solving.solvers import activation_matching
from hf_rebasin.solving.solvers.activation_matching import LINE_POINTS, line_divergence
from hf_rebasin.symmetries.table import canonical_view


def spec_and_module(model):
    checkpoint = Checkpoint.open(model)
    try:
        spec = spec_for(model)
        return spec, *canonical_view(checkpoint, spec.table).module(), checkpoint.state(spec.table.prefix)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("family", FIRST)
def test_planted_permutations_come_back(family):
    model = TINY[FIRST[family]]
    spec_and_module(model)
    moved, _ = moved_copy(model)
    options = {"solver": "activation_matching", "groups": "permutation"}
    solution = align(model, moved, data=make_batches(model), **options)
    assert solution.status is Status.EQUAL
    assert same_tensors(solution.apply(moved), model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "bert"])
def test_larger_groups(family):
    """A planted element of the full groups, and a model of another seed, which keeps its function."""
    model = TINY[FIRST[family]]
    data = make_batches(model, 8)
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
    data = [{k: x.float() for k, x in batch.items()} for batch in make_batches(model)]
    moved, _ = moved_copy(model)
    solution = align(model, moved, solver="activation_matching", groups="permutation", data=data)
    assert same_tensors(solution.apply(moved), model)


def test_the_weights_are_not_looked_at_for_permutations():
    """A net whose activations tell one thing and whose weights, by noise on inputs that are always 0, another."""
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


@pytest.mark.parametrize("sensitive", [False, True])
def test_statistics_do_not_depend_on_the_batch_size(sensitive):
    model = TINY[FIRST["gpt2"]]
    spec, module, names, state = spec_and_module(model)
    tokens = torch.randint(20, (64, 8), generator=torch.Generator().manual_seed(0)) % model.config.vocab_size
    other = Checkpoint.open(other_seed(model)).state(spec.table.prefix)
    one, many = (
        collect_statistics(
            spec, module, names, [state, other], [{"input_ids": x} for x in tokens.split(size)], None, sensitive
        )
        for size in (1, 64)
    )
    for (block, a), (_, b) in zip(one.blocks, many.blocks, strict=True):
        assert sensitive or a.total_weight == 64 * 8, block.module
        assert a.total_weight == pytest.approx(b.total_weight, rel=1e-6 if sensitive else 0), block.module
        for part in ("sums", "squares", "cross"):
            torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sensitive", [False, True])
def test_positions_that_a_mask_leaves_out_do_not_count(sensitive):
    model = TINY[FIRST["bert"]]
    spec, module, names, state = spec_and_module(model)
    tokens = torch.randint(5, model.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, 4:] = 0
    other = tokens.clone()
    other[:, 4:] = 1
    found = [
        collect_statistics(
            spec, module, names, [state, state], [{"input_ids": x, "attention_mask": mask}], None, sensitive
        )
        for x in (tokens, other)
    ]
    for (block, a), (_, b) in zip(*(f.blocks for f in found), strict=True):
        if block.module.startswith("bert.encoder"):
            torch.testing.assert_close(a.cross, b.cross, msg=block.module)


class OneIsRead(nn.Module):
    """A module that reads only the first of several tokens."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.into(x).relu_()[:, 0])


def test_samples_count_as_much_as_the_outputs_depend_on_them():
    torch.manual_seed(0)
    a, b = OneIsRead().double(), OneIsRead().double()
    x = torch.randn(16, 5, 4).double()
    unread = torch.cat([x[:, :1], torch.randn(16, 4, 4).double()], 1)
    spec = infer_spec(a, x)
    names = {key: key for key in a.state_dict()}

    def cross(batch, sensitive):
        states = [a.state_dict(), b.state_dict()]
        ((_, sums),) = collect_statistics(spec, a, names, states, [batch], None, sensitive).blocks
        return sums.cross / sums.total_weight

    assert not torch.allclose(cross(x, False), cross(unread, False))
    torch.testing.assert_close(cross(x, True), cross(unread, True))
    # f = ½ Σ (y − ȳ)² and y = W h, by hand
    weights = []
    for model in (a, b):
        with torch.no_grad():
            y = model(x)
            read = (y - y.mean(-1, keepdim=True)) @ model.out.weight * (model.into(x)[:, 0] > 0)
        weights.append(read.norm(dim=1))
    w = (weights[0] * weights[1]).sqrt()
    with torch.no_grad():
        u, v = a.into(x)[:, 0], b.into(x)[:, 0]
    torch.testing.assert_close(cross(x, True), (u * w[:, None]).mT @ v / w.sum())


def problem_of(a, b, spec, batches):
    names = {key: key for key in a.state_dict()}
    forward = Forward(lambda: (copy.deepcopy(a), names), batches, lambda module, batch: module(batch).sum())
    return Problem(spec, a.state_dict(), b.state_dict(), torch.Generator().manual_seed(0), forward=forward)


def test_divergence_of_the_average():
    """By hand; nothing where both are the same in other coordinates; and the same whatever the batches."""
    torch.manual_seed(0)
    a, b = OneIsRead().double(), OneIsRead().double()
    x = torch.randn(16, 5, 4).double()
    spec = infer_spec(a, x)
    by_hand = 0.0
    for at in LINE_POINTS:
        between = OneIsRead().double()
        between.load_state_dict({key: p.lerp(b.state_dict()[key], at) for key, p in a.state_dict().items()})
        with torch.no_grad():
            p = (1 - at) * a(x).softmax(-1) + at * b(x).softmax(-1)
            by_hand += (p * (p.log() - between(x).log_softmax(-1))).sum(-1).mean().item() / len(LINE_POINTS)
    for size in (1, 16):
        assert line_divergence(problem_of(a, b, spec, list(x.split(size))), {}) == pytest.approx(by_hand)
    g = Alignment.random(spec, torch.Generator().manual_seed(1))
    problem = problem_of(a, g.apply(a), spec, [x])
    assert line_divergence(problem, g.inverse().elements) == pytest.approx(0, abs=1e-12)
    assert line_divergence(problem, {}) > 1e-4
    assert line_divergence(problem_of(a, b, spec, [x, x + 1]), {}, count=1) == pytest.approx(by_hand)


def test_outputs_where_a_mask_leaves_out_do_not_count():
    model = TINY[FIRST["bert"]]
    tokens = torch.randint(5, model.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, 4:] = 0
    other = tokens.clone()
    other[:, 4:] = 1
    batch = {"attention_mask": mask}
    one, two = (attended_outputs(model, model(input_ids=x, **batch), batch) for x in (tokens, other))
    assert [tuple(x.shape) for x in one] == [(16, 24), (4, 24)]  # of tokens that are there, and the pooler's
    torch.testing.assert_close(one, two)
    outputs = {"loss": torch.ones(()), "logits": torch.ones(2, 3)}
    assert [x.numel() for x in attended_outputs(model, outputs, {})] == [6]


def test_the_mix_that_diverges_least_is_kept(monkeypatch):
    torch.manual_seed(0)
    a, b = OneIsRead().double(), OneIsRead().double()
    x = torch.randn(16, 5, 4).double()
    spec = infer_spec(a, x)

    def match(**options):
        return align(a, b, solver="activation_matching", spec=spec, data=[x], **options)

    solutions = [
        match(weights=w, sensitive=s) for w, s in ((0.0, False), (0.0, True), (0.5, False), (0.5, True), (1.0, False))
    ]
    divergences = [line_divergence(problem_of(a, b, spec, [x]), s.alignment.elements) for s in solutions]
    best = solutions[divergences.index(min(divergences))]
    assert max(divergences) > min(divergences)
    assert all(torch.equal(e.order, match().alignment[name].order) for name, e in best.alignment.elements.items())
    falling = iter(range(5, 0, -1))
    monkeypatch.setattr(activation_matching, "line_divergence", lambda *_: next(falling))
    assert match().objective == solutions[-1].objective


def test_where_activations_carry_symmetries():
    """A fused projection, in blocks; only norms of a rotated stream."""
    model = TINY[FIRST["gpt2"]]
    spec, module, names, _ = spec_and_module(model)
    assert spec.gauged
    assert {block.module.rpartition(".")[2] for block in find_activation_blocks(spec, module, names)} == {
        "ln_1",
        "ln_2",
        "ln_f",
    }
    fused = [
        s for s in find_activation_blocks(spec.restricted(), module, names) if s.module.endswith("h.0.attn.c_attn")
    ]
    assert [s.names for s in fused] == [{"head.0", "qk.0"}, {"head.0", "qk.0"}, {"head.0", "ov.0"}]
    width = model.config.n_embd
    assert [s.channels.flatten()[0].item() for s in fused] == [0, width, 2 * width]


def test_invalid_input_is_refused(bert):
    with pytest.raises(OptionError, match="compares activations on data, but no data is given"):
        align(bert, other_seed(bert), solver="activation_matching")
    with pytest.raises(OptionError, match="the data yielded no batch"):
        align(bert, other_seed(bert), solver="activation_matching", data=[])
    for options in ({"weights": 2.0}, {"batches": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            align(bert, other_seed(bert), solver="activation_matching", data=make_batches(bert, 1), **options)


SCRIPT = """
import sys
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
import torch
from test_activations import FIRST, TINY, make_batches, moved_copy
from hf_rebasin import align
model = TINY[FIRST["gpt2"]]
other, _ = moved_copy(model, groups="full")
torch.manual_seed(0)
with torch.no_grad():
    for p in other.parameters():
        p += 0.05 * p.std(correction=0) * torch.randn_like(p)
for groups in ("permutation", "full"):
    found = align(model, other, solver="activation_matching", data=make_batches(model, 6), groups=groups)
    found.alignment.save(f"{sys.argv[1]}/{groups}-{accelerator.num_processes}-{accelerator.process_index}")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """A model in other coordinates, with noise: permutations are the same, rotations and bases up to rounding."""
    for processes in (1, 2):
        run_script(SCRIPT, tmp_path, processes)
    for groups in ("permutation", "full"):
        one, first, second = (Alignment.load(tmp_path / f"{groups}-{name}") for name in ("1-0", "2-0", "2-1"))
        for name, element in one.elements.items():
            for part, tensor in element.tensors().items():
                torch.testing.assert_close(first[name].tensors()[part], tensor, rtol=1e-6, atol=1e-6)
                assert torch.equal(first[name].tensors()[part], second[name].tensors()[part])
