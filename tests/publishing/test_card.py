"""Model cards: what the Hub reads in them, what people read in them, and that what they say can be done."""

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
    bytes_of,
    called,
    fresh,
    processor,
    pushed,
    pushed_digits,
    refused,
    saved,
    there,
    vit,
    written_digits,
)
from texts import bert_config, bert_tokenizer, gpt_tokenizer
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel

MADE = ("README.md", "rebasin.json", "recipe.yaml", "report.json")


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
    """Merges of four kinds of models, published; that of images with data."""
    folder = tmp_path_factory.mktemp("cards")
    data = ["--data", pushed_digits("org/card-digits"), "-e", "split=test", "-e", "points=3", "-e", "samples=20"]
    for name, (model, others, *_) in KINDS.items():
        for seed in (0, 1):
            pushed(f"org/{name}-in-{seed}", model(seed), *(other() for other in others))
        models = [f"org/{name}-in-{seed}" for seed in (0, 1)]
        more = [*data, "--refit"] if name == "vit" else []
        called("merge", *models, "-o", folder / name, "--push-to", f"org/{name}-out", *more)
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
    for said in (card.data, info.card_data):
        assert said.base_model == models
        assert said.base_model_relation == "merge"
        assert said.license == "mit"
        assert said.library_name == "transformers"
        assert said.pipeline_tag == task
        assert said.tags == ["merge", "rebasin"]
    assert {f"base_model:merge:{model}" for model in models} <= set(info.tags)
    assert (info.pipeline_tag, info.library_name) == (task, "transformers")
    assert (info.model_index is not None) == (kind == "vit")


def test_results_are_for_machines_and_for_people(world):
    card = ModelCard.load("org/vit-out")
    results = {one.metric_type: one for one in HfApi().model_info("org/vit-out").card_data.eval_results}
    assert results.keys() == {"loss", "accuracy"}
    assert card.data.metrics == ["loss", "accuracy"]
    commit = HUB.repo("org/card-digits", "datasets").resolve("main")
    for one in results.values():
        assert (one.dataset_name, one.dataset_split, one.dataset_revision) == ("org/card-digits", "test", commit)
    (pair,) = json.loads(there("org/vit-out")["report.json"])["pairs"]
    table = [line for line in section(card.text, "How good it is").splitlines() if line.startswith("| ")]
    named = [line.split("|")[1].strip() for line in table[1:]]
    assert named == [row["name"] for row in (*pair["ends"], *pair["rows"])]
    assert sum("(control)" in line for line in table) == 2
    (image,) = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert image in there("org/vit-out")


PASTED = "for code in codes:\n    exec(code, {})\n    print('=====')"


@pytest.mark.parametrize("process", ["this", pytest.param("another", marks=pytest.mark.slow)])
def test_the_code_of_a_card_does_what_it_says(world, process):
    """As it was pasted from the page, by somebody who has transformers alone."""
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
        said = out.getvalue()
    else:
        script = f"import json, sys\ncodes = json.loads(sys.argv[1])\n{PASTED}"
        said = fresh(script, world, json.dumps([*codes.values()]))
    said = said.split("=====\n")
    for kind, one in zip(KINDS, said, strict=False):
        assert re.fullmatch(KINDS[kind][4], one.strip()), f"{kind}: {one}"


def test_what_people_read(world, kind):
    text, recorded = ModelCard.load(f"org/{kind}-out").text, json.loads(there(f"org/{kind}-out")["rebasin.json"])
    for one in recorded["inputs"]:
        assert f"[{one['name']}](https://huggingface.co/{one['name']})" in text
        assert one["commit"][:12] in text
        assert one["files"]["model.safetensors"] in text
    assert all(digest in text for digest in recorded["outputs"].values())
    assert all(f"{package} {version}" in text for package, version in recorded["versions"].items())
    assert "Aligned by `weight_matching`, seed 0" in text
    assert f"\nhf-rebasin verify org/{kind}-out --rebuild\n```" in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert yaml.safe_load(recipe) == yaml.safe_load(there(f"org/{kind}-out")["recipe.yaml"])
    assert [one["revision"] for one in yaml.safe_load(recipe)["models"]] == [
        one["commit"] for one in recorded["inputs"]
    ]
    limits = section(text, "Limits")
    assert ("how good it is is not known" in limits) == (kind != "vit")
    assert ("on nothing else" in limits) == (kind == "vit")
    assert "{{" not in text
    assert "None" not in text
    assert "Undefined" not in text
    assert not re.search(r"\n{4,}", text)


