"""Distil: training a merge to say what the merged models say."""

import logging
import math

import pytest
import torch
from assessed import judged_merge, rows_of
from batches import batches_of
from conftest import FIRST, TINY, distance, moved_copy, other_seed, run_script, same_tensors
from test_refit import with_statistics_of
from torch import nn

from hf_rebasin import Checkpoint, align, distil, merge, recalibrate
from hf_rebasin.errors import OptionError
from hf_rebasin.recipes.plan import memory_of
from hf_rebasin.recipes.recipe import Recipe
from hf_rebasin.recipes.runner import opened


class Bias(nn.Module):
    """Says the same of everything: p of the first of two classes."""

    def __init__(self, p):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([math.log(p / (1 - p)), 0.0], dtype=torch.float64))

    def forward(self, x):
        return self.scores.expand(len(x), 2)


def p_of(model):
    return Checkpoint.open(model).tensors["scores"].softmax(0)[0].item()


BATCHES = [torch.zeros(3, 1)] * 2


@pytest.mark.parametrize(
    ("said", "weights", "mean"), [((0.2, 0.4), None, 0.3), ((0.2, 0.4), [3, 1], 0.25), ((0.1, 0.1, 0.7), None, 0.3)]
)
def test_it_ends_where_the_mean_is_said(said, weights, mean):
    """The example of the docstring, and that averages of weights are not there."""
    models = [Bias(p) for p in said]
    knobs = {"weights": weights, "steps": 400, "rate": 0.02}
    assert p_of(merge(models, "distil", data=BATCHES, **knobs)) == pytest.approx(mean, abs=1e-4)
    assert p_of(merge(models, "linear", weights=weights)) != pytest.approx(mean, abs=5e-3)


SLOWER = [pytest.param(family, marks=pytest.mark.slow) for family in ("bert", "t5", "vit")]


@pytest.mark.parametrize("family", ["gpt2", "resnet", *SLOWER])
def test_it_says_more_nearly_what_the_models_say(family):
    """Of two seeds, on other batches, too; with the keys, dtypes, ties and integers it had, and twice the same."""
    models = [TINY[FIRST[family]], other_seed(TINY[FIRST[family]])]
    data = batches_of(models[0], 24)
    before = [{key: x.clone() for key, x in Checkpoint.open(model).tensors.items()} for model in models]
    average = merge(models)
    found = distil(average, [Checkpoint.open(model) for model in models], data[:16], steps=60, rate=1e-3)

    def apart(checkpoint, batches):
        (module, *ends), total = (checkpoint.model(), *models), 0.0
        recalibrate(module, data[:16])
        with torch.no_grad():
            for batch in batches:
                said = [model(**batch) for model in (module, *ends)]
                if "logits" not in said[0]:  # no head, no classes
                    y, a, b = (one.last_hidden_state for one in said)
                    total += ((a + b) / 2 - y).square().mean().item()
                    continue
                y, a, b = (one.logits.log_softmax(-1) for one in said)
                mean = (a.exp() + b.exp()) / 2
                total += (mean * (mean.log() - y)).sum(-1).mean().item()
        return total

    for batches in (data[:16], data[16:]):
        assert apart(found, batches) < 0.98 * apart(average, batches)
    like = Checkpoint.open(models[0])
    assert found.ties == like.ties
    assert {k: (p.shape, p.dtype) for k, p in found.parts.items()} == {
        k: (p.shape, p.dtype) for k, p in like.parts.items()
    }
    for key, x in average.tensors.items():
        assert x.is_floating_point() or torch.equal(x, found.tensors[key])
    for model, was in zip(models, before, strict=True):
        assert all(torch.equal(x, was[key]) for key, x in Checkpoint.open(model).tensors.items())
    assert same_tensors(found, merge(models, "distil", data=data[:16], steps=60, rate=1e-3))


def test_batchnorm_statistics_are_those_of_the_data():
    models = [TINY[FIRST["resnet"]], other_seed(TINY[FIRST["resnet"]])]
    data = batches_of(models[0], 4)
    found = merge(models, "distil", data=data, steps=5)
    assert distance(found, with_statistics_of(found.model(), data)) < 1e-9
    assert distance(merge(models), with_statistics_of(merge(models).model(), data)) > 0.1


@pytest.mark.parametrize(
    ("steps", "rate", "others"), [(5, 1e-3, 0), (3, 1e4, 1)], ids=["there is nothing to learn", "too fast"]
)
def test_what_is_no_better_is_not_kept(steps, rate, others, caplog):
    """To the bit: Adam moves by its rate for the smallest of gradients, such as those of rounding."""
    model = TINY[FIRST["llama"]]
    models = [model, other_seed(model) if others else model]
    data = batches_of(model, 3)
    with caplog.at_level(logging.WARNING):
        found = merge(models, "distil", data=data, steps=steps, rate=rate)
    assert same_tensors(found, merge(models))
    assert "no nearer to what the models say" in caplog.text


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, True), (torch.bfloat16, False)])
def test_what_rounding_undoes_is_not_said_to_be_better(dtype, kept, caplog):
    models = [Bias(p).to(dtype) for p in (0.2, 0.4)]
    for model in models:
        model.scores.data += 8  # the same p, by numbers that are further apart in bfloat16
    with caplog.at_level(logging.WARNING):
        found = merge(models, "distil", data=BATCHES, steps=2, rate=1e-4)
    assert same_tensors(found, merge(models)) != kept
    assert ("no nearer to what the models say" not in caplog.text) == kept


