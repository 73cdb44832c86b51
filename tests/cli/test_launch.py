"""`accelerate launch scripts/merge.py` does what the command line does, in several processes."""

import logging
import os
import runpy
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, distance
from published import commit_titles, processor, push_digits, push_parts, repository_files, run_ok, vit

from hf_rebasin import Alignment
from hf_rebasin.cli.main import _Notes

SCRIPT = ROOT / "scripts" / "merge.py"
RECIPE = {
    "models": ["org/launched-0", "org/launched-1"],
    "align": {"solver": "activation_matching"},
    "data": {"dataset": "org/launched-digits", "split": "train", "batch_size": 8},
    "refit": True,
    "evaluate": {"split": "test", "points": 3, "batch_size": 8},
    "publish": {"to": "org/launched"},
}


def launched(*arguments, processes=2):
    """Run the script in several processes on CPUs; return status, standard output, standard error and seconds."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--multi_gpu", f"--num_processes={processes}", str(SCRIPT)]
    since = time.monotonic()
    done = subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - since


def test_the_script_takes_what_the_command_line_takes():
    arguments = runpy.run_path(str(SCRIPT))["merge_arguments"]
    assert arguments(["--recipe", "x.yaml", "-o", "out"]) == ["merge", "x.yaml", "-o", "out"]
    assert arguments(["-o", "out", "--recipe=a=b.yaml"]) == ["merge", "-o", "out", "a=b.yaml"]


@pytest.mark.parametrize(("rank", "shown"), [("0", "note: a word\n"), ("1", "")])
def test_the_first_process_alone_shows_notes(rank, shown):
    script = "import logging; from hf_rebasin.cli import main; main._show_notes(); "
    script += "logging.getLogger('hf_rebasin.merging').warning('a word')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"RANK": rank}
    )
    assert done.stderr == shown


def test_each_note_is_shown_once(capsys):
    """A command that tries its advice opens the same models again."""
    handler = _Notes()
    for text in ("a word", "a word", "another"):
        handler.emit(logging.LogRecord("hf_rebasin", logging.INFO, __file__, 1, text, (), None))
    assert capsys.readouterr().err == "note: a word\nnote: another\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    for seed in (0, 1):
        push_parts(f"org/launched-{seed}", vit(seed), processor())
    push_digits("org/launched-digits")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_two_processes_do_what_one_does(recipe, tmp_path):
    status, out, err, _ = launched("--recipe", recipe, "-o", tmp_path / "two")
    assert status == 0, err
    output = run_ok("merge", recipe, "-o", tmp_path / "one", "--push-to", "org/launched-by-one")
    for line in ("aligned org/launched-1", "merged model (linear)", "verdict: ", "published: "):
        assert out.count(line) == output.count(line) == 1
    assert len(out.splitlines()) == len(output.splitlines())
    assert len(commit_titles("org/launched")) == 2
    assert repository_files("org/launched").keys() == repository_files("org/launched-by-one").keys()
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-6
    two, one = (Alignment.load(tmp_path / n / "rebasin/alignment.safetensors") for n in ("two", "one"))
    for name, element in one.elements.items():
        for field, tensor in element.tensors().items():
            other = two.elements[name].tensors()[field]
            assert other.equal(tensor) or (tensor.is_floating_point() and torch.allclose(other, tensor, atol=1e-6))
    assert "all" in run_ok("verify", "org/launched")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["target", "template"])
def test_where_one_process_fails_the_others_end(recipe, tmp_path, how):
    """Only the first one notices that the target exists, or that the card cannot be rendered."""
    (tmp_path / "out").mkdir()
    (tmp_path / "broken.j2").write_text("{{ nothing }}")
    if how == "target":
        (tmp_path / "out/mine.txt").write_text("x")
    status, out, err, seconds = launched(
        "--recipe", recipe, "-o", tmp_path / "out", "--template", tmp_path / "broken.j2"
    )
    assert status == 1
    assert seconds < 120
    assert ("already exists" if how == "target" else "cannot be rendered") in err
    assert "published" not in out
