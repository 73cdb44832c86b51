"""Broken and hostile recipes, models and alignments: 200 random cases each, and faults in checks would be noticed.

`python scripts/fuzz.py` tries thousands.
"""

import logging
import os
import random
import runpy
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import fuzzing
import pytest
import torch
import yaml
from conftest import ROOT
from fuzzing import World, run, run_case
from mutating import CHECKPOINTS, RECIPES
from mutating_recipes import make_recipe_text

from hf_rebasin.checkpoints import folder, target
from hf_rebasin.checkpoints import tensor_files as files
from hf_rebasin.checkpoints.tensor_files import write_file
from hf_rebasin.cli.main import main
from hf_rebasin.recipes import recipe
from hf_rebasin.recipes import yaml_reader as yaml_reading

MERGE = ("merge", "a", "b", "-o", "out", "--no-align")


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    return fuzzing.build_inputs(tmp_path_factory.mktemp("fuzz") / "good")


@pytest.fixture
def world(good, tmp_path):
    return World(tmp_path / "world", good)


MORE = [pytest.param(start, marks=pytest.mark.slow) for start in range(80, 200, 20)]


@pytest.mark.parametrize("start", [0, 20, 40, 60, *MORE])
@pytest.mark.parametrize("kind", ["recipe", "checkpoint"])
def test_drawn_cases(kind, start, good, tmp_path):
    outcomes = [run_case(kind, seed, good, tmp_path / f"{seed}") for seed in range(start, start + 20)]
    assert not [str(outcome) for outcome in outcomes if outcome.violations]
    assert 1 in {outcome.status for outcome in outcomes}, "some are refused"


def test_what_is_good_passes(good, tmp_path):
    """Negative control: unchanged cases are accepted."""
    tried = [("one", command) for command in set(fuzzing.COMMANDS)] + [(form, MERGE) for form in fuzzing.FORMS]
    for number, (form, command) in enumerate(tried):
        outcome = run(World(tmp_path / f"{number}", good, form), command)
        assert outcome.status == 0, str(outcome)
        assert not outcome.violations, str(outcome)


def test_forms_are_what_they_are_called(good):
    for form in fuzzing.FORMS:
        names = [file.name for file in (good / form / "a").iterdir()]
        assert any(name.endswith(".index.json") for name in names) == form.endswith("s")
        assert any(name.endswith(".bin") for name in names) == form.startswith("pickle")


def test_the_same_seed_is_the_same_case(good, tmp_path):
    for kind in ("recipe", "checkpoint"):
        one, other = (run_case(kind, 7, good, tmp_path / "same") for _ in range(2))
        assert (one.mutations, one.command, one.status) == (other.mutations, other.command, other.status)


def leaves(name, text="x"):
    def entry():
        with open(name, "w") as file:
            file.write(text)
        sys.exit("error: it failed")

    return entry


def refuses(before=lambda: None, message="error: it failed"):
    def entry():
        before()
        print(message)
        sys.exit(1)

    return entry


def unlink():
    os.unlink("../outside/secret.txt")


def raises(error):
    def entry():
        raise error

    return entry


def log():
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("some.library").exception("it failed")


def after_it(change):
    def entry():
        with suppress(SystemExit):
            main()
        change()

    return entry


