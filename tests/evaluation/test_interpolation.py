"""Interpolation: what is measured on the line between two models, with only one of them in memory."""

import gc
import json
import math

import pytest
import torch
from conftest import FIRST, TINY, moved_copy, other_seed, run_script, same_tensors
from torch import nn

from hf_rebasin import Checkpoint, merge
from hf_rebasin.checkpoints.lazy import InMemory
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError
from hf_rebasin.evaluation.barrier import Curve
from hf_rebasin.evaluation.interpolation import between, interpolate
from hf_rebasin.evaluation.metrics import Measured, evaluate
from hf_rebasin.merging.recalibration import recalibrate
from hf_rebasin.modules.forward import example_inputs

THREE = (0.0, 0.5, 1.0)


def values(model):
    """A copy of all its tensors, by name."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def seen_on(fixed, moving, **options):
    """The tensors of every model on the line."""
    seen = []

    def measure(model):
        seen.append(values(model))
        return Measured(0.0)

    interpolate(fixed, moving, measure, **options)
    return seen


def same(actual, expected):
    assert actual.keys() == expected.keys()
    return all(torch.equal(actual[key], expected[key]) and actual[key].dtype == expected[key].dtype for key in actual)


# --- curves ----------------------------------------------------------------------------------------------------------


def test_the_barrier_is_the_highest_rise_above_the_chord():
    assert Curve(THREE, (1.0, 3.0, 2.0)).barrier == 1.5
    assert Curve(THREE, (1.0, 1.2, 2.0)).barrier == 0
    assert Curve(THREE, (0.0, 0.0, 0.0), {"accuracy": (1.0, 0.25, 0.5)}).error_barrier == 0.5
    assert Curve((0.0, 0.25, 1.0), (0.0, 2.0, 4.0)).barrier == 1  # the points need not be even
    assert math.isnan(Curve(THREE, (0.0, math.nan, 1.0)).barrier)


def test_the_area_is_the_mean_rise_by_trapezoids():
    assert Curve(THREE, (1.0, 3.0, 2.0)).area == 0.75
    assert Curve(THREE, (1.0, 0.5, 2.0)).area == -0.5
    assert Curve((0.0, 0.25, 1.0), (0.0, 2.0, 4.0)).area == 0.5
    at = [i / 1000 for i in range(1001)]
    assert Curve(tuple(at), tuple(t * (1 - t) for t in at)).area == pytest.approx(1 / 6, rel=1e-5)


def test_the_middle_and_the_best():
    curve = Curve((0.0, 0.4, 0.5, 1.0), (2.0, math.nan, 3.0, 1.0), {"accuracy": (0.5, 0.9, 0.9, 0.1)})
    assert curve.middle == {"loss": 3.0, "accuracy": 0.9}
    assert curve.best == 1.0
    assert curve.best_by("accuracy") == 0.4
    assert Curve(THREE, (0.0,) * 3, {"perplexity": (3.0, 2.0, 4.0)}).best_by("perplexity") == 0.5
    with pytest.raises(OptionError, match="'acuracy' was not measured on this line; did you mean 'accuracy'"):
        curve.best_by("acuracy")
    with pytest.raises(OptionError, match="'loss' is NaN on the whole line"):
        _ = Curve(THREE, (math.nan,) * 3).best


# --- models on the line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet", "mixtral", "gpt2", "bert"])
@pytest.mark.parametrize("stored", [False, True])
def test_every_point_is_the_merge_and_the_ends_are_the_ends(kind, stored, tmp_path):
    a = TINY["bert-1-BertForMaskedLM" if kind == "bert" else FIRST[kind]]
    b = other_seed(a)
    expected = [values(merge([a, b], "lerp", t=t / 4).model()) for t in range(5)]
    if stored:
        a, b = (Checkpoint.open(model).save(tmp_path / name) for model, name in ((a, "a"), (b, "b")))
    seen = seen_on(a, b, points=5)
    assert all(map(same, seen, expected))
    assert same(seen[0], values(Checkpoint.open(a).model()))
    ends = values(Checkpoint.open(b).model())
    counts = {key: value for key, value in seen[0].items() if not value.is_floating_point()}
    assert same(seen[-1], ends | counts)
    assert not same(seen[2], seen[0])


def test_half_precision_is_rounded_once():
    a = TINY[FIRST["llama"]]
    a, b = (Checkpoint.open(model).model(torch.bfloat16) for model in (a, other_seed(a)))
    seen = seen_on(a, b, points=4)
    expected = [values(merge([a, b], "lerp", t=t).model()) for t in torch.linspace(0, 1, 4).double().tolist()]
    assert same(seen[-1], values(b))
    assert seen[1].keys() == expected[1].keys()
    weight = next(iter(seen[1]))
    assert seen[1][weight].dtype == torch.bfloat16
    assert torch.equal(
        seen[1][weight], torch.lerp(a.state_dict()[weight].float(), b.state_dict()[weight].float(), 1 / 3).bfloat16()
    )


class Counting(nn.Module):
    """A network with a buffer that is not stored, and one that cannot be written."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.net(torch.randn(9, 3))
        self.register_buffer("calls", torch.zeros(2), persistent=False)
        self.register_buffer("ones", torch.ones(1).expand(4), persistent=False)

    def forward(self, x):
        return self.net(x) * self.ones


