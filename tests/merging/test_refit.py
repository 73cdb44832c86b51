"""Refit: layers are fitted one by one, on the inputs that they get in the merge, to their outputs in the models."""

import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from batches import make_batches
from conftest import FIRST, TINY, distance, moved_copy, other_seed, run_script
from nets import Net, draw_normal, make_pair, recompute_statistics
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from hf_rebasin import Checkpoint
from hf_rebasin.errors import CheckpointError, OptionError
from hf_rebasin.merging.merge import combine
from hf_rebasin.merging.methods import refit
from hf_rebasin.merging.recalibration import recalibrate, repair
from hf_rebasin.modules import hooks
from hf_rebasin.modules.layerwise import find_steps


def averaged(*models, **parameters):
    return combine([Checkpoint.open(model) for model in models], "refit", parameters)


def refitted(models, data, **parameters):
    """Return the average of models, and its refit."""
    average = averaged(*models, **parameters)
    return average, refit.finish(average, [Checkpoint.open(model) for model in models], data, **parameters)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- laws over all families ------------------------------------------------------------------------------------------

QUICK = [pytest.param(name, marks=pytest.mark.slow if name == "mobilenet_v2" else ()) for name in FIRST]


@pytest.mark.parametrize("family", QUICK)
def test_the_refit_of_a_model_and_itself_is_the_model(family):
    """The second one was moved and moved back. BatchNorm statistics are recomputed beforehand."""
    data = make_batches(TINY[FIRST[family]], 2)
    model = recompute_statistics(TINY[FIRST[family]], data)
    moved, alignment = moved_copy(model)
    back = alignment.inverse().apply(moved)
    before = {key: tensor.clone() for key, tensor in Checkpoint.open(model).tensors.items()}
    average, fitted = refitted([model, back], data)
    assert distance(fitted, model) <= 1e-9
    assert distance(average, model) <= 1e-12
    assert fitted.parts.keys() == Checkpoint.open(model).parts.keys()
    assert fitted.ties == Checkpoint.open(model).ties
    for key, tensor in Checkpoint.open(model).tensors.items():
        assert torch.equal(tensor, before[key])
        assert fitted.parts[key].shape == tensor.shape
        assert fitted.parts[key].dtype == tensor.dtype
        if not tensor.is_floating_point():
            assert torch.equal(fitted.tensors[key], tensor)
    changed = [key for key, tensor in before.items() if not torch.equal(fitted.tensors[key], tensor)]
    assert len(changed) > 0.2 * len(before)  # most layers were fitted, as rounding shows


@pytest.mark.parametrize("family", ["gpt2", "vit", "convnext", "t5", "mixtral"])
def test_the_refit_of_models_in_other_coordinates_is_another_model(family):
    """Negative control of the law above; outputs that both models share stay."""
    model = TINY[FIRST[family]]
    moved, _ = moved_copy(model)
    _, fitted = refitted([model, moved], make_batches(model, 2))
    assert distance(fitted, model) > 0.1


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_outputs_come_closer_to_the_models(family):
    """For two seeds, outputs come closer to the mean of both, on the data and on others of the same kind."""
    models = [TINY[FIRST[family]], other_seed(TINY[FIRST[family]])]
    data = make_batches(models[0], 24)
    average, fitted = refitted(models, data[:20])

    def error(checkpoint):
        module, total = checkpoint.model(), 0.0
        for batch in data[20:]:
            with torch.no_grad():
                outputs, one, other = (model(**batch).logits for model in (module, *models))
            total += relative(outputs, (one + other) / 2)
        return total

    assert error(fitted) < 0.8 * error(average)


# --- the least squares themselves ------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (40, 5)),
    "linear of sequences": (lambda: nn.Linear(5, 3), (4, 10, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (40, 5)),
    "Conv1D": (lambda: Conv1D(3, 5), (4, 10, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, stride=2, dilation=2, padding=1), (5, 4, 19)),
    "conv1d of one": (lambda: nn.Conv1d(4, 3, 3), (4, 30)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 2)), (4, 2, 8, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (3, 6, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (3, 4, 6, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (3, 2, 7, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), (3, 2, 6, 5)),
    "reflected": (lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), (5, 2, 12)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, groups=2, stride=(1, 2, 1), padding=(1, 0, 0)), (3, 2, 4, 5, 4)),
}


