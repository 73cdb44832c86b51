"""Laws over every registered solver. A new file in hf_rebasin/solving/solvers/ is picked up by itself."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import permutations

import pytest
import torch
from conftest import FIRST, TINY, distance, moved_copy, other_seed, same_tensors, store_ties_like
from torch import nn

from hf_rebasin import Alignment, Checkpoint, Problem, Status, Table, align, registry, spec_for
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError, UnknownNameError
from hf_rebasin.registry import keywords_of
from hf_rebasin.solving.solvers.weight_matching import Solver as WeightMatching
from hf_rebasin.symmetries.table import table_for

SOLVERS = [  # those that look at activations alone have laws in test_activations.py
    name for name in registry.names("solver") if registry.solver(name).data != "required"
]


def quick(name):
    """A solver; of those that go by steps, a few are enough for what is a law."""
    kind = registry.solver(name)
    return kind(**({"steps": 4, "check_every": 2} if "steps" in keywords_of(kind) else {}))


@pytest.fixture(params=SOLVERS)
def solver(request):
    return quick(request.param)


# weight matching on all families, of the others every one on some, and on every family some (with --slow)
DRAWN = [
    pytest.param((s, f), id=f"{s}-{f}", marks=[pytest.mark.slow] * (s != "weight_matching" and (i + j) % 8 != 0))
    for i, s in enumerate(SOLVERS)
    for j, f in enumerate(FIRST)
    if s == "weight_matching" or (i + j) % 4 == 0
]


@pytest.fixture(params=DRAWN)
def drawn_pair(request):
    """(a solver, a model of a family)"""
    name, family = request.param
    return quick(name), TINY[FIRST[family]]


@cache
def with_another_seed(model):
    """A model, and its tensors when it was made."""
    other = other_seed(model)
    return other, {key: tensor.clone() for key, tensor in Checkpoint.open(other).tensors.items()}


@cache
def align_once(solver, model, groups):
    """A model aligned with one of another seed, for all the laws that look at it."""
    return align(model, with_another_seed(model)[0], solver=solver, groups=groups)


@pytest.mark.parametrize("groups", ["permutation", "full"])
def test_two_unrelated_models_get_closer_and_keep_their_function(drawn_pair, groups):
    solver, family = drawn_pair
    other, before = with_another_seed(family)
    solution = align_once(solver, family, groups)
    assert solution.objective == solution.history[-1] > solution.history[0]
    assert list(solution.history[1:]) == sorted(solution.history[1:])
    assert solution.status in (Status.CONVERGED, Status.SETTLED, Status.STEP_LIMIT)
    assert same_tensors(other, before), "the moving model was changed"
    moved = solution.apply(other)
    back = solution.alignment.inverse().apply(moved)
    if groups == "permutation":
        assert same_tensors(back, other)
    else:
        assert distance(store_ties_like(other, back), back) <= 1e-6


def test_models_of_one_base_come_back_untouched(drawn_pair):
    """Fine-tuning is imitated by noise: nothing moves, the very same tensors come back, and the status says so."""
    solver, family = drawn_pair
    checkpoint = Checkpoint.open(family)
    generator = torch.Generator().manual_seed(0)
    tuned = {
        key: t + 0.1 * t.std(correction=0) * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        if t.is_floating_point()
        else t
        for key, t in checkpoint.tensors.items()
    }
    solution = align(checkpoint, replace(checkpoint, tensors=tuned), solver=solver)
    assert solution.status is Status.IDENTITY
    assert solution.alignment.moved == []
    moved = solution.apply(replace(checkpoint, tensors=tuned))
    assert all(moved.tensors[key] is tensor for key, tensor in tuned.items())


def test_the_same_seed_gives_the_same_alignment(solver, bert):
    other = other_seed(bert)
    first, second = (align(bert, other, solver=solver, seed=3) for _ in range(2))
    assert first.history == second.history
    assert same_tensors(first.apply(other), second.apply(other))


HASHED = """
import sys, torch, zoo
from hf_rebasin import align, infer_spec, registry
from hf_rebasin.alignment.exactness import tiny_models
from hf_rebasin.registry import keywords_of

