"""The command line, as a user types it."""

import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import TINY, moved_copy, other_seed, same_tensors
from transformers import AutoConfig, BioGptForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from hf_rebasin import Alignment, Checkpoint, Table, check, spec_for
from hf_rebasin.cli.main import app

VERBS = ("demo", "inspect", "check", "align", "apply", "merge")


@pytest.fixture
def run(run_command):
    return run_command


@pytest.fixture
def pair(bert, tmp_path):
    return Checkpoint.open(bert).save(tmp_path / "a"), Checkpoint.open(other_seed(bert)).save(tmp_path / "b")


def test_help_names_every_verb():
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(verb in output for verb in VERBS)


def test_merge_needs_no_recipe(run, pair, bert, tmp_path):
    status, output = run("merge", *pair, "-o", tmp_path / "out")
    assert status == 0, output
    assert f"{tmp_path / 'out'}/, 42 tensors" in output
    assert "9 of 9 symmetries moved" in output
    type(bert).from_pretrained(tmp_path / "out")
    status, output = run("merge", *pair, "-o", tmp_path / "out")
    assert status == 1
    assert "already exists" in output
    assert run("merge", *pair, "-o", tmp_path / "out", "--overwrite", "--no-align")[0] == 0
    plain = Checkpoint.open(tmp_path / "out")
    key = next(iter(plain.tensors))
    mean = sum(Checkpoint.open(folder).tensors[key] for folder in pair) / 2
    assert plain.tensors[key].equal(mean)


def test_options_of_a_merge(run, pair, tmp_path):
    out = tmp_path / "out"
    assert run("merge", *pair, "-o", out, "--method", "lerp", "-p", "t=0", "--dtype", "float32")[0] == 0
    a = Checkpoint.open(pair[0]).tensors
    assert all(t.equal(a[k].float()) for k, t in Checkpoint.open(out).tensors.items())
    for arguments, message in (
        (("--method", "lerpp"), "merge_method: no merge method 'lerpp'; did you mean 'lerp'"),
        (("-p", "tt=1"), "parameters.tt: no such parameter of linear; known: normalize, weight, weights"),
        (("-p", "t"), "is not NAME=VALUE"),
        (("-p", "weights=[1"), "has no value that can be read"),
        (("-p", "weights=[1,2,3]"), "3 weights for 2 models"),
        (("-p", "weights=[1,2,3]", "--dry-run"), "3 weights for 2 models"),
        (("--assume", "everything"), "assume.0: input should be"),
    ):
        status, output = run("merge", *pair, "-o", tmp_path / "other", *arguments)
        assert status == 1
        assert message in output
        assert not (tmp_path / "other").exists()
    assert "error: " in run("merge", *pair, "-o", "/proc/none/such")[1]
    assert "which is read" in run("merge", *pair, "-o", pair[1], "--overwrite")[1]
    assert "is or holds" in run("merge", *pair, "-o", tmp_path, "--overwrite", "--dry-run")[1]
    assert "already exists" in run("merge", *pair, "-o", out, "--dry-run")[1]
    assert "has no revision 'nonsense'" in run("inspect", f"{pair[0]}@nonsense")[1]
    assert "needs two models or a recipe" in run("merge", pair[0], "-o", out)[1]


def test_a_recipe_on_the_command_line(run, pair, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"models: [{pair[0]}, {pair[1]}]\nmerge_method: slerp\nparameters: {{t: 1}}\nalign: false\n")
    status, output = run("merge", recipe, "-o", tmp_path / "out")
    assert status == 0, output
    assert same_tensors(tmp_path / "out", pair[1])
    assert "write it into the recipe" in run("merge", recipe, "-o", tmp_path / "x", "--method", "lerp")[1]
    recipe.write_text("models: [a]\nmerge_metod: x\n")
    assert "merge_metod: no such key; did you mean 'merge_method'" in run("merge", recipe, "-o", tmp_path / "x")[1]


