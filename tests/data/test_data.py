"""Data by description: read by the real `datasets`, made into batches by real tokenizers and image processors."""

import csv
import inspect
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import HUB
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import HfApi
from PIL import Image
from pydantic import ValidationError
from texts import SMALL, TEXTS, WORDS, bert_config, bert_tokenizer, gpt_tokenizer
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    ConvNextConfig,
    EncoderDecoderConfig,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_rebasin import Checkpoint
from hf_rebasin.data.batches import DataSettings, open_data
from hf_rebasin.data.dataset import open_rows
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError
from hf_rebasin.merging.recalibration import recalibrate
from hf_rebasin.modules import distributed as processes
from hf_rebasin.modules.forward import output_tensors
from hf_rebasin.publishing.record import pinned_settings


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)


def make_checkpoint(config, architecture, folder=None, processor=None, **settings):
    """Make a checkpoint without weights: a configuration, and a tokenizer or image processor."""
    config.architectures = [architecture]
    for key, value in settings.items():
        setattr(config, key, value)
    if processor is not None:
        processor.save_pretrained(folder)
    return Checkpoint({}, config, name="the model", folder=folder)


@pytest.fixture
def gpt(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(WORDS) + 1, n_positions=32)
    return make_checkpoint(config, "GPT2LMHeadModel", tmp_path / "gpt", gpt_tokenizer())


@pytest.fixture
def mlm(tmp_path):
    return make_checkpoint(bert_config(), "BertForMaskedLM", tmp_path / "bert", bert_tokenizer())


@pytest.fixture
def classifier(tmp_path):
    config = bert_config(id2label={0: "Negative", 1: "Positive"})
    return make_checkpoint(config, "BertForSequenceClassification", tmp_path / "classifier", bert_tokenizer())


@pytest.fixture
def t5(tmp_path):
    config = T5Config(vocab_size=len(WORDS) + 5, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return make_checkpoint(config, "T5ForConditionalGeneration", tmp_path / "t5", bert_tokenizer())


def vit(folder, processor, **other):
    config = ViTConfig(**({"image_size": 8, "patch_size": 4, "num_channels": 3} | SMALL | other))
    return make_checkpoint(config, "ViTForImageClassification", folder, processor)


@pytest.fixture
def images(tmp_path):
    """Twelve images of two classes."""
    generator = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "images" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return "images"


@pytest.fixture
def text():
    write("corpus.txt", "\n\n".join(TEXTS) + "\n")
    return "corpus.txt"


@pytest.fixture
def reviews():
    with open("reviews.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        out.writerows([text, i % 2] for i, text in enumerate(TEXTS))
    return "reviews.csv"


@pytest.fixture(scope="module")
def on_the_hub():
    """A dataset on the Hub with two configurations; its labels are in another order than the model's."""
    features = Features(text=Value("string"), label=ClassLabel(names=["POSITIVE", "negative"]))
    data = Dataset.from_dict({"text": TEXTS, "label": [i % 2 for i in range(40)]}, features=features)
    data.push_to_hub("org/reviews", "short", split="validation")
    data.select(range(4)).push_to_hub("org/reviews", "tiny")
    return "org/reviews"


def write(name, text):
    with open(name, "w") as file:
        file.write(text)


def open_for(checkpoint, dataset, **settings):
    return open_data(DataSettings(dataset=dataset, **settings), checkpoint)


def same_batches(a, b):
    a, b = list(a), list(b)
    if [x.keys() for x in a] != [x.keys() for x in b]:
        return False
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"batch_size": 0},
        {"max_length": 0},
        {"seed": -1},
        {"shuffle": -1},
        {"split": ""},
        {"labels": True},
        {"files": []},
        {"files": ""},
        {"colum": "text"},
        {"dataset": ""},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError) as error:
        DataSettings(**{"dataset": "d"} | wrong)
    assert {e["loc"][0] for e in error.value.errors()} == set(wrong)


