"""Unit tests of the algebra of axes, without any tensor."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rebasin.symmetries.infer.unification import (
    Atom,
    axis_size,
    cut_axis,
    flat_atoms,
    fresh_axis,
    leaf_atoms,
    pin,
    regroup,
    root,
    slice_axis,
    split_axis,
    sum_of,
    summands,
    unify,
)


def shape(axis):
    """The sizes of an axis: a product as a tuple, a sum as a list of tuples."""
    return tuple([shape(part) for part in summands(a)] if a.parts is not None else a.size for a in flat_atoms(axis))


def free(axis, at=0):
    """`{(first index, step): atom}` for the leaves that may move."""
    atoms, step = {}, axis_size(axis)
    for atom in flat_atoms(axis):
        step //= atom.size
        for part in summands(atom):
            atoms |= {(step, *position): a for position, a in free(part, at).items()}
            at += axis_size(part) * step
        if atom.parts is None and atom.pin is None:
            atoms[at, step] = id(atom)
    return atoms


def same(x, y):
    return [id(a) for a in leaf_atoms(x)] == [id(a) for a in leaf_atoms(y)]


def test_equal_sizes_are_one_atom():
    x, y = fresh_axis(6), fresh_axis(6)
    unify(x, y, "mm")
    assert same(x, y)
    assert all(atom.pin is None for atom in leaf_atoms(x))


def test_a_leaf_is_refined_by_a_product():
    x, y = fresh_axis(12), (*fresh_axis(3), *fresh_axis(4))
    unify(x, y, "add")
    assert same(x, y)
    assert shape(x) == (3, 4)


def test_products_refine_each_other():
    x, y = (*fresh_axis(6), *fresh_axis(4)), (*fresh_axis(2), *fresh_axis(12))
    unify(x, y, "add")
    assert same(x, y)
    assert shape(x) == (2, 3, 4)


def test_factors_that_do_not_fit_are_pinned():
    x, y = (*fresh_axis(4), *fresh_axis(3)), (*fresh_axis(3), *fresh_axis(4))
    unify(x, y, "add in here")
    assert all("add in here" in atom.pin for atom in (*leaf_atoms(x), *leaf_atoms(y)))


def test_sums_are_cut_alike():
    x, y = sum_of([fresh_axis(3), fresh_axis(5)]), sum_of([fresh_axis(3), fresh_axis(2), fresh_axis(3)])
    unify(x, y, "add")
    assert same(x, y)
    assert shape(x) == ([(3,), (2,), (3,)],)


def test_a_leaf_becomes_a_sum_and_pins_go_into_its_parts():
    x, y = fresh_axis(8), sum_of([fresh_axis(3), fresh_axis(5)])
    unify(x, y, "add")
    pin(x, "an output")
    assert [atom.pin for atom in leaf_atoms(y)] == ["an output"] * 2


def test_the_first_reason_is_kept():
    x = fresh_axis(4)
    pin(x, "first")
    pin(x, "second")
    assert x[0].pin == "first"


def test_a_pin_spreads_through_unification_in_either_order():
    for i, j in ((0, 1), (1, 0)):
        pair = [fresh_axis(4), fresh_axis(4, "held")]
        unify(pair[i], pair[j], "add")
        assert [atom.pin for atom in leaf_atoms(pair[0])] == ["held"]


def test_a_product_is_cut_at_its_outermost_factor():
    outer, inner = fresh_axis(5), fresh_axis(3)
    left, right = cut_axis((*outer, *inner), 6)
    assert shape(left) == (2, 3)
    assert shape(right) == (3, 3)
    assert shape((*outer, *inner)) == ([(2,), (3,)], 3)
    assert cut_axis((*outer, *inner), 7) is None


def test_a_slice_across_a_boundary_is_pinned():
    axis = (*fresh_axis(4), *fresh_axis(3))
    part = slice_axis(axis, 1, 5, "slice in here")
    assert axis_size(part) == 4
    assert all(atom.pin for atom in leaf_atoms(axis))


def test_blocks_taken_for_rows_share_their_inner_axis():
    parts = [fresh_axis(4) for _ in range(3)]
    outer, inner = split_axis(sum_of(parts), 3, "view")
    assert same(inner, parts[0])
    assert same(parts[0], parts[2])
    assert all(atom.pin for atom in leaf_atoms(outer))


def test_unequal_blocks_share_their_inner_axis():
    """[8·2 | 2·2] seen as (10, 2): [8 | 2] outside, one inner axis."""
    parts = [fresh_axis(16), fresh_axis(4)]
    outer, inner = split_axis(sum_of(parts), 10, "view")
    assert shape(outer) == ([(8,), (2,)],)
    assert shape(inner) == (2,)
    assert flat_atoms(parts[0])[-1] is flat_atoms(parts[1])[-1]


def test_views_keep_atoms_in_order():
    a, b, c = fresh_axis(4), fresh_axis(6), fresh_axis(5)
    axes = regroup([a, b, c], [8, 3, 5], "view")
    assert [shape(axis) for axis in axes] == [(4, 2), (3,), (5,)]
    back = regroup(axes, [4, 6, 5], "view")
    assert all(same(x, y) for x, y in zip(back, [a, b, c], strict=True))


def test_a_view_that_splits_nothing_evenly_pins():
    a, b = fresh_axis(4), fresh_axis(9)
    axes = regroup([a, b], [6, 6], "view in here")
    assert [axis_size(axis) for axis in axes] == [6, 6]
    assert all("view in here" in atom.pin for atom in (*leaf_atoms(a), *leaf_atoms(b)))


def test_shifting_an_axis_against_itself_ends():
    axis = fresh_axis(3000)
    unify(slice_axis(axis, 1, 3000, "slice"), slice_axis(axis, 0, 2999, "slice"), "sub in here")
    assert any("shifts an axis against itself" in (atom.pin or "") for atom in leaf_atoms(axis))


SIZES = st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3)


@st.composite
def axes_of_one_size(draw):
    sizes = draw(SIZES)

    def axis():
        order = draw(st.permutations(sizes))
        product = tuple(atom for n in order for atom in fresh_axis(n))
        if draw(st.booleans()) and axis_size(product) > 2:
            at = draw(st.integers(1, axis_size(product) - 1))
            return sum_of([fresh_axis(at), fresh_axis(axis_size(product) - at)])
        return product

    return [axis() for _ in range(draw(st.integers(2, 4)))]


@settings(max_examples=300, deadline=None)
@given(axes_of_one_size())
def test_unified_axes_move_together_or_not_at_all(axes):
    """After unification the same atoms are free in every axis, at the same positions."""
    for x, y in itertools.pairwise(axes):
        unify(x, y, "add")
    for axis in axes:
        assert axis_size(flat_atoms(axis)) == axis_size(axes[0])
        assert all(root(atom) is atom for atom in flat_atoms(axis))
        assert free(axis) == free(axes[0])


def test_an_atom_has_no_other_state():
    with pytest.raises(AttributeError):
        Atom(3).colour = "red"
