"""Laws of every registered group. A new file in hf_rebasin/alignment/groups/ is picked up automatically."""

import itertools

import pytest
import torch

from hf_rebasin import registry
from hf_rebasin.alignment.elements.matrices import EIGENVECTORS_FROM, polar_factor
from hf_rebasin.alignment.elements.relaxation import Relaxation
from hf_rebasin.checkpoints.tensor_files import DTYPES

BATCH = (2, 3)


@pytest.fixture(params=registry.names("group"))
def group(request):
    return registry.group(request.param).element


@pytest.fixture
def n(group):
    return 2 if group.__module__.endswith("rotary") else 5


@pytest.fixture
def x(generator, n):
    return torch.randn(*BATCH, n, 4, generator=generator, dtype=torch.float64)


def isometry(group, n, generator, batch=()):
    """Return an element that preserves lengths, and is therefore its own dual."""
    return group.project(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))


def test_action_composition_and_inverse(group, n, x, generator):
    g, h = (group.random(BATCH, n, generator) for _ in range(2))
    for mark in ("", "'", "~"):
        torch.testing.assert_close(h.compose(g).act(x, mark), h.act(g.act(x, mark), mark))
        torch.testing.assert_close(g.inverse().act(g.act(x, mark), mark), x)
    for mark in ("", "'"):
        assert not torch.equal(g.act(x, mark), x)


def test_the_identity(group, n, x, generator):
    e, g = group.identity(BATCH, n), group.random(BATCH, n, generator)
    assert e.is_identity()
    assert not g.is_identity()
    for mark in ("", "'", "~"):
        assert torch.equal(e.act(x, mark), x)
    torch.testing.assert_close(e.compose(g).act(x), g.act(x))


def test_writers_and_readers_cancel(group, n, x, generator):
    g = group.random(BATCH, n, generator)
    y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((g.act(x) * g.act(y, "'")).sum((2, 3)), (x * y).sum((2, 3)))


def test_random_elements_differ_over_contexts_and_follow_the_seed(group, n):
    first, same = (group.random(BATCH, n, torch.Generator().manual_seed(3)) for _ in range(2))
    other = group.random(BATCH, n, torch.Generator().manual_seed(4))
    x = torch.arange(1, n + 1, dtype=torch.float64).expand(*BATCH, n)
    assert torch.equal(first.act(x), same.act(x))
    assert not torch.equal(first.act(x), other.act(x))
    assert not torch.equal(first.act(x)[0, 0], first.act(x)[1, 2])


def test_projection_is_the_best_isometry(group, n, generator):
    similarity = torch.randn(n, n, generator=generator, dtype=torch.float64)
    best = group.project(similarity).contract(similarity)
    torch.testing.assert_close(group.best(similarity), best)
    others = [isometry(group, n, generator).contract(similarity) for _ in range(200)]
    assert max(others) <= best + 1e-12
    assert min(others) < best - 1e-3


def test_many_are_projected_at_once(group, n, generator):
    similarity = torch.randn(*BATCH, n, n, generator=generator, dtype=torch.float64)
    together, alone = group.project(similarity), group.project(similarity[1, 2])
    for part, tensor in alone.tensors().items():
        torch.testing.assert_close(together.tensors()[part][1, 2], tensor)
    torch.testing.assert_close(group.best(similarity)[1, 2], group.best(similarity[1, 2]))


def test_projection_finds_a_planted_isometry(group, n, generator):
    planted = isometry(group, n, generator)
    fixed = torch.randn(n, 30, generator=generator, dtype=torch.float64)
    projected = group.project(fixed @ planted.inverse().act(fixed).T)
    torch.testing.assert_close(projected.act(planted.inverse().act(fixed)), fixed)


