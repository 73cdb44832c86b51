"""Binding rows, sizes, groups and contexts to shapes; errors name the key, shape and row."""

import pytest
import torch

from hf_rebasin import Alignment, Table
from hf_rebasin.alignment.action import act, act_on_tensor
from hf_rebasin.errors import SpecError
from hf_rebasin.symmetries.binding import bind

ROWS = {"0.weight": "hidden, _", "0.bias": "hidden", "1.weight": "_, hidden'"}
SHAPES = {"0.weight": (6, 4), "0.bias": (6,), "1.weight": (3, 6)}


def table(rows=ROWS, groups=None, **fields):
    return Table(rows, groups or {"hidden": "permutation"}, **fields)


def test_sizes_are_solved():
    spec = bind(table(), SHAPES)
    assert spec.symmetries["hidden"].size == 6
    assert spec.units[0].names == ("hidden",)


def test_composites_sums_and_offsets():
    """Rows [q | k | v], each heads × units, as in a fused projection."""
    rows = {"qkv": "(head qk) + (head qk') + (head ov), _", "o": "_, (head ov')"}
    groups = {"head": "permutation", "qk": "invertible in head", "ov": "invertible in head"}
    with pytest.raises(SpecError, match="leaves ov, qk open"):
        bind(Table({"qkv": rows["qkv"]}, groups, {"head": 2}), {"qkv": (22, 7)})
    spec = bind(Table(rows, groups, {"head": 2}), {"qkv": (22, 7), "o": (7, 10)})
    assert (spec.symmetries["ov"].size, spec.symmetries["qk"].size) == (5, 3)
    assert [block.offset for block in spec.tensors[0].blocks] == [0, 6 * 7, 12 * 7]
    assert [[d.stride for d in block.dims] for block in spec.tensors[0].blocks] == [[21, 7, 1], [21, 7, 1], [35, 7, 1]]


def test_blocks_tile_their_tensor():
    """Per-head interleaved rows (head (a + b)): strided views, every element in exactly one block."""
    spec = bind(
        Table({"x": "(head (a + b)), _", "y": "a", "z": "b"}, {"head": "permutation", "a": "held", "b": "held"}),
        {"x": (15, 2), "y": (2,), "z": (3,)},
    )
    count = torch.zeros(15, 2)
    for block in spec.tensors[0].blocks:
        block.view(count).add_(1)
    assert torch.equal(count, torch.ones(15, 2))


def test_a_block_of_a_slice_is_at_its_place():
    spec = bind(table(), SHAPES)
    whole = torch.arange(60.0).reshape(10, 6)
    part = whole[2:8].reshape(-1)[:24].reshape(6, 4)
    assert torch.equal(spec.tensors[0].blocks[0].view(part), part)


def test_keys_can_be_an_axis():
    """Experts are keys: the expert order is a symmetry, and the units of an expert move with it."""
    rows = {"gate": "expert, _", "experts.<expert>.up": "ff, _", "experts.<expert>.down": "_, ff'"}
    groups = {"expert": "permutation", "ff": "permutation in expert"}
    shapes = {"gate": (3, 4)} | {
        f"experts.{i}.{w}": s for i in range(3) for w, s in (("up", (5, 4)), ("down", (4, 5)))
    }
    spec = bind(Table(rows, groups), shapes)
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    g = Alignment.random(spec, torch.Generator().manual_seed(1))
    moved = act(spec, g.elements, state)
    expert, ff = g["expert"].order, g["ff"].order
    for i in range(3):
        assert torch.equal(moved["gate"][i], state["gate"][expert[i]])
        assert torch.equal(moved[f"experts.{i}.up"], state[f"experts.{expert[i]}.up"][ff[i]])
    back = act(spec, g.inverse().elements, moved)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert bind(spec.table, shapes).symmetries == spec.symmetries, "a bound table keeps its key axes"


def test_ties_must_name_the_same_axes():
    rows = {"in": "vocab, stream", "out": "vocab, stream'"}
    groups = {"vocab": "held", "stream": "permutation"}
    bind(Table(rows, groups), {"in": (9, 4)}, {"out": "in"})
    with pytest.raises(SpecError, match=r"out is tied to in \(9, 4\), but their rows differ: 'vocab, other'"):
        bind(Table(rows | {"out": "vocab, other'"}, groups | {"other": "permutation"}), {"in": (9, 4)}, {"out": "in"})


def test_a_norm_without_readers_holds_its_stream():
    rows = {"embed": "_, stream", "norm.weight": "stream~", "head.weight": "_, stream'"}
    normed = Table(rows, {"stream": "orthogonal"}, norms={"norm": "head"})
    shapes = {"embed": (9, 4), "norm.weight": (4,)}
    assert bind(normed, shapes).symmetries["stream"].kind == "held"
    assert bind(normed, shapes | {"head.weight": (2, 4)}).symmetries["stream"].kind == "orthogonal"