def solved(layer, x, target, average, ridge):
    """Solve by lstsq: the output of a layer is linear in its parameters, and this builds the matrix."""
    names = [name for name, _ in layer.named_parameters()]
    shapes = [parameter.shape for _, parameter in layer.named_parameters()]

    def output(*parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,)).flatten()

    zeros = tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    blocks = torch.autograd.functional.jacobian(output, zeros)
    matrix = torch.cat([block.flatten(1) for block in blocks], 1)
    out = 1 if isinstance(layer, Conv1D) else 0
    units = torch.cat(  # the output unit that every number belongs to
        [
            torch.arange(shape[out] if len(shape) > 1 else shape[0])
            .reshape([-1 if axis == (out if len(shape) > 1 else 0) else 1 for axis in range(len(shape))])
            .expand(shape)
            .flatten()
            for shape in shapes
        ]
    )
    sizes = torch.stack([matrix[:, units == unit].square().sum() / (units == unit).sum() for unit in units])
    weights = (ridge * sizes).sqrt()
    flat = torch.cat([parameter.detach().flatten() for _, parameter in average.named_parameters()])
    full, right = torch.cat([matrix, weights.diag()]), torch.cat([target.flatten(), weights * flat])
    solution = torch.linalg.lstsq(full, right[:, None], driver="gelsd").solution[:, 0]
    parts = solution.split([shape.numel() for shape in shapes])
    return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_the_solution_is_that_of_least_squares(name, ridge):
    """An earlier layer, which is tied and so stays, gives the merge other inputs than the models."""
    make, shape = LAYERS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.rand(()) + 0.5), make()

        def forward(self, x):
            return self.layer(x * self.scale)

    one, other = make_pair(Net)
    x, weights = draw_normal(*shape), [1.0, 3.0]
    average, fitted = refitted([one, other], [x[:2], x[2:]] if len(shape) > 2 else [x], weights=weights, ridge=ridge)
    half = average.model()
    with torch.no_grad():
        target = (one(x) + 3 * other(x)) / 4
        want = solved(half.layer, x * half.scale, target, half.layer, ridge)
    for key, value in want.items():
        torch.testing.assert_close(fitted.tensors[f"layer.{key}"], value, rtol=1e-8, atol=1e-8)
    assert relative(average.tensors["layer.weight"], want["weight"]) > 1e-3


def test_pieces_of_what_a_convolution_reads_are_the_whole(monkeypatch):
    models, x = make_pair(lambda: nn.Conv2d(3, 4, 3)), draw_normal(6, 3, 8, 8)
    _, whole = refitted(models, [x])
    monkeypatch.setattr("hf_rebasin.modules.linear_maps.CHUNK_ELEMENTS", 1)
    assert distance(refitted(models, [x])[1], whole) <= 1e-12


def test_every_layer_reads_what_the_layers_before_it_give_by_now():
    """With two layers: fitted on the models' own hidden units, the second one is worse."""
    models = make_pair(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)))
    x = draw_normal(400, 6)
    with torch.no_grad():
        target = sum(model(x) for model in models) / 2
        average, fitted = (checkpoint.model() for checkpoint in refitted(models, [x], ridge=1e-9))
        hidden = sum(model[1](model[0](x)) for model in models) / 2
        inputs = torch.cat([hidden, torch.ones(len(x), 1)], 1)
        second = torch.linalg.lstsq(inputs, target).solution
        others = fitted[1](fitted[0](x)) @ second[:-1] + second[-1]
        errors = [relative(output, target) for output in (fitted(x), others, average(x))]
    assert errors[0] < 0.9 * errors[1] < errors[2]


def test_the_ridge_and_the_weights():
    models, x = make_pair(lambda: nn.Linear(4, 3)), draw_normal(50, 4)
    average, held = refitted(models, [x + 1], ridge=1e9)
    assert distance(average, held) <= 1e-6
    for weights, ends in (([1, 0], models[0]), ([0.0, 2.0], models[1])):
        assert distance(refitted(models, [x], weights=weights)[1], ends) <= 1e-9
    for ridge in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="give a number above 0"):
            averaged(*models, ridge=ridge)
        with pytest.raises(OptionError, match="give a number above 0"):
            refit.finish(average, [Checkpoint.open(m) for m in models], [x], ridge=ridge)
    with pytest.raises(OptionError, match="got 3 weights for 2 models"):
        averaged(*models, weights=[1, 1, 1])
    with pytest.raises(OptionError, match="a sum above 0"):
        averaged(*models, weights=[1, -1])


