"""Methods on one model: nearswap and arcee_fusion, which put a part of it into a base, and passthrough."""

import math

import pytest
import torch

from hf_rebasin import registry
from hf_rebasin.checkpoints import lazy
from hf_rebasin.errors import OptionError
from hf_rebasin.merging.methods import arcee_fusion
from hf_rebasin.merging.pieces import BoundMethod


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def merge(name, tensors, base=None, **values):
    """Merge tensors as a checkpoint's are merged, in pieces of `lazy.CHUNK` elements."""
    return BoundMethod(method=registry.merge_method(name), values=values)(tensors, base)


def model_and_base(*shape, seed=0, dtype=torch.float32):
    numbers = torch.Generator().manual_seed(seed)
    base = 0.1 * torch.randn(shape, generator=numbers)
    return (base + 0.02 * torch.randn(shape, generator=numbers)).to(dtype), base.to(dtype)


def importance(model, base):
    """Return |x - b| KL(softmax of the row of x + 1e-8 ‖ of b's), row by row."""
    x, b = model.double(), base.double()
    rows = []
    for row, origin in zip(x.reshape(-1, x.shape[-1]), b.reshape(-1, x.shape[-1]), strict=True):
        p, q = (values.exp() / values.exp().sum() + 1e-8 for values in (row, origin))
        rows.append((row - origin).abs() * (p * (p.log() - q.log())).sum())
    return torch.stack(rows).reshape(x.shape)


def fuse(model, base):
    scores = importance(model, base)
    ordered = sorted(scores.flatten().tolist())
    q1, q2, q3 = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return torch.where(scores >= q2 + 1.5 * (q3 - q1), model, base)


# --- arcee_fusion ----------------------------------------------------------------------------------------------------


def test_arcee_fusion_by_hand(monkeypatch):
    """With a divergence of 1 in all rows, only |δ| counts."""
    monkeypatch.setattr(arcee_fusion, "_importance", lambda delta, base: delta.abs())
    base = vector(5, 5, 5, 5, 5)
    assert merge("arcee_fusion", [base + vector(1, 2, 3, 4, 9)], base).tolist() == [5, 5, 5, 5, 14]
    assert merge("arcee_fusion", [base + vector(1, 2, 3, 4, -6)], base).tolist() == [5, 5, 5, 5, -1], "6 is enough"
    assert merge("arcee_fusion", [base + vector(1, 2, 3, 4, 5.9)], base).tolist() == base.tolist()
    assert merge("arcee_fusion", [base + vector(1, 1, 1, 1, 9)], base).tolist() == [6, 6, 6, 6, 14]


@pytest.mark.parametrize(
    "shape", [(60, 50), (3, 4, 5, 6), (997,), (2,), (3,), (4,), (5,), (2, 2), (1030,), (7, 1), (1, 9)]
)
def test_arcee_fusion_takes_the_important_elements(shape, monkeypatch):
    """In pieces of any size; exact quartiles, so to the last element."""
    model, base = model_and_base(*shape)
    expected = fuse(model, base)
    for size in (1, 10, 700, 1 << 18):
        monkeypatch.setattr(lazy, "CHUNK", size)
        assert torch.equal(merge("arcee_fusion", [model], base), expected), size
    if model.numel() > 100:
        taken = (expected == model).double().mean()
        assert 0.01 < taken < 0.2
        halves = zip(model.chunk(2), base.chunk(2), strict=True)
        assert not torch.equal(torch.cat([fuse(*half) for half in halves]), expected), "control: quartiles of halves"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quartiles_of_large_tensors_are_exact(dtype, monkeypatch):
    """More entries than are sorted or collected at once, and in bfloat16 many that are equal."""
    model, base = model_and_base(700, 400, dtype=dtype)
    expected = fuse(model, base)
    monkeypatch.setattr(lazy, "CHUNK", 30_000)
    merged = merge("arcee_fusion", [model], base)
    differing = (merged != expected).sum()
    assert differing == 0
    sample = torch.randperm(model.numel(), generator=torch.Generator().manual_seed(0))[:10_000]
    scores = importance(model, base)
    q1, q2, q3 = scores.flatten()[sample].sort().values[[2499, 4999, 7499]]
    sampled = torch.where(scores >= q2 + 1.5 * (q3 - q1), model, base)
    assert not torch.equal(sampled, expected), "control: quartiles of a sample are not exact"