# --- what nobody should read -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Models and data that are nowhere but here, in a folder with a telling name."""
    secret = tmp_path_factory.mktemp("private-folder-of-jane") / "thesis"
    for seed in (0, 1):
        saved(secret / "models" / f"seed-{seed}", vit(seed), processor(), licence="mit")
    written_digits(secret / "pictures")
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
    called("merge", f"{how}.yaml", "-o", homes / "attic" / how)
    content = there(f"org/local-{how}")
    assert content.keys() >= set(MADE)
    told = ("jane", "thesis", "attic", "/models", "models/seed", "/pictures", "..", "~/", "/tmp", "/home")
    for name in MADE:
        text = content[name].decode()
        for word in told:
            lines = [line for line in text.splitlines() if word in line and "http" not in line and "..." not in line]
            assert lines == [], f"{name} has {word!r}"
    assert not [name for name, said in content.items() if b"jane" in said or b"thesis" in said]
    text = content["README.md"].decode()
    assert f"\nhf-rebasin verify org/local-{how} --rebuild --model FOLDER --model FOLDER --data FOLDER\n```" in text
    assert "| seed-0 (not on the Hub) |" in text
    assert "seed-0, seed-1: not on the Hub, so nobody without them can make this model again." in text
    data = ["--data", data] if how == "pattern" else ["--data", homes / "pictures"]
    found = called(
        "verify", f"org/local-{how}", "--rebuild", *data, *(f"--model={homes}/models/seed-{i}" for i in (0, 1))
    )
    assert "all" in found


# --- licences, templates, cards of one's own -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Merges of models with the same licence, with another, and with none."""
    folder = tmp_path_factory.mktemp("licences")
    for name, licence in (("a", "mit"), ("b", "mit"), ("c", "apache-2.0"), ("d", None)):
        saved(folder / name, gpt(len(name)), licence=licence)
    for other in "bcd":
        called("merge", folder / "a", folder / other, "-o", folder / f"a{other}", "--no-align")
    return folder


def test_licences_are_kept_refused_or_named(local):
    called("publish", local / "ab", "org/licence-ab")
    assert ModelCard.load("org/licence-ab").data.license == "mit"
    since = len(HUB.requests)
    said = refused("publish", local / "ac", "org/licence-ac")
    assert "the licences differ (a: mit, c: apache-2.0)" in said
    assert "--license" in said
    assert "not all models say which licence they have (a: mit, d: none said)" in refused(
        "publish", local / "ad", "org/licence-ad"
    )
    assert HUB.requests[since:] == []
    called("publish", local / "ac", "org/licence-ac", "--license", "Apache-2.0")
    card = ModelCard.load("org/licence-ac")
    assert card.data.license == "apache-2.0"
    assert "Licence: inputs: a: mit, c: apache-2.0; named by the publisher: apache-2.0." in card.text
    assert "is no identifier" in refused("publish", local / "ab", "org/licence-ab", "--license", "my own")


def test_a_licence_is_missed_before_anything_is_computed(local, tmp_path):
    recipe = {"models": [str(local / "a"), str(local / "c")], "publish": "org/never"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "the licences differ" in refused("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_of_ones_own(local, tmp_path):
    template = tmp_path / "card.md.j2"
    template.write_text("# {{ name }} of {{ provenance.inputs | length }}\n\n{{ licence.text }}, {{ usage.task }}\n")
    called("publish", local / "ab", "org/templated", "--template", template)
    card = ModelCard.load("org/templated")
    assert (
        card.text.strip().partition("-->")[2].strip()
        == "# templated of 2\n\nmit, as all models have it, text-generation"
    )
    assert card.data.license == "mit"
    since = len(HUB.requests)
    for wrong in ("{{ nothing }}", "{% if %}", "{{ licence.txt }}", "{{ 1 // 0 }}"):
        template.write_text(wrong)
        said = refused("publish", local / "ab", "org/templated", "--template", template)
        assert "the template of the card cannot be rendered" in said
        assert str(template) in said
    assert "cannot be rendered" in refused("publish", local / "ab", "org/x", "--template", tmp_path / "none.j2")
    assert HUB.requests[since:] == []


def test_a_card_of_ones_own_is_kept(local, tmp_path):
    called("publish", local / "ab", "org/own")
    assert "hf-rebasin verify org/own" in (local / "ab/README.md").read_text()
    called("publish", local / "ab", "org/own-2")
    assert "hf-rebasin verify org/own-2" in there("org/own-2")["README.md"].decode(), "ours is written anew"
    mine = "---\nlicense: mit\n---\n\nI made this.\n"
    (local / "ab/README.md").write_text(mine)
    called("publish", local / "ab", "org/own")
    assert there("org/own")["README.md"].decode() == mine
    (tmp_path / "card.md.j2").write_text("{{ name }}")
    said = refused("publish", local / "ab", "org/own", "--template", tmp_path / "card.md.j2")
    assert "is a card of somebody's own" in said
    assert (local / "ab/README.md").read_text() == mine


@pytest.mark.parametrize("branch", [(), ("--revision", "next")])
def test_a_card_is_shown_before_it_is_sent(local, branch):
    before = bytes_of(local / "ad")
    since = len(HUB.requests)
    said = called("publish", local / "ad", "org/shown", "--license", "mit", "--dry-run", *branch)
    assert "license: mit" in said
    assert "would publish to org/shown: " in said
    assert {method for method, *_ in HUB.requests[since:]} <= {"GET", "HEAD"}
    assert ("models", "org/shown") not in HUB.repos
    assert bytes_of(local / "ad") == before
