"""Loss and metrics of a model on data, however these are cut into batches."""

import math

import pytest
import torch
import transformers
from conftest import FIRST, TINY, run_script
from torch import nn
from torch.nn.functional import cross_entropy

from hf_rebasin.errors import OptionError
from hf_rebasin.evaluation.metrics import Measured, evaluate

SAMPLES = 64
MASKED = TINY["bert-1-BertForMaskedLM"]
CAUSAL = [TINY[FIRST[name]] for name in ("gpt2", "llama", "gpt_neox", "opt", "mixtral")]


def sentences(model, count=SAMPLES, *, share=1.0, length=11):
    """Sentences padded to one length; a share of the tokens has labels. Some sentences have none."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (count, length), generator=g)
    mask = torch.arange(length) < torch.randint(2, length + 1, (count, 1), generator=g)
    chosen = mask & (torch.rand(ids.shape, generator=g) < share)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~chosen, -100)}


def images(model, count=SAMPLES):
    g = torch.Generator().manual_seed(0)
    size = getattr(model.config, "image_size", 32)
    pixels = torch.randn(count, model.config.num_channels, size, size, generator=g, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(model.config.num_labels, (count,), generator=g)}


def cut(whole, size):
    """Cut into batches of `size`; the last one is smaller."""
    count = len(whole["labels"])
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, count, size)]


@torch.no_grad()
def expected(model, whole, *, shifted=False):
    """Loss, accuracy and count, computed token by token."""
    inputs = {key: value for key, value in whole.items() if key != "labels"}
    logits, labels = model(**inputs).logits.double(), whole["labels"]
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = [(x, y) for x, y in zip(logits.flatten(0, -2), labels.flatten(), strict=True) if y != -100]
    losses = [cross_entropy(x, y).item() for x, y in rows]
    right = [x.argmax().item() == y.item() for x, y in rows]
    return sum(losses) / len(rows), sum(right) / len(rows), len(rows)


def check(model, whole, *, shifted=False, language=True):
    loss, accuracy, count = expected(model, whole, shifted=shifted)
    for size in (1, 7, 64):
        measured = evaluate(model, cut(whole, size))
        assert measured.loss == pytest.approx(loss, rel=1e-6)
        assert measured.metrics["accuracy"] == pytest.approx(accuracy, rel=1e-12)
        assert measured.samples == count
        assert set(measured.metrics) == ({"accuracy", "perplexity"} if language else {"accuracy"})
        if language:
            assert measured.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_images_count_once_each():
    model = TINY[FIRST["vit"]]
    check(model, images(model), language=False)


def test_masked_tokens_count_once_each():
    whole = sentences(MASKED, share=0.3)
    check(MASKED, whole)
    batches = cut(whole, 7)
    per_batch = [evaluate(MASKED, [batch]).loss for batch in batches]
    assert sum(per_batch) / len(batches) != pytest.approx(
        evaluate(MASKED, batches).loss, rel=1e-4
    )  # or this test proves nothing


@pytest.mark.parametrize("model", CAUSAL, ids=lambda model: type(model).__name__)
def test_next_tokens_count_once_each(model):
    check(model, sentences(model, 24), shifted=True)


def test_not_everything_for_causal_language_modelling_compares_with_the_next_token():
    """The labels of BartForCausalLM are shifted by whoever prepares the data."""
    torch.manual_seed(0)
    config = transformers.BartConfig(vocab_size=30, d_model=8, decoder_layers=1, decoder_attention_heads=2)
    check(transformers.BartForCausalLM(config).double().eval(), sentences_of(30), shifted=False)


def test_labels_of_a_decoder_and_of_tokens():
    model = TINY[FIRST["t5"]]
    whole = sentences(model, 12)
    inputs = {key: value for key, value in whole.items() if key != "attention_mask"}
    results = [evaluate(model, cut(inputs, size)) for size in (5, 12)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-9)
    assert results[0].samples == (whole["labels"] != -100).sum()
    assert set(results[0].metrics) == {"accuracy", "perplexity"}
    tokens = TINY["bert-5-BertForTokenClassification"]
    whole = sentences(tokens, 12)
    whole["labels"] = torch.where(whole["labels"] == -100, -100, whole["labels"] % tokens.config.num_labels)
    check(tokens, whole, language=False)


def sentences_of(vocabulary):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (12, 9), generator=g)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.5, -100)}


def test_segments_have_a_label_of_their_own_for_what_does_not_count():
    model = TINY["mobilenet_v2-2-MobileNetV2ForSemanticSegmentation"]
    whole = images(model, 5)
    g = torch.Generator().manual_seed(0)
    whole["labels"] = torch.randint(model.config.num_labels, (5, 32, 32), generator=g)
    whole["labels"][:, :, :8] = 255
    whole["labels"][1, 5:] = 255
    results = [evaluate(model, cut(whole, size)) for size in (1, 2, 5)]
    assert {result.samples for result in results} == {4 * 32 * 24 + 5 * 24}
    assert [result.loss for result in results] == pytest.approx([results[0].loss] * 3, rel=1e-6)
    assert results[0].metrics == {}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()

    def forward(self, x):
        return self.net(x)


def pairs(size):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 4, generator=g, dtype=torch.float64), torch.randint(3, (10,), generator=g)
    return list(zip(x.split(size), y.split(size), strict=True))


def mean_loss(module, pair):
    return cross_entropy(module(pair[0]), pair[1])


def right(module, pair):
    return (module(pair[0]).argmax(-1) == pair[1]).float()


def test_a_loss_and_metrics_of_ones_own():
    model = Classifier()

    def by_sum(module, pair):
        return right(module, pair).sum(), len(pair[0])

    metrics = {"right": right, "by sum": by_sum, "by mean": lambda module, pair: right(module, pair).mean().item()}
    results = [evaluate(model, pairs(size), loss=mean_loss, metrics=metrics) for size in (1, 3, 10)]
    (x, y) = pairs(10)[0]
    model.eval()
    for result in results:
        assert result.loss == pytest.approx(cross_entropy(model(x), y).item())
        assert result.samples == 10
        assert result.metrics == pytest.approx(
            dict.fromkeys(metrics, (model(x).argmax(-1) == y).double().mean().item())
        )
    vector = evaluate(model, pairs(3), loss=lambda m, pair: cross_entropy(m(pair[0]), pair[1], reduction="none"))
    assert vector.loss == pytest.approx(results[0].loss)


def test_built_in_metrics_can_be_requested_by_name():
    model = TINY[FIRST["vit"]]
    batches = cut(images(model, 9), 4)
    assert evaluate(model, batches, metrics=()).metrics == {}
    named = evaluate(model, batches, metrics={"acc": "accuracy", "ppl": "perplexity"})
    assert named.metrics == {"acc": evaluate(model, batches).metrics["accuracy"], "ppl": math.exp(named.loss)}
    own = evaluate(model, batches, loss=lambda m, batch: 2.0, metrics=["accuracy"])
    assert own == Measured(2.0, {"accuracy": named.metrics["acc"]}, 9)


def test_nothing_of_the_model_changes():
    model = nn.Sequential(Classifier(), nn.BatchNorm1d(3).double())
    model[0].eval()  # and the rest in training mode
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    seen = []

    def loss(module, pair):
        seen.append((any(part.training for part in module.modules()), torch.is_grad_enabled()))
        return mean_loss(module, pair)

    evaluate(model, pairs(5), loss=loss)
    assert set(seen) == {(False, False)}
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.ones(2, 5), torch.ones(2))], loss=loss)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_broken_model_is_measured_as_it_is():
    model = Classifier()
    with torch.no_grad():
        model.net[1].bias[0] = math.nan
    assert math.isnan(evaluate(model, pairs(3), loss=mean_loss).loss)
    infinite = evaluate(model, pairs(3), loss=lambda m, pair: math.inf, metrics=["perplexity"])
    assert infinite.loss == infinite.metrics["perplexity"] == math.inf
    broken = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2))
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = math.nan
    result = evaluate(broken, [sentences_of(30)])
    assert math.isnan(result.loss)
    assert math.isnan(result.metrics["perplexity"])


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no batch came"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], {}, "put labels in them, or give loss="),
        ([sentences(MASKED, 2) | {"labels": torch.full((2, 11), -100)}], {}, "none of the labels in 1 batches counts"),
        ([], {"metrics": ["acuracy"]}, "no metric 'acuracy'; did you mean 'accuracy'"),
        ([], {"metrics": {"loss": right}}, "cannot be called 'loss'"),
        (pairs(5), {"loss": lambda m, pair: 1.0, "metrics": ["accuracy"]}, "'accuracy': the model returns no logits"),
        (pairs(5), {"loss": lambda m, p: 1.0, "metrics": {"n": lambda m, p: (0, 0)}}, "'n': it counted nothing"),
        ([{"labels": 3}], {"loss": lambda m, batch: 1.0}, "without a tensor"),
    ],
)
def test_what_cannot_be_measured_is_refused(data, options, message):
    with pytest.raises(OptionError, match=message):
        evaluate(MASKED, data, **options)


SCRIPT = """
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from test_metrics import CAUSAL, MASKED, cut, sentences

from hf_rebasin.errors import OptionError
from hf_rebasin.evaluation.metrics import evaluate

# Unless accelerate is told that these processes run on CPUs, each takes itself for the only one.
PartialState()
results = []
for model in (MASKED, CAUSAL[0]):
    for size in (5, 64):  # a single batch of 64, so one process gets all of it
        results.append(evaluate(model, cut(sentences(model, share=0.3), size), metrics=None))
        results.append(evaluate(model, cut(sentences(model), size), metrics={"ones": lambda m, batch: (3, 6)}))
try:
    evaluate(MASKED, [])
except OptionError:
    name = "-".join(os.environ.get(*pair) for pair in (("WORLD_SIZE", "1"), ("RANK", "0")))
    torch.save([vars(result) for result in results], Path(sys.argv[1]) / f"{name}.pt")
"""


@pytest.mark.slow
def test_two_processes_measure_the_same(tmp_path):
    for processes in (1, 2):
        run_script(SCRIPT, tmp_path, processes)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(alone) == 8
    for one, two, three in zip(alone, first, second, strict=True):
        assert two == three
        assert two["samples"] == one["samples"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-12)
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-12)