def test_settings_can_be_compared_and_written_down():
    settings = DataSettings(dataset="d", files={"train": ["a", "b"]}, labels=False)
    assert DataSettings.model_validate(json.loads(settings.model_dump_json())) == settings
    with pytest.raises(ValidationError):
        settings.samples = 3


def test_the_worked_example_holds():
    example = inspect.getdoc(DataSettings).partition("Example")[2].partition("\n\n")[2]
    settings = DataSettings.model_validate(yaml.safe_load(example))
    assert (settings.dataset, settings.samples / settings.batch_size) == ("dair-ai/emotion", 16)


# --- kinds of models -------------------------------------------------------------------------------------------------


def test_text_of_a_causal_model_is_packed(gpt, text):
    batches = open_for(gpt, text, max_length=9, batch_size=4)
    first = next(iter(batches))
    assert {key: tuple(value.shape) for key, value in first.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (4, 9)
    )
    ids = [i for batch in batches for i in batch["input_ids"].flatten().tolist()]
    vocabulary = gpt_tokenizer().get_vocab()
    whole = [i for text in TEXTS for i in [*(vocabulary[word] for word in text.split()), 0]]  # 0 ends every text
    assert ids == whole[: len(whole) // 9 * 9]
    assert len(whole) % 9
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
    assert batches.labelled
    loss = GPT2LMHeadModel(gpt.config)(**first).loss
    assert loss.isfinite()
    assert sum(len(b["input_ids"]) for b in open_for(gpt, text, max_length=10, samples=7, batch_size=4)) == 7


def test_a_text_shorter_than_a_block_is_one(gpt):
    write("short.txt", "the cat sat")
    (only,) = open_for(gpt, "short.txt")
    assert only["input_ids"].shape == (1, 4)


def test_unlabelled_blocks_are_not_masked(mlm, text):
    batches = open_for(mlm, text, labels=False)
    assert not batches.labelled
    assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in batches)
    assert not any((batch["input_ids"] == 4).any() for batch in batches)


def test_masked_text_is_masked_alike_in_every_pass(mlm, text):
    batches = open_for(mlm, text, max_length=12, batch_size=3)
    state = torch.get_rng_state()
    passes = list(batches), list(batches)
    assert same_batches(*passes)
    assert torch.equal(torch.get_rng_state(), state)
    hidden = [batch["input_ids"] == 4 for batch in passes[0]]
    plain = list(open_for(mlm, text, max_length=12, batch_size=3, labels=False))
    for batch, mask, whole in zip(passes[0], hidden, plain, strict=True):
        assert (mask.sum(1) == 2).all()  # 10 * 0.15, rounded
        assert torch.equal(batch["labels"] != -100, mask)
        assert torch.equal(torch.where(mask, batch["labels"], batch["input_ids"]), whole["input_ids"])
        assert (batch["input_ids"][:, 0] == 2).all()
        assert (batch["input_ids"][:, -1] == 3).all()
    assert not torch.equal(hidden[0], hidden[1])
    assert not same_batches(passes[0], open_for(mlm, text, max_length=12, batch_size=3, seed=1))
    assert BertForMaskedLM(mlm.config)(**passes[0][0]).loss.isfinite()


def test_rows_of_a_classifier_are_padded_and_labelled(classifier, reviews):
    batches = open_for(classifier, reviews, batch_size=8, samples=20)
    made = list(batches)
    assert [len(batch["labels"]) for batch in made] == [8, 8, 4]
    assert torch.cat([batch["labels"] for batch in made]).tolist() == [0, 1] * 10
    for number, batch in enumerate(made):
        words = [len(text.split()) for text in TEXTS[8 * number :][: len(batch["labels"])]]
        assert batch["attention_mask"].sum(1).tolist() == [n + 2 for n in words]
        assert batch["input_ids"].shape[1] == max(words) + 2
    assert BertForSequenceClassification(classifier.config)(**made[0]).loss.isfinite()
    (cut, *_) = open_for(classifier, reviews, max_length=4)
    assert cut["input_ids"].shape == (16, 4)
    assert (cut["input_ids"][:, 3] == 3).all()
    assert not open_for(classifier, reviews, labels=False).labelled