model = next(model for name, model in tiny_models() if name == "bert-1-BertForMaskedLM")
torch.manual_seed(1000); other = type(model)(model.config).double().eval()
for name in sys.argv[2:]:
    kind = registry.solver(name)
    options = {"steps": 4, "check_every": 2} if "steps" in keywords_of(kind) else {}
    align(model, other, solver=name, **options).alignment.save(f"{sys.argv[1]}/{name}")
spec = infer_spec(zoo.HF["t5"].build(), zoo.HF["t5"].inputs())
open(f"{sys.argv[1]}/spec", "w").write(f"{spec.table} {spec.pins} {spec.activations}")
"""


@pytest.mark.slow
def test_neither_alignments_nor_inferred_names_depend_on_the_hash_seed(tmp_path):
    running = []
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        (tmp_path / seed).mkdir()
        running.append(
            subprocess.Popen([sys.executable, "-c", HASHED, str(tmp_path / seed), *SOLVERS], env=environment)
        )
    assert [process.wait() for process in running] == [0, 0]
    for name in [*SOLVERS, "spec"]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert "encoder_head" in (tmp_path / "1" / "spec").read_text()


def test_half_precision_is_matched_too(solver, resnet):
    model = Checkpoint.open(resnet).model(torch.bfloat16)
    moved, _ = moved_copy(model)
    solution = align(model, moved, solver=solver)
    assert solution.status is Status.EQUAL
    assert same_tensors(solution.apply(moved), model)


def test_a_symmetry_twice_in_one_tensor(solver, generator):
    """A square matrix from a stream to itself: the objective is quadratic in its element, and still never falls."""
    table = Table({"in": "s, _", "square": "s, s'", "out": "_, s'"}, {"s": "permutation"})
    state = {
        "in": torch.randn(30, 2, generator=generator),
        "square": torch.randn(30, 30, generator=generator),
        "out": torch.randn(2, 30, generator=generator),
    }
    g = Alignment.random(spec_for(state, table), generator)
    solution = align(state, g.apply(state), spec=table, solver=solver)
    assert solution.status is Status.EQUAL
    other = {key: torch.randn(t.shape, generator=generator) for key, t in state.items()}
    history = align(state, other, spec=table, solver=solver).history
    assert list(history) == sorted(history)


def test_history_rises_and_ends_at_the_objective(drawn_pair):
    solver, family = drawn_pair
    solution = align_once(solver, family, "permutation")
    moved, fixed = solution.apply(Checkpoint.open(with_another_seed(family)[0])), Checkpoint.open(family)
    spec = spec_for(family)
    a, b = fixed.state(spec.table.prefix), moved.state(spec.table.prefix)
    matched = [t for t in spec.tensors if not t.names.isdisjoint(spec.free) and not t.measures]
    total = sum((a[key].double() * b[key].double()).sum().item() for t in matched for key in t.keys.values())
    assert solution.history[-1] == solution.objective == pytest.approx(total, rel=1e-5)
    assert list(solution.history[1:]) == sorted(solution.history[1:])


def test_weight_matching_is_optimal_where_one_symmetry_is_all_there_is(generator):
    """One hidden layer of 5: against all 120 orders."""
    table = Table({"0.weight": "h, _", "2.weight": "_, h'"}, {"h": "permutation"})
    a, b = (
        {"0.weight": torch.randn(5, 3, generator=generator), "2.weight": torch.randn(2, 5, generator=generator)}
        for _ in range(2)
    )
    best = max(
        ((a["0.weight"] * b["0.weight"][list(p)]).sum() + (a["2.weight"] * b["2.weight"][:, list(p)]).sum()).item()
        for p in permutations(range(5))
    )
    assert align(a, b, spec=table).objective == pytest.approx(best, rel=1e-5)


def test_the_status_tells_of_the_sweep_limit(bert):
    solution = align(bert, other_seed(bert), max_sweeps=0, starts=1)
    assert solution.status is Status.SWEEP_LIMIT
    assert "max_sweeps" in solution.status.value


def test_no_solution_is_below_the_identity(solver, generator):
    """MLPs whose middle layers share a base: going outwards alone would leave them."""
    sizes = [3, 12, 12, 12, 12, 2]
    rows = {f"{i}": f"{'_' if i == 4 else f'h.{i}'}, {f'h.{i - 1}' if i else '_'}" for i in range(5)}
    table = Table(rows, {"h.*": "permutation"})
    for seed in range(10):
        generator.manual_seed(seed)
        a, b = ({f"{i}": torch.randn(sizes[i + 1], sizes[i], generator=generator) for i in range(5)} for _ in range(2))
        b |= {"2": a["2"] + 0.1 * torch.randn(12, 12, generator=generator)}
        single = replace(solver, starts=1) if "starts" in keywords_of(type(solver)) else solver
        solution = align(a, b, spec=table, solver=single)
        assert solution.objective >= solution.history[0]


def test_more_starts_are_never_worse(bert):
    other = other_seed(bert)
    objectives = [align(bert, other, starts=n).objective for n in (1, 3, 6)]
    assert objectives == sorted(objectives)


def test_a_plain_module_with_a_table(generator):
    def net():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    table = Table(
        {"0.weight": "hidden, _", "0.bias": "hidden", "2.weight": "_, hidden'", "2.bias": "_"},
        {"hidden": "permutation"},
    )
    a, x = net(), torch.randn(5, 4)
    b = Alignment.random(spec_for(a, table), generator).apply(a)
    assert isinstance(b, nn.Sequential)
    torch.testing.assert_close(a(x), b(x))
    assert same_tensors(align(a, b, spec=table).apply(b), a)


def test_a_model_with_nothing_to_move():
    state = {"w": torch.ones(2, 2)}
    solution = align(state, {"w": torch.zeros(2, 2)}, spec=Table({"w": "_, _"}, {}))
    assert solution.status is Status.IDENTITY


def test_unknown_solvers_and_options_name_the_nearest(bert):
    with pytest.raises(UnknownNameError, match="no solver 'weight_matchin'; did you mean 'weight_matching'"):
        align(bert, bert, solver="weight_matchin")
    with pytest.raises(OptionError, match="max_sweep: no such parameter; did you mean 'max_sweeps'"):
        align(bert, bert, max_sweep=3)
    solution = WeightMatching(starts=1).solve(
        Problem(spec_for(bert), *[Checkpoint.open(bert).state("bert.")] * 2, torch.Generator())
    )
    assert solution.status is Status.IDENTITY


def test_broken_or_unfitting_models_are_refused(bert, resnet):
    checkpoint = Checkpoint.open(bert)
    key = "bert.encoder.layer.1.output.dense.weight"
    broken = dict(checkpoint.tensors)
    broken[key] = broken[key].clone()
    broken[key][0, 3] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{key} \(24, 20\) has 1 values that are NaN"):
        align(checkpoint, replace(checkpoint, tensors=broken))
    less = {k: t for k, t in checkpoint.tensors.items() if k != key}
    with pytest.raises(MismatchError, match=f"it lacks: {key.removeprefix('bert.')}"):
        align(checkpoint, replace(checkpoint, tensors=less))
    with pytest.raises(MismatchError, match="another architecture"):
        align(bert, resnet)
    with pytest.raises(MismatchError, match="tensors only, and no forward pass"):
        align({"x": torch.ones(2)}, {"x": torch.ones(2)})


def test_an_alignment_refuses_another_model(bert, family, tmp_path):
    alignment = Alignment.random(spec_for(bert), torch.Generator())
    if type(family) is not type(bert) and "Bert" not in type(family).__name__:
        with pytest.raises(MismatchError, match=r"another architecture|symmetry '.*' is .* in .*, .* alignment"):
            alignment.apply(family)
    wider = type(bert)(type(bert.config)(**(bert.config.to_dict() | {"intermediate_size": 28})))
    says = r"symmetry 'ff.0' is permutation of size 28 in BertForMaskedLM, but permutation of size 20 in"
    with pytest.raises(MismatchError, match=says):
        alignment.apply(wider)


def test_an_alignment_of_a_plain_state_dict_names_the_first_difference(generator):
    table = Table({"a": "h, _", "b": "h"}, {"h": "permutation"})
    state = {"a": torch.randn(4, 2), "b": torch.randn(4)}
    g = Alignment.random(spec_for(state, table), generator)
    with pytest.raises(MismatchError, match=r"'b', which carries 'h', is \(5,\), but \(4,\) in the alignment"):
        g.apply({"a": torch.randn(4, 2), "b": torch.randn(5)})
    with pytest.raises(MismatchError, match="has no tensor 'b', which carries 'h'"):
        g.apply({"a": torch.randn(4, 2)})
    with pytest.raises(MismatchError, match="has a tensor 'c' that the alignment does not know"):
        g.apply(state | {"c": torch.randn(1)})


def test_a_table_that_is_given_is_used_though_the_family_has_one(bert):
    own = table_for(bert.config)
    still = replace(own, groups={**own.groups, "residual": "held"})
    assert same_tensors(align(bert, bert, spec=still).apply(bert), bert)
    moved = Alignment.random(spec_for(bert, still), torch.Generator().manual_seed(0)).apply(bert)
    key = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(Checkpoint.open(moved).tensors[key], Checkpoint.open(bert).tensors[key])
    row = "encoder.layer.*.intermediate.dense.bias"
    wrong = Alignment.random(
        spec_for(bert, replace(own, rows={**own.rows, row: "_"})), torch.Generator().manual_seed(0)
    )
    key = "bert.encoder.layer.0.intermediate.dense.bias"
    assert torch.equal(Checkpoint.open(wrong.apply(bert)).tensors[key], Checkpoint.open(bert).tensors[key])


def test_rounding_does_not_keep_a_solver_going(solver):
    """Large blocks that cancel: float32 sees gains that are none."""
    table = Table({"x": "h, _", "y": "_, h'"}, {"h": "permutation"})
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)

        def near(value, *shape, generator=generator):
            return value + 1e-3 * torch.randn(*shape, generator=generator)

        a = {"x": near(100, 10, 20), "y": near(100, 20, 10)}
        b = {"x": near(100, 10, 20), "y": near(-100, 20, 10)}
        solution = align(a, b, spec=table, solver=solver)
        assert solution.objective >= solution.history[0]


def test_alignments_of_other_models_do_not_compose(bert):
    wider = type(bert)(type(bert.config)(**(bert.config.to_dict() | {"intermediate_size": 28})))
    g, h = (Alignment.random(spec_for(model), torch.Generator()) for model in (bert, wider))
    for outer, inner in ((g, h), (h, g)):
        with pytest.raises(MismatchError, match=r"symmetry 'ff.0' is permutation of size"):
            outer.compose(inner)


def test_going_outwards_finds_what_random_orders_miss(generator):
    """Eight hidden layers in other orders: from the identity most are lost, from the input inwards none."""
    sizes = [1, *[10] * 8, 1]
    rows = {f"{i}": f"{f'h.{i}' if i < 8 else '_'}, {f'h.{i - 1}' if i else '_'}" for i in range(9)}
    table = Table(rows, {"h.*": "permutation"})
    for _ in range(10):
        a = {f"{i}": torch.randn(sizes[i + 1], sizes[i], generator=generator) for i in range(9)}
        b = Alignment.random(spec_for(a, table), generator).apply(a)
        solution = align(a, b, spec=table, starts=1)
        assert solution.status is Status.EQUAL
        assert len(solution.history) == 2, "found on the way outwards, before any sweep"
