"""The interface of the rebasin package: its example with only the import changed, and the promises of each class."""

import copy
import runpy
import sys
import weakref
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, moved_copy, same_tensors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_rebasin import MergeMany, PermutationCoordinateDescent, Status
from hf_rebasin.compat import rebasin as coordinate_descent
from hf_rebasin.compat import rebasin_interpolation as interpolation
from hf_rebasin.errors import MismatchError, OptionError
from hf_rebasin.interpolation import LerpSimple

# The usage example of the rebasin package, with `rebasin` replaced by `hf_rebasin`.
EXAMPLE = """
import torch
from torch import nn
from hf_rebasin import PermutationCoordinateDescent
from hf_rebasin.compat import rebasin_interpolation as interpolation

model_a, model_b, train_dl, val_dl, loss_fn = ...
device = "cuda" if torch.cuda.is_available() else "cpu"


def eval_fn(model: nn.Module, model_device: str | torch.device | None = None) -> float:
    loss = 0.0
    for inputs, logits in val_dl:
        if model_device is not None:
            inputs = inputs.to(model_device)
            logits = logits.to(model_device)
        outputs = model(inputs)
        loss = loss_fn(outputs, logits)
    return loss / len(val_dl)


input_data = next(iter(train_dl))[0]

# Rebasin
pcd = PermutationCoordinateDescent(model_a, model_b, input_data)
pcd.calculate_permutations()
pcd.apply_permutations()

# Interpolate
lerp = interpolation.LerpSimple(
    models=[model_a, model_b],
    devices=[device, device],
    eval_fn=eval_fn,  # Can be any metric as long as the function takes a model and a device
    eval_mode="min",  # "min" or "max"
    train_dataloader=train_dl,  # Used to recalculate BatchNorm statistics; optional
)
lerp.interpolate(steps=10)

# Access model with lowest validation loss:
lerp.best_model
"""


