"""From models on the Hub to a merge on the Hub that anybody can check: through the real clients, to a local Hub."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import HUB, same_tensors
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from published import (
    commit_titles,
    expect_refusal,
    flip_bit,
    folder_contents,
    processor,
    push_digits,
    push_parts,
    repository_files,
    resnet,
    run_cli,
    run_fresh,
    run_ok,
    save_parts,
    vit,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_rebasin import Alignment, Checkpoint, publish
from hf_rebasin.checkpoints.provenance import Provenance
from hf_rebasin.errors import OptionError
from hf_rebasin.publishing.card import GENERATED
from hf_rebasin.publishing.upload import _refuse_card, refuse_unready
from hf_rebasin.recipes.recipe import PublishSettings

# What a reader does without hf-rebasin: pastes the code of the card, and measures.
MEASURE = """
import json, sys, torch, datasets
exec(sys.argv[1], {})
from transformers import AutoImageProcessor, AutoModelForImageClassification

model, processor = (c.from_pretrained("org/merged") for c in (AutoModelForImageClassification, AutoImageProcessor))
rows = datasets.load_dataset("org/digits", split="test")
with torch.no_grad():
    logits = model(**processor(rows["image"][:], return_tensors="pt")).logits.double()
labels = torch.tensor(rows["label"][:])
loss = torch.nn.functional.cross_entropy(logits, labels).item()
print(json.dumps({"loss": loss, "accuracy": (logits.argmax(-1) == labels).double().mean().item()}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two ViTs and digits on the Hub, and a recipe that names them by id and publishes the merge."""
    folder = tmp_path_factory.mktemp("world")
    for seed in (0, 1):
        push_parts(f"org/vit-{seed}", vit(seed), processor())
    recipe = {
        "models": ["org/vit-0", "org/vit-1"],
        "data": {"dataset": push_digits("org/digits"), "split": "train", "batch_size": 16},
        "refit": True,
        "evaluate": {"split": "test", "points": 3},
        "publish": {"to": "org/merged"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output = run_ok("merge", folder / "recipe.yaml", "-o", folder / "merged")
    return SimpleNamespace(folder=folder, merged=folder / "merged", output=output, commits=commit_titles("org/merged"))


def test_from_the_hub_to_the_hub(world):
    assert "published: http" in world.output
    assert HUB.repo("org/merged").private
    local, remote = folder_contents(world.merged), repository_files("org/merged")
    assert remote.pop(".gitattributes")
    assert local == remote
    assert local.keys() > {
        "model.safetensors",
        "rebasin/alignment.safetensors",
        "recipe.yaml",
        "rebasin.json",
        "rebasin/report.json",
    }
    assert world.commits[1:] == ["initial commit"], "one commit"
    recorded = json.loads(local["rebasin.json"])
    assert [entry["commit"] for entry in recorded["inputs"]] == [
        HUB.repo(f"org/vit-{i}").resolve("main") for i in (0, 1)
    ]
    data = HUB.repo("org/digits", "datasets").resolve("main")
    assert {recorded["recipe"][key]["revision"] for key in ("data", "evaluate")} == {data}


def test_what_was_measured_is_what_somebody_else_measures(world):
    card = ModelCard.load("org/merged")
    label, measured = run_fresh(
        MEASURE, world.folder, re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    ).splitlines()
    assert label in "0123"
    reported = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert reported == pytest.approx(json.loads(measured), abs=1e-6)
    (pair,) = json.loads(repository_files("org/merged")["rebasin/report.json"])["pairs"]
    (row,) = [row for row in pair["rows"] if row["name"] == pair["result"]]
    assert {"loss": row["loss"], **row["metrics"]} == reported


@pytest.mark.parametrize("how", ["", "--rebuild", "--resolve"])
def test_what_was_published_can_be_made_again(world, how):
    output = run_ok("verify", "org/merged", *[how] * bool(how))
    assert "checks hold" in output
    (rebuilt,) = [line for line in output.splitlines() if line.startswith("the same when rebuilt")] or [""]
    assert ("model.safetensors" in rebuilt) == bool(how)
    assert ("rebasin/alignment.safetensors" in rebuilt) == (how == "--resolve")


def test_statistics_are_taken_of_a_stream(tmp_path):
    push_digits("org/more-digits")
    for seed in (0, 1):
        push_parts(f"org/resnet-{seed}", resnet(seed), processor())
    recipe = {"models": ["org/resnet-0", "org/resnet-1"], "data": "org/more-digits", "publish": "org/resnet"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": {"split": "test", "points": 0}}))
    output = run_ok("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert "published" in output
    assert "all" in run_ok("verify", "org/resnet", "--rebuild")
    recorded = json.loads(repository_files("org/resnet")["rebasin.json"])["recipe"]
    assert recorded["recalibrate"] == "statistics"
    assert recorded["data"]["streaming"]
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    changed = json.loads((tmp_path / "other/rebasin.json").read_text())
    changed["recipe"]["recalibrate"] = False
    (tmp_path / "other/rebasin.json").write_text(json.dumps(changed))
    status, output, _ = run_cli("verify", tmp_path / "other", "--rebuild")
    assert status == 1
    assert "running_mean differs from the rebuilt tensor in" in output


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """A merge that is not published, made of the models on the Hub."""
    folder = tmp_path_factory.mktemp("small") / "out"
    run_ok("merge", "org/vit-0", "org/vit-1", "-o", folder)
    return folder


@pytest.fixture
def mine(small, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(small, tmp_path / "mine")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "rebasin/alignment.safetensors", "recipe.yaml"])
def test_a_flipped_byte_is_found_and_named(mine, name):
    flip_bit(mine / name)
    status, output, _ = run_cli("verify", mine)
    assert status == 1
    assert [line for line in output.splitlines() if line.startswith("WRONG")] == [
        line for line in output.splitlines() if line.startswith(f"WRONG: {name} was changed: its sha256 is ")
    ]
    assert f"WRONG: {name}" in output
    assert f"is not published: {name} was changed" in expect_refusal("publish", mine, "org/flipped")
    assert ("models", "org/flipped") not in HUB.repos


def test_a_flipped_byte_of_a_published_report_is_found(world):
    content = bytearray(HUB.content("org/merged", "rebasin/report.json"))
    content[content.index(b"0.")] ^= 1
    commit = HfApi().upload_file(
        path_or_fileobj=bytes(content), path_in_repo="rebasin/report.json", repo_id="org/merged"
    )
    status, output, _ = run_cli("verify", "org/merged")
    assert status == 1
    assert "WRONG: rebasin/report.json was changed" in output
    HfApi().create_commit(
        "org/merged",
        [CommitOperationAdd("rebasin/report.json", str(world.merged / "rebasin/report.json"))],
        commit_message="as it was",
    )
    assert run_cli("verify", "org/merged")[0] == 0
    assert run_cli("verify", f"org/merged@{commit.oid}")[0] == 1


def test_made_again_says_which_tensor_is_another(mine):
    flip_bit(mine / "model.safetensors")
    status, output, _ = run_cli("verify", mine, "--rebuild")
    assert status == 1
    wrong = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert any("model.safetensors was changed" in line for line in wrong)
    (tensor,) = [line for line in wrong if "differs from the rebuilt tensor in 1 of" in line]
    assert tensor.split()[1] in Checkpoint.open(mine).parts


def test_a_part_in_a_folder_is_verified_and_weights_besides_are_found(tmp_path):
    for seed in (0, 1):
        save_parts(tmp_path / f"{seed}", vit(seed), processor(), licence="mit")
        (tmp_path / f"{seed}/1_Pooling").mkdir()
        (tmp_path / f"{seed}/1_Pooling/config.json").write_text("{}")
    run_ok("merge", tmp_path / "0", tmp_path / "1", "--no-align", "-o", tmp_path / "out")
    run_ok("publish", tmp_path / "out", "org/pooled")
    assert "1_Pooling/config.json" in run_ok("verify", "org/pooled")
    for name in ("onnx/model.safetensors", "pytorch_model.bin"):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="org/pooled")
    status, output, _ = run_cli("verify", "org/pooled")
    assert status == 1
    (wrong,) = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert "pytorch_model.bin was not written with the rest" in wrong


def test_shards_and_what_was_there_before(small, tmp_path):
    run_ok("merge", "org/vit-0", "org/vit-1", "-o", tmp_path / "cut", "--max-shard-size", "5KB")
    for name in (".env", "optimizer.pt", "notes.txt"):
        (tmp_path / "cut" / name).write_text("mine")
    run_ok("publish", tmp_path / "cut", "org/cut", "--public")
    assert not HUB.repo("org/cut").private
    assert len([name for name in repository_files("org/cut") if name.startswith("model-0")]) > 2
    assert same_tensors(AutoModelForImageClassification.from_pretrained("org/cut"), small)
    assert "all" in run_ok("verify", "org/cut", "--rebuild")
    assert not repository_files("org/cut").keys() & {".env", "optimizer.pt", "notes.txt"}
    theirs = {"notes.md", "onnx/model.onnx", "onnx/tokenizer.json", "training_args.bin"}
    for name in [*theirs, "adapter_config.json", "tokenizer.json"]:
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id="org/cut")
    before = repository_files("org/cut")
    output = run_ok("publish", small, "org/cut", "--dry-run").splitlines()[-1]
    assert output.startswith("would delete there")
    assert repository_files("org/cut") == before
    run_ok("publish", small, "org/cut")
    kept = repository_files("org/cut")
    assert before.keys() - kept.keys() == set(output.split(": ")[1].split(", "))
    assert [name for name in kept if name.startswith("model")] == ["model.safetensors"]
    assert kept.keys() > theirs
    assert not kept.keys() & {"adapter_config.json", "tokenizer.json"}, "they were another model's"
    assert same_tensors(AutoModelForImageClassification.from_pretrained("org/cut"), small)
    assert "all" in run_ok("verify", "org/cut", "--rebuild")


def test_no_commit_without_a_change(small):
    output = run_ok("publish", small, "org/once")
    assert output.startswith("published: ")
    assert HUB.repo("org/once").private
    output = run_ok("publish", small, "org/once", "--public")
    assert output.startswith("nothing has changed: ")
    assert len(commit_titles("org/once")) == 2
    assert HUB.repo("org/once").private, "who sees a repository that is there is not changed"


def test_branches_messages_and_pull_requests(small):
    run_ok("publish", small, "org/branches", "--revision", "next", "--commit-message", "Better")
    assert commit_titles("org/branches", "next") == ["Better", "initial commit"]
    assert repository_files("org/branches").keys() == {".gitattributes"}
    assert 'revision="next"' in repository_files("org/branches", "next")["README.md"].decode()
    assert same_tensors(AutoModelForImageClassification.from_pretrained("org/branches", revision="next"), small)
    assert run_ok("publish", small, "org/branches", "--revision", "next").startswith("nothing has changed")
    output = run_ok("publish", small, "org/branches", "--create-pr")
    assert "/discussions/1" in output
    assert repository_files("org/branches").keys() == {".gitattributes"}
    assert (
        repository_files("org/branches", "refs/pr/1")["model.safetensors"]
        == (small / "model.safetensors").read_bytes()
    )
    assert "against the main branch" in expect_refusal(
        "publish", small, "org/branches", "--create-pr", "--revision", "x"
    )
    assert "say whose it is" in expect_refusal("publish", small, "branches")


def test_an_alignment_by_itself(small, tmp_path):
    file = small / "rebasin/alignment.safetensors"
    assert "is not an identifier of the Hub" in expect_refusal(
        "publish", file, "org/alignment", "--license", "no such"
    )
    assert "this is an alignment" in expect_refusal(
        "publish", file, "org/alignment", "--template", tmp_path / "card.j2"
    )
    run_ok("publish", file, "org/alignment", "--license", "MIT")
    assert repository_files("org/alignment").keys() == {".gitattributes", "README.md", "alignment.safetensors"}
    assert ModelCard.load("org/alignment").data.license == "mit"
    run_ok("apply", "org/alignment", "org/vit-1", "-o", tmp_path / "moved")
    expected = Alignment.load(small / "rebasin/alignment.safetensors").apply(Checkpoint.open("org/vit-1"))
    assert same_tensors(tmp_path / "moved", expected)
    assert "all" in run_ok("verify", tmp_path / "moved", "--rebuild")
    run_ok("apply", "org/merged", "org/vit-1", "-o", tmp_path / "same")
    assert same_tensors(tmp_path / "same", tmp_path / "moved")
    assert run_ok("publish", small / "rebasin/alignment.safetensors", "org/alignment", "--license", "mit").startswith(
        "nothing"
    )


def test_an_alignment_takes_no_models_place(small, world):
    before = repository_files("org/merged")
    for how in ([], ["--create-pr"]):
        error = expect_refusal("publish", small / "rebasin/alignment.safetensors", "org/merged", *how)
        assert (
            "org/merged holds a model (model.safetensors); publish the alignment to a repository of its own" in error
        )
    assert repository_files("org/merged") == before


@pytest.mark.parametrize("stub", ["", "---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---", "---\n---\n\n"])
def test_metadata_alone_are_no_card(stub):
    _refuse_card("org/stub", stub.encode(), GENERATED, {})
    with pytest.raises(OptionError, match="has a handwritten"):
        _refuse_card("org/stub", f"{stub}\nMine.".encode(), GENERATED, {})


@pytest.mark.parametrize("wrong", [{"to": 5}, {"private": "perhaps"}])
def test_what_is_said_in_python_is_checked(wrong):
    with pytest.raises(OptionError, match=f"publish: {next(iter(wrong))}: input should be"):
        publish("nowhere", wrong.get("to", "org/x"), private=wrong.get("private", True))


def test_a_card_that_somebody_wrote_is_not_replaced(mine, small):
    theirs = b"---\nlicense: mit\n---\n\nTheirs, written with care.\n"
    HfApi().create_repo("org/theirs")
    HfApi().upload_file(path_or_fileobj=theirs, path_in_repo="README.md", repo_id="org/theirs")
    error = expect_refusal("publish", mine, "org/theirs")
    assert f"hf download org/theirs README.md --local-dir {mine}" in error
    for branch in ([], ["--revision", "that-is-made"]):
        assert expect_refusal("publish", mine, "org/theirs", "--dry-run", *branch) == error
    assert "repository of its own" in expect_refusal("publish", small / "rebasin/alignment.safetensors", "org/theirs")
    assert repository_files("org/theirs").keys() == {".gitattributes", "README.md"}
    assert "/discussions/" in run_ok("publish", mine, "org/theirs", "--create-pr")
    hf_hub_download("org/theirs", "README.md", local_dir=mine)
    run_ok("publish", mine, "org/theirs")
    assert repository_files("org/theirs")["README.md"] == theirs
    (mine / "README.md").write_bytes(theirs + b"More.\n")
    run_ok("publish", mine, "org/theirs")
    assert repository_files("org/theirs")["README.md"].endswith(b"More.\n"), (
        "a handwritten card may replace a handwritten card"
    )


def test_a_card_that_is_no_utf8(mine):
    (mine / "README.md").write_bytes(b"---\nlicense: mit\n---\nCaf\xe9\n")
    assert "README.md is not UTF-8 (byte 24)" in expect_refusal("publish", mine, "org/latin")


def test_one_process_asks_the_hub_who_it_is(monkeypatch):
    settings, since = PublishSettings(to="org/who", license="mit"), len(HUB.requests)
    refuse_unready([], settings)
    time.sleep(0.2)  # the local Hub logs a request after it has answered
    assert len(HUB.requests) == since + 1
    monkeypatch.setattr("hf_rebasin.publishing.upload.is_main_process", lambda: False)
    refuse_unready([], settings)
    assert len(HUB.requests) == since + 1


def test_of_several_alignments_one_is_named(world, tmp_path):
    push_parts("org/vit-2", vit(2), processor())
    run_ok("merge", *(f"org/vit-{i}" for i in range(3)), "-o", tmp_path / "three", "--push-to", "org/three")
    assert {name for name in repository_files("org/three") if "alignment" in name} == {
        "rebasin/alignment-1.safetensors",
        "rebasin/alignment-2.safetensors",
    }
    error = expect_refusal("apply", "org/three", "org/vit-2", "-o", tmp_path / "moved")
    assert "has rebasin/alignment-1.safetensors, rebasin/alignment-2.safetensors; say which (--file " in error
    run_ok("apply", "org/three", "org/vit-2", "-o", tmp_path / "moved", "--file", "alignment-2.safetensors")
    (other,) = [Alignment.load(tmp_path / "three/rebasin/alignment-2.safetensors")]
    assert same_tensors(tmp_path / "moved", other.apply(Checkpoint.open("org/vit-2")))
    assert "all" in run_ok("verify", "org/three", "--resolve")


def spoiled(folder, how):
    """Spoil a folder in a way that its record agrees with, but that must not be published."""
    if how == "NaN":
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif how == "loss":
        report = json.loads((folder / "rebasin/report.json").read_text())
        for row in report["pairs"][0]["rows"]:
            row["loss"] = None
        (folder / "rebasin/report.json").write_text(json.dumps(report))
    elif how == "metric":
        report = json.loads((folder / "rebasin/report.json").read_text())
        for row in report["pairs"][0]["rows"]:
            row["metrics"] = dict.fromkeys(row["metrics"])
        (folder / "rebasin/report.json").write_text(json.dumps(report))
    elif how == "moved":
        report = json.loads((folder / "rebasin/report.json").read_text())
        report["pairs"][0]["exactness"]["after"] += 1.0
        (folder / "rebasin/report.json").write_text(json.dumps(report))
    (folder / "SHA256SUMS").unlink()
    Provenance.load(folder).hash_outputs(folder).save(folder)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("NaN", "NaN or infinite"),
        ("loss", "no finite loss"),
        ("metric", "no finite accuracy"),
        ("moved", "changed its loss from"),
    ],
)
def test_what_is_broken_is_not_published(world, tmp_path, how, says):
    folder = shutil.copytree(world.merged, tmp_path / "mine")
    spoiled(folder, how)
    assert run_cli("verify", folder)[0] == 0
    since = len(HUB.requests)
    assert says in expect_refusal("publish", folder, f"org/broken-{how}".lower())
    assert HUB.requests[since:] == []


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_model.safetensors"]
)
def test_weights_that_were_not_written_with_the_rest(mine, name):
    (mine / name).write_bytes(b"x")
    since = len(HUB.requests)
    assert f"{name} was not written with the rest" in expect_refusal("publish", mine, "org/stray")
    assert HUB.requests[since:] == []


def test_a_folder_of_somebody_else_is_not_published(tmp_path):
    folder = save_parts(tmp_path / "plain", vit(0), licence="mit")
    assert "has no rebasin.json" in expect_refusal("publish", folder, "org/plain")
    assert "nowhere does not exist" in expect_refusal("publish", tmp_path / "nowhere", "org/nowhere")