@pytest.mark.parametrize(
    ("given", "shapes", "says"),
    [
        (table(), SHAPES | {"0.wieght": (6, 4)}, r"no row for 0.wieght \(6, 4\); the nearest one is '0.weight'"),
        (
            table({"*.weight": "_, _", "0.*": "_, _"}),
            {"0.0": (1, 1), "0.weight": (6, 4)},
            None,
        ),
        (table({"a.*.b": "_", "a.*.*": "_"}), {"a.1.2": (3,)}, None),
        (table({"a.*.0": "_", "a.0.*": "_"}), {"a.0.0": (3,)}, r"a.0.0 \(3,\): 2 rows match equally well"),
        (
            table(),
            SHAPES | {"0.bias": (6, 1)},
            r"0.bias \(6, 1\): row '0.bias' has 1 axes \('hidden'\), but the tensor 2",
        ),
        (
            table(),
            SHAPES | {"0.bias": (5,)},
            r"0.bias axis 0: 'hidden' is 6 with hidden = 6, but the tensor has 5",
        ),
        (
            table(ROWS | {"x": "(hidden _)"}),
            SHAPES | {"x": (13,)},
            r"x axis 0: '\(hidden _\)' = 13 has no integer solution for _: 13 - 0 = 13 is not a multiple of 6; row 'x",
        ),
        (
            table(ROWS | {"x": "(a b)"}, {"*": "held", "hidden": "permutation", "a": "held", "b": "held"}),
            SHAPES | {"x": (6,)},
            r"sizes cannot be solved.*\n  x axis 0: '\(a b\)' = 6 leaves a, b open; row 'x'",
        ),
        (
            table(ROWS | {"x": "hiden"}),
            SHAPES | {"x": (6,)},
            r"x \(6,\): axis 'hiden' has no group; did you mean 'hidden'\?; row 'x'",
        ),
        (
            table(groups={"hidden": "permutatoin"}),
            SHAPES,
            "group of 'hidden' is 'permutatoin'.*did you mean 'permutation'",
        ),
        (
            table({"x.*": "a.*.*"}, {"a.*.*": "held"}),
            {"x.1": (3,)},
            r"x.1 \(3,\): axis 'a.\*.\*' has 2 stars, but its key only 1; row 'x.\*'",
        ),
        (
            table(ROWS | {"0.{bias,x}": "hidden"}),
            SHAPES,
            r"row '0.bias' is written twice: in '0.bias' and in '0.\{bias,x\}'",
        ),
        (table(ROWS | {"x": "a b"}), SHAPES, r"row 'x': a composite axis needs parentheses"),
        (
            table(ROWS | {"x": "inner"}, {"hidden": "permutation", "inner": "permutation in hidden"}),
            SHAPES | {"x": (2,)},
            r"x \(2,\): 'inner' is declared in 'hidden', but row 'x' has it without 'hidden'",
        ),
        (table({"x": "a"}, {"a": "permutation in b"}), {"x": (2,)}, "'a' is declared in 'b', which no tensor has"),
        (
            table({"x": "(a b)", "y": "b"}, {"b": "orthogonal", "a": "permutation in b"}),
            {"x": (4,), "y": (2,)},
            "mixes its items",
        ),
        (
            table({"x": "(a b)", "y": "b"}, {"b": "permutation in a", "a": "permutation in b"}),
            {"x": (4,), "y": (2,)},
            "form a cycle",
        ),
        (
            table({"e.<n>.x": "_"}, {"n": "held"}),
            {"e.0.x": (2,), "e.2.x": (2,)},
            r"row 'e.<n>.x': no key for \{'n': 1\}",
        ),
        (table({"e.<n>.x": "_"}, {"n": "held"}), {"e.0.x": (2,), "e.1.x": (3,)}, "have different shapes"),
        (
            table({"e": "_, s", "r.weight": "_, s'"}, {"s": "orthogonal"}),
            {"e": (9, 4), "r.weight": (2, 4)},
            r"r.weight \(2, 4\) reads the orthogonal stream 's' \(row 'r.weight'\); exactly one norm must name it",
        ),
    ],
)
def test_errors_name_key_shape_and_row(given, shapes, says):
    if says is None:  # the control: the row with fewer wildcards wins, and nothing is wrong
        bind(given, shapes)
        return
    with pytest.raises(SpecError, match=says):
        bind(given, shapes)


@pytest.mark.parametrize(
    ("rows", "groups", "sizes", "shapes"),
    [
        (
            {"r": "expert, _", "e.<expert>.up": "ff + gg, _", "e.<expert>.down": "_, ff' + gg'"},
            {"expert": "permutation", "ff": "permutation in expert", "gg": "permutation in expert"},
            {"ff": 4, "gg": 2},
            {"r": (3, 2), "up": (6, 2), "down": (2, 6)},
        ),
        (
            {"r": "expert, _", "e.<expert>.up": "3 + gg, _", "e.<expert>.down": "_, 3 + gg'"},
            {"expert": "permutation", "gg": "permutation in expert"},
            {},
            {"r": (3, 2), "up": (6, 2), "down": (2, 6)},
        ),
        (
            {"r": "(group expert), _", "e.<expert>.up": "group, ff, _", "e.<expert>.down": "group, _, ff'"},
            {"group": "permutation", "expert": "permutation in group", "ff": "permutation in expert group"},
            {"group": 2},
            {"r": (6, 2), "up": (2, 5, 2), "down": (2, 2, 5)},
        ),
    ],
)
def test_acting_on_one_key_is_acting_on_all_of_them(rows, groups, sizes, shapes):
    """With blocks that depend on the key in different ways, and keys whose order depends on an axis inside them."""
    shapes = {"r": shapes["r"]} | {f"e.{i}.{w}": shapes[w] for i in range(3) for w in ("up", "down")}
    spec = bind(Table(rows, groups, sizes), shapes)
    state = {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}
    for seed in range(5):
        g = Alignment.random(spec, torch.Generator().manual_seed(seed))
        moved = act(spec, g.elements, state)
        for tensor in spec.tensors:
            together = act_on_tensor(spec, g.elements, tensor, tensor.gather(state))
            for index, key in tensor.keys.items():
                assert torch.equal(moved[key], together[index] if index else together)
        back = act(spec, g.inverse().elements, moved)
        assert all(torch.equal(back[key], state[key]) for key in state)
