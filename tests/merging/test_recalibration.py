"""Statistics of a merge: those of BatchNorm from data, and REPAIR to the average of the merged models."""

import pytest
import torch
from batches import make_batches
from conftest import FIRST, TINY, distance, other_seed
from nets import Net, draw_normal, make_pair, recompute_statistics
from torch import nn

from hf_rebasin import Checkpoint
from hf_rebasin.errors import CheckpointError, OptionError
from hf_rebasin.merging.merge import combine
from hf_rebasin.merging.recalibration import recalibrate, repair

# --- BatchNorm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_of_zeros_and_tens_the_mean_is_five(exact):
    batches = [torch.zeros(4, 1), torch.full((4, 1), 10.0)]
    norm = nn.BatchNorm1d(1).eval()
    assert recalibrate(norm, batches, exact=exact) == 1
    assert norm.running_mean.item() == 5.0
    assert norm.running_var.item() == pytest.approx(25 * 8 / 7)
    recalibrate(norm, batches[:1], exact=exact)
    assert norm.running_mean.item() == 0.0  # the mean of the first batch alone
    trained = nn.BatchNorm1d(1)  # with the momentum of 0.1
    for batch in batches:
        trained(batch)
    assert trained.running_mean.item() == pytest.approx(1.0)


def training_statistics(model, x):
    """The buffers of a copy after one big batch in training mode."""
    copy = Checkpoint.open(model).model().train()
    for norm in copy.modules():
        if getattr(norm, "running_mean", None) is not None:
            norm.momentum = 1.0
    with torch.no_grad():
        copy(x)
    return {name: buffer for name, buffer in copy.named_buffers() if "running" in name}


def test_exact_statistics_are_those_of_one_big_batch(resnet):
    """In a ResNet, however the data are split; a single pass gets only the first layer right, except for one batch."""
    model = Checkpoint.open(resnet).model()
    x = torch.cat([batch["pixel_values"] for batch in make_batches(model, 4)])
    want = training_statistics(model, x)
    first = next(iter(want)).removesuffix("running_mean")

    def alike(module):
        buffers = dict(module.named_buffers())
        return [name for name in want if torch.allclose(buffers[name], want[name], rtol=1e-9, atol=1e-12)]

    assert alike(model) == []
    for size in (1, 3, 8):
        one, other = Checkpoint.open(model).model(), Checkpoint.open(model).model()
        recalibrate(one, x.split(size), exact=True)
        assert alike(one) == list(want)
        recalibrate(other, iter(x.split(size)))
        if size < 8:
            assert alike(other) == [f"{first}running_mean", f"{first}running_var"]
        else:
            assert alike(other) == list(want)


def test_what_a_layer_reads_in_one_pass_is_normalised_as_in_training():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).double().eval()
    batches = [draw_normal(10, 3, seed=seed) * (1 + seed) for seed in range(4)]
    recalibrate(model, batches)
    read = torch.cat([nn.functional.relu(nn.functional.batch_norm(x, None, None, training=True)) for x in batches])
    torch.testing.assert_close(model[2].running_mean, read.mean(0))
    torch.testing.assert_close(model[2].running_var, read.var(0))