def test_arcee_fusion_of_what_has_no_importance():
    model, base = model_and_base(6, 5)
    assert torch.equal(merge("arcee_fusion", [base], base), base)
    one, other = torch.tensor(2.0), torch.tensor(3.0)
    assert torch.equal(merge("arcee_fusion", [one], other), one), "one element is at least as important as itself"
    assert torch.equal(merge("arcee_fusion", [one], one), one)
    for shape in ((0,), (0, 3), (3, 0)):
        assert merge("arcee_fusion", [torch.zeros(shape)], torch.ones(shape)).shape == shape
    shifted = merge("arcee_fusion", [base + 0.5], base)  # a shift leaves the softmax as it is, up to rounding
    assert shifted.isfinite().all()
    huge = merge("arcee_fusion", [1e300 * model.double()], 1e300 * base.double())
    assert huge.isfinite().all()
    moved = model.clone()
    moved[1:] = base[1:]
    assert torch.equal(merge("arcee_fusion", [moved], base), moved), "more than three quarters unmoved: all that moved"


def test_arcee_fusion_leaves_its_inputs_alone():
    model, base = model_and_base(6, 5, dtype=torch.float64)
    before = model.clone(), base.clone()
    method = registry.merge_method("arcee_fusion")
    method.merge([model - base], base=base, whole=0.0)
    merge("arcee_fusion", [model], base)
    assert all(map(torch.equal, (model, base), before))


# --- nearswap --------------------------------------------------------------------------------------------------------


def test_nearswap_moves_at_most_t_away_from_the_base():
    base, model = vector(1, 1, 1, 1, 1), vector(1.004, 0.5, 1, 0.9961, 3)
    torch.testing.assert_close(
        merge("nearswap", [model], base, t=0.01), vector(1.004, 0.99, 1, 0.9961, 1.01), rtol=0, atol=1e-15
    )
    model, base = model_and_base(20, 30)
    delta = model.double() - base.double()
    for t in (0.0, 1e-3, 0.02, 10.0):
        share = torch.where(delta == 0, 1.0, t / delta.abs()).clamp(0, 1)
        expected = (base.double() + share * delta).float()
        torch.testing.assert_close(merge("nearswap", [model], base, t=t), expected, rtol=0, atol=1e-8)
    assert torch.equal(merge("nearswap", [model], base, t=0), base)
    assert torch.equal(merge("nearswap", [model], base, **registry.merge_method("nearswap").keeps), model)
    assert (merge("nearswap", [model], base) - base).abs().max() <= 1.0001e-4


def test_nearswap_goes_piece_by_piece(monkeypatch):
    model, base = model_and_base(20, 30)
    expected = merge("nearswap", [model], base, t=0.01)
    monkeypatch.setattr(lazy, "CHUNK", 7)
    assert torch.equal(merge("nearswap", [model], base, t=0.01), expected)
    for shape in ((), (0,), (3, 0)):
        x = torch.zeros(shape)
        assert torch.equal(merge("nearswap", [x], x), x)


# --- passthrough -----------------------------------------------------------------------------------------------------


def test_passthrough_is_the_model_itself_or_scaled(monkeypatch):
    monkeypatch.setattr(lazy, "CHUNK", 7)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = model_and_base(5, 4, dtype=dtype)[0]
        assert torch.equal(merge("passthrough", [x]), x)
        assert torch.equal(merge("passthrough", [x], scales=[1.0]), x)
        assert torch.equal(merge("passthrough", [x], scales=[-0.5]), -0.5 * x)
        assert torch.equal(merge("passthrough", [x], scales=[0.0]), torch.zeros_like(x))
    minus = vector(-0.0)
    assert torch.equal(merge("passthrough", [minus]).view(torch.int64), minus.view(torch.int64)), (
        "the sign of a zero, too"
    )


@pytest.mark.parametrize(
    ("name", "count", "values", "message"),
    [
        ("passthrough", 2, {}, "passthrough takes 1 model, got 2; use linear to average them"),
        ("passthrough", 1, {"scales": [1.0, 1.0]}, "passthrough got 2 numbers for scale and 1 models"),
        ("passthrough", 1, {"scales": [math.inf]}, "passthrough got scale = inf"),
        ("nearswap", 2, {"t": 0.1}, "nearswap takes 1 model beside the base, got 2"),
        ("nearswap", 1, {"t": -0.1}, "nearswap got t = -0.1; give a finite number, 0 or more"),
        ("nearswap", 1, {"t": math.nan}, "nearswap got t = nan"),
        ("arcee_fusion", 2, {}, "arcee_fusion takes 1 model beside the base, got 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(name, count, values, message):
    zero = torch.zeros((), dtype=torch.float64)
    with pytest.raises(OptionError, match=message):
        merge(name, [zero] * count, zero if registry.merge_method(name).base == "required" else None, **values)
