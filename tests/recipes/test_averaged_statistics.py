"""A merge without data averages BatchNorm statistics, and says so wherever somebody looks."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from hf_rebasin import Checkpoint, Recipe
from hf_rebasin.checkpoints.provenance import Provenance
from hf_rebasin.merging.recalibration import find_statistics, has_statistics
from hf_rebasin.recipes.runner import open_models, remark_on_statistics

AVERAGED = "the running means and variances of 6 BatchNorm layers are averages of the models'"
OF_ONE = AVERAGED.replace("6 BatchNorm layers", "1 BatchNorm layer")


def draw_statistics(folder, seed):
    """Give a model running statistics as if it had been trained."""
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for key, x in tensors.items():
        if "running" in key:
            tensors[key] = 0.5 + torch.rand(x.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(demo_folder, tmp_path, monkeypatch):
    """Two ResNets with statistics of their own, and the digits."""
    shutil.copytree(demo_folder, tmp_path / "demo")
    for seed in range(2):
        draw_statistics(tmp_path / "demo" / "resnet" / f"seed-{seed}", seed)
    monkeypatch.chdir(tmp_path / "demo")
    return tmp_path / "demo"


MERGE = ("merge", "resnet/seed-0", "resnet/seed-1", "--no-align")
DATA = ("--data", "digits", "-d", "samples=64")


def test_a_merge_without_data_says_so(folder, run_command):
    status, planned = run_command(*MERGE, "-o", "out", "--dry-run")
    assert status == 0, planned
    status, printed = run_command(*MERGE, "-o", "out")
    assert status == 0, printed
    record = Provenance.load(folder / "out")
    (note,) = record.notes
    assert note.startswith(AVERAGED)
    for text in (planned, printed, (folder / "out" / "README.md").read_text("utf-8")):
        assert note in text
    assert record.recipe["recalibrate"] is False
    command = re.search(r"hf-rebasin (recalibrate MERGE --data DATASET -o OUT)", note)[1].split()
    places = {"MERGE": "out", "DATASET": "digits", "OUT": "mended"}
    status, printed = run_command(*(places.get(word, word) for word in command))
    assert status == 0, printed
    a, b = (load_file(folder / name / "model.safetensors") for name in ("out", "mended"))
    assert {key for key in a if not torch.equal(a[key], b[key])} == {key for key in a if "running" in key}
    assert Provenance.load(folder / "mended").notes == ()


def test_a_merge_with_data_recomputes_them(folder, run_command):
    """Negative control: as the note advises, with --data DATASET; and what is fitted to data does it anyway."""
    for name, more in {"data": (), "refitted": ("--refit", "--recalibrate", "none")}.items():
        status, printed = run_command(*MERGE, "-o", name, *DATA, *more)
        assert status == 0, printed
        assert AVERAGED not in printed
        assert Provenance.load(folder / name).notes == ()
    assert Provenance.load(folder / "data").recipe["recalibrate"] == "statistics"
    assert Provenance.load(folder / "refitted").recipe["recalibrate"] is False


def test_data_that_are_not_used_for_statistics(folder, run_command):
    status, printed = run_command(*MERGE, "-o", "out", *DATA, "--recalibrate", "none", "-e", "split=test")
    assert status == 0, printed
    assert AVERAGED in printed
    assert "recompute them on the data, without --recalibrate none" in printed
    status, printed = run_command(*MERGE, "-o", "other", *DATA, "-e", "split=test")
    assert status == 0, printed
    assert AVERAGED not in printed


def test_nothing_is_recorded_that_did_not_happen(folder, run_command):
    """Of models without running statistics none are recomputed, whatever the data are for."""
    status, printed = run_command("merge", "vit/seed-0", "vit/seed-1", "-o", "vits", *DATA, "--refit")
    assert status == 0, printed
    record = Provenance.load(folder / "vits")
    assert record.recipe["recalibrate"] is False
    assert record.notes == ()
    status, printed = run_command("merge", "vit/seed-0", "vit/seed-1", "-o", "other", *DATA, "--recalibrate", "repair")
    assert status == 0, printed
    assert Provenance.load(folder / "other").recipe["recalibrate"] == "repair"


@pytest.mark.parametrize("recorded", [False, "statistics"], ids=["now", "by older versions"])
def test_it_can_be_made_again(folder, run_command, recorded):
    status, printed = run_command(*MERGE, "-o", "out")
    assert status == 0, printed
    content = json.loads((folder / "out" / "rebasin.json").read_text("utf-8"))
    content["recipe"]["recalibrate"] = recorded
    (folder / "out" / "rebasin.json").write_text(json.dumps(content), encoding="utf-8")
    models = [f"--model=resnet/seed-{seed}" for seed in range(2)]
    status, printed = run_command("verify", "out", "--rebuild", *models)
    assert status == 0, printed
    assert "the same when rebuilt: " in printed


def test_models_with_the_same_statistics_are_not_said_to_differ(folder, run_command):
    states = [load_file(folder / "resnet" / f"seed-{seed}" / "model.safetensors") for seed in range(2)]
    states[1] |= {key: x for key, x in states[0].items() if "running" in key}
    save_file(states[1], folder / "resnet" / "seed-1" / "model.safetensors", {"format": "pt"})
    status, printed = run_command(*MERGE, "-o", "out")
    assert status == 0, printed
    assert "running" not in printed
    states[1]["resnet.embedder.embedder.normalization.running_var"] += 1
    save_file(states[1], folder / "resnet" / "seed-1" / "model.safetensors", {"format": "pt"})
    status, printed = run_command(*MERGE, "-o", "other")
    assert OF_ONE in printed


def test_interpolate(folder, run_command):
    line = ("interpolate", "resnet/seed-0", "resnet/seed-1", *DATA, "-d", "split=test", "--points", "3")
    status, printed = run_command(*line)
    assert status == 0, printed
    assert AVERAGED in printed
    for advice in (("--recalibrate", "digits"), ("--recalibrate-option", "split=train")):
        assert advice[0] in printed
        status, mended = run_command(*line, *advice)
        assert status == 0, mended
        assert AVERAGED not in mended
    status, printed = run_command(*line, "--json", "-o", "best")
    assert status == 0, printed
    best = Provenance.load(folder / "best")
    assert [AVERAGED in note for note in best.notes] == ([True] if best.recipe["at"] == 0.5 else [])


def test_where_data_cannot_be_opened_the_advice_is_python(folder):
    for seed in range(2):
        (folder / "resnet" / f"seed-{seed}" / "config.json").unlink()
    models = [str(folder / "resnet" / f"seed-{seed}") for seed in range(2)]
    recipe = Recipe.from_dict({"models": models, "align": False})
    (remark,) = remark_on_statistics(recipe, open_models(recipe))
    assert remark.startswith(AVERAGED)
    assert remark.endswith("recompute them in Python, hf_rebasin.recalibrate(model, batches)")


def test_frozen_statistics_cannot_be_recomputed(tmp_path):
    """DETR's BatchNorm is a class of its own, which is frozen in training."""
    widths = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic"}
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=ResNetConfig(**widths, out_features=["stage2"]),
        num_queries=2,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    for seed in range(2):
        DetrForObjectDetection(config).save_pretrained(tmp_path / str(seed))
        draw_statistics(tmp_path / str(seed), seed)
    layers = find_statistics(Checkpoint.open(tmp_path / "0"))
    assert not layers.recomputed
    assert len(layers.frozen) == 6
    assert not has_statistics(Checkpoint.open(tmp_path / "0"))
    recipe = Recipe.from_dict({"models": [str(tmp_path / "0"), str(tmp_path / "1")], "align": False})
    (remark,) = remark_on_statistics(recipe, open_models(recipe))
    assert remark.startswith(AVERAGED)
    assert remark.endswith("weights can be fitted to them: --data DATASET --recalibrate repair")
