"""Names: files of one class in other spellings or with wrappers around modules, and outputs that would not load."""

import json
import re
import warnings
from functools import cache

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from conftest import same_tensors
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.models.auto import modeling_auto

from hf_rebasin import Checkpoint, align, merge
from hf_rebasin.checkpoints import checkpoint as checkpoint_module
from hf_rebasin.checkpoints.conversion import ClassLayout, unwrap
from hf_rebasin.checkpoints.lazy import InMemory
from hf_rebasin.errors import CheckpointError, MismatchError

SINGLE = "model.safetensors"


def save_tiny(folder, name, seed=0, **more):
    """Save a random model of `ARCHITECTURES` and return its folder."""
    class_name, settings = ARCHITECTURES[name]
    owner = getattr(transformers, class_name)
    torch.manual_seed(seed)
    owner(owner.config_class(**settings)).save_pretrained(folder, **more)
    return folder


def respell(folder, spell):
    """Rename the tensors of a folder; a key becomes `spell(key)`, and is dropped where that is None."""
    tensors = load_file(folder / SINGLE)
    renamed = {spell(key): tensor for key, tensor in tensors.items()}
    renamed.pop(None, None)
    save_file({key: tensor.clone() for key, tensor in renamed.items()}, folder / SINGLE, {"format": "pt"})
    return folder


def configure(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def load_values(folder):
    """Return the tensors of the module that transformers loads, all of which it must find."""
    config = transformers.AutoConfig.from_pretrained(folder)
    owner = getattr(transformers, config.architectures[0])
    model, info = owner.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.state_dict()


def assert_mean(out, a, b):
    """Check that a merge has the keys of the first model, and loads as the mean of what the two load as."""
    assert load_file(out / SINGLE).keys() == load_file(a / SINGLE).keys()
    x, y, merged = load_values(a), load_values(b), load_values(out)
    for key, value in merged.items():
        if value.is_floating_point():
            assert torch.allclose(value, ((x[key].double() + y[key]) / 2).to(value.dtype)), key


# --- every class that declares patterns ------------------------------------------------------------------------------


def classes_by_type():
    classes = {}
    for name in dir(modeling_auto):
        mapping = getattr(modeling_auto, name)
        if name.endswith("_MAPPING_NAMES") and isinstance(mapping, dict):
            for model_type, owners in mapping.items():
                classes.setdefault(model_type, []).extend([owners] if isinstance(owners, str) else owners)
    return classes


def converted_classes():
    """Return the names of classes for which transformers declares patterns, one or two for each entry."""
    by_type, names = classes_by_type(), []
    for entry in conversion_mapping._build_checkpoint_conversion_mapping():
        owners = by_type.get(entry, [entry])
        with_head = [name for name in owners if re.search("Conditional|CausalLM|PreTraining|Detection", name)]
        names += [owners[0], *with_head[:1]]
    known = [name for name in dict.fromkeys(names) if isinstance(getattr(transformers, name, None), type)]
    return [name for name in known if getattr(getattr(transformers, name), "config_class", None) is not None]


CLASSES = converted_classes()
SAMPLED = {name for i, name in enumerate(CLASSES) if i % 12 == 0} | {"MixtralForCausalLM", "Qwen2_5_VLModel"}


@cache
def small_layout(name):
    """Return the layout of a class with few layers and experts where it can be built so, else as it is by default."""
    owner = getattr(transformers, name)
    for shrink in (True, False):
        config = owner.config_class()
        for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict") and shrink)):
            for key, value in list(vars(part).items()):
                if shrink and type(value) is int and re.search(r"(layers|depth|experts)$", key):
                    setattr(part, key, min(value, 4 if "experts" in key else 2))
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                return ClassLayout(config, owner(config).eval())
        except Exception:  # a class may refuse whatever it likes
            continue
    pytest.skip(f"{name} cannot be built from its default configuration")


@pytest.mark.parametrize("name", [n if n in SAMPLED else pytest.param(n, marks=pytest.mark.slow) for n in CLASSES])
def test_every_spelling_of_a_class_has_the_same_names(name):
    """The file that `save_pretrained` writes, the one with the keys of the module, and both with old spellings."""
    layout = small_layout(name)
    renamed, converted = layout._written
    written = {key: InMemory.of(layout.state[own]) for own, key in renamed.items()}
    written |= {key: InMemory.of(tensor) for key, tensor in converted.items()}
    plain = {key: InMemory.of(tensor) for key, tensor in layout.state.items()}
    assert layout.usual_names(written) == {key: key for key in written}
    assert layout.usual_names(plain) == {key: renamed.get(key, key) for key in plain}
    for parts in (written, plain):
        loading = layout.load(parts)
        assert not [*loading.missing, *loading.unexpected, *loading.mismatched, *loading.failed]
    made = layout.module_tensors(written)
    assert {key: part.shape for key, part in made.items()} == {key: part.shape for key, part in plain.items()}
    made = layout.written_tensors(plain)
    assert {key: part.shape for key, part in made.items()} == {key: part.shape for key, part in written.items()}
    old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", key): key for key in written}
    for new, before in (("original0", "weight_g"), ("original1", "weight_v")):
        old = {spelling.replace(f".parametrizations.weight.{new}", f".{before}"): key for spelling, key in old.items()}
    assert layout.usual_names(old) == old


def test_there_are_classes_with_patterns():
    assert len(CLASSES) > 200
    assert len(SAMPLED) < len(CLASSES) / 8


def test_a_key_that_no_class_has_has_no_name():
    layout = small_layout("BertModel")
    assert layout.usual_names(["encoder.layer.0.attention.self.query.weight", "v_head.weight"]).keys() == {
        "encoder.layer.0.attention.self.query.weight"
    }
    assert layout.ignored(["embeddings.position_ids", "v_head.weight"]) == {"embeddings.position_ids"}


# --- merges of files in other spellings ------------------------------------------------------------------------------

OLDER = {
    "wav2vec2": lambda key: key.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    ),
    "bert": lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    "gpt2": lambda key: key.removeprefix("transformer."),
    "llama": lambda key: key.removeprefix("model."),
}


