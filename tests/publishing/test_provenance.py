"""Records of every model that is written: they are correct, the same on any machine, and without tokens."""

import json
import logging
import re
import shutil
import traceback

import pytest
import yaml
from conftest import HUB
from published import (
    folder_contents,
    processor,
    push_digits,
    push_parts,
    resnet,
    run_cli,
    run_fresh,
    run_ok,
    save_parts,
    vit,
    write_digits,
)

from hf_rebasin import Checkpoint
from hf_rebasin.checkpoints.provenance import Provenance, hash_files
from hf_rebasin.checkpoints.tensor_files import sha256_of
from hf_rebasin.errors import RebasinError
from hf_rebasin.text import without_secrets


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models in folders and on the Hub, data in a folder."""
    folder = tmp_path_factory.mktemp("world")
    for seed in (0, 1):
        save_parts(folder / f"vit-{seed}", vit(seed), processor(), licence="mit")
        save_parts(folder / f"resnet-{seed}", resnet(seed), processor(), licence="mit")
    push_parts("org/made-0", vit(0), processor())
    write_digits(folder / "digits")
    run_ok("align", folder / "vit-0", folder / "vit-1", "--alignment", folder / "alignment.safetensors")
    return folder


DATA = ("--data", "{}/digits")
VITS, RESNETS = ("{}/vit-0", "{}/vit-1"), ("{}/resnet-0", "{}/resnet-1")
VERBS = {
    "merge": ("merge", *VITS, *DATA, "--refit"),
    "merge with statistics": ("merge", *RESNETS, *DATA, "--method", "slerp"),
    "merge by data": ("merge", *VITS, *DATA, "--solver", "activation_matching"),
    "merge as they are": ("merge", *VITS, "--no-align", "--dtype", "bfloat16"),
    "merge of one from the Hub": ("merge", "org/made-0", "{}/vit-1", "-p", "weights=[3,1]"),
    "align": ("align", *VITS, "--groups", "permutation", "--hold", "ff.*"),
    "align by data": ("align", *VITS, *DATA, "--solver", "activation_matching"),
    "apply": ("apply", "{}/alignment.safetensors", "{}/vit-1"),
    "recalibrate": ("recalibrate", "{}/resnet-0", *DATA, "--exact"),
    "repair": ("recalibrate", "{}/vit-0", *DATA, "--like", "{}/vit-0", "--like", "{}/vit-0"),
    "interpolate": ("interpolate", *VITS, *DATA, "--points", "3", "--by", "accuracy"),
    "interpolate with statistics": ("interpolate", *RESNETS, *DATA, "--points", "3", "--recalibrate", "{}/digits"),
}


LONG = ("merge by data", "merge with statistics", "interpolate with statistics")


@pytest.mark.parametrize("verb", [pytest.param(v, marks=pytest.mark.slow) if v in LONG else v for v in VERBS])
def test_what_a_verb_writes_can_be_made_again(world, tmp_path, verb):
    run_ok(*(argument.format(world) for argument in VERBS[verb]), "-o", tmp_path / "out")
    record = Provenance.load(tmp_path / "out")
    assert record.verb == VERBS[verb][0]
    assert record.outputs == {
        file.relative_to(tmp_path / "out").as_posix(): sha256_of(file)
        for file in (tmp_path / "out").rglob("*")
        if file.is_file() and file.name not in ("rebasin.json", "README.md")
    }
    for entry in record.inputs:
        assert "/" not in entry.name or entry.commit
        assert entry.files.keys() >= {"config.json", "model.safetensors", "preprocessor_config.json"}
        assert str(entry.licence) == "mit"
    where = [f"--model={world}/{name}" for name in ("vit-0", "vit-1", "resnet-0", "resnet-1")]
    for how in ("--rebuild", "--resolve"):
        if verb != "apply" or how == "--rebuild":
            output = run_ok("verify", tmp_path / "out", how, *where, "--data", world / "digits")
            (rebuilt,) = [line for line in output.splitlines() if line.startswith("the same when rebuilt")]
            assert "model.safetensors" in rebuilt
    if verb.startswith("merge"):
        shutil.copytree(world / "vit-0", tmp_path / "vit-0")
        (tmp_path / "vit-0/config.json").write_text("{}")
        status, _, err = run_cli("verify", tmp_path / "out", "--rebuild", f"--model={tmp_path / 'vit-0'}")
        assert status == 1
        assert "say where" in err or "is it" in err


def test_what_was_made_of_what_was_made_names_what_that_was_made_of(world, tmp_path):
    run_ok("align", "org/made-0", world / "vit-1", "-o", tmp_path / "moved")
    run_ok("merge", "org/made-0", tmp_path / "moved", "-o", tmp_path / "out", "--no-align")
    first, moved = Provenance.load(tmp_path / "out").inputs
    commit = HUB.repo("org/made-0").resolve("main")
    assert first.reference == f"org/made-0@{commit}"
    assert moved.made_of == (f"org/made-0@{commit}", "vit-1")
    assert str(moved.licence) == "mit"
    tensors = Checkpoint.open(tmp_path / "moved").tensors
    changed = {key: tensor + 1 for key, tensor in tensors.items()}
    Checkpoint.open(tmp_path / "moved").model().save_pretrained(tmp_path / "moved", state_dict=changed)
    run_ok("merge", "org/made-0", tmp_path / "moved", "-o", tmp_path / "other", "--no-align")
    assert Provenance.load(tmp_path / "other").inputs[1].made_of == (), "a model that was changed since is another one"


def test_what_lies_beside_a_model_is_none_of_its_files(tmp_path):
    model = ("config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json")
    beside = (
        *(".cache/huggingface/download/tokenizer.json.metadata", "model-old/part.safetensors", "training.log"),
        *("checkpoint-5/config.json", "checkpoint-5/optimizer.pt", "checkpoint-5/report.json"),
    )
    made = ("rebasin/alignment.safetensors", "rebasin/report.json", "report.json", "SHA256SUMS")
    for name in (*model, *beside, *made, "rebasin.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(hash_files(tmp_path)) == sorted(model)
    assert list(hash_files(tmp_path, written=True)) == sorted((*model, *made))


def test_a_licence_follows_from_a_record_before_the_merge_and_after(world, tmp_path):
    run_ok("align", "org/made-0", world / "vit-1", "-o", tmp_path / "moved")
    (tmp_path / "moved/README.md").unlink()
    merge = ("merge", "org/made-0", tmp_path / "moved", "-o", tmp_path / "out", "--no-align", "--push-to", "org/both")
    output = run_ok(*merge, "--dry-run")
    assert "licence: mit, as all models have it" in output
    assert "card, recipe, rebasin.json" in output, "no alignment is promised without aligning"
    assert "published: " in run_ok(*merge)


def test_a_record_that_cannot_be_read_is_said_before_the_merge(world, tmp_path, monkeypatch):
    shutil.copytree(world / "vit-1", tmp_path / "vit-1")
    (tmp_path / "vit-1/rebasin.json").write_text("{")
    monkeypatch.setattr("hf_rebasin.pipeline.run_merge", lambda *_, **__: pytest.fail("it was merged first"))
    for more in ([], ["--dry-run"]):
        status, _, err = run_cli("merge", world / "vit-0", tmp_path / "vit-1", "-o", tmp_path / "out", *more)
        assert status == 1
        assert "rebasin.json" in err
        assert "not of the format" in err or "cannot be read" in err


def test_what_apply_reads_it_does_not_replace(world, tmp_path):
    run_ok("align", world / "vit-0", world / "vit-1", "-o", tmp_path / "merged")
    before = folder_contents(tmp_path / "merged")
    for alignment in (tmp_path / "merged", tmp_path / "merged/rebasin/alignment.safetensors"):
        status, _, err = run_cli("apply", alignment, world / "vit-1", "-o", tmp_path / "merged", "--overwrite")
        assert status == 1
        assert "which is read" in err
    assert folder_contents(tmp_path / "merged") == before


def test_models_to_verify_with_are_folders_that_are_there(world, tmp_path, monkeypatch):
    run_ok("apply", world / "alignment.safetensors", world / "vit-1", "-o", tmp_path / "out")
    monkeypatch.setenv("HOME", str(world))
    assert "all" in run_ok("verify", tmp_path / "out", "--rebuild", "--model", "~/vit-1")
    status, _, err = run_cli("verify", tmp_path / "out", "--rebuild", "--model", "~/vit-7")
    assert status == 1
    assert f"--model {world}/vit-7 is not a folder" in err


# --- the same anywhere -----------------------------------------------------------------------------------------------

RECIPE = {
    "data": {"split": "train", "samples": 16},
    "refit": True,
    "evaluate": {"split": "test", "points": 2},
}
AGAIN = "from hf_rebasin.cli.main import main; main()"


@pytest.mark.parametrize("process", ["this", pytest.param("another", marks=pytest.mark.slow)])
def test_the_same_recipe_is_the_same_bytes(world, tmp_path, monkeypatch, process):
    for where, place in (("here", "../world"), ("there", str(world))):
        (tmp_path / where).mkdir()
        recipe = {"models": [f"{place}/vit-{i}" for i in (0, 1)], **RECIPE}
        recipe["data"] = RECIPE["data"] | {"dataset": f"{place}/digits"}
        (tmp_path / where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "world").symlink_to(world)
    monkeypatch.chdir(tmp_path / "here")
    run_ok("merge", "recipe.yaml", "-o", "out")
    monkeypatch.chdir(tmp_path / "there")
    if process == "this":
        run_ok("merge", "recipe.yaml", "-o", "out")
    else:
        run_fresh(AGAIN, tmp_path / "there", "merge", "recipe.yaml", "-o", "out", PYTHONHASHSEED="7")
    here, there = folder_contents(tmp_path / "here/out"), folder_contents(tmp_path / "there/out")
    assert [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)] == []
    assert here.keys() > {"rebasin/report.json", "rebasin/alignment.safetensors", "rebasin.json", "README.md"}


# --- tokens ----------------------------------------------------------------------------------------------------------

TOKEN = "hf_VeryDistinctiveTokenThatIsNobodys"


class LogRecorder(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        self.lines.append(self.format(record))


@pytest.fixture
def log_lines(monkeypatch):
    """Record everything that the package logs, while the Hub accepts only this token."""
    recorder = LogRecorder()
    logger = logging.getLogger("hf_rebasin")
    level = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(HUB, "token", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield recorder.lines
    logger.removeHandler(recorder)
    logger.setLevel(level)
    HUB.fail_next.clear()
    HUB.expired.clear()


def find_token(texts, *folders):
    """Find the lines of texts, and the files of folders, that contain the token."""
    lines = [line for text in texts for line in text.splitlines() if TOKEN in line]
    return lines + [
        str(file)
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file() and TOKEN in name_and_text(file)
    ]


def name_and_text(file):
    return file.name + file.read_bytes().decode(errors="replace")


def test_a_token_is_said_nowhere(world, log_lines, tmp_path, capfd):
    push_parts("org/private-0", vit(5), processor(), private=True)
    push_digits("org/private-digits")
    printed = []

    def run(*arguments):
        status, out, err = run_cli(*arguments)
        printed.extend((out, err))
        return status

    data = ("--data", "org/private-digits", "-e", "split=test", "-e", "points=2", "--refit")
    models = ("org/private-0", world / "vit-1")
    report = ("--report", tmp_path / "report.html", "--push-to", "org/private-out")
    assert run("merge", *models, "-o", tmp_path / "out", *data, *report) == 0
    assert run("verify", "org/private-out") == 0
    assert run("publish", tmp_path / "out", "org/private-out") == 0
    for kind, fault in (("create", 503), ("commit", 401), ("batch", "dropped"), ("put", 403), ("commit", 400)):
        HUB.fail_next[:] = [(re.compile(kind), fault)] * 12
        (tmp_path / "out/README.md").unlink(missing_ok=True)
        HUB.lfs.pop(sha256_of(tmp_path / "out/model.safetensors"), None)
        run("publish", tmp_path / "out", f"org/private-{kind}")
    HUB.fail_next.clear()
    HUB.expired.add(TOKEN)
    assert run("verify", "org/private-out") == 1
    assert run("publish", tmp_path / "out", "org/private-out") == 1
    assert run("merge", *models, "-o", tmp_path / "more") == 1
    assert find_token([*printed, *log_lines, *capfd.readouterr()], tmp_path) == []
    assert "hf_" not in "".join(printed).replace("hf_rebasin", "").replace("hf_…", "")


@pytest.mark.parametrize("fault", [401, 403, 503, 400, "dropped"])
def test_a_token_that_is_given_is_in_no_error(world, log_lines, monkeypatch, fault):
    from hf_rebasin.publishing.upload import publish

    monkeypatch.delenv("HF_TOKEN")
    run_ok("merge", world / "vit-0", world / "vit-1", "-o", world / "given", "--no-align", "--overwrite")
    mine, theirs = f"org/given-{fault}", f"org/not-here-{fault}"
    refusals = []
    for act, request in (
        (lambda: publish(world / "given", mine, token=TOKEN), "create"),
        (lambda: publish(world / "given", mine, token=TOKEN), "commit"),
        (lambda: publish(world / "given", mine, token=f"{TOKEN}\n"), "create"),
        (lambda: Checkpoint.open(theirs, token=TOKEN), "api/models"),
        (lambda: Checkpoint.open(theirs, token=f"{TOKEN}é"), "api/models"),
    ):
        HUB.fail_next[:] = [(re.compile(request), fault)] * 12
        try:
            act()
        except (RebasinError, OSError):
            refusals.append(traceback.format_exc())
    assert len(refusals) == 5
    assert find_token([*refusals, *log_lines]) == []


def test_the_search_finds_what_is_planted(tmp_path, log_lines):
    (tmp_path / "card.md").write_text(f"x {TOKEN} y")
    logging.getLogger("hf_rebasin.checkpoints.hub").debug("asked with %s", TOKEN)
    try:
        try:
            raise ValueError(TOKEN)
        except ValueError as error:
            raise OSError("refused") from error
    except OSError:
        text = traceback.format_exc()
    assert len(find_token([text, *log_lines], tmp_path)) == 3
    assert without_secrets(f"'Bearer {TOKEN}'") == "'Bearer hf_…'"
    assert without_secrets("hf_oauth_abc.def-ghi_x, hf_rebasin") == "hf_…, hf_rebasin"


def test_records_that_somebody_wrote_by_hand(world, tmp_path):
    models = ("--model", world / "vit-0", "--model", world / "vit-1")
    run_ok("merge", world / "vit-0", world / "vit-1", "-o", tmp_path / "out", "--no-align")
    assert run_cli("verify", tmp_path / "out", "--rebuild", *models)[0] == 0
    (tmp_path / "out" / "modeling_other.py").write_text("1 / 0")
    Provenance.load(tmp_path / "out").hash_outputs(tmp_path / "out").save(tmp_path / "out")
    assert run_cli("verify", tmp_path / "out")[0] == 0
    status, output, _ = run_cli("verify", tmp_path / "out", "--rebuild", *models)
    assert status == 1
    assert "WRONG: modeling_other.py is missing from the rebuilt model" in output
    for change, says in (
        (lambda record: record["machine"].update(threads=0), "0 threads took part"),
        (lambda record: record["recipe"].pop("models"), "the recorded recipe has 1 mistake"),
        (lambda record: record.update(verb="guess"), "names an unknown verb, 'guess'"),
    ):
        record = json.loads((tmp_path / "out" / "rebasin.json").read_text())
        change(record)
        (tmp_path / "other").mkdir(exist_ok=True)
        for file in (tmp_path / "out").iterdir():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "other" / "rebasin.json").write_text(json.dumps(record))
        status, _, err = run_cli("verify", tmp_path / "other", "--rebuild", *models)
        assert status == 1
        assert says in err
