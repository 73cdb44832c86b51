"""Checkpoint files: they are complete or absent, load anywhere, and read back the same."""

import json

import pytest
import torch
from conftest import HUB, moved_copy, same_tensors
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_rebasin import Alignment, Checkpoint, align, merge, spec_for
from hf_rebasin.errors import CheckpointError, MismatchError, TargetExistsError


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
    with pytest.raises(TargetExistsError, match=r"already exists; .*--overwrite"):
        Checkpoint.open(bert).save(folder)
    assert sorted(folder.iterdir()) == before
    moved, _ = moved_copy(bert)
    Checkpoint.open(moved).save(folder, overwrite=True)
    assert same_tensors(folder, moved)
    with pytest.raises(TargetExistsError, match=r"model is or holds .*, which is read"):
        Checkpoint.open(folder).save(folder, overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes").write_text("mine")
    with pytest.raises(TargetExistsError, match=r"holds entries that do not belong to a model \(notes\)"):
        Checkpoint.open(bert).save(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "notes").read_text() == "mine"
    (tmp_path / "precious" / "notes").unlink()
    (tmp_path / "precious" / "checkpoint-500").mkdir()
    inside = Checkpoint.open(bert).save(tmp_path / "precious" / "model")
    with pytest.raises(TargetExistsError, match=r"is or holds .*model, which is read"):
        merge([inside, inside]).save(tmp_path / "precious", overwrite=True)
    with pytest.raises(TargetExistsError, match="holds entries that do not belong to a model"):
        Checkpoint.open(bert).save(tmp_path / "precious", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetExistsError, match="is the current folder"):
        Checkpoint.open(bert).save(".")
    (tmp_path / "empty").mkdir()
    Checkpoint.open(bert).save(tmp_path / "empty")


def test_a_failing_write_leaves_nothing(bert, tmp_path, monkeypatch):
    from hf_rebasin.checkpoints import tensor_files as files

    def fail(*_, **__):
        raise OSError("disk full")

    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_text("of a killed run")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", fail)
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
    with pytest.raises(CheckpointError, match=r"neither a local folder nor a repository on the Hub"):
        Checkpoint.open("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"neither a local folder"):
        Checkpoint.open(tmp_path / "no" / "such" / "folder")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        Checkpoint.open(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no weights .*: no model.safetensors .*save_pretrained"):
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


def test_a_model_of_a_model_has_tensors_of_its_own(sample):
    before = {key: tensor.clone() for key, tensor in Checkpoint.open(sample).tensors.items()}
    with torch.no_grad():
        for parameter in Checkpoint.open(sample).model().parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(Checkpoint.open(sample).tensors[key], tensor) for key, tensor in before.items())


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


def test_a_failing_exchange_puts_the_old_model_back(folder, bert, monkeypatch):
    from pathlib import Path

    moved, _ = moved_copy(bert)
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no rename")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no rename"):
            Checkpoint.open(moved).save(folder, overwrite=True)
    assert same_tensors(folder, bert)
    assert [f.name for f in folder.parent.iterdir()] == ["model"]
    folder.rename(
        folder.parent / ".model.old"
    )  # killed between the two renames: the next run, though it fails, mends it
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no rename"):
            Checkpoint.open(moved).save(folder, overwrite=True)
    assert same_tensors(folder, bert)


def test_a_link_is_followed(folder, bert, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    moved, _ = moved_copy(bert)
    Checkpoint.open(moved).save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert same_tensors(folder, moved)


def test_dtypes_are_those_of_the_tensors(bert):
    narrow = Checkpoint.open(bert).model(torch.bfloat16)
    wide = merge([narrow, narrow], dtype=torch.float32).model()
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in merge([bert, bert], dtype=torch.bfloat16).model().parameters()} == {torch.bfloat16}
    mixed = Checkpoint.open(narrow).model()
    mixed.bert.embeddings.LayerNorm.float()
    again = merge([mixed, mixed]).model()
    assert again.bert.embeddings.LayerNorm.weight.dtype == torch.float32
    assert again.cls.predictions.bias.dtype == torch.bfloat16
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    assert mixed.training == again.training


def test_whole_numbers_stay_whole(resnet):
    wide = Checkpoint.open(resnet).model(torch.float32)
    counts = [b for name, b in wide.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(count.dtype == torch.int64 for count in counts)


def test_what_was_untied_on_loading_is_stored_apart(bert, tmp_path):
    """A file with a head of its own, though its configuration ties it: transformers unties, and nothing is lost."""
    checkpoint = Checkpoint.open(bert)
    key = "cls.predictions.decoder.weight"
    both = dict(checkpoint.tensors) | {key: 2 * checkpoint.tensors["bert.embeddings.word_embeddings.weight"]}
    folder = Checkpoint(both, checkpoint.config).save(tmp_path / "untied")
    model = type(bert).from_pretrained(folder)
    assert model.cls.predictions.decoder.weight is not model.bert.embeddings.word_embeddings.weight
    assert torch.equal(Checkpoint.open(model).tensors[key], both[key])
    assert same_tensors(merge([model, model]).model(), folder)


def test_a_stored_mask_does_not_hide_the_dtype(tmp_path):
    from conftest import FIRST, TINY

    gpt2 = Checkpoint.open(TINY[FIRST["gpt2"]])
    tensors = dict(gpt2.tensors) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    out = merge([Checkpoint(tensors, gpt2.config, template=None)] * 2, dtype=torch.bfloat16)
    folder = Checkpoint(out.tensors, gpt2.config, template=gpt2.template).save(tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_subfolders_of_small_files_go_along_and_others_do_not(folder, tmp_path):
    for name in ("1_Pooling/config.json", "additional_chat_templates/tools.jinja", "runs/events.out", ".cache/x.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    out = merge([folder, folder]).save(tmp_path / "out")
    assert (out / "1_Pooling" / "config.json").is_file()
    assert (out / "additional_chat_templates" / "tools.jinja").is_file()
    assert not (out / "runs").exists()
    assert not (out / ".cache").exists()


def test_state_dicts_with_tied_weights(bert, tmp_path):
    state = bert.state_dict()
    assert "cls.predictions.decoder.weight" in state
    out = merge([state, state]).save(tmp_path / "out")
    assert Checkpoint(Checkpoint.open(out).tensors).tensors.keys() == state.keys()
    assert same_tensors(merge([bert, dict(Checkpoint.open(bert).tensors)]), bert), "disk keys without a configuration"


def test_broken_configurations_are_said(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds a list, not an object"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": "many"}))
    with pytest.raises(CheckpointError, match=r"transformers cannot use"):
        _ = Checkpoint.open(folder).config
    with pytest.raises(CheckpointError, match=r"is a local folder, which has no revision 'main'"):
        Checkpoint.open(folder, revision="main")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e.09, which is more than any model has"),
        ({"num_labels": 10**6}, "num_labels is 1e.06"),
        ({"hidden_size": 10**20}, "hidden_size is 1e.20"),
        ({"num_hidden_layers": 1500}, "it would have more than 10840 parts, and the checkpoint has 42 tensors"),
        (
            {"vocab_size": 10**9},
            r"word_embeddings.weight is \(97, 24\), and its configuration says \(1000000000, 24\)",
        ),
        ({"max_position_embeddings": 10**9, "model_type": "roberta"}, "does not load"),
    ],
)
def test_sizes_that_a_configuration_invents_are_not_made(folder, change, says):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(folder).model()


