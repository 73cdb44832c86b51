"""Settings are compared by what they do: refused exactly where some value of a setting changes an output.

What is right is found without the package: folders are edited, loaded by transformers and run.
"""

import json
import random
import shutil

import pytest
import torch
import transformers
from architectures import ARCHITECTURES

from hf_rebasin import Checkpoint, merge
from hf_rebasin.alignment.evidence import ABSENT, Evidence, flatten
from hf_rebasin.alignment.settings import compare_settings
from hf_rebasin.errors import CheckpointError, MismatchError
from hf_rebasin.modules.miniature import Miniature

INTERNAL = ("hidden_states", "past", "attentions", "cache", "router", "aux_loss")
SAMPLES = 10  # settings in the plain run; 200 more with --slow
# They cannot be run here as they are configured, or only on inputs that a test would have to know.
NOT_RUN = {"xlnet", "layoutlmv3", "efficientnet", "sam", "llava", "paligemma", "qwen2-vl", "vit-mae", "whisper"}
NOT_RUN |= {"rwkv", "recurrent-gemma", "siglip", "clip", "vit-to-gpt2", "bert-to-bert", "detr", "encodec"}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Nothing is known from other runs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def build(name, seed=0):
    """Return a tiny model with weights that make everything have an effect."""
    kind, settings = ARCHITECTURES[name]
    owner = getattr(transformers, kind)
    model = owner(owner.config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.dim() == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if gain else noise / max(1, parameter[0].numel()) ** 0.5)
    return model


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    config, main = model.config, model.main_input_name
    if main == "input_ids":
        ids = torch.randint(3, 40, (2, 14), generator=generator)
        ids[:, -1] = min(getattr(config, "eos_token_id", None) or 2, 50)
        ids[1, 4] = min(getattr(config, "pad_token_id", None) or 0, 50)
        generates = config.is_encoder_decoder and "SequenceClassification" not in type(model).__name__
        return {"input_ids": ids, **({"decoder_input_ids": ids[:, :9]} if generates else {})}
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, list | tuple) else (size, size)
        return {main: torch.randn(2, 3, *size, generator=generator)}
    shape = (2, 1, 800) if type(model).__name__.startswith("Encodec") else (2, 800)
    return {main: torch.randn(shape, generator=generator)}


@torch.no_grad()
def run(model, inputs):
    torch.manual_seed(0)
    outputs = model(**inputs)
    keys = [key for key in outputs if not any(word in key for word in INTERNAL)]
    keys = [key for key in keys if "last_hidden" not in key or len(keys) == 1] or list(outputs)
    return [outputs[key] for key in keys if isinstance(outputs[key], torch.Tensor)]


def differ(a, b):
    return len(a) != len(b) or any(
        x.shape != y.shape or not torch.allclose(x.double(), y.double(), rtol=1e-3, atol=1e-4)
        for x, y in zip(a, b, strict=True)
    )


def other_values(value):
    """Other values of a setting, small ones among them, which bind on 14 tokens."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2, 3, 5]
    if isinstance(value, float):
        return [value * 3, value + 0.7]
    if isinstance(value, str):
        return [word for word in ("relu", "silu", "gelu") if word != value]
    if isinstance(value, list) and value and not isinstance(value[0], list):
        return [value[::-1], value[:1] * len(value), value[-1:] * len(value)]
    return [2, 0.5, True] if value is None else []


def edit(folder, key, value):
    """Set a setting in a folder's config.json, inside the parts that its name says."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    *parts, name = key.split(".")
    place = content
    for part in parts:
        place = place.setdefault(part, {})
    place[name] = value
    file.write_text(json.dumps(content))


