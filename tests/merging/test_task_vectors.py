"""Methods on task vectors: their formulas on small tensors, their limits, random dropping, independence of pieces."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from hf_rebasin import registry
from hf_rebasin.errors import OptionError
from hf_rebasin.merging.methods import _selection
from hf_rebasin.merging.methods._deltas import sum_whole
from hf_rebasin.merging.methods._selection import select_largest
from hf_rebasin.merging.pieces import BoundMethod, Piece, Pieces

METHODS = (
    *("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della"),
    *("della_linear", "sce", "ram", "ramplus_tl", "magmax", "consensus"),
)
SPARSE = {  # parameters under which all passes over the whole tensor are made
    "ties": dict(densities=[0.3, 0.6, 0.9], rescale=True),
    "dare_linear": dict(densities=[0.3, 0.6, 0.9]),
    "dare_ties": dict(densities=[0.3, 0.6, 0.9]),
    "breadcrumbs": dict(densities=[0.3, 0.6, 0.9], gammas=[0.1, 0.05, 0.2], rescale=True),
    "breadcrumbs_ties": dict(densities=[0.3, 0.6, 1.0]),
    "della": dict(densities=[0.3, 0.6, 0.5], epsilons=[0.1, 0.2, 0.3]),
    "della_linear": dict(densities=[0.3, 0.6, 0.5], rescale="density"),
    "sce": dict(select_topk=0.4),
    "ram": dict(epsilon=0.3),
    "ramplus_tl": dict(epsilon=0.3, alpha=3.0),
}


def deltas_of(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def cut_into_pieces(deltas, numbers=(), step=1 << 18, kind="elements"):
    """Pieces of so many elements, or of as many rows as fit."""
    shape, n = tuple(deltas[0].shape), deltas[0].numel()
    row = max(1, shape[-1]) if shape and kind == "rows" else 1
    step = max(1, step // row) * row
    streams = [SimpleNamespace(draw=lambda start, stop, u=u: u.reshape(-1)[start:stop]) for u in numbers]

    def cut(start, stop):
        flat = [delta.reshape(-1)[start:stop] for delta in deltas]
        tensors = [delta.reshape(-1, row) for delta in flat] if kind == "rows" else flat
        return Piece(tensors=tensors, offset=start, streams=streams)

    return Pieces(shape=shape, ranges=[(i, min(i + step, n)) for i in range(0, n, step)], cut=cut)


def merge_deltas(name, deltas, numbers=(), step=1 << 18, **parameters):
    """The merged delta, computed piece by piece."""
    method = registry.merge_method(name)
    values = {"lambda" if parameter == "lambda_" else parameter: value for parameter, value in parameters.items()}
    pieces = cut_into_pieces(deltas, numbers, step, method.pieces)
    whole = None if method.prepare is None else method.prepare(pieces, **method.keywords_for(method.prepare, values))
    asked_for = inspect.signature(method.merge).parameters
    outputs = []
    for piece in pieces:
        filled_in = {"whole": whole, "offset": piece.offset, "uniforms": piece.uniforms}
        filled_in = {keyword: value for keyword, value in filled_in.items() if keyword in asked_for}
        merged = method.merge(piece.tensors, **filled_in, **method.keywords_for(method.merge, values))
        assert merged.shape == piece.tensors[0].shape
        outputs.append(merged.reshape(-1))
    return torch.cat(outputs).reshape(deltas[0].shape)


def draw(*shape, models=3, seed=0, grid=None):
    """Deltas, of which some entries are 0 in all models and some in one only, and uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(models)]
    deltas = [delta if grid is None else (delta / grid).round() * grid for delta in deltas]
    same = torch.rand(shape, generator=generator) < 0.1
    deltas = [delta * ~same * (torch.rand(shape, generator=generator) < 0.9) for delta in deltas]
    return deltas, [torch.rand(shape, generator=generator) for _ in range(models)]


# ------------------------------------------------------------------ formulas


def keep_largest(delta, k):
    """δ with all but its k largest magnitudes set to 0; of equal ones the first are kept."""
    order = delta.abs().reshape(-1).sort(descending=True, stable=True).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return delta * mask.reshape(delta.shape)


