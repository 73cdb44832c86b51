"""Methods that use data: fisher, regmean, regmeanpp and adamerging find solutions that are known beforehand."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from batches import make_batches
from conftest import FIRST, TINY, distance, moved_copy, other_seed, run_script, same_tensors
from nets import Net, draw_normal, make_pair, recompute_statistics
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_rebasin import Checkpoint, merge
from hf_rebasin.errors import CheckpointError, OptionError
from hf_rebasin.merging.methods import adamerging, fisher
from hf_rebasin.merging.methods._grams import solve_grams
from hf_rebasin.modules.distributed import OwnBatches

AVERAGING = ("fisher", "regmean", "regmeanpp")
ALL = (*AVERAGING, "adamerging")


def fit(models, method, data, **parameters):
    """Merge models with data; the second one is as good a base as any."""
    if method == "adamerging":
        parameters = {"steps": 6, "rate": 0.02, "base": models[-1], **parameters}
    return merge(models, method, data=data, **parameters)


# --- laws over families ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", AVERAGING)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_a_model_and_itself_give_the_model(family, method):
    """Bit for bit; the control is another model."""
    model = TINY[FIRST[family]]
    other, data = other_seed(model), make_batches(model, 2)
    assert same_tensors(fit([model, model], method, data), model)
    assert same_tensors(fit([model, other], method, data, weights=[1, 0]), model)
    merged = fit([model, other], method, data)
    assert distance(merged, model) > 0.1
    assert distance(merged, merge([model, other])) > 0.1
    like = Checkpoint.open(model)
    assert merged.ties == like.ties
    assert {k: (p.shape, p.dtype) for k, p in merged.parts.items()} == {
        k: (p.shape, p.dtype) for k, p in like.parts.items()
    }


@pytest.mark.parametrize("method", ALL)
def test_moving_the_models_moves_the_merge(method):
    model = TINY[FIRST["gpt2"]]
    models, data = [model, other_seed(model)], make_batches(model, 2)
    merged = fit(models, method, data)
    moved, alignment = moved_copy(merged)
    again = fit([alignment.apply(one) for one in models], method, data)
    assert distance(again, moved) < 1e-8
    assert distance(again, merged) > 0.1


@pytest.mark.parametrize("method", ALL)
def test_models_are_not_changed_and_results_can_be_repeated(method):
    model = TINY[FIRST["llama"]]
    models, data = [model, other_seed(model)], make_batches(model, 2)
    before = [{key: x.clone() for key, x in Checkpoint.open(one).tensors.items()} for one in models]
    assert same_tensors(fit(models, method, data), fit(models, method, data))
    for one, tensors in zip(models, before, strict=True):
        assert all(torch.equal(x, tensors[key]) for key, x in Checkpoint.open(one).tensors.items())


@pytest.mark.parametrize("method", ALL)
def test_batchnorm_statistics_are_those_of_the_data(method):
    models = [TINY[FIRST["resnet"]], other_seed(TINY[FIRST["resnet"]])]
    data = make_batches(models[0], 2)
    merged = fit(models, method, data)
    assert distance(merged, recompute_statistics(merged.model(), data)) < 1e-8
    assert distance(merge(models), recompute_statistics(merge(models).model(), data)) > 0.1


@pytest.mark.parametrize("method", ALL)
def test_half_precision_is_computed_in_float32_and_rounded_once(method):
    model = TINY[FIRST["vit"]]
    halves = [Checkpoint.open(one).model(torch.bfloat16) for one in (model, other_seed(model))]
    wide = [Checkpoint.open(half).model(torch.float32) for half in halves]
    data = [{key: x.float() for key, x in batch.items()} for batch in make_batches(model, 2)]
    merged, exact = fit(halves, method, data), fit(wide, method, data)
    assert merged.dtypes == {torch.bfloat16}
    off = [not torch.equal(x, exact.tensors[key].bfloat16()) for key, x in merged.tensors.items()]
    # where the start is rounded to half precision, other weights follow from it, and not only their rounding
    assert not any(off) if method in ("fisher", "regmean") else distance(merged, exact) < 0.02


@pytest.mark.parametrize("method", AVERAGING)
def test_neither_batches_nor_masked_positions_nor_labels_make_a_difference(method):
    model = TINY[FIRST["gpt2"]]
    models = [model, other_seed(model)]
    tokens = torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(0))
    whole = fit(models, method, [{"input_ids": tokens}])
    assert distance(fit(models, method, [{"input_ids": x} for x in tokens.split(1)]), whole) < 1e-10
    padded, mask = torch.nn.functional.pad(tokens, (0, 3), value=7), torch.ones(6, 8, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {"input_ids": padded, "attention_mask": mask}
    assert distance(fit(models, method, [batch]), whole) < 1e-10
    assert distance(fit(models, method, [batch | {"labels": padded}]), whole) < 1e-10
    assert distance(fit(models, method, [{"input_ids": padded}]), whole) > 1e-3


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    ("data", "message"), [(iter([torch.ones(2, 3)]), "can be read once"), ([], "the data yielded no batch")]
)
def test_data_that_will_not_do_are_refused(method, data, message):
    with pytest.raises(OptionError, match=message):
        fit(make_pair(lambda: nn.Linear(3, 4)), method, data)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        *((method, {"weights": [1, -1]}, "a sum above 0") for method in AVERAGING),
        *((method, {"weights": [3, -1]}, "give weights of 0 or more") for method in AVERAGING),
        *((method, {"alpha": 1.5}, "give a number from 0 to 1") for method in AVERAGING[1:]),
        *((method, {"ridge": 0.0}, "give a number above 0") for method in AVERAGING[1:]),
        ("fisher", {"epsilon": 0.0}, "give a number above 0"),
        ("fisher", {"samples": 0}, "give 1 or more"),
        ("adamerging", {"steps": 0}, "give 1 or more"),
        ("adamerging", {"rate": math.inf}, "give a number above 0"),
        ("adamerging", {"lambda": math.nan}, "lambda = nan"),
        ("adamerging", {"lambda": 1.2, "clamp": True}, "with clamp, give a number from 0 to 1"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(method, parameters, message):
    with pytest.raises(OptionError, match=message):
        fit(make_pair(lambda: nn.Linear(3, 4)), method, [torch.ones(2, 3)], **parameters)


def test_nan_is_refused():
    models = make_pair(lambda: nn.Linear(3, 4))
    data = [torch.full((2, 3), torch.nan, dtype=torch.float64)]
    for method, error, message in (
        ("fisher", CheckpointError, "gradients on these data are not finite"),
        ("regmean", CheckpointError, "NaN or Inf"),
        ("regmeanpp", CheckpointError, "NaN or Inf"),
        ("adamerging", OptionError, r"entropy of the predictions on these data is not finite \(nan before"),
    ):
        with pytest.raises(error, match=message):
            fit(models, method, data)


# --- data of each model ----------------------------------------------------------------------------------------------


def test_own_batches_come_in_turns():
    data = OwnBatches([[1, 2, 3], [10], []])
    assert [*data] == [*data] == [1, 10, 2, 3]
    assert [*data.with_owners()] == [(0, 1), (1, 10), (0, 2), (0, 3)]
    with pytest.raises(OptionError, match="data of model 2 is a list_iterator, which can be read once"):
        OwnBatches([[1], iter([2])])
    for method in AVERAGING:
        with pytest.raises(OptionError, match="data have batches of 3 models, and 2 are merged"):
            fit(make_pair(lambda: nn.Linear(3, 4)), method, data)


def test_models_that_read_their_own_tasks_keep_both():
    """Each model knows the first or the second half of the inputs, and has noise for the other half.

    On its own inputs RegMean and RegMean++ are exact; on all inputs, where noise counts as much, they are the average.
    """
    models, want = make_pair(lambda: nn.Linear(6, 4)), draw_normal(4, 6, seed=7)
    tasks = []
    for i, model in enumerate(models):
        own = slice(3 * i, 3 * i + 3)
        model.bias.data.zero_()
        model.weight.data[:, own] = want[:, own]
        tasks.append([torch.zeros(40, 6).double() for _ in range(i + 1)])
        for j, x in enumerate(tasks[-1]):
            x[:, own] = draw_normal(40, 3, seed=j)
    for method in ("regmean", "regmeanpp"):
        own, joint = (
            merge(models, method, data=data, alpha=1.0, ridge=1e-10).tensors["weight"]
            for data in (OwnBatches(tasks), [*OwnBatches(tasks)])
        )
        torch.testing.assert_close(own, want, atol=1e-7, rtol=0)
        torch.testing.assert_close(joint, merge(models).tensors["weight"], atol=1e-7, rtol=0)
        assert (joint - want).abs().max() > 0.1
    own, joint = (
        merge(models, "fisher", data=data).tensors["weight"] for data in (OwnBatches(tasks), tasks[0] + tasks[1])
    )
    assert (own - want).norm() < 0.01 * (joint - want).norm()


# --- regmean ---------------------------------------------------------------------------------------------------------


def planted_pair():
    """Two linear nets of the same outputs, each with hidden units of its own and noise on the units of the other."""
    nets, x = make_pair(lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False))), []
    outputs = draw_normal(3, 4, seed=5)
    for i, net in enumerate(nets):
        first, second = (layer.weight.data for layer in net)
        own, others = slice(4 * i, 4 * i + 4), slice(4 - 4 * i, 8 - 4 * i)
        first[others] = 0
        second[:, own] = outputs @ torch.linalg.inv(first[own])
    x = draw_normal(200, 4)
    return nets, x, x @ outputs.mT


def test_regmean_is_exact_where_models_use_other_units():
    """The average is far off, and so is RegMean++, for which both models read the same in the second layer."""
    nets, x, target = planted_pair()
    errors = {}
    for method in ("linear", "regmean", "regmeanpp"):
        parameters = {} if method == "linear" else {"data": [x], "alpha": 1.0, "ridge": 1e-10}
        with torch.no_grad():
            output = merge(nets, method, **parameters).model()(x)
        errors[method] = ((output - target).norm() / target.norm()).item()
    assert errors["regmean"] < 1e-7
    assert errors["linear"] > 0.3
    assert errors["regmeanpp"] == pytest.approx(errors["linear"])


def test_grams_give_the_least_squares():
    """W = argmin Σ wᵢ ‖Xᵢ (W − Wᵢ)‖² / nᵢ, solved otherwise; α and the ridge by their definition."""
    inputs, matrices = [draw_normal(2, n, 5, seed=n) for n in (30, 40)], list(draw_normal(2, 2, 5, 3))
    grams, shares = [x.mT @ x / x.shape[1] for x in inputs], [0.25, 0.75]
    found = solve_grams(matrices, grams, shares, alpha=1, ridge=0)
    rows = [math.sqrt(w / x.shape[1]) * x for x, w in zip(inputs, shares, strict=True)]
    right = torch.cat([row @ matrix for row, matrix in zip(rows, matrices, strict=True)], 1)
    torch.testing.assert_close(found, torch.linalg.lstsq(torch.cat(rows, 1), right).solution)
    changed = []
    for gram in grams:
        metric = 0.6 * gram
        for group in range(2):
            for i in range(5):
                metric[group, i, i] = gram[group, i, i] + 0.1 * gram[group].trace() / 5
        changed.append(metric)
    total = sum(w * metric for w, metric in zip(shares, changed, strict=True))
    both = sum(w * metric @ matrix for w, metric, matrix in zip(shares, changed, matrices, strict=True))
    want = torch.linalg.inv(total) @ both
    torch.testing.assert_close(solve_grams(matrices, grams, shares, alpha=0.6, ridge=0.1), want)
    assert (want - found).abs().max() > 1e-3
    with pytest.raises(OptionError, match="singular with ridge = 0"):
        solve_grams(matrices, [draw_normal(2, 5, 1) @ draw_normal(2, 1, 5)] * 2, shares, alpha=1, ridge=0)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(5, 3), (40, 5)),
        (lambda: Conv1D(3, 5), (4, 10, 5)),
        (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, stride=2, padding=1), (5, 4, 9, 8)),
    ],
    ids=["linear", "Conv1D", "grouped convolution"],
)
def test_outputs_on_the_models_own_inputs_are_as_close_as_can_be(make, shape):
    """An earlier factor gives every model other inputs; no other weight has a lower error, the bias is the average."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.rand(shape[-1]) + 0.5), make()

        def forward(self, x):
            return self.layer(x * self.scale)

    models, x = make_pair(Scaled), draw_normal(*shape)
    merged = merge(models, "regmean", data=[x[:2], x[2:]], alpha=1.0, ridge=1e-10, weights=[1, 3])
    module, average = merged.model(), merge(models, weights=[1, 3]).model()
    layer = module.layer
    assert torch.equal(layer.bias, average.layer.bias)

    def error(layer):
        with_bias = [(m.layer(x * m.scale), m.layer.bias) for m in models]
        total = 0
        for (output, bias), model, weight in zip(with_bias, models, (1, 3), strict=True):
            axis = 1 if output.dim() == 4 else -1
            apart = (layer(x * model.scale) - output).movedim(axis, -1) - (layer.bias - bias)
            total = total + weight * apart.square().sum()
        return total

    (slope,) = torch.autograd.grad(error(layer), layer.weight)
    (elsewhere,) = torch.autograd.grad(error(average.layer), average.layer.weight)
    assert slope.norm() < 1e-6 * elsewhere.norm()


