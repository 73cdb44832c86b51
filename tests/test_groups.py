"""Laws over every registered group. A new file in hf_rebasin/groups/ is picked up by itself."""

import itertools

import pytest
import torch

from hf_rebasin import registry

N, BATCH = 5, (2, 3)


@pytest.fixture(params=registry.names("groups"))
def group(request):
    return registry.find("groups", request.param).Element


@pytest.fixture
def x(generator):
    return torch.randn(*BATCH, N, 4, generator=generator, dtype=torch.float64)


def test_action_composition_and_inverse(group, x, generator):
    g, h = (group.random(BATCH, N, generator) for _ in range(2))
    for mark in ("", "'"):
        torch.testing.assert_close(h.compose(g).act(x, mark), h.act(g.act(x, mark), mark))
        torch.testing.assert_close(g.inverse().act(g.act(x, mark), mark), x)
        assert not torch.equal(g.act(x, mark), x)


def test_the_identity(group, x, generator):
    e, g = group.identity(BATCH, N), group.random(BATCH, N, generator)
    assert e.is_identity()
    assert not g.is_identity()
    assert torch.equal(e.act(x), x)
    torch.testing.assert_close(e.compose(g).act(x), g.act(x))


def test_writers_and_readers_cancel(group, x, generator):
    g = group.random(BATCH, N, generator)
    y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((g.act(x) * g.act(y, "'")).sum((2, 3)), (x * y).sum((2, 3)))


def test_random_elements_differ_over_contexts_and_follow_the_seed(group):
    one, same = (group.random(BATCH, N, torch.Generator().manual_seed(3)) for _ in range(2))
    other = group.random(BATCH, N, torch.Generator().manual_seed(4))
    x = torch.arange(N, dtype=torch.float64).expand(*BATCH, N)
    assert torch.equal(one.act(x), same.act(x))
    assert not torch.equal(one.act(x), other.act(x))
    assert not torch.equal(one.act(x)[0, 0], one.act(x)[1, 2])


def test_projection_is_the_best_element(group, generator):
    similarity = torch.randn(N, N, generator=generator, dtype=torch.float64)
    best = group.project(similarity).contract(similarity)
    assert all(group.random((), N, generator).contract(similarity) <= best + 1e-12 for _ in range(200))


def test_projection_finds_a_planted_element(group, generator):
    planted = group.random((), N, generator)
    fixed = torch.randn(N, 30, generator=generator, dtype=torch.float64)
    found = group.project(fixed @ planted.inverse().act(fixed).T)
    torch.testing.assert_close(found.act(planted.inverse().act(fixed)), fixed)


def test_contraction_is_the_product_with_the_action(group, generator):
    g = group.random(BATCH, N, generator)
    a, b = (torch.randn(*BATCH, N, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    similarity = torch.einsum("xyir,xyjr->xyij", a, b)
    torch.testing.assert_close(g.contract(similarity), (a * g.act(b)).sum((2, 3)))
    with_rest = similarity[..., None] * torch.arange(3.0, dtype=torch.float64)
    torch.testing.assert_close(g.contract(with_rest)[..., 2], 2 * g.contract(similarity))


def test_what_is_stored_makes_the_element_again(group, x, generator):
    g = group.random(BATCH, N, generator)
    assert torch.equal(group(**g.tensors()).act(x), g.act(x))


def test_permutations_against_all_permutations(generator):
    permutation = registry.find("groups", "permutation").Element
    similarity = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    every = [sum(similarity[i, p].item() for i, p in enumerate(order)) for order in itertools.permutations(range(4))]
    assert permutation.project(similarity).contract(similarity).item() == pytest.approx(max(every), abs=1e-12)