def test_of_a_model_and_its_twin_nothing_is_left_to_distil():
    """The twin is the model in other coordinates, and then back from there."""
    model = TINY[FIRST["gpt2"]]
    moved, alignment = moved_copy(model)
    back, data = alignment.inverse().apply(moved), batches_of(model, 2)
    assert same_tensors(merge([model, back], "distil", data=data, steps=3), model)
    assert distance(merge([model, moved], "distil", data=data, steps=3), model) > 0.05


def test_models_speak_for_themselves():
    """A head that is stored apart, as after a full alignment, is that model's; though the merge's is tied."""
    tied, other = (TINY["gpt2-0-GPT2LMHeadModel"], other_seed(TINY["gpt2-0-GPT2LMHeadModel"]))
    torch.nn.init.normal_(other.transformer.ln_f.weight, 1, 0.5)
    moved, data = align(tied, other).apply(Checkpoint.open(other)), batches_of(tied, 4)
    assert moved.ties != Checkpoint.open(other).ties
    found = [
        distil(merge([tied, other]), [Checkpoint.open(tied), Checkpoint.open(x)], data, steps=30)
        for x in (moved, other)
    ]
    assert distance(*found) < 1e-6


def test_labels_do_not_count():
    """Nor do they say, being numbers, that outputs are no classes; that is what the model's configuration says."""
    model = TINY["bert-4-BertForSequenceClassification"]
    models, data = [model, other_seed(model)], batches_of(model, 4)
    labelled = [{**batch, "labels": model(**batch).logits.detach().sigmoid()} for batch in data]
    unlike = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)} for batch in data]
    found, *others = (merge(models, "distil", data=given, steps=5) for given in (data, labelled, unlike))
    assert all(same_tensors(found, other) for other in others)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"steps": 0}, "steps = 0; give 1 or more"),
        ({"rate": 0.0}, "rate = 0.0; give a number above 0, such as 0.0003"),
        ({"rate": math.inf}, "rate = inf"),
        ({"weights": [1.0]}, "1 weights for 2 models"),
        ({"weights": [2.0, -1.0]}, "give weights of 0 or more"),
        ({"data": iter(BATCHES)}, "can be read once"),
        ({"data": []}, "the data gave no batch"),
        ({"data": [torch.full((3, 1), torch.nan)]}, r"not finite \(nan before and after training\)"),
        ({"data": [torch.zeros(3, 1)] * 8 + [torch.full((3, 1), torch.inf)], "steps": 2}, "nan in step 1, at a rate"),
    ],
)
def test_what_cannot_be_is_said(knobs, message):
    models = [nn.Sequential(nn.Linear(1, 2)), nn.Sequential(nn.Linear(1, 2))]
    with pytest.raises(OptionError, match=message):
        merge(models, "distil", **{"data": BATCHES, **knobs})


def test_a_recipe_refits_and_distils(place, tmp_path):
    knobs = {"merge_method": "distil", "parameters": {"steps": 20, "rate": 1e-3}, "refit": True}
    report = judged_merge(place, "vit", tmp_path, **knobs)
    rows = rows_of(report)
    assert [row.name for row in rows.values() if row.control] == [
        "plain average",
        "plain average, refitted and distilled",
    ]
    assert "aligned average, refitted and distilled" in rows
    names = [str(place / "vit" / f"seed-{seed}") for seed in range(2)]
    said = {"models": names, "data": str(place / "digits"), **knobs}
    recipe = Recipe.from_dict(said)
    more = memory_of(recipe, opened(recipe), None)
    fewer = Recipe.from_dict({**said, "merge_method": "linear", "parameters": {}})
    assert more > memory_of(fewer, opened(fewer), None)  # gradients, and what Adam keeps


SCRIPT = """
import sys, torch
from accelerate import Accelerator
from torch import nn
class Experts(nn.Module):  # each process calls one of them
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(1, 2), nn.Linear(1, 2)])
    def forward(self, x):
        return self.experts[int(x[0, 0] > 0)](x)
from batches import batches_of
from conftest import FIRST, TINY, other_seed
from hf_rebasin import Checkpoint, merge
accelerator = Accelerator(cpu=True)
model = TINY[FIRST["gpt2"]]
models, data = [model, other_seed(model)], batches_of(model, 8)
if accelerator.num_processes == 1:  # what two processes see in a step, in one batch
    data = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(data[::2], data[1::2])]
found = merge(models, "distil", data=data, steps=6)
place = f"{accelerator.num_processes}-{accelerator.process_index}"
torch.save(dict(found.tensors), f"{sys.argv[1]}/{place}")
torch.manual_seed(0)
experts = merge([Experts(), Experts()], "distil", data=[torch.ones(3, 1), -torch.ones(3, 1)] * 3, steps=6)
torch.save(dict(experts.tensors), f"{sys.argv[1]}/experts-{place}")
"""


@pytest.mark.slow
def test_two_processes_go_where_one_goes(tmp_path):
    for processes in (1, 2):
        run_script(SCRIPT, tmp_path, processes)
    one, first, second = (torch.load(tmp_path / who) for who in ("1-0", "2-0", "2-1"))
    experts = [torch.load(tmp_path / f"experts-{who}") for who in ("2-0", "2-1")]
    for one_place, other in ((first, second), experts):
        assert all(torch.equal(one_place[key], other[key]) for key in one_place)
    assert distance(one, first) < 1e-6
    assert distance(merge([TINY[FIRST["gpt2"]], other_seed(TINY[FIRST["gpt2"]])]), first) > 1e-4
