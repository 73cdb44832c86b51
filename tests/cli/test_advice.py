"""No dead ends: whatever a message recommends works, or leads on; where nothing helps, nothing is recommended."""

import ast
import copy
import json
import re
from collections import defaultdict

import datasets
import pytest
import torch
import transformers
import yaml
from advice import OPTION, Attempt, BadAdvice, Follower, attempt, parameters_of, read_advice
from architectures import ARCHITECTURES
from conftest import HUB, ROOT
from huggingface_hub import HfApi
from published import digits, processor, push_parts, resnet, run_ok, vit, write_digits
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_rebasin.cli.main import VERBS
from hf_rebasin.text import without_advice

TOKENS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))]
SINGLE = "model.safetensors"
PLACEHOLDERS = {"ORG/NAME": "org/advised", "LICENSE": "mit", "NAME": "train", "FILE.safetensors": "moved.safetensors"}
WORKING, HOPELESS = {}, {}


def case(function):
    """Note a command whose output recommends something."""
    WORKING[function.__name__.replace("_", " ")] = function
    return function


def hopeless(function):
    """Note a command that nothing helps."""
    HOPELESS[function.__name__.replace("_", " ")] = function
    return function


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Whatever a command writes under a relative name is written here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def follower(tmp_path, data):
    return Follower(tmp_path / "scratch", PLACEHOLDERS | {"DATASET": str(data)})


@pytest.mark.parametrize("name", WORKING)
def test_advice_works(name, tmp_path, data, follower):
    assert follower.follow(attempt(WORKING[name](tmp_path, data))), "something is recommended"


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKING)
def test_advice_works_when_it_is_carried_out(name, tmp_path, data):
    """A merge may fail where its plan does not: with values, and when it is written."""
    real = Follower(tmp_path / "scratch", PLACEHOLDERS | {"DATASET": str(data)}, dry=False)
    real.follow(attempt(WORKING[name](tmp_path, data), dry=False))


@pytest.mark.parametrize("name", HOPELESS)
def test_nothing_is_recommended_where_nothing_helps(name, tmp_path, data):
    tried = attempt(HOPELESS[name](tmp_path, data))
    assert tried.status == (tried.verb != "compare"), tried
    assert read_advice(tried) == [], tried


def test_there_are_enough_refusals():
    assert len(WORKING) >= 30


# --- models ----------------------------------------------------------------------------------------------------------


def save(folder, kind="llama", seed=0, tokens=None, **settings):
    """Save a tiny model with random weights, and a tokenizer if tokens are given."""
    name, usual = ARCHITECTURES[kind]
    owner = getattr(transformers, name)
    torch.manual_seed(seed)
    owner(owner.config_class(**copy.deepcopy(usual | settings))).save_pretrained(folder)
    if tokens is not None:
        save_tokens(folder, tokens)
    return folder


