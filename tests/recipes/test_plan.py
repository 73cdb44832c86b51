"""Plans: what a merge would take and do, without fetching weights; and whether its memory was guessed well."""

import json
import subprocess
import sys
from itertools import count

import pytest
import torch
from conftest import FIRST, HUB, ROOT, TINY, moved_copy, other_seed
from huggingface_hub import HfApi

from hf_rebasin import Checkpoint, Recipe
from hf_rebasin.cli.output import plan
from hf_rebasin.errors import CheckpointError, MismatchError, NoSpaceError
from hf_rebasin.recipes import plan as module
from hf_rebasin.recipes.plan import planned

COUNT = count()


def pushed(model, folder, card=""):
    repo = f"org/plan-{next(COUNT)}"
    there = Checkpoint.open(model).save(folder / repo)
    if card:
        (there / "README.md").write_text(card)
    HfApi().create_repo(repo, exist_ok=True)
    return repo, HfApi().upload_folder(repo_id=repo, folder_path=there).oid


def fetched(since):
    """Weights that were fetched since then: of the tests' small models a range of the header is all of them."""
    return [p for m, p, status in HUB.requests[since:] if m == "GET" and "/_lfs/get/" in p and status != 206]


@pytest.fixture
def model():
    return TINY[FIRST["llama"]]


@pytest.fixture
def two(model, tmp_path):
    """Two models of the Hub, of one licence."""
    return [pushed(one, tmp_path, "---\nlicense: mit\n---\n") for one in (model, other_seed(model))]


def test_a_plan_fetches_no_weights_and_says_what_it_found(two, tmp_path):
    (a, first), (b, _) = two
    since = len(HUB.requests)
    out = tmp_path / "out"
    text = "\n".join(plan(Recipe.from_dict({"models": [a, f"{b}@main"], "publish": "org/planned"}), out))
    assert not fetched(since)
    assert not out.exists()
    size = HUB.repo(a).files(first)[1]["model.safetensors"].size
    lines = {line.split()[0]: line for line in text.splitlines()[1:3]}
    assert first[:12] in lines[a]
    assert f"{size / 1e3:.1f} kB" in lines[a]
    assert HUB.repo(b).resolve("main")[:12] in lines[f"{b}@main"]
    assert f"NaN and Inf in {a}, {b}@main are looked for while merging" in text
    assert "would align" in text
    assert "memory: about " in text
    assert "free there" in text
    assert "licence: mit, as all models have it" in text
    assert "would publish to org/planned, which is made, private: weights" in text
    assert ("models", "org/planned") not in HUB.repos
    Checkpoint.open(a)
    text = "\n".join(plan(Recipe.from_dict({"models": [a, b]}), out))
    assert sum("nothing, it is here" in line for line in text.splitlines()) == 1
    assert fetched(since), "what is fetched is seen"


@pytest.mark.parametrize("name", sorted(FIRST))
def test_shapes_alone_plan_what_values_plan(name, tmp_path):
    """The symmetries, groups, size and memory of a model on the Hub are those of the same in a folder."""
    model = TINY[FIRST[name]]
    repo, _ = pushed(model, tmp_path)
    here = planned(Recipe.from_dict({"models": [str(tmp_path / repo)] * 2}), tmp_path / "out")
    there = planned(Recipe.from_dict({"models": [repo] * 2}), tmp_path / "out")
    assert here.moves.spec.symmetries == there.moves.spec.symmetries
    assert (here.size, here.memory) == (there.size, there.memory)
    assert [one.here for one in here.models] == [True, True]
    assert [one.here for one in there.models] == [False, False]