@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize("older", [0, 1])
def test_old_and_new_names_are_merged(name, older, tmp_path):
    folders = [save_tiny(tmp_path / str(seed), name, seed) for seed in (0, 1)]
    plain = load_file(folders[older] / SINGLE)
    respell(folders[older], OLDER[name])
    assert load_file(folders[older] / SINGLE).keys() != plain.keys()
    assert_mean(merge(folders).save(tmp_path / "merged"), *folders)


def test_names_of_vision_language_models_before_and_since(tmp_path):
    folders = [save_tiny(tmp_path / str(seed), "qwen2-vl", seed) for seed in (0, 1)]
    before = {"model.visual.": "visual.", "model.language_model.": "model."}
    since = {value: key for key, value in before.items()}

    def spell(table, key):
        return next((new + key.removeprefix(old) for old, new in table.items() if key.startswith(old)), key)

    usual = load_file(folders[1] / SINGLE).keys()
    table = before if any(key.startswith("model.visual.") for key in usual) else since
    respell(folders[1], lambda key: spell(table, key))
    assert load_file(folders[1] / SINGLE).keys() != usual
    for a, b in (folders, folders[::-1]):
        assert_mean(merge([a, b]).save(tmp_path / f"merged-{a.name}"), a, b)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3-moe", marks=pytest.mark.slow), "jamba"])
def test_experts_one_by_one_and_stacked(name, tmp_path):
    apart = [save_tiny(tmp_path / f"apart-{seed}", name, seed) for seed in (0, 1)]
    stacked = [save_tiny(tmp_path / f"stacked-{seed}", name, seed, save_original_format=False) for seed in (0, 1)]
    assert len(load_file(stacked[0] / SINGLE)) < len(load_file(apart[0] / SINGLE))
    assert_mean(merge([apart[0], stacked[1]]).save(tmp_path / "one"), apart[0], apart[1])
    assert_mean(merge([stacked[0], apart[1]]).save(tmp_path / "two"), stacked[0], apart[1])


