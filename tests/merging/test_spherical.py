"""Methods by lengths and angles: slerp, nuslerp, multislerp, karcher and model_stock, against formulas on vectors."""

import itertools
import math

import pytest
import torch

from hf_rebasin import registry
from hf_rebasin.checkpoints import lazy
from hf_rebasin.errors import CheckpointError, OptionError
from hf_rebasin.merging.methods import _inner_products
from hf_rebasin.merging.methods._inner_products import blocks, combine, gram_matrix, unit_gram
from hf_rebasin.merging.pieces import BoundMethod

COLLINEAR = 0.9995
MERGEKIT = {"collinear": 1.0, "eps": 1e-8}


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def merge(name, tensors, base=None, **values):
    """Merge tensors as a checkpoint's are merged, in pieces of `lazy.CHUNK` elements."""
    return BoundMethod(method=registry.merge_method(name), values=values)(tensors, base)


def directly(name, tensors, **values):
    """Call the method's function on whole tensors."""
    return registry.merge_method(name).merge(tensors, **values)


def draw(*shape, count=3, seed=0, like=None):
    """Return tensors at some 30° from each other."""
    numbers = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=numbers, dtype=torch.float64)
    tensors = [common + 0.6 * torch.randn(shape, generator=numbers, dtype=torch.float64) for _ in range(count)]
    return [tensor * (1 + 0.3 * i) for i, tensor in enumerate(tensors)]


def close(actual, expected, rtol=1e-12, atol=1e-13):
    expected = expected if isinstance(expected, torch.Tensor) else vector(*expected)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# --- formulas, vector by vector --------------------------------------------------------------------------------------


def arc(a, b, t):
    """Interpolate two flat vectors as nuslerp does by default."""
    norms = math.sqrt(a @ a) * math.sqrt(b @ b)
    cosine = float(a @ b) / norms if norms else 1.0
    if abs(cosine) > COLLINEAR:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def mean_direction(tensors, weights):
    weights = [weight / sum(weights) for weight in weights]
    mean = sum(w * x / x.norm() for w, x in zip(weights, tensors, strict=True))
    return mean / mean.norm() * sum(w * x.norm() for w, x in zip(weights, tensors, strict=True))


def pull(point, tensors, weights):
    """Return the gradient of ½ Σ αᵢ θᵢ² at a point of the sphere, negated; it is 0 at the Karcher mean."""
    total = torch.zeros_like(point)
    for weight, x in zip(weights, tensors, strict=True):
        unit = x / x.norm()
        cosine = (unit * point).sum().clamp(-1, 1)
        away = unit - cosine * point
        total += weight / sum(weights) * torch.acos(cosine) * away / away.norm()
    return total


def stock(deltas, clip=True):
    """Return model_stock's difference from the base for flat vectors."""
    pairs = itertools.combinations(deltas, 2)
    cosines = [float(x @ y / (x.norm() * y.norm())) if x.norm() * y.norm() else 0.0 for x, y in pairs]
    cosine, models = sum(cosines) / len(cosines), len(deltas)
    t = models * cosine / (1 + (models - 1) * cosine)
    return (max(0.0, min(t, 1.0)) if clip else t) * sum(deltas) / models


# --- sums ------------------------------------------------------------------------------------------------------------


def test_inner_products_do_not_depend_on_the_pieces(monkeypatch):
    """To the last bit; controls: sums over the pieces themselves differ in it."""
    monkeypatch.setattr(_inner_products, "BLOCK", 1000)
    tensors = [tensor.reshape(-1) for tensor in draw(83, 97)]
    whole = gram_matrix([tensors])
    naive = []
    for size in (1, 7, 999, 1000, 1001, 4000, 10_000):
        parts = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
        assert torch.equal(gram_matrix(parts), whole), size
        naive.append(sum(float(part[0] @ part[1]) for part in parts))
    assert len(set(naive)) > 1
    torch.testing.assert_close(whole, torch.stack(tensors) @ torch.stack(tensors).T, rtol=1e-13, atol=0)


