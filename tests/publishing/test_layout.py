"""Where the files of an output lie: nothing at its top but a model that any engine loads; and older outputs."""

import ast
import json
import os
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
from conftest import HUB, same_tensors
from huggingface_hub import HfApi, ModelCard
from published import (
    expect_refusal,
    folder_contents,
    processor,
    repository_files,
    resnet,
    run_cli,
    run_ok,
    save_parts,
    vit,
    write_digits,
)

from hf_rebasin import Alignment, Checkpoint
from hf_rebasin.checkpoints.provenance import Provenance
from hf_rebasin.publishing.card import GENERATED

DATA = ("--data", "{}/digits")
VITS = ("{}/vit-0", "{}/vit-1")
# Commands that write a model, with the files that they leave in the sub-folder.
OUTPUTS = {
    "merge as they are": (("merge", *VITS, "--no-align"), set()),
    "merge": (("merge", *VITS), {"alignment.safetensors"}),
    "merge of three": (("merge", *VITS, "{}/vit-2"), {"alignment-1.safetensors", "alignment-2.safetensors"}),
    "merge with a report": (
        ("merge", *VITS, *DATA, "-e", "split=test", "-e", "points=2", "-e", "samples=8"),
        {"alignment.safetensors", "report.json", "report-vit-vit-0-vit-1.png"},
    ),
    "merge as they are with a report": (
        ("merge", *VITS, "--no-align", *DATA, "-e", "split=test", "-e", "points=2", "-e", "samples=8"),
        {"report.json", "report-vit-vit-0-vit-1.png"},
    ),
    "align": (("align", *VITS), {"alignment.safetensors"}),
    "apply": (("apply", "{}/g.safetensors", "{}/vit-1"), {"alignment.safetensors"}),
    "recalibrate": (("recalibrate", "{}/resnet-0", *DATA), set()),
    "interpolate": (("interpolate", *VITS, *DATA, "--points", "2"), set()),
}
MODEL = {"config.json", "preprocessor_config.json", "model.safetensors", "SHA256SUMS", "README.md", "rebasin.json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models with and without a licence, data, an alignment, and all outputs."""
    place = tmp_path_factory.mktemp("layout")
    for seed, licence in ((0, "mit"), (1, "mit"), (2, "apache-2.0")):
        save_parts(place / f"vit-{seed}", vit(seed), processor(), licence=licence)
    save_parts(place / "resnet-0", resnet(0), processor())
    write_digits(place / "digits")
    run_ok("align", place / "vit-0", place / "vit-1", "--alignment", place / "g.safetensors")
    outputs = {}
    for number, (name, (command, _)) in enumerate(OUTPUTS.items()):
        outputs[name] = place / f"out-{number}"
        run_ok(*(argument.format(place) for argument in command), "-o", outputs[name])
    inputs = [f"--model={place}/vit-{seed}" for seed in range(3)] + [f"--model={place}/resnet-0"]
    return SimpleNamespace(place=place, outputs=outputs, again=(*inputs, "--data", place / "digits"))


@pytest.fixture(params=OUTPUTS)
def output(world, request):
    return world.outputs[request.param], OUTPUTS[request.param][1]


def test_a_model_has_one_file_of_tensors_at_its_top(output):
    folder, records = output
    names = {file.name for file in folder.iterdir() if file.is_file()}
    assert [name for name in names if name.endswith(".safetensors")] == ["model.safetensors"]
    assert names - {"recipe.yaml"} == MODEL
    assert ("recipe.yaml" in names) == (Provenance.load(folder).verb == "merge")
    assert {file.name for file in folder.rglob("*") if file.parent != folder} == records
    assert (folder / "rebasin").is_dir() == bool(records)


def test_the_file_of_an_alignment_lies_where_it_was_asked_for(world):
    assert (world.place / "g.safetensors").is_file()
    assert not (world.place / "rebasin").exists()


# --- outputs of older versions ---------------------------------------------------------------------------------------


def age(folder, copy):
    """Copy an output and lay it out as older versions did: records at the top, no card, hashes of weights alone."""
    shutil.copytree(folder, copy)
    for file in (copy / "rebasin").iterdir():
        file.rename(copy / file.name)
    (copy / "rebasin").rmdir()
    (copy / "README.md").unlink()
    lines = (copy / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copy / "SHA256SUMS").write_text("".join(line for line in lines if line.endswith("  model.safetensors\n")))
    Provenance.load(copy).hash_outputs(copy).save(copy)
    assert not any("/" in name for name in Provenance.load(copy).outputs)
    return copy


@pytest.mark.parametrize("name", ["merge", "merge of three", "merge with a report", "align"])
def test_older_outputs_are_verified_rebuilt_applied_and_published(world, tmp_path, name):
    folder = age(world.outputs[name], tmp_path / "old")
    for how in ("", "--rebuild", "--resolve"):
        output = run_ok("verify", folder, *[how] * bool(how), *world.again * bool(how))
        assert "checks hold" in output
        alignments = [file.name for file in folder.glob("alignment*")]
        (rebuilt,) = [line for line in output.splitlines() if line.startswith("the same when rebuilt")] or [""]
        assert all((alignment in rebuilt) == (how == "--resolve") for alignment in alignments)
    first = ("--file", "alignment-1.safetensors") if len(alignments) > 1 else ()
    run_ok("apply", folder, world.place / "vit-1", "-o", tmp_path / "moved", *first)
    expected = Alignment.load(folder / alignments[0]).apply(Checkpoint.open(world.place / "vit-1"))
    assert len(alignments) > 1 or same_tensors(tmp_path / "moved", expected)
    repository = f"org/old-{name.replace(' ', '-')}"
    run_ok("publish", folder, repository, "--license", "mit")
    assert set(alignments) < repository_files(repository).keys()
    assert "checks hold" in run_ok("verify", repository)
    images = re.findall(r"!\[.*?\]\((.*?)\)", ModelCard.load(repository).text)
    assert images == [file.name for file in folder.glob("report*.png")]
    run_ok("apply", repository, world.place / "vit-1", "-o", tmp_path / "again", *first)
    assert same_tensors(tmp_path / "again", tmp_path / "moved")
    # the same model in the new layout
    deleted = {"alignment.safetensors", "alignment-1.safetensors", "alignment-2.safetensors", "report.json", *images}
    newer = shutil.copytree(world.outputs[name], tmp_path / "new")
    run_ok("publish", newer, repository, "--license", "mit")
    present = repository_files(repository).keys() - {".gitattributes"}
    assert not present & deleted
    assert present == folder_contents(newer).keys()
    assert "checks hold" in run_ok("verify", repository)


def test_of_a_model_that_was_published_before_no_record_stays(world, tmp_path):
    for name in ("merge of three", "merge"):
        shutil.copytree(world.outputs[name], tmp_path / name)  # the card of what is published is written anew
    run_ok("publish", tmp_path / "merge of three", "org/records", "--license", "mit")
    HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="rebasin/notes.txt", repo_id="org/records")
    run_ok("publish", tmp_path / "merge", "org/records")
    records = {name for name in repository_files("org/records") if name.startswith("rebasin/")}
    assert records == {"rebasin/alignment.safetensors", "rebasin/notes.txt"}


