"""Recipes with data, from the command line to the report: merges, measurements and controls."""

import json

import pytest
import torch
import yaml
from assessed import make_recipe, merge_and_assess, rows_by_name
from conftest import same_tensors

from hf_rebasin import Checkpoint, Recipe, align, merge
from hf_rebasin.data.batches import DataSettings, open_data
from hf_rebasin.demo import experiments as demo
from hf_rebasin.errors import OptionError, RecipeError
from hf_rebasin.evaluation.metrics import evaluate
from hf_rebasin.merging.recalibration import recalibrate
from hf_rebasin.recipes.assessment import _consumed_by_alignment, assess
from hf_rebasin.recipes.runner import model_shares, run_merge


@pytest.mark.parametrize(
    ("align", "labels", "consumed"),
    [
        ({"solver": "weight_matching"}, None, "nothing"),
        ({"solver": "activation_matching"}, None, "unlabelled inputs"),
        ({"solver": "learned"}, None, "labels"),
        ({"solver": "learned"}, False, "unlabelled inputs"),
        ({"solver": "sinkhorn", "cost": "l2"}, None, "nothing"),
        ({"solver": "sinkhorn", "cost": "l2", "start": "activation_matching"}, None, "unlabelled inputs"),
        ({"solver": "sinkhorn", "cost": "l2", "start": {"solver": "learned", "steps": 1}}, None, "labels"),
        ({"solver": "learned", "start": "activation_matching"}, None, "labels"),
    ],
)
def test_what_aligning_looked_at(demo_folder, align, labels, consumed):
    data = {"dataset": str(demo_folder / "digits"), "samples": 4, "labels": labels}
    recipe = Recipe.from_dict(make_recipe(demo_folder, "vit", align=align, data=data))
    assert _consumed_by_alignment(recipe, open_data(recipe.data, Checkpoint.open(recipe.models[0].model))) == consumed


def test_the_images_left_by_the_demo_are_those_it_trained_on(demo_folder):
    data = open_data(
        DataSettings(dataset=str(demo_folder / "digits"), split="test", samples=500, batch_size=500),
        Checkpoint.open(demo_folder / "vit" / "seed-0"),
    )
    (batch,) = data
    x, y = demo.load_splits()[1]
    torch.testing.assert_close(batch["pixel_values"], x, rtol=0, atol=1e-6)
    assert torch.equal(batch["labels"], y)


def test_controls_and_the_merge_are_measured_as_they_are(demo_folder, tmp_path):
    report = merge_and_assess(
        demo_folder, "vit", tmp_path, merge_method="refit", align={"solver": "activation_matching"}
    )
    rows = rows_by_name(report)
    names = [str(demo_folder / "vit" / f"seed-{seed}") for seed in range(2)]
    assert list(rows) == [
        *names,
        "plain average",
        "plain average, refitted",
        "aligned average",
        "aligned average, refitted",
    ]
    assert [row.name for row in rows.values() if row.control] == ["plain average", "plain average, refitted"]
    first = Checkpoint.open(names[0])
    settings = DataSettings(dataset=str(demo_folder / "digits"), samples=96, batch_size=32)
    data = open_data(settings, first)
    test = open_data(settings.model_copy(update={"split": "test", "samples": 50}), first)
    moved = align(*names, solver="activation_matching", data=data).apply(names[1])
    for name, model in {
        names[0]: first,
        "plain average": merge(names),
        "plain average, refitted": merge(names, "refit", data=data),
        "aligned average": merge([names[0], moved]),
        "aligned average, refitted": Checkpoint.open(tmp_path / "out"),
    }.items():
        scores = evaluate(model.model(), test)
        assert rows[name].loss == pytest.approx(scores.loss, rel=1e-5), name
        assert rows[name].metrics["accuracy"] == scores.metrics["accuracy"]
    assert len({round(row.loss, 6) for row in rows.values()}) == len(rows)
    (pair,) = report.pairs
    assert [line.role for line in pair.lines] == ["plain", "aligned"]
    assert pair.lines[0].middle == pytest.approx(rows["plain average"].loss, rel=1e-5)
    assert pair.lines[1].middle == pytest.approx(rows["aligned average"].loss, rel=1e-5)
    assert rows["plain average"].barrier == pair.lines[0].barrier
    mean = (rows[names[0]].loss + rows[names[1]].loss) / 2
    assert rows["plain average"].excess == pytest.approx(rows["plain average"].loss - mean)
    assert pair.exactness.difference < 1e-5
    assert pair.exactness.after == pytest.approx(pair.exactness.before, rel=1e-5)
    assert pair.exactness.keys
    assert pair.exactness.shapes
    assert pair.exactness.dtypes
    assert {family.family for family in pair.moved} == {"residual", "head.*", "qk.*", "ov.*", "ff.*"}
    for likeness in pair.likeness:  # the objective ⟨A, g·B⟩
        assert sum(after for _, _, after in likeness.points) > sum(before for _, before, _ in likeness.points), (
            likeness.family
        )
    assert "digits, split test" in report.data
    assert Recipe.from_dict(yaml.safe_load(report.recipe)).merge_method == "refit"


