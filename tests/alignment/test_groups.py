"""Laws over every registered group. A new file in hf_rebasin/alignment/groups/ is picked up by itself."""

import itertools

import pytest
import torch

from hf_rebasin import registry
from hf_rebasin.alignment.elements.matrices import LARGE, polar
from hf_rebasin.alignment.elements.relaxation import Softening
from hf_rebasin.checkpoints.tensor_files import DTYPES

BATCH = (2, 3)


@pytest.fixture(params=registry.names("groups"))
def group(request):
    return registry.find("groups", request.param).Element


@pytest.fixture
def n(group):
    return 2 if group.__module__.endswith("rotary") else 5


@pytest.fixture
def x(generator, n):
    return torch.randn(*BATCH, n, 4, generator=generator, dtype=torch.float64)


def isometry(group, n, generator, batch=()):
    """An element that keeps lengths, and is its own dual."""
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
    one, same = (group.random(BATCH, n, torch.Generator().manual_seed(3)) for _ in range(2))
    other = group.random(BATCH, n, torch.Generator().manual_seed(4))
    x = torch.arange(1, n + 1, dtype=torch.float64).expand(*BATCH, n)
    assert torch.equal(one.act(x), same.act(x))
    assert not torch.equal(one.act(x), other.act(x))
    assert not torch.equal(one.act(x)[0, 0], one.act(x)[1, 2])


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
    found = group.project(fixed @ planted.inverse().act(fixed).T)
    torch.testing.assert_close(found.act(planted.inverse().act(fixed)), fixed)