def elect(terms, weights=None):
    """The sum of the terms that have the sign of the sum of all, divided by the weights of these terms if given."""
    stacked = torch.stack(terms)
    plus = stacked.sum(0) >= 0
    stays = torch.where(plus, stacked > 0, stacked < 0)
    merged = (stacked * stays).sum(0)
    if weights is None:
        return merged
    shares = torch.tensordot(torch.tensor(weights, dtype=torch.float64), stays.double(), 1)
    return merged / torch.where(shares.abs() < 1e-9, 1, shares)


def restore_norm(kept, delta):
    return kept * (delta.abs().sum() / kept.abs().sum())


@pytest.mark.parametrize("seed", range(3))
def test_task_arithmetic_is_a_weighted_sum(seed):
    (a, b, c), _ = draw(7, 5, seed=seed)
    merged = merge_deltas("task_arithmetic", [a, b, c], weights=[1, 0.5, -0.25], normalize=True, lambda_=1.3)
    torch.testing.assert_close(merged, 1.3 * (a + 0.5 * b - 0.25 * c) / 1.25)


def test_weights_that_cancel_are_not_divided_by():
    merged = merge_deltas("task_arithmetic", deltas_of([2.0], [3.0]), weights=[0.1, -0.1], normalize=True)
    assert merged.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_ties_trims_elects_and_averages(normalize, rescale):
    deltas, _ = draw(11, 13)
    weights, densities = [1.0, 0.5, -0.25], [0.7, 0.4, 0.2]
    kept = [keep_largest(delta, int(density * 143)) for delta, density in zip(deltas, densities, strict=True)]
    kept = [restore_norm(*pair) if rescale else pair[0] for pair in zip(kept, deltas, strict=True)]
    expected = elect([w * delta for w, delta in zip(weights, kept, strict=True)], weights if normalize else None)
    options = dict(weights=weights, densities=densities, normalize=normalize, rescale=rescale, lambda_=0.7)
    torch.testing.assert_close(merge_deltas("ties", deltas, **options), 0.7 * expected)