def test_configurations_ask_for_no_code(folder):
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.Model"}}
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "org/kernel"}))
    assert Checkpoint.open(folder).model().config._attn_implementation != "org/kernel"


def test_small_files_are_a_models_own(folder, bert, tmp_path):
    """A link out of the folder would copy a file of the user's into a merge; links within a cache are allowed."""
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    for place, target in (("tokenizer.json", secret), ("1_Pooling/vocab.txt", secret), ("x.model", "/dev/zero")):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).symlink_to(target)
        with pytest.raises(CheckpointError, match=r"is a link to .*secret.txt, outside|x.model is not a file"):
            Checkpoint.open(folder)
        (folder / place).unlink()
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            file.rename(blobs / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot / "vocab.txt").symlink_to("config.json")
    out = merge([snapshot, snapshot]).save(tmp_path / "out")
    assert same_tensors(out, bert)
    assert not any(file.is_symlink() for file in out.iterdir())


def test_quantised_models_are_refused():
    eight = {"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"is quantised \(torch.float8_e4m3fn\)"):
        merge([eight, eight])
    packed = {"w.qweight": torch.ones(2, dtype=torch.int32), "w.scales": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"is quantised \(w.qweight\), .*; use the original"):
        merge([packed, packed])
    a, b = ({"w.codes": torch.full((2,), i, dtype=torch.int32), "w.scales": torch.ones(2)} for i in (1, 2))
    with pytest.raises(MismatchError, match=r"w.codes \(torch.int32\) differs .* merge the originals"):
        merge([a, b])
    assert same_tensors(merge([a, a]), a)


def test_a_broken_alignment_is_refused(bert, tmp_path):
    alignment = Alignment.random(spec_for(bert), torch.Generator())
    file = alignment.save(tmp_path / "g.safetensors")
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    singular = next(key for key in tensors if key.startswith("qk.") and key.endswith("/matrix"))
    for change, says in (
        ({"residual/order": torch.arange(24.0)}, r"expected an order of shape \(24,\), got .*float32"),
        ({singular: torch.zeros_like(tensors[singular])}, "the matrix has no inverse"),
        (
            {"residual/order": torch.zeros(24, dtype=torch.int64)},
            "the element of 'residual' is invalid: .* not a permutation",
        ),
        ({"residual/order": torch.arange(23)}, r"expected an order of shape \(24,\), got"),
        ({"vocab/order": torch.arange(97)}, "elements of vocab, which cannot move in its spec"),
    ):
        save_file(tensors | change, file, metadata)
        with pytest.raises(CheckpointError, match=says):
            Alignment.load(file)
    (name,) = metadata
    for spec, says in (
        ("{", "not a spec: "),
        ('{"table": 3}', "not a spec: table: "),
        ("x", "cannot be read"),
    ):
        save_file(tensors, file, {name: spec})
        with pytest.raises(CheckpointError, match=says):
            Alignment.load(file)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is not an alignment"):
        Alignment.load(file)


def test_what_is_not_stored_keeps_its_precision(tmp_path):
    from conftest import FIRST, TINY

    llama = TINY[FIRST["llama"]]
    narrow = type(llama).from_pretrained(Checkpoint.open(llama).save(tmp_path / "model"), dtype=torch.bfloat16)
    assert narrow.model.rotary_emb.inv_freq.dtype == torch.float32
    moved = Alignment.identity(spec_for(narrow)).apply(narrow)
    assert moved.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(moved.model.rotary_emb.inv_freq, narrow.model.rotary_emb.inv_freq)


def test_overwriting_spares_what_is_not_a_models(bert, tmp_path):
    for name in ("train.py", "notes.txt", "results.json"):
        folder = Checkpoint.open(bert).save(tmp_path / name)
        (folder / name).write_text("mine")
        with pytest.raises(TargetExistsError, match=rf"holds entries that do not belong to a model \({name}\)"):
            Checkpoint.open(bert).save(folder, overwrite=True)
        assert (folder / name).read_text() == "mine"
    folder = Checkpoint.open(bert).save(tmp_path / "parts")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    out = merge([folder, folder]).save(tmp_path / "out")
    merge([folder, folder]).save(out, overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.startswith(".")) == []


def test_a_module_keeps_the_tokenizer_of_its_folder(folder, bert, tmp_path):
    (folder / "vocab.txt").write_text("a")
    model = type(bert).from_pretrained(folder)
    assert (merge([model, model]).save(tmp_path / "out") / "vocab.txt").read_text() == "a"
    with pytest.raises(TargetExistsError, match=r"which is read"):
        Checkpoint.open(model).save(folder, overwrite=True)


def test_an_old_model_that_was_put_back_is_not_overwritten_unasked(folder, bert):
    folder.rename(folder.parent / ".model.old")
    with pytest.raises(TargetExistsError, match=r"already exists"):
        Checkpoint.open(bert).save(folder)
    assert same_tensors(folder, bert)


def test_files_have_ordinary_modes(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_what_is_no_state_dict_is_said():
    with pytest.raises(CheckpointError, match=r"not a state dict: 'epoch' are not tensors"):
        Checkpoint.open({"w": torch.ones(1), "epoch": 3})


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 5},
        {"hidden_act": "foo"},
        {"architectures": ["pipeline"]},
        {"architectures": ["GPT2Model"]},
    ],
)
def test_configurations_that_build_nothing(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if "architectures" in change:  # no class of this family: taken for the bare model, held
        assert spec_for(folder).symmetries["residual"].kind == "held"
    else:
        with pytest.raises(CheckpointError, match=r"BertForMaskedLM cannot be built from its configuration"):
            _ = Checkpoint.open(folder).ties


def test_state_dicts_with_tied_weights_move(bert):
    state = {key: tensor.clone() for key, tensor in bert.state_dict().items()}
    moved, alignment = moved_copy(bert)
    again = alignment.apply(state)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in moved.state_dict().items())


@pytest.mark.parametrize("name", [".alignment.safetensors.partial", ".report.json.partial"])
def test_what_a_killed_run_was_writing_is_in_nobodys_way(bert, tmp_path, name):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / name).write_text("of a killed run")
    out = Checkpoint.open(bert).save(tmp_path / "out")
    (out / name).write_text("of another")
    Checkpoint.open(bert).save(out, overwrite=True)
    assert not (out / name).exists()
    (out / ".notes.partial").write_text("mine")
    with pytest.raises(TargetExistsError, match=r"holds entries that do not belong to a model \(\.notes\.partial\)"):
        Checkpoint.open(bert).save(out, overwrite=True)