def test_inner_products_do_not_depend_on_the_memory(monkeypatch):
    """Dot products of vectors that begin in the middle of a cache line may be rounded differently."""
    tensors = [tensor.reshape(-1) for tensor in draw(4001, count=2)]
    expected = gram_matrix([tensors])
    for shift in range(8):
        moved = [torch.cat([vector(*[0.0] * shift), tensor])[shift:] for tensor in tensors]
        assert torch.equal(gram_matrix([moved]), expected)


def test_inner_products_by_hand():
    x, y = vector(3, 4), vector(1, 0)
    expected = [[25.0, 3.0], [3.0, 1.0]]
    assert gram_matrix([(x, y)]).tolist() == expected
    assert gram_matrix([(x[:1], y[:1]), (x[1:], y[1:])]).tolist() == expected
    assert unit_gram(gram_matrix([(x, y)])).tolist() == [[1.0, 0.6], [0.6, 1.0]]
    assert gram_matrix([(x.new_zeros(0),) * 2]).tolist() == [[0.0, 0.0]] * 2
    assert gram_matrix([]).shape == (0, 0)
    half = torch.tensor([3.0, 4.0]).bfloat16()
    assert gram_matrix([(half.float(), half.float())]).tolist() == [[25.0, 25.0], [25.0, 25.0]]


def test_blocks_are_cut_at_fixed_positions():
    x = torch.arange(10.0)
    for sizes in ([10], [4, 6], [1, 2, 3, 4], [3, 0, 7], [0, 10]):
        cut = [block.tolist() for (block,) in blocks(((part,) for part in x.split(sizes)), 4)]
        assert cut == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], sizes


def test_sums_of_equal_tensors_are_exact():
    x, y = draw(1000, count=2)
    for count in range(1, 8):
        assert torch.equal(combine([x] * count, [1 / count] * count), x)
    assert not torch.equal(sum(x * (1 / 7) for _ in range(7)), x), "control: the plain sum is rounded"
    assert torch.equal(combine([y, x, y], [0.0, 1.0, 0.0]), x)
    close(combine([vector(2), vector(6)], [0.75, 0.25]), [3])
    close(combine([vector(2), vector(6)], [-1, 0.5]), [1])
    before = x.clone()
    combine([x, y], [0.5, 0.7])
    assert torch.equal(x, before), "inputs stay as they are"


# --- pieces ----------------------------------------------------------------------------------------------------------

STREAMED = {
    "slerp": ("slerp", 2, {"t": 0.3}),
    "nuslerp": ("nuslerp", 2, {"weights": [1, 3]}),
    "nuslerp of rows": ("nuslerp", 2, {"weights": [1, 3], "flatten": False}),
    "nuslerp of columns": ("nuslerp", 2, {"weights": [1, 3], "flatten": False, "row_wise": True}),
    "multislerp": ("multislerp", 3, {"weights": [1, 2, 3]}),
    "karcher": ("karcher", 3, {"weights": [1, 2, 3]}),
    "model_stock": ("model_stock", 3, {}),
    "model_stock of rows": ("model_stock", 3, {"filter_wise": True}),
}


STREAMED_WITH = [
    (case, with_base)
    for case, (name, _, _) in STREAMED.items()
    for with_base in {"none": [False], "optional": [False, True], "required": [True]}[registry.merge_method(name).base]
]


@pytest.mark.parametrize(("case", "with_base"), STREAMED_WITH)
def test_pieces_give_what_the_whole_gives(case, with_base, monkeypatch):
    """To the last bit; control: without what `prepare` saw of the whole, pieces give something else."""
    name, count, values = STREAMED[case]
    for shape in ((37, 29), (5, 4, 3, 6), (211,), (1, 50), (50, 1)):
        tensors = draw(*shape, count=count)
        base = draw(*shape, count=1, seed=1)[0] if with_base else None
        expected = merge(name, tensors, base, **values)
        deltas = tensors if base is None else [tensor - base for tensor in tensors]
        on_whole = directly(name, deltas, **values)
        close(expected, on_whole if base is None else on_whole + base)
        for size in (7, 30, 100, 999):
            monkeypatch.setattr(lazy, "CHUNK", size)
            assert torch.equal(merge(name, tensors, base, **values), expected), (shape, size)
        monkeypatch.undo()
    pieces = [
        directly(name, part, **values) for part in zip(*(x.split(9) for x in draw(37, 29, count=count)), strict=True)
    ]
    whole = directly(name, draw(37, 29, count=count), **values)
    assert torch.allclose(torch.cat(pieces), whole, rtol=1e-9) == case.endswith("of rows")


