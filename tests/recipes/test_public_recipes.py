"""Recipes for pairs on the public Hub, rehearsed on small models of the same classes."""

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Image, Value, disable_progress_bars
from texts import SMALL, TEXTS, WORDS, bert_tokenizer, gpt_tokenizer
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_rebasin import Checkpoint, Recipe
from hf_rebasin.recipes.assessment import assess
from hf_rebasin.recipes.runner import run_merge
from hf_rebasin.symmetries.table import table_for

TOKENS = {"vocab_size": len(WORDS) + 1, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "scale_attn_by_inverse_layer_idx": True}
LABELS = {0: "tench", 1: "goldfish"}
MODELS = {
    "multiberts": (
        BertForPreTraining,
        BertConfig(**SMALL, vocab_size=len(WORDS) + 5, max_position_embeddings=24),
        bert_tokenizer,
    ),
    "pythia": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, **TOKENS, max_position_embeddings=16), gpt_tokenizer),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2, **TOKENS, reorder_and_upcast_attn=True), gpt_tokenizer),
    "imagenet-vit": (
        ViTForImageClassification,
        ViTConfig(**SMALL, image_size=8, patch_size=4, id2label=LABELS),
        lambda: ViTImageProcessor(size={"height": 8, "width": 8}),
    ),
}


@pytest.fixture(scope="module")
def on_the_hub():
    """Data with the names and columns of ImageNet, and of WikiText, in which every second row is empty."""
    disable_progress_bars()
    text = Dataset.from_dict({"text": [one for text in TEXTS for one in ("", text)]})
    pixels = np.random.default_rng(0).integers(0, 255, (12, 10, 12, 3), dtype=np.uint8)
    features = Features(image=Image(), label=ClassLabel(names=list(LABELS.values())))
    images = Dataset.from_dict({"image": list(pixels), "label": [i % 2 for i in range(12)]}, features=features)
    assert text.features == Features(text=Value("string"))
    for split in ("train", "test"):
        text.push_to_hub("org/wikitext", "wikitext-103-raw-v1", split=split)
    for split in ("test", "validation"):
        images.push_to_hub("org/imagenet-1k", split=split)


@pytest.mark.parametrize("name", MODELS)
def test_public_recipes_are_rehearsed(name, on_the_hub, tmp_path):
    kind, config, made = MODELS[name]
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():  # gains, too, or norms would do nothing
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path / f"{seed}")
        made().save_pretrained(tmp_path / f"{seed}")
    raw = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    raw["models"] = [str(tmp_path / f"{seed}") for seed in (0, 1)]
    for part in ("data", "evaluate"):
        if part in raw:
            raw[part] |= {"samples": 8, "batch_size": 4, "streaming": False} | (
                {} if "vit" in name else {"max_length": 16}
            )
    raw["data"]["dataset"] = "org/" + raw["data"]["dataset"].split("/")[1]  # ours, on the local Hub
    recipe = Recipe.from_dict(raw)
    result = run_merge(recipe)
    saved = Checkpoint.open(result.checkpoint.save(tmp_path / "merged"))
    kind.from_pretrained(tmp_path / "merged")
    (pair,) = assess(recipe, result, saved).pairs
    assert pair.exactness.shapes
    assert pair.exactness.keys == (name != "gpt2"), "its header says that the head is stored apart"
    assert bool(pair.rows) == ("evaluate" in raw)
    assert len(pair.lines) == (2 if "evaluate" in raw else 0)


@pytest.mark.parametrize("name", MODELS)
def test_public_recipes_say_what_they_are(name):
    file = ROOT / "recipes" / f"{name}.yaml"
    content = file.read_text()
    assert all(entry.model.count("/") == 1 for entry in Recipe.from_file(file).models)
    for word in (
        f"hf-rebasin merge recipes/{name}.yaml",
        "Data:",
        "Hardware:",
        "minutes",
        "Expected:",
        "*not run here*",
    ):
        assert word in content
    assert table_for(MODELS[name][1]) is not None
