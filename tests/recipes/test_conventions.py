"""mergekit's rules for its files, and those of this package where they differ.

All tensors of the models are constant, so that a merge is arithmetic of a few numbers: a model of value 1 and one of
value 3 at t have 1 + 2t.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hf_rebasin import Recipe
from hf_rebasin.errors import OptionError, RebasinError, RecipeError
from hf_rebasin.recipes.runner import run_merge

LAYERED = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
OUTSIDE = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def make_model(folder, value, layers=5, dtype=torch.float32):
    """Save a Llama; `value` is a number, or a function of the layer (None outside) and the name."""
    config = transformers.LlamaConfig(
        vocab_size=6,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        number = value(layer, name) if callable(value) else value
        tensors[name] = torch.full(shape, float(number), dtype=dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def a(tmp_path):
    return make_model(tmp_path / "a", 1)


@pytest.fixture
def b(tmp_path):
    return make_model(tmp_path / "b", 3)


def run(**raw):
    """Return the merge of a recipe, without alignment."""
    return run_merge(Recipe.from_dict({**raw, "align": False})).checkpoint


def values_of(merged):
    """Return the number in every tensor of a merge."""
    tensors = dict(merged.tensors)
    assert all((tensor == tensor.reshape(-1)[0]).all() for tensor in tensors.values())
    return {name: tensor.reshape(-1)[0].item() for name, tensor in tensors.items()}


def in_layers(values, part="self_attn.q_proj"):
    """Return the numbers of one tensor in all layers."""
    count = sum(name.endswith(f"{part}.weight") for name in values)
    return [values[f"model.layers.{i}.{part}.weight"] for i in range(count)]


def outside(values):
    return [values[name] for name in OUTSIDE.values()]


def source(model, start, stop, **parameters):
    return {"model": model, "layer_range": [start, stop], "parameters": parameters}


# --- which value counts ----------------------------------------------------------------------------------------------


def test_values_are_looked_for_from_the_inside_out(a, b):
    """A list in which nothing matches is as if it were not there; weights w and 1 of 1 and 3 give (w + 3)/(w + 1)."""
    values = values_of(
        run(
            slices=[
                {
                    "sources": [
                        source(a, 0, 5, weight=[{"filter": "q_proj", "value": 7}]),
                        source(b, 0, 5, weight=1),
                    ],
                    "parameters": {"weight": [{"filter": "mlp", "value": 3}, {"filter": "q_proj", "value": 100}]},
                }
            ],
            parameters={"weight": 2},
        )
    )
    weights = {"q_proj": 7, "mlp": 3}
    for name, value in values.items():
        weight = next((weight for part, weight in weights.items() if part in name), 2)
        assert value == pytest.approx((weight + 3) / (weight + 1), abs=1e-6), name


def test_the_level_of_a_module_is_between_slice_and_file(a, b):
    models = [
        {"model": a, "parameters": {"weight": [{"filter": "q_proj", "value": 7}]}},
        {"model": b, "parameters": {"weight": 1}},
    ]
    module = {"models": models, "parameters": {"weight": [{"filter": "k_proj", "value": 5}], "normalize": False}}
    values = values_of(run(modules={"default": module}, parameters={"weight": 2, "normalize": True}))
    weights = {"q_proj": 7, "k_proj": 5}
    for name, value in values.items():
        assert value == next((weight for part, weight in weights.items() if part in name), 2) + 3, name


def test_parameters_that_are_for_no_tensor_have_their_default(a, b, tmp_path):
    base = make_model(tmp_path / "base", 0)
    models = [{"model": a, "parameters": {"weight": 1, "density": [{"filter": "q_proj", "value": 0}]}}]
    raw = {"models": models, "merge_method": "ties", "base_model": base}
    values = values_of(run(**raw))
    assert {name: value for name, value in values.items() if "q_proj" not in name} == dict.fromkeys(
        [name for name in values if "q_proj" not in name], 1.0
    )
    assert in_layers(values) == [0.0] * 5
    with pytest.raises(OptionError, match=r"densities: no entry is for .*; end with one for all others"):
        run(**raw, convention="own")


def test_filters_of_one_model_look_at_its_own_names(tmp_path):
    """Layers 0 and 1 of the result are layers 3 and 4 of the second model; shared values see the result's names."""
    a, b = make_model(tmp_path / "a", 1), make_model(tmp_path / "b", 3)
    filtered = [{"filter": "layers.3.", "value": 3}, {"value": 0}]
    slices = [
        {
            "sources": [source(a, 0, 2, weight=1), source(b, 3, 5, weight=filtered)],
            "parameters": {"normalize": [{"filter": "layers.0.", "value": False}, {"value": True}]},
        }
    ]
    values = values_of(run(slices=slices))
    assert in_layers(values) == [1 * 1 + 3 * 3, 1], "(1 + 9) not divided; (1 + 0) / 1"
    assert outside(values) == [1, 1, 1]


