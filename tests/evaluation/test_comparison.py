"""Comparison: fine-tunes of one base, models trained apart, and models that cannot be merged at all."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from conftest import FIRST, TINY, moved_copy, other_seed
from typer.testing import CliRunner

from hf_rebasin import Checkpoint, Table, Verdict, compare
from hf_rebasin.cli.main import app
from hf_rebasin.errors import CheckpointError
from hf_rebasin.evaluation.comparison import _measure_standings
from hf_rebasin.symmetries.binding import bind
from hf_rebasin.text import layer_of


def fine_tuned(model, amount=0.1):
    """A copy with every tensor perturbed a little, as after some steps with a small learning rate."""
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
    assert ("rotates" in comparison.advice) == comparison.rotated


def test_equal(family):
    assert compare(family, family).verdict is Verdict.EQUAL
    other = {key: t.clone() for key, t in Checkpoint.open(family).tensors.items()}
    other[next(key for key, t in other.items() if t.is_floating_point())].view(-1)[0] += 1
    assert compare(family, replace(Checkpoint.open(family), tensors=other)).verdict is Verdict.SAME_BASE


def test_large_equal_tensors_do_not_make_one_base_of_two():
    """Position embeddings that nobody trains are equal in all models, and may outweigh everything else."""
    g = torch.Generator().manual_seed(0)
    a, b = ({"positions": torch.full((4, 40), 30.0), "w": torch.randn(40, 40, generator=g)} for _ in range(2))
    comparison = compare(a, b)
    assert comparison.whole.cosine > 0.9
    assert comparison.verdict is Verdict.TRAINED_APART, comparison.advice
    assert compare(a, b | {"w": a["w"] + 0.1 * b["w"]}).verdict is Verdict.SAME_BASE
    new_head = {"head": torch.randn(2, 40, generator=g)}
    assert compare(a | {"head": -new_head["head"]}, a | new_head).verdict is Verdict.SAME_BASE


def test_distances_and_cosines():
    a, b = {"x.0.w": torch.tensor([[3.0, 4.0]])}, {"x.0.w": torch.tensor([[4.0, 3.0]])}
    near = compare(a, b).parts["x.0"]
    assert near.distance == pytest.approx(2**0.5 / 5)
    assert near.cosine == pytest.approx(24 / 25)
    assert near.elements == 2


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("bert.encoder.layer.3.output.dense.weight", ("bert.encoder.layer.", 3)),
        ("stages.1.blocks.2.conv.weight", ("stages.", 1)),
        ("0.3.weight", ("", 0)),
        ("layer1.0.conv1.weight", ("layer1.", 0)),
        ("wav2vec2.encoder.layers.11.fc.weight", ("wav2vec2.encoder.layers.", 11)),
        ("fc1.weight", None),
        ("pooler.dense.weight", None),
        ("weights.0", None),
    ],
)
def test_the_layer_of_a_tensor_is_the_first_numbered_component(key, layer):
    assert layer_of(key) == layer
    values = torch.ones(2, 2)
    (part,) = compare({key: values}, {key: values}).parts
    assert part == (f"{layer[0]}{layer[1]}" if layer else key.rpartition(".")[0])


def test_halfway_is_neither(bert):
    """Half of the hidden units and heads moved, half in place."""
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
    result = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) < 260
    assert "verdict: same base, do not align" in result.output
    assert lines[-1].strip() == f"hf-rebasin merge {a} {b} -o merged --no-align"
    assert "the same keys and shapes" in result.output


def test_what_only_one_of_them_has_does_not_make_them_different(bert, tmp_path):
    assert compare(bert, bert.state_dict()).verdict is Verdict.EQUAL
    folder = Checkpoint.open(bert).save(tmp_path / "a")
    (folder / "config.json").unlink()
    assert compare(bert, folder).verdict is Verdict.EQUAL
    assert compare(bert, folder).at_home == 1, "the symmetries come from the one that has a class"


def test_equal_is_all_of_it_equal(bert):
    ones, two = torch.ones(2, 2), torch.tensor([1, 2])
    for a, b in (({"w": two}, {"w": two + 2}), ({"w": ones, "n": two}, {"w": ones, "n": two + 1})):
        assert compare(a, b).verdict is not Verdict.EQUAL
        assert compare(a, a).verdict is Verdict.EQUAL
    assert compare({"w": ones}, {"w": ones.int()}).verdict is Verdict.DIFFERENT
    classes = TINY["bert-4-BertForSequenceClassification"]

    def labelled(*names):
        config = type(classes.config)(**(classes.config.to_dict() | {"id2label": dict(enumerate(names))}))
        return replace(Checkpoint.open(classes), given_config=config)

    a, b = labelled("x", "y", "z"), labelled("y", "x", "z")
    assert compare(a, b).verdict is not Verdict.EQUAL, "the rows are the same, but their labels are not"
    assert "in another order" in compare(a, b).findings["labels"]


def test_broken_models_are_named(bert):
    tensors = dict(Checkpoint.open(bert).tensors)
    key = "bert.embeddings.LayerNorm.bias"
    broken = replace(Checkpoint.open(bert), tensors=tensors | {key: torch.full_like(tensors[key], torch.nan)})
    for pair in ((bert, broken), (broken, bert)):
        with pytest.raises(CheckpointError, match=rf"{key} .* NaN"):
            compare(*pair)


def test_dead_units_are_at_home_nowhere(bert):
    def dead(model):
        state = {k: t.clone() for k, t in Checkpoint.open(model).tensors.items()}
        for key, tensor in state.items():
            if "intermediate" in key:
                tensor[4:] = 0
        return replace(Checkpoint.open(model), tensors=state)

    apart = compare(dead(bert), dead(other_seed(bert)))
    assert apart.verdict is Verdict.TRAINED_APART, apart.advice


def test_numbers_of_any_size():
    assert compare({"w": torch.tensor([1e-90], dtype=torch.float64)}, {"w": torch.tensor([2e-90]).double()})
    for size in (1e-150, 1e150):
        a = torch.tensor([[size, 0.0], [0.0, size]], dtype=torch.float64)
        assert compare({"w": a}, {"w": 2 * a}).whole.cosine == pytest.approx(1)


def test_standings_and_rotations():
    """A layer of three units: one in place, two exchanged."""
    weight = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]])
    spec = bind(Table({"w": "ff, _"}, {"ff": "permutation"}), {"w": (3, 3)})
    a, b = Checkpoint.open({"w": weight}), Checkpoint.open({"w": weight[[0, 2, 1]]})
    ((name, standing),) = _measure_standings(spec, a, b.parts, None, False)
    assert (name, standing.units, standing.own, standing.chance) == ("ff", 3, 1, 1)
    assert standing.ratio == pytest.approx(1 / 14)
    for family, rotated in (("llama", True), ("gpt2", True), ("resnet", False), ("bert", False)):
        assert compare(TINY[FIRST[family]], TINY[FIRST[family]]).rotated == rotated


def test_models_with_unknown_symmetries_are_compared_by_the_rest():
    kind, settings = ARCHITECTURES["qwen2-moe"]
    owner = getattr(transformers, kind)
    models = [owner(owner.config_class(**settings)) for _ in range(2)]
    comparison = compare(*models)
    assert comparison.at_home is None
    assert comparison.findings["symmetries"].startswith("not known")
    assert comparison.verdict is Verdict.TRAINED_APART


def test_the_printed_command_runs(tmp_path, monkeypatch):
    classes = TINY["bert-4-BertForSequenceClassification"]
    config = type(classes.config)(**(classes.config.to_dict() | {"num_labels": 7}))
    other = type(classes)(config).to(classes.dtype)
    other.bert.load_state_dict(classes.bert.state_dict())
    for name, model in (("a", classes), ("b", other)):
        Checkpoint.open(model).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    command = CliRunner().invoke(app, ["compare", "a", "b"]).output.splitlines()[-1].split()
    assert command == ["hf-rebasin", "merge", "a", "b", "-o", "merged", "--backbone-only", "--no-align"]
    done = CliRunner().invoke(app, command[1:])
    assert done.exit_code == 0, done.output


def test_without_symmetries_the_cosine_decides():
    a, across = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for cosine, verdict in ((0.9, Verdict.SAME_BASE), (0.3, Verdict.BETWEEN), (0.05, Verdict.TRAINED_APART)):
        b = cosine * a + (1 - cosine**2) ** 0.5 * across
        assert compare({"w": a}, {"w": b}).verdict is verdict