# --- the last layer --------------------------------------------------------------------------------------------------


class Scoring(nn.Module):
    """A model of 5 classes, whose logits come after a nonlinearity that differs between models."""

    def __init__(self, bias=True, kind=None, answer=lambda y: SimpleNamespace(logits=y), classes=5):
        super().__init__()
        self.scale, self.head = nn.Parameter(2 * torch.rand(())), nn.Linear(4, classes, bias=bias)
        self.config, self.answer = SimpleNamespace(problem_type=kind), answer
        with torch.no_grad():
            self.head.weight.mul_(12)

    def forward(self, x, attention_mask=None):
        return self.answer(self.head(self.read(x)))

    def read(self, x):
        return torch.sin(3 * self.scale * x)


def least_squares_alone(monkeypatch):
    monkeypatch.setattr(refit._LeastSquares, "follow_up", lambda self: None)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_fitted_by_the_divergence_of_their_softmax(bias, monkeypatch):
    """Another optimiser finds the same minimum; least squares alone do not, and fewer rounds come close."""
    models, x, weights = make_pair(lambda: Scoring(bias)), draw_normal(200, 4), [1.0, 3.0]
    few = refitted(models, [x], weights=weights)[1].model()
    monkeypatch.setattr(refit, "KL_STEPS", 600)
    average, fitted = refitted(models, [x[:30], x[30:]], weights=weights)
    least_squares_alone(monkeypatch)
    squares = refitted(models, [x], weights=weights)[1].model()
    with torch.no_grad():
        read = average.model().read(x)
        inputs = torch.cat([read, torch.ones(200, 1)], 1) if bias else read
        target = ((models[0](x).logits + 3 * models[1](x).logits) / 4).softmax(-1)

    def matrix(net):
        return torch.cat([net.head.weight, net.head.bias[:, None]] if bias else [net.head.weight], 1).detach().mT

    def divergence(scores):
        return functional.kl_div(scores.log_softmax(-1), target, reduction="sum")

    def least(start, cost):
        free = start.clone(memory_format=torch.contiguous_format).requires_grad_()
        descent = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure():
            descent.zero_grad()
            cost(free).backward()
            return cost(free)

        descent.step(closure)
        return free.detach()

    first = matrix(squares)
    s = least(torch.ones((), dtype=torch.float64), lambda s: divergence(s * (inputs @ first)))
    r = refit.PRIOR_SAMPLES * inputs.square().mean()
    want = least(s * first, lambda w: divergence(inputs @ w) + r * (w - s * first).square().sum())
    assert relative(matrix(fitted.model()), want) <= 1e-4
    assert relative(matrix(few), want) <= 0.05
    assert relative(first, want) > 0.1
    with torch.no_grad():
        apart = [divergence(net(x).logits).item() for net in (few, squares, average.model())]
        errors = [
            relative(net(x).logits, sum(w * m(x).logits for w, m in zip((0.25, 0.75), models, strict=True)))
            for net in (few, squares)
        ]
    assert apart[0] < 0.9 * apart[1] < apart[2]
    assert errors[1] < errors[0]  # which is what they are made for


@pytest.mark.parametrize(
    "odd",
    [
        {"kind": "regression"},
        {"kind": "multi_label_classification"},
        {"classes": 1},
        {"answer": lambda y: y},
        {"answer": lambda y: SimpleNamespace(logits=y / 2)},
        {"answer": lambda y: SimpleNamespace(start_logits=y)},
    ],
)
def test_what_softmax_is_not_known_to_be_taken_of_keeps_least_squares(odd, monkeypatch):
    models, plain, x = make_pair(lambda: Scoring(**odd)), make_pair(Scoring), draw_normal(50, 4)
    found, other = (refitted(of, [x])[1] for of in (models, plain))
    least_squares_alone(monkeypatch)
    assert distance(refitted(models, [x])[1], found) == 0
    assert distance(refitted(plain, [x])[1], other) > 1e-3


