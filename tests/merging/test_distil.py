"""Distil: a merge is trained to match the predictions of the merged models."""

import logging
import math

import pytest
import torch
from assessed import merge_and_assess, rows_by_name
from batches import make_batches
from conftest import FIRST, TINY, distance, moved_copy, other_seed, run_script, same_tensors
from nets import recompute_statistics
from torch import nn

from hf_rebasin import Checkpoint, align, distil, merge, recalibrate
from hf_rebasin.errors import OptionError
from hf_rebasin.recipes.plan import peak_memory
from hf_rebasin.recipes.recipe import Recipe
from hf_rebasin.recipes.runner import open_models


class Bias(nn.Module):
    """A model that gives the first of two classes the probability p, whatever its input."""

    def __init__(self, p):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([math.log(p / (1 - p)), 0.0], dtype=torch.float64))

    def forward(self, x):
        return self.scores.expand(len(x), 2)


def p_of(model):
    return Checkpoint.open(model).tensors["scores"].softmax(0)[0].item()


BATCHES = [torch.zeros(3, 1)] * 2


@pytest.mark.parametrize(
    ("probabilities", "weights", "mean"),
    [((0.2, 0.4), None, 0.3), ((0.2, 0.4), [3, 1], 0.25), ((0.1, 0.1, 0.7), None, 0.3)],
)
def test_it_ends_at_the_mean_of_the_predictions(probabilities, weights, mean):
    """The example of the docstring; the average of the weights predicts something else."""
    models = [Bias(p) for p in probabilities]
    parameters = {"weights": weights, "steps": 400, "rate": 0.02}
    assert p_of(merge(models, "distil", data=BATCHES, **parameters)) == pytest.approx(mean, abs=1e-4)
    assert p_of(merge(models, "linear", weights=weights)) != pytest.approx(mean, abs=5e-3)


SLOWER = [pytest.param(family, marks=pytest.mark.slow) for family in ("bert", "t5", "vit")]


@pytest.mark.parametrize("family", ["gpt2", "resnet", *SLOWER])
def test_predictions_come_closer_to_the_models(family):
    """For two seeds, also on other batches; keys, dtypes, ties and integers stay, and the result is reproducible."""
    models = [TINY[FIRST[family]], other_seed(TINY[FIRST[family]])]
    data = make_batches(models[0], 24)
    before = [{key: x.clone() for key, x in Checkpoint.open(model).tensors.items()} for model in models]
    average = merge(models)
    distilled = distil(average, [Checkpoint.open(model) for model in models], data[:16], steps=60, rate=1e-3)

    def apart(checkpoint, batches):
        (module, *ends), total = (checkpoint.model(), *models), 0.0
        recalibrate(module, data[:16])
        with torch.no_grad():
            for batch in batches:
                outputs = [model(**batch) for model in (module, *ends)]
                if "logits" not in outputs[0]:  # no head, no classes
                    y, a, b = (output.last_hidden_state for output in outputs)
                    total += ((a + b) / 2 - y).square().mean().item()
                    continue
                y, a, b = (output.logits.log_softmax(-1) for output in outputs)
                mean = (a.exp() + b.exp()) / 2
                total += (mean * (mean.log() - y)).sum(-1).mean().item()
        return total

    for batches in (data[:16], data[16:]):
        assert apart(distilled, batches) < 0.98 * apart(average, batches)
    like = Checkpoint.open(models[0])
    assert distilled.ties == like.ties
    assert {k: (p.shape, p.dtype) for k, p in distilled.parts.items()} == {
        k: (p.shape, p.dtype) for k, p in like.parts.items()
    }
    for key, x in average.tensors.items():
        assert x.is_floating_point() or torch.equal(x, distilled.tensors[key])
    for model, was in zip(models, before, strict=True):
        assert all(torch.equal(x, was[key]) for key, x in Checkpoint.open(model).tensors.items())
    assert same_tensors(distilled, merge(models, "distil", data=data[:16], steps=60, rate=1e-3))


def test_batchnorm_statistics_are_those_of_the_data():
    models = [TINY[FIRST["resnet"]], other_seed(TINY[FIRST["resnet"]])]
    data = make_batches(models[0], 4)
    distilled = merge(models, "distil", data=data, steps=5)
    assert distance(distilled, recompute_statistics(distilled.model(), data)) < 1e-9
    assert distance(merge(models), recompute_statistics(merge(models).model(), data)) > 0.1


@pytest.mark.parametrize(
    ("steps", "rate", "others"), [(5, 1e-3, 0), (3, 1e4, 1)], ids=["there is nothing to learn", "too fast"]
)
def test_a_result_that_is_not_better_is_not_kept(steps, rate, others, caplog):
    """Bit for bit: Adam moves by its rate even for gradients that are mere rounding errors."""
    model = TINY[FIRST["llama"]]
    models = [model, other_seed(model) if others else model]
    data = make_batches(model, 3)
    with caplog.at_level(logging.WARNING):
        distilled = merge(models, "distil", data=data, steps=steps, rate=rate)
    assert same_tensors(distilled, merge(models))
    assert "did not bring the predictions of the merge closer" in caplog.text


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, True), (torch.bfloat16, False)])
def test_what_rounding_undoes_is_not_said_to_be_better(dtype, kept, caplog):
    models = [Bias(p).to(dtype) for p in (0.2, 0.4)]
    for model in models:
        model.scores.data += 8  # the same p, by numbers that are further apart in bfloat16
    with caplog.at_level(logging.WARNING):
        distilled = merge(models, "distil", data=BATCHES, steps=2, rate=1e-4)
    assert same_tensors(distilled, merge(models)) != kept
    assert ("did not bring the predictions of the merge closer" not in caplog.text) == kept