STRAYS = ("alignment.safetensors", "rebasin/alignment-7.safetensors", "other.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name", STRAYS)
def test_tensors_that_were_not_written_with_the_rest_are_found(world, tmp_path, name):
    folder = shutil.copytree(world.outputs["merge"], tmp_path / "mine")
    shutil.copy(folder / "rebasin/alignment.safetensors", folder / name)
    status, output, _ = run_cli("verify", folder)
    assert status == 1
    assert f"WRONG: {name} was not written with the rest" in output
    assert f"{name} was not written with the rest" in expect_refusal("publish", folder, "org/stray-layout")


@pytest.mark.parametrize("name", STRAYS)
def test_tensors_that_were_uploaded_beside_a_published_model_are_found(world, tmp_path, name):
    if ("models", "org/strays") not in HUB.repos:
        run_ok("publish", shutil.copytree(world.outputs["merge"], tmp_path / "mine"), "org/strays")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="org/strays")
    status, output, _ = run_cli("verify", "org/strays")
    assert status == 1
    assert f"WRONG: {name} was not written with the rest" in output
    HfApi().delete_file(name, "org/strays")
    assert run_cli("verify", "org/strays")[0] == 0


def test_a_record_of_an_input_does_not_go_along(world, tmp_path):
    first = shutil.copytree(world.outputs["merge with a report"], tmp_path / "first")
    run_ok("merge", first, world.place / "vit-2", "--no-align", "-o", tmp_path / "out")
    assert not (tmp_path / "out/rebasin").exists()
    assert not any(name.startswith(("rebasin/", "report")) for name in Provenance.load(tmp_path / "out").outputs)
    assert not any(name.startswith("rebasin/") for name in Provenance.load(tmp_path / "out").inputs[0].files)
    run_ok("publish", first, "org/recorded")
    run_ok("merge", "org/recorded", world.place / "vit-2", "--no-align", "-o", tmp_path / "other")
    assert folder_contents(tmp_path / "other").keys() == folder_contents(tmp_path / "out").keys()