def test_a_dry_run_writes_nothing(run, pair, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, output = run("merge", *pair, "-o", tmp_path / "out", "--dry-run")
    assert status == 0, output
    assert "would align" in output
    assert "would merge 2 models by linear" in output
    assert sorted(tmp_path.rglob("*")) == before


def test_align_writes_the_moved_model_and_the_alignment(run, pair, bert, tmp_path):
    out, file = tmp_path / "moved", tmp_path / "g.safetensors"
    status, output = run("align", *pair, "-o", out, "--alignment", file)
    assert status == 0, output
    assert "converged" in output
    assert same_tensors(Alignment.load(file).apply(pair[1]), out)
    assert run("apply", file, pair[1], "-o", tmp_path / "again")[0] == 0
    assert same_tensors(tmp_path / "again", out)
    assert "cannot be read as an alignment" in run("apply", tmp_path / "none", pair[1], "-o", tmp_path / "x")[1]
    assert check(out).holds
    assert "nothing would be written" in run("align", *pair)[1]
    assert "already exists" in run("align", *pair, "--alignment", file)[1]
    assert "cannot be both" in run("align", *pair, "-o", tmp_path / "x", "--alignment", tmp_path / "x")[1]
    assert "already exists" in run("align", *pair, "--alignment", tmp_path, "--overwrite")[1]


def test_two_models_of_one_base_come_back_byte_for_byte(run, pair, bert, tmp_path):
    moved = tmp_path / "moved"
    status, output = run("align", pair[0], pair[0], "-o", moved)
    assert status == 0
    assert "as for models of one base: nothing was moved" in output
    for name in ("model.safetensors", "config.json"):
        assert (moved / name).read_bytes() == (pair[0] / name).read_bytes()


def test_a_planted_copy_is_said_to_be_equal(run, pair, bert, tmp_path):
    copy = Checkpoint.open(moved_copy(bert)[0]).save(tmp_path / "copy")
    assert "the moved model equals the fixed one" in run("align", pair[0], copy, "-o", tmp_path / "moved")[1]
    assert same_tensors(tmp_path / "moved", pair[0])


def test_inspect_shows_every_symmetry(run, pair):
    status, output = run("inspect", pair[0])
    assert status == 0
    for word in ("head.*", "qk.*", "invertible in head.*", "residual", "vocab", "held", "tied:"):
        assert word in output
    assert "head.1" in run("inspect", pair[0], "--all")[1]
    assert "neither a local folder nor" in run("inspect", "no/such")[1]


def test_inspect_infers_where_there_is_no_table_and_writes_one(run, tmp_path):
    zoo.HF["biogpt"].build().save_pretrained(tmp_path / "biogpt")
    status, output = run("inspect", str(tmp_path / "biogpt"))
    assert status == 0
    for word in ("inferred from its forward pass", "fc1.*", "invertible in head.*", "held because of", "tied:"):
        assert word in output
    file = tmp_path / "biogpt.py"
    assert "give --infer" in run("inspect", str(tmp_path / "biogpt"), "--write-table", str(file))[1]
    assert run("inspect", str(tmp_path / "biogpt"), "--infer", "--write-table", str(file))[0] == 0
    assert "already exists" in run("inspect", str(tmp_path / "biogpt"), "--infer", "--write-table", str(file))[1]
    module = runpy.run_path(str(file))
    assert module["MODEL_TYPES"] == ("biogpt",)
    table = Table.of(SimpleNamespace(**module), AutoConfig.from_pretrained(tmp_path / "biogpt"))
    assert spec_for(tmp_path / "biogpt", table).free == spec_for(tmp_path / "biogpt").free
    config = AutoConfig.for_model("biogpt", **module["TINY"][0])
    assert config.num_attention_heads == 3


def test_inspect_infers_where_there_is_a_table_if_asked(run, pair):
    status, output = run("inspect", pair[0], "--infer")
    assert status == 0
    assert "inferred from its forward pass" in output
    assert "invertible in head.*" in output


def test_a_family_without_a_table_merges_on_the_command_line(run, tmp_path):
    config = zoo.HF["biogpt"].build().config
    for seed in range(2):
        torch.manual_seed(seed)
        BioGptForCausalLM(config).save_pretrained(tmp_path / f"{seed}")
    status, output = run("merge", str(tmp_path / "0"), str(tmp_path / "1"), "-o", str(tmp_path / "m"))
    assert status == 0, output
    assert "symmetries moved" in output
    shutil.copytree(tmp_path / "0", tmp_path / "again")
    status, output = run("merge", str(tmp_path / "0"), str(tmp_path / "again"), "-o", str(tmp_path / "n"))
    assert status == 0, output
    assert "fine-tunes of one base, so they are merged as they are" in output
    assert run("check", str(tmp_path / "m"))[0] == 0


def test_rows_of_tokens_are_chosen_on_the_command_line(run, tmp_path):
    models = [str(tmp_path / "12"), str(tmp_path / "10")]
    for folder, rows in zip(models, (12, 10), strict=True):
        settings = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        config = AutoConfig.for_model("llama", vocab_size=rows, num_key_value_heads=2, **settings)
        LlamaForCausalLM(config).save_pretrained(folder)
    out = ["-o", str(tmp_path / "m")]
    status, output = run("merge", *models, *out)
    assert status == 1
    assert "has 10 rows of tokens" in output
    status, output = run("merge", *models, *out, "--vocabulary", "all")
    assert status == 1
    assert "vocabulary: input should be 'first' or 'common'" in output
    assert run("align", *models, *out, "--vocabulary", "all")[0] == 1
    status, output = run("merge", *models, *out, "--vocabulary", "first")
    assert status == 0, output
    assert "vocabulary: first" in (tmp_path / "m" / "recipe.yaml").read_text()
    assert len(Checkpoint.open(tmp_path / "m").tensors["model.embed_tokens.weight"]) == 12
    assert run("align", *models, "-o", str(tmp_path / "moved"), "--vocabulary", "first")[0] == 0
    assert len(Checkpoint.open(tmp_path / "moved").tensors["model.embed_tokens.weight"]) == 10, "as before"


def test_check_proves_or_fails(run, pair, monkeypatch):
    status, output = run("check", pair[0])
    assert status == 0
    assert "the function is the same" in output
    from hf_rebasin.alignment import exactness as checking

    monkeypatch.setattr(checking.Check, "bound", property(lambda self: 0.0))
    status, output = run("check", pair[0])
    assert status == 1
    assert "THE FUNCTION CHANGED" in output


def test_check_without_a_model_checks_every_table(run):
    status, output = run("check")
    assert status == 0, output
    assert len(output.splitlines()) == len(TINY)


def test_another_head_can_be_left_out(run, tmp_path):
    a = TINY["bert-4-BertForSequenceClassification"]
    torch.manual_seed(0)
    b = type(a)(type(a.config)(**(a.config.to_dict() | {"num_labels": 7}))).to(a.dtype)
    for name, model in (("a", a), ("b", b)):
        Checkpoint.open(model).save(tmp_path / name)
    command = ("merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out"))
    status, output = run(*command)
    assert status == 1
    assert "(--backbone-only)" in output
    assert not (tmp_path / "out").exists()
    status, output = run(*command, "--backbone-only", "--dry-run")
    assert status == 0, output
    assert "would align" in output
    assert not (tmp_path / "out").exists()
    status, output = run(*command, "--backbone-only")
    assert status == 0, output
    head, kept = (Checkpoint.open(tmp_path / name).tensors["classifier.weight"] for name in ("out", "a"))
    assert torch.equal(head, kept)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"models: [{tmp_path / 'a'}, {tmp_path / 'b'}]\nbackbone_only: true\nalign: false\n")
    assert run("merge", str(recipe), "-o", str(tmp_path / "again"))[0] == 0
    status, output = run("merge", str(recipe), "-o", str(tmp_path / "x"), "--backbone-only")
    assert status == 1
    assert "--backbone-only is given together with a recipe" in output


def test_what_is_for_publishing_says_where_to(run, pair, tmp_path):
    for option in (("--license", "mit"), ("--public",), ("--create-pr",), ("--template", tmp_path / "t.j2")):
        output = run("merge", *pair, "-o", tmp_path / "x", *option, "--dry-run")[1]
        assert "is for publishing; name the repository (--push-to ORG/NAME)" in " ".join(output.split())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"models: [{pair[0]}, {pair[1]}]\npublish: {{to: org/of-recipe, private: false}}\n")
    assert "none until you name one" in run("merge", recipe, "-o", tmp_path / "x", "--dry-run")[1]
    status, output = run("merge", recipe, "-o", tmp_path / "x", "--dry-run", "--license", "mit")
    assert status == 0, output
    assert "org/of-recipe, which is created, public" in output
    assert (
        "is inside the folder of the merge"
        in run("merge", *pair, "-o", tmp_path / "x", "--report", tmp_path / "x/r.html")[1]
    )