def load(folder):
    """Return (model, keys that are missing or have another shape); None where the settings are not legal."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception:
        return None
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # a tensor that is not in the file counts if it has an effect; it may begin as zeros
        for key, parameter in model.named_parameters():
            if key in info["missing_keys"]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval(), bool(info["mismatched_keys"])


def effects(folder, key, value, inputs, scratch):
    """Yield (other value, whether it changes an output) for all other values that are legal."""
    before = run(load(folder)[0], inputs)
    for other in other_values(value):
        copy = shutil.copytree(folder, scratch / "other", dirs_exist_ok=True)
        edit(copy, key, other)
        loaded = load(copy)
        if loaded is None:
            continue
        model, mismatched = loaded
        if mismatched:
            yield other, True
            continue
        try:
            after = run(model, inputs)
        except Exception:
            continue
        yield other, differ(before, after)


def list_settings():
    """All (architecture, setting), without those that cannot be run."""
    for name, (kind, settings) in ARCHITECTURES.items():
        if name not in NOT_RUN:
            config = getattr(transformers, kind).config_class(**settings)
            yield from ((name, key) for key in flatten(config.to_dict()))


def sample(count):
    """A sample of them, always the same."""
    return random.Random(0).sample(list(list_settings()), count)


def is_refused(folder, other):
    """Whether a merge of two folders is refused for their settings."""
    try:
        merge([folder, other])
    except MismatchError as error:
        if "computes something else" not in str(error):
            raise
        return True
    return False


def check(name, key, scratch):
    """Check that a merge is refused for a setting exactly where one of its values changes an output."""
    folder, other = scratch / "a", scratch / "b"
    build(name).save_pretrained(folder)
    model, _ = load(folder)
    value = flatten(model.config.to_dict()).get(key, ABSENT)
    tried = list(effects(folder, key, value, inputs_of(model), scratch))
    if tried:
        shutil.copytree(folder, other)
        edit(other, key, tried[0][0])
        matters = any(changes for _, changes in tried)
        assert is_refused(folder, other) == matters, f"{name}: {key}, values and whether they matter: {tried}"


@pytest.mark.parametrize(("name", "key"), sample(SAMPLES), ids="-".join)
def test_refused_exactly_where_a_value_changes_an_output(name, key, tmp_path):
    check(name, key, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), sample(SAMPLES + 200)[SAMPLES:], ids="-".join)
def test_more_are_refused_exactly_where_a_value_changes_an_output(name, key, tmp_path):
    check(name, key, tmp_path)


# --- what must be known whatever the sample --------------------------------------------------------------------------


def effects_of(name, *keys, **settings):
    """Effects of settings on an architecture with some of its own: by trying them, not from the cache."""
    kind, tiny = ARCHITECTURES[name]
    owner = getattr(transformers, kind)
    config = owner.config_class(**tiny | settings)
    content = config.to_dict()
    evidence = Evidence(owner, [content, content], 1000)
    return {key: evidence.effect_of(key, flatten(content).get(key, ABSENT)).matters for key in keys}


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


@pytest.mark.parametrize(
    ("name", "settings", "matter", "free"),
    [
        ("llama", {}, ["rms_norm_eps", "hidden_act", "rope_parameters.rope_theta"], ["max_position_embeddings"]),
        ("llama", rope("dynamic", factor=2.0), ["max_position_embeddings", "rope_parameters.factor"], []),
        ("llama", rope("linear", factor=2.0), ["rope_parameters.factor"], ["max_position_embeddings"]),
        ("mistral", {"sliding_window": 4096}, ["sliding_window"], ["attention_dropout", "use_cache", "eos_token_id"]),
        ("gemma2", {"sliding_window": 4096}, ["sliding_window", "final_logit_softcapping"], ["initializer_range"]),
        ("qwen2", {"sliding_window": 4096}, [], ["sliding_window", "max_window_layers"]),
        ("bert", {}, ["max_position_embeddings", "layer_norm_eps", "is_decoder"], ["hidden_dropout_prob"]),
        ("roberta", {}, ["pad_token_id"], ["bos_token_id", "classifier_dropout"]),
        ("llama-classes", {}, ["pad_token_id"], ["bos_token_id"]),
        ("mixtral", {}, ["num_experts_per_tok"], ["router_aux_loss_coef", "router_jitter_noise"]),
        ("whisper", {}, ["activation_function"], ["suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"]),
        ("wav2vec2", {}, ["conv_stride"], ["mask_time_prob", "ctc_zero_infinity", "apply_spec_augment"]),
        ("llava", {}, ["vision_config.layer_norm_eps", "projector_hidden_act"], ["text_config.attention_dropout"]),
        ("qwen2-vl", {}, ["vision_config.patch_size"], ["text_config.max_position_embeddings"]),
        ("t5", {}, ["relative_attention_max_distance"], ["dropout_rate", "n_positions"]),
        ("vit", {}, ["layer_norm_eps", "patch_size"], ["attention_probs_dropout_prob", "encoder_stride"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_by_what_they_do(name, settings, matter, free):
    expected = dict.fromkeys(matter, True) | dict.fromkeys(free, False)
    assert effects_of(name, *expected, **settings) == expected


def pair(tmp_path, name="llama", **settings):
    """Two folders of the same model, with other settings in the second's config.json."""
    a, b = tmp_path / "a", tmp_path / "b"
    build(name).save_pretrained(a)
    shutil.copytree(a, b)
    for key, value in settings.items():
        edit(b, key, value)
    return a, b


