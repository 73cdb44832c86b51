"""Recipes over small untrained models and digits, run and assessed."""

import sys

import pytest
import torch

from hf_rebasin import Checkpoint, Recipe
from hf_rebasin.cli.main import main
from hf_rebasin.demo import experiments as demo
from hf_rebasin.recipes.assessment import judged
from hf_rebasin.recipes.runner import run

SMALL = {
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 6]},
    "vit": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two small untrained models of each kind, and the digits."""
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


def said(place, kind, **more):
    models = [str(place / kind / f"seed-{seed}") for seed in range(2)]
    data = {"dataset": str(place / "digits"), "samples": 96, "batch_size": 32}
    return {"models": models, "data": data, "evaluate": {"split": "test", "samples": 50, "points": 3}, **more}


def rows_of(report):
    (pair,) = report.pairs
    return {row.name: row for row in (*pair.ends, *pair.rows)}


def judged_merge(place, kind, tmp_path, **more):
    recipe = Recipe.from_dict(said(place, kind, **more))
    result = run(recipe)
    return judged(recipe, result, Checkpoint.open(result.checkpoint.save(tmp_path / "out")))


@pytest.fixture
def command(monkeypatch, capsys):
    """(exit status, what is printed) of the command line, called in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-rebasin", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out + said.err

    return call