def test_layers_that_read_nothing_stay_averages():
    models = make_pair(lambda: nn.Linear(4, 3))
    for method in ("regmean", "regmeanpp"):
        assert same_tensors(merge(models, method, data=[torch.zeros(5, 4).double()]), merge(models))


# --- regmean++ -------------------------------------------------------------------------------------------------------


class Number(nn.Module):
    """Two blocks of one number each."""

    def __init__(self, *numbers):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1, 1, bias=False).double() for _ in numbers)
        for block, number in zip(self.blocks, numbers, strict=True):
            block.weight.data.fill_(number)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("method", "want"), [("regmean", 5.6), ("regmeanpp", 4.0)])
def test_the_example_of_the_docstring(method, want):
    merged = merge([Number(1.0, 2.0), Number(3.0, 6.0)], method, data=[draw_normal(9, 1)])
    assert merged.tensors["blocks.0.weight"].item() == pytest.approx(2)
    assert merged.tensors["blocks.1.weight"].item() == pytest.approx(want, rel=1e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(30, 4), nn.ModuleList(Block() for _ in range(3))
        self.last, self.head = nn.LayerNorm(4), nn.Linear(4, 5)
        nn.init.normal_(self.last.weight)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def test_blocks_read_the_features_of_the_merge():
    """The same, block by block: features of the merged blocks go into every model's block."""
    models = make_pair(Deep)
    tokens = torch.randint(30, (50, 3), generator=torch.Generator().manual_seed(0))
    found = merge(models, "regmeanpp", data=[{"tokens": tokens[:20]}, {"tokens": tokens[20:]}], weights=[1, 2])
    shares, settings = [1 / 3, 2 / 3], {"alpha": 0.9, "ridge": 1e-6}
    net = merge(models, weights=[1, 2]).model()
    with torch.no_grad():
        features = net.embed(tokens)
        for i, block in enumerate(net.blocks):
            reads = [[], []]
            for model in models:
                own = model.blocks[i]
                normed = own.norm(features)
                for read, x in zip(reads, (normed, torch.tanh(own.up(normed))), strict=True):
                    read.append(x.flatten(0, 1))
            for name, read in zip(("up", "down"), reads, strict=True):
                grams = [(x.mT @ x / len(x))[None] for x in read]
                matrices = [getattr(model.blocks[i], name).weight.mT[None] for model in models]
                getattr(block, name).weight.copy_(solve_grams(matrices, grams, shares, **settings)[0].mT)
            features = block(features)
    assert distance(found, net) < 1e-9
    assert distance(merge(models, "regmean", data=[tokens], weights=[1, 2]), net) > 1e-3


def test_a_head_that_is_tied_in_a_model_only_does_not_bring_its_embedding_along():
    model = TINY[FIRST["gpt2"]]
    one, other = Checkpoint.open(model), Checkpoint.open(other_seed(model))
    ((head, table),) = one.ties.items()
    other = other.apart({head: table}).with_parts({head: Checkpoint.open(other_seed(model, 7)).parts[table]})
    data = make_batches(model, 2)
    for method in AVERAGING:
        merged, want = (merge([first, other], method, data=data) for first in (one, one.apart({head: table})))
        assert head in merged.parts
        # to Fisher information a tied tensor is one parameter, used twice
        assert (distance(merged, want) < 1e-10) == (method != "fisher")


# --- fisher ----------------------------------------------------------------------------------------------------------


class TwoScores(nn.Module):
    """Classes with the logits a x₀ and b x₁, two parameters."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))
        self.unused = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def forward(self, x):
        return torch.stack([self.a * x[:, 0], self.b * x[:, 1]], -1)


def test_fisher_of_two_parameters_is_as_by_hand():
    """F = p (1 − p) x²: 1/4 in the first model, in the second p = 3/4 and so 3/16 for a, of one input in two.

    Gradients of inputs of opposite signs cancel in a batch, and the square of their sum is another number.
    """
    models = [TwoScores(0.0, 0.0), TwoScores(math.log(3), 1.0)]
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]], dtype=torch.float64)
    merged = merge(models, "fisher", data=[x], normalize=False, epsilon=1e-12)
    p = 1 / (1 + math.exp(-2))
    of_b = p * (1 - p) / (1 / 4 + p * (1 - p))
    assert merged.tensors["a"].item() == pytest.approx(math.log(3) * 3 / 7, rel=1e-9)
    assert merged.tensors["b"].item() == pytest.approx(of_b, rel=1e-9)
    torch.testing.assert_close(merged.tensors["unused"], models[1].unused.detach() / 2)
    assert merge(models).tensors["a"].item() == pytest.approx(math.log(3) / 2)
    norms = [math.hypot(1 / 8, 1 / 2), math.hypot(3 / 32, 2 * p * (1 - p))]
    shares = [1 / 8 / norms[0], 3 / 32 / norms[1]]
    normalised = merge(models, "fisher", data=[x], epsilon=1e-12)
    assert normalised.tensors["a"].item() == pytest.approx(math.log(3) * shares[1] / sum(shares), rel=1e-9)
    assert merge(models, "fisher", data=[x], epsilon=1e9).tensors["a"].item() == pytest.approx(math.log(3) / 2)


def test_the_floor_is_relative():
    """Inputs in other units scale F, and the weights by as much, and nothing else; so they do with another floor."""
    x, found = draw_normal(20, 2), {}
    for unit in (1.0, 1e3):
        models = [TwoScores(a / unit, b / unit) for a, b in ((0.5, 1.0), (1.5, -2.0))]
        for normalize in (True, False):
            for epsilon in (0.3, 1e-9):
                merged = merge(models, "fisher", data=[x * unit], normalize=normalize, epsilon=epsilon)
                found[unit, normalize, epsilon] = torch.stack([merged.tensors[key] for key in "ab"]) * unit
    for normalize in (True, False):
        for epsilon in (0.3, 1e-9):
            torch.testing.assert_close(found[1e3, normalize, epsilon], found[1.0, normalize, epsilon])
        assert (found[1.0, normalize, 0.3] - found[1.0, normalize, 1e-9]).abs().max() > 0.01


def test_where_weights_matter_to_no_model_they_are_averaged():
    sums = fisher.FisherSums(torch.zeros(2))
    for value, of_model in ((0.0, [1.0, 1e-9]), (4.0, [3.0, 3e-9])):
        sums.add(torch.full((2,), value), torch.tensor(of_model), 0.5)
    tensors = [torch.zeros(2), torch.full((2,), 4.0)]
    found, without = (sums.average(tensors, [0.5, 0.5], floor=floor) for floor in (1e-3, 0.0))
    torch.testing.assert_close(found, torch.tensor([3.0, 2.0]).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(without, torch.tensor([3.0, 3.0]).double())


@pytest.mark.parametrize("likelihood", ["class", "labels", "numbers"])
def test_vectors_have_the_covariance_of_scores(likelihood, monkeypatch):
    """Exactly for few outputs, and on average where labels are drawn."""
    outputs, generator = draw_normal(2, 3), torch.Generator().manual_seed(0)

    def covariance(count):
        vectors = torch.stack(fisher.score_vectors(outputs, likelihood, count, generator)).flatten(1)
        return vectors.mT @ vectors, len(vectors)

    exact, count = covariance(1)
    p, s = outputs.softmax(-1), outputs.sigmoid()
    want = {
        "class": torch.block_diag(*(row.diag() - row[:, None] * row for row in p)),
        "labels": (s * (1 - s)).flatten().diag(),
        "numbers": torch.eye(6).double(),
    }[likelihood]
    torch.testing.assert_close(exact, want)
    assert count == 6
    monkeypatch.setattr(fisher, "FEW_OUTPUTS", 0)
    drawn, count = covariance(4000)
    torch.testing.assert_close(drawn, want, atol=0.06, rtol=0)
    assert count == 4000
    assert (covariance(1)[0] - want).abs().max() > 0.06


def test_drawn_labels_depend_on_the_seed_and_come_closer_with_more(monkeypatch):
    models, x = make_pair(lambda: nn.Linear(4, 6)), [draw_normal(8, 4)]
    exact = merge(models, "fisher", data=x)
    monkeypatch.setattr(fisher, "FEW_OUTPUTS", 0)
    few, other, many = (merge(models, "fisher", data=x, samples=n, seed=s) for n, s in ((1, 0), (1, 1), (300, 0)))
    assert distance(few, other) > 1e-3
    assert distance(many, exact) < 0.3 * distance(few, exact)


def test_batches_are_taken_apart():
    batch = {"x": torch.arange(6).reshape(3, 2), "position": torch.ones(1, 2), "scale": torch.tensor(2.0), "k": "v"}
    examples = list(fisher.split_examples(batch))
    assert [one["x"].tolist() for one in examples] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(one["position"].shape == (1, 2) and one["scale"] == 2 and one["k"] == "v" for one in examples)
    assert [len(one) for one in fisher.split_examples((torch.ones(2, 3), torch.ones(2)))] == [2, 2]
    with pytest.raises(OptionError, match=r"have \[2, 3\] rows"):
        list(fisher.split_examples((torch.ones(2, 3), torch.ones(3))))


# --- adamerging ------------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """A model whose predictions are surest where its weight is 0.7."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        return torch.stack([2 - (self.weight - 0.7).square(), torch.zeros_like(self.weight)]).expand(len(x), 2)


def test_adamerging_finds_the_coefficient_that_was_planted():
    parameters = {"base": Planted(), "data": [torch.ones(2, 1)] * 3, "rate": 0.02}
    assert merge([Planted(1.0)], "adamerging", **parameters, steps=300).tensors["weight"].item() == pytest.approx(
        0.7, abs=1e-3
    )
    few = merge([Planted(1.0)], "adamerging", **parameters, steps=3).tensors["weight"].item()
    assert few == pytest.approx(0.36, abs=0.005)  # Adam moves by its rate
    away = merge([Planted(1.0)], "adamerging", **parameters, steps=300, **{"lambda": 0.65, "clamp": True})
    assert away.tensors["weight"].item() == pytest.approx(0.7, abs=1e-3)


def linear_of(matrix):
    layer = nn.Linear(3, 3, bias=False).double()
    layer.weight.data.copy_(matrix)
    return layer


def test_the_difference_that_helps_is_kept_and_the_other_is_dropped():
    """The example of the docstring; a sum with equal coefficients is less sure."""
    eye = torch.eye(3, dtype=torch.float64)
    base, good, bad = (linear_of(matrix) for matrix in (eye, 3 * eye, eye + 2 * eye.roll(1, 0)))
    data = [eye.repeat(2, 1)] * 2
    settings = {"base": base, "data": data, "steps": 150, "rate": 0.02}
    merged = merge([good, bad], "adamerging", clamp=True, **settings)
    torch.testing.assert_close(merged.tensors["weight"], 3 * eye, atol=1e-6, rtol=0)
    start = merge([good, bad], "task_arithmetic", base=base, **{"lambda": 0.3})

    def entropy(checkpoint):
        return adamerging._entropies(data[0] @ checkpoint.tensors["weight"].mT).mean()

    free = merge([good, bad], "adamerging", **settings)
    assert entropy(free) < entropy(merged) < 0.7 * entropy(start)
    assert distance(free, merged) > 0.1


def test_differences_are_taken_from_the_base_of_each_model():
    """Two models of two bases, with one difference: as if both were of the first."""
    eye = torch.eye(3, dtype=torch.float64)
    base, elsewhere = Checkpoint.open(linear_of(eye)), Checkpoint.open(linear_of(eye + 5))
    models = [Checkpoint.open(linear_of(3 * eye)), Checkpoint.open(linear_of(3 * eye + 5))]
    merged = Checkpoint.open(linear_of(2.2 * eye))
    settings = {"steps": 20, "rate": 0.01, "base": base}
    found = adamerging.finish(merged, models, [eye] * 2, bases=[base, elsewhere], **settings)
    want = adamerging.finish(merged, [models[0]] * 2, [eye] * 2, bases=[base, base], **settings)
    assert distance(found, want) < 1e-12
    assert distance(adamerging.finish(merged, models, [eye] * 2, bases=[base, base], **settings), want) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_entropy_is_lower_afterwards(family):
    model = TINY[FIRST[family]]
    base = Checkpoint.open(model)
    others = [Checkpoint.open(other_seed(model, seed)) for seed in (1, 2)]
    data = make_batches(model, 6)
    merged, start = (
        merge(others, "adamerging", base=base, data=data, steps=steps, rate=0.01, seed=seed)
        for steps, seed in ((25, 0), (1, 0))
    )

    def entropy(checkpoint):
        with torch.no_grad():
            scores = torch.cat([checkpoint.model()(**batch).logits.flatten(0, -2) for batch in data])
        return torch.special.entr(scores.softmax(-1)).sum(-1).mean().item()

    assert entropy(merged) < entropy(start) - 0.03
    again = merge(others, "adamerging", base=base, data=data, steps=25, rate=0.01, seed=1)
    assert not same_tensors(again, merged)  # the batches came in another order


def test_a_merge_that_does_not_become_surer_stays(caplog):
    model = TINY[FIRST["llama"]]
    data = make_batches(model, 2)
    with caplog.at_level(logging.WARNING):
        merged = merge([model], "adamerging", base=model, data=data, steps=3)
    assert same_tensors(merged, model)
    assert "did not lower the entropy of the predictions" in caplog.text


def test_predictions_that_fall_into_one_class_are_warned_of(caplog):
    base, one = linear_of(torch.eye(3)), linear_of(torch.eye(3) + torch.tensor([[9.0], [0.0], [0.0]]))
    x = torch.eye(3, dtype=torch.float64)
    start = {"lambda": 0.05, "rate": 0.02}
    with caplog.at_level(logging.WARNING):
        merge([one], "adamerging", base=base, data=[x], steps=2, **start)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        merge([one], "adamerging", base=base, data=[x], steps=60, **start)
    assert "have become much less varied" in caplog.text


def test_models_without_classes_are_refused():
    regression = make_pair(lambda: Net(lambda net, x: SimpleNamespace(logits=net.a(x)), a=nn.Linear(4, 3)))
    for net in regression:
        net.config = SimpleNamespace(problem_type="regression")
    number, x = make_pair(lambda: nn.Linear(4, 1)), draw_normal(3, 4)
    for models in (regression, number):
        with pytest.raises(OptionError, match="does not predict classes of which one is right"):
            fit(models, "adamerging", [x])


# --- several processes -----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
import torch
from test_data_methods import ALL, FIRST, TINY, OwnBatches, fit, make_batches, other_seed
model = TINY[FIRST["gpt2"]]
for count in (5, 1, 3):
    for method in ALL[: 4 if count == 5 else 3]:
        data = make_batches(model, count)
        data = OwnBatches([data[:1], data[1:]]) if count == 3 else data
        merged = fit([model, other_seed(model)], method, data)
        place = f"{method}-{count}-{accelerator.num_processes}-{accelerator.process_index}"
        torch.save(dict(merged.tensors), f"{sys.argv[1]}/{place}")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Even if one of them has no batch; steps of adamerging are one batch of each, and so other ones."""
    for processes in (1, 2):
        run_script(SCRIPT, tmp_path, processes)
    for count in (5, 1, 3):
        for method in ALL[: 4 if count == 5 else 3]:
            one, first, second = (torch.load(tmp_path / f"{method}-{count}-{who}") for who in ("1-0", "2-0", "2-1"))
            assert all(torch.equal(first[key], second[key]) for key in first), method
            if method in AVERAGING:
                assert distance(one, first) <= 1e-8, method
