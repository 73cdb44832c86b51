"""The demo, at a small scale and as a whole."""

import pytest
import torch

from hf_rebasin import Checkpoint, Verdict, compare
from hf_rebasin.demo import experiments as demo
from hf_rebasin.errors import OptionError
from hf_rebasin.evaluation.metrics import evaluate


def test_the_demo_at_a_small_scale(tmp_path):
    lines = []
    (pair,) = demo.run_demo(tmp_path, ["mlp"], seeds=2, say=lines.append)
    assert pair.plain.barrier > 0.5
    assert pair.ratio <= 0.05
    assert pair.difference < 1e-4
    assert min(pair.plain.accuracy[0], pair.plain.accuracy[-1]) > 0.96
    assert len(pair.plain.loss) == 25
    assert any("0-1" in line for line in lines)
    merged = demo.MLP.from_pretrained(tmp_path / "mlp" / "merged")
    assert evaluate(merged, demo.make_evaluation_batches()).metrics["accuracy"] > 0.94
    assert compare(tmp_path / "mlp" / "seed-0", tmp_path / "mlp" / "seed-1").verdict is Verdict.TRAINED_APART
    assert {f.name for f in (tmp_path / "mlp").iterdir()} == {"seed-0", "seed-1", "aligned-1", "merged"}


def test_bad_options_are_refused_before_training(tmp_path):
    with pytest.raises(OptionError, match="no model 'resnt'; did you mean 'resnet'"):
        demo.run_demo(tmp_path, ["resnt"])
    with pytest.raises(OptionError, match="two seeds, got 1"):
        demo.run_demo(tmp_path, ["mlp"], seeds=1)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    """Where permutations suffice, the barrier collapses; where the stream is rotated, most of it does."""
    lines = []
    pairs = demo.run_demo(tmp_path, say=lines.append)
    ratios = {kind: [p.ratio for p in pairs if p.kind == kind] for kind in demo.DEFAULT_KINDS}
    assert max(ratios["mlp"]) <= 0.05
    assert max(ratios["resnet"]) <= 0.25
    assert max(ratios["vit"]) <= 0.4
    assert any("permutations alone do not bring transformers together" in line for line in lines)
    for kind in ("resnet", "vit"):  # seeds are told apart; a model trained further is not
        first, second = tmp_path / kind / "seed-0", tmp_path / kind / "seed-1"
        assert compare(first, second).verdict is Verdict.TRAINED_APART
        model = Checkpoint.open(first).model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        for batch, _ in zip(demo.make_training_batches(torch.Generator().manual_seed(9)), range(100), strict=False):
            optimizer.zero_grad()
            model(**(batch | {"pixel_values": batch["pixel_values"].rot90(1, (2, 3))})).loss.backward()
            optimizer.step()
        comparison = compare(first, model)
        assert comparison.verdict is Verdict.SAME_BASE, comparison.advice
        assert comparison.whole.distance > 0.05