def test_a_bare_model_takes_no_labels(classifier, reviews):
    classifier.config.architectures = ["BertModel"]
    batches = open_for(Checkpoint({}, classifier.config, folder=classifier.folder), reviews)
    assert not batches.labelled
    assert next(iter(batches)).keys() == {"input_ids", "attention_mask"}


def test_one_output_is_a_number(classifier):
    write("scores.jsonl", '{"sentence": "the cat", "label": 0.5}\n{"sentence": "a dog", "label": 2}\n')
    classifier.config.num_labels = 1
    (batch,) = open_for(classifier, "scores.jsonl")
    assert batch["labels"].tolist() == [0.5, 2.0]


def test_an_encoder_decoder_reads_what_its_own_shift_gives(t5, reviews):
    model = T5ForConditionalGeneration(t5.config)
    batches = open_for(t5, reviews, batch_size=4)  # whose labels are classes, not texts
    assert not batches.labelled
    batch = next(iter(batches))
    assert torch.equal(batch["decoder_input_ids"], model._shift_right(batch["input_ids"]))
    assert model(**batch).logits.isfinite().all()
    write("pairs.jsonl", '{"text": "the cat", "to": "a dog ran"}\n{"text": "a bird flew", "to": "the"}\n')
    (batch,) = open_for(t5, "pairs.jsonl", column="text", labels="to")
    assert (batch["labels"] == -100).tolist() == [[False] * 5, [False] * 3 + [True] * 2]
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("pad", [None, "<end>"])
def test_rows_are_filled_up_with_the_end_of_text(gpt, text, pad):
    gpt_tokenizer(pad_token=pad).save_pretrained(gpt.folder)
    gpt.config.architectures = ["GPT2Model"]
    bare = Checkpoint({}, gpt.config, folder=gpt.folder)
    write("two.txt", "the cat sat\na dog")
    (batch,) = open_for(bare, "two.txt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"][1, 2] == 0


def data_serves(model, folder):
    """Whether batches are made that a model computes with."""
    config = getattr(model.config, "vision_config", model.config)
    write("rows.jsonl", "".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(TEXTS)))
    if takes_images := hasattr(config, "num_channels"):
        size, channels = getattr(config, "image_size", 16), config.num_channels
        mode, mean = {1: "L", 3: "RGB"}[channels], [0.5] * channels
        (folder / "pictures").mkdir()
        Image.new(mode, (9, 9), 77).save(folder / "pictures" / "a.png")
        sides = {"height": size, "width": size}
        ViTImageProcessor(size=sides, image_mean=mean, image_std=mean).save_pretrained(folder)
    else:
        bert_tokenizer().save_pretrained(folder)
    checkpoint = replace(Checkpoint.open(model), folder=folder)
    batches = open_for(checkpoint, "pictures" if takes_images else "rows.jsonl", samples=6, batch_size=3)
    batch = next(iter(batches))
    with torch.no_grad():
        outputs = model(**{key: x.double() if key == "pixel_values" else x for key, x in batch.items()})
    finite = all(x.isfinite().all() for x in output_tensors(outputs))
    return finite and batches.labelled == ("labels" in batch) == ("loss" in outputs)


def test_one_model_of_every_table_is_served(family, tmp_path):
    if hasattr(family.config, "text_config"):
        with pytest.raises(MismatchError, match="text and images together"):
            data_serves(family, tmp_path)
    else:
        assert data_serves(family, tmp_path)


