"""Run and assess recipes that merge small untrained models of the digits."""

import sys

import pytest
import torch

from hf_rebasin import Checkpoint, Recipe
from hf_rebasin.cli.main import main
from hf_rebasin.demo import experiments as demo
from hf_rebasin.recipes.assessment import assess
from hf_rebasin.recipes.runner import run_merge

SMALL = {
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 6]},
    "vit": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder with two small untrained models of each kind, and the digits."""
    folder = tmp_path_factory.mktemp("demo")
    demo.write_digits(folder / "digits")
    for kind, settings in SMALL.items():
        for seed in range(2):
            torch.manual_seed(seed)
            model = demo.EXPERIMENTS[kind].build()
            model = type(model)(type(model.config)(**{**model.config.to_dict(), **settings})).eval()
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.2 * torch.randn_like(p)
            model.save_pretrained(folder / kind / f"seed-{seed}")
            demo.write_processor(folder / kind / f"seed-{seed}")
    return folder


def make_recipe(demo_folder, kind, **more):
    """Return a recipe, as a dictionary, that merges and evaluates the models of one kind."""
    models = [str(demo_folder / kind / f"seed-{seed}") for seed in range(2)]
    data = {"dataset": str(demo_folder / "digits"), "samples": 96, "batch_size": 32}
    return {"models": models, "data": data, "evaluate": {"split": "test", "samples": 50, "points": 3}, **more}


def rows_by_name(report):
    """Return {name: row} of a report's only pair, ends included."""
    (pair,) = report.pairs
    return {row.name: row for row in (*pair.ends, *pair.rows)}


def merge_and_assess(demo_folder, kind, tmp_path, **more):
    recipe = Recipe.from_dict(make_recipe(demo_folder, kind, **more))
    result = run_merge(recipe)
    return assess(recipe, result, Checkpoint.open(result.checkpoint.save(tmp_path / "out")))


@pytest.fixture
def run_command(monkeypatch, capsys):
    """A function that runs the command line in this process and returns (exit status, printed text)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-rebasin", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call
