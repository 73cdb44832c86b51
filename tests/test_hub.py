"""The Hub as a place to read from: one commit, only what is needed, from the cache without a connection, and errors.

Everything goes through the real client to a local Hub.
"""

from itertools import count

import pytest
from conftest import FIRST, HUB, TINY, moved_copy, same_tensors
from huggingface_hub import HfApi

from hf_rebasin import Checkpoint, Recipe, merge
from hf_rebasin import hub as reading
from hf_rebasin.errors import CheckpointError
from hf_rebasin.running import opened

COUNT = count()


@pytest.fixture
def model():
    return TINY[FIRST["llama"]]


def pushed(model, folder, repo=None, *, shards="5GB", **files):
    """(repository, commit) of a model on the local Hub, with more files: `README="…"`."""
    repo = repo or f"org/in-{next(COUNT)}"
    there = Checkpoint.open(model).save(folder / f"up-{next(COUNT)}", max_shard_size=shards)
    for name, text in files.items():
        (there / name.replace("_md", ".md")).write_text(text)
    HfApi().create_repo(repo, exist_ok=True)
    return repo, HfApi().upload_folder(repo_id=repo, folder_path=there).oid


def asked(since, what=""):
    """What was asked of the Hub since then, as `GET /path`."""
    return [f"{method} {path}" for method, path, _ in HUB.requests[since:] if what in path]


def test_a_branch_that_moves_is_one_commit_in_a_run(model, tmp_path, monkeypatch):
    moved, _ = moved_copy(model)
    repo, first = pushed(model, tmp_path)
    later = Checkpoint.open(moved).save(tmp_path / "later")
    original = Checkpoint.open

    def open_and_push(*args, **kwargs):
        found = original(*args, **kwargs)
        HfApi().upload_folder(repo_id=repo, folder_path=later)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "open", open_and_push)
        models = opened(Recipe.from_dict({"models": [repo, f"{repo}@main", repo], "align": False})).models
    assert HUB.repo(repo).resolve("main") != first
    assert [one.commit for one in models] == [first] * 3
    assert all(same_tensors(one, model) for one in models)
    assert Checkpoint.open(repo).commit == HUB.repo(repo).resolve("main")
    assert same_tensors(Checkpoint.open(f"{repo}@{first}"), model)
    assert same_tensors(repo, moved)


def test_what_is_made_of_one_model_keeps_its_commit_and_a_merge_has_none(model, tmp_path):
    repo, commit = pushed(model, tmp_path)
    checkpoint = Checkpoint.open(repo)
    assert (checkpoint.commit, checkpoint.name) == (commit, repo)
    assert moved_copy(checkpoint)[0].commit == commit
    assert merge([checkpoint, checkpoint]).commit is None
    assert Checkpoint.open(checkpoint.save(tmp_path / "here")).commit is None


def test_only_what_is_needed_is_asked_for_and_its_card_stays_there(model, tmp_path):
    others = {"flax_model.msgpack": "x", "model.fp16.safetensors": "x", "training_args.bin": "x", "optimizer.pt": "x"}
    repo, _ = pushed(model, tmp_path, README_md="---\nlicense: mit\n---\n", LICENSE="MIT", **others)
    since = len(HUB.requests)
    checkpoint = Checkpoint.open(repo)
    fetched = {path.rpartition("/")[2] for path in asked(since, "/resolve/")}
    assert fetched >= {"config.json", "model.safetensors", "README.md", "LICENSE"}
    assert not fetched & others.keys()
    out = checkpoint.save(tmp_path / "out")
    assert not {"README.md", "LICENSE"} & {file.name for file in out.iterdir()}
    since = len(HUB.requests)
    Checkpoint.open(repo)
    assert not asked(since, "/resolve/")


def test_shards_are_fetched_and_pinned(model, tmp_path):
    repo, commit = pushed(model, tmp_path, shards="20KB")
    assert len([file for file in HUB.repo(repo).files(commit)[1] if file.endswith(".safetensors")]) > 2
    assert same_tensors(Checkpoint.open(repo), model)
    planned = Checkpoint.open(pushed(model, tmp_path, shards="20KB")[0], values=False)
    assert planned.shapes() == Checkpoint.open(model).shapes()


def test_planning_fetches_no_weights(model, tmp_path):
    repo, commit = pushed(model, tmp_path)
    size = HUB.repo(repo).files(commit)[1]["model.safetensors"].size
    since = len(HUB.requests)
    planned = Checkpoint.open(repo, values=False)
    assert planned.shapes() == Checkpoint.open(model).shapes()
    assert planned.dtypes == Checkpoint.open(model).dtypes
    assert not list(planned.folder.glob("*.safetensors"))
    assert size <= reading.to_download(repo, commit) < size + 10_000
    with pytest.raises(CheckpointError, match="only shapes of"):
        next(iter(planned.tensors.values()))
    Checkpoint.open(repo)
    assert reading.to_download(repo, commit) == 0
    assert same_tensors(Checkpoint.open(repo, values=False), model), "what is here is read"
    assert [r for r in asked(since, "/_lfs/get/") if r.startswith("GET")], "downloads are seen here"
