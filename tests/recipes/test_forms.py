"""The forms of recipes/forms, each run on small models in place of those it names."""

import re

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from texts import gpt_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from hf_rebasin.cli.main import app
from hf_rebasin.recipes.documents import read_documents

SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"vocab_size": 24, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": 0}
CLASSES = {
    "mistral": (MistralForCausalLM, MistralConfig),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen": (Qwen2ForCausalLM, Qwen2Config),
}
LAYER = 8


def make_models(file, folder):
    """Save a small model for every name in a form; return {name: its tensors} and the class."""
    content = file.read_text()
    documents = read_documents(file)
    own = [document.name for document in documents]
    names = dict.fromkeys(entry.model for document in documents for entry in document.recipe.in_order())
    kind, config = next(CLASSES[family] for family in CLASSES if family in content.lower())
    depth = max(map(int, re.findall(r"layer_range: \[\d+, (\d+)\]", content)), default=LAYER + 2)
    torch.manual_seed(0)
    base = kind(config(**SMALL, num_hidden_layers=depth))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.3)
    start = {key: value.clone() for key, value in base.state_dict().items()}
    shared = {key: torch.randn_like(value) for key, value in start.items()}
    for i, name in enumerate(name for name in names if name not in own):
        moves = {key: 0.15 * bool(i) * (shared[key] + torch.randn_like(value)) for key, value in start.items()}
        base.load_state_dict({key: value + moves[key] for key, value in start.items()})
        base.save_pretrained(folder / f"model-{i}")
        gpt_tokenizer().save_pretrained(folder / f"model-{i}")
        names[name] = folder / f"model-{i}"
    for name in sorted(filter(names.get, names), key=len, reverse=True):  # a name may begin with another one
        content = content.replace(name, str(names[name]))
    (folder / file.name).write_text(content)
    tensors = {name: load_file(path / "model.safetensors") for name, path in names.items() if path is not None}
    return tensors, kind


def rounded(content, dtype):
    return content.to(dtype).double()


def differences(tensors, base, key, dtype):
    """Return the differences of the other models from the base, rounded as mergekit rounds them, and the base."""
    start = rounded(tensors[base][key], dtype)
    others = [name for name in tensors if name != base]
    return [rounded(rounded(tensors[name][key], dtype) - start, dtype) for name in others], start


def arc(a, b, t):
    cosine = ((a * b).sum() / a.norm() / b.norm()).item()
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def keep(delta, first, count):
    """Keep a range of the entries of a tensor in the order of their sizes, the largest first."""
    order = delta.abs().flatten().argsort(descending=True, stable=True)[first : first + count]
    kept = torch.zeros(delta.numel(), dtype=torch.float64)
    kept[order] = delta.flatten()[order]
    return kept.reshape(delta.shape)


MLP, ATTENTION = f"model.layers.{LAYER}.mlp.up_proj.weight", f"model.layers.{LAYER}.self_attn.q_proj.weight"
MISTRAL, LLAMA = "mistralai/Mistral-7B-v0.1", "meta-llama/Meta-Llama-3-8B"


def slerp(tensors):
    t = np.interp(LAYER / 31, np.linspace(0, 1, 5), [0, 0.5, 0.3, 0.7, 1])
    return ATTENTION, arc(*(rounded(one[ATTENTION], torch.bfloat16) for one in tensors.values()), t)


def ties(tensors):
    deltas, base = differences(tensors, MISTRAL, MLP, torch.float16)
    weights = [0.5, 0.3]
    kept = [keep(delta, 0, 64) for delta in deltas]
    signs = torch.sign(sum(w * delta for w, delta in zip(weights, kept, strict=True)))
    total, share = torch.zeros_like(base), torch.zeros_like(base)
    for w, delta in zip(weights, kept, strict=True):
        agrees = (delta.sign() == signs) & (delta != 0)
        total, share = total + w * delta * agrees, share + w * agrees
    return MLP, base + total / torch.where(share == 0, 1.0, share)


def task_arithmetic(tensors):
    (code, math), base = differences(tensors, LLAMA, MLP, torch.bfloat16)
    return MLP, base + 0.8 * (0.6 * code + 0.5 * math)


def model_stock(tensors):
    deltas, base = differences(tensors, f"{LLAMA}-Instruct", MLP, torch.bfloat16)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = sum((deltas[i] * deltas[j]).sum() / deltas[i].norm() / deltas[j].norm() for i, j in pairs) / 3
    return MLP, base + 3 * cosine / (1 + 2 * cosine) * sum(deltas) / 3


