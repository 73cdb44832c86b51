"""Methods on singular directions: their formulas with plain SVDs and inverses, low ranks, all shapes of tensors."""

import numpy as np
import pytest
import torch

from hf_rebasin import registry
from hf_rebasin.errors import OptionError
from hf_rebasin.merging.methods._spectral import RidgeSystem, orthogonalize, singular_triples

METHODS = ("tsv_m", "iso_c", "iso_cts", "wudi", "ace")
# Results do not depend on the unit of the differences, nor (but for ace, which has means of rows) on the coordinates.
ROTATED = ("tsv_m", "iso_c", "iso_cts", "wudi")


def merge(name, tensors, **parameters):
    inputs = [torch.as_tensor(tensor, dtype=torch.float64) for tensor in tensors]
    before = [tensor.clone() for tensor in inputs]
    merged = registry.merge_method(name).merge(inputs, **parameters)
    assert all(map(torch.equal, inputs, before))
    assert merged.shape == inputs[0].shape
    assert merged.isfinite().all()
    return merged.numpy()


def draw(*shape, models=3, seed=0, rank=None):
    generator = np.random.default_rng(seed)
    if rank is None:
        return [generator.standard_normal(shape) for _ in range(models)]
    rows, columns = shape
    pairs = [
        (generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns))) for _ in range(models)
    ]
    return [left @ right for left, right in pairs]


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def triples(matrix, count):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :count], values[:count], right[:count]


def tsv_m(deltas, count):
    parts = [triples(delta, count) for delta in deltas]
    values = np.concatenate([part[1] for part in parts])
    return polar(np.hstack([part[0] for part in parts])) * values @ polar(np.vstack([part[2] for part in parts]))


def iso_cts(deltas, fraction, rank):
    models = len(deltas)
    share = round((rank - int(rank * fraction)) / models)
    common = triples(sum(deltas), rank - share * models)
    outside = np.eye(len(deltas[0])) - common[0] @ common[0].T
    parts = [*(triples(outside @ delta, share) for delta in deltas), common]
    strength = np.concatenate([part[1] for part in parts]).mean()
    return strength * polar(np.hstack([part[0] for part in parts])) @ polar(np.vstack([part[2] for part in parts]))


def interference(merged, deltas):
    """The objective of WUDI, and its gradient."""
    terms = [((merged - delta) @ delta.T, delta, (delta**2).sum()) for delta in deltas]
    return (
        sum((term**2).sum() / square for term, _, square in terms),
        sum(2 * term @ delta / square for term, delta, square in terms),
    )


def ace(deltas, ridge, *, relative, keep_mean):
    squares = np.array([(delta**2).sum() for delta in deltas])
    heterogeneous = np.log(squares).var() / np.log(squares).mean() ** 2 > 0.3
    centred = [delta - delta.mean(0) for delta in deltas]
    width = deltas[0].shape[1]
    grams, ridges = [], []
    for part in centred:
        gram = part.T @ part
        unit = np.trace(gram) if heterogeneous else 1
        grams.append(gram / unit)
        ridges.append((ridge * np.trace(gram) if relative else ridge) / unit * np.eye(width))
    column = sum(grams).mean(0) / (squares.mean() if heterogeneous and not relative else 1)
    system = sum(grams) + sum(ridges) + np.outer(np.ones(width), column)
    right = sum(part @ (gram + added) for part, gram, added in zip(centred, grams, ridges, strict=True))
    merged = right @ np.linalg.inv(system)
    if heterogeneous:
        mean = sum(grams) / len(grams)
        target = merged + sum(delta @ (gram - mean) for delta, gram in zip(deltas, grams, strict=True))
        left, values, far = triples(target, int(0.3 * min(target.shape)))
        merged = merged + values.mean() * left @ far
    return merged + keep_mean * sum(delta.mean(0) for delta in deltas) / len(deltas), heterogeneous


SHAPES = pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])