def test_logits_of_a_convolution_keep_least_squares():
    def net(make):
        return Net(lambda net, x: SimpleNamespace(logits=net.head(x)), head=make())

    for make, x, scores in (
        (lambda: nn.Conv1d(4, 5, 1), (3, 4, 9), False),
        (lambda: nn.Linear(4, 5), (3, 9, 4), True),
    ):
        assert [step.gives_logits for step in find_steps(net(make).double().eval(), draw_normal(*x))] == [scores]


def test_pieces_of_logits_are_the_whole_and_masked_ones_do_not_count(monkeypatch):
    models, x = make_pair(Scoring), draw_normal(20, 5, 4)
    mask = torch.ones(20, 5, dtype=torch.long)
    mask[:, 3:] = 0
    want = refitted(models, [{"x": x[:, :3]}])[1]
    for one in (x, torch.where(mask[..., None] > 0, x, 5.0)):
        assert distance(refitted(models, [{"x": one, "attention_mask": mask}])[1], want) <= 1e-9
    assert distance(refitted(models, [{"x": x}])[1], want) > 1e-3
    monkeypatch.setattr(refit, "CHUNK_ELEMENTS", 1)
    assert distance(refitted(models, [{"x": x[:, :3]}])[1], want) <= 1e-9


def test_a_head_that_reads_nothing_stays_as_it_is():
    models = make_pair(lambda: Scoring(bias=False))  # the sine of 0 is 0
    average, fitted = refitted(models, [torch.zeros(50, 4, dtype=torch.float64)])
    assert distance(average, fitted) <= 1e-12


# --- layers as they come ---------------------------------------------------------------------------------------------


def steps_of(net, x):
    with torch.no_grad():
        return [step.names for step in find_steps(net, x)]


@pytest.mark.parametrize("after", [True, False])
def test_tensors_that_are_changed_in_place_were_recorded_before(after):
    """An activation overwrites the output or the input of a layer."""

    def make(inplace):
        relu = nn.ReLU(inplace=inplace)

        def call(net, x):
            if after:
                return net.b(relu(net.a(x)))
            h = net.a(x)
            y = net.b(h)
            return y + net.c(relu(h)) + net.b(h * 0.5)

        return lambda: Net(call, a=nn.Linear(4, 6), b=nn.Linear(6, 5), c=nn.Linear(6, 5))

    x = draw_normal(80, 4)
    results = []
    for inplace in (True, False):
        models = make_pair(make(inplace))
        if not after and not inplace:  # b reads the activated tensor the second time, also without overwriting
            for model in models:
                model.call = lambda net, x: net.b(h := net.a(x)) + net.c(r := functional.relu(h)) + net.b(r * 0.5)
        results.append(refitted(models, [x])[1])
    assert distance(*results) <= 1e-12
    if not after:
        assert steps_of(make_pair(make(True))[0], x) == [("a",), ("b",), ("c",)]


