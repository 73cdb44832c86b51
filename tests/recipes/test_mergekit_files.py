"""Ways of writing a file that mergekit allows, run on small models; numbers are computed by hand."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_rebasin import Recipe
from hf_rebasin.errors import OptionError, RecipeError
from hf_rebasin.recipes.runner import run_merge

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 12}
UP, HEAD = "model.layers.{}.mlp.up_proj.weight", "lm_head.weight"


def save(model, folder, *changes):
    """Save a model as `base`, and fine-tunes of it as `a`, `b`, …"""
    for i, name in enumerate(["base", "a", "b", "c"][: len(changes) + 1]):
        if i:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        saved = model if i == 0 or changes[i - 1] is None else model.to(changes[i - 1])
        saved.save_pretrained(folder / name)
        model = model.float()


@pytest.fixture
def llamas(tmp_path):
    torch.manual_seed(0)
    save(LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=3)), tmp_path, None, None, torch.bfloat16)
    return tmp_path


def run(folder, raw):
    """Run a recipe whose models are the sub-folders of a folder."""

    def place(value):
        if isinstance(value, list):
            return [place(item) for item in value]
        if not isinstance(value, dict):
            return value
        named = {key: str(folder / value[key]) for key in ("model", "base_model") if key in value}
        return {key: place(content) for key, content in value.items()} | named

    checkpoint = run_merge(Recipe.from_dict(place(raw))).checkpoint
    return dict(checkpoint.tensors), checkpoint


def read(folder, name):
    from safetensors.torch import load_file

    return load_file(folder / name / "model.safetensors")


def close(a, b):
    return torch.allclose(a.double(), b.double(), atol=1e-6)


def test_an_entry_need_not_be_a_list_and_a_gradient_may_have_one_number(llamas):
    a, b = read(llamas, "a"), read(llamas, "b")
    models = [
        {"model": "a", "parameters": {"weight": {"filter": "mlp", "value": [0.25]}}},
        {"model": "b", "parameters": {"weight": [1.5]}},
    ]
    merged, _ = run(llamas, {"models": models, "merge_method": "linear", "parameters": {"weight": 0.5}})
    up = UP.format(1)
    assert close(merged[up], (0.25 * a[up] + 1.5 * b[up]) / 1.75)
    assert close(merged[HEAD], (0.5 * a[HEAD] + 1.5 * b[HEAD]) / 2)
    with pytest.raises(RecipeError, match="takes 2 numbers or more"):
        run(llamas, {"models": models, "merge_method": "linear", "convention": "own"})


def test_numbers_in_a_gradient_may_be_words_to_yaml(llamas):
    """YAML reads 1e-1 as a word, as it has no point."""
    models = [{"model": "a", "parameters": {"weight": ["1e-1", 0.5]}}, {"model": "b", "parameters": {"weight": 1}}]
    raw = {"models": models, "merge_method": "linear", "parameters": {"normalize": False}}
    merged, _ = run(llamas, raw)
    a, b = read(llamas, "a"), read(llamas, "b")
    assert close(merged[UP.format(1)], 0.3 * a[UP.format(1)] + b[UP.format(1)])


def test_a_parameter_that_never_did_anything_is_passed_over(llamas):
    raw = {"models": [{"model": "a"}, {"model": "b"}], "merge_method": "slerp", "base_model": "a"}
    plain, _ = run(llamas, raw | {"parameters": {"t": 0.5}})
    same, _ = run(llamas, raw | {"parameters": {"t": 0.5, "embed_slerp": True}})
    assert all(torch.equal(same[key], plain[key]) for key in plain)


def test_the_module_default_may_have_slices(llamas):
    ranges = [("a", [0, 2]), ("b", [1, 3])]
    slices = [{"sources": [{"model": name, "layer_range": layers}]} for name, layers in ranges]
    modules = {"default": {"slices": slices, "parameters": {"scale": 2}}}
    raw = {"modules": modules, "merge_method": "passthrough", "parameters": {"scale": 3}}
    merged, checkpoint = run(llamas, raw)
    assert checkpoint.config.num_hidden_layers == 4
    assert close(merged[UP.format(3)], 2 * read(llamas, "b")[UP.format(2)])
    filtered = {"default": {"slices": slices, "parameters": {"scale": [{"filter": "mlp", "value": 2}]}}}
    with pytest.raises(OptionError, match="none are cut out"):
        run(llamas, raw | {"modules": filtered})


def test_a_part_may_have_no_model_but_the_base(llamas):
    raw = {"models": [{"model": "base"}], "merge_method": "ties", "base_model": "base"}
    base, a = read(llamas, "base"), read(llamas, "a")
    assert all(torch.equal(tensor, base[key]) for key, tensor in run(llamas, raw)[0].items())
    alone = {"sources": [{"model": "base", "layer_range": [0, 1]}]}
    with_other = {"sources": [{"model": "base", "layer_range": [1, 3]}, {"model": "a", "layer_range": [1, 3]}]}
    raw = {"slices": [alone, with_other], "merge_method": "task_arithmetic", "base_model": "base"}
    merged, _ = run(llamas, raw | {"parameters": {"weight": 0.5}})
    assert torch.equal(merged[UP.format(0)], base[UP.format(0)])
    assert close(merged[UP.format(2)], (base[UP.format(2)] + a[UP.format(2)]) / 2)
    assert torch.equal(merged[HEAD], base[HEAD]), "the first slice has one source, so what is outside has one, too"


def test_models_of_several_dtypes_are_merged_in_one_that_fits_all(llamas):
    raw = {"models": [{"model": "c"}, {"model": "a"}], "merge_method": "linear", "parameters": {"weight": 1}}
    merged, _ = run(llamas, raw)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert close(merged[HEAD], (read(llamas, "a")[HEAD] + read(llamas, "c")[HEAD]) / 2)
    merged, _ = run(llamas, raw | {"convention": "own"})
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_a_later_slice_may_be_of_a_deeper_model(llamas):
    LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=5)).save_pretrained(llamas / "deep")
    ranges = [("a", [0, 3]), ("deep", [3, 5])]
    slices = [{"sources": [{"model": name, "layer_range": layers}]} for name, layers in ranges]
    merged, checkpoint = run(llamas, {"slices": slices, "merge_method": "passthrough"})
    assert checkpoint.config.num_hidden_layers == 5
    assert torch.equal(merged[UP.format(4)], read(llamas, "deep")[UP.format(4)])
    checkpoint.save(llamas / "out")
    _, loading = LlamaForCausalLM.from_pretrained(llamas / "out", output_loading_info=True)
    assert not any(loading.values())


def test_slices_of_a_module_count_its_own_layers(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 12, "decoder_start_token_id": 0}
    save(T5ForConditionalGeneration(T5Config(**sizes, num_layers=3, num_decoder_layers=2)), tmp_path, None, None)
    sources = [{"model": name, "layer_range": [0, 3]} for name in "ab"]
    whole = {"models": [{"model": "a"}, {"model": "b"}]}
    encoder = {"slices": [{"sources": sources, "parameters": {"weight": [0, 1]}}]}
    modules = {"encoder": encoder, "decoder": whole, "shared": whole}
    raw = {"modules": modules, "merge_method": "linear", "parameters": {"normalize": False, "weight": 0.5}}
    a, b = read(tmp_path, "a"), read(tmp_path, "b")
    merged, _ = run(tmp_path, raw)
    for layer, weight in enumerate([0, 0.5, 1]):
        key = f"encoder.block.{layer}.layer.1.DenseReluDense.wi.weight"
        assert close(merged[key], weight * (a[key] + b[key]))
    key = "decoder.block.1.layer.2.DenseReluDense.wi.weight"
    assert close(merged[key], (a[key] + b[key]) / 2)