def test_what_can_be_known_fails_a_plan(two, model, tmp_path, monkeypatch):
    (a, _), (b, _) = two
    recipe = Recipe.from_dict({"models": [a, b]})
    other, _ = pushed(TINY[FIRST["gpt2"]], tmp_path)
    with pytest.raises(MismatchError, match="another architecture"):
        planned(Recipe.from_dict({"models": [a, other]}), tmp_path / "out")
    broken = Checkpoint.open(model)
    key = next(iter(broken.tensors))
    tensors = dict(broken.tensors) | {key: broken.tensors[key] * torch.nan}
    folder = broken.with_state({k: tensors[d] for k, d in broken.canonical().items()}).save(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        planned(Recipe.from_dict({"models": [str(folder), a]}), tmp_path / "out")
    need = planned(recipe, tmp_path / "out")
    total = need.size + sum(one.to_download for one in need.models)
    monkeypatch.setattr(module, "_free", lambda path: total - 1)
    with pytest.raises(NoSpaceError, match="are to be downloaded to"):
        planned(recipe, tmp_path / "out")
    monkeypatch.setattr(module, "_free", lambda path: total)
    planned(recipe, tmp_path / "out")
    monkeypatch.setattr(module, "_free", lambda path: need.size - 1)
    with pytest.raises(NoSpaceError, match="needs"):
        planned(recipe, tmp_path / "out")


def test_licences_of_a_plan(two, model, tmp_path):
    (a, _), _ = two
    bare, _ = pushed(model, tmp_path)
    recipe = Recipe.from_dict({"models": [a, bare], "align": False})
    found = planned(recipe, tmp_path / "out").licence
    assert found.refused
    assert f"{a}: mit, {bare}: none said" in found.text
    found = planned(recipe, tmp_path / "out", licence="apache-2.0").licence
    assert str(found.licence) == "apache-2.0"
    assert found.text == f"inputs: {a}: mit, {bare}: none said; named by the publisher: apache-2.0"


def test_the_size_is_what_is_written(bert, tmp_path):
    """A dtype of the result, and a head that a rotation takes apart, are in the size."""
    folder = Checkpoint.open(moved_copy(bert)[0]).save(tmp_path / "a")
    models = {"models": [str(folder)] * 2}
    plain = planned(Recipe.from_dict({**models, "align": False}), tmp_path / "out")
    assert plain.size == plain.models[0].size
    half = planned(Recipe.from_dict({**models, "align": False, "dtype": "bfloat16"}), tmp_path / "out")
    assert plain.size / 4 <= half.size <= plain.size / 3.9
    gpt2 = TINY[FIRST["gpt2"]]
    rotated, _ = moved_copy(gpt2, groups="full")
    folder = Checkpoint.open(gpt2).save(tmp_path / "gpt2")
    plan = planned(Recipe.from_dict({"models": [str(folder)] * 2}), tmp_path / "out")
    assert plan.moves.apart
    assert plan.size == sum(part.nbytes for part in Checkpoint.open(rotated).parts.values()) > plan.models[0].size


RUN = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from hf_rebasin import Recipe
from hf_rebasin.recipes.plan import planned
from hf_rebasin.recipes.runner import run
recipe, out, only = Recipe.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "plan"
if only:
    print(planned(recipe, out).memory)
else:
    run(recipe).checkpoint.save(out)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
MAKE = """
import sys, torch, transformers
kind, folder = sys.argv[1:]
config, owner = {
    "bert": (transformers.BertConfig(num_hidden_layers=4), transformers.BertForMaskedLM),
    "gpt2": (transformers.GPT2Config(n_layer=3), transformers.GPT2LMHeadModel),
    "vit": (transformers.ViTConfig(num_hidden_layers=6), transformers.ViTForImageClassification),
    "llama": (
        transformers.LlamaConfig(
            hidden_size=1024, intermediate_size=5632, num_hidden_layers=3, num_attention_heads=16, vocab_size=8000
        ),
        transformers.LlamaForCausalLM,
    ),
}[kind]
for seed in range(2):
    torch.manual_seed(seed)
    owner(config).save_pretrained(f"{folder}/{seed}")
"""


IMAGES = """
import sys
from pathlib import Path
import numpy, PIL.Image, transformers
folder = Path(sys.argv[1])
for seed in range(2):
    transformers.ViTImageProcessor().save_pretrained(folder / str(seed))
for i in range(8):
    label = folder / "images" / f"LABEL_{i % 2}"
    label.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(i).integers(0, 255, (224, 224, 3), dtype=numpy.uint8)
    PIL.Image.fromarray(pixels).save(label / f"{i}.png")
"""
CASES = [(kind, how) for kind in ("bert", "gpt2", "vit", "llama") for how in ("plain", "permutation", "full")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [*CASES, ("vit", "refit")])
def test_memory_is_guessed_within_a_factor_of_three(kind, how, tmp_path):
    """Of whole processes, whose peak is measured by the system."""

    def said(*command):
        command = [sys.executable, "-c", *command]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    said(MAKE, kind, str(tmp_path))
    recipe = {"models": [f"{tmp_path}/{seed}" for seed in range(2)]}
    recipe["align"] = {"groups": how, "max_sweeps": 2, "starts": 1} if how in ("permutation", "full") else False
    if how == "refit":
        said(IMAGES, str(tmp_path))
        recipe |= {"refit": True, "data": {"dataset": f"{tmp_path}/images", "samples": 8, "batch_size": 4}}
    guess, peak = (int(said(RUN, json.dumps(recipe), str(tmp_path / "out"), what)) for what in ("plan", "run"))
    print(f"{kind} {how}: {guess / 1e9:.2f} GB guessed, {peak / 1e9:.2f} GB taken")
    assert peak / 3 < guess < peak * 3