def test_experts_that_one_model_lacks_are_not_made_up(tmp_path):
    apart, stacked = (
        save_tiny(tmp_path / "a", "mixtral"),
        save_tiny(tmp_path / "b", "mixtral", save_original_format=False),
    )
    respell(stacked, lambda key: None if "layers.1.mlp.experts.down_proj" in key else key)
    with pytest.raises(MismatchError, match=r"it lacks: .*layers\.1\..*experts\.0"):
        merge([apart, stacked])


def test_a_model_with_old_names_is_aligned(tmp_path):
    a, b = save_tiny(tmp_path / "a", "wav2vec2"), save_tiny(tmp_path / "b", "wav2vec2", 1)
    moved = align(a, b).alignment.apply(Checkpoint.open(b))
    respell(a, OLDER["wav2vec2"])
    assert same_tensors(align(a, b).alignment.apply(Checkpoint.open(b)), moved)


# --- wrappers --------------------------------------------------------------------------------------------------------

WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "parallel": lambda key: f"module.{key}",
    "compiled and parallel": lambda key: f"module._orig_mod.{key}",
    "sharded": lambda key: f"_fsdp_wrapped_module.{key}",
    "sharded layers": lambda key: re.sub(
        r"(layer\.\d+)\.", r"\1._fsdp_wrapped_module.", f"_fsdp_wrapped_module.{key}"
    ),
    "compiled layers": lambda key: re.sub(r"(layer\.\d+)\.", r"\1._orig_mod.", key),
    "checkpointed": lambda key: re.sub(r"(layer\.\d+)\.", r"\1._checkpoint_wrapped_module.", key),
    "parallel backbone": lambda key: key.replace("bert.", "bert.module.", 1),
    "in Fabric": lambda key: f"_forward_module.{key}",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off(name, tmp_path, caplog):
    folder = save_tiny(tmp_path / "model", "bert")
    plain = load_file(folder / SINGLE)
    respell(folder, WRAPPED[name])
    caplog.set_level("INFO", "hf_rebasin")
    assert same_tensors(Checkpoint.open(folder), plain)
    (note,) = caplog.messages
    wrappers = set(re.findall(r"module|_\w+_mod(?:ule)?", WRAPPED[name]("bert.encoder.layer.0.x")))
    assert all(f"{wrapper}." in note for wrapper in wrappers)
    assert "is taken off" in note


def test_what_a_class_calls_module_stays():
    class Layout:
        def find_tensors(self, keys):
            return {key: key for key in keys if key in ("module.weight", "base.module.bias", "head.weight")}

    assert unwrap(["module.weight", "base.module.bias"], Layout) == {}
    assert unwrap(["module.head.weight"], Layout) == {"module.head.weight": "head.weight"}
    assert unwrap(["module.weight"], lambda: None) == {}  # nobody knows its class
    assert unwrap(["_orig_mod.module.weight"], lambda: None) == {"_orig_mod.module.weight": "module.weight"}


def test_two_tensors_do_not_become_one(tmp_path):
    folder = save_tiny(tmp_path / "model", "bert")
    tensors = load_file(folder / SINGLE)
    key = next(iter(tensors))
    save_file(tensors | {f"_orig_mod.{key}": tensors[key].clone()}, folder / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match="with and without its wrapper"):
        Checkpoint.open(folder)


def test_models_without_a_class_are_matched_through_their_wrapper(tmp_path):
    tensors = {"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3)}
    for name, prefix in (("a", ""), ("b", "module.")):
        (tmp_path / name).mkdir()
        save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / name / SINGLE)
    assert same_tensors(merge([tmp_path / "a", tmp_path / "b"]), tensors)


# --- outputs ---------------------------------------------------------------------------------------------------------