def test_the_refusal_names_each_setting_and_how_to_assume_it(tmp_path):
    a, b = pair(tmp_path, rms_norm_eps=0.1, hidden_act="gelu", use_cache=False)
    with pytest.raises(MismatchError) as refused:
        merge([a, b])
    text = str(refused.value)
    assert "rms_norm_eps is 0.1, not 1e-06 (the outputs of a small LlamaForCausalLM change with it)" in text
    assert "hidden_act is 'gelu', not 'silu'" in text
    assert "use_cache" not in text
    assert "--assume config:hidden_act --assume config:rms_norm_eps" in text


def test_one_setting_is_assumed_and_the_others_are_still_compared(tmp_path):
    a, b = pair(tmp_path, rms_norm_eps=0.1, hidden_act="gelu")
    with pytest.raises(MismatchError, match="hidden_act"):
        merge([a, b], assume=["config:rms_norm_eps"])
    merge([a, b], assume=["config:rms_norm_eps", "config:hidden_act"])
    merge([a, b], assume=["config"])
    with pytest.raises(MismatchError, match=r"--assume config:rms_norm_ep: neither .*did you mean 'rms_norm_eps'"):
        merge([a, b], assume=["config:rms_norm_ep"])


def test_settings_without_effect_are_noted_in_one_line(tmp_path, caplog):
    a, b = pair(tmp_path, unsloth_version="2026.3.4", max_position_embeddings=7, use_cache=False)
    caplog.set_level("INFO", "hf_rebasin")
    out = merge([a, b]).save(tmp_path / "out")
    notes = [record.getMessage() for record in caplog.records if "settings" in record.getMessage()]
    assert len(notes) == 1
    assert all(key in notes[0] for key in ("unsloth_version", "max_position_embeddings", "use_cache"))
    assert json.loads((out / "config.json").read_text()) == json.loads((a / "config.json").read_text())


def test_a_switch_counts_where_what_it_switches_would_take_effect(tmp_path):
    """Windows of 4,096 and none are equal on short inputs, with the switch on or off."""
    a, b = pair(tmp_path, "qwen2")
    for folder, uses in ((a, False), (b, True)):
        content = json.loads((folder / "config.json").read_text())
        del content["layer_types"]  # it follows from the others, as in folders that older versions wrote
        content |= {"use_sliding_window": uses, "sliding_window": 4096, "max_window_layers": 0}
        (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="layer_types is"):
        merge([a, b])


def test_a_class_that_nobody_knows_is_judged_by_the_code_beside_it(tmp_path):
    a, b = pair(tmp_path, gate_scale=2.0, trained_by="somebody")
    for folder in (a, b):
        edit(folder, "model_type", "my-own")
        edit(folder, "architectures", ["MyOwn"])
    with pytest.raises(MismatchError, match=r"gate_scale .*there is no class"):
        merge([a, b])
    for folder in (a, b):
        (folder / "modeling_own.py").write_text("def scale(config, x): return config.gate_scale * x\n")
    with pytest.raises(MismatchError) as refused:
        merge([a, b])
    assert "gate_scale is 2.0, and not set in the other (the code next to the model reads it)" in str(refused.value)
    assert "trained_by" not in str(refused.value)