@pytest.mark.slow
def test_every_model_is_served(tiny, tmp_path):
    if {"input_ids", "pixel_values"} <= inspect.signature(tiny.forward).parameters.keys():
        pytest.skip("takes text and images together")
    assert data_serves(tiny, tmp_path)


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_made_ready_by_the_models_own_processor(images, tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    checkpoint = vit(tmp_path / "vit", processor, id2label={0: "CAT", 1: "DOG"})
    batches = open_for(checkpoint, images, batch_size=5)
    made = list(batches)
    assert [tuple(batch["pixel_values"].shape) for batch in made] == [(5, 3, 8, 8), (5, 3, 8, 8), (2, 3, 8, 8)]
    assert torch.cat([batch["labels"] for batch in made]).tolist() == [0] * 6 + [1] * 6
    first = Image.open("images/cat/1.png")
    assert torch.equal(made[0]["pixel_values"][0], processor(first, return_tensors="pt")["pixel_values"][0])
    assert same_batches(made, open_for(checkpoint, "imagefolder", files=images, batch_size=5))
    assert same_batches(made, open_for(checkpoint, images, batch_size=5, streaming=False))
    assert ViTForImageClassification(checkpoint.config)(**made[0]).loss.isfinite()


def test_grey_images_where_a_model_takes_one_channel(tmp_path):
    (tmp_path / "grey").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save("grey/a.png")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    (batch,) = open_for(vit(tmp_path / "vit", processor, num_channels=1), "grey")
    assert torch.allclose(batch["pixel_values"][0, 0], torch.arange(64).reshape(8, 8) / 127.5 - 1)
    three = vit(tmp_path / "three", ViTImageProcessor(size={"height": 8, "width": 8}))
    assert next(iter(open_for(three, "grey")))["pixel_values"].shape == (1, 3, 8, 8)


def test_images_that_do_not_fit(images, tmp_path):
    def assert_refused(error, match, processor=None, **config):
        processor = processor or ViTImageProcessor(size={"height": 8, "width": 8})
        with pytest.raises(error, match=match):
            open_for(vit(tmp_path / "vit", processor, **config), images)

    assert_refused(MismatchError, r"3 channels \(RGB\), and the model takes 1", num_channels=1)
    assert_refused(MismatchError, r"makes images of \(8, 8\), and the model takes \(16, 16\)", image_size=16)
    assert_refused(
        MismatchError, "cannot make a batch of images of 12x10 RGB: mean", ViTImageProcessor(image_mean=[0.5])
    )
    assert_refused(MismatchError, "has 2 labels .*cat, dog.* and the model 3", num_labels=3)
    assert_refused(MismatchError, "'dog' are not the model's", id2label={0: "cat", 1: "horse"})
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="without an image processor"):
        open_for(Checkpoint({}, vit(None, None).config, name="m", folder=tmp_path / "vit"), images)


