"""Types of the package reach the code that uses it."""

import subprocess
import sys

import pytest

USER = """
from torch import nn

from hf_rebasin import Checkpoint, Recipe, align, check, merge, run_recipe

solution = align("a", "b", solver="weight_matching")
reveal_type(solution)
reveal_type(solution.apply(nn.Linear(2, 2)))
reveal_type(merge(["a", solution.apply("b")], "lerp", t=0.5))
reveal_type(check("a").holds)
reveal_type(run_recipe(Recipe.from_dict({}), "out").folder)
align("a", 3.5)
"""
SEEN = [
    "hf_rebasin.solving.solution.Solution",
    "torch.nn.modules.linear.Linear",
    "hf_rebasin.checkpoints.checkpoint.Checkpoint",
    "bool",
    "pathlib.Path",
]


@pytest.mark.slow
def test_types_reach_the_user(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "user.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert [line.split('"')[1] for line in lines if "Revealed type" in line] == SEEN, done.stdout
    assert 'Argument 2 to "align" has incompatible type "float"' in done.stdout
    assert "missing library stubs or py.typed marker" not in done.stdout