def test_code_of_its_own_is_not_judged_by_the_class_of_its_type(tmp_path):
    """Code of a model may name a type of transformers; only where it names a class of it, too, that one is tried."""
    a, b = pair(tmp_path, gate_scale=2.0)
    for folder in (a, b):
        edit(folder, "auto_map", {"AutoModelForCausalLM": "modeling_own.Own"})
        (folder / "modeling_own.py").write_text("def scale(config, x): return config.gate_scale * x\n")
    merge([a, b])
    for folder in (a, b):
        edit(folder, "architectures", ["Own"])
    with pytest.raises(MismatchError, match=r"gate_scale is 2.0, .*the code next to the model reads it"):
        merge([a, b])


def test_code_that_builds_on_transformers_reads_what_that_reads(tmp_path):
    a, b = pair(tmp_path, rope_theta=5.0, mixture_depth=3)
    for folder in (a, b):
        edit(folder, "model_type", "my-own")
        (folder / "layers").mkdir()
        (folder / "layers" / "rotary.py").write_text("def turn(config, x): return x\n")
    merge([a, b])
    code = "from transformers.models.llama.modeling_llama import LlamaDecoderLayer\n"
    (a / "layers" / "rotary.py").write_text(code)
    with pytest.raises(
        MismatchError, match=r"rope_theta is 5.0, .*that of transformers which it builds on"
    ) as refused:
        merge([a, b])
    assert "mixture_depth" not in str(refused.value)
    (a / "layers" / "rotary.py").write_text(code + "def turn(config, x): return config.mixture_depth * x\n")
    with pytest.raises(MismatchError, match=r"mixture_depth is 3, .*the code next to the model reads it"):
        merge([a, b])


def test_settings_of_training_are_not_in_the_way_where_only_code_can_be_read(tmp_path):
    a, b = pair(tmp_path, use_cache=False, attention_dropout=0.3, pad_token_id=7)
    for folder in (a, b):
        edit(folder, "model_type", "my-own")
        names = ("use_cache", "attention_dropout", "pad_token_id", "head_scale")
        (folder / "modeling_own.py").write_text("".join(f"x = config.{name}\n" for name in names))
    merge([a, b])
    edit(b, "head_scale", 2.0)
    with pytest.raises(MismatchError, match=r"head_scale is 2.0"):
        merge([a, b])


def test_a_part_may_name_a_dtype_of_its_own(tmp_path):
    """Folders of older versions name the dtype of the language model, in which it would be built."""
    a, b = pair(tmp_path, "llava", vocab_size=99)
    for folder in (a, b):
        content = json.loads((folder / "config.json").read_text())
        content["text_config"]["torch_dtype"] = "float16"
        (folder / "config.json").write_text(json.dumps(content))
    merge([a, b])
    edit(b, "projector_hidden_act", "relu")
    with pytest.raises(MismatchError, match=r"projector_hidden_act is 'relu', .*the outputs of a small Llava"):
        merge([a, b])


def test_what_was_tried_once_is_not_tried_again(tmp_path, monkeypatch):
    a, b = pair(tmp_path, rms_norm_eps=0.1, use_cache=False)
    first = compare_settings(Checkpoint.open(a), Checkpoint.open(b))
    monkeypatch.setattr("hf_rebasin.alignment.evidence.Miniature", None)
    assert compare_settings(Checkpoint.open(a), Checkpoint.open(b)) == first
    edit(b, "rms_norm_eps", 0.2)
    with pytest.raises(TypeError):  # another question
        compare_settings(Checkpoint.open(a), Checkpoint.open(b))


def test_large_models_are_tried_in_a_small_size():
    """The default settings of a family are those of a model of billions of parameters."""
    config = transformers.LlamaConfig()
    miniature = Miniature(transformers.LlamaForCausalLM, config.to_dict(), 7 * 10**9)
    assert sum(tensor.numel() for tensor in miniature.state.values()) < 4 * 10**6
    assert miniature.settings["hidden_act"] == config.hidden_act
    assert miniature.settings["num_attention_heads"] == config.num_attention_heads
    with pytest.raises(CheckpointError, match="no small DetrForObjectDetection"):
        Miniature(transformers.DetrForObjectDetection, transformers.LlamaConfig().to_dict(), 10)


def test_there_are_many_settings_to_sample():
    pairs = list(list_settings())
    assert len({name for name, _ in pairs}) >= 60
    assert len(pairs) >= 1500