def test_statistics_are_recomputed_in_every_model(demo_folder, tmp_path):
    """In the saved merge, in the plain average and on the lines; `false` leaves the averaged statistics."""
    report = merge_and_assess(demo_folder, "resnet", tmp_path, align={"groups": "permutation", "starts": 1})
    names = [str(demo_folder / "resnet" / f"seed-{seed}") for seed in range(2)]
    first = Checkpoint.open(names[0])
    settings = DataSettings(dataset=str(demo_folder / "digits"), samples=96, batch_size=32)
    data = open_data(settings, first)
    test = open_data(settings.model_copy(update={"split": "test", "samples": 50}), first)
    plain = merge(names).model()
    averaged = evaluate(plain, test).loss
    recalibrate(plain, data)
    rows = rows_by_name(report)
    assert rows["plain average"].loss == pytest.approx(evaluate(plain, test).loss, rel=1e-5)
    assert rows["plain average"].loss != pytest.approx(averaged, rel=1e-3)
    assert report.pairs[0].lines[0].middle == pytest.approx(rows["plain average"].loss, rel=1e-5)
    moved = align(*names, groups="permutation", starts=1).apply(names[1])
    expected = merge([names[0], moved]).model()
    recalibrate(expected, data)
    assert same_tensors(tmp_path / "out", expected)
    kept = run_merge(Recipe.from_dict(make_recipe(demo_folder, "resnet", align=False, recalibrate=False)))
    assert same_tensors(kept.checkpoint, merge(names))


def test_repair_has_a_control_that_is_repaired(demo_folder, tmp_path):
    report = merge_and_assess(demo_folder, "vit", tmp_path, recalibrate="repair")
    rows = rows_by_name(report)
    assert {"plain average, repaired", "aligned average, repaired"} <= rows.keys()
    assert rows["plain average, repaired"].control
    assert rows["plain average, repaired"].loss != rows["plain average"].loss


def test_of_other_heads_only_the_first_model_is_measured(demo_folder, tmp_path):
    other = Checkpoint.open(demo_folder / "vit" / "seed-1").model()
    other.classifier = torch.nn.Linear(8, 3)
    other.config.num_labels = 3
    other.save_pretrained(tmp_path / "other")
    demo.write_processor(tmp_path / "other")
    given = make_recipe(demo_folder, "vit", backbone_only=True)
    given["models"][1] = str(tmp_path / "other")
    recipe = Recipe.from_dict(given).model_copy(update={"data": None})
    result = run_merge(recipe)
    report = assess(recipe, result, Checkpoint.open(result.checkpoint.save(tmp_path / "out")))
    (pair,) = report.pairs
    assert [row.name for row in pair.ends] == given["models"][:1]
    assert [row.name for row in pair.rows] == ["plain average", "aligned average"]
    assert pair.lines == ()


