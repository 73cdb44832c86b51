"""Plans: what a merge would take and do, without downloading weights, and how good the estimate of memory is."""

import json
import subprocess
import sys
from itertools import count

import pytest
import torch
from conftest import FIRST, HUB, ROOT, TINY, moved_copy, other_seed
from huggingface_hub import HfApi

from hf_rebasin import Checkpoint, Recipe
from hf_rebasin.cli.output import describe_plan
from hf_rebasin.errors import CheckpointError, MismatchError, NoSpaceError
from hf_rebasin.recipes import plan as module
from hf_rebasin.recipes.plan import make_plan

COUNT = count()


def pushed(model, folder, card=""):
    repo = f"org/plan-{next(COUNT)}"
    there = Checkpoint.open(model).save(folder / repo)
    if card:
        (there / "README.md").write_text(card)
    HfApi().create_repo(repo, exist_ok=True)
    return repo, HfApi().upload_folder(repo_id=repo, folder_path=there).oid


def fetched(since):
    """Return requests for whole weights since then; those for headers ask for ranges."""
    return [p for m, p, status in HUB.requests[since:] if m == "GET" and "/_lfs/get/" in p and status != 206]


@pytest.fixture
def model():
    return TINY[FIRST["llama"]]


@pytest.fixture
def two(model, tmp_path):
    """Two models on the Hub, with the same licence."""
    return [pushed(model, tmp_path, "---\nlicense: mit\n---\n") for model in (model, other_seed(model))]


