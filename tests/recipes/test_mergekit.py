"""Files of mergekit run as they are, their unsupported parts are refused, and parameters vary by tensor."""

import inspect
import re
from textwrap import dedent

import pytest
import torch
import yaml
from conftest import FIRST, TINY, other_seed, same_tensors
from torch import nn

from hf_rebasin import Checkpoint, Recipe, merge, registry
from hf_rebasin.checkpoints import lazy
from hf_rebasin.compat import in_memory as modules
from hf_rebasin.errors import OptionError, RecipeError
from hf_rebasin.merging.merge import combine
from hf_rebasin.merging.parameters import TensorPosition, Varying, read_parameter, resolve_method, tensor_positions
from hf_rebasin.recipes.runner import run_merge

LAYERS = 5


def state(value, layers=LAYERS):
    """Return a decoder with one value in all its tensors."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    return {name: torch.full((3,), float(value), dtype=torch.float64) for name in names}


def numbers(merged):
    """Return the value in every tensor of a merge."""
    assert all((tensor == tensor[0]).all() for tensor in merged.tensors.values())
    return {name: tensor[0].item() for name, tensor in merged.tensors.items()}


def test_a_gradient_goes_from_the_first_layer_to_the_last():
    """Between 0 and 8 the merge at t is 8t; [0, 1, 0.5] at depths 0, 1/4 … 1 is 0, 0.5, 1, 0.75, 0.5."""
    merged = numbers(merge([state(0), state(8)], "lerp", t=[0, 1, 0.5]))
    by_hand = [0, 4, 8, 6, 4]
    for i, expected in enumerate(by_hand):
        for part in ("self_attn.q_proj", "mlp.up_proj"):
            assert merged[f"model.layers.{i}.{part}.weight"] == expected
    assert merged["model.embed_tokens.weight"] == by_hand[0], "before the first layer"
    assert merged["model.norm.weight"] == merged["lm_head.weight"] == by_hand[-1], "after the last"


def test_the_ends_of_a_gradient_are_its_numbers():
    for gradient in ([0.1, 0.7], [0.3, 1.1, 0.1], [1e-3, 1e9]):
        read = read_parameter(float, gradient)
        assert (read.at(TensorPosition("", 0.0)), read.at(TensorPosition("", 1.0))) == (gradient[0], gradient[-1])


ONE_MODEL = ("passthrough", "nearswap", "arcee_fusion")


def defaults(method):
    """Return the parameters of a method with their defaults."""
    keywords = inspect.signature(registry.merge_method(method).merge).parameters
    known = registry.merge_method(method).parameters
    return {name.removesuffix("_"): k.default for name, k in keywords.items() if name.removesuffix("_") in known}


def numeric(method):
    """Return the parameters of a method that are single numbers."""
    return [parameter for parameter, kind in registry.merge_method(method).parameters.items() if kind is float]


@pytest.mark.parametrize("method", registry.names("merge method"))
def test_a_constant_gradient_is_the_number(method, bert):
    """No method sees gradients; methods that fit whole models refuse them."""
    plugin = registry.merge_method(method)
    models = [bert] if method in ONE_MODEL else [bert, other_seed(bert)]
    base = other_seed(bert, 7) if plugin.base == "required" else None
    number, gradient = {}, {}
    for parameter, default in defaults(method).items():
        if parameter in plugin.per_model.values():
            one = {"weights": 0.3, "densities": 0.6, "epsilons": 0.1, "gammas": 0.05}.get(parameter, 0.3)
            number[parameter], gradient[parameter] = [one] * len(models), [[one] * 3] * len(models)
        elif parameter in numeric(method):
            number[parameter], gradient[parameter] = default, [default] * 3
        elif plugin.parameters[parameter] is bool:
            number[parameter], gradient[parameter] = default, [default] * 2
    if plugin.finish is not None:
        with pytest.raises(OptionError, match=r"fits whole models, with one number for all tensors; .* cannot vary"):
            merge(models, method, base=base, data=[{}], **gradient)
    else:
        constant = merge(models, method, base=base, **number)
        assert same_tensors(merge(models, method, base=base, **gradient), constant)


def test_a_filter_picks_exactly_its_tensors():
    t = [
        {"filter": "layers.1.mlp", "value": 1},
        {"filter": "mlp", "value": [0, 0.5]},
        {"filter": "*", "value": 0.25},
    ]
    merged = numbers(merge([state(0), state(8)], "lerp", t=t))
    for name, number in merged.items():
        expected = 8 if name == "model.layers.1.mlp.up_proj.weight" else 4 * int(name[13]) / 4 if "mlp" in name else 2
        assert number == expected, name


def test_weights_per_model_vary_too():
    """8 w / (1 + w) with w = 0, 1/4 … 1; a bool is filtered like a number."""
    merged = numbers(merge([state(0), state(8)], weights=[1, [0, 1]]))
    for i in range(LAYERS):
        assert merged[f"model.layers.{i}.mlp.up_proj.weight"] == 8 * (i / 4) / (1 + i / 4)
    assert merged["lm_head.weight"] == 4
    summed = numbers(merge([state(1), state(8)], normalize=[{"filter": "mlp", "value": False}, {"value": True}]))
    assert {value for name, value in summed.items() if "mlp" in name} == {9}
    assert {value for name, value in summed.items() if "mlp" not in name} == {4.5}
    assert numbers(merge([state(2), state(6)], weights=[1, 3])) == dict.fromkeys(state(0), 5), "one number per model"


PLACES = {
    "transformer.wte.weight": 0.0,
    "transformer.wpe.weight": 0.0,
    "transformer.h.0.ln_1.weight": 0.0,
    "transformer.h.2.ln_1.weight": 1.0,
    "transformer.h.1.moe.experts.7.w1.weight": 0.5,
    "transformer.ln_f.weight": 1.0,
    "embed_out.weight": 1.0,
    "gpt_neox.embed_in.weight": 0.0,
    "bert.embeddings.LayerNorm.weight": 0.0,
    "bert.pooler.dense.weight": 1.0,
    "vision_model.pre_layrnorm.weight": 0.0,
    "shared.weight": 0.0,
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": 0.0,
    "encoder.block.1.layer.0.SelfAttention.q.weight": 1.0,
    "decoder.block.0.layer.2.DenseReluDense.wi.weight": 0.0,
    "decoder.block.3.layer.2.DenseReluDense.wi.weight": 1.0,
    "classifier.0.weight": 1.0,
    "0.weight": 0.0,
    "2.weight": 1.0,
}


def test_positions_of_tensors():
    """Towers are counted separately, by the first number; tensors without one come first or last by their name."""
    assert {name: position.depth for name, position in tensor_positions(PLACES).items()} == PLACES


@pytest.mark.parametrize("name", FIRST.values(), ids=list(FIRST))
def test_every_family_begins_with_its_embeddings_and_ends_with_its_heads(name):
    positions = tensor_positions(list(Checkpoint.open(TINY[name]).tensors))
    assert {position.depth for position in positions.values()} >= {0.0, 1.0}
    embeddings = {
        f"{key}.weight" for key, module in TINY[name].named_modules() if isinstance(module, nn.Embedding)
    } & positions.keys()
    assert all(positions[key].depth == 0 for key in embeddings if not re.search(r"\.\d+\.", key))
    assert all(
        position.depth == 1
        for key, position in positions.items()
        if key.startswith(("lm_head", "classifier", "score"))
    )


WRONG_PARAMETERS = {
    "no tensor has it": ({"t": [{"filter": "self_atn", "value": 1}, {"value": 0}]}, r"did you mean 'self_attn'\?"),
    "of two words": ({"t": [{"filter": "mpl.up_proj", "value": 1}, {"value": 0}]}, r"did you mean 'mlp.up_proj'\?"),
    "no default": (
        {"t": [{"filter": "mlp", "value": 1}]},
        r"t: no entry is for model.embed_tokens.weight, .* 3 more; end with one for",
    ),
    "one number": ({"t": [0.5]}, r"t: \[0.5\] does not fit: a gradient over the layers takes 2 numbers or more"),
    "none": ({"t": []}, "a gradient over the layers takes 2 numbers or more"),
    "no number": ({"t": [0, "half"]}, "'half' in a gradient over the layers is not a number"),
    "a switch": ({"t": [0, True]}, "True in a gradient over the layers is not a number"),
    "nan": ({"t": [0, float("nan")]}, r"model.\S+: lerp got t = nan"),
    "misspelt": ({"t": [{"filtre": "mlp", "value": 1}]}, "filtre: no such key of an entry; did you mean 'filter'"),
    "no value": ({"t": [{"filter": "mlp"}]}, "write entries as"),
    "mixed": ({"t": [0.5, {"value": 1}]}, "0.5 does not fit: write entries as"),
    "filter": ({"t": [{"filter": 3, "value": 1}]}, "filter 3 does not fit"),
    "never looked at": ({"t": [{"value": 1}, {"filter": "mlp", "value": 0}]}, r"\(number 1\) are never used"),
    "nested": ({"t": [{"value": [{"value": 1}]}]}, "the value of an entry is a number or a gradient"),
    "mapping": ({"t": {"value": 1}}, "t: {'value': 1} does not fit"),
}


@pytest.mark.parametrize("name", WRONG_PARAMETERS)
def test_what_cannot_vary_so_is_said_before_anything_is_computed(name):
    parameters, message = WRONG_PARAMETERS[name]
    with pytest.raises(OptionError, match=message):
        merge([state(0), state(8)], "lerp", **parameters)


def test_weights_that_cannot_be_name_the_tensor():
    with pytest.raises(OptionError, match=r"model\.\S+: linear got weights \[0.0, 0.0\], which sum to 0"):
        merge([state(0), state(8)], weights=[[0, 1], [0, 1]])
    with pytest.raises(OptionError, match=r"model\.\S+: linear got 3 weights for 2 models"):
        merge([state(0), state(8)], weights=[1, 1, [0, 1]])
    with pytest.raises(OptionError, match="entries with filters belong to one model"):
        merge([state(0), state(8)], weights=[{"filter": "mlp", "value": 1}, {"value": 2}])
    with pytest.raises(OptionError, match="does not fit: input should be a valid boolean"):
        merge([state(0), state(8)], normalize=[True, "maybe"])


@pytest.fixture
def folders(bert, tmp_path):
    """Two unrelated BERTs in float32."""
    made = [Checkpoint.open(m).model(torch.float32) for m in (bert, other_seed(bert))]
    return [str(Checkpoint.open(m).save(tmp_path / name)) for m, name in zip(made, "ab", strict=True)]


GRADIENT = [{"filter": "attention", "value": [0, 0.5, 0.3]}, {"filter": "intermediate", "value": 1}, {"value": 0.4}]


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_streamed_is_in_memory_where_parameters_vary(method, folders, tmp_path, monkeypatch):
    states = [dict(Checkpoint.open(folder).tensors) for folder in folders]
    kept = merge(states, method, t=GRADIENT)
    for size in (7, 1 << 18):
        monkeypatch.setattr(lazy, "CHUNK", size)
        assert same_tensors(merge(folders, method, t=GRADIENT).save(tmp_path / f"{size}"), kept)
    plain = merge(states, method, t=0.4)
    apart = {key for key, tensor in kept.tensors.items() if not torch.equal(tensor, plain.tensors[key])}
    assert apart
    assert all("attention" in key or "intermediate" in key for key in apart)


def test_modules_are_merged_with_the_same_parameters():
    a, b = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    merged = modules.merge_modules([a, b], "lerp", t=[0, 1])
    assert torch.equal(merged[0].weight, a[0].weight)
    assert torch.equal(merged[2].weight, b[2].weight)
    torch.testing.assert_close(merged[1].weight, (a[1].weight + b[1].weight) / 2)


def merge_by_mergekit(models, method, dtype=None, **parameters):
    """Merge with gradients at their first number outside of the layers."""
    resolved = resolve_method(method, parameters, convention="mergekit")
    return combine([Checkpoint.open(model) for model in models], resolved, dtype=dtype)


FILES = {
    "linear": (
        """
        models:
          - model: {a}
            parameters: {{weight: 1.0}}
          - model: {b}
            parameters: {{weight: [0.0, 1.0]}}
        merge_method: linear
        parameters: {{normalize: false, int8_mask: true}}
        dtype: float32
        out_dtype: bfloat16
        name: mine
        """,
        lambda a, b: merge_by_mergekit([a, b], "linear", torch.bfloat16, weights=[1, [0, 1]], normalize=False),
    ),
    "slerp, base second": (
        """
        models:
          - model: {a}
          - model: {b}
        merge_method: slerp
        base_model: {b}
        parameters:
          t:
            - filter: attention
              value: [0, 0.5, 0.3]
            - filter: intermediate
              value: 1
            - value: 0.4
        tokenizer_source: base
        """,
        lambda a, b: merge_by_mergekit([b, a], "slerp", t=GRADIENT),
    ),
    "slerp, base apart": (
        """
        models: [{{model: {b}}}]
        merge_method: slerp
        base_model: {a}
        parameters: {{t: 0}}
        tokenizer: {{source: {a}}}
        """,
        lambda a, b: a,
    ),
    "written by mergekit": (
        """
        base_model: {{model: {{path: {a}, revision: null}}, lora: null}}
        models:
          - model: {{model: {{path: {a}}}}}
            parameters: {{weight: [{{filter: attention, value: 2}}]}}
          - model: {{model: {{path: {b}}}}}
        merge_method: linear
        parameters: {{weight: 1}}
        """,
        lambda a, b: merge([a, b], weights=[[{"filter": "attention", "value": 2}, {"value": 1}], 1]),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_run_unchanged(name, folders, tmp_path):
    text, by_hand = FILES[name]
    (tmp_path / "file.yaml").write_text(dedent(text).format(a=folders[0], b=folders[1]) + "align: false\n")
    recipe = Recipe.from_file(tmp_path / "file.yaml")
    out = run_merge(recipe).checkpoint.save(tmp_path / "out")
    assert same_tensors(out, by_hand(*folders))


def test_files_align_unless_they_say_otherwise(folders):
    raw = {"models": [{"model": folder} for folder in folders], "merge_method": "slerp", "parameters": {"t": [0, 1]}}
    recipe = Recipe.from_dict(raw)
    assert recipe.align is not None
    assert run_merge(recipe).solutions


def test_a_filter_is_looked_for_before_anything_is_aligned(folders, monkeypatch):
    from hf_rebasin.recipes import runner

    monkeypatch.setattr(runner, "align_checkpoints", lambda *_, **__: pytest.fail("it was aligned"))
    raw = {"models": folders, "merge_method": "lerp", "parameters": {"t": [{"filter": "atention", "value": 1}]}}
    with pytest.raises(OptionError, match=r"no tensor has 'atention' in its name; did you mean 'attention'"):
        run_merge(Recipe.from_dict({**raw, "convention": "own"}))
    with pytest.raises(OptionError, match=r"t: no entry is for bert.*; end with one for all others"):
        run_merge(Recipe.from_dict(raw))


GOOD = {"models": [{"model": "x"}, {"model": "y"}], "merge_method": "linear"}
VARYING = {"merge_method": "lerp", "parameters": {"t": [0, 1]}, "data": "d"}
REFUSED = {
    "adapter": (
        {"models": [{"model": "x"}, {"model": "y+z"}]},
        "models.1: y+z: adapters are not merged; merge it into",
    ),
    "adapter, written": (
        {"models": [{"model": "x"}, {"model": {"model": {"path": "y"}, "lora": {"path": "z"}}}]},
        "models.1: adapters are not merged; merge it into its base first",
    ),
    "union": (
        {"tokenizer_source": "union"},
        "tokenizer_source: vocabularies are not united here; leave it out",
    ),
    "union, new": (
        {"tokenizer": {"source": "union"}},
        "tokenizer: vocabularies are not united here; leave it out",
    ),
    "other tokenizer": ({"tokenizer_source": "y"}, "tokenizer_source: 'y' is not the first model"),
    "tokens": ({"tokenizer": {"tokens": {"<s>": {}}}}, "tokenizer.tokens: tokens are not added or changed here"),
    "tokenizer key": ({"tokenizer": {"sorce": "x"}}, "tokenizer.sorce: no such key; did you mean 'source'?"),
    "tokenizer twice": ({"tokenizer": {"source": "base"}, "tokenizer_source": "base"}, "tokenizer: given twice"),
    "out_dtype": ({"out_dtype": "float8"}, "out_dtype: 'float8' is not one of float32, float16, bfloat16, float64"),
    "dtype": ({"dtype": "float8", "out_dtype": "float16"}, "dtype: input should be 'float32'"),
    "misspelt": ({"tokeniser_source": "base"}, "tokeniser_source: no such key"),
    "int8_msk": ({"parameters": {"int8_msk": True}}, "parameters.int8_msk: no such parameter of linear"),
    "density": (
        {"models": [{"model": "x", "parameters": {"density": 0.5}}, {"model": "y"}], "convention": "own"},
        "models.0.parameters.density: no such parameter of linear; known: weight",
    ),
    "weight": (
        {"models": [{"model": "x", "parameters": {"weight": [1]}}, {"model": "y"}], "convention": "own"},
        "models.0.parameters.weight: [1] does not fit: a gradient over the layers takes 2 numbers or more",
    ),
    "t": (
        {"merge_method": "slerp", "parameters": {"t": [1]}, "convention": "own"},
        "parameters.t: [1] does not fit: a gradient over",
    ),
    "weight of slerp": (
        {"merge_method": "slerp", "parameters": {"t": 1, "weight": 1}, "convention": "own"},
        "parameters.weight: no such parameter of slerp; known: eps, t",
    ),
    "refit": (VARYING | {"refit": True}, "parameters.t: fits to data take one number for all tensors"),
    "repair": (VARYING | {"recalibrate": "repair"}, "parameters.t: fits to data take one number"),
    "refit's": (
        {"merge_method": "refit", "parameters": {"weight": [0, 1]}, "data": "d"},
        "parameters.weight: fits to data take one number for all tensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_one_sentence(name):
    change, message = REFUSED[name]
    raw = {key: value for key, value in (GOOD | change).items() if value is not None}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(raw)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe has 1 mistake:", lines
    assert lines[1].strip().startswith(message), lines


OF_MERGEKIT = (
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock"),
    *("nearswap", "arcee_fusion", "passthrough"),
)


def test_all_methods_of_mergekit_are_here():
    assert set(OF_MERGEKIT) <= set(registry.names("merge method"))
    for method in OF_MERGEKIT:
        raw = {"models": ["x"] if method in ONE_MODEL else ["x", "y"], "merge_method": method}
        Recipe.from_dict(raw if registry.merge_method(method).base == "none" else {**raw, "base_model": "z"})


def test_a_tokenizer_of_the_first_model_is_what_there_is_anyway():
    for change in (
        {"tokenizer_source": "x"},
        {"tokenizer_source": "base", "base_model": "y"},
        {"tokenizer_source": "model:y", "base_model": "y"},
        {"tokenizer": {"source": {"model": {"path": "x"}}, "tokens": None}},
        {"chat_template": None},
    ):
        Recipe.from_dict(GOOD | change)


def test_a_recipe_is_written_as_it_was_said():
    weight = [{"filter": "mlp", "value": [0, 1]}, {"value": 2}]
    raw = {"models": [{"model": "x", "parameters": {"weight": weight}}, {"model": "y"}], "parameters": {"t": [0, 1]}}
    recipe = Recipe.from_dict({**raw, "parameters": {}})
    assert (
        yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))["models"][0]["parameters"]["weight"] == weight
    )
    assert isinstance(read_parameter(float, weight), Varying)