class Net(nn.Module):
    """Two convolutions with BatchNorm, channels flattened together with positions, and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.hidden, self.head = nn.Linear(12 * 4, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def net(seed, trained=True):
    """Return a Net, by default with BatchNorm statistics of some data."""
    torch.manual_seed(seed)
    model = Net()
    if trained:
        for _ in range(3):
            model(torch.randn(8, 1, 6, 6))
    return model.eval()


def permute_by_hand(model, seed):
    """Return a copy with the same function, its channels and hidden units permuted."""
    generator = torch.Generator().manual_seed(seed)
    p, q, r = (torch.randperm(n, generator=generator) for n in (8, 12, 16))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for rows, layers in ((p, ("conv1", "norm1")), (q, ("conv2", "norm2")), (r, ("hidden",))):
        for key, tensor in state.items():
            if key.split(".")[0] in layers and tensor.dim():
                state[key] = tensor[rows]
    state["conv2.weight"] = state["conv2.weight"][:, p]
    state["hidden.weight"] = state["hidden.weight"].view(16, 12, 4)[:, q].reshape(16, 48)
    state["head.weight"] = state["head.weight"][:, r]
    other = Net().train(model.training)
    other.load_state_dict(state)
    return other


def loader(seed, n=24, batch_size=8):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(torch.randn(n, 1, 6, 6, generator=generator), torch.randint(3, (n,), generator=generator)),
        batch_size,
    )


X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def norm(model, device=None):
    """Return a metric that tells models apart."""
    return sum(parameter.double().square().sum().item() for parameter in model.parameters())


def copy_models(*models):
    """Return copies to compare with later."""
    return [copy.deepcopy(model) for model in models]


@pytest.fixture
def solutions(monkeypatch):
    """Record (options, solution) of every alignment."""
    calls, align = [], coordinate_descent.align

    def spy(fixed, moving, **options):
        calls.append((options, align(fixed, moving, **options)))
        return calls[-1][1]

    monkeypatch.setattr(coordinate_descent, "align", spy)
    return calls


# --- the example -----------------------------------------------------------------------------------------------------


def test_the_example_runs_as_written():
    a, b = net(1).train(), net(2).train()
    (a0, b0), train, val = copy_models(a, b), loader(1), loader(2)
    names = {"given": (a, b, train, val, nn.functional.cross_entropy)}
    exec(EXAMPLE.replace("= ...", "= given"), names)
    lerp = names["lerp"]
    assert same_tensors(a, a0)
    assert not same_tensors(b, b0)
    assert (b.eval()(X) - b0.eval()(X)).abs().max() < 1e-5
    assert len(lerp.metrics_interpolated) == 11
    assert lerp.best_metric == min(lerp.metrics[0].values())
    best = lerp.best_model
    assert names["eval_fn"](best, names["device"]).item() == pytest.approx(lerp.best_metric)
    assert all(best is not model for model in (a, b))


# --- PermutationCoordinateDescent ------------------------------------------------------------------------------------


def test_a_planted_copy_comes_back_exactly_and_in_place():
    a = net(1)
    b = permute_by_hand(a, 3)
    a0, b0 = copy_models(a, b)
    places = {name: (tensor, tensor.data_ptr()) for name, tensor in b.state_dict(keep_vars=True).items()}
    optimizer = torch.optim.SGD(b.parameters(), 0.1)
    pcd = PermutationCoordinateDescent(a, b, X, "cpu", "cpu", False)
    assert pcd.calculate_permutations() is None
    assert same_tensors(b, b0)  # not yet
    pcd.apply_permutations()
    assert pcd.solution.status is Status.EQUAL
    assert same_tensors(b, a)
    assert same_tensors(a, a0)
    for name, tensor in b.state_dict(keep_vars=True).items():
        assert tensor is places[name][0]
        assert tensor.data_ptr() == places[name][1]
    assert optimizer.param_groups[0]["params"][0] is b.conv1.weight
    assert not b.training


def test_only_tensors_of_the_moved_model_change():
    a, b = net(1), net(2).train()
    b.norm2.eval()
    b.conv1.weight.requires_grad_(False)
    b.head.bias.grad = torch.ones(3)
    b.remark = ["untouched"]
    remark = b.remark
    PermutationCoordinateDescent(a, b, X).rebasin(max_iterations=5)
    assert b.training
    assert not b.norm2.training
    assert [p.requires_grad for p in b.parameters()] == [False] + [True] * 11
    assert torch.equal(b.head.bias.grad, torch.ones(3))
    assert b.remark is remark


def test_ties_stay_tied(bert):
    moved, _ = moved_copy(bert)
    tied = moved.get_output_embeddings().weight
    assert tied is moved.get_input_embeddings().weight
    before = moved.state_dict()["bert.encoder.layer.0.intermediate.dense.bias"].clone()
    PermutationCoordinateDescent(bert, moved, bert.dummy_inputs).rebasin()
    assert moved.get_output_embeddings().weight is moved.get_input_embeddings().weight is tied
    assert not torch.equal(moved.state_dict()["bert.encoder.layer.0.intermediate.dense.bias"], before)
    assert same_tensors(moved, bert)


def test_permutations_are_applied_once_for_every_calculation():
    a = net(1)
    b = permute_by_hand(a, 3)
    pcd = PermutationCoordinateDescent(a, b, X)
    with pytest.raises(OptionError, match=r"not calculated yet: call calculate_permutations\(\) before"):
        pcd.apply_permutations()
    pcd.rebasin()
    with pytest.raises(OptionError, match="already applied"):
        pcd.apply_permutations()
    assert same_tensors(a, b)
    pcd.rebasin()  # from where it is now
    assert pcd.solution.status is not Status.CONVERGED
    assert same_tensors(a, b)


def test_options_go_to_align(solutions):
    a, b = net(1), net(2)
    pcd = PermutationCoordinateDescent(a, b, X, verbose=True, seed=7, starts=1)
    pcd.calculate_permutations(max_iterations=1)
    options, solution = solutions[0]
    assert options == {"inputs": X, "seed": 7, "progress": True, "starts": 1, "max_sweeps": 1, "groups": "permutation"}
    assert solution is pcd.solution
    assert solution.status is Status.SWEEP_LIMIT
    with pytest.raises(OptionError, match="start: no such parameter; did you mean 'starts'"):
        PermutationCoordinateDescent(a, b, X, start=1).rebasin()


# --- MergeMany -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_copies_in_many_orders_merge_into_the_one_model(seed):
    a = net(1)
    models = [a, *(permute_by_hand(a, i) for i in range(4))]
    before = copy_models(*models)
    working = net(9)
    places = [parameter.data_ptr() for parameter in working.parameters()]
    merge = MergeMany(models, working, X, seed=seed)
    assert not hasattr(merge, "merged_model")
    assert merge.run() is merge.merged_model is working
    assert same_tensors(working, a)
    assert [parameter.data_ptr() for parameter in working.parameters()] == places
    assert all(same_tensors(model, old) for model, old in zip(models, before, strict=True))


def test_models_with_a_table_need_no_inputs(family):
    working = moved_copy(family, 3)[0]
    MergeMany([family, *(moved_copy(family, seed)[0] for seed in (1, 2))], working, None).run()
    assert same_tensors(working, family)


def test_unrelated_models_come_closer_the_same_way_for_the_same_seed():
    models = [net(seed) for seed in range(5)]
    before = copy_models(*models)
    plain, result, again, first = (
        MergeMany(models, Net(), X, device, seed=seed).run(iterations)
        for iterations, device, seed in ((0, None, 0), (100, None, 0), (100, "cpu", 0), (1, None, 0))
    )
    assert same_tensors(result, again)
    assert not same_tensors(result, plain)
    assert norm(result) > norm(plain)  # the mean of models that point the same way is long
    assert norm(result) >= norm(first)  # and no sweep makes it shorter
    assert all(same_tensors(model, old) for model, old in zip(models, before, strict=True))


def test_models_are_aligned_until_none_moves(solutions):
    a = net(1)
    MergeMany([a, permute_by_hand(a, 1), permute_by_hand(a, 2)], Net(), X, seed=5).run(max_iterations_pcd=9)
    assert [solution.status for _, solution in solutions[-3:]] == [Status.IDENTITY] * 3
    assert len(solutions) <= 3 + 3
    assert all(options["seed"] == 5 and options["max_sweeps"] == 9 for options, _ in solutions)
    counts = []
    for seed in range(2):
        solutions.clear()
        MergeMany([net(i) for i in range(5)], Net(), X, seed=seed, starts=1).run()
        counts.append(len(solutions))
        assert not any(solution.objective > solution.history[0] for _, solution in solutions[-5:])
    assert max(counts) > 10  # later sweeps moved some models, too
    assert max(counts) < 50


def test_everything_is_averaged_in_float64_but_whole_numbers():
    models = [odd(seed) for seed in (1, 2, 3)]
    working = odd(4)
    MergeMany(models, working, torch.zeros(1)).run(max_iterations=0)
    for name, tensor in all_tensors(working).items():
        tensors = [all_tensors(model)[name] for model in models]
        if name in ("count", "flags", "mask"):
            assert torch.equal(tensor, tensors[0])
        else:
            wide = torch.promote_types(tensor.dtype, torch.float64)
            assert torch.equal(tensor, (sum(t.to(wide) for t in tensors) / 3).to(tensor.dtype)), name


def test_what_cannot_be_merged_is_refused():
    a, b = net(1), net(2)
    for models in ([], [a]):
        with pytest.raises(OptionError, match=f"got {len(models)} models"):
            MergeMany(models, Net(), X)
    with pytest.raises(OptionError, match=r"\(not modules: str\)"):
        MergeMany([a, "b.pt"], Net(), X)
    with pytest.raises(OptionError, match="is one of the models"):
        MergeMany([a, b], b, X)
    for models, working in (([a, nn.Linear(1, 1)], Net()), ([a, b], nn.Linear(1, 1))):
        with pytest.raises(MismatchError, match=r"it lacks: conv1\.weight"):
            MergeMany(models, working, X)


# --- LerpSimple ------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Tensors of every kind: unusually named, tied, half, complex, integer, not stored, expanded, infinite."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 4))
        self.layer, self.twin = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twin.weight = self.layer.weight
        self.narrow = nn.Parameter(torch.randn(3).bfloat16())
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("running", torch.randn(4))
        self.register_buffer("unstored", torch.randn(4), persistent=False)
        self.register_buffer("constant", torch.ones(1).expand(5))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1), persistent=False)
        self.register_buffer("count", torch.randint(1000, (5,)))
        self.register_buffer("flags", torch.rand(9) < 0.5)


def odd(seed):
    torch.manual_seed(seed)
    return Odd()


def all_tensors(module):
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())


def interpolate_and_record(models, steps, **options):
    """Return (the evaluated models, in order; the LerpSimple)."""
    seen = []

    def eval_fn(model, device):
        seen.append(model)
        return float(len(seen))

    lerp = LerpSimple(models, eval_fn, **options)
    lerp.interpolate(steps)
    return seen, lerp


@pytest.mark.parametrize("steps", [0, 1, 2, 9, 10])
def test_the_grid_has_both_ends_and_the_middle(steps):
    a, b = net(1), net(2)
    lerp = LerpSimple([a, b], norm)
    assert lerp.metrics_models == [norm(a), norm(b)]
    lerp.interpolate(steps=steps)
    grid = list(lerp.metrics[0])
    assert len(lerp.metrics_interpolated) == len(grid) - 2 == steps + (steps + 1) % 2
    assert {0, 0.5, 1} <= set(grid)
    assert {round(y - x, 12) for x, y in pairwise(grid)} == {round(1 / (len(grid) - 1), 12)}
    assert [lerp.metrics[0][0], lerp.metrics[0][1]] == lerp.metrics_models
    for t, metric in lerp.metrics[0].items():
        middle = copy.deepcopy(a)
        with torch.no_grad():
            for p, q in zip(middle.parameters(), b.parameters(), strict=True):
                p.copy_(torch.lerp(p.double(), q.double(), t))
        assert metric == pytest.approx(norm(middle), rel=1e-6)


def test_everything_is_interpolated_but_whole_numbers():
    a, b = odd(1), odd(2)
    before = copy_models(a, b)
    models, lerp = interpolate_and_record([a, b], 3)
    assert list(lerp.metrics[0]) == [0, 0.25, 0.5, 0.75, 1]
    for model, t in zip([models[0], *models[2:], models[1]], lerp.metrics[0], strict=True):
        assert model.twin.weight is model.layer.weight
        for name, tensor in all_tensors(model).items():
            x, y = all_tensors(a)[name], all_tensors(b)[name]
            if t in (0, 1) or name in ("count", "flags", "mask"):
                assert torch.equal(tensor, x if t <= 0.5 else y), (name, t)
            else:
                wide = torch.promote_types(tensor.dtype, torch.float64)
                expected = ((1 - t) * x.to(wide) + t * y.to(wide)).to(tensor.dtype)
                torch.testing.assert_close(
                    tensor, expected, rtol=1e-6 if tensor.dtype != torch.bfloat16 else 0, atol=0
                )
    for model, old in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, all_tensors(old)[name]) for name, tensor in all_tensors(model).items())


def test_ends_are_the_ends_bit_for_bit():
    a, b = net(1), net(2)
    with torch.no_grad():
        a.head.bias.copy_(torch.tensor([0.0, -0.0, 1e-45]))
    models, lerp = interpolate_and_record([a, b], 1, train_dataloader=loader(1))
    for model, end in ((models[0], a), (models[1], b)):
        for x, y in zip(model.state_dict().values(), end.state_dict().values(), strict=True):
            assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    assert same_tensors(lerp.best_model, a)
    assert lerp.best_model is not a


def test_the_best_is_kept_with_its_number():
    a, b = net(1), net(2)
    middle = {"min": 0.25, "max": 0.75}
    for mode, best in middle.items():
        sign = 1 if mode == "min" else -1
        low, high = norm(a), norm(b)

        def eval_fn(model, device, sign=sign, best=best):
            """Return how far a model is from the best point of the line, measured by one weight."""
            x, y, z = (m.conv1.bias[0].item() for m in (a, b, model))
            return sign * ((z - x) / (y - x) - best) ** 2

        lerp = LerpSimple([a, b], eval_fn, eval_mode=mode)
        assert same_tensors(lerp.best_model, a if best < 0.5 else b)
        lerp.interpolate(steps=3)
        assert lerp.best_model_name == f"interp_models_0_1_perc_{best}.pt"
        assert lerp.best_metric == eval_fn(lerp.best_model, None) == lerp.metrics[0][best]
        assert lerp.best_metric == (min if mode == "min" else max)(lerp.metrics[0].values())
        assert (low, high) == (norm(a), norm(b))


def test_nan_is_never_the_best():
    numbers = iter([float("nan"), 3.0, float("nan"), 2.0, float("nan")])
    lerp = LerpSimple([net(1), net(2)], lambda model, device: next(numbers))
    assert lerp.best_model_name == "model_1.pt"
    lerp.interpolate(steps=3)
    assert lerp.best_metric == 2
    assert lerp.best_model_name == "interp_models_0_1_perc_0.5.pt"


def test_only_two_copies_are_alive_the_current_and_the_best():
    a, b = net(1).train(), net(2).train()
    before, alive, most = copy_models(a, b), weakref.WeakSet(), []

    def wreck(model, device):
        assert not model.training
        alive.add(model)
        most.append(len(alive))
        value = norm(model)
        model.train()(X)
        model.head.weight.data.zero_()
        return value

    LerpSimple([a, b], wreck, train_dataloader=loader(1)).interpolate(steps=9)
    assert len(most) == 11
    assert max(most) == 2
    assert a.training
    assert b.training
    assert all(same_tensors(model, old) for model, old in zip((a, b), before, strict=True))


@pytest.mark.parametrize("form", ["tuple", "second", "mapping", "tensor"])
def test_statistics_are_recomputed_over_all_batches(form):
    a, b = net(1), net(2)
    batches = list(loader(1, n=40))
    shaped = {
        "tuple": batches,
        "second": [(y, x) for x, y in batches],
        "mapping": [{"x": x} for x, _ in batches],
        "tensor": [x for x, _ in batches],
    }[form]
    models, _ = interpolate_and_record(
        [a, b], 1, train_dataloader=shaped, input_indices=[1] if form == "second" else 0
    )
    middle = models[2]
    assert middle.norm1.momentum == 0.1
    assert not middle.training
    with torch.no_grad():
        whole = middle.conv1(torch.cat([x for x, _ in batches]))
    torch.testing.assert_close(middle.norm1.running_mean, whole.mean((0, 2, 3)))
    plain = interpolate_and_record([a, b], 1)[0][2]
    torch.testing.assert_close(plain.norm1.running_mean, (a.norm1.running_mean + b.norm1.running_mean) / 2)


def test_more_than_two_models_are_a_chain():
    a, b, c = models = [net(seed) for seed in (1, 2, 3)]
    lerp = LerpSimple(models, norm)
    lerp.interpolate(steps=3)
    assert [list(line) for line in lerp.metrics] == [[0, 0.25, 0.5, 0.75, 1]] * 2
    assert [(line[0], line[1]) for line in lerp.metrics] == [(norm(a), norm(b)), (norm(b), norm(c))]
    assert lerp.metrics_interpolated == [line[t] for line in lerp.metrics for t in (0.25, 0.5, 0.75)]
    single = LerpSimple([b, c], norm)
    single.interpolate(steps=3)
    assert lerp.metrics[1] == single.metrics[0]


def test_eval_fn_gets_the_device():
    for options, expected in (
        ({}, [None] * 5),
        ({"devices": ["cpu", torch.device("cpu")]}, ["cpu", torch.device("cpu"), "cpu", "cpu", torch.device("cpu")]),
        ({"device_interp": "cpu"}, [None, None, "cpu", "cpu", "cpu"]),
    ):
        devices = []
        lerp = LerpSimple(
            [net(1), net(2)], lambda model, device, devices=devices: devices.append(device) or 0, **options
        )
        lerp.interpolate(steps=3)
        assert devices == expected
    meta = LerpSimple([net(1), net(2)], lambda model, device: model.conv1.weight.is_meta, devices=["meta", "cpu"])
    assert meta.metrics_models == [1, 0]


def test_models_are_saved_where_asked(tmp_path):
    a, b = net(1), net(2)
    lerp = LerpSimple([a, b], norm, eval_mode="max", savedir=tmp_path / "best")
    assert not (tmp_path / "best").exists()
    lerp.interpolate(steps=3)
    lerp.interpolate(steps=1, savedir=str(tmp_path / "all"), save_all=True)
    assert {file.name for file in (tmp_path / "best").iterdir()} == {lerp.best_model_name}
    assert {file.name for file in (tmp_path / "all").iterdir()} == {
        lerp.best_model_name,
        "interp_models_0_1_perc_0.5.pt",
    }
    read = torch.load(tmp_path / "best" / lerp.best_model_name)
    assert same_tensors(read, lerp.best_model.state_dict())


def test_nothing_is_printed_unless_verbose(capfd):
    a, b = net(1), net(2)
    LerpSimple([a, b], norm).interpolate(steps=1)
    PermutationCoordinateDescent(a, b, X).rebasin()
    assert capfd.readouterr() == ("", "")


MISTAKES = {
    "eval_mode": (dict(eval_mode="mim"), "unknown eval_mode 'mim'; did you mean 'min'"),
    "devices": (dict(devices=["cpu"]), "got 1 devices for 2 models"),
    "save_all": (dict(save_all=True), "save_all is set without savedir"),
    "eval_fn": (
        dict(eval_fn=lambda model, device: None),
        "eval_fn returned NoneType for model_0; it has to return one",
    ),
    "vector": (dict(eval_fn=lambda model, device: torch.ones(2)), "eval_fn returned Tensor for model_0"),
    "steps": (dict(steps=-1), "got steps = -1"),
    "batches": (dict(train_dataloader=[]), "no batches to take statistics of"),
    "models": (dict(models=[nn.Linear(1, 1)]), "got 1 models; give two or more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    change, message = MISTAKES[name]
    options = {"models": [net(1), net(2)], "eval_fn": norm, "steps": 1} | change
    steps = options.pop("steps")
    with pytest.raises(OptionError, match=message):
        interpolation.LerpSimple(**options).interpolate(steps=steps)


def test_models_that_differ_are_refused():
    with pytest.raises(MismatchError, match=r"it has other shapes: weight \(1, 2\) instead of \(1, 1\)"):
        LerpSimple([nn.Linear(1, 1), nn.Linear(2, 1)], norm)


def test_the_benchmark_against_the_package_can_be_started(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_rebasin.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "rebasin_package.py"), run_name="__main__")
    assert "--other-python" in capsys.readouterr().out
