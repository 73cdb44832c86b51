"""Incompatible pairs are refused; rows in another order are matched by string."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import FIRST, TINY, moved_copy, other_seed, same_tensors
from safetensors.torch import load_file, save_file

from hf_rebasin import Checkpoint, Status, align, merge
from hf_rebasin.errors import MismatchError

CLASSIFIER = "bert-4-BertForSequenceClassification"


def with_config(model, **settings):
    checkpoint = Checkpoint.open(model)
    config = type(checkpoint.config)(**(checkpoint.config.to_dict() | settings))
    return replace(checkpoint, given_config=config)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("bert", {"num_attention_heads": 2}),
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"layer_norm_eps": 1e-5}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_weights": False}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("vit", {"patch_size": 2}),
        ("resnet", {"hidden_act": "gelu"}),
    ],
)
def test_settings_that_change_the_meaning_are_refused(name, setting):
    model = next(m for key, m in TINY.items() if key.startswith(name))
    (key,) = setting
    with pytest.raises(MismatchError, match=rf"computes something else .*{key}.*--assume config"):
        merge([model, with_config(model, **setting)])
    assert same_tensors(merge([model, with_config(model, **setting)], assume=["config"]), model)


def test_settings_of_training_are_not_in_the_way(bert):
    other = with_config(bert, hidden_dropout_prob=0.5, initializer_range=1.0, use_cache=False, classifier_dropout=0.3)
    merge([bert, other])
    experts = TINY[FIRST["mixtral"]]
    merge(
        [
            experts,
            with_config(experts, router_aux_loss_coef=0.02, router_jitter_noise=0.1, _experts_implementation=None),
        ]
    )
    with pytest.raises(MismatchError, match="num_experts_per_tok"):
        merge([experts, with_config(experts, num_experts_per_tok=3)])


def test_another_head_is_another_architecture():
    with pytest.raises(MismatchError, match=r"architectures is .*BertForTokenClassification.*, not .*BertForSequence"):
        merge([TINY[CLASSIFIER], TINY["bert-5-BertForTokenClassification"]])


def test_other_classes_are_merged_without_their_heads_where_they_have_some(bert):
    """Advice to assume the configurations equal would lead to a refusal of the heads."""
    for pair in ([bert, bert.bert], [bert.bert, bert]):
        with pytest.raises(
            MismatchError, match=r"architectures is .*A merge can keep the head of .*\(--backbone-only\)"
        ):
            merge(pair)
        merge(pair, backbone_only=True)
    renamed = with_config(bert, architectures=["AnotherName"])
    with pytest.raises(MismatchError, match=r"architectures is .*\(--assume config\)"):
        merge([bert, renamed])
    merge([bert, renamed], assume=["config"])


def test_tensors_that_a_class_has_no_use_for_can_be_left_out_with_the_head(tmp_path):
    """BERT of the Hub stores the pooler and the second head of its pretraining, but names the class of one head."""
    model = TINY["bert-1-BertForMaskedLM"]
    a, b = (Checkpoint.open(m).save(tmp_path / name) for name, m in (("a", model), ("b", other_seed(model))))
    own = load_file(b / "model.safetensors")
    width = len(own["bert.embeddings.LayerNorm.weight"])
    extra = {"bert.pooler.dense.weight": torch.ones(width, width), "cls.seq_relationship.bias": torch.ones(2)}
    save_file(own | extra, b / "model.safetensors", {"format": "pt"})
    for first, other in ((a, b), (b, a)):
        with pytest.raises(MismatchError, match=r"bert.pooler|pooler.dense.weight.*\(--backbone-only\)"):
            merge([first, other])
        merged = merge([first, other], backbone_only=True)
        kept = load_file(first / "model.safetensors")
        assert merged.tensors.keys() == kept.keys()
        assert all(torch.equal(merged.tensors[key], kept[key]) for key in kept if key in extra)
        row = "bert.encoder.layer.0.output.dense.weight"
        assert torch.equal(merged.tensors[row], (kept[row] + load_file(other / "model.safetensors")[row]) / 2)


LABELS = {0: "negative", 1: "neutral", 2: "positive"}


def labelled(model, labels):
    return with_config(model, id2label=labels, label2id={label: i for i, label in labels.items()})


def test_labels_in_another_order_are_matched():
    model = TINY[CLASSIFIER]
    a = labelled(model, LABELS)
    order = [2, 0, 1]  # b's row i is a's row order[i]
    shuffled = {k: t[order] if k.startswith("classifier") else t for k, t in a.tensors.items()}
    b = replace(labelled(model, {i: LABELS[o] for i, o in enumerate(order)}), tensors=shuffled)
    assert not same_tensors(a, b)
    assert same_tensors(merge([a, b]), a)
    assert not align(a, b).alignment.moved
    with pytest.raises(
        MismatchError, match=r"different labels: only the first has 'joy'; only the second has 'positive'"
    ):
        merge([a, labelled(model, {**LABELS, 2: "joy"})])
    with pytest.raises(MismatchError, match=r"does not name its labels, the other does .*--assume labels"):
        merge([a, model])
    merge([a, model], assume=["labels"])


def save_with_vocabulary(model, folder, tokens):
    Checkpoint.open(model).save(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def test_vocabularies_are_compared_by_string(bert, tmp_path):
    """97 embedding rows, 90 tokens: the rows beyond the tokens stay where they are."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(85))]
    a = save_with_vocabulary(bert, tmp_path / "a", tokens)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0)).tolist()
    rows = order + list(range(90, 97))
    tied = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
    shuffled = {k: t[rows] if k in tied else t for k, t in Checkpoint.open(bert).tensors.items()}
    other = replace(Checkpoint.open(bert), tensors=shuffled)
    b = save_with_vocabulary(other, tmp_path / "b", [tokens[i] for i in order])
    assert not same_tensors(a, b)
    assert same_tensors(merge([a, b]), a)
    solution = align(a, b)
    assert not solution.alignment.moved
    from hf_rebasin.recipes.recipe import Recipe
    from hf_rebasin.recipes.runner import run_merge

    assert same_tensors(run_merge(Recipe.from_dict({"models": [str(a), str(b)]})).checkpoint, a)
    planted = moved_copy(Checkpoint.open(b))[0].save(tmp_path / "planted")
    done = run_merge(Recipe.from_dict({"models": [str(a), str(planted)]}))
    assert done.solutions[0].status is Status.EQUAL, "rows are matched once, not twice"
    assert same_tensors(done.checkpoint, a)
    c = save_with_vocabulary(bert, tmp_path / "c", [*tokens[:-1], "new"])
    with pytest.raises(
        MismatchError, match=r"different vocabularies; only .*/c has 'new'; only .*/a has 'w84'.*--vocabulary first"
    ):
        merge([a, c])
    merge([a, c], assume=["vocabulary"])


