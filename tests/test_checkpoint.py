"""Files: what is written is complete or absent, loads anywhere, and reads back the same."""

import json

import pytest
import torch
from conftest import HUB, moved_copy, same_tensors
from huggingface_hub import HfApi
from torch import nn

from hf_rebasin import Checkpoint, align, merge
from hf_rebasin.errors import CheckpointError, TargetExistsError


@pytest.fixture
def folder(bert, tmp_path):
    return Checkpoint.open(bert).save(tmp_path / "model")


def test_shards_and_index_are_as_transformers_writes_them(bert, tmp_path):
    ours = Checkpoint.open(bert).save(tmp_path / "ours", max_shard_size="50KB")
    bert.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    a, b = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (ours, tmp_path / "theirs"))
    assert len(set(a["weight_map"].values())) > 1
    assert a == b
    assert same_tensors(ours, tmp_path / "theirs")
    assert same_tensors(type(bert).from_pretrained(ours), bert)


def test_an_existing_target_is_refused(folder, bert, tmp_path, monkeypatch):
    before = sorted(folder.iterdir())
    with pytest.raises(TargetExistsError, match=r"is already there; .*--overwrite"):
        Checkpoint.open(bert).save(folder)
    assert sorted(folder.iterdir()) == before
    moved, _ = moved_copy(bert)
    Checkpoint.open(moved).save(folder, overwrite=True)
    assert same_tensors(folder, moved)
    with pytest.raises(TargetExistsError, match=r"model is or holds .*, which is read"):
        Checkpoint.open(folder).save(folder, overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes").write_text("mine")
    with pytest.raises(TargetExistsError, match=r"holds what is not a model's \(notes\)"):
        Checkpoint.open(bert).save(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "notes").read_text() == "mine"
    (tmp_path / "precious" / "notes").unlink()
    (tmp_path / "precious" / "checkpoint-500").mkdir()
    inside = Checkpoint.open(bert).save(tmp_path / "precious" / "model")
    with pytest.raises(TargetExistsError, match="is or holds .*model, which is read"):
        merge([inside, inside]).save(tmp_path / "precious", overwrite=True)
    with pytest.raises(TargetExistsError, match="holds what is not a model's"):
        Checkpoint.open(bert).save(tmp_path / "precious", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetExistsError, match="the folder you are in"):
        Checkpoint.open(bert).save(".")
    (tmp_path / "empty").mkdir()
    Checkpoint.open(bert).save(tmp_path / "empty")


def test_a_failing_write_leaves_nothing(bert, tmp_path, monkeypatch):
    import safetensors.torch

    def fail(*_, **__):
        raise OSError("disk full")

    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_text("of a killed run")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(OSError, match=r"disk full"):
            Checkpoint.open(bert).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    Checkpoint.open(bert).save(tmp_path / "out")


def test_other_files_go_along(folder, tmp_path):
    for name in ("vocab.txt", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    for name in ("README.md", "optimizer.pt", "trainer_state.json", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    out = merge([folder, folder]).save(tmp_path / "out")
    assert {"vocab.txt", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"} < {
        f.name for f in out.iterdir()
    }
    assert not {"README.md", "optimizer.pt", "trainer_state.json", "model.safetensors.index.json"} & {
        f.name for f in out.iterdir()
    }


def test_what_cannot_be_read_is_said(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a folder here nor a repository on the Hub"):
        Checkpoint.open("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"neither a folder here"):
        Checkpoint.open(tmp_path / "no" / "such" / "folder")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        Checkpoint.open(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors .*save_pretrained"):
        Checkpoint.open(folder)
    index = {"weight_map": {"x": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"points outside its folder"):
        Checkpoint.open(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1.safetensors cannot be read"):
        Checkpoint.open(folder)


def test_an_incomplete_checkpoint_makes_no_model(bert):
    checkpoint = Checkpoint.open(bert)
    less = {k: t for k, t in checkpoint.tensors.items() if "layer.1.output" not in k}
    with pytest.raises(CheckpointError, match=r"missing keys .*layer.1.output"):
        Checkpoint(less, checkpoint.config, "less").model()
    with pytest.raises(CheckpointError, match=r"no configuration that transformers knows"):
        Checkpoint(less).model()


def test_modules_that_share_a_tensor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    checkpoint = Checkpoint.open(model)
    assert list(checkpoint.tensors) == ["embed.weight"]
    assert checkpoint.ties == {"head.weight": "embed.weight"}
    doubled = merge([model, Tied()]).model()
    assert doubled.head.weight is doubled.embed.weight
    assert not torch.equal(doubled.head.weight, model.head.weight)


def test_models_of_the_hub(bert, tmp_path):
    """A Hub id at a revision, through the real client and a local Hub; only what a model needs is fetched."""
    moved, _ = moved_copy(bert)
    api = HfApi()
    commits = []
    for model in (bert, moved):
        folder = Checkpoint.open(model).save(tmp_path / f"up-{len(commits)}")
        (folder / "flax_model.msgpack").write_text("large")
        api.create_repo("org/bert", exist_ok=True)
        commits.append(api.upload_folder(repo_id="org/bert", folder_path=folder).oid)
    assert same_tensors(Checkpoint.open("org/bert"), moved)
    assert same_tensors(Checkpoint.open("org/bert", revision=commits[0]), bert)
    assert not (Checkpoint.open("org/bert").folder / "flax_model.msgpack").exists()
    assert same_tensors(align(bert, "org/bert").apply("org/bert"), bert)
    assert not any("msgpack" in path and "resolve" in path for _, path, _ in HUB.requests)
