"""The algebra of axes, without any tensor."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rebasin.symmetries.infer.unification import (
    Atom,
    cut,
    flat,
    fresh,
    leaves,
    parts_of,
    piece,
    pin,
    regroup,
    root,
    size_of,
    split_axis,
    sum_of,
    unify,
)


def shape(axis):
    """An axis as sizes: a product as a tuple, a sum as a list of such."""
    return tuple([shape(part) for part in parts_of(a)] if a.parts is not None else a.size for a in flat(axis))


def free(axis, at=0):
    """{(first index, step): atom} of the leaves that may move."""
    found, step = {}, size_of(axis)
    for atom in flat(axis):
        step //= atom.size
        for part in parts_of(atom):
            found |= {(step, *where): a for where, a in free(part, at).items()}
            at += size_of(part) * step
        if atom.parts is None and atom.pin is None:
            found[at, step] = id(atom)
    return found


def same(x, y):
    return [id(a) for a in leaves(x)] == [id(a) for a in leaves(y)]


def test_equal_sizes_are_one_atom():
    x, y = fresh(6), fresh(6)
    unify(x, y, "mm")
    assert same(x, y)
    assert all(atom.pin is None for atom in leaves(x))


def test_a_leaf_is_refined_by_a_product():
    x, y = fresh(12), (*fresh(3), *fresh(4))
    unify(x, y, "add")
    assert same(x, y)
    assert shape(x) == (3, 4)


def test_products_refine_each_other():
    x, y = (*fresh(6), *fresh(4)), (*fresh(2), *fresh(12))
    unify(x, y, "add")
    assert same(x, y)
    assert shape(x) == (2, 3, 4)


def test_what_does_not_fit_is_pinned():
    x, y = (*fresh(4), *fresh(3)), (*fresh(3), *fresh(4))
    unify(x, y, "add in here")
    assert all("add in here" in atom.pin for atom in (*leaves(x), *leaves(y)))


def test_sums_are_cut_alike():
    x, y = sum_of([fresh(3), fresh(5)]), sum_of([fresh(3), fresh(2), fresh(3)])
    unify(x, y, "add")
    assert same(x, y)
    assert shape(x) == ([(3,), (2,), (3,)],)


def test_a_leaf_becomes_a_sum_and_pins_go_into_its_parts():
    x, y = fresh(8), sum_of([fresh(3), fresh(5)])
    unify(x, y, "add")
    pin(x, "an output")
    assert [atom.pin for atom in leaves(y)] == ["an output"] * 2


def test_the_first_reason_is_kept():
    x = fresh(4)
    pin(x, "one")
    pin(x, "two")
    assert x[0].pin == "one"


def test_a_pin_spreads_through_unification_in_either_order():
    for order in ((0, 1), (1, 0)):
        pair = [fresh(4), fresh(4, "held")]
        unify(pair[order[0]], pair[order[1]], "add")
        assert [atom.pin for atom in leaves(pair[0])] == ["held"]


def test_a_product_is_cut_at_its_outermost_factor():
    outer, inner = fresh(5), fresh(3)
    left, right = cut((*outer, *inner), 6)
    assert shape(left) == (2, 3)
    assert shape(right) == (3, 3)
    assert shape((*outer, *inner)) == ([(2,), (3,)], 3)
    assert cut((*outer, *inner), 7) is None


def test_a_piece_across_a_boundary_is_pinned():
    axis = (*fresh(4), *fresh(3))
    got = piece(axis, 1, 5, "slice in here")
    assert size_of(got) == 4
    assert all(atom.pin for atom in leaves(axis))


def test_blocks_taken_for_rows_share_their_inner_axis():
    parts = [fresh(4) for _ in range(3)]
    outer, inner = split_axis(sum_of(parts), 3, "view")
    assert same(inner, parts[0])
    assert same(parts[0], parts[2])
    assert all(atom.pin for atom in leaves(outer))


def test_unequal_blocks_share_what_is_inside():
    """[8·2 | 2·2] seen as (10, 2): [8 | 2] outside, one inner axis."""
    parts = [fresh(16), fresh(4)]
    outer, inner = split_axis(sum_of(parts), 10, "view")
    assert shape(outer) == ([(8,), (2,)],)
    assert shape(inner) == (2,)
    assert flat(parts[0])[-1] is flat(parts[1])[-1]


def test_views_keep_atoms_in_order():
    a, b, c = fresh(4), fresh(6), fresh(5)
    axes = regroup([a, b, c], [8, 3, 5], "view")
    assert [shape(axis) for axis in axes] == [(4, 2), (3,), (5,)]
    back = regroup(axes, [4, 6, 5], "view")
    assert all(same(x, y) for x, y in zip(back, [a, b, c], strict=True))


def test_a_view_that_splits_nothing_evenly_pins():
    a, b = fresh(4), fresh(9)
    axes = regroup([a, b], [6, 6], "view in here")
    assert [size_of(axis) for axis in axes] == [6, 6]
    assert all("view in here" in atom.pin for atom in (*leaves(a), *leaves(b)))


def test_shifting_an_axis_against_itself_ends():
    axis = fresh(3000)
    unify(piece(axis, 1, 3000, "slice"), piece(axis, 0, 2999, "slice"), "sub in here")
    assert any("shifts an axis against itself" in (atom.pin or "") for atom in leaves(axis))


SIZES = st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3)


@st.composite
def axes_of_one_size(draw):
    sizes = draw(SIZES)

    def axis():
        order = draw(st.permutations(sizes))
        made = tuple(atom for n in order for atom in fresh(n))
        if draw(st.booleans()) and size_of(made) > 2:
            at = draw(st.integers(1, size_of(made) - 1))
            return sum_of([fresh(at), fresh(size_of(made) - at)])
        return made

    return [axis() for _ in range(draw(st.integers(2, 4)))]


@settings(max_examples=300, deadline=None)
@given(axes_of_one_size())
def test_what_is_unified_moves_together_or_not_at_all(axes):
    """Afterwards what is free in one axis is free in the other, at the same place."""
    for x, y in itertools.pairwise(axes):
        unify(x, y, "add")
    for axis in axes:
        assert size_of(flat(axis)) == size_of(axes[0])
        assert all(root(atom) is atom for atom in flat(axis))
        assert free(axis) == free(axes[0])


def test_an_atom_has_no_other_state():
    with pytest.raises(AttributeError):
        Atom(3).colour = "red"