def test_columns_are_found_by_the_offset():
    """Of a 4-D tensor, a piece may begin in the middle of a slice along the first axis; control: another offset."""
    a, b = draw(5, 4, 3, 6, count=2)
    values = {"weights": [1, 3], "flatten": False, "row_wise": True}
    whole = registry.merge_method("nuslerp").prepare(as_pieces(a, b), flatten=False, row_wise=True)
    expected = merge("nuslerp", [a, b], **values).reshape(-1, 6)
    rows = [tensor.reshape(-1, 6)[7:20] for tensor in (a, b)]
    at = directly("nuslerp", rows, shape=a.shape, offset=7 * 6, whole=whole, **values)
    assert torch.equal(at, expected[7:20])
    assert not torch.allclose(
        directly("nuslerp", rows, shape=a.shape, offset=0, whole=whole, **values), expected[7:20]
    )


def as_pieces(*tensors):
    from hf_rebasin.merging.pieces import Piece, Pieces

    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    whole = Piece(tensors=flat)
    return Pieces(shape=tuple(tensors[0].shape), ranges=[(0, tensors[0].numel())], cut=lambda start, stop: whole)


# --- nuslerp ---------------------------------------------------------------------------------------------------------


def test_nuslerp_by_hand():
    a, b = vector(1, 0), vector(0, 1)
    close(merge("nuslerp", [a, b], weights=[1, 3]), [math.sin(math.pi / 8), math.cos(math.pi / 8)])
    close(merge("nuslerp", [a, b]), [0.5**0.5, 0.5**0.5])
    close(merge("nuslerp", [a, b], weights=[1, -1]), [0.5**0.5, 0.5**0.5])  # weights that cancel count as equal
    close(merge("nuslerp", [a, b], weights=[1e-9, 3e-9]), [math.sin(math.pi / 8), math.cos(math.pi / 8)])
    assert torch.equal(merge("nuslerp", [a, b], weights=[1, 0]), a)
    assert torch.equal(merge("nuslerp", [a, b], weights=[0, 1]), b)
    base = vector(5, 5)
    close(merge("nuslerp", [a + base, b + base], base), [5 + 0.5**0.5] * 2)  # the arc is around the base


def test_nuslerp_takes_vectors_along_any_axis():
    a, b = draw(4, 3, 5, count=2)
    flat, rows, columns = (
        merge("nuslerp", [a, b], weights=[1, 3], flatten=flatten, row_wise=row_wise)
        for flatten, row_wise in ((True, False), (False, False), (False, True))
    )
    close(flat, arc(a.reshape(-1), b.reshape(-1), 0.75).reshape(a.shape))
    for i, j in itertools.product(range(4), range(3)):
        close(rows[i, j], arc(a[i, j], b[i, j], 0.75))
    for j, k in itertools.product(range(3), range(5)):
        close(columns[:, j, k], arc(a[:, j, k], b[:, j, k], 0.75))
    assert not torch.allclose(flat, rows)
    assert not torch.allclose(columns, rows)
    assert torch.equal(merge("nuslerp", [a, b], weights=[1, 3], flatten=True, row_wise=True), flat)
    for x, y in ((a[0, 0], b[0, 0]), (a[0, 0, 0], b[0, 0, 0])):  # all three are the same for a vector and a number
        for row_wise in (False, True):
            expected = merge("nuslerp", [x, y], weights=[1, 3])
            close(merge("nuslerp", [x, y], weights=[1, 3], flatten=False, row_wise=row_wise), expected)


