"""Nested symmetries, decided as units, against every possibility."""

import itertools

import pytest
import torch

from hf_rebasin import Table
from hf_rebasin.alignment.groups.permutation import Element
from hf_rebasin.solving.units import Nested, solve_unit, total_similarity
from hf_rebasin.symmetries.binding import bind


def orders(n):
    return [torch.tensor(p) for p in itertools.permutations(range(n))]


def nested_spec():
    """Heads with units in them, as in attention; query groups and value units side by side, as in Llama's o_proj."""
    rows = {"q": "(kv group), _", "v": "(kv ov), _", "o": "_, (kv group ov')"}
    groups = {"kv": "permutation", "group": "permutation in kv", "ov": "permutation in kv"}
    return bind(Table(rows, groups, {"kv": 2}), {"q": (4, 5), "v": (6, 5), "o": (5, 12)})


def everything(spec):
    """All elements of the unit: an order of 2 kv heads and, in each, of 2 query groups and of 3 value units."""
    inner = [
        {"group": Element(torch.stack(g)), "ov": Element(torch.stack(v))}
        for g in itertools.product(orders(2), repeat=2)
        for v in itertools.product(orders(3), repeat=2)
    ]
    return [{"kv": Element(kv), **elements} for kv in orders(2) for elements in inner]


@pytest.mark.parametrize("seed", range(5))
def test_heads_with_units_are_solved_exactly(seed):
    spec = nested_spec()
    generator = torch.Generator().manual_seed(seed)
    similarity = {
        ("kv", "group"): torch.randn(2, 2, 2, 2, generator=generator, dtype=torch.float64),
        ("kv", "ov"): torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64),
        ("kv",): torch.randn(2, 2, generator=generator, dtype=torch.float64),
    }
    nested = Nested.of(spec, spec.units[0])
    best = max(total_similarity(nested, similarity, elements) for elements in everything(spec))
    assert total_similarity(nested, similarity, solve_unit(nested, similarity)) == pytest.approx(best, abs=1e-12)


def test_the_value_of_a_unit_is_the_product_with_the_moved_tensors(generator):
    spec = nested_spec()
    a, b = (torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    similarity = {("kv", "group", "ov"): torch.einsum("kgor,xyzr->kgoxyz", a, b)}
    for elements in everything(spec)[::37]:
        kv, group, ov = (elements[n].order for n in ("kv", "group", "ov"))
        moved = torch.stack([b[kv[i]][group[i]][:, ov[i]] for i in range(2)])
        nested = Nested.of(spec, spec.units[0])
        assert total_similarity(nested, similarity, elements) == pytest.approx((a * moved).sum().item())


def test_what_is_shared_side_by_side_is_found_by_the_coordinate_loop(generator):
    """A planted order: the groups have features of their own, the value units only what they share with the groups."""
    spec = nested_spec()
    a = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64)
    planted = everything(spec)[101]
    q = torch.randn(2, 2, 9, generator=generator, dtype=torch.float64)
    b, p = torch.empty_like(a), torch.empty_like(q)
    kv, group, ov = (planted[n].order for n in ("kv", "group", "ov"))
    for i in range(2):
        for g in range(2):
            p[kv[i], group[i][g]] = q[i, g]
            for o in range(3):
                b[kv[i], group[i][g], ov[i][o]] = a[i, g, o]
    similarity = {
        ("kv", "group", "ov"): torch.einsum("kgor,xyzr->kgoxyz", a, b),
        ("kv", "group"): torch.einsum("kgr,xyr->kgxy", q, p),
    }
    nested = Nested.of(spec, spec.units[0])
    found = solve_unit(nested, similarity)
    assert all(torch.equal(found[name].order, planted[name].order) for name in planted)


def test_a_held_context_stays_while_what_is_in_it_moves(generator):
    table = Table({"x": "(tile inner), _"}, {"tile": "held", "inner": "permutation in tile"}, {"tile": 2})
    spec = bind(table, {"x": (6, 4)})
    assert spec.units[0].names == ("tile", "inner")
    a = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    b = a.flip(1)
    nested = Nested.of(spec, spec.units[0])
    found = solve_unit(nested, {("tile", "inner"): torch.einsum("tir,xyr->tixy", a, b)})
    assert found["tile"].is_identity()
    assert found["inner"].order.tolist() == [[2, 1, 0], [2, 1, 0]]
