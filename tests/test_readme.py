"""The README is right: its commands run, its recipes are valid, its lists are complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from hf_rebasin import Recipe, registry
from hf_rebasin.demo import experiments as demo

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def demo_folder(tmp_path):
    """Folders like those of the demo, but smaller and untrained."""
    smaller = {
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12]},
        "vit": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32},
    }
    for seed in range(2):
        for kind, settings in smaller.items():
            torch.manual_seed(seed)
            model = demo.EXPERIMENTS[kind].build()
            model = type(model)(type(model.config)(**{**model.config.to_dict(), **settings}))
            model.eval().save_pretrained(tmp_path / "demo" / kind / f"seed-{seed}")
            demo.write_processor(tmp_path / "demo" / kind / f"seed-{seed}")
    demo.write_digits(tmp_path / "demo" / "digits")
    return tmp_path


def test_the_quickstart_runs_as_written(demo_folder):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    (shell,) = blocks("bash")
    done = subprocess.run(
        ["bash", "-e", "-c", shell], cwd=demo_folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (demo_folder / "merged" / "model.safetensors").is_file()
    assert "verdict: " in done.stdout
    assert (demo_folder / "report.html").is_file()
    each = "\n".join(f"exec(compile({python!r}, 'README.md', 'exec'), {{}})" for python in blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", each], cwd=demo_folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (demo_folder / "merged-half" / "config.json").is_file()


def test_the_recipe_of_the_readme_is_valid(tmp_path):
    text, varying = blocks("yaml")
    Recipe.from_dict({"models": ["a", "b"], "merge_method": "slerp", **yaml.safe_load(varying)})
    (tmp_path / "recipe.yaml").write_text(text)
    Recipe.from_file(tmp_path / "recipe.yaml")


def test_every_table_method_and_script_is_named():
    for name in registry.names("table"):
        assert f"`{name}`" in README
    for name in registry.names("merge method"):
        assert name in README
    for script in re.findall(r"scripts/\w+\.\w+", README):
        assert (ROOT / script).is_file(), script
