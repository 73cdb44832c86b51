"""config.json: read as transformers reads it in old and new spellings, and written back as it was."""

import json
import math

import pytest
import torch
from conftest import same_tensors
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from hf_rebasin import Checkpoint, merge
from hf_rebasin.checkpoints.json_files import read_json, record_dtype, update_json
from hf_rebasin.checkpoints.model_classes import build_config, read_config

BARE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@pytest.fixture(scope="module")
def configs():
    """The default configurations of all model types of transformers that have one, by their types."""
    built = {}
    for name in CONFIG_MAPPING:
        try:
            built[name] = CONFIG_MAPPING[name]()
        except Exception:  # two types have no valid default
            continue
    assert len(built) > 700
    return built


def spell(value, old):
    """Return a JSON value with infinite numbers and NaN as old or new versions of transformers write them."""
    if isinstance(value, dict):
        return {key: spell(entry, old) for key, entry in value.items()}
    if isinstance(value, list):
        return [spell(entry, old) for entry in value]
    if isinstance(value, float) and not math.isfinite(value) and not old:
        return {"__float__": next(name for name, number in BARE.items() if repr(number) == repr(value))}
    return value


def write(folder, text):
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


def test_the_spellings_here_are_those_of_transformers():
    config = Mamba2Config(time_step_limit=(-math.inf, math.inf), layer_norm_epsilon=math.nan)
    content = json.loads(json.dumps(config.to_diff_dict()))
    assert json.loads(config.to_json_string()) == spell(content, old=False)
    assert "__float__" not in json.dumps(spell(content, old=True))


def test_infinite_settings_of_all_classes_are_read_and_written_in_both_spellings(configs, tmp_path):
    infinite = {name: config for name, config in configs.items() if "__float__" in config.to_json_string()}
    assert infinite.keys() >= {"mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"}
    for name, config in infinite.items():
        content = json.loads(json.dumps(config.to_diff_dict()))
        texts = [json.dumps(spell(content, old), indent=2, sort_keys=True) + "\n" for old in (False, True)]
        assert texts[0] == config.to_json_string()
        new, old = (write(tmp_path / f"{name}-{i}", text) for i, text in enumerate(texts))
        assert read_config(new) == read_config(old) == content
        for folder, text in ((new, texts[0]), (old, texts[1])):
            file = folder / "config.json"
            assert build_config(read_config(folder), None).to_dict() == config.to_dict()
            update_json(file, read_config(folder))
            record_dtype(file, str(config.dtype or "float32").removeprefix("torch."))
            assert file.read_text() == text, "nothing changes, not even a byte"
            update_json(file, {**read_config(folder), "tie_word_embeddings": "changed"})
            changed = json.loads(text) | {"tie_word_embeddings": "changed"}
            assert json.loads(file.read_text()) == changed, "each number keeps its spelling"
            update_json(file, json.loads(text))
            assert AutoConfig.from_pretrained(folder).to_diff_dict() == config.to_diff_dict()


def test_a_number_that_changes_is_another_one(tmp_path):
    folder = write(tmp_path / "x", '{"a": {"__float__": "NaN"}, "b": [0.0, {"__float__": "Infinity"}], "c": Infinity}')
    content = read_json(folder / "config.json")
    assert (math.isnan(content["a"]), content["b"], content["c"]) == (True, [0.0, math.inf], math.inf)
    update_json(folder / "config.json", {**content, "b": [0.0, -math.inf], "c": 1.0})
    assert json.loads((folder / "config.json").read_text()) == {
        "a": {"__float__": "NaN"},
        "b": [0.0, -math.inf],
        "c": 1.0,
    }
    tagged = {"__float__": "pi"}, {"__float__": "NaN", "more": 1}, {"__float__": 1}
    update_json(folder / "config.json", {"tags": tagged})
    assert read_json(folder / "config.json")["tags"] == list(tagged), "transformers reads none of these as a number"


def mamba(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "num_hidden_layers": 1}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, vocab_size=32, n_groups=1, chunk_size=8))