PLANTED = {
    "a traceback: ZeroDivisionError": raises(ZeroDivisionError()),
    "a traceback: RecursionError": raises(RecursionError()),
    "a traceback was printed": refuses(message="error: Traceback (most recent call last)"),
    "a traceback was logged": refuses(log),
    "status 3": lambda: sys.exit(3),
    "failed without a message": lambda: sys.exit(1),
    "work/.out.partial was made": refuses(lambda: os.mkdir(".out.partial")),
    "failed and left the output folder behind": refuses(lambda: os.mkdir("out")),
    "outside/more was made": leaves("../outside/more"),
    "outside/secret.txt was changed": leaves("../outside/secret.txt"),
    "work/a/config.json was changed": leaves("a/config.json"),
    "outside/secret.txt was made|outside/secret.txt was": refuses(unlink),
    "outside the output folder": leaves("../outside/secret.txt", fuzzing.SECRET),
    "home/.x was made": leaves("../home/.x"),
    "code of the input ran": refuses(lambda: os.system("touch ../canary")),
    "ran a program: os.system": refuses(lambda: os.system("true")),
    "and set a variable": refuses(lambda: os.environ.update({fuzzing.CANARY: "1"})),
    "ran code of the input": refuses(lambda: exec(compile("1", os.path.abspath("a/modeling_x.py"), "exec"))),
    "took more than 1 s": lambda: all(time.monotonic() for _ in range(10**9)),
    "MemoryError": lambda: bytearray(3 << 30),
    "printed 30008 characters": refuses(message="error: " + "x" * 30_000),
    "control characters": refuses(message="error: \x1b[2J"),
    "printed the contents of another program's file": refuses(message=f"error: {fuzzing.SECRET}"),
    "were copied to tokenizer.json": after_it(lambda: shutil.copy("../outside/secret.txt", "out/tokenizer.json")),
    "cannot be opened": after_it(lambda: os.unlink("out/model.safetensors")),
    "has other tensors than its model": after_it(lambda: write_file(Path("out/model.safetensors"), {}, id)),
    "succeeded and wrote nothing": lambda: None,
}


@pytest.mark.parametrize("violation", PLANTED)
def test_what_must_not_be_is_seen(violation, world):
    outcome = run(world, MERGE, entry=PLANTED[violation], seconds=1)
    assert any(part in str(outcome.violations) for part in violation.split("|")), str(outcome)


def left_there(*_, **__):
    """Remove nothing."""


FAULTS = {  # (the check that is removed, the mutation that it guards against, the report)
    "links": (folder, "_in_hub_cache", lambda *_: True, "side_file_elsewhere", "another program's file were copied"),
    "pickles": (
        files,
        "_unpickle",
        lambda path, lazily: torch.load(path, weights_only=False),
        "pickled_code",
        " ran",
    ),
    "leftovers": (target, "_remove_folder", left_there, "broken_values", "work/.out.partial was made"),
    "tags": (recipe, "read_yaml_documents", lambda text, name: [yaml.unsafe_load(text)], "tag", "ran a program"),
    "bombs": (yaml_reading, "_refuse_large", lambda *_: None, "bomb", "took more than 1 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_package_is_found(fault, good, tmp_path, monkeypatch):
    """Without a check of the package, the mutation that it guards against is reported."""
    owner, name, instead, mutation, seen = FAULTS[fault]
    violations = ""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, instead)
        for seed in range(60):
            r, world = (
                random.Random(seed),
                World(tmp_path / f"{seed}", good, "pickle" if fault == "pickles" else "one"),
            )
            if mutation in RECIPES:
                (world.work / "recipe.yaml").write_bytes(make_recipe_text(r, world, [RECIPES[mutation]]))
                violations += str(run(world, ("merge", "recipe.yaml", "-o", "out"), seconds=1).violations)
            else:
                CHECKPOINTS[mutation](r, world, world.work / "a")
                violations += str(run(world, MERGE).violations)
            if seen in violations:
                return
    raise AssertionError(violations or "nothing was seen")


def test_the_script_says_what_it_tried(good):
    script = runpy.run_path(str(ROOT / "scripts" / "fuzz.py"))
    outcomes = [
        fuzzing.Outcome(mutations=mutations, command=MERGE, status=status, printed="", violations=violations)
        for mutations, status, violations in ((("cut",), 1, ()), (("cut", "shape"), 0, ("bad",)))
    ]
    assert list(script["summarise"](outcomes)) == [
        "mutation  cases  refused  succeeded  violations",
        "cut           2        1          1           1",
        "shape         1        0          1           1",
    ]
