"""Every request of an upload and of a download fails, once or for good: error messages and reruns."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from conftest import HUB, same_tensors
from huggingface_hub import HfApi, constants
from minihub import CUT, DROPPED
from published import (
    commit_titles,
    expect_refusal,
    folder_contents,
    processor,
    repository_files,
    run_cli,
    run_ok,
    save_parts,
    vit,
)

from hf_rebasin import Alignment

# The requests of an upload, in order.
SENT = {
    "create": r"POST /api/repos/create",
    "info": r"GET /api/models/org/faulty$",
    "card": r"POST /api/validate-yaml",
    "preupload": r"POST /api/models/org/faulty/preupload/",
    "batch": r"POST /org/faulty.git/info/lfs/objects/batch",
    "upload": r"PUT /_lfs/put/",
    "check": r"POST /_lfs/verify",
    "commit": r"POST /api/models/org/faulty/commit/",
}
# The requests of a download.
READ = {
    "revision": r"GET /api/models/org/read$",
    "tree": r"GET /api/models/org/read/tree",
    "head": r"HEAD /org/read/resolve",
    "file": r"GET /org/read/resolve/.*/config.json",
    "content": r"GET /_lfs/get/.*/model.safetensors",
}
FOR_GOOD = 12  # more often than the client retries
EVERY = [(fault, times) for fault in (503, 401, DROPPED, CUT) for times in (1, FOR_GOOD)]


def some_of(*plain):
    """Parametrise by all faults; those not named run with --slow only."""
    return [fault if fault in plain else pytest.param(*fault, marks=pytest.mark.slow) for fault in EVERY]


SAYS = {
    503: "server error|broke off|no connection|cannot be reached",
    401: "has expired|requires authentication",
    412: "somebody else changed it meanwhile",
    DROPPED: "broke off|no connection|cannot be reached",
    CUT: "broke off|no connection|cannot be reached",
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Retry without waiting, and remove the faults that a test has not used up."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield
    HUB.fail_next.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("faults")
    models = [save_parts(place / str(seed), vit(seed), processor(), licence="mit") for seed in (20, 21)]
    run_ok("merge", *models, "-o", place / "out")
    return place / "out"


@pytest.fixture
def forgotten(folder):
    """Delete the repository and its files from the Hub."""
    HUB.repos.pop(("models", "org/faulty"), None)
    for content in folder_contents(folder).values():
        HUB.lfs.pop(hashlib.sha256(content).hexdigest(), None)


@pytest.fixture(scope="module")
def undisturbed(folder):
    since = len(HUB.requests)
    run_ok("publish", folder, "org/faulty")
    return repository_files("org/faulty"), [
        f"{method} {path.partition('?')[0]}" for method, path, _ in HUB.requests[since:]
    ]


def test_these_are_the_requests_of_a_publish(undisturbed):
    _, requests = undisturbed
    matched = [[kind for kind, pattern in SENT.items() if re.search(pattern, request)] for request in requests]
    assert {kind for kinds in matched for kind in kinds} == SENT.keys()
    assert [request for request, kinds in zip(requests, matched, strict=True) if not kinds] == []


def after(pattern, fault, times, *command):
    """Return the exit status of a command some of whose requests fail, after checking its error message."""
    HUB.fail_next[:] = [(re.compile(pattern), fault)] * times
    status, out, err = run_cli(*command)
    assert len(HUB.fail_next) < times, "the request was never made"
    HUB.fail_next.clear()
    assert "Traceback" not in out + err
    assert HUB.token not in out + err
    if status:
        assert status == 1
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: cannot "), err
        assert re.search(SAYS[fault], last), last
    return status


@pytest.mark.parametrize(("fault", "times"), some_of((503, FOR_GOOD), (DROPPED, 1)))
@pytest.mark.parametrize("kind", SENT)
def test_a_publish_goes_on_where_it_was(folder, undisturbed, forgotten, kind, fault, times):
    status = after(SENT[kind], fault, times, "publish", folder, "org/faulty")
    assert status == 1 or times == 1
    if status and ("models", "org/faulty") in HUB.repos and (kind, fault) != ("commit", CUT):
        assert repository_files("org/faulty").keys() == {".gitattributes"}, "all of it or nothing"
    run_ok("publish", folder, "org/faulty")
    assert repository_files("org/faulty") == undisturbed[0]
    assert len(commit_titles("org/faulty")) == 2


@pytest.fixture(scope="module")
def other(folder):
    """A merge in several files."""
    models = [folder.parent / "20", folder.parent / "21"]
    run_ok("merge", *models, "-o", folder.parent / "other", "--no-align", "--max-shard-size", "5KB")
    return folder.parent / "other"


@pytest.mark.parametrize("fault", [412, 503, 401, DROPPED, CUT])
def test_a_commit_over_another_model_goes_on_where_it_was(folder, undisturbed, forgotten, other, fault):
    run_ok("publish", other, "org/faulty")
    before = repository_files("org/faulty")
    assert after(SENT["commit"], fault, 1, "publish", folder, "org/faulty") == 1
    assert repository_files("org/faulty") == (undisturbed[0] if fault == CUT else before)
    run_ok("publish", folder, "org/faulty")
    assert repository_files("org/faulty") == undisturbed[0]
    assert len(commit_titles("org/faulty")) == 3


def test_who_commits_in_between_is_not_written_over(folder, undisturbed, forgotten, monkeypatch):
    run_ok("publish", folder, "org/faulty", "--revision", "next")
    create_commit = HfApi.create_commit

    def late(self, *args, **kwargs):
        repo = HUB.repo("org/faulty")
        head = repo.refs["refs/heads/main"]
        repo.refs["refs/heads/main"] = repo.add_commit(repo.commits[head]["files"], head, "theirs", "")
        return create_commit(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", late)
        assert "somebody else changed it meanwhile" in expect_refusal("publish", folder, "org/faulty")
    assert commit_titles("org/faulty") == ["theirs", "initial commit"]
    run_ok("publish", folder, "org/faulty")
    assert repository_files("org/faulty") == undisturbed[0]


@pytest.mark.parametrize(("fault", "times"), some_of((DROPPED, FOR_GOOD)))
@pytest.mark.parametrize("kind", READ)
def test_a_model_that_is_read_goes_on_where_it_was(folder, kind, fault, times, tmp_path):
    model = vit(0)
    model.push_to_hub("org/read")
    HfApi().upload_file(path_or_fileobj=str(tmp_path).encode(), path_in_repo="notes", repo_id="org/read")  # a commit
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--org--read", ignore_errors=True)
    arguments = ("apply", folder, "org/read", "-o")
    status = after(READ[kind], fault, times, *arguments, tmp_path / "out")
    assert status == 1 or times == 1
    if status:
        assert not (tmp_path / "out").exists()
        run_ok(*arguments, tmp_path / "out")
    assert same_tensors(tmp_path / "out", Alignment.load(folder / "rebasin/alignment.safetensors").apply(model))
    run_ok(*arguments, tmp_path / "again/out")
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "again/out")