def test_contraction_is_the_product_with_the_action(group, n, generator):
    g = group.random(BATCH, n, generator)
    a, b = (torch.randn(*BATCH, n, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    similarity = torch.einsum("xyir,xyjr->xyij", a, b)
    torch.testing.assert_close(g.contract(similarity), (a * g.act(b)).sum((2, 3)))
    with_rest = similarity[..., None] * torch.arange(3.0, dtype=torch.float64)
    torch.testing.assert_close(g.contract(with_rest)[..., 2], 2 * g.contract(similarity))


def test_signs_do_not_reach_what_is_diagonal(generator):
    for name in ("signed", "nonzero"):
        group = registry.find("groups", name).Element
        g = group.project(*(torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2)))
        gate, up = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
        found = group.project(up @ g.act(up).T, gate @ g.act(gate, "~").T)
        assert found.compose(g).is_identity()
        assert torch.equal(g.act(gate, "~"), gate[g.order])


def test_balanced_models_differ_by_an_isometry(group, n, generator):
    """Whatever an element of the group did to writers and readers, balancing leaves what keeps lengths of it."""
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


def test_the_fit_finds_what_stretched(group, n, generator):
    """Of an element near the identity, all but what permutes; and never anything worse than the identity."""
    x, y = (torch.randn(*BATCH, n, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    g = group.random(BATCH, n, generator)
    g = g.compose(group.project(g.act(torch.eye(n, dtype=torch.float64).expand(*BATCH, n, n))).inverse())
    b, v = g.inverse().act(x), g.inverse().act(y, "'")

    def sides(p, q):
        return group.moments(p, p), group.moments(p, q), group.moments(q, q)

    found = group.fit(sides(x, b), sides(y, v))
    torch.testing.assert_close(found.act(b), x, atol=1e-5, rtol=1e-5)
    other = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    fitted = group.fit(sides(x, other), sides(y, v))
    loss = (x - fitted.act(other)).square().sum() + (y - fitted.act(v, "'")).square().sum()
    assert loss <= (x - other).square().sum() + (y - v).square().sum() + 1e-9


def test_what_has_no_weights_is_left_alone(group, n):
    nothing = torch.zeros(*BATCH, n, 4, dtype=torch.float64)
    moments = group.moments(nothing, nothing)
    assert group.balance(moments, moments).is_identity()
    assert group.fit((moments,) * 3, (moments,) * 3).is_identity()


def relaxed(group, n, generator, **knobs):
    """A relaxed element, its latents random."""
    found = group.relax(BATCH, n, Softening(generator, dtype=torch.float64, **knobs))
    with torch.no_grad():
        for latent in (*found.permuting, *found.smooth):
            latent += 0.2 * torch.randn(latent.shape, generator=generator, dtype=torch.float64)
        for latent in found.permuting:
            latent += 2 * latent.detach().roll(1, -1)
    return found


@pytest.mark.parametrize("permuting", ["sinkhorn", "straight_through", "kept"])
def test_relaxed_elements_begin_at_the_identity(permuting, group, n, x, generator):
    found = group.relax(BATCH, n, Softening(generator, permuting))
    assert found.hard().is_identity()
    if permuting != "sinkhorn":
        for mark in ("", "'", "~"):
            torch.testing.assert_close(found.soft().act(x, mark), x)


@pytest.mark.parametrize("permuting", ["straight_through", "kept"])
def test_relaxed_elements_act_as_the_exact_ones(permuting, group, n, x, generator):
    """Where nothing is doubly stochastic; and what is exact is an element that can be stored."""
    found = relaxed(group, n, generator, permuting=permuting)
    hard = group.read(found.hard().tensors(), BATCH, n)
    for mark in ("", "'", "~"):
        torch.testing.assert_close(found.soft().act(x, mark), hard.act(x, mark))


def test_gradients_of_relaxed_elements(group, n, x, generator):
    """By finite differences, for every mark; a straight-through element has those of a matrix of free numbers."""
    found = relaxed(group, n, generator, implicit=False)
    latents = (*found.permuting, *found.smooth)
    for mark in ("", "'"):
        assert torch.autograd.gradcheck(lambda *_, mark=mark: found.soft().act(x, mark), latents, fast_mode=True)
    for latent in relaxed(group, n, generator, permuting="straight_through").permuting:
        assert latent.requires_grad


def test_gradients_find_what_is_planted(group, n, x, generator):
    """In every group, from writers and readers; from the identity, which is elsewhere."""
    g = relaxed(group, n, generator).hard()
    y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = group.relax(BATCH, n, Softening(generator, dtype=torch.float64))
    optimizer = torch.optim.Adam([*found.permuting, *found.smooth], lr=0.05)

    def loss(acting):
        pairs = ((acting.act(z, mark), g.act(z, mark)) for z, mark in ((x, ""), (y, "'")))
        return sum((a - b).square().sum() for a, b in pairs)

    start = loss(found.hard())
    for _ in range(400):
        optimizer.zero_grad()
        loss(found.soft()).backward()
        optimizer.step()
    assert loss(found.hard()) < 0.05 * start


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
    group = registry.find("groups", name).Element
    matrix = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    with pytest.raises(ValueError, match="the matrix"):
        group.read({"matrix": matrix}, (), 2)


@pytest.mark.parametrize("ends", [(1, 1), (1, 1e-3), (1, 1e-8), (1, 0)])
def test_large_polar_factors(ends, generator):
    """Near singular or not, and by whichever way: orthogonal, and what is left of M is symmetric and positive."""
    n = LARGE + 3
    q, r = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    m = q * torch.linspace(*ends, n, dtype=torch.float64) @ r.mT
    found = polar(m)
    torch.testing.assert_close(found @ found.mT, torch.eye(n, dtype=torch.float64))
    rest = found.mT @ m
    torch.testing.assert_close(rest, rest.mT)
    assert torch.linalg.eigvalsh(rest).min() > -1e-10
    if ends[1] >= 1e-3:
        torch.testing.assert_close(found, q @ r.mT, rtol=0, atol=1e-8)


def test_a_centred_rotation_keeps_the_ones_vector(generator):
    group = registry.find("groups", "centred").Element
    for g in (group.random((), 5, generator), isometry(group, 5, generator)):
        torch.testing.assert_close(g.act(torch.ones(5, dtype=torch.float64)), torch.ones(5, dtype=torch.float64))
    turned = registry.find("groups", "orthogonal").Element.random((), 5, generator)
    with pytest.raises(ValueError, match="ones-vector"):
        group.read(turned.tensors(), (), 5)


def test_permutations_against_all_permutations(generator):
    permutation = registry.find("groups", "permutation").Element
    similarity = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    every = [sum(similarity[i, p].item() for i, p in enumerate(order)) for order in itertools.permutations(range(4))]
    assert permutation.project(similarity).contract(similarity).item() == pytest.approx(max(every), abs=1e-12)


def test_permutations_move_numbers_of_every_kind():
    permutation = registry.find("groups", "permutation").Element(torch.tensor([2, 0, 1]))
    for dtype in DTYPES.values():
        x = torch.tensor([[0, 1], [1, 1], [0, 0]]).to(dtype)
        assert permutation.act(x).tolist() == [x.tolist()[i] for i in (2, 0, 1)], dtype
