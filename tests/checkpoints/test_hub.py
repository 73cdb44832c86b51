"""Reading from the Hub: one commit, only the files that are needed, the cache offline, and error messages.

Everything goes through the real client to a local Hub.
"""

import errno
import os
import re
import subprocess
import sys
from itertools import count

import huggingface_hub
import pytest
import torch
from conftest import FIRST, HUB, ROOT, TINY, moved_copy, same_tensors
from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled

from hf_rebasin import Checkpoint, Recipe, merge
from hf_rebasin.checkpoints import hub as reading
from hf_rebasin.checkpoints.folder import list_side_files
from hf_rebasin.errors import CheckpointError, HubError, NoSpaceError
from hf_rebasin.recipes.runner import open_models

COUNT = count()


@pytest.fixture
def model():
    return TINY[FIRST["llama"]]


@pytest.fixture
def at_once(monkeypatch):
    """The client retries without waiting."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def push_model(model, folder, repo=None, *, shards="5GB", **files):
    """Push a model to the local Hub, with further files (`README_md="…"`), and return (repository, commit)."""
    repo = repo or f"org/in-{next(COUNT)}"
    there = Checkpoint.open(model).save(folder / f"up-{next(COUNT)}", max_shard_size=shards)
    for name, text in files.items():
        (there / name.replace("_md", ".md")).write_text(text)
    HfApi().create_repo(repo, exist_ok=True)
    return repo, HfApi().upload_folder(repo_id=repo, folder_path=there).oid


def requests_since(since, part=""):
    """Return the requests to the Hub since then, as `GET /path`."""
    return [f"{method} {path}" for method, path, _ in HUB.requests[since:] if part in path]


def test_a_branch_that_moves_is_one_commit_in_a_run(model, tmp_path, monkeypatch):
    moved, _ = moved_copy(model)
    repo, first = push_model(model, tmp_path)
    later = Checkpoint.open(moved).save(tmp_path / "later")
    original = Checkpoint.open

    def open_and_push(*args, **kwargs):
        checkpoint = original(*args, **kwargs)
        HfApi().upload_folder(repo_id=repo, folder_path=later)
        return checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "open", open_and_push)
        models = open_models(Recipe.from_dict({"models": [repo, f"{repo}@main"], "align": False})).models
    assert HUB.repo(repo).resolve("main") != first
    assert [checkpoint.commit for checkpoint in models] == [first] * 2
    assert all(same_tensors(checkpoint, model) for checkpoint in models)
    assert Checkpoint.open(repo).commit == HUB.repo(repo).resolve("main")
    assert same_tensors(Checkpoint.open(f"{repo}@{first}"), model)
    assert same_tensors(repo, moved)


def test_what_is_made_of_one_model_keeps_its_commit_and_a_merge_has_none(model, tmp_path):
    repo, commit = push_model(model, tmp_path)
    checkpoint = Checkpoint.open(repo)
    assert (checkpoint.commit, checkpoint.name) == (commit, repo)
    assert moved_copy(checkpoint)[0].commit == commit
    assert merge([checkpoint, checkpoint]).commit is None
    assert Checkpoint.open(checkpoint.save(tmp_path / "here")).commit is None


def test_only_files_of_the_model_are_fetched_and_its_card_stays_there(model, tmp_path):
    others = {"flax_model.msgpack": "x", "model.fp16.safetensors": "x", "training_args.bin": "x", "optimizer.pt": "x"}
    repo, _ = push_model(model, tmp_path, README_md="---\nlicense: mit\n---\n", LICENSE="MIT", **others)
    since = len(HUB.requests)
    checkpoint = Checkpoint.open(repo)
    fetched = {path.rpartition("/")[2] for path in requests_since(since, "/resolve/")}
    assert fetched >= {"config.json", "model.safetensors", "README.md", "LICENSE"}
    assert not fetched & others.keys()
    out = checkpoint.save(tmp_path / "out")
    assert not (out / "README.md").exists()
    assert (out / "LICENSE").read_text() == "MIT"
    since = len(HUB.requests)
    Checkpoint.open(repo)
    assert not requests_since(since, "/resolve/")


def test_the_folders_of_a_repository_are_those_of_a_folder(model, tmp_path):
    """A part of a sentence transformer is copied wherever it is; a tokenizer beside other weights is not."""
    there = Checkpoint.open(model).save(tmp_path / "up")
    goes_along = ("1_Pooling/config.json", "additional_chat_templates/tool.jinja", "tokenizer.json")
    stays = ("onnx/tokenizer.json", "onnx/model.onnx", "checkpoint-5/config.json", "checkpoint-5/optimizer.pt")
    for name in (*goes_along, *stays, ".eval/config.json"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_text("{}")
    repo = f"org/in-{next(COUNT)}"
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=there)
    folder = Checkpoint.open(repo).folder
    fetched = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors", *goes_along}
    assert [f.relative_to(folder) for f in list_side_files(folder)] == [
        f.relative_to(there) for f in list_side_files(there)
    ]


def test_shards_are_fetched_and_pinned(model, tmp_path):
    repo, commit = push_model(model, tmp_path, shards="20KB")
    assert len([file for file in HUB.repo(repo).files(commit)[1] if file.endswith(".safetensors")]) > 2
    assert same_tensors(Checkpoint.open(repo), model)
    planned = Checkpoint.open(push_model(model, tmp_path, shards="20KB")[0], values=False)
    assert planned.shapes() == Checkpoint.open(model).shapes()


def test_planning_fetches_no_weights(model, tmp_path):
    repo, commit = push_model(model, tmp_path)
    size = HUB.repo(repo).files(commit)[1]["model.safetensors"].size
    since = len(HUB.requests)
    planned = Checkpoint.open(repo, values=False)
    assert planned.shapes() == Checkpoint.open(model).shapes()
    assert planned.dtypes == Checkpoint.open(model).dtypes
    assert not list(planned.folder.glob("*.safetensors"))
    assert size <= reading.bytes_to_download(repo, commit, planned.folder) < size + 10_000
    with pytest.raises(CheckpointError, match="was opened for planning"):
        next(iter(planned.tensors.values()))
    Checkpoint.open(repo)
    assert reading.bytes_to_download(repo, commit, planned.folder) == 0
    assert same_tensors(Checkpoint.open(repo, values=False), model), "what is here is read"
    assert [r for r in requests_since(since, "/_lfs/get/") if r.startswith("GET")], "downloads are recorded here"


def test_old_files_say_no_shapes_before_they_are_here(model, tmp_path):
    repo = f"org/in-{next(COUNT)}"
    torch.save(dict(Checkpoint.open(model).tensors), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, whose shapes cannot be read remotely"):
        Checkpoint.open(repo, values=False)
    assert same_tensors(repo, model)
    assert same_tensors(Checkpoint.open(repo, values=False), model)


@pytest.mark.parametrize("wanted", [False, True])
def test_progress_bars_are_shown_where_they_are_wanted(wanted, model, tmp_path, monkeypatch):
    repo, _ = push_model(model, tmp_path)
    bars = sys.modules["huggingface_hub.utils.tqdm"]  # a class of that name hides it
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "progress_bar_states", {})
    shown = []
    fetch = huggingface_hub.snapshot_download

    def watched(*args, **kwargs):
        shown.append(not are_progress_bars_disabled())
        return fetch(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    Checkpoint.open(repo, progress=wanted)
    assert shown
    assert set(shown) == {wanted}
    assert not are_progress_bars_disabled()


def expect_error(kind, act):
    """Return the message of the error that `act` raises, after checking that it and its causes contain no token."""
    with pytest.raises(kind) as caught:
        act()
    shown = caught.value
    while shown is not None:
        assert not re.search(r"hf_(minihub|wrong|expired)", str(shown))
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_is_no_such_revision(model, tmp_path):
    repo, commit = push_model(model, tmp_path)
    HfApi().create_tag(repo, tag="v1.0")
    for wrong, hint in (
        ("mian", "did you mean 'main'"),
        ("v1.1", "did you mean 'v1.0'"),
        ("0" * 40, "known: main, v1"),
    ):
        error = expect_error(HubError, lambda wrong=wrong: Checkpoint.open(f"{repo}@{wrong}"))
        assert f"{repo} has no revision '{wrong}'" in error
        assert hint in error
    assert Checkpoint.open(f"{repo}@v1.0").commit == commit


def test_there_is_no_such_repository_or_not_for_everybody(model, tmp_path):
    repo, _ = push_model(model, tmp_path)
    HUB.repo(repo).private = True
    for name, token in (("org/none", None), (repo, "hf_wrong0123456789abcdefghijkl")):
        error = expect_error(CheckpointError, lambda name=name, token=token: Checkpoint.open(name, token=token))
        assert f"'{name}' is neither a local folder nor a repository" in error
        assert "hf auth login" in error
    assert same_tensors(Checkpoint.open(repo), model)


def test_gated_repositories_say_where_their_terms_are(model, tmp_path):
    repo, _ = push_model(model, tmp_path)
    HUB.gated["models", repo] = set()
    error = expect_error(HubError, lambda: Checkpoint.open(repo))
    assert f"accept its terms at {HUB.url}/{repo}, then log in" in error
    assert "accept its terms" in expect_error(HubError, lambda: Checkpoint.open(repo, values=False))
    HUB.gated["models", repo].add(HUB.token)
    assert same_tensors(Checkpoint.open(repo), model)


def test_expired_and_impossible_tokens(model, tmp_path):
    repo, _ = push_model(model, tmp_path)
    HUB.expired.add("hf_expired0123456789abcdefghij")
    error = expect_error(HubError, lambda: Checkpoint.open(repo, token="hf_expired0123456789abcdefghij"))
    assert "invalid or has expired" in error
    assert f"{HUB.url}/settings/tokens" in error
    since = len(HUB.requests)
    for token in ("hf_wrong\nX: y", "hf_wrongé", "hf wrong"):
        assert "characters" in expect_error(HubError, lambda token=token: Checkpoint.open(repo, token=token))
    assert not requests_since(since)


def test_a_fault_of_the_hub_is_called_one(model, tmp_path, at_once):
    repo, commit = push_model(model, tmp_path)
    for place in (f"GET /api/models/{repo}/revision", f"GET /api/models/{repo}/tree", "GET .*config.json"):
        HUB.fail_next += [(re.compile(place), 503)] * 9
        error = expect_error(HubError, lambda: Checkpoint.open(repo, revision="main"))
        HUB.fail_next.clear()
        assert "a server error (503); run it again later" in error
    assert Checkpoint.open(repo).commit == commit
    HUB.fail_next += [(re.compile(f"GET /api/models/{repo}$"), 503)] * 9
    assert Checkpoint.open(repo).commit == commit, "the last known commit is in the cache"
    HUB.fail_next.clear()


def test_a_repository_without_weights(tmp_path):
    repo = f"org/in-{next(COUNT)}"
    HfApi().create_repo(repo)
    HfApi().upload_file(repo_id=repo, path_or_fileobj=b"{}", path_in_repo="config.json")
    for values in (True, False):
        error = expect_error(CheckpointError, lambda values=values: Checkpoint.open(repo, values=values))
        assert f"{repo} has no weights that can be merged" in error
        assert "config.json" in error


def test_a_broken_download_goes_on_where_it_was(model, tmp_path, at_once):
    repo, commit = push_model(model, tmp_path, shards="20KB")
    shards = [file for file in HUB.repo(repo).files(commit)[1] if file.endswith(".safetensors")]
    HUB.cut[shards[-1]] = 100
    try:
        error = expect_error(HubError, lambda: Checkpoint.open(repo))
    finally:
        HUB.cut.clear()
    assert f"cannot read {repo}@{commit}: the transfer broke off" in error
    assert "run it again" in error
    since = len(HUB.requests)
    assert same_tensors(Checkpoint.open(repo), model)
    fetched = [path.rpartition("/")[2] for path in requests_since(since, "/_lfs/get/") if path.startswith("GET")]
    assert 1 <= len(fetched) < len(shards)
    assert shards[-1] in fetched


def test_a_full_disk_is_called_one(model, tmp_path, monkeypatch):
    repo, _ = push_model(model, tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "blobs/x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "the disk is full (blobs/x)" in expect_error(NoSpaceError, lambda: Checkpoint.open(repo))


OFFLINE = """
import sys, time
from hf_rebasin import Checkpoint
time.sleep = lambda seconds: None
for name in sys.argv[1:]:
    try:
        checkpoint = Checkpoint.open(name)
        print(checkpoint.commit, sum(t.double().sum().item() for t in checkpoint.tensors.values()))
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_without_a_connection_the_cache_is_what_there_is(model, tmp_path):
    """Offline by choice and by accident; a model of which only shapes were read is not in the cache."""
    repo, commit = push_model(model, tmp_path, README_md="x")
    half, _ = push_model(model, tmp_path)
    total = sum(t.double().sum().item() for t in Checkpoint.open(repo).tensors.values())
    (Checkpoint.open(repo).folder / "README.md").unlink()  # fetched by another client without it
    Checkpoint.open(half, values=False)
    for change, why in (
        ({"HF_HUB_OFFLINE": "1"}, "offline (HF_HUB_OFFLINE is set)"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "there is no connection to http://127.0.0.1:9 (ConnectError)"),
    ):
        command = [sys.executable, "-c", OFFLINE, repo, f"{repo}@{commit}", half, "org/none"]
        run = subprocess.run(command, env=os.environ | change, cwd=ROOT, capture_output=True, text=True, check=True)
        known, pinned, shapes, none = run.stdout.splitlines()
        assert known == pinned == f"{commit} {total}"
        for error in (shapes, none):
            assert error.startswith("HubError cannot read org/")
            assert f"it is not in the cache, and {why}" in error
