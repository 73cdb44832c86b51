"""What the README says is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hf_rebasin import Recipe, demo, registry

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def demo_folder(tmp_path):
    """What the demo leaves, without the training."""
    for seed in range(2):
        for kind in ("resnet", "vit"):
            torch.manual_seed(seed)
            demo.EXPERIMENTS[kind].build().eval().save_pretrained(tmp_path / "demo" / kind / f"seed-{seed}")
    return tmp_path


def test_the_quickstart_runs_as_written(demo_folder):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    (shell,) = blocks("bash")
    done = subprocess.run(
        ["bash", "-e", "-c", shell], cwd=demo_folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (demo_folder / "merged" / "model.safetensors").is_file()
    each = "\n".join(f"exec(compile({python!r}, 'README.md', 'exec'), {{}})" for python in blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", each], cwd=demo_folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (demo_folder / "merged-half" / "config.json").is_file()


def test_the_recipe_of_the_readme_is_valid(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    Recipe.from_file(tmp_path / "recipe.yaml")


def test_every_table_method_and_script_is_named():
    for name in registry.names("specs"):
        assert f"`{name}`" in README
    for name in registry.names("merge_methods"):
        assert name in README
    for script in re.findall(r"scripts/\w+\.\w+", README):
        assert (ROOT / script).is_file(), script
