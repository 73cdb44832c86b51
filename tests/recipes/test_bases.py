"""Differences that are carried over from one base to another, and fine-tunes of one base, which stay as they are."""

import json
import shutil

import pytest
import torch
from conftest import FIRST, TINY, moved_copy, other_seed
from published import run_ok

from hf_rebasin import Checkpoint, Recipe
from hf_rebasin.cli.output import describe_plan
from hf_rebasin.errors import MismatchError
from hf_rebasin.recipes.runner import run_merge

METHODS = {"task_arithmetic": {"lambda": 0.7}, "ties": {"density": 0.5, "lambda": 0.8}}
NORMS = ("LayerNorm", "RMSNorm")
FAMILIES = ("llama", "gpt2", "vit", "bert", "resnet")
MOVED = {"llama": "full", "gpt2": "full", "vit": "full", "bert": "full", "resnet": "permutation"}


def fine_tune(model, seed, scale=0.05):
    """A copy whose parameters are a little different, except for norms.

    An alignment that rotates a stream gives its norms the gains of base_model, so what they were tuned by would move
    into the maps that read them.
    """
    torch.manual_seed(seed)
    tuned = type(model)(model.config).to(next(model.parameters()).dtype)
    tuned.load_state_dict(model.state_dict())
    held = {id(p) for part in tuned.modules() if type(part).__name__.endswith(NORMS) for p in part.parameters()}
    with torch.no_grad():
        for parameter in (parameter for parameter in tuned.parameters() if id(parameter) not in held):
            parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0), alpha=scale)
    return tuned.eval()


def save_models(model, folder, groups="full"):
    """Save a base and two fine-tunes of it, and the base and the second fine-tune in other coordinates."""
    _, alignment = moved_copy(model, groups=groups)
    first, second = fine_tune(model, 1), fine_tune(model, 2)
    models = {"base": model, "first": first, "second": second}
    models |= {"own": alignment.apply(model), "foreign": alignment.apply(second)}
    for name, moved in models.items():
        Checkpoint.open(moved).save(folder / name)
    return alignment


def make_recipe(folder, second, method="task_arithmetic", **more):
    return Recipe.from_dict(
        {
            "merge_method": method,
            "base_model": str(folder / "base"),
            "models": [str(folder / "first"), second],
            "parameters": METHODS[method],
            **more,
        }
    )


def foreign_entry(folder, **more):
    return {"model": str(folder / "foreign"), "base": str(folder / "own"), **more}