def test_ties_on_literals():
    a, b = deltas_of([4.0, 1, 2, 0], [2.0, -3, -2, 0])
    assert merge_deltas("ties", [a, b]).tolist() == [3, -3, 2, 0]  # 2 − 2 = 0 counts as +
    assert merge_deltas("ties", [a, b], densities=[0.5, 0.5]).tolist() == [
        3,
        -3,
        2,
        0,
    ]  # of the two 2s the first stays
    assert merge_deltas("ties", [a, b], densities=[0.0, 0.01]).tolist() == [0, -3, 0, 0]  # at least 1 is kept
    assert merge_deltas("ties", [a], densities=[0.0]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize(("density", "gamma", "largest", "kept"), [(0.6, 0.1, 14, 85), (0.9, 0.2, 15, 128)])
def test_breadcrumbs_keep_the_middle(name, density, gamma, largest, kept):
    deltas, _ = draw(11, 13)  # ⌊0.1 · 143⌋ = 14, ⌊0.6 · 143⌋ = 85, ⌊0.9 · 143⌋ = 128; 143 − 128 = 15 < ⌊0.2 · 143⌋
    weights = [1.0, 0.5, -0.25]
    terms = [
        w * (keep_largest(delta, largest + kept) - keep_largest(delta, largest))
        for w, delta in zip(weights, deltas, strict=True)
    ]
    merged = merge_deltas(name, deltas, weights=weights, densities=[density] * 3, gammas=[gamma] * 3)
    torch.testing.assert_close(merged, sum(terms) if name == "breadcrumbs" else elect(terms))


def test_breadcrumbs_of_density_1_drop_the_outliers_unless_told_not_to():
    (delta,) = deltas_of([1.0, -2, 3, -4, 5, -6, 7, -8, 9, 10])
    assert merge_deltas("breadcrumbs", [delta], gammas=[0.2]).tolist() == [1, -2, 3, -4, 5, -6, 7, -8, 0, 0]
    assert torch.equal(merge_deltas("breadcrumbs", [delta], gammas=[0.2], outliers="keep"), delta)


@pytest.mark.parametrize("select_topk", [1.0, 0.4])
def test_sce_selects_weighs_and_erases(select_topk):
    deltas, _ = draw(11, 13)
    variances = torch.stack(deltas).var(0, unbiased=False)
    count = int(select_topk * int((variances > 0).sum()))
    mask = torch.ones_like(variances) if select_topk == 1 else (keep_largest(variances, count) > 0).double()
    squares = torch.stack([(mask * delta).square().mean() for delta in deltas])
    shares = squares / squares.sum()
    signs = (sum(deltas) >= 0).double() * 2 - 1
    stays = [mask * (delta.sign() == signs) for delta in deltas]
    above = sum(v * m * delta for v, m, delta in zip(shares, stays, deltas, strict=True))
    below = sum(v * m for v, m in zip(shares, stays, strict=True)).clamp(min=1e-6)
    torch.testing.assert_close(merge_deltas("sce", deltas, select_topk=select_topk), above / below)


def test_sce_weighs_small_changes_unless_told_not_to():
    a, b = deltas_of([3e-4, 0], [1e-4, 1e-4])  # mean squares 4.5e-8 and 1e-8: weights 9/11 and 2/11
    assert merge_deltas("sce", [a, b])[0].item() == pytest.approx((9 * 3e-4 + 2 * 1e-4) / 11)
    assert merge_deltas("sce", [a, b], equal_below=1e-6)[0].item() == pytest.approx(2e-4)


@pytest.mark.parametrize("size", [1e-190, 1e190])
def test_sce_weighs_extreme_changes(size):
    a, b = deltas_of([3.0, 0, 1], [1.0, 1, 1])
    merged = merge_deltas("sce", [a * size, b * size], select_topk=0.5)  # of two entries that differ, the first
    torch.testing.assert_close(merged / size, torch.tensor([(9 * 3 + 1) / 10, 0, 0], dtype=torch.float64))


def test_equal_variances_are_selected_in_order():
    deltas = deltas_of([0.1, 0.7, 0.1, 0.1], [0.3, 0.7, 0.1, 0.3])
    assert (merge_deltas("sce", deltas, select_topk=0.5) != 0).tolist() == [True, False, False, False]


def test_ram_averages_what_is_shared():
    deltas = deltas_of([4.0, 4, 0.5, 0], [0.0, 2, 0.5, 0], [0.0, 0.5, 0.5, 0])
    assert merge_deltas("ram", deltas, epsilon=0.6).tolist() == [4, 3, 0, 0]


def test_ramplus_tl_raises_lone_changes():
    a, b = deltas_of([1.0, 1, 1, 2, 0, 0], [0.0, 0, 0, 4, 5, 6])  # a: 1 shared, 3 alone; b: 1 shared, 2 alone
    merged = merge_deltas("ramplus_tl", [a, b], r=0.3, alpha=0.4)
    assert merged.tolist() == pytest.approx([1.1, 1.1, 1.1, 3, 5 * 1.12, 6 * 1.12])  # 1 + 0.3 / 3, 1 + 0.3 · 0.4


def test_magmax_takes_the_largest_change():
    deltas = deltas_of([1.0, -5, 2], [-3.0, 4, -2])
    assert merge_deltas("magmax", deltas).tolist() == [-1.5, -2.5, -1]
    assert merge_deltas("magmax", deltas, lambda_=1.0).tolist() == [-3, -5, -2]


def test_consensus_keeps_what_two_masks_mark():
    deltas = deltas_of([3.0, 3, 1, 0], [2.0, 1, 1, 0], [0.0, 0, -1, 0])
    # first entries: 3 > 0.4 · 2 and 2 > 0.4 · 3; second ones: 3 > 0.4 · 1, but 1 < 0.4 · 3; third ones: all masks
    assert merge_deltas("consensus", deltas).tolist() == [5, 0, 1, 0]
    assert merge_deltas("consensus", deltas, threshold=0.7).tolist() == [0, 0, 1, 0]  # 2 < 0.7 · 3
    assert merge_deltas("consensus", deltas, agreement=3).tolist() == [0, 0, 1, 0]
    assert merge_deltas("consensus", deltas, agreement=1, lambda_=0.5).tolist() == [2.5, 2, 0.5, 0]


# ------------------------------------------------------------------ random dropping


def average(name, deltas, draws, **parameters):
    """Mean and standard error over draws of the merge."""
    generator = torch.Generator().manual_seed(1)
    shapes = [delta.shape for delta in deltas]
    outputs = torch.stack(
        [
            merge_deltas(name, deltas, [torch.rand(shape, generator=generator) for shape in shapes], **parameters)
            for _ in range(draws)
        ]
    )
    return outputs.mean(0), outputs.std(0) / math.sqrt(draws)


def deviations(name, delta, expected, **parameters):
    """Root mean square of the deviations from the expected mean, in standard errors."""
    mean, error = average(name, [delta], 400, **parameters)
    return ((mean - expected) / error).square().mean().sqrt().item()


def probabilities(delta, density, epsilon):
    """The probability to keep each entry, by the rank in its row."""
    ranks = torch.argsort(torch.argsort(delta.abs(), dim=-1, stable=True), dim=-1).double()
    return density - epsilon + 2 * epsilon * ranks / (delta.shape[-1] - 1)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dropping_is_unbiased_only_if_rescaled_by_the_density(name):
    delta = torch.linspace(-1, 2, 40, dtype=torch.float64)
    assert deviations(name, delta, delta, densities=[0.3], rescale="density") < 1.5
    assert deviations(name, delta, 0.3 * delta, densities=[0.3], rescale="none") < 1.5
    assert deviations(name, delta, delta, densities=[0.3], rescale="none") > 3  # the control


def test_dropping_by_rank_is_unbiased_only_if_rescaled_by_the_probabilities():
    delta = torch.linspace(-1, 2, 40, dtype=torch.float64).reshape(4, 10)
    p = probabilities(delta, 0.3, 0.2)
    options = dict(densities=[0.3], epsilons=[0.2])
    assert deviations("della_linear", delta, delta, rescale="density", **options) < 1.5
    assert deviations("della_linear", delta, p * delta, rescale="none", **options) < 1.5
    assert deviations("della_linear", delta, 0.3 * delta, rescale="none", **options) > 3  # the control


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_the_l1_norm_is_kept(name):
    (delta,), numbers = draw(20, 30, models=1)
    merged = merge_deltas(name, [delta], numbers, densities=[0.4])
    torch.testing.assert_close(merged.abs().sum(), delta.abs().sum())
    assert torch.equal(merge_deltas(name, [delta], numbers, densities=[0.4], rescale=True), merged)
    without = merge_deltas(name, [delta], numbers, densities=[0.4], rescale=False)
    assert without.abs().sum() < 0.6 * delta.abs().sum()  # the control


@pytest.mark.parametrize(("name", "epsilon"), [("dare_linear", None), ("della_linear", 0.2)])
def test_the_share_that_is_kept_is_the_density(name, epsilon):
    delta, n = torch.ones(100, 100, dtype=torch.float64), 10_000
    numbers = [torch.rand(100, 100, generator=torch.Generator().manual_seed(3))]
    options = {} if epsilon is None else {"epsilons": [epsilon]}
    merged = merge_deltas(name, [delta], numbers, densities=[0.7], rescale="none", **options)
    assert abs(merged.mean() - 0.7) < 3 * math.sqrt(0.21 / n)
    halves = merged[:, :50].mean(), merged[:, 50:].mean()  # equal magnitudes: the first have the lower ranks
    expected = (0.7, 0.7) if epsilon is None else (0.6, 0.8)
    assert [float(half) for half in halves] == pytest.approx(expected, abs=3 * math.sqrt(0.25 / 5000))


def test_dare_ties_elects_among_what_was_kept():
    numbers = [torch.tensor([0.1, 0.9]), torch.tensor([0.1, 0.1])]
    merged = merge_deltas("dare_ties", deltas_of([3.0, 3], [-2.0, -2]), numbers, densities=[0.5, 0.5], rescale=False)
    assert merged.tolist() == [3, -2]


def test_rows_of_one_entry_are_kept_with_the_density():
    delta = torch.ones(4, 1, dtype=torch.float64)
    numbers = [torch.tensor([[0.1], [0.49], [0.51], [0.9]])]
    merged = merge_deltas("della_linear", [delta], numbers, densities=[0.5], rescale="density")
    assert merged.tolist() == [[2], [2], [0], [0]]


# ------------------------------------------------------------------ pieces, limits, mistakes


@pytest.mark.parametrize("grid", [None, 0.25])
@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_pieces_changes_no_byte(name, grid, monkeypatch):
    monkeypatch.setattr(_selection, "FEW", 300)  # so that there are samples and brackets
    deltas, numbers = draw(231, 97, grid=grid)
    merged = [
        merge_deltas(name, deltas, numbers, step, **SPARSE.get(name, {})).numpy().tobytes()
        for step in (1 << 18, 5_000, 301)
    ]
    assert merged[0] == merged[1] == merged[2]


def test_plain_sums_of_pieces_would_change_bytes():
    (delta,), _ = draw(200_000, models=1)
    by_pieces = {step: sum(float(piece.sum()) for piece in delta.split(step)) for step in (1 << 18, 5_000, 301)}
    assert len(set(by_pieces.values())) > 1  # the control
    pieces = [cut_into_pieces([delta], step=step) for step in by_pieces]
    assert len({sum_whole(p, lambda piece: piece.tensors)[0] for p in pieces}) == 1


@pytest.mark.parametrize("few", [4, 50, 1 << 17])
@pytest.mark.parametrize("kind", ["normal", "grid", "constant", "sorted", "half the same", "zeros", "float32"])
def test_the_largest_entries_are_those_of_a_stable_sort(kind, few, monkeypatch):
    monkeypatch.setattr(_selection, "FEW", few)
    n = 2_000
    scores = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).abs()
    scores = {
        "normal": lambda: scores,
        "grid": lambda: (scores * 4).round() + 1,
        "constant": lambda: torch.full_like(scores, 0.3),
        "sorted": lambda: scores.sort().values,
        "half the same": lambda: torch.where(torch.arange(n) % 2 == 0, 0.5, scores),
        "zeros": lambda: scores * (scores > 1.5),
        "float32": scores.float,
    }[kind]()
    counts = [0, 1, 7, 600, 1_000, n - 1, n]
    for step in (1 << 18, 333):
        pieces = cut_into_pieces([scores], step=step)
        (cutoffs,) = select_largest(pieces, lambda piece: piece.tensors, [counts])
        for k, cutoff in zip(counts, cutoffs, strict=True):
            masks = [cutoff.select(piece.tensors[0], piece.offset) for piece in pieces]
            assert torch.equal(scores * torch.cat(masks), keep_largest(scores, k))