def test_nuslerp_goes_straight_where_there_is_no_arc():
    a = vector(0.3, -0.4)
    close(merge("nuslerp", [a, -a], weights=[3, 1]), 0.5 * a)
    close(merge("nuslerp", [a, 0 * a], weights=[3, 1]), 0.75 * a)
    close(merge("nuslerp", [0 * a, 0 * a]), 0 * a)
    nearly = -a + 1e-3 * vector(0.4, 0.3)  # 1e-3 from opposite
    assert merge("nuslerp", [a, nearly]).norm() < 1e-3
    assert merge("nuslerp", [a, nearly], **MERGEKIT).norm() > 0.3, "control: the arc leads far off"
    rows = [torch.stack([a, a, a]), torch.stack([-a, 0 * a, vector(0.8, 0.6)])]
    merged = merge("nuslerp", rows, weights=[3, 1], flatten=False)
    close(merged, torch.stack([0.5 * a, 0.75 * a, arc(a, vector(0.8, 0.6), 0.25)]))


def test_nuslerp_by_the_rule_of_mergekit():
    """A zero vector counts as at right angles, and equal directions within 1e-8 as equal."""
    a = vector(0.3, -0.4)
    close(merge("nuslerp", [a, 0 * a], weights=[3, 1], **MERGEKIT), a * math.sin(0.75 * math.pi / 2))
    close(merge("nuslerp", [a, 2 * a], weights=[3, 1], **MERGEKIT), 1.25 * a)
    close(merge("nuslerp", [a, -a], weights=[3, 1], **MERGEKIT), 0.5 * a)
    assert registry.merge_method("nuslerp").mergekit == MERGEKIT
    close_by = a + 1e-2 * vector(0.4, 0.3)
    on_arc, straight = merge("nuslerp", [a, close_by], **MERGEKIT), merge("nuslerp", [a, close_by])
    close(straight, (a + close_by) / 2)
    assert 1e-7 < (on_arc - straight).abs().max() < 1e-3


# --- multislerp ------------------------------------------------------------------------------------------------------


def test_multislerp_by_hand():
    close(merge("multislerp", [vector(2, 0), vector(0, 4)]), [3 * 0.5**0.5] * 2)
    close(merge("multislerp", [vector(2, 0, 0), vector(0, 2, 0), vector(0, 0, 2)]), [2 / 3**0.5] * 3)
    close(merge("multislerp", [vector(2, 0), vector(0, 4)], weights=[3, 1]), vector(3, 1) / 10**0.5 * 2.5)
    close(
        merge("multislerp", [vector(2, 0), vector(0, 4)], weights=[3, 1], normalize_weights=False),
        vector(3, 1) / 10**0.5 * 10,
    )


@pytest.mark.parametrize("weights", [[1, 2, 3], [0.2, 0.2, 0.6], [4, -1, 2]])
def test_multislerp_is_the_mean_direction_with_the_mean_length(weights):
    tensors, base = draw(13, 7), draw(13, 7, count=1, seed=1)[0]
    close(merge("multislerp", tensors, weights=weights), mean_direction(tensors, weights))
    deltas = [tensor - base for tensor in tensors]
    close(merge("multislerp", tensors, base, weights=weights), base + mean_direction(deltas, weights))
    close(merge("multislerp", tensors, weights=weights, **MERGEKIT), mean_direction(tensors, weights), rtol=1e-7)


def test_multislerp_goes_straight_where_directions_cancel():
    a, b = vector(0.3, -0.4), vector(0.8, 0.6)
    close(merge("multislerp", [a, -a, b, -b]), 0 * a)
    close(merge("multislerp", [a, -2 * a], weights=[2, 1]), 0 * a)  # opposite ones, whatever their weights
    close(merge("multislerp", [a, -a], weights=[3, 1]), 0.5 * a)
    close(merge("multislerp", [a, 0 * a, b]), (a + b) / 3)  # a zero has no direction
    close(merge("multislerp", [a, 0 * a, b], weights=[1, 0, 1]), mean_direction([a, b], [1, 1]))  # nor a say, if 0
    close(merge("multislerp", [0 * a] * 3), 0 * a)
    unmoved = merge("multislerp", [b] * 3, b)
    assert torch.equal(unmoved, b), "what no model moved stays the base's"


