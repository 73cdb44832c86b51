"""Model cards: their metadata on the Hub, their text for people, and that its instructions work."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest
import torch
import yaml
from conftest import HUB
from huggingface_hub import HfApi, ModelCard
from published import (
    expect_refusal,
    folder_contents,
    processor,
    push_digits,
    push_parts,
    repository_files,
    run_fresh,
    run_ok,
    save_parts,
    vit,
    write_digits,
)
from texts import bert_config, bert_tokenizer, gpt_tokenizer
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel

MADE = ("README.md", "rebasin.json", "recipe.yaml", "rebasin/report.json")


def bert(seed):
    torch.manual_seed(seed)
    return BertForMaskedLM(bert_config())


def gpt(seed):
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 21, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


KINDS = {
    "vit": (vit, [processor], "image-classification", "AutoModelForImageClassification", r"[0-3]"),
    "bert": (bert, [bert_tokenizer], "fill-mask", "AutoModelForMaskedLM", r".+"),
    "gpt": (gpt, [gpt_tokenizer], "text-generation", "AutoModelForCausalLM", r".*"),
    "bare": (gpt, [], "text-generation", "AutoModelForCausalLM", r"(?s)GPT2LMHeadModel\(.*"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Merges of four kinds of models, published; the one of image classifiers with data."""
    folder = tmp_path_factory.mktemp("cards")
    data = ["--data", push_digits("org/card-digits"), "-e", "split=test", "-e", "points=3", "-e", "samples=20"]
    for name, (model, others, *_) in KINDS.items():
        for seed in (0, 1):
            push_parts(f"org/{name}-in-{seed}", model(seed), *(other() for other in others))
        models = [f"org/{name}-in-{seed}" for seed in (0, 1)]
        more = [*data, "--refit"] if name == "vit" else []
        run_ok("merge", *models, "-o", folder / name, "--push-to", f"org/{name}-out", *more)
    return folder


def snippet(text):
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]


def test_what_the_hub_reads(world, kind):
    _, _, task, _, _ = KINDS[kind]
    card = ModelCard.load(f"org/{kind}-out")
    card.validate()
    assert HfApi()._validate_yaml(card.content) is None
    info = HfApi().model_info(f"org/{kind}-out")
    models = [f"org/{kind}-in-{seed}" for seed in (0, 1)]
    for data in (card.data, info.card_data):
        assert data.base_model == models
        assert data.base_model_relation == "merge"
        assert data.license == "mit"
        assert data.library_name == "transformers"
        assert data.pipeline_tag == task
        assert data.tags == ["merge", "rebasin"]
    assert {f"base_model:merge:{model}" for model in models} <= set(info.tags)
    assert (info.pipeline_tag, info.library_name) == (task, "transformers")
    assert (info.model_index is not None) == (kind == "vit")


def test_results_are_for_machines_and_for_people(world):
    card = ModelCard.load("org/vit-out")
    results = {result.metric_type: result for result in HfApi().model_info("org/vit-out").card_data.eval_results}
    assert results.keys() == {"loss", "accuracy"}
    assert card.data.metrics == ["loss", "accuracy"]
    commit = HUB.repo("org/card-digits", "datasets").resolve("main")
    for result in results.values():
        assert (result.dataset_name, result.dataset_split, result.dataset_revision) == (
            "org/card-digits",
            "test",
            commit,
        )
    (pair,) = json.loads(repository_files("org/vit-out")["rebasin/report.json"])["pairs"]
    table = [line for line in section(card.text, "How good it is").splitlines() if line.startswith("| ")]
    named = [line.split("|")[1].strip() for line in table[1:]]
    assert named == [row["name"] for row in (*pair["ends"], *pair["rows"])]
    assert sum("(control)" in line for line in table) == 2
    (image,) = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert image in repository_files("org/vit-out")


PASTED = "for code in codes:\n    exec(code, {})\n    print('=====')"