def test_an_output_may_be_overwritten_and_a_folder_with_more_in_it_not(world, tmp_path):
    folder = shutil.copytree(world.outputs["merge of three"], tmp_path / "out")
    again = ("merge", world.place / "vit-0", world.place / "vit-1", "--no-align", "-o", folder, "--overwrite")
    (folder / "rebasin/.report.json.partial").write_text("{")
    run_ok(*again)
    assert not (folder / "rebasin").exists()
    (folder / "rebasin").mkdir()
    (folder / "rebasin/thesis.txt").write_text("mine")
    assert "thesis.txt" in expect_refusal(*again)
    assert (folder / "rebasin/thesis.txt").read_text() == "mine"


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "modes"), [(0o022, {0o755, 0o644}), (0o077, {0o700, 0o600}), (0o002, {0o775, 0o664})]
)
def test_modes_follow_the_umask(world, tmp_path, mask, modes):
    before = os.umask(mask)
    try:
        command = OUTPUTS["merge with a report"][0]
        run_ok(*(argument.format(world.place) for argument in command), "-o", tmp_path / "out")
        run_ok("align", *(name.format(world.place) for name in VITS), "--alignment", tmp_path / "out/g.safetensors")
        Checkpoint.open(vit(3)).save(tmp_path / "out/module")
    finally:
        os.umask(before)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in paths} == modes
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {max(modes)}


# --- the card --------------------------------------------------------------------------------------------------------


def test_every_output_has_a_card(world, output):
    folder, _ = output
    text = (folder / "README.md").read_text()
    assert GENERATED in text
    assert f"\n# {folder.name}\n" in text
    assert f'.from_pretrained("{folder.name}")' in text
    assert f"hf-rebasin verify {folder.name} --rebuild" in text
    assert str(world.place.parent) not in text
    assert all(digest in text for digest in Provenance.load(folder).outputs.values())
    reported = (folder / "rebasin/report.json").is_file()
    assert ("## How good it is" in text) == reported
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(images) == reported
    assert all((folder / image).is_file() for image in images)


@pytest.mark.parametrize(
    ("name", "licence", "reason"),
    [
        ("merge", "mit", "Licence: mit, as all models have it."),
        ("merge of three", None, "Licence: the licences differ (vit-0: mit, vit-1: mit, vit-2: apache-2.0), so"),
        ("recalibrate", None, "Licence: not all models say which licence they have (resnet-0: none said), so"),
    ],
)
def test_a_licence_that_is_not_known_is_left_out_and_it_is_said_why(world, name, licence, reason):
    card = ModelCard.load(world.outputs[name] / "README.md")
    assert card.data.license == licence
    assert reason in card.text


def test_the_same_merge_has_the_same_card_in_any_folder_of_the_same_name(world, tmp_path):
    cards = []
    for place, name in (("one", "out"), ("two", "out"), ("three", "other")):
        run_ok("merge", *(model.format(world.place) for model in VITS), "-o", tmp_path / place / name)
        cards.append(folder_contents(tmp_path / place / name))
    assert cards[0] == cards[1]
    assert [file for file in cards[0] if cards[0][file] != cards[2][file]] == ["README.md"]


@pytest.mark.parametrize("name", ['a "b" $c', os.fsdecode(b"caf\xe9"), "ß 模型"])
def test_a_folder_may_have_any_name(world, tmp_path, name):
    run_ok("merge", *(model.format(world.place) for model in VITS), "--no-align", "-o", tmp_path / name)
    text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    code = ast.parse(re.search(r"```python\n(.*?)```", text, re.S)[1])
    called = [node for node in ast.walk(code) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    paths = [node.args[0].value for node in called if node.func.attr == "from_pretrained"]
    assert paths == [name.encode(errors="replace").decode()] * 2
    (verify,) = [line for line in text.splitlines() if line.startswith("hf-rebasin verify")]
    assert shlex.split(verify)[2:4] == [paths[0], "--rebuild"]


def test_a_merge_that_fails_leaves_no_card(world, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("hf_rebasin.checkpoints.provenance.Provenance.save", fail)
    merge = ("merge", *(model.format(world.place) for model in VITS), "--no-align", "-o", tmp_path / "out")
    assert "the disk is full" in expect_refusal(*merge)
    assert list(tmp_path.iterdir()) == []


def test_a_card_is_written_without_asking_the_hub(world, tmp_path):
    since = len(HUB.requests)
    run_ok("merge", *(model.format(world.place) for model in VITS), "--no-align", "-o", tmp_path / "out")
    assert HUB.requests[since:] == []


def test_a_model_of_an_unknown_class_has_a_card_without_code(world, tmp_path):
    for seed in (0, 1):
        folder = shutil.copytree(world.place / f"vit-{seed}", tmp_path / f"unknown-{seed}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": "nobodys", "architectures": ["Nobodys"]})
        )
    run_ok("merge", tmp_path / "unknown-0", tmp_path / "unknown-1", "--no-align", "-o", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "from_pretrained" not in text
    assert "A merge of 2 models as they are." in text