def breadcrumbs(tensors):
    """Of 128 entries the largest one goes, and 12 of the smallest: 115 stay."""
    deltas, base = differences(tensors, "Qwen/Qwen2.5-7B", MLP, torch.bfloat16)
    weights = [0.7, 0.2 + 0.4 * LAYER / (LAYER + 1)]
    result = base + sum(w * keep(delta, 1, 115) for w, delta in zip(weights, deltas, strict=True))
    for delta in deltas:  # which of several equal ones is on the edge is not what is tested
        edges = delta.abs().flatten().sort(descending=True).values[[0, 1, 115, 116]]
        result[torch.isin(delta.abs(), edges)] = torch.nan
    return MLP, result


def linear(tensors):
    one, two, three = (rounded(model[MLP], torch.float16) for model in tensors.values())
    return MLP, (one + 0.3 * two + 0.5 * three) / 1.8


def passthrough(tensors):
    """Layer 8 of the second slice is number 24."""
    return MLP.replace(f".{LAYER}.", ".24."), rounded(tensors[MISTRAL][MLP], torch.bfloat16)


def nuslerp(tensors):
    (roleplay, instruct), base = differences(tensors, LLAMA, MLP, torch.bfloat16)
    return MLP, base + arc(roleplay, instruct, 1 / 3)


def documents(tensors):
    instruct, roleplay = (tensors[f"org/llama-3-8b-{name}"][MLP].double() for name in ("instruct", "roleplay"))
    both = {"both": {MLP: arc(instruct, roleplay, 0.4).float()}, "code": tensors["org/llama-3-8b-code"]}
    (first, second), base = differences({**both, LLAMA: tensors[LLAMA]}, LLAMA, MLP, torch.bfloat16)
    return MLP, base + 0.7 * first + 0.5 * second


FORMS = {
    "slerp": slerp,
    "ties": ties,
    "dare-ties": None,
    "task-arithmetic": task_arithmetic,
    "model-stock": model_stock,
    "breadcrumbs": breadcrumbs,
    "linear": linear,
    "passthrough": passthrough,
    "nuslerp": nuslerp,
    "documents": documents,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_run(name, tmp_path):
    file = ROOT / "recipes" / "forms" / f"{name}.yaml"
    tensors, kind = make_models(file, tmp_path)
    done = CliRunner().invoke(app, ["merge", str(tmp_path / file.name), "-o", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    dtype = getattr(torch, list(yaml.safe_load_all(file.read_text()))[-1]["dtype"])
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    model, loading = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    assert merged.keys() == model.state_dict().keys()
    assert model.config.num_hidden_layers == (48 if name == "passthrough" else len(layers_in(tensors)))
    if FORMS[name] is None:
        shares = [(merged[key] == tensors[MISTRAL][key].to(dtype)).double().mean() for key in merged if "mlp" in key]
        assert np.mean(shares) == pytest.approx((1 - 0.53) ** 3, abs=0.03), "no model keeps these entries"
        return
    key, expected = FORMS[name](tensors)
    known = expected.isfinite()
    steps = (merged[key].double() - expected)[known].abs() / expected[known].abs().clamp(min=0.5)
    assert steps.max() <= torch.finfo(dtype).eps
    assert known.sum() > expected.numel() / 2


def layers_in(tensors):
    """Return the numbers of the layers of the first model."""
    first = next(iter(tensors.values()))
    return {int(number) for key in first for number in re.findall(r"layers\.(\d+)\.", key)}


def test_every_form_is_listed_and_run():
    files = {file.stem for file in (ROOT / "recipes" / "forms").glob("*.yaml")}
    assert files == FORMS.keys()
    readme = (ROOT / "README.md").read_text()
    for file in files:
        assert f"recipes/forms/{file}.yaml" in readme
        assert (
            f"hf-rebasin merge recipes/forms/{file}.yaml -o merged/"
            in (ROOT / "recipes" / "forms" / f"{file}.yaml").read_text()
        )


def test_a_form_with_a_chat_template_has_it(tmp_path):
    file = ROOT / "recipes" / "forms" / "nuslerp.yaml"
    make_models(file, tmp_path)
    assert CliRunner().invoke(app, ["merge", str(tmp_path / file.name), "-o", str(tmp_path / "merged")]).exit_code == 0
    assert "<|im_start|>" in (tmp_path / "merged" / "chat_template.jinja").read_text()