def test_an_end_with_its_labels_in_another_order_is_as_good_as_before(demo_folder, tmp_path):
    """Its rows are matched by their strings, and so are the labels of the data."""
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    other = Checkpoint.open(demo_folder / "vit" / "seed-1").model()
    with torch.no_grad():
        for tensor in (other.classifier.weight, other.classifier.bias):
            tensor.copy_(tensor[order])
    other.config.id2label = {i: f"{int(k)}" for i, k in enumerate(order)}
    other.config.label2id = {name: i for i, name in other.config.id2label.items()}
    other.save_pretrained(tmp_path / "other")
    demo.write_processor(tmp_path / "other")
    first = Checkpoint.open(demo_folder / "vit" / "seed-0").model()
    first.config.id2label = {i: str(i) for i in range(10)}
    first.config.label2id = {str(i): i for i in range(10)}
    first.save_pretrained(tmp_path / "first")
    demo.write_processor(tmp_path / "first")
    ends = []
    for models in (
        [demo_folder / "vit" / "seed-0", demo_folder / "vit" / "seed-1"],
        [tmp_path / "first", tmp_path / "other"],
    ):
        recipe = Recipe.from_dict(make_recipe(demo_folder, "vit", align=False) | {"models": list(map(str, models))})
        result = run_merge(recipe)
        report = assess(recipe, result, Checkpoint.open(result.checkpoint.save(tmp_path / models[0].name / "out")))
        ends.append([row.loss for row in report.pairs[0].ends])
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)


def test_without_evaluation_nothing_is_claimed(demo_folder, tmp_path):
    recipe = Recipe.from_dict({"models": make_recipe(demo_folder, "vit")["models"]})
    result = run_merge(recipe)
    report = assess(recipe, result, Checkpoint.open(result.checkpoint.save(tmp_path / "out")))
    assert report.verdict.kind == "unmeasured"
    assert report.pairs[0].exactness.difference < 1e-5
    assert report.pairs[0].moved


def test_shares_of_the_models():
    def shares(**more):
        return model_shares(Recipe.from_dict({"models": ["a", "b"], **more}), 2)

    assert shares(merge_method="lerp", parameters={"t": 0.25}) == [0.75, 0.25]
    assert shares(models=["a", {"model": "b", "parameters": {"weight": 3}}]) == [1, 3]
    assert shares() is None