KINDS = {
    "1d": (lambda: nn.BatchNorm1d(3), (16, 3)),
    "sequences": (lambda: nn.BatchNorm1d(3, affine=False), (16, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3), (16, 3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (16, 3, 2, 3, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (16, 3, 4, 2)),
    "synchronised": (lambda: nn.SyncBatchNorm(3), (16, 3, 4, 2)),
    "instances 1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (16, 3, 5)),
    "instances 2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (16, 3, 4, 2)),
    "instances 3d": (lambda: nn.InstanceNorm3d(3, track_running_stats=True), (16, 3, 2, 3, 2)),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind, exact):
    make, shape = KINDS[kind]
    model, x = nn.Sequential(nn.Dropout(0.5), make()).double().eval(), draw_normal(*shape) * 3 + 1
    momentum = model[1].momentum
    want = {"1." + k: v for k, v in training_statistics(model[1], x).items()}
    model[1].num_batches_tracked += 7  # of its training
    assert recalibrate(model, [x[:4], x[4:]], exact=exact) == 1
    for name, value in want.items():
        torch.testing.assert_close(dict(model.named_buffers())[name], value)
    assert model[1].num_batches_tracked == 7
    assert model[1].momentum == momentum
    assert not any(part.training for part in model.modules())
    recalibrate(model, [x[:4]], exact=exact)
    assert not torch.allclose(model[1].running_mean, want["1.running_mean"])


def test_layers_without_statistics_and_layers_that_no_pass_calls():
    net = Net(lambda net, x: net.a(net.b(x)), a=nn.BatchNorm1d(2), b=nn.BatchNorm1d(2, track_running_stats=False))
    net.never = nn.BatchNorm1d(2)
    for exact in (False, True):
        assert recalibrate(net, [torch.randn(8, 2)], exact=exact) == 2
        assert torch.equal(net.never.running_mean, torch.zeros(2))
        assert not torch.equal(net.a.running_mean, torch.zeros(2))
    assert net.training
    assert recalibrate(nn.Linear(1, 1), iter([])) == 0
    assert recalibrate(nn.InstanceNorm1d(2), iter([])) == 0


def test_single_samples_do(resnet):
    """In training mode torch refuses a batch of one value per channel."""
    norm = nn.BatchNorm1d(2).double().eval()
    x = draw_normal(20, 2)
    recalibrate(norm, x.split(1))
    torch.testing.assert_close(norm.running_var, x.var(0))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([None], AttributeError, None),
        ([], OptionError, "no batch"),
        ([torch.full((4, 3), torch.nan)], CheckpointError, "0: on these data NaN or Inf"),
    ],
)
def test_what_fails_halfway_leaves_everything_as_it_was(bad, error, message, exact):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3, momentum=None)).train()
    model[1].eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    good = [torch.randn(4, 3) for _ in range(2)]
    with pytest.raises(error, match=message):
        recalibrate(model, [*good, *bad] if bad else bad, exact=exact)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert [part.training for part in model] == [True, False, True]
    assert [model[0].momentum, model[2].momentum] == [0.1, None]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    recalibrate(model, good, exact=exact)
    assert not torch.equal(state["0.running_mean"], model[0].running_mean)


def test_what_can_be_read_once_is_read_once():
    norm = nn.BatchNorm1d(1)
    assert recalibrate(norm, (torch.randn(4, 1) for _ in range(3))) == 1
    with pytest.raises(OptionError, match="can be read once"):
        recalibrate(norm, (torch.randn(4, 1) for _ in range(3)), exact=True)


# --- REPAIR ----------------------------------------------------------------------------------------------------------


def units(module, data, names):
    """{layer: (means, deviations)} of its outputs over all positions, by plain hooks."""
    heard = {name: [] for name in names}
    handles = []
    for name in names:
        part = module.get_submodule(name)
        axis = 1 if isinstance(part, nn.Conv2d) else -1
        handles.append(
            part.register_forward_hook(
                lambda _, __, y, name=name, axis=axis: heard[name].append(y.movedim(axis, -1).flatten(0, -2).clone())
            )
        )
    with torch.no_grad():
        for batch in data:
            module(**batch) if isinstance(batch, dict) else module(batch)
    for handle in handles:
        handle.remove()
    outputs = {name: torch.cat(tensors) for name, tensors in heard.items()}
    return {name: (y.mean(0), y.std(0, correction=0)) for name, y in outputs.items()}


def vgg():
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(inplace=True)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10), nn.ReLU(), nn.Linear(10, 4))


def pair(kind):
    """Two models, in other coordinates or from other seeds, and data."""
    if kind == "vgg":
        return make_pair(vgg), [draw_normal(16, 3, 8, 8, seed=seed) for seed in range(3)]
    model = TINY[FIRST[kind]]
    return [model, other_seed(model)], make_batches(model, 4)