def test_models_in_both_spellings_are_merged(tmp_path):
    for seed in (0, 1):
        mamba(seed).save_pretrained(tmp_path / f"{seed}")
    file = tmp_path / "1/config.json"
    file.write_text(json.dumps(read_json(file)))
    assert "Infinity]" in file.read_text()
    for models in ("01", "10"):
        folders = [tmp_path / name for name in models]
        out = merge(folders).save(tmp_path / f"out-{models}")
        assert (out / "config.json").read_bytes() == (folders[0] / "config.json").read_bytes()
        assert same_tensors(Mamba2ForCausalLM.from_pretrained(out), out)
        half = merge(folders, dtype=torch.bfloat16).save(tmp_path / f"half-{models}")
        before = json.loads((folders[0] / "config.json").read_text())
        assert json.loads((half / "config.json").read_text()) == before | {"dtype": "bfloat16"}


# --- dtypes ----------------------------------------------------------------------------------------------------------


def list_parts(config):
    """List the configurations of the parts of a model, at any depth."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [inner for part in parts if part is not None for inner in (part, *list_parts(part))]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_all_parts_of_all_classes_follows(configs, tmp_path, key):
    count = 0
    for name, config in configs.items():
        if not (parts := list_parts(config)):
            continue
        for part in (config, *parts):
            part.dtype = torch.float32
        text = config.to_json_string().replace('"dtype":', f'"{key}":')
        folder = write(tmp_path / name, text)
        record_dtype(folder / "config.json", "bfloat16")
        changed = (folder / "config.json").read_text()
        assert changed == text.replace(f'"{key}": "float32"', f'"{key}": "bfloat16"')
        try:
            loaded = AutoConfig.from_pretrained(folder)
        except Exception:  # of classes that do not read their own defaults
            continue
        count += 1
        assert {part.dtype for part in (loaded, *list_parts(loaded))} == {torch.bfloat16}, name
    assert count > 100


def test_a_token_may_be_called_dtype(tmp_path):
    folder = write(
        tmp_path / "x", json.dumps({"dtype": "float32", "vocabulary_map": {"dtype": 7}, "id": {"dtype": None}})
    )
    record_dtype(folder / "config.json", "float16")
    content = json.loads((folder / "config.json").read_text())
    assert content == {"dtype": "float16", "vocabulary_map": {"dtype": 7}, "id": {"dtype": None}}


def llava(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, vocab_size=32, num_key_value_heads=1, dtype="float32")
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16, dtype="float32")
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


def test_a_model_of_several_parts_is_loaded_in_the_dtype_that_was_asked_for(tmp_path):
    for seed in (0, 1):
        llava(seed).save_pretrained(tmp_path / f"{seed}")
    before = json.loads((tmp_path / "0/config.json").read_text())
    assert before["text_config"]["dtype"] == before["vision_config"]["dtype"] == "float32"
    out = merge([tmp_path / "0", tmp_path / "1"], dtype=torch.bfloat16).save(tmp_path / "out")
    for part in (before, before["text_config"], before["vision_config"]):
        part["dtype"] = "bfloat16"
    assert json.loads((out / "config.json").read_text()) == before
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {part.dtype for part in (model.config, *list_parts(model.config))} == {torch.bfloat16}


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], []])
def test_of_a_configuration_only_the_dtype_changes(bert, tmp_path, keys):
    entry = dict.fromkeys(keys, str(bert.dtype).removeprefix("torch."))
    for name in "ab":
        folder = Checkpoint.open(bert).save(tmp_path / name)
        content = read_json(folder / "config.json")
        content = {key: value for key, value in content.items() if key != "dtype"} | entry
        shuffled = dict(sorted(content.items(), key=lambda item: item[0][::-1]))
        (folder / "config.json").write_text(json.dumps(shuffled, indent=4))
    models, text = [tmp_path / "a", tmp_path / "b"], (tmp_path / "a/config.json").read_text()
    same = merge(models).save(tmp_path / "same")
    assert (same / "config.json").read_text() == text
    half = merge(models, dtype=torch.float16).save(tmp_path / "half")
    expected = json.loads(text) | dict.fromkeys(entry or ["dtype"], "float16")  # other engines read it there alone
    assert list(json.loads((half / "config.json").read_text()).items()) == list(expected.items())
    loaded = type(bert).from_pretrained(half, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