def test_nothing_leaks_from_one_point_into_the_next():
    a, b = Counting(0).eval(), Counting(1).eval()
    before, clean, modules = [values(a), values(b)], seen_on(a, b, points=5), []

    @torch.no_grad()
    def spoil(model):
        assert model.calls.sum() == 0
        assert not model.training
        modules.append(model)
        model.train()
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor is not model.ones:
                tensor += 7

    spoilt = seen_on(a, b, points=5, prepare=spoil)
    for before_spoiling, after in zip(clean, spoilt, strict=True):
        assert same(after, {key: value + 7 for key, value in before_spoiling.items()})
    assert len({id(model) for model in modules}) == 1
    assert same(values(a), before[0])
    assert same(values(b), before[1])
    assert int(clean[4]["net.1.num_batches_tracked"]) == 1


def test_statistics_are_recomputed_at_every_point():
    a = TINY[FIRST["resnet"]]
    b = other_seed(a)
    batches = [{"pixel_values": example_inputs(a.config, torch.Generator().manual_seed(0))["pixel_values"]}]

    def prepare(model):
        recalibrate(model, batches)

    for t, tensors in zip(THREE, seen_on(a, b, points=3, prepare=prepare), strict=True):
        model = merge([a, b], "lerp", t=t).model()
        prepare(model)
        assert same(tensors, values(model))
        best = between(a, b, t, prepare=prepare)
        assert same(values(best.model()), tensors)


def test_the_best_is_lazy_except_for_what_prepare_changed(tmp_path):
    a = TINY[FIRST["resnet"]]
    folders = [Checkpoint.open(model).save(tmp_path / name) for model, name in ((a, "a"), (other_seed(a), "b"))]
    batches = 2 * [{"pixel_values": example_inputs(a.config, torch.Generator().manual_seed(0))["pixel_values"]}]
    plain = between(*folders, 0.25)
    assert not any(isinstance(part, InMemory) for part in plain.parts.values())
    best = between(*folders, 0.25, prepare=lambda model: recalibrate(model, batches))
    here = {key for key, part in best.parts.items() if isinstance(part, InMemory)}
    assert here == {k for k in best.parts if k.endswith(("running_mean", "running_var"))}
    assert same_tensors(best.save(tmp_path / "best"), best)
    assert (tmp_path / "best" / "config.json").exists()


def test_tied_weights_stay_tied():
    a = TINY[FIRST["gpt2"]]
    b = other_seed(a)
    tied = []

    def measure(model):
        tied.append(model.lm_head.weight is model.transformer.wte.weight)
        return Measured(0.0)

    interpolate(a, b, measure, points=3)
    assert tied == [True] * 3