def test_switches_change_where_the_next_one_begins(a, b):
    """Of k values the one at ⌊t(k−1)⌋ counts, for t = 0, 1/4 … 1; 1 + 3 = 4 is divided by 2, or not."""
    models = [{"model": model, "parameters": {"weight": 1}} for model in (a, b)]
    for normalize, expected in (([True, False], [2, 2, 2, 2, 4]), ([False, True, False], [4, 4, 2, 2, 4])):
        values = values_of(run(models=models, parameters={"normalize": normalize}))
        assert in_layers(values) == expected
        assert outside(values) == [2 if normalize[0] else 4] * 3


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["mergekit", "own"])
def test_gradients_outside_of_the_layers(a, b, convention):
    """mergekit takes the first number everywhere outside; this package the last one after the layers."""
    raw = {"models": [a, b], "merge_method": "slerp", "base_model": a, "parameters": {"t": [0.25, 1, 0.5]}}
    values = values_of(run(**raw, **({} if convention == "mergekit" else {"convention": "own"})))
    assert in_layers(values) == [1 + 2 * t for t in (0.25, 0.625, 1, 0.75, 0.5)]
    after = 0.25 if convention == "mergekit" else 0.5
    assert outside(values) == [1 + 2 * t for t in (0.25, after, after)]


def test_gradients_start_again_in_every_slice(a, b):
    """A slice of one layer is at the last number; norm and head are at the first number of the last slice."""
    ranges = [((0, 3), (0, 3), [0, 1]), ((3, 5), (2, 4), [0.25, 0.5]), ((4, 5), (4, 5), [0.125, 0.875])]
    slices = [
        {"sources": [source(a, *first), source(b, *second)], "parameters": {"t": t}} for first, second, t in ranges
    ]
    raw = {"slices": slices, "merge_method": "slerp", "base_model": a}
    values = values_of(run(**raw))
    assert in_layers(values) == [1 + 2 * t for t in (0, 0.5, 1, 0.25, 0.5, 0.875)]
    assert outside(values) == [1 + 2 * t for t in (0, 0.125, 0.125)]
    values = values_of(run(**raw, convention="own"))
    assert in_layers(values) == [1 + 2 * t for t in (0, 0.5, 1, 0.25, 0.5, 0.875)]
    assert outside(values) == [1 + 2 * t for t in (0, 0.875, 0.875)]


# --- the base --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    return make_model(tmp_path / "base", 8)


def test_a_base_that_is_not_listed_is_one_more_model_of_an_average(a, b, base):
    weighted = {"models": [a, b], "base_model": base, "parameters": {"weight": 1}}
    assert set(values_of(run(**weighted)).values()) == {(1 + 3 + 8) / 3}
    assert set(values_of(run(**weighted | {"merge_method": "karcher", "parameters": {}})).values()) == {4.0}
    unweighted = [{"model": model, "parameters": {"weight": 1}} for model in (a, b)]
    for raw in (
        {"models": unweighted, "base_model": base},
        {"models": [a, b], "base_model": base, "convention": "own"},
        {"models": [a, b], "base_model": base, "merge_method": "karcher", "convention": "own"},
    ):
        with pytest.raises(RecipeError, match=r"base_model: .*base' is not one of the models.* list it with a weight"):
            run(**raw)