@pytest.mark.parametrize("kind", ["vgg", "vit", "gpt2", "llama"])
@pytest.mark.parametrize("weights", [None, [0.3, 0.9]])
def test_every_unit_has_the_mean_and_the_deviation_of_the_models(kind, weights):
    """Measured with the repaired weights; for layers without a bias only the deviation."""
    models, data = pair(kind)
    checkpoints = [Checkpoint.open(model) for model in models]
    average = combine(checkpoints, "linear")
    repaired = repair(average, checkpoints, data, weights=weights)
    shares = [0.5, 0.5] if weights is None else [0.25, 0.75]
    maps = {
        name: part.bias is not None
        for name, part in models[0].named_modules()
        if type(part).__name__ in ("Linear", "Conv2d", "Conv1D") and name not in ("lm_head",)
    }
    assert len(maps) >= 4
    one, other, before, after = (units(m, data, maps) for m in (*models, average.model(), repaired.model()))
    worst = 0.0
    for name, has_bias in maps.items():
        for i in (0, 1) if has_bias else (1,):
            want = shares[0] * one[name][i] + shares[1] * other[name][i]
            alive = before[name][1] > 1e-6 * before[name][0].abs()
            scale = want[alive].abs().max()
            assert (after[name][i] - want)[alive].abs().max() <= 1e-4 * scale, (name, i)
            worst = max(worst, ((before[name][i] - want)[alive].abs().max() / scale).item())
    assert worst > 0.1  # the plain average has others


def test_repair_keeps_the_merge_and_its_form(resnet):
    """BatchNorm statistics are those of the data; integers and dtypes stay."""
    models = [Checkpoint.open(m).model(torch.bfloat16) for m in (resnet, other_seed(resnet))]
    data = make_batches(resnet, 2)
    checkpoints = [Checkpoint.open(model) for model in models]
    average = combine(checkpoints, "linear")
    before = {key: tensor.clone() for key, tensor in average.tensors.items()}
    repaired = repair(average, checkpoints, data)
    assert distance(average, before) == 0
    assert {k: (p.shape, p.dtype) for k, p in repaired.parts.items()} == {
        k: (p.shape, p.dtype) for k, p in average.parts.items()
    }
    counted = [key for key in before if key.endswith("num_batches_tracked")]
    assert counted
    assert all(torch.equal(repaired.tensors[key], before[key]) for key in counted)
    again = repaired.model(torch.float64)
    recalibrate(again, [{k: x.double() for k, x in batch.items()} for batch in data], exact=True)
    for key in before:
        if key.endswith("running_var"):
            torch.testing.assert_close(again.state_dict()[key], repaired.tensors[key].double(), rtol=0.1, atol=0.02)


def test_repair_of_a_model_and_itself_is_that_model(resnet):
    for model in (recompute_statistics(resnet, make_batches(resnet, 2)), TINY[FIRST["bert"]], TINY[FIRST["convnext"]]):
        checkpoint = Checkpoint.open(model)
        again = repair(combine([checkpoint] * 2, "linear"), [checkpoint] * 2, make_batches(model, 2))
        assert distance(again, model) <= 1e-9


def test_a_unit_that_never_changes_is_moved_and_not_scaled():
    models = make_pair(lambda: nn.Linear(3, 2))
    with torch.no_grad():
        for model in models:
            model.weight[0] = 0
    checkpoints = [Checkpoint.open(model) for model in models]
    average = combine(checkpoints, "linear")
    repaired = repair(average, checkpoints, [draw_normal(20, 3)])
    assert torch.equal(repaired.tensors["weight"][0], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(repaired.tensors["bias"][0], average.tensors["bias"][0])
    with pytest.raises(OptionError, match="got 1 weights for 2 models"):
        repair(average, checkpoints, [draw_normal(20, 3)], weights=[1])