MISTAKES = {
    "solver": ({"align": {"solver": "activation_matching"}}, "align.solver: it needs data, and there are none"),
    "start": (
        {"align": {"solver": "learned", "start": {"solver": "sinkhorn", "start": "activation_matching"}}},
        "align.start.start: it needs data, and there are none",
    ),
    "refit": ({"refit": True}, "refit: it needs data"),
    "method": ({"merge_method": "refit"}, "merge_method: it needs data"),
    "repair": ({"recalibrate": "repair"}, "recalibrate: it needs data"),
    "backbone": (
        {"refit": True, "backbone_only": True, "data": "x"},
        "refit: it runs whole models, so it cannot be combined with backbone_only",
    ),
    "key": ({"data": {"dataset": "x", "splitt": "test"}}, "data.splitt: no such key; did you mean 'split'?"),
    "points": ({"evaluate": {"dataset": "x", "points": 1}}, "a line has two ends"),
    "inherited": ({"data": "x", "evaluate": {"samplse": 3}}, "evaluate.samplse: no such key; did you mean 'samples'?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_about_data_are_said_before_anything_is_opened(name):
    more, message = MISTAKES[name]
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        Recipe.from_dict({"models": ["a", "b"], **more})


def test_evaluate_takes_over_what_data_says():
    recipe = Recipe.from_dict(
        {"models": ["a"], "data": {"dataset": "x", "column": "text"}, "evaluate": {"split": "t"}}
    )
    assert (recipe.evaluate.dataset, recipe.evaluate.column, recipe.evaluate.split) == ("x", "text", "t")
    assert Recipe.from_dict({"models": ["a"], "data": "x"}).data.dataset == "x"
    unlabelled = {"models": ["a"], "data": {"dataset": "x", "labels": False}, "evaluate": {"split": "t"}}
    assert Recipe.from_dict(unlabelled).evaluate.labels is None  # a loss needs them


@pytest.mark.parametrize("align", [{"starts": 1}, {"solver": "sinkhorn", "cost": "l2"}])
def test_data_that_nobody_looks_at_are_refused(demo_folder, align):
    given = make_recipe(demo_folder, "vit", align=align)
    del given["evaluate"]
    with pytest.raises(OptionError, match="nothing in this merge uses the data"):
        run_merge(Recipe.from_dict(given))
    with pytest.raises(OptionError, match="a loss needs labels"):
        run_merge(Recipe.from_dict(make_recipe(demo_folder, "vit", evaluate={"split": "test", "labels": False})))
    with pytest.raises(OptionError, match="needs data, and there are none; give data="):
        merge(given["models"], "refit")
    with pytest.raises(OptionError, match="does not use data; leave out data="):
        merge(given["models"], data=[])


def test_the_whole_of_it_on_the_command_line(run_command, demo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(demo_folder)
    models, options = ["vit/seed-0", "vit/seed-1"], ["--data", "digits", "-d", "samples=64", "-d", "batch_size=32"]
    out, page = tmp_path / "merged", tmp_path / "report.html"
    status, text = run_command(
        "merge", *models, "-o", out, *options, "--refit", "-e", "split=test", "-e", "points=3", "--report", page
    )
    assert status == 0, text
    assert "plain average, refitted" in text
    assert "verdict: " in text
    assert f"report: {page}" in text
    rows = json.loads(page.with_suffix(".json").read_text())["pairs"][0]["rows"]
    assert [row["name"] for row in rows if row.get("control")] == ["plain average", "plain average, refitted"]
    assert "Traceback" not in text
    status, text = run_command(
        "evaluate", *models, out, "--data", "digits", "-d", "split=test", "-d", "samples=64", "--json"
    )
    assert status == 0, text
    assert json.loads(text[text.index("{") :])[str(out)]["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    best = tmp_path / "best"
    status, text = run_command(
        "interpolate", *models, "--data", "digits", "-d", "split=test", "-d", "samples=64", "--points", "5", "-o", best
    )
    assert status == 0, text
    assert "barrier" in text
    assert "best model by loss" in text
    assert Checkpoint.open(best).model() is not None
    status, text = run_command("merge", *models, "-o", tmp_path / "x", *options, "--refit", "--dry-run")
    assert status == 0, text
    assert "would look at digits, split train, column image" in text
    status, text = run_command("align", *models, "-o", tmp_path / "m", *options, "--solver", "activation_matching")
    assert status == 0, text
    for wrong, message in (
        (["--report", "x.pdf"], "is not an HTML file"),
        (["--report", page], "already exists"),
        (["-e", "split=test"], "evaluate.dataset: field required"),
        (["--data", "digits", "-d", "splitt=x", "--refit"], "data.splitt: no such key"),
        (["--data", "digits", "-d", "split=tset", "--refit"], "no split 'tset'; did you mean 'test'"),
        (["--data", "digits", "--recalibrate", "repare"], "recalibrate: input should be 'statistics' or 'repair'"),
    ):
        status, text = run_command("merge", *models, "-o", tmp_path / "x", *wrong)
        assert status == 1
        assert message in text, text
        assert not (tmp_path / "x").exists()


def test_recalibrate_on_the_command_line(run_command, demo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(demo_folder)
    data = ["--data", "digits", "-d", "samples=64"]
    status, text = run_command("recalibrate", "resnet/seed-0", "-o", tmp_path / "new", *data, "--exact")
    assert status == 0, text
    new, old = Checkpoint.open(tmp_path / "new").tensors, Checkpoint.open("resnet/seed-0").tensors
    assert {key for key in old if not torch.equal(old[key], new[key])} == {
        key for key in old if key.endswith(("running_mean", "running_var"))
    }
    like = ["--like", "vit/seed-0", "--like", "vit/seed-1"]
    merge(["vit/seed-0", "vit/seed-1"]).save(tmp_path / "plain")
    status, text = run_command("recalibrate", tmp_path / "plain", "-o", tmp_path / "repaired", *data, *like)
    assert status == 0, text
    assert not same_tensors(tmp_path / "plain", tmp_path / "repaired")
    status, text = run_command("recalibrate", "vit/seed-0", "-o", tmp_path / "x", *data)
    assert status == 1
    assert "has no running statistics; to repair a merge, name the models that were merged" in text


@pytest.mark.parametrize(
    "settings", [{"merge_method": "lerp", "parameters": {"t": [0, 1]}}, {"parameters": {"weights": [1, [0, 1]]}}]
)
def test_controls_of_a_merge_whose_numbers_vary_are_fitted_to_the_mean(demo_folder, tmp_path, settings):
    recipe = Recipe.from_dict(make_recipe(demo_folder, "vit", **settings))
    assert model_shares(recipe, 2) is None
    rows = rows_by_name(merge_and_assess(demo_folder, "vit", tmp_path, **settings))
    assert {"plain average", "plain average, refitted", "aligned average"} <= rows.keys()