@pytest.mark.parametrize("stored", [False, True])
def test_a_head_that_the_move_untied_is_a_tensor_of_its_own(stored, tmp_path):
    a = TINY[FIRST["gpt2"]]
    b = other_seed(a)
    with torch.no_grad():
        b.transformer.ln_f.weight += torch.rand(a.config.n_embd)
    b, _ = moved_copy(b, groups="full")
    assert b.lm_head.weight is not b.transformer.wte.weight
    inputs = example_inputs(a.config, torch.Generator().manual_seed(0))
    expected = [model(**inputs).logits for model in (a, b)]
    if stored:
        a, b = (Checkpoint.open(model).save(tmp_path / name) for model, name in ((a, "a"), (b, "b")))
    logits, heads = [], []

    def measure(model):
        logits.append(model(**inputs).logits)
        heads.append(model.lm_head.weight.clone())
        assert model.lm_head.weight is not model.transformer.wte.weight
        return Measured(0.0)

    interpolate(a, b, measure, points=3)
    assert torch.equal(logits[0], expected[0])
    assert torch.equal(logits[2], expected[1])
    torch.testing.assert_close(heads[1], (heads[0] + heads[2]) / 2)


def test_data_can_be_given_instead_of_a_measure():
    a = TINY[FIRST["vit"]]
    b = other_seed(a)
    inputs = example_inputs(a.config, torch.Generator().manual_seed(0))
    data = [{**inputs, "labels": torch.tensor([0, 1])}]
    curve = interpolate(a, b, data, points=3)
    ends = [evaluate(model, data) for model in (a, b)]
    assert curve.at == THREE
    assert [curve.loss[0], curve.loss[-1]] == [end.loss for end in ends]
    assert [curve.accuracy[0], curve.accuracy[-1]] == [end.metrics["accuracy"] for end in ends]
    assert json.loads(json.dumps(curve.metrics)) == {"accuracy": list(curve.accuracy)}


def test_what_cannot_be_interpolated_is_refused():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(OptionError, match="got points = 1"):
        interpolate(a, b, [], points=1)
    with pytest.raises(OptionError, match="which can be read once"):
        interpolate(a, b, iter([]))
    with pytest.raises(OptionError, match="measure returned float"):
        interpolate(a, b, lambda model: 1.0)
    with pytest.raises(MismatchError, match="other shapes"):
        interpolate(a, nn.Linear(3, 2), [])
    with pytest.raises(CheckpointError, match="no configuration"):
        interpolate(a.state_dict(), b.state_dict(), [])


# --- memory ----------------------------------------------------------------------------------------------------------


def held():
    """{address: bytes} of all tensors made since `gc.freeze`."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not x.is_meta]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize(("kind", "stored"), [("resnet", False), ("resnet", True), ("mixtral", True)])
def test_there_is_one_model_in_memory(kind, stored, tmp_path):
    a = TINY[FIRST[kind]]
    size = sum(tensor.nbytes for tensor in a.state_dict().values())
    b = other_seed(a)
    given = {t.untyped_storage().data_ptr() for t in [*a.state_dict().values(), *b.state_dict().values()]}
    if stored:
        a, b = (Checkpoint.open(model).save(tmp_path / name) for model, name in ((a, "a"), (b, "b")))
        given = set()
    more = []

    def measure(model):
        more.append(sum(nbytes for address, nbytes in held().items() if address not in given))
        return Measured(0.0)

    gc.freeze()
    try:
        interpolate(a, b, measure, points=5)
    finally:
        gc.unfreeze()
    assert 0.9 * size < min(more) <= max(more) < 1.1 * size


SCRIPT = """
import sys
from pathlib import Path

import torch
from test_interpolation import peak

folder = Path(sys.argv[1])
torch.save([peak(folder / "a", folder / "b", points) for points in POINTS], folder / "POINTS.pt")
"""


def peak(a, b, points):
    """The bytes that interpolating adds to the peak memory of this process."""
    import resource

    def most():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small = TINY[FIRST["llama"]]
    interpolate(
        small, small, lambda model: Measured(0.0), points=2
    )  # warms up: imports, and all that happens only once
    before = most()
    interpolate(a, b, lambda model: Measured(0.0), points=points)
    return most() - before


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_points(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=1000
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert size > 200e6
    peaks = []
    for points in (3, 25):
        run_script(SCRIPT.replace("POINTS.pt", f"{points}.pt").replace("POINTS", f"[{points}]"), tmp_path)
        peaks += torch.load(tmp_path / f"{points}.pt")
    assert max(peaks) < 1.5 * size
    assert abs(peaks[1] - peaks[0]) < 0.1 * size