DAMAGE = {
    "missing": (lambda tensors, key: {k: t for k, t in tensors.items() if k != key}, r"it lacks .*query\.weight"),
    "unexpected": (lambda tensors, key: tensors | {"bert.more": tensors[key].clone()}, r"it has bert\.more, which"),
    "mismatched": (lambda tensors, key: tensors | {key: tensors[key][:-1].clone()}, r".*query\.weight is \(15, 16\)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_output_that_would_not_load_is_not_written(name, tmp_path, monkeypatch):
    folder, (damage, message) = save_tiny(tmp_path / "model", "bert"), DAMAGE[name]
    write = checkpoint_module.write_tensors

    def write_damaged(folder, *arguments):
        checksums = write(folder, *arguments)
        damaged = damage(load_file(folder / SINGLE), "bert.encoder.layer.0.attention.self.query.weight")
        save_file(damaged, folder / SINGLE, {"format": "pt"})
        return checksums

    monkeypatch.setattr(checkpoint_module, "write_tensors", write_damaged)
    with pytest.raises(CheckpointError, match=rf"would not load into BertForMaskedLM as .*model does: {message}"):
        merge([folder, folder]).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_model_lacks_itself_is_noted(tmp_path, caplog):
    folder = save_tiny(tmp_path / "model", "bert")
    tensors = load_file(folder / SINGLE)
    key = "cls.predictions.transform.dense.bias"
    save_file(
        {k: t for k, t in tensors.items() if k != key} | {"v_head.weight": torch.ones(1)},
        folder / SINGLE,
        {"format": "pt"},
    )
    caplog.set_level("INFO", "hf_rebasin")
    out = merge([folder, folder]).save(tmp_path / "out")
    assert (
        f"{out} is loaded by BertForMaskedLM with {key} newly initialised and v_head.weight left out, as {folder} is"
        in (caplog.messages)
    )


def test_a_sound_output_needs_no_note(tmp_path, caplog):
    folder = save_tiny(tmp_path / "model", "bert")
    caplog.set_level("INFO", "hf_rebasin")
    merge([folder, folder]).save(tmp_path / "out")
    assert not [message for message in caplog.messages if "loaded" in message or "checked" in message]


def test_a_model_that_does_not_load_is_refused(tmp_path):
    folder = configure(save_tiny(tmp_path / "model", "llama"), vocab_size=50)
    message = r"model does not load: lm_head.weight is \(51, 16\).*with vocab_size 50 .* \(50, 16\)"
    with pytest.raises(CheckpointError, match=message):
        merge([folder, folder])


def test_where_transformers_fails_the_output_is_not_checked(tmp_path, monkeypatch, caplog):
    folder = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr("transformers.core_model_loading.convert_and_load_state_dict_in_model", None)
    monkeypatch.setattr("hf_rebasin.checkpoints.conversion._layouts", {})  # with what was loaded before
    monkeypatch.setattr("hf_rebasin.checkpoints.checkpoint.read_answer", lambda file: None)  # or remembered
    caplog.set_level("INFO", "hf_rebasin")
    merge([folder, folder]).save(tmp_path / "out")
    (note,) = [message for message in caplog.messages if "not checked against a class" in message]
    assert "transformers cannot load it into LlamaForCausalLM: TypeError" in note


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"auto_map": {"AutoModel": "modeling_mine.Mine"}}, "its code is its own"),
        ({"architectures": ["MyLlama"]}, "names MyLlama"),
        ({"architectures": None}, "names none"),
        ({"model_type": "mine"}, r"does not know its type \(mine\)"),
    ],
)
def test_what_has_no_class_is_not_checked(settings, reason, tmp_path, caplog):
    folder = configure(save_tiny(tmp_path / "model", "llama"), **settings)
    caplog.set_level("INFO", "hf_rebasin")
    merge([folder, folder]).save(tmp_path / "out")
    (note,) = [message for message in caplog.messages if "not checked against a class" in message]
    assert re.search(reason, note)