def test_what_only_weights_show_is_not_refused_without_them(model, tmp_path):
    """Fine-tunes of one base need no symmetries, but a plan does not download what would show that they are some."""
    folder = Checkpoint.open(model).save(tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    for repo in ("org/mine", "org/mine-too"):
        HfApi().create_repo(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=folder)
    recipe = Recipe.from_dict({"models": ["org/mine", "org/mine-too"]})
    (remark,) = make_plan(recipe, tmp_path / "out").remarks
    assert "merged as they are if they are fine-tunes of one base, which only the weights show" in remark
    for repo in ("org/mine", "org/mine-too"):
        Checkpoint.open(repo)
    (remark,) = make_plan(recipe, tmp_path / "out").remarks
    assert remark.startswith("the models are fine-tunes of one base, so they are merged as they are")


def test_a_plan_fetches_no_weights_and_says_what_it_found(two, tmp_path):
    (a, first), (b, _) = two
    since = len(HUB.requests)
    out = tmp_path / "out"
    text = "\n".join(describe_plan(Recipe.from_dict({"models": [a, f"{b}@main"], "publish": "org/planned"}), out))
    assert not fetched(since)
    assert not out.exists()
    size = HUB.repo(a).files(first)[1]["model.safetensors"].size
    lines = {line.split()[0]: line for line in text.splitlines()[1:3]}
    assert first[:12] in lines[a]
    assert f"{size / 1e3:.1f} kB" in lines[a]
    assert HUB.repo(b).resolve("main")[:12] in lines[f"{b}@main"]
    assert f"{a}, {b}@main: checked for NaN and Inf while merging" in text
    assert "would align" in text
    assert "memory: about " in text
    assert "free there" in text
    assert "licence: mit, as all models have it" in text
    assert "would publish to org/planned, which is created, private: weights" in text
    assert ("models", "org/planned") not in HUB.repos
    Checkpoint.open(a)
    text = "\n".join(describe_plan(Recipe.from_dict({"models": [a, b]}), out))
    assert sum("nothing, it is local" in line for line in text.splitlines()) == 1
    assert fetched(since), "what is fetched is seen"


@pytest.mark.parametrize("name", sorted(FIRST))
def test_shapes_alone_plan_what_values_plan(name, tmp_path):
    """A model on the Hub has the symmetries, groups, size and memory that it has in a folder."""
    model = TINY[FIRST[name]]
    repos = [pushed(each, tmp_path)[0] for each in (model, other_seed(model))]
    here = make_plan(Recipe.from_dict({"models": [str(tmp_path / repo) for repo in repos]}), tmp_path / "out")
    there = make_plan(Recipe.from_dict({"models": repos}), tmp_path / "out")
    assert here.alignment.spec.symmetries == there.alignment.spec.symmetries
    assert (here.size, here.memory) == (there.size, there.memory)
    assert [model.is_local for model in here.models] == [True, True]
    assert [model.is_local for model in there.models] == [False, False]


def test_what_can_be_known_fails_a_plan(two, model, tmp_path, monkeypatch):
    (a, _), (b, _) = two
    recipe = Recipe.from_dict({"models": [a, b]})
    other, _ = pushed(TINY[FIRST["gpt2"]], tmp_path)
    with pytest.raises(MismatchError, match="another architecture"):
        make_plan(Recipe.from_dict({"models": [a, other]}), tmp_path / "out")
    broken = Checkpoint.open(model)
    key = next(iter(broken.tensors))
    tensors = dict(broken.tensors) | {key: broken.tensors[key] * torch.nan}
    folder = broken.with_parts(Checkpoint.open(tensors).parts).save(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        make_plan(Recipe.from_dict({"models": [str(folder), a]}), tmp_path / "out")
    need = make_plan(recipe, tmp_path / "out")
    total = need.size + sum(model.to_download for model in need.models)
    monkeypatch.setattr(module, "_free_space", lambda path: total - 1)
    with pytest.raises(NoSpaceError, match="are to be downloaded to"):
        make_plan(recipe, tmp_path / "out")
    monkeypatch.setattr(module, "_free_space", lambda path: total)
    make_plan(recipe, tmp_path / "out")
    monkeypatch.setattr(module, "_free_space", lambda path: need.size - 1)
    with pytest.raises(NoSpaceError, match="needs"):
        make_plan(recipe, tmp_path / "out")


def test_licences_of_a_plan(two, model, tmp_path):
    (a, _), _ = two
    bare, _ = pushed(model, tmp_path)
    recipe = Recipe.from_dict({"models": [a, bare], "align": False})
    licence = make_plan(recipe, tmp_path / "out").licence
    assert licence.refused
    assert f"{a}: mit, {bare}: none said" in licence.text
    licence = make_plan(recipe, tmp_path / "out", licence="apache-2.0").licence
    assert str(licence.licence) == "apache-2.0"
    assert licence.text == f"inputs: {a}: mit, {bare}: none said; named by the publisher: apache-2.0"


def test_the_size_is_what_is_written(bert, tmp_path):
    """The dtype of the result and a head that a rotation unties count."""
    folders = [Checkpoint.open(model).save(tmp_path / name) for model, name in ((bert, "a"), (other_seed(bert), "b"))]
    models = {"models": [str(folder) for folder in folders]}
    plain = make_plan(Recipe.from_dict({**models, "align": False}), tmp_path / "out")
    assert plain.size == plain.models[0].size
    half = make_plan(Recipe.from_dict({**models, "align": False, "dtype": "bfloat16"}), tmp_path / "out")
    assert plain.size / 4 <= half.size <= plain.size / 3.9
    gpt2 = TINY[FIRST["gpt2"]]
    rotated, _ = moved_copy(gpt2, groups="full")
    folders = [Checkpoint.open(model).save(tmp_path / name) for model, name in ((gpt2, "c"), (other_seed(gpt2), "d"))]
    plan = make_plan(Recipe.from_dict({"models": [str(folder) for folder in folders]}), tmp_path / "out")
    assert plan.alignment.untied
    assert plan.size == sum(part.nbytes for part in Checkpoint.open(rotated).parts.values()) > plan.models[0].size


RUN = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from hf_rebasin import Recipe
from hf_rebasin.recipes.plan import make_plan
from hf_rebasin.recipes.runner import run_merge
recipe, out, only = Recipe.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "plan"
if only:
    print(make_plan(recipe, out).memory)
else:
    run_merge(recipe).checkpoint.save(out)
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
def test_memory_is_estimated_within_a_factor_of_three(kind, how, tmp_path):
    """For whole processes, whose peak the system measures."""

    def run(*command):
        command = [sys.executable, "-c", *command]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    run(MAKE, kind, str(tmp_path))
    recipe = {"models": [f"{tmp_path}/{seed}" for seed in range(2)]}
    recipe["align"] = {"groups": how, "max_sweeps": 2, "starts": 1} if how in ("permutation", "full") else False
    if how == "refit":
        run(IMAGES, str(tmp_path))
        recipe |= {"refit": True, "data": {"dataset": f"{tmp_path}/images", "samples": 8, "batch_size": 4}}
    guess, peak = (int(run(RUN, json.dumps(recipe), str(tmp_path / "out"), action)) for action in ("plan", "run"))
    print(f"{kind} {how}: {guess / 1e9:.2f} GB guessed, {peak / 1e9:.2f} GB taken")
    assert peak / 3 < guess < peak * 3