def test_few_passes_and_little_memory_find_the_largest_entries(monkeypatch):
    n, reads, kept = 1_000_000, [], []
    scores = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    narrow = _selection._Search.narrow

    def spy(search):
        kept.append(sum(map(len, search.values)))
        narrow(search)

    monkeypatch.setattr(_selection._Search, "narrow", spy)
    pieces = cut_into_pieces([scores])
    ((cutoff,),) = select_largest(pieces, lambda piece: reads.append(piece.offset) or piece.tensors, [[n // 3]])
    assert cutoff.value == scores.sort(descending=True).values[n // 3 - 1]
    assert reads.count(0) == 2
    assert max(kept) < n / 20


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 3)])
def test_zeros_give_zeros(name, shape):
    deltas = [torch.zeros(shape, dtype=torch.float64)] * 3
    merged = merge_deltas(name, deltas, [torch.full(shape, 0.5)] * 3, **SPARSE.get(name, {}))
    assert merged.shape == shape
    assert torch.equal(merged, deltas[0])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_tensors_stay_empty(name, shape):
    bound = BoundMethod(method=registry.merge_method(name), values=SPARSE.get(name, {}))
    assert bound([torch.zeros(shape)] * 3, torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("name", METHODS)
def test_scalars_do_not_fail_and_inputs_stay_as_they_are(name):
    method = registry.merge_method(name)
    for delta in (torch.tensor(0.0), torch.tensor(2.0)):
        deltas, numbers = [delta.clone(), delta.clone()], [torch.zeros(()), torch.zeros(())]
        piece = Piece(tensors=deltas, streams=[SimpleNamespace(draw=lambda start, stop: torch.zeros(1))] * 2)
        pieces = Pieces(shape=(), ranges=[(0, 1)], cut=lambda start, stop, piece=piece: piece)
        whole = None if method.prepare is None else method.prepare(pieces)
        filled_in = {"whole": whole, "uniforms": numbers, "offset": 0}
        asked_for = inspect.signature(method.merge).parameters
        merged = method.merge(deltas, **{name: value for name, value in filled_in.items() if name in asked_for})
        assert merged.shape == ()
        assert merged.isfinite()
        assert all(torch.equal(tensor, delta) for tensor in deltas)


@pytest.mark.parametrize("name", METHODS)
def test_large_tensors_stay_as_they_are(name):
    deltas, numbers = draw(50, 40)
    before = [delta.clone() for delta in deltas]
    merge_deltas(name, deltas, numbers, **SPARSE.get(name, {}))
    assert all(map(torch.equal, deltas, before))


@pytest.mark.parametrize("name", ["dare_linear", "ties", "breadcrumbs_ties", "della"])
def test_norms_that_overflow_are_restored(name):
    (delta,), numbers = draw(8, 8, models=1)
    options = dict(densities=[0.5], rescale=True)
    small = merge_deltas(name, [delta], numbers, **options)
    large = merge_deltas(name, [delta * 2.0**1020], numbers, **options)
    torch.testing.assert_close(large * 2.0**-1020, small)


@pytest.mark.parametrize("name", [name for name in METHODS if registry.merge_method(name).keeps is not None])
def test_identical_models_and_a_single_weight_give_a_model(name):
    method = registry.merge_method(name)
    (delta, other), numbers = draw(9, 8, models=2)
    torch.testing.assert_close(merge_deltas(name, [delta] * 2, numbers, **method.keeps), delta)
    if "weights" in method.parameters:
        torch.testing.assert_close(merge_deltas(name, [delta, other], numbers, weights=[1, 0], **method.keeps), delta)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ties", dict(weights=[1.0]), r"1 numbers for weight and 3 models"),
        ("ties", dict(densities=[50.0] * 3), r"density = 50.0; give a finite number from 0 to 1"),
        ("dare_ties", dict(densities=[-0.1] * 3), r"density = -0.1"),
        ("dare_linear", dict(lambda_=math.nan), r"lambda = nan"),
        ("task_arithmetic", dict(weights=[1.0, math.inf, 1.0]), r"weight = inf; give a finite number$"),
        ("breadcrumbs", dict(gammas=[1.5] * 3), r"gamma = 1.5"),
        ("della", dict(densities=[0.9] * 3, epsilons=[0.1] * 3), r"from 0.8 to 1; give an epsilon below 0.1"),
        ("della_linear", dict(densities=[0.1] * 3), r"epsilon = 0.15.*from -0.05 to 0.25"),
        ("sce", dict(select_topk=1.5), r"select_topk = 1.5"),
        ("ram", dict(epsilon=-1.0), r"epsilon = -1.0; give a finite number, 0 or more"),
        ("ramplus_tl", dict(alpha=-1.0), r"alpha = -1.0"),
        ("magmax", dict(lambda_=math.inf), r"lambda = inf"),
        ("consensus", dict(agreement=4), r"agreement = 4 and 3 models; give a number from 1 to 3"),
        ("consensus", dict(threshold=-0.1), r"threshold = -0.1"),
    ],
)
def test_mistakes_are_refused(name, parameters, message):
    deltas, numbers = draw(2, 3)
    with pytest.raises(OptionError, match=message):
        merge_deltas(name, deltas, numbers, **parameters)