def test_other_sizes_where_a_model_takes_any(images, tmp_path):
    config = ConvNextConfig(image_size=224, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    checkpoint = make_checkpoint(config, "ConvNextForImageClassification", tmp_path / "convnext", processor)
    assert next(iter(open_for(checkpoint, images)))["pixel_values"].shape[-2:] == (16, 16)


def test_a_broken_image_is_named(images, tmp_path):
    write("images/cat/1.png", "no image")
    with pytest.raises(OptionError, match=r"an image of images .*1\.png.* cannot be read"):
        open_for(vit(tmp_path / "vit", ViTImageProcessor(size={"height": 8, "width": 8})), images)


# --- where rows come from --------------------------------------------------------------------------------------------


def test_files_of_every_kind_give_the_same(classifier, reviews):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    write("reviews.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write("reviews.json", json.dumps(rows))
    write("reviews.tsv", "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    Dataset.from_list(rows).to_parquet("reviews.parquet")
    Dataset.from_list(rows[:20]).to_parquet("parts/0.parquet")
    Dataset.from_list(rows[20:]).to_parquet("parts/1.parquet")
    expected = list(open_for(classifier, reviews))
    assert len(expected) == 3
    for name in ("reviews.jsonl", "reviews.json", "reviews.tsv", "reviews.parquet", "parts", "parts/*.parquet"):
        assert same_batches(open_for(classifier, name), expected), name
    by_reader = open_for(classifier, "csv", files={"test": reviews}, split="test")
    assert same_batches(by_reader, expected)
    assert by_reader.describe().startswith("csv, files reviews.csv, split test, column text: ")
    assert same_batches(open_for(classifier, "parts", files=["0.parquet", "1.parquet"], streaming=False), expected)
    assert not same_batches(open_for(classifier, "parts/1.parquet"), expected)
    assert same_batches(open_for(classifier, "parts/1.parquet"), open_for(classifier, "parts", files="1.parquet"))


def test_a_dataset_of_the_hub_is_read_at_one_commit(classifier, on_the_hub):
    commit = HUB.repos["datasets", on_the_hub].refs["refs/heads/main"]
    batches = open_for(classifier, on_the_hub, name="short", split="validation", samples=6)
    (batch,) = batches
    assert batch["labels"].tolist() == [1, 0] * 3  # POSITIVE is the model's Positive, whatever its number here
    assert batches.rows.commit == commit
    assert batches.describe() == (
        f"org/reviews at {commit}, configuration short, split validation, column text: at most 6 rows, labelled"
    )
    again = open_for(classifier, f"org/reviews@{commit}", name="short", split="validation", samples=6, streaming=False)
    assert same_batches(batches, again)


def test_a_revision_stays_what_it_was(classifier, tmp_path):
    api = HfApi()
    api.create_repo("org/growing", repo_type="dataset", exist_ok=True)

    def push(text):
        place = {"path_in_repo": "data.csv", "repo_id": "org/growing", "repo_type": "dataset"}
        return api.upload_file(path_or_fileobj=f"text,label\n{text},1\n".encode(), **place).oid

    commit = push("a cat")
    before = open_for(classifier, "org/growing")
    push("the dog ran under")
    after = open_for(classifier, "org/growing")
    assert next(iter(before))["input_ids"].shape[1] == 4
    assert next(iter(after))["input_ids"].shape[1] == 6
    assert same_batches(open_for(classifier, "org/growing", revision=commit), before)


def test_offline_the_commit_is_the_one_that_is_read(classifier, monkeypatch):
    data = Dataset.from_dict({"text": TEXTS[:4], "label": [0, 1, 0, 1]})
    commits = [data.select(range(n)).push_to_hub("org/kept").oid for n in (2, 4)]
    open_for(classifier, "org/kept", streaming=False, revision=commits[0])
    HfApi().resolve_revision("org/kept", repo_type="dataset")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for settings in ({}, {"revision": commits[0]}, {"revision": "never-seen"}):
        batches = open_for(classifier, "org/kept", **settings)
        assert len(list(batches.rows)) == 2
        pinned = pinned_settings(batches)
        assert (pinned["dataset"], pinned["revision"]) == ("org/kept", commits[0])
    for revision in (commits[1], "main"):
        with pytest.raises(OptionError, match=rf"{commits[1]}\) is not in the cache .* has {commits[0]}"):
            open_for(classifier, "org/kept", revision=revision)
    assert "revision" not in pinned_settings(replace(batches, rows=replace(batches.rows, commit=None)))


def test_datasets_saved_to_disk(classifier, reviews):
    data = datasets.load_dataset("csv", data_files=reviews)
    data.save_to_disk("both")
    data["train"].save_to_disk("one")
    expected = list(open_for(classifier, reviews))
    assert same_batches(open_for(classifier, "both"), expected)
    assert same_batches(open_for(classifier, "one"), expected)
    with pytest.raises(OptionError, match="no configurations or files to choose from"):
        open_for(classifier, "both", name="short")


def test_labels_in_words_are_no_text_to_read(classifier):
    write("rows.jsonl", '{"body": "the cat sat", "label": "positive"}\n')
    assert next(iter(open_for(classifier, "rows.jsonl")))["input_ids"].shape[1] == 5


def test_only_what_is_needed_is_read(gpt):
    write("long.txt", f"{TEXTS[3]}\n" * 100_000)
    rows = open_rows("long.txt")
    read = []

    def count_rows():
        for row in rows:
            read.append(row)
            yield row

    batches = open_for(gpt, "long.txt", max_length=8, samples=4)
    object.__setattr__(batches, "rows", count_rows())
    assert len(next(iter(batches))["input_ids"]) == 4
    assert len(read) <= 32


def test_shuffled_rows_come_in_the_same_order_each_time(classifier, reviews):
    plain, shuffled = open_for(classifier, reviews), open_for(classifier, reviews, shuffle=30, seed=1)
    assert same_batches(shuffled, shuffled)
    assert not same_batches(shuffled, plain)
    assert not same_batches(shuffled, open_for(classifier, reviews, shuffle=30, seed=2))

    def words(batches):
        return sorted(x for b in batches for x in b["input_ids"][b["attention_mask"].bool()].tolist())

    assert words(shuffled) == words(plain)
    assert "shuffled by 30 with seed 1" in shuffled.describe()


# --- several processes -----------------------------------------------------------------------------------------------


def test_shares_are_the_batches_of_one(gpt, mlm, classifier, text, reviews):
    for checkpoint, dataset in ((gpt, text), (mlm, text), (classifier, reviews)):
        batches = open_for(checkpoint, dataset, batch_size=3, max_length=8)
        whole = list(batches)
        for world in (2, 3):
            shares = [list(batches.iter_shard(rank, world)) for rank in range(world)]
            assert all(same_batches(shares[rank], whole[rank::world]) for rank in range(world))


def test_images_of_others_are_not_decoded(images, tmp_path, monkeypatch):
    batches = open_for(vit(tmp_path / "vit", ViTImageProcessor(size={"height": 8, "width": 8})), images, batch_size=2)
    decoded = []
    decode = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *args, **more: decoded.append(1) or decode(*args, **more)
    )
    assert len(list(batches.iter_shard(1, 3))) == 2
    assert len(decoded) == 4


def test_processes_take_their_shares(classifier, reviews, monkeypatch):
    batches = open_for(classifier, reviews, batch_size=3)
    whole = list(batches)
    monkeypatch.setattr(processes, "_is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    made = []
    preparation = type(batches.preparation)
    make = preparation.make_batch
    monkeypatch.setattr(preparation, "make_batch", lambda self, *args: made.append(1) or make(self, *args))
    assert same_batches(processes.shard_batches(batches), whole[1::2])
    assert len(made) == len(whole[1::2])
    assert same_batches(processes.shard_batches(whole), whole[1::2])  # a list has no shares to give


def test_batches_serve_what_takes_batches(images, tmp_path):
    batches = open_for(vit(tmp_path / "vit", ViTImageProcessor(size={"height": 8, "width": 8})), images, labels=False)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, pixel_values):
            return self.norm(pixel_values)

    net = Net()
    assert recalibrate(net, batches) == 1
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert torch.allclose(net.norm.running_mean, pixels.mean((0, 2, 3)), atol=1e-5)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "corpus.tx"}, "neither a local file or folder .*did you mean 'corpus.txt'"),
        ({"dataset": "org/nothing"}, r"'org/nothing' is neither .* \(RepositoryNotFoundError\)$"),
        ({"dataset": "/no/such/file.csv"}, "neither a local file or folder"),
        ({"dataset": "nothing-*.txt"}, "matches no file"),
        ({"dataset": "corpus.txt", "revision": "main"}, "has no revision 'main'"),
        ({"dataset": "corpus.txt", "files": "corpus.txt"}, "names files already"),
        ({"dataset": "org/reviews@main", "revision": "main"}, "give only one of them"),
        ({"dataset": "org/reviews@nowhere"}, "org/reviews has no revision 'nowhere'"),
        ({"dataset": "org/reviews"}, "several configurations; say which .*: short, tiny"),
        ({"dataset": "org/reviews", "name": "shirt"}, "no configuration 'shirt' .*did you mean 'short'"),
        ({"dataset": "org/reviews", "name": "short"}, "no split 'train'.*validation"),
        ({"dataset": "corpus.txt", "split": "trian"}, "no split 'trian'; did you mean 'train'"),
        ({"dataset": "corpus.txt", "column": "txt"}, "no column 'txt'; did you mean 'text'"),
        ({"dataset": "text"}, r"text reads files; say which \(files\)"),
        ({"dataset": "empty.txt"}, "split 'train' of empty.txt has no rows"),
        ({"dataset": "blank.txt"}, "has only empty texts"),
        ({"dataset": "file.strange"}, "file.strange cannot be opened"),
        ({"dataset": "broken.jsonl"}, "broken.jsonl cannot be read"),
        ({"dataset": "many.jsonl"}, r"several columns of text; .* of one \(text\), two \(text\), n \(int64\)"),
        ({"dataset": "many.jsonl", "column": "n"}, "column 'n' .* holds int64, and the model takes text"),
        ({"dataset": "numbers.jsonl"}, r"no column of text, .* of n \(int64\)"),
        ({"dataset": "gaps.jsonl"}, "column 'text' has None in a row"),
        ({"dataset": "corpus.txt", "labels": "text"}, "GPT2LMHeadModel predicts its own text"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_errors_are_reported_when_data_is_opened(gpt, text, on_the_hub, settings, message):
    write("empty.txt", "")
    write("blank.txt", "\n \n")
    write("file.strange", "text")
    write("broken.jsonl", '{"text": "a"}\n{"text": \n')
    write("many.jsonl", '{"one": "a", "two": "b", "n": 1}\n')
    write("numbers.jsonl", '{"n": 1}\n')
    write("gaps.jsonl", '{"text": "a"}\n{"text": null}\n')
    with pytest.raises(OptionError, match=message):
        open_for(gpt, **settings)


def test_a_model_whose_tokenizer_does_not_fit(gpt, mlm, text, tmp_path):
    def assert_refused(error, match, checkpoint, **settings):
        with pytest.raises(error, match=match):
            open_for(checkpoint, text, **settings)

    bare = tmp_path / "bare"
    bare.mkdir()
    assert_refused(CheckpointError, "without a tokenizer", Checkpoint({}, gpt.config, folder=bare))
    assert_refused(CheckpointError, "without a tokenizer", Checkpoint({}, gpt.config))
    assert_refused(CheckpointError, "no class that transformers knows", Checkpoint({}, folder=gpt.folder))
    assert_refused(MismatchError, "max_length is 64, and the model has 32 positions", gpt, max_length=64)
    assert_refused(OptionError, "max_length 2 leaves no room", mlm, max_length=2)
    gpt_tokenizer().save_pretrained(mlm.folder)
    assert_refused(CheckpointError, "no mask token", mlm)
    assert not open_for(mlm, text, labels=False).labelled
    highest = rf"tokens up to {len(WORDS) + 4} \('noon'\), and the model {len(WORDS) + 1} \(vocab_size\)"
    bert_tokenizer().save_pretrained(gpt.folder)
    assert_refused(MismatchError, highest, gpt)
    both = EncoderDecoderConfig.from_encoder_decoder_configs(mlm.config, mlm.config)
    pair = make_checkpoint(both, "EncoderDecoderModel", mlm.folder)
    assert_refused(CheckpointError, "does not say how many tokens it knows", pair)
    write(gpt.folder / "tokenizer.json", "{}")
    assert_refused(CheckpointError, "tokenizer of the model cannot be loaded", gpt)


def test_rows_that_nothing_can_fill_up(gpt, reviews):
    gpt_tokenizer(eos_token=None).save_pretrained(gpt.folder)
    gpt.config.architectures, gpt.config.eos_token_id = ["GPT2Model"], None
    bare = Checkpoint({}, gpt.config, name="the model", folder=gpt.folder)
    with pytest.raises(CheckpointError, match="neither a pad token nor an end-of-text token"):
        open_for(bare, reviews)
    assert next(iter(open_for(bare, reviews, batch_size=1)))["attention_mask"].all()


def test_a_classifier_that_cannot_see_where_texts_end(gpt, reviews):
    gpt.config.architectures = ["GPT2ForSequenceClassification"]
    causal = Checkpoint({}, gpt.config, name="the model", folder=gpt.folder)
    with pytest.raises(CheckpointError, match=r"pad_token_id in config\.json"):
        open_for(causal, reviews)
    assert open_for(causal, reviews, batch_size=1).labelled


def test_roberta_counts_positions_from_its_padding(tmp_path, text):
    config = RobertaConfig(vocab_size=len(WORDS) + 5, max_position_embeddings=14, pad_token_id=1, **SMALL)
    checkpoint = make_checkpoint(config, "RobertaForMaskedLM", tmp_path / "roberta", bert_tokenizer())
    assert next(iter(open_for(checkpoint, text)))["input_ids"].shape[1] == 12
    with pytest.raises(MismatchError, match="has 12 positions"):
        open_for(checkpoint, text, max_length=14)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], "a label 2, and the labels that the model knows are 0 to 1"),
        ([0, -1], "a label -1"),
        ([0, None], "a label None"),
        ([0.5, 1.5], "a label 0.5"),
        (["negative", "neutral"], "a label 'neutral', and the model's labels are Negative, Positive"),
    ],
)
def test_labels_that_are_not_the_models(classifier, labels, message):
    write("rows.jsonl", "".join(json.dumps({"text": "a cat", "label": label}) + "\n" for label in labels))
    with pytest.raises(MismatchError, match=message):
        open_for(classifier, "rows.jsonl")
    assert not open_for(classifier, "rows.jsonl", labels=False).labelled


