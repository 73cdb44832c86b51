"""Plug-ins: adding a file adds one, and a file that lacks a part of its contract is refused by name."""

import filecmp
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from hf_rebasin import Checkpoint, infer_spec, registry
from hf_rebasin.errors import UnknownNameError
from hf_rebasin.symmetries.detection import render_spec

METHOD = """
import torch


def merge(tensors, *, scale: float = 1.0):
    return scale * torch.stack(list(tensors)).median(0).values
"""
SOLVER = """
from dataclasses import dataclass

from ...alignment.alignment import Alignment
from ..problem import Problem, objective
from ..solution import Solution, Status


@dataclass(frozen=True)
class Solver:
    tries: int = 5

    data = "none"

    @staticmethod
    def memory(model, *, data):
        return 0

    def solve(self, problem: Problem) -> Solution:
        drawn = [Alignment.random(problem.spec, problem.generator) for _ in range(self.tries)]
        best = max(drawn, key=lambda g: objective(problem, g.elements))
        return Solution(best, objective(problem, best.elements), (), Status.STEP_LIMIT)
"""
GROUP = """
import torch

from . import permutation


def _shifts(n):
    return (torch.arange(n) + torch.arange(n)[:, None]) % n  # (shift, n)


class Element(permutation.Element):
    @classmethod
    def random(cls, batch, n, generator):
        return cls(_shifts(n)[torch.randint(n, batch, generator=generator)])

    @classmethod
    def project(cls, similarity):
        shifts = _shifts(similarity.shape[-1])
        places = torch.arange(len(shifts)).expand_as(shifts)
        values = similarity.double()[..., places, shifts].sum(-1)  # (*batch, shift)
        return cls(shifts[values.argmax(-1)])
"""
USE = """
import sys, torch, transformers
from torch import nn
from hf_rebasin import Alignment, Table, align, check, merge, registry, spec_for
from hf_rebasin.symmetries.table import table_for

assert "median" in registry.names("merge method") and "lucky" in registry.names("solver")
assert "cyclic" in registry.names("group") and "biogpt" in registry.names("table")
states = [{"w": torch.tensor([float(i), 9.0 - i])} for i in range(3)]
assert merge(states, "median", scale=2).tensors["w"].tolist() == [2.0, 16.0]

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
table = Table(
    rows={"0.weight": "hidden, _", "0.bias": "hidden", "2.weight": "_, hidden'", "2.bias": "_"},
    groups={"hidden": "cyclic"},
)
spec = spec_for(net, table)
moved = Alignment.random(spec, torch.Generator().manual_seed(1)).apply(net)
solution = align(net, moved, spec=table)
assert solution.status.name == "EQUAL", solution
assert 0 < (solution.alignment["hidden"].order[1] - solution.alignment["hidden"].order[0]) % 16 == 1
assert align(net, moved, solver="lucky", spec=table, tries=2).status.name == "STEP_LIMIT"

config = transformers.BioGptConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, architectures=["BioGptForCausalLM"],
)
assert table_for(config) is not None
assert check(transformers.BioGptForCausalLM(config).eval()).holds
print("all four are there")
"""
PLACES = {
    "merge method": "merging/methods/median.py",
    "solver": "solving/solvers/lucky.py",
    "group": "alignment/groups/cyclic.py",
    "table": "symmetries/specs/biogpt.py",
}


def biogpt():
    """Return a spec file as `inspect --infer --write-table` writes it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BioGptConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        architectures=["BioGptForCausalLM"],
    )
    checkpoint = Checkpoint.open(transformers.BioGptForCausalLM(config))
    return render_spec(infer_spec(checkpoint), checkpoint)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "hf_rebasin", tmp_path / "hf_rebasin", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(script, folder):
    """Return the output of a script that uses the copy of the package in a folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def differing(one, other):
    """Yield the files that only one of two folders has, or that differ."""
    comparison = filecmp.dircmp(one, other, ignore=["__pycache__"])
    yield from (f"{name}" for name in (*comparison.left_only, *comparison.right_only, *comparison.diff_files))
    for name in comparison.subdirs:
        yield from (f"{name}/{path}" for path in differing(one / name, other / name))


def test_one_file_adds_one(copy):
    texts = {"merge method": METHOD, "solver": SOLVER, "group": GROUP, "table": biogpt()}
    shutil.copytree(copy / "hf_rebasin", copy / "before")
    for kind, place in PLACES.items():
        (copy / "hf_rebasin" / place).write_text(texts[kind])
    assert run(USE, copy).strip() == "all four are there"
    assert sorted(differing(copy / "before", copy / "hf_rebasin")) == sorted(PLACES.values())
    for place in PLACES.values():
        (copy / "hf_rebasin" / place).unlink()
    names = f"from hf_rebasin import registry; print([*map(registry.names, {list(PLACES)})])"
    assert run(names, copy).strip() == str([*map(registry.names, PLACES)])


BROKEN = {
    "merge method": [
        (METHOD.replace("def merge", "def blend"), "merge method 'median' lacks merge"),
        (
            f'PIECE = "elements"\n{METHOD}',
            "'median' defines PIECE, which is not .*; write PIECES",
        ),
        (
            f"def finnish(merged, models, data):\n    ...\n{METHOD}",
            "'median' defines finnish, which is not .*; write finish",
        ),
        (f"def finish(merged, models, data):\n    ...\n{METHOD}", "'median' lacks VERB"),
    ],
    "solver": [
        (SOLVER.replace("memory", "memories"), "Solver of solver 'lucky' lacks memory"),
        (SOLVER.replace('data = "none"', ""), "Solver of solver 'lucky' lacks data"),
        (SOLVER.replace("class Solver", "class Lucky"), "solver 'lucky' lacks a class Solver"),
    ],
    "group": [
        (
            "class Element:\n    EXACT = True\n",
            "Element of group 'cyclic' lacks MOVES_ONE, PERMUTATIONS, .*act, .*relax",
        ),
    ],
    "table": [
        ('MODEL_TYPES = ["biogpt"]\nTINY = []\n', "table 'biogpt' lacks table"),
        ("TINY = [{}]\ndef table(config): ...\ndef groups(config): ...\n", "table 'biogpt' lacks MODEL_TYPES"),
        ('MODEL_TYPES = ["biogpt"]\ndef table(config): ...\ndef groups(config): ...\n', "table 'biogpt' lacks TINY"),
    ],
}
FIND = """
import sys
from hf_rebasin import registry
from hf_rebasin.errors import PluginError
find = {{"merge method": registry.merge_method, "solver": registry.solver, "group": registry.group,
        "table": registry.table_file}}
try:
    find[{kind!r}]({name!r})
except PluginError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", BROKEN)
def test_a_part_that_is_missing_is_named(copy, kind):
    file = copy / "hf_rebasin" / PLACES[kind]
    for text, message in BROKEN[kind]:
        file.write_text(text)
        output = run(FIND.format(kind=kind, name=file.stem), copy)
        assert re.search(message, output), output


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(UnknownNameError, match=r"no merge method 'lineer'; did you mean 'linear'\?"):
        registry.merge_method("lineer")