def test_multislerp_by_the_rule_of_mergekit_refuses_directions_that_cancel():
    a, b = vector(0.3, -0.4), vector(0.8, 0.6)
    with pytest.raises(CheckpointError, match=r"directions of a tensor in 3 models cancel .* below eps = 1e-08"):
        merge("multislerp", [b] * 3, b, **MERGEKIT)
    with pytest.raises(CheckpointError, match="in 4 models cancel"):
        merge("multislerp", [a, -a, b, -b], **MERGEKIT)
    close(merge("multislerp", [b] * 2, b, **MERGEKIT), b)  # two models go straight
    close(merge("multislerp", [a, -a], weights=[1, 1], **MERGEKIT), 0 * a)
    close(merge("multislerp", [a], weights=[2], normalize_weights=False, **MERGEKIT), a)  # one model has no weight
    close(merge("multislerp", [a], weights=[2], normalize_weights=False), 2 * a)
    zero = torch.zeros((), dtype=torch.float64)
    assert merge("multislerp", [zero] * 3, zero, **MERGEKIT) == 0, "numbers have only two directions"


# --- karcher ---------------------------------------------------------------------------------------------------------


def test_karcher_of_two_is_on_their_arc():
    a, b = draw(8, 5, count=2)
    a, b = a / a.norm(), b / b.norm()
    for weights, t in (([1, 1], 0.5), ([3, 1], 0.25), ([1, 4], 0.8)):
        expected = arc(a.reshape(-1), b.reshape(-1), t).reshape(a.shape)
        close(merge("karcher", [a, b], weights=weights, max_iter=50, tol=1e-9), expected, rtol=0, atol=1e-9)
    close(merge("karcher", [vector(1, 0), vector(0, 1)], weights=[2, 1], tol=1e-9), [3**0.5 / 2, 0.5], rtol=1e-7)
    close(merge("karcher", [vector(1, 0), vector(0, 3)], tol=1e-9), [2**0.5] * 2, rtol=1e-7)  # times the mean length


def test_karcher_is_where_all_pulls_cancel():
    tensors, weights = draw(6, 5, count=4), [1, 2, 3, 4]
    mean = merge("karcher", tensors, weights=weights, max_iter=100, tol=1e-9)
    length = sum(w * x.norm() for w, x in zip(weights, tensors, strict=True)) / 10
    close(mean.norm(), length)
    assert pull(mean / mean.norm(), tensors, weights).norm() < 1e-7
    start = merge("karcher", tensors, weights=weights, max_iter=0)
    close(start, mean_direction(tensors, weights))
    assert pull(start / start.norm(), tensors, weights).norm() > 1e-3, "control: the start is somewhere else"
    assert pull(mean / mean.norm(), tensors, [1, 1, 1, 1]).norm() > 1e-3, "control: so is the mean by other weights"
    step = merge("karcher", tensors, weights=weights, max_iter=1)
    before, after = ((x / x.norm() - mean / mean.norm()).norm() for x in (start, step))
    assert after < before / 5
    loose = merge("karcher", tensors, weights=weights, tol=1.0)
    assert torch.equal(loose, start), "a step shorter than tol is not taken"


def test_karcher_goes_straight_where_directions_cancel():
    a, b = vector(0.3, -0.4), vector(0.8, 0.6)
    close(merge("karcher", [a, -a], weights=[3, 1]), 0.5 * a)
    close(merge("karcher", [a, -a]), 0 * a)
    close(merge("karcher", [a, -3 * a]), -a)
    close(merge("karcher", [a, -a, b, -b]), 0 * a)
    close(merge("karcher", [a, 0 * a]), a / 2)  # a zero has no direction, but a length
    close(merge("karcher", [0 * a] * 3), 0 * a)
    third = merge("karcher", [a, -a, b])
    close(third / third.norm(), b / b.norm())  # two that cancel leave it to the third
    close(third.norm(), vector(2 / 3).squeeze())
    small = merge("karcher", [a, 1e-6 * b], eps=1e-5)
    close(small, a / 2 * (1 + 2e-6))  # a norm up to eps has no direction, by the rule of mergekit
    assert abs(float(merge("karcher", [a, 1e-6 * b]) @ b)) > 0.1, "but by ours"