@pytest.mark.parametrize("process", ["this", pytest.param("another", marks=pytest.mark.slow)])
def test_the_code_of_a_card_does_what_it_says(world, process):
    """Pasted from the page, by somebody who has only transformers installed."""
    codes = {kind: snippet(ModelCard.load(f"org/{kind}-out").text) for kind in KINDS}
    assert all("hf_rebasin" not in code for code in codes.values())
    assert all(KINDS[kind][3] in code for kind, code in codes.items())
    assert [("Tokenizer" in codes[kind], "ImageProcessor" in codes[kind]) for kind in KINDS] == [
        (False, True),
        (True, False),
        (True, False),
        (False, False),
    ]
    if process == "this":
        out = io.StringIO()
        with redirect_stdout(out):
            exec(PASTED, {"codes": list(codes.values())})
        printed = out.getvalue()
    else:
        script = f"import json, sys\ncodes = json.loads(sys.argv[1])\n{PASTED}"
        printed = run_fresh(script, world, json.dumps([*codes.values()]))
    for kind, text in zip(KINDS, printed.split("=====\n"), strict=False):
        assert re.fullmatch(KINDS[kind][4], text.strip()), f"{kind}: {text}"


def test_what_people_read(world, kind):
    text, recorded = (
        ModelCard.load(f"org/{kind}-out").text,
        json.loads(repository_files(f"org/{kind}-out")["rebasin.json"]),
    )
    for entry in recorded["inputs"]:
        assert f"[{entry['name']}](https://huggingface.co/{entry['name']})" in text
        assert entry["commit"][:12] in text
        assert entry["files"]["model.safetensors"] in text
    assert all(digest in text for digest in recorded["outputs"].values())
    assert all(f"{package} {version}" in text for package, version in recorded["versions"].items())
    assert "Aligned by `weight_matching`, seed 0" in text
    assert f"\nhf-rebasin verify org/{kind}-out --rebuild\n```" in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert yaml.safe_load(recipe) == yaml.safe_load(repository_files(f"org/{kind}-out")["recipe.yaml"])
    assert [entry["revision"] for entry in yaml.safe_load(recipe)["models"]] == [
        entry["commit"] for entry in recorded["inputs"]
    ]
    limits = section(text, "Limits")
    assert ("how good it is is not known" in limits) == (kind != "vit")
    assert ("on nothing else" in limits) == (kind == "vit")
    assert "{{" not in text
    assert "None" not in text
    assert "Undefined" not in text
    assert not re.search(r"\n{4,}", text)


# --- what must not be published --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Local models and data, in a folder with a telling name."""
    secret = tmp_path_factory.mktemp("private-folder-of-jane") / "thesis"
    for seed in (0, 1):
        save_parts(secret / "models" / f"seed-{seed}", vit(seed), processor(), licence="mit")
    write_digits(secret / "pictures")
    (secret / "attic").mkdir()
    return secret


LONG = [pytest.param(how, marks=pytest.mark.slow) for how in ("absolute", "home")]


@pytest.mark.parametrize("how", ["relative", "pattern", *LONG])
def test_no_folder_of_this_machine_is_in_what_is_published(homes, monkeypatch, how):
    monkeypatch.chdir(homes / "attic")
    monkeypatch.setenv("HOME", str(homes))
    place = {"absolute": str(homes), "relative": "..", "home": "~", "pattern": str(homes)}[how]
    data = f"{place}/pictures" + "/*.parquet" * (how == "pattern")
    recipe = {
        "models": [f"{place}/models/seed-{seed}" for seed in (0, 1)],
        "data": {"dataset": data} | ({"files": {"train": "train.parquet"}} if how != "pattern" else {}),
        "refit": True,
        "evaluate": {"points": 2, "samples": 8},
        "publish": {"to": f"org/local-{how}"},
    }
    (homes / "attic" / f"{how}.yaml").write_text(yaml.safe_dump(recipe))
    run_ok("merge", f"{how}.yaml", "-o", homes / "attic" / how)
    content = repository_files(f"org/local-{how}")
    assert content.keys() >= set(MADE)
    told = ("jane", "thesis", "attic", "/models", "models/seed", "/pictures", "..", "~/", "/tmp", "/home")
    for name in MADE:
        text = content[name].decode()
        for word in told:
            lines = [line for line in text.splitlines() if word in line and "http" not in line and "..." not in line]
            assert lines == [], f"{name} has {word!r}"
    assert not [name for name, blob in content.items() if b"jane" in blob or b"thesis" in blob]
    text = content["README.md"].decode()
    assert f"\nhf-rebasin verify org/local-{how} --rebuild --model FOLDER --model FOLDER --data FOLDER\n```" in text
    assert "| seed-0 (not on the Hub) |" in text
    assert "seed-0, seed-1: not on the Hub, so nobody without them can make this model again." in text
    data = ["--data", data] if how == "pattern" else ["--data", homes / "pictures"]
    output = run_ok(
        "verify", f"org/local-{how}", "--rebuild", *data, *(f"--model={homes}/models/seed-{i}" for i in (0, 1))
    )
    assert "all" in output