def test_a_base_is_the_start_of_differences_and_of_ways(a, b, base):
    weighted = [{"model": model, "parameters": {"weight": 0.5}} for model in (a, b)]
    values = values_of(run(models=weighted, base_model=base, merge_method="task_arithmetic"))
    assert set(values.values()) == {8 + 0.5 * (1 - 8) + 0.5 * (3 - 8)}
    listed = [*weighted, {"model": base, "parameters": {"weight": 100}}]
    assert values_of(run(models=listed, base_model=base, merge_method="task_arithmetic")) == values
    for models in ([a], [base, a], [a, base]):
        values = values_of(run(models=models, base_model=base, merge_method="slerp", parameters={"t": 0.25}))
        assert set(values.values()) == {8 + 0.25 * (1 - 8)}
    with pytest.raises(OptionError, match=r"passthrough takes 1 model, got 2"):
        run(models=[a], base_model=base, merge_method="passthrough")


def test_one_model_twice(a, b):
    for raw, where in (
        ({"models": [a, b, a]}, "models"),
        ({"slices": [{"sources": [source(a, 0, 2), source(a, 2, 4)]}]}, r"slices\.0\.sources"),
    ):
        with pytest.raises(RecipeError, match=rf"{where}: .*/a is listed twice; give it once, with the sum"):
            run(**raw, parameters={"weight": 1})
        assert run(**raw, parameters={"weight": 1}, convention="own").tensors.keys()
    revisions = [{"model": "org/a", "revision": revision} for revision in ("r1", "r2")]
    assert len(Recipe.from_dict({"models": revisions}).models) == 2


# --- slices ----------------------------------------------------------------------------------------------------------


def number_of(model):
    """Return a function that numbers the layers of a model: 10.25 for its layer 2, 10.5, … outside."""
    after = {"model.embed_tokens.weight": 0.75, "model.norm.weight": 0.5, "lm_head.weight": 0.25}
    return lambda layer, name: 100 * model + (after[name] if layer is None else layer)