def test_layers_that_read_the_same_are_one_step():
    def call(net, x):
        output = net.q(x) + net.k(input=x) + net.v(x)
        return net.o(output) + net.q(output)

    net = make_pair(lambda: Net(call, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4), o=nn.Linear(4, 4)))[0]
    assert steps_of(net, draw_normal(3, 4)) == [("q",), ("k", "v"), ("o",)]  # q reads something else, too
    rewritten = Net(lambda net, x: net.a(x) + net.b(x.relu_()), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert steps_of(rewritten, torch.randn(3, 4)) == [("a",), ("b",)]  # one tensor, and yet another thing
    norm = Net(
        lambda net, x: net.a(x) + net.n(x) + net.b(x), a=nn.Linear(4, 4), n=nn.BatchNorm1d(4), b=nn.Linear(4, 4)
    )
    assert steps_of(norm.eval(), torch.randn(3, 4)) == [("a",), ("n",), ("b",)]


def test_a_layer_that_is_called_several_times_is_fitted_to_all_of_it():
    """The second call reads the output of the first; the solution is that of both calls together."""
    models, x = make_pair(lambda: Net(lambda net, x: net.a(net.a(x)), a=nn.Linear(4, 4))), draw_normal(60, 4)
    average, fitted = refitted(models, [x], ridge=1e-8)
    with torch.no_grad():
        half = average.model().a
        inputs = torch.cat([x, half(x)])
        target = sum(torch.cat([m.a(x), m.a(m.a(x))]) for m in models) / 2
        want = torch.linalg.lstsq(torch.cat([inputs, torch.ones(120, 1)], 1), target).solution
    assert relative(fitted.tensors["a.weight"], want[:-1].mT) <= 1e-5


def odd_layers():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    def call(net, x):
        h = net.plain(x) + net.doubled(x) + net.pair(x)[0] + net.normed(x) + net.head(x)
        experts = [net.first, net.second]
        rows = [x[(x[:, 0] > net.bias) == chosen] for chosen in (True, False)]
        return (
            h.sum()
            + sum(expert(row).sum() for expert, row in zip(experts, rows, strict=True))
            + net.table.weight.sum()
        )

    def linear(kind=nn.Linear):
        return kind(4, 4)

    net = Net(
        call,
        plain=linear(),
        doubled=linear(Doubled),
        pair=linear(Pair),
        normed=nn.utils.parametrizations.weight_norm(linear()),
        head=linear(),
        table=nn.Embedding(4, 4),
        first=linear(),
        second=linear(),
        never=linear(),
        bias=nn.Parameter(torch.randn(())),
    )
    net.table.weight = net.head.weight
    return net


def test_other_layers_stay_and_are_logged(caplog):
    """Layers that do more than a linear map, tied and computed weights, experts, layers that no pass calls."""
    models = make_pair(odd_layers)
    with caplog.at_level(logging.INFO, logger="hf_rebasin"):
        average, fitted = refitted(models, [draw_normal(50, 4), draw_normal(50, 4, seed=1)])
    changed = {key for key in average.parts if not torch.equal(average.tensors[key], fitted.tensors[key])}
    assert changed == {"plain.weight", "plain.bias"}
    assert "5 of 8 linear maps stay as they are" in caplog.text
    assert all(name in caplog.text for name in ("doubled", "pair", "normed", "head", "never"))
    assert "first, second read nothing, or not the same in all models" in caplog.text


def test_an_expert_that_the_first_batch_does_not_reach_is_left_alone():
    def call(net, x):
        return net.a(x) + (net.b(x) if x.sum() > 0 else 0)

    models = make_pair(lambda: Net(call, a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    x = draw_normal(50, 4).abs()
    average, fitted = refitted(models, [-x, x])
    assert torch.equal(average.tensors["b.weight"], fitted.tensors["b.weight"])
    assert not torch.equal(average.tensors["a.weight"], fitted.tensors["a.weight"])


def test_nan_is_refused_by_the_name_of_the_layer():
    def call(net, x):
        return net.b(net.a(x).log())

    models, x = make_pair(lambda: Net(call, a=nn.Linear(4, 4), b=nn.Linear(4, 4))), draw_normal(50, 4)
    for do in (
        lambda: refitted(models, [x]),
        lambda: repair(averaged(*models), list(map(Checkpoint.open, models)), [x]),
    ):
        with pytest.raises(CheckpointError, match=r"^b: on these data NaN or Inf"):
            do()


def test_data_that_cannot_be_gone_through_again_are_refused():
    models = make_pair(lambda: nn.Linear(4, 4))
    for do in (refit.finish, repair):
        average = averaged(*models)
        with pytest.raises(OptionError, match="can be read once"):
            do(average, [Checkpoint.open(m) for m in models], iter([draw_normal(5, 4)]))
        with pytest.raises(OptionError, match="the data yielded no batch"):
            do(average, [Checkpoint.open(m) for m in models], [])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_half_precision_is_computed_in_float32_and_rounded_once():
    model = TINY[FIRST["vit"]]
    halves = [Checkpoint.open(m).model(torch.bfloat16) for m in (model, other_seed(model))]
    data = [{key: x.bfloat16() for key, x in batch.items()} for batch in make_batches(model, 3)]
    average, fitted = refitted(halves, data)
    assert fitted.dtypes == {torch.bfloat16}
    wide = [Checkpoint.open(half).model(torch.float32) for half in halves]
    begin = Checkpoint.open(average.model(torch.float32))
    exact = refit.finish(
        begin, [Checkpoint.open(m) for m in wide], [{k: x.float() for k, x in b.items()} for b in data]
    )
    for key, tensor in fitted.tensors.items():
        assert torch.equal(tensor, exact.tensors[key].bfloat16()), key


def test_names_on_disk_are_those_of_the_merge(tmp_path):
    """Old files leave out the prefix of the base model and spell norms differently; experts are separate on disk."""
    for family, rename in (
        ("gpt2", lambda key: key.removeprefix("transformer.")),
        (
            "bert",
            lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        ),
        ("mixtral", str),
    ):
        model = Checkpoint.open(TINY[FIRST[family]]).model(torch.float32)  # experts of files compute in no wider one
        models, data = [model, other_seed(model)], make_batches(model, 2)
        _, want = refitted(models, data)
        sources = []
        for i, one in enumerate(models):
            checkpoint = Checkpoint.open(one)
            renamed = {rename(key): tensor for key, tensor in checkpoint.tensors.items()}
            old = Checkpoint(renamed, checkpoint.config, given_ties={})
            sources.append(old.save(tmp_path / f"{family}-{i}"))
        average, fitted = refitted(sources, data)
        assert average.parts.keys() == fitted.parts.keys() == {rename(key) for key in want.parts}
        for key, tensor in want.tensors.items():
            torch.testing.assert_close(fitted.tensors[rename(key)], tensor, rtol=1e-3, atol=1e-4)
        moved = max(relative(average.tensors[key], tensor) for key, tensor in fitted.tensors.items() if tensor.any())
        assert moved > 0.01


def test_an_untied_head_is_fitted_and_stays_apart():
    model = TINY[FIRST["gpt2"]]
    one, other = Checkpoint.open(model), Checkpoint.open(other_seed(model))
    ((head, table),) = one.ties.items()
    models = [one, other.apart({head: table})]
    models[1] = models[1].with_parts({head: Checkpoint.open(other_seed(model, 7)).parts[table]})
    average, fitted = refitted(models, make_batches(model, 3))
    assert head in average.parts
    assert not torch.equal(fitted.tensors[head], average.tensors[head])
    assert torch.equal(fitted.tensors[table], average.tensors[table])


def test_positions_that_a_mask_leaves_out_do_not_count():
    model = TINY[FIRST["bert"]]
    tokens = torch.randint(5, model.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, 4:] = 0
    other = tokens.clone()
    other[:, 4:] = 1
    models = [model, other_seed(model)]
    for do in (refit.finish, repair):
        one, two, three = (
            do(averaged(*models), [Checkpoint.open(m) for m in models], [{"input_ids": x, "attention_mask": m}])
            for x, m in ((tokens, mask), (other, mask), (other, torch.ones_like(mask)))
        )
        inside = {key for key in one.parts if key.startswith("encoder.")}
        assert distance(*({key: found.tensors[key] for key in inside} for found in (one, two))) <= 1e-9
        assert distance(*({key: found.tensors[key] for key in inside} for found in (one, three))) > 1e-3


@pytest.mark.parametrize("do", [refit.finish, repair])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_does_not_hang_on_the_batch_size(family, do):
    model = TINY[FIRST[family]]
    models = [model, other_seed(model)]
    tokens = torch.randint(20, (12, 8), generator=torch.Generator().manual_seed(0)) % model.config.vocab_size
    one, many = (
        do(averaged(*models), [Checkpoint.open(m) for m in models], [{"input_ids": x} for x in tokens.split(size)])
        for size in (1, 12)
    )
    assert distance(one, many) <= 1e-10
    fewer = do(averaged(*models), [Checkpoint.open(m) for m in models], [{"input_ids": tokens[:6]}])
    assert distance(fewer, many) > 1e-4


# --- memory, and several processes -----------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """A context that counts the bytes of the tensors that were computed in it and are alive."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out

    @property
    def nbytes(self):
        # by id, as in-place operations return existing tensors
        alive = {id(reference()): reference for reference in self.made if reference() is not None}
        self.made = list(alive.values())
        return sum(reference().nbytes for reference in self.made)


class Drawn:
    """Batches that are made on request, and then record the peak of the bytes alive."""

    def __init__(self, count, live, shape=(8, 6)):
        self.count, self.live, self.shape, self.peak = count, live, shape, 0

    def __iter__(self):
        for seed in range(self.count):
            self.peak = max(self.peak, self.live.nbytes)
            yield draw_normal(*self.shape, seed=seed)


def test_it_makes_no_model_surer_than_least_squares(monkeypatch):
    class Noted(refit._KLFit):
        def __init__(self, head, start):
            scales.append((start.norm() / head.matrix.norm()).item())
            super().__init__(head, start)

    scales = []
    monkeypatch.setattr(refit, "_KLFit", Noted)
    for seed in range(4):
        models = make_pair(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        for model in models:
            model[-1].weight.data *= 1 + seed

        class Said(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return SimpleNamespace(logits=self.inner(x))

        models = [Said(model) for model in models]
        refit.finish(averaged(*models), [Checkpoint.open(m) for m in models], [draw_normal(12, 6, seed=seed)])
    assert max(scales) == 1, "where more would fit these few samples better"
    assert len(scales) == 4


def test_what_is_heard_for_further_passes_is_heard_once_where_it_is_little(monkeypatch):
    class Net(nn.Sequential):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    models = make_pair(lambda: Net(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    checkpoints, average = [Checkpoint.open(model) for model in models], averaged(*models)

    class Counted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return (draw_normal(8, 6, seed=seed) for seed in range(4))

    results = {}
    for room in (
        0,
        hooks.CACHE_BYTES,
        3 * 8 * (8 + 3) * 3 * 4,
    ):  # none, enough, and too little for the last of the batches
        monkeypatch.setattr(hooks, "CACHE_BYTES", room)
        data = Counted()
        results[room] = refit.finish(average, checkpoints, data).tensors, data.passes
    (without, often), (whole, once), (some, as_often) = results.values()
    assert often == as_often > once + 20
    assert all(without[key].equal(whole[key]) and without[key].equal(some[key]) for key in without)


def test_memory_does_not_grow_with_the_number_of_batches(monkeypatch):
    monkeypatch.setattr(hooks, "CACHE_BYTES", 0)

    class Net(nn.Sequential):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    models = make_pair(lambda: Net(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    checkpoints = [Checkpoint.open(model) for model in models]
    average = averaged(*models)

    def hoarding(data):
        return [models[0][0](x) for x in data]

    def peak(do, count):
        with Live() as live:
            data = Drawn(count, live)
            do(data)
        return data.peak

    for do in (
        lambda data: refit.finish(average, checkpoints, data),
        lambda data: repair(average, checkpoints, data),
        lambda data: recalibrate(models[0], data, exact=True),
        lambda data: recalibrate(models[0], data),
    ):
        few, many = (peak(do, count) for count in (4, 40))
        assert few == many
    few, many = (peak(hoarding, count) for count in (4, 40))
    assert many > 5 * few


SCRIPT = """
import sys
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
import torch
from test_refit import FIRST, TINY, Checkpoint, averaged, make_batches, other_seed, recalibrate, refit, repair
for family, count in (("gpt2", 5), ("gpt2", 1), ("llama", 5), ("resnet", 5)):
    model = TINY[FIRST[family]]
    models, data = [model, other_seed(model)], make_batches(model, count)
    found = {
        "refit": refit.finish(averaged(*models), [Checkpoint.open(m) for m in models], data),
        "repair": repair(averaged(*models), [Checkpoint.open(m) for m in models], data),
    }
    for exact in (False, True):
        found[f"recalibrate-{exact}"] = Checkpoint.open(model).model()
        recalibrate(found[f"recalibrate-{exact}"], data if exact else iter(data), exact=exact)
    for name, one in found.items():
        place = f"{family}-{count}-{name}-{accelerator.num_processes}-{accelerator.process_index}"
        torch.save(dict(Checkpoint.open(one).tensors), f"{sys.argv[1]}/{place}")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Even if one of them has no batch."""
    for processes in (1, 2):
        run_script(SCRIPT, tmp_path, processes)
    for family, count in (("gpt2", 5), ("gpt2", 1), ("llama", 5), ("resnet", 5)):
        for name in ("refit", "repair", "recalibrate-False", "recalibrate-True"):
            one, first, second = (
                torch.load(tmp_path / f"{family}-{count}-{name}-{who}") for who in ("1-0", "2-0", "2-1")
            )
            assert distance(one, first) <= 1e-8, (family, name)
            assert all(torch.equal(first[key], second[key]) for key in first), (family, name)