def test_contraction_is_the_product_with_the_action(group, n, generator):
    g = group.random(BATCH, n, generator)
    a, b = (torch.randn(*BATCH, n, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    similarity = torch.einsum("xyir,xyjr->xyij", a, b)
    torch.testing.assert_close(g.contract(similarity), (a * g.act(b)).sum((2, 3)))
    with_rest = similarity[..., None] * torch.arange(3.0, dtype=torch.float64)
    torch.testing.assert_close(g.contract(with_rest)[..., 2], 2 * g.contract(similarity))


def test_signs_do_not_act_on_diagonal_axes(generator):
    for name in ("signed", "nonzero"):
        group = registry.group(name).element
        g = group.project(*(torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2)))
        gate, up = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
        projected = group.project(up @ g.act(up).T, gate @ g.act(gate, "~").T)
        assert projected.compose(g).is_identity()
        assert torch.equal(g.act(gate, "~"), gate[g.order])


def test_balanced_models_differ_by_an_isometry(group, n, generator):
    """Balancing reduces the effect of any element on writers and readers to that of an isometry."""
    x, y = (torch.randn(*BATCH, n, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    g = group.random(BATCH, n, generator)

    def balanced(x, y):
        c = group.balance(group.moments(x, x), group.moments(y, y))
        torch.testing.assert_close(c.act(c.inverse().act(x)), x)
        return c.act(x), c.act(y, "'")

    (a, u), (b, v) = balanced(x, y), balanced(g.act(x), g.act(y, "'"))
    between = group.project(a @ b.mT + u @ v.mT)
    torch.testing.assert_close(between.act(b), a)
    torch.testing.assert_close(between.act(v, "'"), u)


def test_the_fit_finds_stretches(group, n, generator):
    """The fit finds an element without permutation exactly, and is never worse than the identity."""
    x, y = (torch.randn(*BATCH, n, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    g = group.random(BATCH, n, generator)
    g = g.compose(group.project(g.act(torch.eye(n, dtype=torch.float64).expand(*BATCH, n, n))).inverse())
    b, v = g.inverse().act(x), g.inverse().act(y, "'")

    def sides(p, q):
        return group.moments(p, p), group.moments(p, q), group.moments(q, q)

    exact = group.fit(sides(x, b), sides(y, v))
    torch.testing.assert_close(exact.act(b), x, atol=1e-5, rtol=1e-5)
    other = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    fitted = group.fit(sides(x, other), sides(y, v))
    loss = (x - fitted.act(other)).square().sum() + (y - fitted.act(v, "'")).square().sum()
    assert loss <= (x - other).square().sum() + (y - v).square().sum() + 1e-9


def test_units_without_weights_are_left_alone(group, n):
    nothing = torch.zeros(*BATCH, n, 4, dtype=torch.float64)
    moments = group.moments(nothing, nothing)
    assert group.balance(moments, moments).is_identity()
    assert group.fit((moments,) * 3, (moments,) * 3).is_identity()


def random_relaxed(group, n, generator, **settings):
    """Return a relaxed element with random latents."""
    element = group.relax(BATCH, n, Relaxation(generator=generator, dtype=torch.float64, **settings))
    with torch.no_grad():
        for latent in (*element.permuting, *element.smooth):
            latent += 0.2 * torch.randn(latent.shape, generator=generator, dtype=torch.float64)
        for latent in element.permuting:
            latent += 2 * latent.detach().roll(1, -1)
    return element


@pytest.mark.parametrize("permuting", ["sinkhorn", "straight_through", "kept"])
def test_relaxed_elements_begin_at_the_identity(permuting, group, n, x, generator):
    element = group.relax(BATCH, n, Relaxation(generator=generator, permuting=permuting))
    assert element.hard().is_identity()
    if permuting != "sinkhorn":
        for mark in ("", "'", "~"):
            torch.testing.assert_close(element.soft().act(x, mark), x)


@pytest.mark.parametrize("permuting", ["straight_through", "kept"])
def test_relaxed_elements_act_as_the_exact_ones(permuting, group, n, x, generator):
    """Without doubly stochastic matrices they act like their exact elements, which can be stored."""
    element = random_relaxed(group, n, generator, permuting=permuting)
    hard = group.read(element.hard().tensors(), BATCH, n)
    for mark in ("", "'", "~"):
        torch.testing.assert_close(element.soft().act(x, mark), hard.act(x, mark))


def test_gradients_of_relaxed_elements(group, n, x, generator):
    """By finite differences, for writers and readers; a straight-through element has another gradient by design."""
    element = random_relaxed(group, n, generator, implicit=False)
    latents = (*element.permuting, *element.smooth)
    for mark in ("", "'"):
        assert torch.autograd.gradcheck(lambda *_, mark=mark: element.soft().act(x, mark), latents, fast_mode=True)
    for latent in random_relaxed(group, n, generator, permuting="straight_through").permuting:
        assert latent.requires_grad


def test_gradients_find_what_is_planted(group, n, x, generator):
    """In every group, from writers and readers, and starting at the identity."""
    g = random_relaxed(group, n, generator).hard()
    y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    element = group.relax(BATCH, n, Relaxation(generator=generator, dtype=torch.float64))
    optimizer = torch.optim.Adam([*element.permuting, *element.smooth], lr=0.05)

    def loss(acting):
        pairs = ((acting.act(z, mark), g.act(z, mark)) for z, mark in ((x, ""), (y, "'")))
        return sum((a - b).square().sum() for a, b in pairs)

    start = loss(element.hard())
    for _ in range(400):
        optimizer.zero_grad()
        loss(element.soft()).backward()
        optimizer.step()
    assert loss(element.hard()) < 0.05 * start


def test_what_is_stored_makes_the_element_again(group, n, x, generator):
    g = group.random(BATCH, n, generator)
    assert torch.equal(group.read(g.tensors(), BATCH, n).act(x), g.act(x))
    for part, tensor in g.tensors().items():
        with pytest.raises(ValueError, match=r"\w"):
            group.read({**g.tensors(), part: tensor[0]}, BATCH, n)
        with pytest.raises(ValueError, match=r"\w"):
            group.read({**g.tensors(), part: torch.zeros_like(tensor)}, BATCH, n)


@pytest.mark.parametrize("name", ["orthogonal", "centred", "rotary"])
def test_another_matrix_is_refused(name, generator):
    group = registry.group(name).element
    matrix = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    with pytest.raises(ValueError, match="the matrix"):
        group.read({"matrix": matrix}, (), 2)


@pytest.mark.parametrize("ends", [(1, 1), (1, 1e-3), (1, 1e-8), (1, 0)])
def test_large_polar_factors(ends, generator):
    """Near singular or not, by either method: QᵀM is symmetric and positive for the orthogonal factor Q."""
    n = EIGENVECTORS_FROM + 3
    q, r = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    m = q * torch.linspace(*ends, n, dtype=torch.float64) @ r.mT
    orthogonal = polar_factor(m)
    torch.testing.assert_close(orthogonal @ orthogonal.mT, torch.eye(n, dtype=torch.float64))
    rest = orthogonal.mT @ m
    torch.testing.assert_close(rest, rest.mT)
    assert torch.linalg.eigvalsh(rest).min() > -1e-10
    if ends[1] >= 1e-3:
        torch.testing.assert_close(orthogonal, q @ r.mT, rtol=0, atol=1e-8)


def test_a_centred_rotation_keeps_the_ones_vector(generator):
    group = registry.group("centred").element
    for g in (group.random((), 5, generator), isometry(group, 5, generator)):
        torch.testing.assert_close(g.act(torch.ones(5, dtype=torch.float64)), torch.ones(5, dtype=torch.float64))
    turned = registry.group("orthogonal").element.random((), 5, generator)
    with pytest.raises(ValueError, match="ones-vector"):
        group.read(turned.tensors(), (), 5)


def test_permutations_against_all_permutations(generator):
    permutation = registry.group("permutation").element
    similarity = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    sums = [sum(similarity[i, p].item() for i, p in enumerate(order)) for order in itertools.permutations(range(4))]
    assert permutation.project(similarity).contract(similarity).item() == pytest.approx(max(sums), abs=1e-12)


def test_permutations_move_numbers_of_every_kind():
    permutation = registry.group("permutation").element(torch.tensor([2, 0, 1]))
    for dtype in DTYPES.values():
        x = torch.tensor([[0, 1], [1, 1], [0, 0]]).to(dtype)
        assert permutation.act(x).tolist() == [x.tolist()[i] for i in (2, 0, 1)], dtype