def distance(merged, expected):
    """Largest deviation of any tensor, relative to its largest number."""
    pairs = [(merged.tensors[key], tensor) for key, tensor in expected.tensors.items() if tensor.is_floating_point()]
    return max(((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in pairs if b.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "groups"), MOVED.items())
def test_a_difference_from_a_moved_base_is_carried_back(family, groups, method, tmp_path):
    """If the own base is the base in other coordinates, the merge is the one of the fine-tunes as they were."""
    save_models(TINY[FIRST[family]], tmp_path, groups)
    expected = run_merge(make_recipe(tmp_path, str(tmp_path / "second"), method)).checkpoint
    carried = run_merge(make_recipe(tmp_path, foreign_entry(tmp_path), method, align={"groups": groups})).checkpoint
    unaligned = run_merge(make_recipe(tmp_path, foreign_entry(tmp_path), method, align=False)).checkpoint
    assert distance(carried, expected) <= 1e-6
    assert distance(unaligned, expected) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tunes_of_one_base_are_merged_as_they_are(family, method, tmp_path):
    save_models(TINY[FIRST[family]], tmp_path)
    for name, align in (("aligned", True), ("unaligned", False)):
        merged = run_merge(make_recipe(tmp_path, str(tmp_path / "second"), method, align=align))
        merged.checkpoint.save(tmp_path / name)
        assert not merged.solutions
    assert (tmp_path / "aligned/model.safetensors").read_bytes() == (
        tmp_path / "unaligned/model.safetensors"
    ).read_bytes()


def test_a_base_that_is_base_model_changes_nothing(tmp_path):
    save_models(TINY[FIRST["llama"]], tmp_path)
    named = {"model": str(tmp_path / "second"), "base": str(tmp_path / "base")}
    plain = run_merge(make_recipe(tmp_path, str(tmp_path / "second"))).checkpoint
    assert distance(run_merge(make_recipe(tmp_path, named)).checkpoint, plain) == 0


def test_a_model_trained_apart_is_refused_without_its_base(tmp_path):
    model = TINY[FIRST["llama"]]
    save_models(model, tmp_path)
    Checkpoint.open(other_seed(model)).save(tmp_path / "apart")
    with pytest.raises(MismatchError, match=r"apart was not fine-tuned from .*base: of the model"):
        run_merge(make_recipe(tmp_path, str(tmp_path / "apart")))


def test_a_base_that_is_merged_as_well_is_refused(tmp_path):
    """Its own difference from base_model would mix two trainings."""
    model, other = TINY[FIRST["llama"]], other_seed(TINY[FIRST["llama"]])
    models = {"base": model, "first": fine_tune(model, 1), "own": other, "foreign": fine_tune(other, 2)}
    for name, saved in models.items():
        Checkpoint.open(saved).save(tmp_path / name)
    run_merge(make_recipe(tmp_path, foreign_entry(tmp_path)))
    listed = [str(tmp_path / "first"), str(tmp_path / "own"), foreign_entry(tmp_path)]
    with pytest.raises(MismatchError, match=r"own was not fine-tuned from .*/base: the median cosine"):
        run_merge(make_recipe(tmp_path, "", models=listed))


def test_a_base_that_a_model_was_not_tuned_from_is_refused(tmp_path):
    model = TINY[FIRST["llama"]]
    save_models(model, tmp_path)
    Checkpoint.open(other_seed(model)).save(tmp_path / "own", overwrite=True)
    with pytest.raises(MismatchError, match=r"foreign was not fine-tuned from .*/own: the median cosine"):
        run_merge(make_recipe(tmp_path, foreign_entry(tmp_path)))


def test_plan_and_notes_say_what_moves_with_what(tmp_path):
    save_models(TINY[FIRST["llama"]], tmp_path)
    recipe = make_recipe(tmp_path, foreign_entry(tmp_path))
    moves = f"{tmp_path / 'foreign'} moves as {tmp_path / 'own'}, which it was tuned from"
    stays = f"{tmp_path / 'first'} is a fine-tune of the base of {tmp_path / 'base'}, so it stays as it is"
    notes = run_merge(recipe).notes
    plan = "\n".join(describe_plan(recipe, tmp_path / "out"))
    assert moves in notes
    assert stays in notes
    assert moves in plan
    assert stays in plan
    assert "would align" in plan


def test_models_of_one_foreign_base_move_alike(tmp_path):
    """Its alignment is searched for once, and each of its fine-tunes is moved by it."""
    model = TINY[FIRST["llama"]]
    alignment = save_models(model, tmp_path)
    third = fine_tune(model, 3)
    Checkpoint.open(third).save(tmp_path / "third")
    Checkpoint.open(alignment.apply(third)).save(tmp_path / "foreign-third")
    own = {"base": str(tmp_path / "own")}
    expected = make_recipe(tmp_path, "", models=[str(tmp_path / name) for name in ("first", "second", "third")])
    carried = make_recipe(
        tmp_path,
        "",
        models=[
            str(tmp_path / "first"),
            *({"model": str(tmp_path / name), **own} for name in ("foreign", "foreign-third")),
        ],
    )
    result = run_merge(carried)
    moved = [solution.alignment for solution in result.solutions]
    assert [not alignment.moved for alignment in moved] == [True, False, False, False]
    assert moved[1] is moved[2] is moved[3]
    assert distance(result.checkpoint, run_merge(expected).checkpoint) <= 1e-6


RECIPES = {
    "carried over": {},
    "base_model is listed": {"models": ["FOLDER/base", "FOLDER/first", "FOLDER/second"]},
    "fine-tunes of an unlisted base": {"models": ["FOLDER/first", "FOLDER/second"]},
    "slices": {
        "models": None,
        "slices": [
            {
                "sources": [
                    {"model": "FOLDER/first", "layer_range": [0, 1]},
                    {"model": "FOLDER/second", "layer_range": [0, 1]},
                ]
            },
            {
                "sources": [
                    {"model": "FOLDER/second", "layer_range": [0, 1]},
                    {"model": "FOLDER/first", "layer_range": [0, 1]},
                ]
            },
        ],
    },
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_rebuilt_from_its_record(name, method, tmp_path):
    """Models are found where they are said to be; a carried merge is also made again with alignments anew."""
    save_models(TINY[FIRST["llama"]], tmp_path)
    fill = json.loads(json.dumps(RECIPES[name]).replace("FOLDER", str(tmp_path)))
    recipe = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [str(tmp_path / "first"), foreign_entry(tmp_path)],
        "parameters": METHODS[method],
        "align": {"solver": "weight_matching"},
        **fill,
    }
    content = {key: value for key, value in recipe.items() if value is not None}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    run_ok("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    for record in (file for file in (tmp_path / "out").rglob("*") if file.suffix in (".json", ".yaml", ".md")):
        assert str(tmp_path) not in record.read_text(), f"{record.name} tells where local folders are"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in ("base", "first", "second", "own", "foreign"):
        shutil.move(tmp_path / folder, elsewhere / folder)
    models = [f"--model={elsewhere / folder}" for folder in ("base", "first", "second", "own", "foreign")]
    for how in ("--rebuild", "--resolve"):
        output = run_ok("verify", tmp_path / "out", how, *models)
        (rebuilt,) = [line for line in output.splitlines() if line.startswith("the same when rebuilt")]
        assert "model.safetensors" in rebuilt
