"""Layers and parts: what is cut out of a model is that part of it, and what is put together loads whole."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from torch import nn

from hf_rebasin import Checkpoint
from hf_rebasin.checkpoints.layer_comparison import refuse_other_layers
from hf_rebasin.checkpoints.layer_settings import config_of_layers, layer_counts, main_count
from hf_rebasin.checkpoints.layers import LayerStack, cut_layers, find_stack
from hf_rebasin.checkpoints.lazy import Tensors
from hf_rebasin.checkpoints.parts import module_keys
from hf_rebasin.errors import CheckpointError, OptionError

DECODERS = [name for name in ARCHITECTURES if list(ARCHITECTURES).index("gpt2") <= list(ARCHITECTURES).index(name)]
DECODERS = DECODERS[: DECODERS.index("t5")]
# Families whose first layer differs from all others, so that it cannot be repeated, and what differs.
NOT_TWICE = {
    "rwkv": "pre_ln",
    "deepseek-v3": "first_k_dense_replace",
    "zamba2": "adapter",  # the adapters of a shared layer are counted
}


def open_tiny(folder, name, **settings):
    class_name, known = ARCHITECTURES[name]
    owner = getattr(transformers, class_name)
    torch.manual_seed(0)
    owner(owner.config_class(**(known | settings))).save_pretrained(folder)
    return Checkpoint.open(folder)


def join(checkpoint, *ranges, keys=None):
    """Return a model of the layers of some ranges of one model, one after the other."""
    parts, at = {}, 0
    for i, (start, stop) in enumerate(ranges):
        first, last = i == 0, i == len(ranges) - 1
        cut, _ = cut_layers(checkpoint, start, stop, at, before=first, after=last, keys=keys)
        parts, at = parts | dict(cut.parts), at + stop - start
    if keys is not None:
        parts |= {key: part for key, part in checkpoint.parts.items() if key not in keys}
    layers = [layer for start, stop in ranges for layer in range(start, stop)]
    written = config_of_layers(checkpoint.raw_config, layers, find_stack(checkpoint, keys).setting)
    return replace(checkpoint, tensors=Tensors(parts), written=written, origin=checkpoint)


def load_whole(checkpoint, folder):
    """Save a model and load it with its class, which must find all of its tensors, use all, and not warn."""
    checkpoint.save(folder)
    owner = getattr(transformers, checkpoint.raw_config["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = owner.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


# --- stacks and cuts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_layers_of_every_decoder(tmp_path, name):
    checkpoint = open_tiny(tmp_path / "a", name)
    stack = find_stack(checkpoint)
    n = stack.count
    assert n == 2
    cut, names = cut_layers(checkpoint, 0, n, 0, before=True, after=True)
    assert names == {key: key for key in checkpoint.parts}
    assert all(cut.parts[key] is part for key, part in checkpoint.parts.items())
    assert cut.ties == checkpoint.ties
    assert config_of_layers(checkpoint.raw_config, range(n), stack.setting) == checkpoint.raw_config
    if name in NOT_TWICE:
        with pytest.raises(CheckpointError, match=NOT_TWICE[name]):
            join(checkpoint, (0, n), (0, n))
        return
    twice = load_whole(join(checkpoint, (0, n), (0, n)), tmp_path / "twice")
    assert max(layer_counts(twice.config.to_dict()).values()) == 2 * n
    load_whole(join(checkpoint, (0, 1)), tmp_path / "first")


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_model_of_chosen_layers_computes(tmp_path, tied):
    checkpoint = open_tiny(tmp_path / "a", "llama", num_hidden_layers=4, tie_word_embeddings=tied)
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a").eval()
    expected = copy.deepcopy(whole)
    expected.model.layers = nn.ModuleList(copy.deepcopy(whole.model.layers[i]) for i in (0, 1, 2, 1, 2, 3))
    for i, layer in enumerate(expected.model.layers):
        layer.self_attn.layer_idx = i
    expected.config.num_hidden_layers = 6
    model = load_whole(join(checkpoint, (0, 3), (1, 4)), tmp_path / "out")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
        assert not torch.allclose(model(tokens).logits, whole(tokens).logits)


def test_cut_names_and_sides(tmp_path):
    checkpoint = open_tiny(tmp_path, "llama", num_hidden_layers=4)
    assert find_stack(checkpoint) == LayerStack("model.layers.", 4, "num_hidden_layers")
    cut, names = cut_layers(checkpoint, 2, 3, 5, before=False, after=False)
    assert names.keys() == cut.parts.keys()
    assert {key.split(".")[2] for key in names} == {"5"}
    assert names["model.layers.5.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert all(cut.parts[new] is checkpoint.parts[old] for new, old in names.items())
    assert set(cut.canonical()) == {key.removeprefix("model.") for key in names}  # its class knows all of them
    outside = {}
    for side in ("before", "after"):
        cut, names = cut_layers(checkpoint, 0, 1, 0, **{"before": False, "after": False, side: True})
        outside[side] = {key for key in names if ".layers." not in key}
    assert outside == {"before": {"model.embed_tokens.weight"}, "after": {"model.norm.weight", "lm_head.weight"}}


def test_old_spellings_of_layers_are_known_after_a_cut(tmp_path):
    checkpoint = open_tiny(tmp_path, "bert")
    parts = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): part for key, part in checkpoint.parts.items()}
    old = replace(checkpoint, tensors=Tensors(parts))
    cut, _ = cut_layers(old, 1, 2, 3, before=False, after=False)
    assert "encoder.layer.3.output.LayerNorm.weight" in cut.canonical()


def test_a_cut_without_the_embedding_has_no_tied_head(tmp_path):
    checkpoint = open_tiny(tmp_path, "llama-tied")
    both, _ = cut_layers(checkpoint, 0, 1, 0, before=True, after=True)
    assert both.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    for sides in ({"before": True, "after": False}, {"before": False, "after": True}):
        cut, names = cut_layers(checkpoint, 0, 1, 0, **sides)
        assert not cut.ties
        assert "lm_head.weight" not in names


def test_a_tensor_that_a_layer_shares_is_stored_without_the_other_layer(tmp_path):
    checkpoint = open_tiny(tmp_path, "llama")
    shared = {f"model.layers.1.mlp.{name}": f"model.layers.0.mlp.{name}" for name in ("up_proj.weight",)}
    parts = {key: part for key, part in checkpoint.parts.items() if key not in shared}
    tied = replace(checkpoint, tensors=Tensors(parts), given_ties=shared)
    cut, names = cut_layers(tied, 1, 2, 0, before=False, after=False)
    assert names["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert not cut.declared_ties
    cut, names = cut_layers(tied, 0, 2, 3, before=False, after=False)
    assert cut.declared_ties == {"model.layers.4.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight"}


@pytest.mark.parametrize("wanted", [(0, 3), (1, 1), (2, 1), (-1, 1)])
def test_ranges_that_do_not_fit(tmp_path, wanted):
    checkpoint = open_tiny(tmp_path, "llama")
    with pytest.raises(OptionError, match=rf"\[{wanted[0]}, {wanted[1]}\] does not fit {tmp_path}: it has 2 layers"):
        cut_layers(checkpoint, *wanted, 0, before=True, after=True)


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("t5", "decoder.block.* (2 layers), encoder.block.* (2 layers)"),
        ("bart", "model.decoder.layers.* (2 layers), model.encoder.layers.* (1 layers)"),
        ("llava", "language_model.model.layers.* (2 layers), vision_tower.encoder.layers.* (2 layers)"),
    ],
)
def test_several_stacks_are_named(tmp_path, name, stacks):
    with pytest.raises(CheckpointError) as caught:
        find_stack(open_tiny(tmp_path, name))
    assert stacks in str(caught.value)
    assert "in modules" in str(caught.value)


def test_a_model_whose_layers_are_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 2, .* the stacks .*groups.* \(1\)"):
        find_stack(open_tiny(tmp_path, "albert"))


def test_a_state_dict_has_the_layers_that_its_keys_have():
    tensors = {f"blocks.{i}.weight": torch.ones(2) for i in range(3)}
    assert find_stack(Checkpoint.open(tensors)) == LayerStack("blocks.", 3)
    _, names = cut_layers(Checkpoint.open(tensors), 1, 3, 0, before=True, after=True)
    assert names == {"blocks.0.weight": "blocks.1.weight", "blocks.1.weight": "blocks.2.weight"}


def test_layers_beyond_the_last_one_are_left_out(tmp_path):
    """DeepSeek-V3 stores a layer that predicts further tokens after the others, for which the class has no tensors."""
    checkpoint = open_tiny(tmp_path, "deepseek-v3")
    extra = {key.replace(".1.", ".2.", 1): part for key, part in checkpoint.parts.items() if ".layers.1." in key}
    longer = replace(checkpoint, tensors=Tensors({**checkpoint.parts, **extra}))
    assert find_stack(longer).count == 2
    _, names = cut_layers(longer, 0, 2, 0, before=True, after=True)
    assert names.keys() == checkpoint.parts.keys()


# --- configurations ----------------------------------------------------------------------------------------------


def test_lists_numbers_and_thresholds_of_layers():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "no_rope_layers": [0, 1, 0, 1],
        "mlp_only_layers": [0, 3],
        "cross_attention_layers": [],
        "layer_scales": {"0": 0.5, "3": 2},
        "first_k_dense_replace": 1,
        "moe_layer_end_index": 1,
        "num_kv_shared_layers": 1,
        "hybrid_override_pattern": "M-M*",
        "rope_sections": [1, 2],
        "vocab_size": 4,
    }
    before = copy.deepcopy(config)
    assert config_of_layers(config, [0, 3, 3]) == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "d", "d"],
        "no_rope_layers": [0, 1, 1],
        "mlp_only_layers": [0, 1, 2],
        "cross_attention_layers": [],
        "layer_scales": {"0": 0.5, "1": 2, "2": 2},
        "first_k_dense_replace": 1,
        "moe_layer_end_index": 0,
        "num_kv_shared_layers": 2,
        "hybrid_override_pattern": "M**",
        "rope_sections": [1, 2],
        "vocab_size": 4,
    }
    assert config == before


def test_a_period_that_no_class_explains():
    config = {"num_hidden_layers": 8, "full_attention_interval": 4}
    assert config_of_layers(config, [4, 5, 6, 7])["num_hidden_layers"] == 4
    with pytest.raises(CheckpointError, match="full_attention_interval is 4"):
        config_of_layers(config, [1, 2, 3, 4])
    decided = config | {"layer_types": ["linear", "linear", "linear", "full"] * 2}
    assert config_of_layers(decided, [1, 2, 3, 4])["layer_types"] == ["linear", "linear", "full", "linear"]


def test_layer_types_are_written_out_where_a_pattern_would_make_others():
    config = transformers.Gemma3TextConfig(num_hidden_layers=12, hidden_size=8, intermediate_size=8, head_dim=4)
    raw = config.to_dict() | {"architectures": ["Gemma3ForCausalLM"], "vocab_size": 11}
    types = raw.pop("layer_types")
    assert types == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert "layer_types" not in config_of_layers(raw, range(6))  # the pattern says so
    layers = [*range(4), *range(5, 12)]
    assert config_of_layers(raw, layers)["layer_types"] == [types[layer] for layer in layers]


@pytest.mark.parametrize(
    ("config", "layers", "setting"),
    [
        ({"model_type": "jamba", "num_experts": 2, "vocab_size": 8}, [0, 1, 2, 3, 5], "expert_layer_period: 2"),
        ({"model_type": "diffllama", "vocab_size": 8}, [0, 2], "lambda_init"),
        ({"model_type": "minicpm3", "vocab_size": 8}, [0, 1], "residual_scale"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, [1], "scaling"),
        ({"model_type": "gemma3n_text"}, [0, 1], "embed_tokens_per_layer"),
        ({"model_type": "swin"}, [0, 2], "hidden_size"),
    ],
)
def test_what_depends_on_numbers_of_layers_is_refused(config, layers, setting):
    with pytest.raises(CheckpointError, match=setting):
        config_of_layers(config, layers)


@pytest.mark.parametrize(
    ("model_type", "layers", "expected"),
    [
        ("deepseek_v3", [1, 2, 3, 4], {"first_k_dense_replace": 2}),
        ("deepseek_v3", [5, 6], {"first_k_dense_replace": 0}),
        ("qwen2", [0, 31], {"num_hidden_layers": 2}),
        ("gpt2", [11], {"n_layer": 1}),
        ("bloom", [0, 1, 0, 1], {"n_layer": 4}),
        ("ministral3", [33], {"num_hidden_layers": 1}),
        ("gpt_neo", [0, 2, 3], {"attention_types": [[["global", "global", "local"], 1]]}),
        ("recurrent_gemma", [2, 3], {"block_types": ["attention", "recurrent"]}),
        ("nemotron_h", [3, 0], {"layers_block_type": ["mlp", "linear_attention"]}),
        ("gemma4_text", [4, 5], {"per_layer_config": {"1": {"head_dim": 512}}}),
    ],
)
def test_settings_of_real_classes(model_type, layers, expected):
    config = config_of_layers({"model_type": model_type, "hidden_size_per_layer_input": 0}, layers)
    built = transformers.CONFIG_MAPPING[model_type].from_dict(config).to_dict()
    for name, value in expected.items():
        assert (
            {int(k): v for k, v in built[name].items()} == {1: {"head_dim": 512}}
            if name == "per_layer_config"
            else (built[name] == value)
        )


def test_defaults_that_follow_the_number_of_layers_stay():
    """T5 has as many layers in the decoder as in the encoder, unless it is said."""
    config = {"model_type": "t5", "num_layers": 3, "vocab_size": 8}
    assert config_of_layers(config, [0, 2], "num_layers")["num_decoder_layers"] == 3


def test_backbones_give_out_their_last_layer():
    config = {"model_type": "dinov2", "num_hidden_layers": 3, "out_indices": [3], "out_features": ["stage3"]}
    assert "out_indices" not in config_of_layers(config, [0, 2])
    config |= {"out_indices": [1, 3], "out_features": ["stage1", "stage3"]}
    with pytest.raises(CheckpointError, match=r"out_indices is \[1, 3\]"):
        config_of_layers(config, [0, 2])


def test_counts_have_one_name():
    assert layer_counts({"model_type": "gpt2", "num_hidden_layers": 3}) == {"n_layer": 3}
    assert main_count({"model_type": "llava"}) == "text_config.num_hidden_layers"
    assert main_count({"model_type": "resnet"}) is None
    assert layer_counts({"model_type": "bart"}).keys() == {"encoder_layers", "decoder_layers"}


def test_layers_that_are_not_there():
    with pytest.raises(OptionError, match="there are 2 layers, and no layer 2"):
        config_of_layers({"num_hidden_layers": 2}, [0, 2])
    with pytest.raises(CheckpointError, match="does not say how many layers"):
        config_of_layers({"model_type": "resnet"}, [0])


def test_numbers_that_layers_know_may_change_and_nothing_else():
    class Layer(nn.Module):
        def __init__(self, number, scale=1.0):
            super().__init__()
            self.layer_idx, self.scale, self.dropout_rate = number, scale, 0.1 * number

    class Model(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)

    old = Model(*map(Layer, range(3)))
    refuse_other_layers(old, Model(Layer(0), Layer(1)), 3, [0, 2])
    with pytest.raises(CheckpointError, match=r"layer 2 .* as layer 1 of layers: scale 0.5 .*perhaps period: 2"):
        refuse_other_layers(old, Model(Layer(0), Layer(1, 0.5)), 3, [0, 2], "period: 2")


# --- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named", "some"),
    [
        ("t5", ["encoder", "decoder"], {"encoder": "shared.weight"}),
        ("t5", ["decoder", "encoder"], {"decoder": "shared.weight"}),
        ("t5", ["encoder", "decoder", "shared"], {"shared": "shared.weight"}),
        ("whisper", ["decoder", "encoder"], {"encoder": "model.encoder.conv1.weight"}),
        ("bart", ["encoder", "decoder"], {"decoder": "final_logits_bias", "encoder": "model.shared.weight"}),
        ("bert-to-bert", ["encoder", "decoder"], {"decoder": "decoder.bert.encoder.layer.0.output.dense.weight"}),
        (
            "llava",
            ["text_decoder", "vision_tower", "multi_modal_projector"],
            {"text_decoder": "language_model.lm_head.weight"},
        ),
        (
            "qwen2-vl",  # whose files know no language model, and have the projector in the vision tower
            ["text_decoder", "vision_tower", "multi_modal_projector"],
            {"text_decoder": "lm_head.weight", "multi_modal_projector": "visual.merger.ln_q.weight"},
        ),
        ("qwen2-vl", ["text_decoder", "vision_tower"], {"vision_tower": "visual.merger.ln_q.weight"}),
        ("clip", ["text_model", "default"], {"default": "logit_scale"}),
        ("llama", ["default"], {"default": "lm_head.weight"}),
    ],
)
def test_parts_have_all_tensors_once(tmp_path, name, named, some):
    checkpoint = open_tiny(tmp_path, name)
    parts = module_keys(checkpoint, named)
    assert list(parts) == named
    assert sorted(key for keys in parts.values() for key in keys) == sorted(checkpoint.parts)
    for part, key in some.items():
        assert key in parts[part]


@pytest.mark.parametrize(
    ("name", "named", "message"),
    [
        ("llava", ["text_decoder", "vision_tower"], "do not have multi_modal_projector.linear_1.bias"),
        ("qwen2-vl", ["vison_tower"], "did you mean 'vision_tower'"),
        ("clip", ["encoder", "default"], "several parts of .*: text_model.encoder, vision_model.encoder"),
        ("llama", [], "no part of the model is named"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, name, named, message):
    with pytest.raises(OptionError, match=message):
        module_keys(open_tiny(tmp_path, name), named)


@pytest.mark.parametrize(
    ("name", "part", "stack", "ranges"),
    [
        ("whisper", "decoder", LayerStack("model.decoder.layers.", 2, "decoder_layers"), [(0, 2), (0, 2)]),
        ("bart", "encoder", LayerStack("model.encoder.layers.", 1, "encoder_layers"), [(0, 1), (0, 1)]),
        ("t5", "decoder", LayerStack("decoder.block.", 2, "num_decoder_layers"), [(0, 2), (1, 2)]),
        ("t5", "encoder", LayerStack("encoder.block.", 2, "num_layers"), [(0, 1)]),
        (
            "llava",
            "text_decoder",
            LayerStack("language_model.model.layers.", 2, "text_config.num_hidden_layers"),
            [(0, 2), (1, 2)],
        ),
        ("qwen2-vl", "vision_tower", LayerStack("visual.blocks.", 1, "vision_config.depth"), [(0, 1), (0, 1)]),
        ("vit-to-gpt2", "decoder", LayerStack("decoder.transformer.h.", 1, "decoder.n_layer"), [(0, 1), (0, 1)]),
        ("bert-to-bert", "encoder", LayerStack("encoder.encoder.layer.", 2, "encoder.num_hidden_layers"), [(1, 2)]),
    ],
)
def test_layers_of_one_part(tmp_path, name, part, stack, ranges):
    checkpoint = open_tiny(tmp_path / "a", name)
    keys = module_keys(checkpoint, [part, "default"])[part]
    assert find_stack(checkpoint, keys) == stack
    load_whole(join(checkpoint, *ranges, keys=keys), tmp_path / "out")
