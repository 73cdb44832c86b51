"""Verdicts: fine-tunes of one base, models trained apart, and what cannot be merged at all."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import FIRST, TINY, moved_copy, other_seed
from typer.testing import CliRunner

from hf_rebasin import Checkpoint, Verdict, compare
from hf_rebasin.cli import app


def fine_tuned(model, amount=0.1):
    """Every tensor a little elsewhere, as after some steps with a small learning rate."""
    checkpoint, numbers = Checkpoint.open(model), torch.Generator().manual_seed(0)
    near = {
        key: t + amount * t.std() * torch.randn(t.shape, generator=numbers, dtype=t.dtype)
        if t.is_floating_point() and t.numel() > 1
        else t
        for key, t in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=near)


def test_one_base(family):
    comparison = compare(family, fine_tuned(family))
    assert comparison.verdict is Verdict.SAME_BASE, comparison.advice
    assert comparison.advice.startswith("same base, do not align")
    assert comparison.at_home > 0.9
    assert 0 < comparison.whole.distance < 0.2
    assert comparison.whole.cosine > 0.98


def test_trained_apart(family):
    for other in (other_seed(family), fine_tuned(moved_copy(family)[0])):
        comparison = compare(family, other)
        assert comparison.verdict is Verdict.TRAINED_APART, comparison.advice
        assert comparison.advice.startswith("trained apart: align")
    assert ("rotated" in comparison.advice) == comparison.rotated


def test_equal(family):
    assert compare(family, family).verdict is Verdict.EQUAL
    other = {key: t.clone() for key, t in Checkpoint.open(family).tensors.items()}
    other[next(key for key, t in other.items() if t.is_floating_point())].view(-1)[0] += 1
    assert compare(family, replace(Checkpoint.open(family), tensors=other)).verdict is Verdict.SAME_BASE


def test_numbers_are_what_they_say():
    a, b = {"x.0.w": torch.tensor([[3.0, 4.0]])}, {"x.0.w": torch.tensor([[4.0, 3.0]])}
    near = compare(a, b).parts["x.0"]
    assert near.distance == pytest.approx(2**0.5 / 5)
    assert near.cosine == pytest.approx(24 / 25)
    assert near.elements == 2


def test_halfway_is_neither(bert):
    """Half of the hidden units and heads moved, half at home."""
    moved = dict(Checkpoint.open(moved_copy(bert)[0]).tensors)
    half = {k: t if "layer.0" in k else moved[k] for k, t in Checkpoint.open(bert).tensors.items()}
    comparison = compare(bert, replace(Checkpoint.open(bert), tensors=half))
    assert 0.2 < comparison.at_home < 0.8


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ("bert-1-BertForMaskedLM", "gpt2", "model_type is gpt2, not bert"),
        ("bert-1-BertForMaskedLM", "bert-4-BertForSequenceClassification", r"architectures is \['BertForSequence"),
        ("llama", "wider", "intermediate_size is 40, not 20"),
        ("tensors", "fewer", "it lacks: b"),
        ("tensors", "shorter", r"it has other shapes: b \(3,\) instead of \(2,\)"),
    ],
)
def test_the_first_difference_is_named(a, b, says):
    def model(name):
        tensors = {"a": torch.ones(2), "b": torch.ones(2)}
        states = {"tensors": tensors, "fewer": {"a": torch.ones(2)}, "shorter": tensors | {"b": torch.ones(3)}}
        if name == "wider":
            llama = TINY[FIRST["llama"]]
            return type(llama)(type(llama.config)(**(llama.config.to_dict() | {"intermediate_size": 40})))
        return states.get(name) or TINY.get(name) or TINY[FIRST[name]]

    comparison = compare(model(a), model(b))
    assert comparison.verdict is Verdict.DIFFERENT
    assert re.search(says, comparison.advice), comparison.advice
    assert comparison.advice.startswith("different architecture: ")


def test_other_heads_are_left_out(bert):
    classes = TINY["bert-4-BertForSequenceClassification"]
    torch.manual_seed(0)
    config = type(classes.config)(**(classes.config.to_dict() | {"num_labels": 7}))
    other = type(classes)(config).to(classes.dtype)
    other.bert.load_state_dict(classes.bert.state_dict())
    comparison = compare(classes, other)
    assert comparison.verdict is Verdict.SAME_BASE
    assert "--backbone-only" in comparison.findings["tensors"]
    assert "labels" in comparison.findings["labels"]


def test_one_screen(family, tmp_path):
    a = Checkpoint.open(family).save(tmp_path / "a")
    b = fine_tuned(family).save(tmp_path / "b")
    said = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) < 260
    assert "verdict: same base, do not align" in said.output
    assert lines[-1].strip() == f"hf-rebasin merge {a} {b} -o merged --no-align"
    assert "the same keys and shapes" in said.output
