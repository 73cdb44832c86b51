"""Folders that are not a model as transformers saves it: each is refused in a sentence that helps."""

import json
import re
import shlex
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import transformers
from conftest import HUB, same_tensors
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from test_conversion import SINGLE, configure, respell, save_tiny

from hf_rebasin import Checkpoint, merge
from hf_rebasin.errors import CheckpointError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976698672\n"


@pytest.fixture
def llama(tmp_path):
    return save_tiny(tmp_path / "model", "llama")


def refusal(folder):
    """Return the message with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).refuse_quantised()
    return str(caught.value)


def run_call(call, out):
    """Evaluate the expression of transformers that a message recommends."""
    names = {name: getattr(transformers, name) for name in re.findall(r"\b[A-Z]\w+(?=\.|\()", call)}
    eval(call.replace("'OUT'", repr(str(out))), names | {"torch": torch})


def run_advice(message):
    """Run the Python command that a message recommends."""
    script = shlex.split(message[message.index("python -c ") :])[2]
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "name",
    [SINGLE, "model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json", "merges.txt"],
)
def test_pointers_of_git_lfs(llama, name):
    (llama / name).write_text(POINTER)
    message = refusal(llama)
    assert name in message
    assert f"git -C {llama} lfs pull" in message


def test_pointers_of_git_lfs_in_modules(llama):
    (llama / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (llama / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 3)}, llama / "2_Dense" / SINGLE, {"format": "pt"})
    Checkpoint.open(llama)
    (llama / "2_Dense" / SINGLE).write_text(POINTER)
    assert f"2_Dense/{SINGLE} of {llama} is a pointer of git lfs" in refusal(llama)


def test_a_small_file_is_not_a_pointer(llama):
    (llama / "merges.txt").write_text(POINTER[10:])
    Checkpoint.open(llama)


SEEN = {
    "model-Q4_K_M.gguf": ("llama.cpp", "use the original"),
    "tf_model.h5": ("transformers<5' tensorflow", "from_tf=True"),
    "flax_model.msgpack": ("transformers<5' flax", "from_flax=True"),
    "consolidated.00.pth": ("convert_*_weights_to_hf.py",),
    "model.fp16.safetensors": ("variant='fp16'",),
    "model-00001-of-00002.safetensors": ("the index", "is missing"),
    "weights.safetensors": ("rename it to model.safetensors",),
    "weights.ckpt": ("rename it to pytorch_model.bin",),
    "checkpoint-5/model.safetensors": ("sub-folders checkpoint-5",),
    "optimizer.pt": ("save_pretrained",),
}


@pytest.mark.parametrize("name", SEEN)
def test_weights_in_other_formats(llama, name):
    (llama / SINGLE).unlink()
    (llama / name).parent.mkdir(exist_ok=True)
    (llama / name).write_bytes(b"GGUF")
    message = refusal(llama)
    assert all(words in message for words in SEEN[name])


def test_a_variant_is_saved_under_its_usual_name(llama, tmp_path):
    """As the message says."""
    (llama / SINGLE).rename(llama / "model.fp16.safetensors")
    call = refusal(llama).partition("usual name: ")[2].partition(", with the class")[0]
    run_call(call, tmp_path / "out")
    assert (tmp_path / "out" / SINGLE).is_file()


def test_a_pipeline_of_diffusers(tmp_path, llama):
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    assert "model_index.json" in refusal(pipeline)
    llama.rename(pipeline / "text_encoder")
    assert f"hf-rebasin merge {pipeline}/text_encoder OTHER/text_encoder" in refusal(pipeline)


def make_adapter(folder, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base"} | settings))
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter(tmp_path):
    message = refusal(make_adapter(tmp_path / "adapter", peft_type="LORA", task_type="CAUSAL_LM"))
    call = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('me/base'), '{tmp_path / 'adapter'}')"
    assert f"{call}.merge_and_unload()" in message
    message = refusal(make_adapter(tmp_path / "prompt", peft_type="PROMPT_TUNING"))
    assert "no share in the weights" in message
    assert "merge_and_unload" not in message


def test_an_adapter_beside_a_whole_model(llama, tmp_path):
    make_adapter(llama)
    message = refusal(llama)
    command = message.partition("keep them apart (")[2].partition("), and")[0]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "ADAPTER" / "adapter_config.json").is_file()
    Checkpoint.open(llama)
    assert "merge_and_unload" in refusal(tmp_path / "ADAPTER")


def test_an_adapter_beside_a_whole_model_of_the_hub(llama):
    """It is refused before the weights are downloaded, with commands for the commit that was asked for."""
    HfApi().create_repo("org/with-adapter")
    commit = HfApi().upload_folder(repo_id="org/with-adapter", folder_path=make_adapter(llama)).oid
    since = len(HUB.requests)
    with pytest.raises(CheckpointError, match=r"a whole model and an adapter beside it") as caught:
        Checkpoint.open(f"org/with-adapter@{commit}")
    assert f"hf download org/with-adapter --revision {commit} --exclude 'adapter_*'" in str(caught.value)
    assert not [path for _, path, _ in HUB.requests[since:] if "/_lfs/get/" in path]
    Checkpoint.open(save_tiny(llama.parent / "other", "llama"))


def with_lora(folder, prefix=""):
    """Write a folder as a model with LoRA matrices of rank 2 beside its query matrices is stored."""
    respell(folder, lambda key: prefix + key.replace("q_proj.weight", "q_proj.base_layer.weight"))
    tensors = load_file(folder / SINGLE)
    for key in [key for key in tensors if "base_layer" in key]:
        rows, columns = tensors[key].shape
        stem = key.removesuffix("base_layer.weight")
        tensors |= {f"{stem}lora_A.default.weight": torch.ones(2, columns)}
        tensors |= {f"{stem}lora_B.default.weight": torch.ones(rows, 2)}
    save_file(tensors, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize(("prefix", "inner"), [("", "model.base_model.model."), ("base_model.model.", "model.")])
def test_matrices_of_adapters_that_are_not_merged(llama, prefix, inner):
    with_lora(llama, prefix)
    message = refusal(llama)
    assert f"{prefix}model.layers.0.self_attn.q_proj.base_layer.weight" in message
    assert "get_peft_model(BASE, LoraConfig(r=2, lora_alpha=ALPHA, target_modules=['q_proj']))" in message
    assert f"{inner}load_state_dict(STATE); model.merge_and_unload()" in message


def test_code_of_its_own_may_have_such_matrices(llama):
    with_lora(configure(llama, auto_map={"AutoModel": "modeling_mine.Mine"}))
    assert any("lora_A" in key for key in Checkpoint.open(llama).parts)


EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_floats_of_eight_bits(llama, dtype, tmp_path):
    save_file({k: t.to(dtype) for k, t in load_file(llama / SINGLE).items()}, llama / SINGLE, {"format": "pt"})
    message = refusal(llama)
    assert f"is quantised ({dtype})" in message
    call = message.partition("wider dtype: ")[2]
    run_call(call, tmp_path / "out")
    merge([tmp_path / "out", tmp_path / "out"])


def test_floats_of_eight_bits_with_scales(llama, tmp_path):
    tensors = {}
    for key, tensor in load_file(llama / SINGLE).items():
        tensors[key] = tensor.to(torch.float8_e4m3fn) if "proj" in key else tensor
        if "proj" in key:
            tensors[f"{key}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, llama / SINGLE, {"format": "pt"})
    configure(llama, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    call = refusal(llama).partition("wider dtype: ")[2]
    run_call(call, tmp_path / "out")
    merge([tmp_path / "out", tmp_path / "out"])


def test_floats_of_four_bits_and_scales(llama):
    tensors = load_file(llama / SINGLE)
    key = next(key for key in tensors if "q_proj" in key)
    packed = torch.zeros(16, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file(tensors | {key: packed}, llama / SINGLE, {"format": "pt"})
    assert f"is quantised ({key} is F4)" in refusal(llama)
    scales = {"scale": torch.ones(2, 2).to(torch.float8_e8m0fnu)}
    save_file(tensors | scales, llama / SINGLE, {"format": "pt"})
    assert "is quantised (torch.float8_e8m0fnu)" in refusal(llama)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_more_than_tensors(llama, zipped):
    """Each command that is recommended makes a file that is read."""
    tensors = load_file(llama / SINGLE)
    (llama / SINGLE).unlink()
    file = llama / "pytorch_model.bin"
    nested = {"state_dict": tensors, "epoch": 3}
    torch.save(nested, file, _use_new_zipfile_serialization=zipped)
    message = refusal(llama)
    assert "has one under 'state_dict'" in message
    run_advice(message)
    assert same_tensors(llama, tensors)
    torch.save(tensors | {"args": Thing()}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(llama)
    assert "If you trust its source" in message
    assert "holds Python objects" in message


def test_a_file_that_torch_did_not_write_is_not_a_pickle(llama):
    """Running its code, as for pickles with objects, would not help."""
    (llama / SINGLE).unlink()
    (llama / "pytorch_model.bin").write_text("<html>Not found</html>")
    message = refusal(llama)
    assert "torch.save did not write it" in message
    assert "weights_only" not in message


def test_a_file_in_place_of_its_folder(llama):
    assert "is a file, and a model is a folder" in refusal(llama / SINGLE)


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "and no other file; save the model with save_pretrained" in refusal(tmp_path / "empty")


class Thing:
    """An object that needs its class to be unpickled."""


def test_python_objects_of_the_library_are_left_out(llama):
    tensors = OrderedDict(load_file(llama / SINGLE))
    (llama / SINGLE).unlink()
    torch.save(tensors | {"when": __import__("datetime").date(2020, 1, 1)}, llama / "pytorch_model.bin")
    run_advice(refusal(llama))
    assert same_tensors(llama, tensors)


@pytest.mark.parametrize("suffix", [".weight_scale_2", "_proj_blocks", ".W_q", ".weight._data"])
def test_packed_weights_without_their_configuration(llama, suffix):
    packed = {f"model.layers.0.mlp.experts.gate_up{suffix}": torch.zeros(4, 4, dtype=torch.uint8)}
    save_file(load_file(llama / SINGLE) | packed, llama / SINGLE, {"format": "pt"})
    assert f"is quantised ({next(iter(packed))})" in refusal(llama)