def test_layers_are_stacked(tmp_path):
    a, b = (make_model(tmp_path / name, number_of(i)) for i, name in enumerate("ab", 1))
    merged = run(
        slices=[{"sources": [source(a, 0, 3)]}, {"sources": [source(b, 1, 3)]}, {"sources": [source(a, 4, 5)]}],
        merge_method="passthrough",
    )
    values = values_of(merged)
    assert in_layers(values) == in_layers(values, "mlp.up_proj") == [100, 101, 102, 201, 202, 104]
    assert outside(values) == [100.75, 100.5, 100.25]
    out = merged.save(tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 6
    _, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    swapped = run(slices=[{"sources": [source(a, 0, 2)]}, {"sources": [source(b, 0, 2)]}], merge_method="passthrough")
    assert outside(values_of(swapped)) == [100.75, 200.5, 200.25], "the head is that of the last slice"


def test_surplus_sources_of_the_last_slice_are_in_its_layers_only(a, b):
    raw = {
        "slices": [{"sources": [source(a, 0, 2)]}, {"sources": [source(a, 2, 5), source(b, 2, 5)]}],
        "parameters": {"weight": 1},
    }
    values = values_of(run(**raw))
    assert in_layers(values) == [1, 1, 2, 2, 2]
    assert outside(values) == [1, 1, 1]
    with pytest.raises(OptionError, match="the first one has 1 sources and the last one 2; give them equally many"):
        run(**raw, convention="own")


WRONG_SLICES = {
    "uneven": ([("a", 0, 2), ("b", 0, 3)], "sources of a slice need equally many layers each, got a .0, 2.; b .0, 3."),
    "too deep": ([("a", 3, 7), ("b", 1, 5)], r"layers? "),
}


@pytest.mark.parametrize("name", WRONG_SLICES)
def test_slices_that_no_model_has_are_refused(name, a, b, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources, message = WRONG_SLICES[name]
    with pytest.raises(RebasinError, match=message):
        run(slices=[{"sources": [source(*entry) for entry in sources]}], parameters={"weight": 1})


# --- names and dtypes ------------------------------------------------------------------------------------------------

MISSPELT = {
    "top": ({"models": ["x"], "base_modle": "x"}, "base_modle: no such key; did you mean 'base_model'"),
    "source": (
        {"slices": [{"sources": [{"model": "x", "layer_range": [0, 1], "layer_rnge": 1}]}]},
        "slices.0.sources.0.layer_rnge: no such key; did you mean 'layer_range'",
    ),
    "slice": (
        {"slices": [{"sources": [{"model": "x", "layer_range": [0, 1]}], "paramters": {}}]},
        "slices.0.paramters: no such key; did you mean 'parameters'",
    ),
    "module": (
        {"modules": {"text_decoder": {"models": ["x"], "parmeters": {}}}},
        "modules.text_decoder.parmeters: no such key; did you mean 'parameters'",
    ),
    "parameter of a module": (
        {"modules": {"text_decoder": {"models": [{"model": "x", "parameters": {"wieght": 1}}]}}},
        "modules.text_decoder.models.0.parameters.wieght: no such parameter of linear; did you mean 'weight'",
    ),
    "parameter of a slice": (
        {"slices": [{"sources": [source("x", 0, 1)], "parameters": {"normalise": True}}]},
        "slices.0.parameters.normalise: no such parameter of linear; did you mean 'normalize'",
    ),
    "two of them": ({"models": ["x"], "slices": [{"sources": [source("x", 0, 1)]}]}, "models and slices exclude"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_unknown_names_are_mistakes(name):
    raw, message = MISSPELT[name]
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(raw)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe has 1 mistake:", lines
    assert lines[1].strip().startswith(message), lines


def test_parameters_of_other_methods_are_passed_over(a, b):
    """Many files have them; by the convention of this package they are mistakes."""
    raw = {"models": [a, b], "parameters": {"weight": 1, "density": 0.5, "int8_mask": True}}
    assert set(values_of(run(**raw)).values()) == {2.0}
    with pytest.raises(RecipeError, match=r"parameters.density: no such parameter of linear"):
        run(**raw, convention="own")


def test_dtypes(tmp_path):
    """By mergekit's convention models are rounded to `dtype` first; 1 + 2⁻¹⁰ is 1 in bfloat16."""
    a, b = make_model(tmp_path / "a", 1 + 2**-10), make_model(tmp_path / "b", 1)
    raw = {"models": [a, b], "parameters": {"weight": 1}, "dtype": "bfloat16"}
    wide = run(**raw, out_dtype="float32")
    assert {tensor.dtype for tensor in wide.tensors.values()} == {torch.float32}
    assert set(values_of(wide).values()) == {1.0}
    own = run(**raw, out_dtype="float32", convention="own")
    assert set(values_of(own).values()) == {1 + 2**-11}, "sums are wide, and rounded to out_dtype once"
    for convention in ({}, {"convention": "own"}):
        narrow = run(**raw, **convention).save(tmp_path / f"out-{len(convention)}")
        assert json.loads((narrow / "config.json").read_text())["dtype"] == "bfloat16"


def test_whose_convention_a_recipe_has():
    for raw, convention in (
        ({}, "mergekit"),
        ({"align": False, "dtype": "float32"}, "mergekit"),
        ({"align": {"starts": 2}}, "own"),
        ({"data": "d"}, "own"),
        ({"parameters": {"weights": [1, 2]}}, "own"),
        ({"convention": "own"}, "own"),
        ({"convention": "mergekit", "align": {"starts": 2}}, "mergekit"),
    ):
        assert Recipe.from_dict({"models": ["x", "y"], **raw}).convention == convention