def test_of_a_model_and_its_twin_nothing_is_left_to_distil():
    """The twin is the model moved to other coordinates and back."""
    model = TINY[FIRST["gpt2"]]
    moved, alignment = moved_copy(model)
    back, data = alignment.inverse().apply(moved), make_batches(model, 2)
    assert same_tensors(merge([model, back], "distil", data=data, steps=3), model)
    assert distance(merge([model, moved], "distil", data=data, steps=3), model) > 0.05


def test_every_model_predicts_with_its_own_head():
    """A head stored separately, as after a full alignment, belongs to its model, although the merge's is tied."""
    tied, other = (TINY["gpt2-0-GPT2LMHeadModel"], other_seed(TINY["gpt2-0-GPT2LMHeadModel"]))
    torch.nn.init.normal_(other.transformer.ln_f.weight, 1, 0.5)
    moved, data = align(tied, other).apply(Checkpoint.open(other)), make_batches(tied, 4)
    assert moved.ties != Checkpoint.open(other).ties
    distilled = [
        distil(merge([tied, other]), [Checkpoint.open(tied), Checkpoint.open(x)], data, steps=30)
        for x in (moved, other)
    ]
    assert distance(*distilled) < 1e-6


def test_labels_do_not_count():
    """Numeric labels do not turn a classifier into a regression either; only its configuration does."""
    model = TINY["bert-4-BertForSequenceClassification"]
    models, data = [model, other_seed(model)], make_batches(model, 4)
    labelled = [{**batch, "labels": model(**batch).logits.detach().sigmoid()} for batch in data]
    unlike = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)} for batch in data]
    distilled, *others = (merge(models, "distil", data=given, steps=5) for given in (data, labelled, unlike))
    assert all(same_tensors(distilled, other) for other in others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps = 0; give 1 or more"),
        ({"rate": 0.0}, "rate = 0.0; give a number above 0, such as 0.0003"),
        ({"rate": math.inf}, "rate = inf"),
        ({"weights": [1.0]}, "1 weights for 2 models"),
        ({"weights": [2.0, -1.0]}, "give weights of 0 or more"),
        ({"data": iter(BATCHES)}, "can be read once"),
        ({"data": []}, "the data yielded no batch"),
        ({"data": [torch.full((3, 1), torch.nan)]}, r"not finite \(nan before and after training\)"),
        ({"data": [torch.zeros(3, 1)] * 8 + [torch.full((3, 1), torch.inf)], "steps": 2}, "nan in step 1, at a rate"),
    ],
)
def test_what_cannot_be_is_said(settings, message):
    models = [nn.Sequential(nn.Linear(1, 2)), nn.Sequential(nn.Linear(1, 2))]
    with pytest.raises(OptionError, match=message):
        merge(models, "distil", **{"data": BATCHES, **settings})


def test_a_recipe_refits_and_distils(demo_folder, tmp_path):
    settings = {"merge_method": "distil", "parameters": {"steps": 20, "rate": 1e-3}, "refit": True}
    report = merge_and_assess(demo_folder, "vit", tmp_path, **settings)
    rows = rows_by_name(report)
    assert [row.name for row in rows.values() if row.control] == [
        "plain average",
        "plain average, refitted and distilled",
    ]
    assert "aligned average, refitted and distilled" in rows
    names = [str(demo_folder / "vit" / f"seed-{seed}") for seed in range(2)]
    raw = {"models": names, "data": str(demo_folder / "digits"), **settings}
    recipe = Recipe.from_dict(raw)
    more = peak_memory(recipe, open_models(recipe), None)
    fewer = Recipe.from_dict({**raw, "merge_method": "linear", "parameters": {}})
    assert more > peak_memory(fewer, open_models(fewer), None)  # gradients, and what Adam keeps


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
from batches import make_batches
from conftest import FIRST, TINY, other_seed
from hf_rebasin import Checkpoint, merge
accelerator = Accelerator(cpu=True)
model = TINY[FIRST["gpt2"]]
models, data = [model, other_seed(model)], make_batches(model, 8)
if accelerator.num_processes == 1:  # what two processes see in a step, in one batch
    data = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(data[::2], data[1::2])]
found = merge(models, "distil", data=data, steps=6)
process = f"{accelerator.num_processes}-{accelerator.process_index}"
torch.save(dict(found.tensors), f"{sys.argv[1]}/{process}")
torch.manual_seed(0)
experts = merge([Experts(), Experts()], "distil", data=[torch.ones(3, 1), -torch.ones(3, 1)] * 3, steps=6)
torch.save(dict(experts.tensors), f"{sys.argv[1]}/experts-{process}")
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