# --- model_stock -----------------------------------------------------------------------------------------------------


def test_model_stock_by_hand():
    zero = vector(0, 0)
    cosine = 0.5**0.5
    close(merge("model_stock", [vector(1, 0), vector(1, 1)], zero), 2 * cosine / (1 + cosine) * vector(1, 0.5))
    close(merge("model_stock", [vector(1, 0), vector(0, 1)], zero), zero)  # right angles: the base
    close(merge("model_stock", [vector(3, 4)] * 3, vector(1, 1)), [3, 4])  # full agreement: their mean


def test_model_stock_moves_the_mean_towards_the_base():
    tensors, base = draw(9, 6), draw(9, 6, count=1, seed=1)[0]
    deltas = [(tensor - base).reshape(-1) for tensor in tensors]
    close(merge("model_stock", tensors, base), base + stock(deltas).reshape(base.shape))
    rows = merge("model_stock", tensors, base, filter_wise=True)
    for i in range(9):
        close(rows[i], base[i] + stock([tensor[i] - base[i] for tensor in tensors]))
    assert not torch.allclose(rows, merge("model_stock", tensors, base))
    for bias in (True, False):  # a vector is one row
        x = [tensor[0] for tensor in tensors]
        close(merge("model_stock", x, base[0], filter_wise=bias), base[0] + stock([y - base[0] for y in x]))


def test_model_stock_stays_between_the_base_and_the_mean():
    zero, a = vector(0, 0), vector(0.3, -0.4)
    away = [a, vector(-0.5, 0.1)]
    close(merge("model_stock", away, zero), zero)
    close(merge("model_stock", away, zero, clip=False), stock(away, clip=False))  # by the rule of mergekit it does not
    assert stock(away, clip=False).abs().max() > 0.1
    close(merge("model_stock", [a, -a], zero, clip=False), zero)  # the divisor is 0
    close(merge("model_stock", [a, 0 * a, a], zero), 3 / 3 / (1 + 2 / 3) * 2 * a / 3)  # a zero has cosine 0
    close(merge("model_stock", [zero] * 3, zero), zero)
    close(merge("model_stock", [zero + 1] * 3, zero + 1, filter_wise=True), zero + 1)
    small = [1e-6 * vector(1, 0), 1e-6 * vector(1, 1)]
    large = merge("model_stock", [1e6 * x for x in small], zero)
    close(1e6 * merge("model_stock", small, zero), large)  # small differences are like large ones
    assert merge("model_stock", small, zero, floor=1e-6).abs().max() < 1e-10, "but not by the rule of mergekit"


# --- what all of them have in common ---------------------------------------------------------------------------------

ALL = {
    "slerp": {},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "multislerp of mergekit": MERGEKIT,
    "nuslerp of mergekit": MERGEKIT,
    "nuslerp of rows": {"flatten": False},
    "nuslerp of columns": {"flatten": False, "row_wise": True},
    "karcher of mergekit": registry.merge_method("karcher").mergekit,
    "model_stock of mergekit": registry.merge_method("model_stock").mergekit,
    "model_stock of rows": {"filter_wise": True},
}


@pytest.mark.parametrize("case", ALL)
def test_tensors_of_any_shape_and_size_give_finite_numbers(case):
    name, values = case.split()[0], ALL[case]
    required = registry.merge_method(name).base == "required"
    for shape in ((), (0,), (1,), (3, 0), (0, 3), (3, 1), (1, 3), (2, 3, 4)):
        for scale in (0.0, 1.0, 1e-170, 1e-300, 1e160, 1e300):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                if not math.isfinite(torch.tensor(scale, dtype=dtype)):
                    continue
                x, y = ((scale * tensor).to(dtype) for tensor in draw(*shape, count=2))
                for tensors in ([x, y], [x, x], [x, -x / 2], [x, 0 * y], [0 * x, 0 * y]):
                    copies = [tensor.clone() for tensor in tensors]
                    merged = merge(name, tensors, torch.zeros_like(x) if required else None, **values)
                    assert merged.shape == shape
                    assert merged.isfinite().all(), (shape, scale, tensors)
                    assert all(map(torch.equal, tensors, copies)), "inputs stay as they are"