@SHAPES
@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
def test_tsv_m(shape, tolerance):
    deltas = draw(*shape)
    rank = min(shape)
    np.testing.assert_allclose(merge("tsv_m", deltas, tolerance=tolerance), tsv_m(deltas, rank // 3), atol=1e-9)
    whole = merge("tsv_m", deltas, truncate=False, tolerance=tolerance)
    np.testing.assert_allclose(whole, tsv_m(deltas, rank), atol=1e-9)


@SHAPES
@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
def test_iso_c(shape, tolerance):
    deltas = draw(*shape)
    merged = merge("iso_c", deltas, tolerance=tolerance)
    values = np.linalg.svd(sum(deltas), compute_uv=False)
    np.testing.assert_allclose(merged, values.mean() * polar(sum(deltas)), atol=1e-9)
    np.testing.assert_allclose(np.linalg.svd(merged, compute_uv=False).sum(), values.sum())


@SHAPES
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts(shape, fraction):
    deltas = draw(*shape, models=2)
    expected = iso_cts(deltas, fraction, min(shape) // 2 * 2 if fraction == 0 else min(shape))
    if fraction == 0 and min(shape) % 2:  # more directions than there are cannot be shared out: one stays common
        share = min(shape) // 2
        common = triples(sum(deltas), 1)
        outside = np.eye(shape[0]) - common[0] @ common[0].T
        parts = [*(triples(outside @ delta, share) for delta in deltas), common]
        strength = np.concatenate([part[1] for part in parts]).mean()
        expected = polar(np.hstack([p[0] for p in parts])) @ polar(np.vstack([p[2] for p in parts])) * strength
    np.testing.assert_allclose(merge("iso_cts", deltas, common_fraction=fraction), expected, atol=1e-9)


@SHAPES
def test_wudi_is_at_the_minimum(shape):
    deltas = draw(*shape)
    merged = merge("wudi", deltas)
    value, gradient = interference(merged, deltas)
    assert abs(gradient).max() < 1e-10
    assert abs(interference(sum(deltas) / 3, deltas)[1]).max() > 0.1
    for step in draw(*shape, models=5, seed=1):
        assert value < interference(merged + 1e-2 * step, deltas)[0]


def test_wudi_where_few_rows_leave_inputs_free():
    deltas = draw(3, 20, models=2)
    merged = merge("wudi", deltas)
    units = [delta.T @ delta / (delta**2).sum() for delta in deltas]
    right = sum(delta @ unit for delta, unit in zip(deltas, units, strict=True))
    np.testing.assert_allclose(merged, right @ np.linalg.pinv(sum(units), rcond=1e-10), atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (3, 20)])
@pytest.mark.parametrize("sizes", [(1, 1.2, 0.9), (1e-3, 1, 3)])
@pytest.mark.parametrize(("relative", "keep_mean"), [(True, True), (False, False)])
def test_ace(shape, sizes, relative, keep_mean):
    deltas = [size * delta for size, delta in zip(sizes, draw(*shape), strict=True)]
    if min(shape) * 0.3 < 1 and sizes[0] < 1:
        deltas = [np.vstack([delta, delta[::-1] * 0.3]) for delta in deltas]
    expected, heterogeneous = ace(deltas, 0.02, relative=relative, keep_mean=keep_mean)
    assert heterogeneous == (sizes[0] < 1)
    merged = merge("ace", deltas, ridge=0.02, relative=relative, keep_mean=keep_mean)
    np.testing.assert_allclose(merged, expected, atol=1e-7 * max(1, abs(expected).max()))


def test_examples_of_the_docstrings():
    np.testing.assert_allclose(merge("tsv_m", [np.diag([3, 1]), np.diag([2, 4])]), np.diag([3, 4]), atol=1e-12)
    np.testing.assert_allclose(
        merge("iso_c", [np.diag([5, 0, 0]), np.diag([0, 1, 0])]), np.diag([3, 3, 0]), atol=1e-12
    )
    merged = merge("iso_cts", [np.diag([6, 4, 2, 0]), np.diag([0, 2, 1, 3])], common_fraction=0.5)
    np.testing.assert_allclose(merged, 4.25 * np.eye(4), atol=1e-12)
    np.testing.assert_allclose(merge("wudi", [np.diag([2, 0]), np.eye(2)]), np.diag([5 / 3, 1]), atol=1e-7)
    np.testing.assert_allclose(merge("ace", [[[2, 0], [0, 0]]]), [[1 + 2.02 / 3.02, 0], [1 - 2.02 / 3.02, 0]])


def test_weights_scale_the_differences_of_models():
    deltas, weights = draw(6, 9), [0.5, 2.0, 1.0]
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    for name in ("tsv_m", "iso_c", "iso_cts"):
        np.testing.assert_allclose(merge(name, deltas, weights=weights), merge(name, weighted), atol=1e-9)
    for name in ("wudi", "ace"):  # a model that counts twice is two equal models
        twice = merge(name, [*deltas, deltas[1]])
        np.testing.assert_allclose(merge(name, deltas, weights=[1, 2, 1]), twice, atol=1e-8)
    for name in METHODS:
        alone = merge(name, deltas[1:2])
        np.testing.assert_allclose(merge(name, deltas, weights=[0, 1, 0]), alone, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(merge(name, deltas, lambda_=1.5), 1.5 * merge(name, deltas), atol=1e-9)


@SHAPES
@pytest.mark.parametrize(("name", "parameters"), [("tsv_m", {"truncate": False}), ("wudi", {})])
def test_equal_models_are_kept(shape, name, parameters):
    first, second = draw(*shape, models=2)
    np.testing.assert_allclose(merge(name, [first] * 3, **parameters), first, atol=1e-9)
    np.testing.assert_allclose(merge(name, [first, second], weights=[1, 0], **parameters), first, atol=1e-9)
    assert abs(merge(name, [first, second], **parameters) - first).max() > 0.1
    adapter = draw(*shape, models=1, rank=2)[0]
    np.testing.assert_allclose(merge(name, [adapter] * 2, **parameters), adapter, atol=1e-7)


@SHAPES
@pytest.mark.parametrize("name", METHODS)
def test_differences_of_low_rank_stay_in_their_space(name, shape):
    """The arbitrary directions of singular values near 0 get nothing, which is most of them after LoRA."""
    deltas = draw(*shape, models=2, rank=1)
    merged = merge(name, deltas, **({"keep_mean": False} if name == "ace" else {}))
    rows = np.linalg.svd(np.vstack(deltas))[2][:2]
    columns = np.linalg.svd(np.hstack(deltas))[0][:, :2]
    if name != "ace":  # which takes the mean over rows away, and adds a multiple of it over columns
        np.testing.assert_allclose(columns @ (columns.T @ merged), merged, atol=1e-7)
        np.testing.assert_allclose(merged @ rows.T @ rows, merged, atol=1e-7)
        assert np.linalg.matrix_rank(merged, tol=1e-6) == 2
    assert np.linalg.norm(merged) < 2 * sum(map(np.linalg.norm, deltas))


def test_low_ranks_of_iso_c_and_iso_cts_in_numbers():
    deltas = draw(30, 40, models=2, rank=3)
    values = np.linalg.svd(merge("iso_c", deltas), compute_uv=False)
    expected = np.linalg.svd(sum(deltas), compute_uv=False)[:6].mean()
    np.testing.assert_allclose(values, [expected] * 6 + [0.0] * 24, atol=1e-6)
    published = np.linalg.svd(merge("iso_c", deltas, tolerance=0.0), compute_uv=False)
    np.testing.assert_allclose(published, [expected * 6 / 30] * 30, atol=1e-6)
    # r is the joint rank 6, so s = 2 · round((6 − 3) / 2) = 4 and c = 2
    with_own = merge("iso_cts", deltas, common_fraction=0.5)
    np.testing.assert_allclose(with_own, iso_cts(deltas, 0.5, 6), atol=1e-8)
    noisy = [delta + 1e-3 * noise for delta, noise in zip(deltas, draw(30, 40, models=2, seed=1), strict=True)]
    cut = np.linalg.svd(merge("iso_c", noisy, tolerance=0.01), compute_uv=False)
    np.testing.assert_allclose(cut, [expected] * 6 + [0.0] * 24, atol=1e-2)


def test_cancelling_differences_give_nothing():
    delta = draw(5, 6, models=1)[0]
    for name in ("iso_c", "wudi", "ace"):
        np.testing.assert_allclose(merge(name, [delta, -delta]), 0, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(merge("tsv_m", [delta, -delta], truncate=False), 0, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_more_models_than_directions(name):
    deltas = draw(2, 5, models=4)
    assert np.linalg.norm(merge(name, deltas)) > 0.1
    if name == "tsv_m":
        np.testing.assert_allclose(merge(name, deltas), tsv_m(deltas, 1), atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_a_matrix_gets_the_mean(name):
    for shape in [(), (5,), (1, 5), (5, 1), (0, 4), (4, 0), (1, 6, 4), (3, 1, 8), (7, 1, 1, 1)]:
        deltas = draw(*shape)
        expected = 2 * (0.5 * deltas[0] + 1.5 * deltas[2]) / 2
        np.testing.assert_allclose(merge(name, deltas, weights=[0.5, 0, 1.5], lambda_=2.0), expected, atol=1e-12)
    table = draw(6, 4)
    np.testing.assert_allclose(merge(name, table, lookup=True), sum(table) / 3, atol=1e-12)
    assert abs(merge(name, table) - sum(table) / 3).max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_convolutions_and_stacks_are_matrices(name):
    for shape in [(6, 4, 3, 3), (8, 3, 2), (5, 3, 2, 2, 2)]:
        deltas = draw(*shape)
        flat = merge(name, [delta.reshape(shape[0], -1) for delta in deltas])
        np.testing.assert_array_equal(merge(name, deltas), flat.reshape(shape))
    experts = draw(3, 4, 5)
    each = [merge(name, [delta[i] for delta in experts]) for i in range(3)]
    np.testing.assert_array_equal(merge(name, experts), np.stack(each))


@pytest.mark.parametrize("name", ["iso_cts", "wudi", "ace"])
def test_matrices_that_are_stored_transposed(name):
    deltas = draw(6, 9)
    turned = merge(name, [delta.T for delta in deltas], transposed=True)
    np.testing.assert_allclose(turned.T, merge(name, deltas), atol=1e-9)
    assert abs(merge(name, [delta.T for delta in deltas]).T - merge(name, deltas)).max() > 1e-3


@pytest.mark.parametrize("name", ROTATED)
def test_results_do_not_depend_on_coordinates(name):
    deltas = draw(6, 9)
    left, right = (np.linalg.qr(draw(n, n, models=1, seed=n)[0])[0] for n in (6, 9))
    rotated = merge(name, [left @ delta @ right for delta in deltas])
    np.testing.assert_allclose(rotated, left @ merge(name, deltas) @ right, atol=1e-8)
    broken = merge(name, [left @ delta @ right for delta in deltas[:2]] + deltas[2:])
    assert abs(broken - left @ merge(name, deltas) @ right).max() > 1e-2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("unit", [1e-300, 1e-30, 2.0**-20, 1e150, 1e300])
def test_results_do_not_depend_on_the_unit(name, unit):
    deltas = draw(6, 9)  # of equal size, so that ace counts them as alike in any unit
    expected = merge(name, deltas)
    np.testing.assert_allclose(merge(name, [unit * delta for delta in deltas]) / unit, expected, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_models_that_did_not_move(name):
    zero, (delta,) = np.zeros((6, 9)), draw(6, 9, models=1)
    assert not merge(name, [zero, zero]).any()
    np.testing.assert_allclose(merge(name, [zero, delta]), merge(name, [delta]), atol=1e-9)
    tiny = 1e-200 * draw(6, 9, models=1, seed=1)[0]
    merge(name, [tiny, delta])
    merge(name, [1e-320 * np.ones((6, 9)), zero])
    merge(name, [np.ones((6, 9)), np.ones((6, 9))])


def test_ace_keeps_what_all_rows_have_in_common():
    row = np.ones((4, 1)) * np.arange(1.0, 6.0)
    np.testing.assert_allclose(merge("ace", [row, 3 * row]), 2 * row)
    assert not merge("ace", [row, 3 * row], keep_mean=False).any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weights": [1.0]}, "1 numbers for weight and 2 models"),
        ({"weights": [1.0, -1.0]}, "weight = -1"),
        ({"weights": [0.0, 0.0]}, "above 0"),
        ({"lambda_": float("nan")}, "lambda = nan"),
    ],
)
def test_wrong_parameters_are_refused(name, shape, parameters, message):
    with pytest.raises(OptionError, match=message):
        merge(name, [np.zeros(shape)] * 2, **parameters)


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        ("tsv_m", "tolerance", -0.1),
        ("iso_c", "tolerance", 1.0),
        ("iso_cts", "tolerance", float("nan")),
        ("iso_cts", "common_fraction", 1.1),
        ("wudi", "ridge", 0.0),
        ("ace", "ridge", -1.0),
    ],
)
def test_wrong_numbers_are_refused_on_scalars(name, parameter, value):
    with pytest.raises(OptionError, match=f"{name} got {parameter} = "):
        merge(name, [np.zeros(())] * 2, **{parameter: value})


@SHAPES
def test_eigenvectors_are_as_good_as_an_svd(shape):
    rank = min(shape)
    left = np.linalg.qr(draw(shape[0], rank, models=1)[0])[0]
    right = np.linalg.qr(draw(shape[1], rank, models=1, seed=1)[0])[0]
    values = 10.0 ** -np.linspace(0, 6.5, rank)
    matrix = torch.from_numpy(left * values @ right.T)
    fast, slow = (singular_triples(matrix, tolerance) for tolerance in (1e-5, 1e-5 * (1 - 1e-9)))
    assert len(fast[1]) == len(slow[1]) == (values > 1e-5).sum()
    np.testing.assert_allclose(fast[0] @ fast[2].mT, slow[0] @ slow[2].mT, atol=1e-6)
    near = orthogonalize(torch.from_numpy(left + 1e-3 * right[: len(left)].sum()))
    np.testing.assert_allclose(near, polar(left + 1e-3 * right[: len(left)].sum()), atol=1e-9)


def test_dependent_columns_share_a_direction():
    column = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    np.testing.assert_allclose(orthogonalize(torch.cat([column, column], 1)), [[0.6 / 2**0.5] * 2, [0.8 / 2**0.5] * 2])
    nearly = torch.tensor([[1.0, 1.0], [0.0, 1e-5]], dtype=torch.float64)  # eigenvectors of the Gram matrix do not do
    np.testing.assert_allclose(orthogonalize(nearly), polar(nearly.numpy()), atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_ridge_systems(shape):
    rows, right = (torch.from_numpy(draw(n, shape[1], models=1)[0]) for n in (shape[0], 5))
    blocks = list(rows.split(2)) if shape[0] == 4 else list(rows.split(3))
    system = RidgeSystem(blocks, 0.1)
    matrix = rows.mT @ rows
    np.testing.assert_allclose(system.expand(system.multiply(right)), right @ matrix, atol=1e-12)
    parts = [torch.from_numpy(part) for part in draw(len(blocks[0]), shape[1], models=len(blocks), seed=1)]
    shares = [0.5, 2.0, -1.0][: len(blocks)]
    combined = system.combine(parts, shares)
    triples = zip(parts, blocks, shares, strict=True)
    expected = sum(part @ block.mT @ block + share * block for part, block, share in triples)
    np.testing.assert_allclose(system.expand(combined), expected, atol=1e-12)
    solved = system.solve(combined)
    np.testing.assert_allclose(solved @ (matrix + 0.1 * torch.eye(shape[1])), expected, atol=1e-12)
    left = torch.ones(1, len(rows), dtype=torch.float64)
    np.testing.assert_allclose(system.expand(system.hold(left)), left @ rows, atol=1e-12)