def test_a_model_without_a_tokenizer_is_taken_as_it_is(bert, tmp_path):
    a = save_with_vocabulary(bert, tmp_path / "a", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    merge([a, Checkpoint.open(other_seed(bert)).save(tmp_path / "b")])


def test_vocabularies_of_loaded_modules_are_compared_too(bert, tmp_path, caplog):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(80))]
    a = save_with_vocabulary(bert, tmp_path / "a", tokens)
    b = save_with_vocabulary(bert, tmp_path / "b", [*tokens[:-1], "new"])
    with pytest.raises(MismatchError, match=r"different vocabularies"):
        merge([type(bert).from_pretrained(a), type(bert).from_pretrained(b)])
    merge([a, Checkpoint.open(bert)])
    assert "comes without a tokenizer, so the vocabularies were not compared" in caplog.text
    c = save_with_vocabulary(bert, tmp_path / "c", [*tokens[::-1], *(f"x{i}" for i in range(20))])
    d = save_with_vocabulary(bert, tmp_path / "d", [*tokens, *(f"x{i}" for i in range(20))])
    assert same_tensors(merge([d, d]), d)
    with pytest.raises(MismatchError, match="different vocabularies"):
        merge([a, d])
    reordered = merge([c, d]).tensors["cls.predictions.bias"]  # 105 tokens, 97 rows: those beyond have none to match
    own = Checkpoint.open(bert).tensors["cls.predictions.bias"]
    assert torch.equal(reordered[:85], (own[:85] + own[:85].flip(0)) / 2)
    assert torch.equal(reordered[85:], own[85:])


def test_configurations_that_transformers_does_not_know_are_compared_too(tmp_path):
    folders = []
    for act in ("gelu", "relu"):
        folder = Checkpoint({"w": torch.ones(2)}).save(tmp_path / act)
        (folder / "config.json").write_text(json.dumps({"model_type": "my-own", "hidden_act": act}))
        folders.append(folder)
    with pytest.raises(MismatchError, match=r"hidden_act is 'relu', not 'gelu'"):
        merge(folders)
    assert merge(folders, assume=["config"]).tensors["w"].tolist() == [1, 1]


def test_remnants_of_other_versions_are_not_in_the_way(bert):
    """A setting that only one configuration has, and its class does not know, has no effect."""
    merge([bert, with_config(bert, output_past=True, directionality="bidi", pooler_type="first")])


def test_classes_a_table_does_not_know_merge_without_alignment():
    from transformers import GPT2Config, GPT2DoubleHeadsModel

    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=11, bos_token_id=0, eos_token_id=0)
    model = GPT2DoubleHeadsModel(config)
    assert same_tensors(merge([model, model]), model)


def test_tokens_that_were_added_count(bert, tmp_path):
    """Equal vocabulary files with different added tokens."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(80))]

    def with_added(name, *added):
        folder = save_with_vocabulary(bert, tmp_path / name, tokens)
        plain = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
        decoder = {str(85 + i): {"content": token} | plain for i, token in enumerate(added)}
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
        return folder

    a, b, c = with_added("a", "foo", "bar"), with_added("b", "bar", "foo"), with_added("c", "foo")
    row = "bert.embeddings.word_embeddings.weight"
    merged = merge([a, b]).tensors[row]
    own = Checkpoint.open(bert).tensors[row]
    assert torch.equal(merged[85], (own[85] + own[86]) / 2), "foo with foo"
    with pytest.raises(MismatchError, match=r"only .*/a has 'bar'"):
        merge([a, c])
    assert same_tensors(merge([a, with_added("d", "foo", "bar")]), a)