def test_labels_are_matched_by_their_strings(classifier):
    write(
        "rows.jsonl", "".join(f'{{"text": "a", "label": "{label}"}}\n' for label in ("POSITIVE", "negative", "1", "0"))
    )
    (batch,) = open_for(classifier, "rows.jsonl")
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    classifier.config.id2label = {0: "positive", 1: "Positive"}  # where capitals tell them apart, they count
    write("rows.jsonl", '{"text": "a", "label": "Positive"}\n{"text": "a", "label": "positive"}\n')
    (batch,) = open_for(classifier, "rows.jsonl")
    assert batch["labels"].tolist() == [1, 0]
    write("rows.jsonl", '{"text": "a", "label": "POSITIVE"}\n')
    with pytest.raises(MismatchError, match="a label 'POSITIVE'"):
        open_for(classifier, "rows.jsonl")


def test_which_labels_are_meant(classifier, reviews):
    write("two.jsonl", '{"text": "a", "label": 0, "fine_label": 1}\n')
    with pytest.raises(OptionError, match=r"several columns of labels; .*: label, fine_label"):
        open_for(classifier, "two.jsonl")
    assert next(iter(open_for(classifier, "two.jsonl", labels="fine_label")))["labels"].tolist() == [1]
    with pytest.raises(OptionError, match="no column 'lable'; did you mean 'label'"):
        open_for(classifier, reviews, labels="lable")
    classifier.config.problem_type = "multi_label_classification"
    with pytest.raises(OptionError, match="several labels per row"):
        open_for(classifier, reviews)
    classifier.config.architectures = ["BertForTokenClassification"]
    with pytest.raises(OptionError, match="BertForTokenClassification has no use for labels"):
        open_for(Checkpoint({}, classifier.config, folder=classifier.folder), reviews, labels="label")


def test_models_that_take_something_else(text):
    from transformers import CLIPConfig, WhisperConfig

    for config, name, takes in (
        (CLIPConfig(), "CLIPModel", "text and images together"),
        (WhisperConfig(), "WhisperModel", "neither text nor images"),
    ):
        with pytest.raises(MismatchError, match=f"{name} takes {takes}"):
            open_for(make_checkpoint(config, name), text)