def save_tokens(folder, tokens):
    words = Tokenizer(models.WordLevel({token: row for row, token in enumerate(tokens)}, unk_token=tokens[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token=tokens[0]).save_pretrained(folder)


def configure(folder, **settings):
    """Change settings in a configuration; None removes them."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def change_tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors), folder / SINGLE, {"format": "pt"})
    return folder


def merging(folder, kind="llama", first=None, second=None, options=(), **both):
    """Return a command that merges two models of other seeds."""
    a = save(folder / "a", kind, 0, **both | (first or {}))
    b = save(folder / "b", kind, 1, **both | (second or {}))
    return ("merge", a, b, "-o", folder / "out", *options)


def comparing(command):
    """Return the comparison of the models that a command merges."""
    return ("compare", *command[1:3])


def names(*labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


# --- settings --------------------------------------------------------------------------------------------------------


@case
def another_eps(folder, data):
    return merging(folder, first={"rms_norm_eps": 1e-6}, second={"rms_norm_eps": 1e-5})


@case
def another_activation_and_eps(folder, data):
    return merging(folder, "bert", second={"hidden_act": "relu", "layer_norm_eps": 1e-3})


@case
def another_eps_to_align(folder, data):
    _, a, b, *_ = merging(folder, first={"rms_norm_eps": 1e-6}, second={"rms_norm_eps": 1e-5})
    return ("align", a, b, "-o", folder / "out")


@case
def another_eps_in_a_recipe(folder, data):
    _, a, b, *_ = merging(folder, first={"rms_norm_eps": 1e-6}, second={"rms_norm_eps": 1e-5})
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"models": [str(a), str(b)]}))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out")


@case
def a_misspelt_setting(folder, data):
    other = {"rms_norm_eps": 1e-5}
    return merging(folder, second=other, options=("--assume", "config:rms_norm_epz"))


@case
def another_class_of_the_same_type(folder, data):
    a, b = save(folder / "a", "bert"), save(folder / "b", "bert", 1)
    return ("merge", a, configure(b, architectures=["BertForPreTraining"]), "-o", folder / "out")


@case
def a_class_with_another_head(folder, data):
    return ("merge", save(folder / "a"), save(folder / "b", "llama-classes", 1), "-o", folder / "out")


@case
def a_head_for_values(folder, data):
    command = merging(folder)
    change_tensors(command[2], lambda tensors: tensors | {"v_head.summary.weight": torch.ones(1, 16)})
    return command


@case
def another_eps_compared(folder, data):
    return comparing(another_eps(folder, data))


@case
def a_class_with_another_head_compared(folder, data):
    return comparing(a_class_with_another_head(folder, data))


@case
def a_head_for_values_compared(folder, data):
    return comparing(a_head_for_values(folder, data))


@case
def another_head_to_interpolate(folder, data):
    a, b = with_processor(folder / "a"), with_other_labels(folder / "b")
    return ("interpolate", a, b, "--data", data)


@case
def heads_that_the_table_lacks(folder, data):
    command = a_head_for_values(folder, data)
    change_tensors(command[1], lambda tensors: tensors | {"v_head.summary.weight": torch.zeros(1, 16)})
    return command


@hopeless
def a_head_that_the_table_lacks(folder, data):
    return ("inspect", a_head_for_values(folder, data)[2])


# --- labels ----------------------------------------------------------------------------------------------------------


@case
def labels_without_names(folder, data):
    return merging(folder, "roberta", second=names("bad", "fair", "good"))


@case
def other_numbers_of_labels(folder, data):
    return merging(folder, "roberta", first={"num_labels": 3}, second={"num_labels": 4})


@case
def other_numbers_of_labels_compared(folder, data):
    return comparing(other_numbers_of_labels(folder, data))


@case
def other_names_of_labels(folder, data):
    return merging(folder, "roberta", first=names("low", "mid", "high"), second=names("bad", "fair", "good"))


@case
def other_names_of_labels_compared(folder, data):
    return comparing(other_names_of_labels(folder, data))


# --- tokens ----------------------------------------------------------------------------------------------------------


@case
def added_tokens(folder, data):
    more = [*TOKENS, "<|start|>", "<|end|>"]
    return merging(folder, first=dict(vocab_size=48, tokens=TOKENS), second=dict(vocab_size=50, tokens=more))


@case
def added_tokens_compared(folder, data):
    return comparing(added_tokens(folder, data))


@case
def added_tokens_that_are_not_common(folder, data):
    more = [*TOKENS, "<|start|>", "<|end|>"]
    first, second = dict(vocab_size=50, tokens=more), dict(vocab_size=48, tokens=TOKENS)
    return merging(folder, first=first, second=second, options=("--vocabulary", "common"))


@case
def rows_for_padding(folder, data):
    return merging(folder, first=dict(vocab_size=64, tokens=TOKENS), second=dict(vocab_size=48, tokens=TOKENS))


@case
def rows_for_padding_to_align(folder, data):
    _, a, b, *_ = rows_for_padding(folder, data)
    return ("align", a, b, "-o", folder / "out")


@case
def other_rows_without_tokenizers(folder, data):
    return merging(folder, first={"vocab_size": 48}, second={"vocab_size": 64})


@case
def rows_that_cannot_be_cut(folder, data):
    return merging(folder, first={"vocab_size": 64}, second={"vocab_size": 48}, options=("--vocabulary", "common"))


@case
def other_tokens(folder, data):
    other = [*TOKENS[:24], *(f"v{i}" for i in range(24))]
    return merging(folder, vocab_size=48, first={"tokens": TOKENS}, second={"tokens": other})


@case
def no_token_in_common(folder, data):
    other = ["[UNK]", *(f"v{i}" for i in range(47))]
    return merging(folder, vocab_size=48, first={"tokens": TOKENS}, second={"tokens": other})


@case
def a_tokenizer_that_cannot_be_loaded(folder, data):
    command = merging(folder, vocab_size=48, first={"tokens": TOKENS}, second={"tokens": TOKENS})
    (command[2] / "tokenizer.json").write_text("{}")
    return command


@case
def tokens_of_an_unknown_type(folder, data):
    command = merging(folder, vocab_size=48, first={"tokens": TOKENS}, second={"tokens": TOKENS[::-1]})
    for model in command[1:3]:
        configure(model, model_type="of-tomorrow")
    return command


# --- symmetries ------------------------------------------------------------------------------------------------------


@case
def an_unknown_type(folder, data):
    command = merging(folder)
    for model in command[1:3]:
        configure(model, model_type="of-tomorrow")
    return command


@case
def an_unknown_type_compared(folder, data):
    return comparing(an_unknown_type(folder, data))


@case
def an_unknown_type_in_a_recipe(folder, data):
    _, a, b, *_ = an_unknown_type(folder, data)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"models": [str(a), str(b)]}))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out")


@case
def code_of_its_own(folder, data):
    command = merging(folder)
    for model in command[1:3]:
        (model / "modeling_own.py").write_text("class Own: pass\n")
        configure(model, model_type="own", architectures=["Own"], auto_map={"AutoModel": "modeling_own.Own"})
    return command


@case
def tensors_alone(folder, data):
    command = merging(folder)
    for model in command[1:3]:
        (model / "config.json").unlink()
    return command


@case
def tensors_alone_compared(folder, data):
    return comparing(tensors_alone(folder, data))


@case
def experts_trained_apart_compared(folder, data):
    return comparing(merging(folder, "mixtral"))


@case
def trained_apart_compared(folder, data):
    return comparing(merging(folder))


@case
def fine_tunes_compared(folder, data):
    _, a, b, *_ = merging(folder)
    save_file({key: x + 1e-3 for key, x in load_file(a / SINGLE).items()}, b / SINGLE, {"format": "pt"})
    return ("compare", a, b)


@case
def a_misspelt_symmetry_to_hold(folder, data):
    return merging(folder, options=("--hold", "residul"))


@case
def a_head_that_is_untied(folder, data):
    return merging(folder, "llama-tied")


def write_dense(folder, seed, width=16):
    """Write a Dense as sentence-transformers stores it, and the modules.json that names it."""
    kinds = {"": "Transformer", "2_Dense": "Dense"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": width, "out_features": 4}))
    draw = torch.Generator().manual_seed(seed)
    tensors = {"linear.weight": torch.randn(4, width, generator=draw), "linear.bias": torch.zeros(4)}
    save_file(tensors, folder / "2_Dense" / SINGLE, {"format": "pt"})
    return folder


@case
def a_sub_model_behind_what_moves(folder, data):
    command = merging(folder)
    for seed, model in enumerate(command[1:3]):
        write_dense(model, seed)
    return command


@case
def a_sub_model_that_the_other_lacks(folder, data):
    command = merging(folder, options=("--no-align",))
    write_dense(command[1], 0)
    return command


@case
def a_class_without_known_inputs(folder, data):
    return ("inspect", save(folder / "a", "encodec"))


@case
def a_class_without_known_inputs_to_merge(folder, data):
    return merging(folder, "encodec")


@case
def a_class_without_known_inputs_compared(folder, data):
    return comparing(merging(folder, "encodec"))


@hopeless
def an_unknown_type_to_check(folder, data):
    return ("check", an_unknown_type(folder, data)[1])


@case
def an_unknown_type_to_align(folder, data):
    return ("align", *an_unknown_type(folder, data)[1:3], "-o", folder / "out")


@case
def another_head_to_align(folder, data):
    return ("align", *a_head_for_values(folder, data)[1:3], "-o", folder / "out")


@case
def a_misspelt_symmetry_to_hold_while_aligning(folder, data):
    return ("align", *merging(folder)[1:3], "-o", folder / "out", "--hold", "residul")


@case
def the_symmetries_of_an_unknown_type(folder, data):
    return ("inspect", an_unknown_type(folder, data)[1])


# --- formats ---------------------------------------------------------------------------------------------------------


def beside_model(folder, model):
    """Return a command that merges a usual model with the one given."""
    return ("merge", save(folder / "usual"), model, "-o", folder / "out")


def make_adapter(folder, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base"} | settings))
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    return folder


@case
def an_adapter(folder, data):
    return beside_model(folder, make_adapter(folder / "adapter", peft_type="LORA", task_type="CAUSAL_LM"))


@case
def an_adapter_beside_a_model(folder, data):
    return beside_model(folder, make_adapter(save(folder / "both", seed=1), peft_type="LORA"))


@case
def an_adapter_on_the_hub_beside_a_model(folder, data):
    push_parts("org/advised-both", transformers.AutoModelForCausalLM.from_pretrained(save(folder / "both", seed=1)))
    HfApi().upload_folder(repo_id="org/advised-both", folder_path=make_adapter(folder / "adapter", peft_type="LORA"))
    return beside_model(folder, "org/advised-both")


@case
def matrices_of_an_adapter(folder, data):
    model = save(folder / "lora", seed=1)

    def wrap(tensors):
        stem = "model.layers.0.self_attn.q_proj."
        base = tensors.pop(f"{stem}weight")
        factors = {
            f"{stem}lora_A.default.weight": torch.ones(2, 16),
            f"{stem}lora_B.default.weight": torch.ones(16, 2),
        }
        return tensors | factors | {f"{stem}base_layer.weight": base}

    return beside_model(folder, change_tensors(model, wrap))


@case
def pointers_of_git_lfs(folder, data):
    model = save(folder / "clone", seed=1)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976698672\n"
    (model / SINGLE).write_text(pointer)
    return beside_model(folder, model)


@case
def a_variant(folder, data):
    model = save(folder / "variant", seed=1)
    (model / SINGLE).rename(model / "model.fp16.safetensors")
    return beside_model(folder, model)


@case
def weights_of_tensorflow(folder, data):
    model = save(folder / "tf", seed=1)
    (model / SINGLE).rename(model / "tf_model.h5")
    return beside_model(folder, model)


@case
def a_pipeline_of_diffusers(folder, data):
    pipelines = [folder / "a", folder / "b"]
    for seed, pipeline in enumerate(pipelines):
        save(pipeline / "text_encoder", "bert", seed)
        (pipeline / "model_index.json").write_text("{}")
    return ("merge", *pipelines, "-o", folder / "out")


@case
def floats_of_eight_bits(folder, data):
    model = save(folder / "small", seed=1)
    change_tensors(model, lambda tensors: {key: x.to(torch.float8_e4m3fn) for key, x in tensors.items()})
    return beside_model(folder, model)


@case
def a_pickle_of_a_training_run(folder, data):
    model = save(folder / "run", seed=1)
    torch.save({"state_dict": load_file(model / SINGLE), "epoch": 3}, model / "pytorch_model.bin")
    (model / SINGLE).unlink()
    return beside_model(folder, model)


@case
def a_pickle_of_other_objects(folder, data):
    from datetime import date

    model = save(folder / "run", seed=1)
    torch.save(load_file(model / SINGLE) | {"when": date(2020, 1, 1)}, model / "pytorch_model.bin")
    (model / SINGLE).unlink()
    return beside_model(folder, model)


@case
def an_adapter_compared(folder, data):
    return comparing(an_adapter(folder, data))


@case
def floats_of_eight_bits_with_scales(folder, data):
    model = save(folder / "fp8", seed=1)

    def quantise(tensors):
        small = {key: x.to(torch.float8_e4m3fn) if "proj" in key else x for key, x in tensors.items()}
        return small | {f"{key}_scale_inv": torch.ones(1, 1) for key in tensors if "proj" in key}

    change_tensors(model, quantise)
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return beside_model(folder, configure(model, quantization_config=quantised))


@hopeless
def weights_of_llama_cpp(folder, data):
    model = save(folder / "gguf", seed=1)
    (model / SINGLE).rename(model / "model-Q4_K_M.gguf")
    return beside_model(folder, model)


@hopeless
def quantised_weights(folder, data):
    model = save(folder / "gptq", seed=1)
    return beside_model(folder, configure(model, quantization_config={"quant_method": "gptq", "bits": 4}))


@hopeless
def an_adapter_of_prompts(folder, data):
    return beside_model(folder, make_adapter(folder / "prompts", peft_type="PROMPT_TUNING"))


@hopeless
def no_weights(folder, data):
    model = save(folder / "bare", seed=1)
    (model / SINGLE).unlink()
    return beside_model(folder, model)


@hopeless
def another_type(folder, data):
    return ("merge", save(folder / "a"), save(folder / "b", "bert"), "-o", folder / "out")


@hopeless
def another_size(folder, data):
    return merging(folder, second={"hidden_size": 24})


@hopeless
def another_size_and_another_number_of_rows(folder, data):
    return merging(folder, first={"vocab_size": 48}, second={"hidden_size": 24})


@hopeless
def another_size_and_rows_to_cut(folder, data):
    rows = dict(options=("--vocabulary", "common"))
    return merging(folder, first={"vocab_size": 64}, second={"hidden_size": 24, "vocab_size": 48}, **rows)


@hopeless
def another_size_and_another_class(folder, data):
    a, b = save(folder / "a"), save(folder / "b", "llama-classes", 1, hidden_size=24)
    return ("merge", a, b, "-o", folder / "out")


@hopeless
def another_size_compared(folder, data):
    return comparing(another_size(folder, data))


@hopeless
def another_number_of_layers_without_configurations(folder, data):
    command = merging(folder, second={"num_hidden_layers": 3})
    for model in command[1:3]:
        (model / "config.json").unlink()
    return command


# --- options ---------------------------------------------------------------------------------------------------------


@case
def an_output_that_exists(folder, data):
    command = merging(folder)
    save(folder / "out")
    return command


@case
def an_aligned_output_that_exists(folder, data):
    _, a, b, *_ = merging(folder)
    return ("align", a, b, "-o", save(folder / "out"))


@case
def an_alignment_that_exists(folder, data):
    _, a, b, *_ = merging(folder)
    (folder / "alignment.safetensors").write_bytes(b"")
    return ("align", a, b, "--alignment", folder / "alignment.safetensors")


@case
def nothing_to_write(folder, data):
    return ("align", *merging(folder)[1:3])


@case
def a_report_that_exists(folder, data):
    (folder / "report.html").write_text("")
    return merging(folder, options=("--report", folder / "report.html"))


@case
def a_licence_without_a_repository(folder, data):
    return merging(folder, options=("--license", "mit", "--public"))


@case
def a_repository_without_a_licence(folder, data):
    return merging(folder, options=("--push-to", "org/advised"))


@case
def a_misspelt_method(folder, data):
    return merging(folder, options=("--method", "slerrp", "-p", "t=0.5"))


@case
def a_misspelt_parameter(folder, data):
    return merging(folder, options=("-p", "weihgts=[1,3]"))


@case
def a_misspelt_solver(folder, data):
    return merging(folder, options=("--solver", "weight_maching"))


@case
def a_misspelt_key_of_a_recipe(folder, data):
    _, a, b, *_ = merging(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"models": [str(a), str(b)], "backbone_olny": True}))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out")


@case
def a_misspelt_model_of_a_recipe(folder, data):
    _, a, b, *_ = merging(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"models": [str(a), str(b)], "base_model": str(b) + "b"}))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out")


@case
def an_option_beside_a_recipe(folder, data):
    _, a, b, *_ = merging(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"models": [str(a), str(b)]}))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out", "--seed", "3", "--no-align", "-p", "weights=[1,3]")


@case
def a_table_of_known_symmetries(folder, data):
    return ("inspect", save(folder / "a", "bert"), "--write-table", folder / "table.py")


@case
def a_misspelt_branch(folder, data):
    push_parts("org/advised-branches", transformers.AutoModelForCausalLM.from_pretrained(save(folder / "a")))
    return ("merge", "org/advised-branches@mian", folder / "a", "-o", folder / "out")


# --- data ------------------------------------------------------------------------------------------------------------


def with_processor(folder, seed=0, model=resnet):
    """Save a model of images that reads the digits of the tests."""
    for part in (model(seed), processor()):
        part.save_pretrained(folder)
    return folder


def of_images(folder, options=()):
    return (
        "merge",
        *(with_processor(folder / name, seed=i) for i, name in enumerate("ab")),
        "-o",
        folder / "out",
        *options,
    )


@case
def averaged_statistics(folder, data):
    command = of_images(folder, ["--no-align"])
    for model in command[1:3]:
        draw_statistics(model)
    return command


def draw_statistics(model):
    def drawn(tensors):
        return {key: torch.rand_like(x) + 0.5 if "running" in key else x for key, x in tensors.items()}

    change_tensors(model, drawn)


@case
def averaged_statistics_in_spite_of_data(folder, data):
    measured = ("--data", data, "--evaluate", data, "-e", "split=test", "-e", "points=0")
    return (*averaged_statistics(folder, data), *measured, "--recalibrate", "none")


@case
def averaged_statistics_on_a_line(folder, data):
    command = averaged_statistics(folder, data)
    return ("interpolate", *command[1:3], "--data", data, "-d", "split=test", "--points", "3")


@case
def frozen_statistics(folder, data):
    command = merging(folder, "detr", options=["--no-align"])
    for model in command[1:3]:
        draw_statistics(model)
        transformers.DetrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(model)
    return command


@case
def a_fit_without_data(folder, data):
    return of_images(folder, ["--refit"])


@case
def a_method_without_data(folder, data):
    return of_images(folder, ["--method", "distil"])


@case
def a_repair_without_data(folder, data):
    return of_images(folder, ["--recalibrate", "repair"])


@case
def a_solver_without_data(folder, data):
    return of_images(folder, ["--solver", "activation_matching"])


@case
def a_solver_without_data_in_a_recipe(folder, data):
    _, a, b, *_ = of_images(folder)
    content = {"models": [str(a), str(b)], "align": {"solver": "activation_matching"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out")


@case
def statistics_that_a_model_lacks(folder, data):
    return ("recalibrate", with_processor(folder / "a", model=vit), "-o", folder / "out", "--data", data)


def with_other_labels(folder):
    configure(with_processor(folder), **names("cat", "dog", "bird"))
    return change_tensors(
        folder, lambda x: x | {f"classifier.1.{k}": x[f"classifier.1.{k}"][:3] for k in ("weight", "bias")}
    )


@case
def labels_of_another_model(folder, data):
    model = with_other_labels(folder / "a")
    return ("merge", model, model, "-o", folder / "out", "--no-align", "--data", data, "--refit")


@case
def labels_of_another_model_in_a_recipe(folder, data):
    model = str(with_other_labels(folder / "a"))
    content = {"models": [model, model], "align": False, "data": str(data), "refit": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out")


@hopeless
def labels_of_another_model_to_measure(folder, data):
    return ("evaluate", with_other_labels(folder / "a"), "--data", data)


@hopeless
def labels_that_are_left_out_of_a_measurement(folder, data):
    return ("evaluate", with_processor(folder / "a"), "--data", data, "-d", "labels=false")


@hopeless
def a_model_that_has_no_loss(folder, data):
    configure(with_processor(folder / "a", model=vit), architectures=["ViTModel"])
    return ("evaluate", folder / "a", "--data", data)


@case
def a_column_of_labels_with_an_unusual_name(folder, data):
    (folder / "rows").mkdir()
    digits(0, 8).rename_column("label", "kind").to_parquet(folder / "rows" / "train.parquet")
    return ("evaluate", with_processor(folder / "a"), "--data", folder / "rows")


@case
def a_cost_without_data(folder, data):
    _, a, b, *_ = of_images(folder)
    content = {"models": [str(a), str(b)], "align": {"solver": "learned", "cost": "mid"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ("merge", folder / "recipe.yaml", "-o", folder / "out")


@case
def texts_for_a_model_without_a_pad_token(folder, data):
    command = merging(folder, "llama-classes", vocab_size=48, tokens=TOKENS, pad_token_id=None)
    (folder / "rows.txt").write_text("w1 w2 w3\nw4\n")
    return (*command, "--data", folder / "rows.txt", "--refit", "--no-align")


@case
def a_misspelt_split(folder, data):
    return ("evaluate", with_processor(folder / "a"), "--data", data, "-d", "split=tset")


@case
def a_misspelt_column(folder, data):
    return ("evaluate", with_processor(folder / "a"), "--data", data, "-d", "column=imgae")


@case
def a_misspelt_metric(folder, data):
    return ("evaluate", with_processor(folder / "a"), "--data", data, "--metric", "acuracy")


@case
def several_columns_of_images(folder, data):
    rows = datasets.Dataset.from_dict({"first": digits(0, 8)["image"][:], "second": digits(1, 8)["image"][:]})
    (folder / "rows").mkdir()
    rows.add_column("label", digits(0, 8)["label"][:]).to_parquet(folder / "rows" / "train.parquet")
    return ("merge", *of_images(folder)[1:], "--data", folder / "rows", "--refit", "--no-align")


# --- records ---------------------------------------------------------------------------------------------------------


@case
def a_model_to_rebuild_of_local_models(folder, data):
    command = merging(folder)
    run_ok(*command)
    return ("verify", folder / "out", "--rebuild")


@case
def a_licence_that_is_not_known(folder, data):
    run_ok(*merging(folder))
    return ("publish", folder / "out", "org/advised")


@case
def a_handwritten_card(folder, data):
    run_ok(*merging(folder))
    push_parts("org/advised-card", transformers.AutoModelForCausalLM.from_pretrained(folder / "a"))
    return ("publish", folder / "out", "org/advised-card", "--license", "mit")


def test_a_merge_that_could_not_be_published(tmp_path, follower, monkeypatch):
    """What it was to be published with is a part of the command."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    command = merging(
        tmp_path, options=("--push-to", "org/advised-late", "--license", "mit", "--commit-message", "A b")
    )
    HUB.fail_next[:] = [(re.compile("/commit/"), 500)] * 20
    tried = attempt(command, dry=False)
    HUB.fail_next.clear()
    assert tried.status == 1, tried
    (advice,) = follower.follow(tried)
    assert advice.text.endswith("org/advised-late --license mit --commit-message 'A b'")
    again = follower.follow(Attempt(tried.arguments, 1, tried.output.replace(" --license mit", "")))
    assert again, "a licence is missing, and may be named"


@case
def weights_on_the_hub_without_headers(folder, data):
    push_parts("org/advised-pickle", transformers.AutoModelForCausalLM.from_pretrained(save(folder / "a")))
    torch.save(load_file(folder / "a" / SINGLE), folder / "pytorch_model.bin")
    HfApi().upload_file(
        repo_id="org/advised-pickle", path_in_repo="pytorch_model.bin", path_or_fileobj=folder / "pytorch_model.bin"
    )
    HfApi().delete_file(SINGLE, "org/advised-pickle")
    return ("merge", folder / "a", "org/advised-pickle", "-o", folder / "out", "--dry-run")


@case
def several_alignments(folder, data):
    _, a, b, *_ = merging(folder)
    run_ok("merge", a, b, save(folder / "c", seed=2), "-o", folder / "out")
    return ("apply", folder / "out", b, "-o", folder / "moved")


@hopeless
def an_alignment_of_another_architecture(folder, data):
    run_ok("align", *merging(folder)[1:3], "--alignment", folder / "alignment.safetensors")
    return ("apply", folder / "alignment.safetensors", save(folder / "c", "bert"), "-o", folder / "moved")


@hopeless
def a_folder_without_a_record(folder, data):
    return ("verify", save(folder / "a"))


@hopeless
def a_folder_without_a_record_to_publish(folder, data):
    return ("publish", save(folder / "a"), "org/advised", "--license", "mit")


# --- controls --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    """Return what a command printed, with another message in place of its own."""
    command = tuple(map(str, another_eps(tmp_path, None)))

    def say(message):
        return Attempt(command, 1, f"error: {message}\n")

    return say


WRONG = {
    "an option that does not exist": "say so (--assume-all config)",
    "an option of another verb": "name a file (--alignment FILE.safetensors)",
    "a value that does not exist": "keep them (--vocabulary none)",
    "a value that is missing": "keep them (--vocabulary)",
    "a command that nobody can type": "merge them: hf-rebasin merge A 'B -o OUT",
    "a placeholder that nobody knows": "merge them: hf-rebasin merge A THE -o OUT --no-align",
    "a name that does not exist": "no option 'a'; did you mean 'sseedd'?",
    "a key that does not help": "leave labels out (labels: false)",
    "a call that does not exist": "convert it: AutoModels.from_pretrained('a').save_pretrained('OUT')",
    "a call that fails": "convert it: AutoModel.from_pretrained('nowhere/at-all').save_pretrained('OUT')",
    "a call of ours that does not exist": "in Python, hf_rebasin.mend(model)",
    "a call of ours with other arguments": "in Python, hf_rebasin.recalibrate(model)",
    "an argument in Python alone": "give inputs (inputs=)",
    "an argument that does not exist": "in Python, give them (inputz=)",
    "a command of the Hub that does not exist": "fetch it (hf downlaod org/name)",
    "an option of the Hub that does not exist": "fetch it (hf download org/name --exclud x)",
    "an extra that does not exist": "install it: pip install 'hf-rebasin[tokenisers]'",
    "a folder that does not exist": "fetch it: git -C /nowhere lfs pull",
    "a script that fails": "write it anew: python -c 'open(\"/nowhere/at/all\")'",
    "a move of what does not exist": "keep them apart (mkdir ADAPTER && mv /nowhere/adapter_* ADAPTER/)",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_advice_is_seen(name, refused, follower):
    with pytest.raises(BadAdvice):
        follower.follow(refused(WRONG[name]))


@pytest.mark.parametrize("message", ["leave them (--no-align)", "merge them: hf-rebasin merge A B -o OUT --seed 1"])
def test_advice_that_leads_to_a_dead_end_is_seen(message, tmp_path, follower):
    command = tuple(map(str, another_size(tmp_path, None)))
    with pytest.raises(BadAdvice, match="nothing helps any more"):
        follower.follow(Attempt(command, 1, f"error: {message}\n"))


def test_advice_in_circles_is_seen(tmp_path, follower):
    tried = attempt(another_eps(tmp_path, None))
    with pytest.raises(BadAdvice, match="in circles"):
        follower.follow(tried, (tried,))


RIGHT = {
    "an option": "say so (--assume config:rms_norm_eps)",
    "another verb": "merge them (--assume config)",
    "a command": "merge them: hf-rebasin merge A B -o OUT --assume config. Or do not.",
    "a command of the Hub": "fetch it (hf download org/name --local-dir MODEL --exclude 'adapter_*')",
    "an extra": "install it: pip install 'hf-rebasin[tokenizers]'.",
    "a call": "in Python, hf_rebasin.recalibrate(model, batches)",
    "an argument in Python": "in Python, give them (inputs=)",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_advice_is_seen(name, refused, follower):
    assert len(follower.follow(refused(RIGHT[name]))) == 1


def test_what_was_given_is_not_advice(refused):
    assert read_advice(refused("-o is a file, and --out out cannot be (it is 3 of 4; see a.b)")) == []


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("b has c; not a. If the rows match, say so (--assume labels; --assume config)", "b has c; not a"),
        ("they differ in d.e; f. Say which: --vocabulary first for 8, --vocabulary common", "they differ in d.e; f"),
        ("a-b -- c is not --d", "a-b -- c is not --d"),
    ],
)
def test_advice_is_cut_off(message, kept):
    assert without_advice(message) == kept


def test_every_option_in_the_package_exists():
    """Also in messages that no case above provokes."""
    known = {name for verb in VERBS for name in parameters_of(verb)} | {"--help"}
    options = defaultdict(set)
    for path in sorted((ROOT / "hf_rebasin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = re.sub(
                    r"--(?:local-dir|exclude|include|check)\b", "", node.value
                )  # of hf download and sha256sum
                for name in OPTION.findall(text):
                    options[name].add(path.name)
    assert {name: files for name, files in options.items() if name not in known} == {}