# --- licences, templates, handwritten cards --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Merges of a model with others that have the same licence, another one, or none."""
    folder = tmp_path_factory.mktemp("licences")
    for name, licence in (("a", "mit"), ("b", "mit"), ("c", "apache-2.0"), ("d", None)):
        save_parts(folder / name, gpt(len(name)), licence=licence)
    for other in "bcd":
        run_ok("merge", folder / "a", folder / other, "-o", folder / f"a{other}", "--no-align")
    return folder


def test_licences_are_kept_refused_or_named(local):
    run_ok("publish", local / "ab", "org/licence-ab")
    assert ModelCard.load("org/licence-ab").data.license == "mit"
    since = len(HUB.requests)
    error = expect_refusal("publish", local / "ac", "org/licence-ac")
    assert "the licences differ (a: mit, c: apache-2.0)" in error
    assert "--license" in error
    assert "not all models say which licence they have (a: mit, d: none said)" in expect_refusal(
        "publish", local / "ad", "org/licence-ad"
    )
    assert HUB.requests[since:] == []
    run_ok("publish", local / "ac", "org/licence-ac", "--license", "Apache-2.0")
    card = ModelCard.load("org/licence-ac")
    assert card.data.license == "apache-2.0"
    assert "Licence: inputs: a: mit, c: apache-2.0; named by the publisher: apache-2.0." in card.text
    assert "is not an identifier" in expect_refusal("publish", local / "ab", "org/licence-ab", "--license", "my own")


def test_a_licence_is_missed_before_anything_is_computed(local, tmp_path):
    recipe = {"models": [str(local / "a"), str(local / "c")], "publish": "org/never"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "the licences differ" in expect_refusal("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_of_ones_own(local, tmp_path):
    template = tmp_path / "card.md.j2"
    template.write_text("# {{ name }} of {{ provenance.inputs | length }}\n\n{{ licence.text }}, {{ usage.task }}\n")
    run_ok("publish", local / "ab", "org/templated", "--template", template)
    card = ModelCard.load("org/templated")
    assert (
        card.text.strip().partition("-->")[2].strip()
        == "# templated of 2\n\nmit, as all models have it, text-generation"
    )
    assert card.data.license == "mit"
    since = len(HUB.requests)
    for wrong in ("{{ nothing }}", "{% if %}", "{{ licence.txt }}", "{{ 1 // 0 }}"):
        template.write_text(wrong)
        error = expect_refusal("publish", local / "ab", "org/templated", "--template", template)
        assert "the template of the card cannot be rendered" in error
        assert str(template) in error
    assert "cannot be rendered" in expect_refusal("publish", local / "ab", "org/x", "--template", tmp_path / "none.j2")
    assert HUB.requests[since:] == []


def test_a_card_of_ones_own_is_kept(local, tmp_path):
    run_ok("publish", local / "ab", "org/own")
    assert "hf-rebasin verify org/own" in (local / "ab/README.md").read_text()
    run_ok("publish", local / "ab", "org/own-2")
    assert "hf-rebasin verify org/own-2" in repository_files("org/own-2")["README.md"].decode(), "ours is written anew"
    mine = "---\nlicense: mit\n---\n\nI made this.\n"
    (local / "ab/README.md").write_text(mine)
    run_ok("publish", local / "ab", "org/own")
    assert repository_files("org/own")["README.md"].decode() == mine
    (tmp_path / "card.md.j2").write_text("{{ name }}")
    error = expect_refusal("publish", local / "ab", "org/own", "--template", tmp_path / "card.md.j2")
    assert "is a handwritten card" in error
    assert (local / "ab/README.md").read_text() == mine


@pytest.mark.parametrize("branch", [(), ("--revision", "next")])
def test_a_card_is_shown_before_it_is_sent(local, branch):
    before = folder_contents(local / "ad")
    since = len(HUB.requests)
    output = run_ok("publish", local / "ad", "org/shown", "--license", "mit", "--dry-run", *branch)
    assert "license: mit" in output
    assert "would publish to org/shown: " in output
    assert {method for method, *_ in HUB.requests[since:]} <= {"GET", "HEAD"}
    assert ("models", "org/shown") not in HUB.repos
    assert folder_contents(local / "ad") == before