@pytest.mark.parametrize("case", ["nuslerp", "nuslerp of rows", "nuslerp of columns", "multislerp", "karcher"])
def test_identical_models_give_that_model_and_weights_of_one_the_first(case):
    name, values = case.split()[0], ALL[case]
    x, y, z = draw(7, 6)
    others = [y] if name == "nuslerp" else [y, z]
    assert torch.equal(merge(name, [x] * (1 + len(others)), **values), x)
    first = [1.0] + [0.0] * len(others)
    assert torch.equal(merge(name, [x, *others], weights=first, **values), x)
    assert torch.equal(merge(name, [*others, x], weights=first[::-1], **values), x)


@pytest.mark.parametrize("name", ["multislerp", "karcher", "model_stock"])
def test_the_order_of_the_models_makes_no_difference(name):
    tensors, base = draw(7, 6), draw(7, 6, count=1, seed=1)[0]
    for order in itertools.permutations(range(3)):
        weights = {} if name == "model_stock" else {"weights": [(1, 2, 3)[i] for i in order]}
        origin = base if name == "model_stock" else None
        merged = merge(name, [tensors[i] for i in order], origin, **weights)
        expected = merge(name, tensors, origin, **({"weights": [1, 2, 3]} if weights else {}))
        close(merged, expected)


def test_lengths_and_angles_do_not_change_with_the_scale_or_a_rotation():
    tensors = draw(10, 1)
    q = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    for name, count in (("slerp", 2), ("nuslerp", 2), ("multislerp", 3), ("karcher", 3), ("model_stock", 3)):
        base = torch.zeros(10, 1, dtype=torch.float64) if name == "model_stock" else None
        expected = merge(name, tensors[:count], base)
        close(merge(name, [q @ tensor for tensor in tensors[:count]], base), q @ expected)
        close(merge(name, [1e-9 * tensor for tensor in tensors[:count]], base), 1e-9 * expected, atol=1e-21)


@pytest.mark.parametrize(
    ("name", "count", "values", "message"),
    [
        ("slerp", 3, {}, "slerp merges 2 models, got 3"),
        ("nuslerp", 1, {}, "nuslerp merges 2 models, got 1; use multislerp"),
        ("nuslerp", 3, {"flatten": False}, "nuslerp merges 2 models, got 3; use multislerp"),
        ("nuslerp", 2, {"weights": [1.0]}, "nuslerp got 1 numbers for weight and 2 models"),
        ("nuslerp", 2, {"collinear": 2.0}, "nuslerp got collinear = 2.0; give a finite number from 0 to 1"),
        ("nuslerp", 2, {"eps": -1.0}, r"nuslerp got eps = -1.0; give a finite number, 0 or more"),
        ("multislerp", 2, {"weights": [1.0, -1.0]}, r"weights \[1.0, -1.0\], which sum to 0"),
        ("multislerp", 2, {"weights": [1.0, math.nan]}, "multislerp got weight = nan"),
        ("multislerp", 2, {"collinear": -1.0}, "multislerp got collinear = -1.0"),
        ("karcher", 2, {"weights": [1.0, -1.0]}, "karcher got weight = -1.0; give a finite number, 0 or more"),
        ("karcher", 2, {"weights": [0.0, 0.0]}, "which sum to 0; give one of them a positive weight"),
        ("karcher", 2, {"max_iter": -1}, "karcher got max_iter = -1"),
        ("karcher", 2, {"tol": math.inf}, "karcher got tol = inf"),
        ("model_stock", 1, {}, "model_stock merges 2 models or more beside the base, got 1"),
        ("model_stock", 2, {"floor": -1.0}, "model_stock got floor = -1.0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(name, count, values, message):
    zero = torch.zeros((), dtype=torch.float64)
    with pytest.raises(OptionError, match=message):
        merge(name, [zero] * count, zero if registry.merge_method(name).base == "required" else None, **values)
