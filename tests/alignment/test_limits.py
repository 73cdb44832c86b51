"""Limits on alignments, set by the user or by the weights, and the effect of rotations on tied heads."""

import pytest
import torch
from conftest import FIRST, TINY, RandomSolver, distance, moved_copy, other_seed, same_tensors, store_ties_like

from hf_rebasin import Alignment, Checkpoint, Recipe, Status, align, compare, infer_spec, merge, spec_for
from hf_rebasin.alignment.exactness import compute_outputs, example_inputs
from hf_rebasin.cli.output import describe_plan
from hf_rebasin.errors import OptionError, RecipeError, UnknownNameError
from hf_rebasin.recipes.runner import run_merge


@pytest.fixture
def gpt2():
    return TINY["gpt2-0-GPT2LMHeadModel"]


def relative_change(model, moved):
    inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
    before, after = compute_outputs(model, inputs)[0], compute_outputs(moved, inputs)[0]
    return ((before - after).abs().max() / before.abs().max()).item()


def test_what_is_held_stays(gpt2):
    solution = align(gpt2, other_seed(gpt2), hold=["residual", "qk.*"])
    assert {name.split(".")[0] for name in solution.alignment.moved} <= {"head", "ov", "ff"}
    assert "ov.0" in solution.alignment.moved
    heads = align(gpt2, other_seed(gpt2), hold=["head.*"]).alignment
    assert "qk.0" in heads.moved, "bases of heads that stay where they are"
    assert not any(name.startswith("head") for name in heads.moved)
    with pytest.raises(UnknownNameError, match="no symmetry 'residul' to hold; did you mean 'residual'"):
        align(gpt2, other_seed(gpt2), hold=["residul"])


def test_wrong_groups_are_refused(gpt2):
    with pytest.raises(OptionError, match="groups = 'all'"):
        align(gpt2, gpt2, groups="all")
    with pytest.raises(RecipeError, match=r"align.groups: input should be 'full' or 'permutation'"):
        Recipe.from_dict({"models": ["a", "b"], "align": {"groups": "ful"}})


def test_a_tied_head_is_stored_apart_or_its_stream_is_only_permuted(gpt2, tmp_path):
    other = other_seed(gpt2)
    apart, tied = align(gpt2, other), align(gpt2, other, keep_tied=True)
    assert apart.notes == ("lm_head.weight is stored apart from wte.weight, as the last norm's gain goes into it",)
    assert tied.notes == ("residual is only permuted: lm_head.weight stays tied",)
    keys = Checkpoint.open(gpt2).tensors.keys()
    assert Checkpoint.open(tied.apply(other)).tensors.keys() == keys
    moved = apart.apply(other)
    assert Checkpoint.open(moved).tensors.keys() == keys | {"lm_head.weight"}
    assert moved.lm_head.weight is not moved.transformer.wte.weight
    assert other.lm_head.weight is other.transformer.wte.weight
    merged = merge([gpt2, moved]).save(tmp_path / "merged")
    loaded = type(gpt2).from_pretrained(merged, dtype=torch.float64)
    assert not loaded.config.tie_word_embeddings
    assert relative_change(loaded, merge([gpt2, moved]).model()) == 0
    a, b, c = (Checkpoint.open(m).save(tmp_path / name) for m, name in ((gpt2, "a"), (other, "b"), (moved, "c")))
    again = run_merge(Recipe.from_dict({"models": [str(a), str(c)], "align": False}))
    assert same_tensors(again.checkpoint, merged)
    assert not compare(a, c).backbone_only
    text = "\n".join(describe_plan(Recipe.from_dict({"models": [str(a), str(b)]}), tmp_path / "out"))
    assert "lm_head.weight is stored apart from wte.weight" in text
    assert "--keep-tied" in text


def test_the_fixed_model_is_never_touched(family):
    other = other_seed(family)
    before = {key: tensor.clone() for key, tensor in Checkpoint.open(family).tensors.items()}
    moved = align(family, other, solver=RandomSolver()).apply(other)
    assert same_tensors(merge([family, moved], "lerp", t=0.0), store_ties_like(family, moved))
    assert same_tensors(family, before)


@pytest.mark.parametrize("name", ["gpt2-1-GPT2LMHeadModel", "llama-0-LlamaForCausalLM"])
@pytest.mark.parametrize("whose", ["fixed", "moving"])
def test_gains_of_zero(name, whose):
    """Nothing is divided by gains of 0: the function stays the same, and a note says which group was reduced."""
    models = {"fixed": TINY[name], "moving": other_seed(TINY[name])}
    models[whose] = Checkpoint.open(models[whose]).model()
    with torch.no_grad():
        for key, parameter in models[whose].named_parameters():
            if "norm" in key or "ln_" in key:
                parameter[0] = 0.0
    solution = align(models["fixed"], models["moving"])
    kept = "gpt2" in name and whose == "moving"
    assert ("residual is only permuted: the bias of ln_f would have to be divided" in str(solution.notes)) is kept
    exact = 1e-5 if "llama" in name else 1e-9
    assert relative_change(models["moving"], solution.apply(models["moving"])) <= exact
    if not kept:  # in its own gauge, too
        at_random = Alignment.random(spec_for(models["moving"]), torch.Generator().manual_seed(0))
        assert relative_change(models["moving"], at_random.apply(models["moving"])) <= exact


@pytest.mark.parametrize("name", ["gpt2", "vit", "opt", "bert"])
def test_planted_elements_of_inferred_groups_come_back(name):
    model = TINY[FIRST[name]]
    spec = infer_spec(model)
    moved = Alignment.random(spec, torch.Generator().manual_seed(3)).apply(model)
    solution = align(model, moved, spec=spec)
    assert solution.status is Status.EQUAL
    back = solution.apply(moved)
    assert distance(store_ties_like(model, back), back) <= 1e-5


def test_an_alignment_found_in_smaller_groups_fits(gpt2):
    moved, alignment = moved_copy(gpt2)
    assert same_tensors(alignment.inverse().apply(moved), gpt2)
    assert alignment.spec.symmetries["residual"].kind == "permutation"
    assert spec_for(gpt2).symmetries["residual"].kind == "centred"
