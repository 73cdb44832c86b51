"""Groups larger than permutations, inferred from the forward pass: they keep the function, and none is invented."""

import copy
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import TINY, infer_or_skip
from hypothesis import assume
from test_inference import EXAMPLES, IDS, SEQUENCE, L, Net, P, over_random_modules
from test_marks import unit_norms
from test_tables_and_inference import SCALED_SOMEWHERE
from torch import nn
from torch.nn import functional as F

from hf_rebasin import Alignment, Checkpoint, infer_spec, spec_for
from hf_rebasin.alignment.action import act
from hf_rebasin.alignment.exactness import compute_outputs, example_inputs
from hf_rebasin.checkpoints.canonical import CanonicalView
from hf_rebasin.symmetries.binding import bind_to
from hf_rebasin.symmetries.detection import render_spec
from hf_rebasin.symmetries.infer.spec_file import _load_text
from hf_rebasin.symmetries.patterns import READER, leaves, parse_pattern
from hf_rebasin.symmetries.table import Table

LARGER = {"invertible", "orthogonal", "centred"}


def larger_groups(spec):
    """The symmetries whose groups are larger than permutations, with these groups."""
    return {name: s.group for name, s in spec.symmetries.items() if s.kind in LARGER}


def relative_change(model, inputs, spec, seed=0):
    """Move a model by a random element of every group; return the relative change of its outputs, and its bound."""
    checkpoint, prefix = Checkpoint.open(model), spec.table.prefix
    elements = Alignment.random(spec, torch.Generator().manual_seed(seed)).elements
    view = CanonicalView(checkpoint, prefix)
    moved = view.with_state(act(spec, elements, view.state)).model()
    before, float32_inside = compute_outputs(model, inputs)
    after, _ = compute_outputs(moved, inputs)
    return ((before - after).abs().max() / before.abs().max()).item(), 1e-5 if float32_inside else 1e-10


# --- inferred groups keep the function ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TINY))
def test_the_inferred_groups_keep_the_function(name):
    model = unit_norms(TINY[name])
    inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
    relative, bound = relative_change(model, inputs, infer_or_skip(TINY[name]))  # inference sees no weights
    assert relative <= bound


@pytest.mark.parametrize("name", zoo.HF | zoo.MODULES)
def test_the_groups_inferred_in_the_zoo_keep_the_function(name):
    family = (zoo.HF | zoo.MODULES)[name]
    model, inputs = unit_norms(family.build()), family.inputs()
    relative, bound = relative_change(model, inputs, infer_spec(model, inputs))
    assert relative <= bound


@EXAMPLES
def test_randomly_composed_modules_keep_their_function_under_matrices(examples):
    larger = []  # number of larger groups: the law would hold for an inference that finds none

    @over_random_modules(examples)
    def law(composed):
        model, inputs = unit_norms(composed[0]), composed[1]
        assume(compute_outputs(model, inputs)[0].abs().max() > 1e-6)  # the mean of a norm's outputs is only rounding
        spec = infer_spec(model, inputs)
        larger.append(len(larger_groups(spec)))
        relative, bound = relative_change(model, inputs, spec)
        message = f"{composed[0].structure}\n{dict(spec.table.rows)}\n{dict(spec.table.groups)}"
        assert relative <= 100 * bound, message

    law()
    assert sum(larger) > 10


@pytest.mark.parametrize(
    "name", ["gpt2-0-GPT2LMHeadModel", "gpt_neox-0-GPTNeoXForCausalLM", "t5-0-T5ForConditionalGeneration"]
)
def test_a_group_that_is_too_large_would_be_detected(name):
    """The outputs change if the units of a hidden layer are declared invertible, or if a mark is left out."""
    model = unit_norms(TINY[name])
    inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
    spec = infer_or_skip(model)
    units = next(n for n in spec.free if spec.symmetries[n].group == "permutation" and "head" not in n)
    wrong = replace(spec.table, groups={**spec.table.groups, units: "invertible"})
    assert relative_change(model, inputs, bind_to(wrong, Checkpoint.open(model)))[0] > 1e-4
    for inner in (n for n in larger_groups(spec) if "qk" in n or "ov" in n):
        rows = {key: row.replace(f"{inner}'", inner) for key, row in spec.table.rows.items()}
        unmarked = bind_to(replace(spec.table, rows=rows), Checkpoint.open(model))
        assert relative_change(model, inputs, unmarked)[0] > 1e-4


# --- the contents of inferred tables ------------------------------------------------------------------------------


STREAMS = {
    "gpt2-0-GPT2LMHeadModel": "centred",
    "vit-0-ViTForImageClassification": "centred",
    "opt-0-OPTForCausalLM": "centred",
    "gpt_neox-0-GPTNeoXForCausalLM": "centred",
    "llama-0-LlamaForCausalLM": "orthogonal",
    "t5-4-T5ForTokenClassification": "orthogonal",
    "t5-0-T5ForConditionalGeneration": "permutation",  # a scale depends on its tied head
    "bert-1-BertForMaskedLM": "permutation",
    "opt-1-OPTForCausalLM": "permutation",
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_rotate_where_only_norms_read_them(name):
    spec = infer_or_skip(TINY[name])
    assert spec.symmetries["residual"].kind == STREAMS[name]
    assert bool(spec.norms) == (STREAMS[name] != "permutation")


def readers(spec):
    """`{gain of a norm: (its bias, its readers)}`"""
    return {norm.gain: (norm.bias, sorted(norm.readers)) for norm in spec.norms}


def test_norms_have_the_readers_that_the_table_gives(tiny):
    """Readers in a glob of the table count only if they read the stream: behind a projection the head does not."""
    spec, table = infer_or_skip(tiny), spec_for(tiny)
    if type(tiny).__name__ in SCALED_SOMEWHERE:
        pytest.skip("whether its stream rotates depends on the version of transformers")
    expected = {}
    for norm in table.norms:
        if table.symmetries[norm.stream].kind in ("orthogonal", "centred"):
            of_stream = [key for key in norm.readers if norm.stream in table.table.rows[key]]
            expected[norm.gain] = (norm.bias, sorted(of_stream))
    assert readers(spec) == expected


def test_a_written_table_has_the_same_groups_and_norms(tiny):
    checkpoint = Checkpoint.open(tiny)
    spec = infer_or_skip(tiny)
    read_back = bind_to(Table.of(_load_text(render_spec(spec, checkpoint)), checkpoint.config), checkpoint)
    assert read_back.symmetries == spec.symmetries
    assert readers(read_back) == readers(spec)


def test_queries_and_values_are_written_and_keys_are_read():
    rows = infer_or_skip(TINY["gpt2-0-GPT2LMHeadModel"]).table.rows
    assert rows["h.1.attn.c_attn.weight"] == "residual', (head.1 qk.1) + (head.1 qk.1') + (head.1 ov.1)"
    assert rows["h.1.attn.c_proj.weight"] == "(head.1 ov.1'), residual"
    assert (rows["wte.weight"], rows["lm_head.weight"]) == ("vocab, residual", "vocab, residual'")
    assert (rows["ln_f.weight"], rows["ln_f.bias"]) == ("residual~", "residual")


# --- what must not be mistaken for more than a permutation --------------------------------------------------------


def between(mix):
    """A forward pass through a layer, a function and a layer."""
    return lambda s, x: s.o(mix(s.a(x)))


WIDE = dict(a=(L, 3, 6), o=(L, 6, 2))
LINEAR = [
    lambda y: y,
    lambda y: -y / 3,
    lambda y: y.double().clone().transpose(1, 2).contiguous().mT,
    lambda y: torch.cat([y[:, 2:], y[:, :2]], 1),
    lambda y: F.dropout(y, training=False) * 0.5,
    lambda y: y.mean(1, keepdim=True) + y,
    lambda y: y * y.new_tensor([1.0, 2, 3, 4, 5, 6, 7])[:, None],
    lambda y: torch.zeros_like(y).copy_(y),
]
BENT = [
    torch.tanh,
    torch.relu,
    lambda y: y.softmax(-1),
    lambda y: y + 1,
    lambda y: 1 - y,
    lambda y: y + y.mean(-1, keepdim=True),
    lambda y: y.square(),
    lambda y: y * y,
    lambda y: y * y.detach().clone(),
    lambda y: y * y.mean(1, keepdim=True),
    lambda y: y / y.norm(dim=-1, keepdim=True),
    lambda y: F.layer_norm(y, (6,)),
    lambda y: F.rms_norm(y, (6,)),
    lambda y: y - y.amax(1, keepdim=True),
    lambda y: y.round(),
    lambda y: y.cumsum(1) * 1.0 + y.abs(),
    lambda y: y @ y.mT @ y,
    lambda y: torch.ones_like(y) + y,
    lambda y: y.masked_fill(y > 0, 0.0),
    lambda y: y.relu_(),
    lambda y: y.add_(2),
    lambda y: F.pad(y, (0, 0, 1, 1), value=1.0),
    lambda y: y.float().long().double() + y,
]


def assert_function_kept(model, inputs, spec):
    relative, bound = relative_change(model, inputs, spec)
    assert relative <= bound, (dict(spec.table.rows), dict(spec.table.groups))


@pytest.mark.parametrize("mix", LINEAR)
def test_linear_functions_leave_an_axis_invertible(mix):
    model = Net(between(mix), **WIDE)
    spec = infer_spec(model, SEQUENCE)
    assert set(larger_groups(spec).values()) == {"invertible"}
    assert spec.table.rows["o.weight"] in ("_, a'", "_, qk'")
    assert_function_kept(model, SEQUENCE, spec)


@pytest.mark.parametrize("mix", BENT)
def test_other_functions_allow_only_permutations(mix):
    model = Net(between(mix), **WIDE)
    spec = infer_spec(model, SEQUENCE)
    assert larger_groups(spec) == {}
    assert_function_kept(model, SEQUENCE, spec)


ATTENTION = dict(q=(L, 3, 4), k=(L, 3, 4), v=(L, 3, 5), o=(L, 5, 2))


def attention(queries, keys, values=lambda s, x: s.v(x)):
    return lambda s, x: s.o((queries(s, x) @ keys(s, x).mT).softmax(-1) @ values(s, x))


def q(s, x):
    return s.q(x)


def k(s, x):
    return s.k(x)


@pytest.mark.parametrize(
    ("forward", "parts", "names"),
    [
        (attention(q, k), ATTENTION, {"qk", "ov"}),
        (attention(q, q), ATTENTION, {"ov"}),  # contracted with themselves
        (attention(q, lambda s, x: s.q(x) + s.k(x)), ATTENTION, {"ov"}),  # on both sides
        (attention(q, lambda s, x: s.k(x).tanh()), ATTENTION, {"ov"}),
        (attention(q, k, lambda s, x: s.v(x).sigmoid()), ATTENTION, {"qk"}),
        (attention(lambda s, x: F.layer_norm(s.q(x), (4,)), k), ATTENTION, {"ov"}),
        (attention(lambda s, x: F.rms_norm(s.q(x), (4,), s.g), k), ATTENTION | dict(g=(P, 4)), {"ov"}),
        (lambda s, x: s.o(F.linear(F.linear(x, s.w), s.w.t())), dict(w=(P, 6, 3), o=(L, 3, 2)), set()),
        (lambda s, x: s.b(F.linear(s.a(x), s.w) @ s.w), dict(a=(L, 3, 6), w=(P, 6, 6), b=(L, 6, 2)), {"a"}),
        (lambda s, x: s.o(s.s(s.s(s.a(x)))), dict(a=(L, 3, 6), s=(L, 6, 6), o=(L, 6, 2)), {"a"}),
        (lambda s, x: s.o(s.a(x) * s.g), WIDE | dict(g=(P, 6)), set()),
        (lambda s, x: s.o(s.a(x) + s.g), WIDE | dict(g=(P, 6)), {"a"}),
        (lambda s, x: s.o(s.a(x) + s.g), WIDE | dict(g=(P, 1)), set()),
        (lambda s, x: s.o(s.a(x) * s.b(x)), WIDE | dict(b=(L, 3, 6)), set()),
        (lambda s, x: s.o(s.a(x) * s.b(x)), WIDE | dict(b=(L, 3, 1)), {"a"}),
        (lambda s, x: s.o(F.bilinear(s.a(x), s.b(x), s.w)), WIDE | dict(b=(L, 3, 4), w=(P, 6, 6, 4)), set()),
    ],
)
def test_both_sides_have_to_be_distinct(forward, parts, names):
    model = Net(forward, **parts)
    spec = infer_spec(model, SEQUENCE)
    larger = {name.split(".")[0] for name in larger_groups(spec)}
    assert larger == names, (dict(spec.table.rows), dict(spec.table.groups))
    assert_function_kept(model, SEQUENCE, spec)


class RMSNorm(nn.Module):
    def __init__(self, width, more=0.0):
        super().__init__()
        self.weight, self.more = nn.Parameter(torch.ones(width)), more

    def forward(self, x):
        return (self.weight + self.more if self.more else self.weight) * self.of(x)

    def of(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class FusedRMSNorm(RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class DividingRMSNorm(RMSNorm):
    def forward(self, x):
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def stream(s, x):
    """A pre-norm residual stream, with a last norm before the head."""
    x = s.a(x)
    x = x + s.down(s.up(s.n(x)).tanh())
    return s.o(s.m(x))


def post(s, x):
    x = s.a(x)
    x = s.n(x + s.down(s.up(x).tanh()))
    return s.o(s.m(x))


def un_normed(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.n(x)).tanh())
    return s.o(s.m(x)) + s.p(x)


def un_normed_head(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.n(s.m(x))).tanh())
    return s.o(x)


def added_back(s, x):
    x = s.a(x)
    x = x + s.n(x)
    return s.o(s.m(x))


def sandwich(s, x):
    x = s.a(x)
    x = x + s.n(s.down(s.up(s.m(x)).tanh()))
    return s.o(s.k(x))


def scaled(s, x):
    x = s.a(x)
    x = x + s.g * s.down(s.up(s.n(x)).tanh())
    return s.o(s.m(x))


def second_gain(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.g * s.n(x)).tanh())
    return s.o(s.m(x))


def gain_twice(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.n(x)).tanh()) + s.n.weight
    return s.o(s.m(x))


def written_after(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.n(x) + s.g).tanh())
    return s.o(s.m(x))


def looked_up_after(s, x):
    x = s.a(x)
    return s.o(s.m(x) + s.e(IDS)[:, :1])


def two_norms(s, x):
    x = s.a(x)
    x = x + s.down((s.up(s.n(x)) + s.up(s.k(x))).tanh())
    return s.o(s.m(x))


def not_affine(s, x):
    x = s.a(x)
    x = x + s.down(s.up(F.layer_norm(x, (6,))).tanh())
    return s.o(s.m(x))


def a_norm_that_is_not_read(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.n(x)).tanh())
    return s.o(s.m(x)), s.k(x).square().mean(-1)


def tied(scale):
    """A model whose head is tied to the embedding, and whose last norm may be followed by a scale."""

    def forward(s, ids):
        x = s.e(ids)
        x = x + s.down(s.up(s.n(x)).tanh())
        return s.head(s.m(x) * scale if scale else s.m(x))

    parts = dict(e=(nn.Embedding, 5, 6), up=(L, 6, 7), down=(L, 7, 6), head=(L, 6, 5), n=RMS, m=RMS)
    model = Net(forward, **parts)
    model.head.weight = model.e.weight
    return model


def bent_after(s, x):
    x = s.a(x)
    return s.o(s.m(x).tanh())


def gram(s, x):
    x = s.a(x)
    y = s.n(x)
    return s.o(s.m(x)).mT @ (y @ y.mT)


def an_output(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.n(x)).tanh())
    return s.o(s.m(x)), s.m(x)


def shifted(s, x):
    x = s.a(x) + 1
    return s.o(s.m(x))


def flattened(s, x):
    """The reader has the stream once for every position of the sequence."""
    x = s.a(x)
    return s.f(s.n(x).flatten(1))


def through_float32(s, x):
    x = s.a(x)
    x = x + s.down(s.up(s.n(x.float().double())).tanh())
    return s.o(s.m(x))


STREAM = dict(a=(L, 3, 6), up=(L, 6, 7), down=(L, 7, 6), o=(L, 6, 2))
LAYER, RMS = (nn.LayerNorm, 6), (RMSNorm, 6)
MORE = dict(p=(L, 6, 2), g=(P, 6), e=(nn.Embedding, 5, 6), f=(L, 42, 2))


def normed(forward, *norms, kind=RMS):
    parts = STREAM | MORE | dict.fromkeys("nmk", kind)
    names = forward.__code__.co_names
    return Net(forward, **{name: part for name, part in parts.items() if name in names})


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        (LAYER, "centred"),
        (RMS, "orthogonal"),
        ((FusedRMSNorm, 6), "orthogonal"),
        ((DividingRMSNorm, 6), "orthogonal"),
        ((nn.RMSNorm, 6), "orthogonal"),
        ((RMSNorm, 6, 1.0), "permutation"),  # the gain is 1 + weight
    ],
)
@pytest.mark.parametrize("forward", [stream, through_float32])
def test_a_stream_rotates(forward, kind, group):
    spec = infer_spec(normed(forward, kind=kind), SEQUENCE)
    assert spec.symmetries["residual"].kind == group
    if group != "permutation":
        assert spec.table.norms == {"n": ["up"], "m": ["o"]}
        assert spec.table.rows["n.weight"] == "residual~"
        assert spec.table.rows["up.weight"] == "up, residual'"
        model = unit_norms(normed(forward, kind=kind))
        assert_function_kept(model, SEQUENCE, infer_spec(model, SEQUENCE))


@pytest.mark.parametrize("kind", [LAYER, RMS])
@pytest.mark.parametrize(
    "forward",
    [
        *(post, un_normed, un_normed_head, added_back, sandwich, scaled, second_gain, gain_twice, written_after),
        *(
            looked_up_after,
            two_norms,
            not_affine,
            a_norm_that_is_not_read,
            bent_after,
            gram,
            an_output,
            shifted,
            flattened,
        ),
    ],
)
def test_a_stream_does_not_rotate_if_anything_else_touches_it(forward, kind):
    spec = infer_spec(normed(forward, kind=kind), SEQUENCE)
    assert not {"orthogonal", "centred"} & {s.kind for s in spec.symmetries.values()}
    assert spec.norms == ()
    model = unit_norms(normed(forward, kind=kind))
    assert_function_kept(model, SEQUENCE, infer_spec(model, SEQUENCE))


def test_a_stream_with_norms_of_two_kinds_does_not_rotate():
    model = Net(stream, **STREAM, n=LAYER, m=RMS)
    assert larger_groups(infer_spec(model, SEQUENCE)) == {}


def test_one_gain_in_two_places_is_one_norm():
    def forward(s, x):
        x = s.a(x)
        for _ in range(2):
            x = x + s.down(s.up(s.n(x)).tanh())
        return s.o(s.n(x))

    model = Net(forward, **STREAM, n=RMS)
    spec = infer_spec(model, SEQUENCE)
    assert spec.table.norms == {"n": ["up", "o"]}
    assert_function_kept(unit_norms(model), SEQUENCE, spec)


def test_a_tied_head_reads_the_last_norm():
    spec = infer_spec(zoo.MODULES["char_gpt"].build(), zoo.MODULES["char_gpt"].inputs())
    assert spec.symmetries["residual"].kind == "centred"
    assert spec.table.norms["ln_f"] == ["head"]


def test_a_scale_that_depends_on_a_tie_prevents_rotation():
    """Rotation unties the head, and without the tie transformers would drop the scale, as in T5."""
    assert list(larger_groups(infer_spec(tied(None), IDS)).values()) == ["orthogonal"]
    assert larger_groups(infer_spec(tied(0.5), IDS)) == {}


def test_every_larger_group_has_writers_and_readers(tiny):
    spec = infer_or_skip(tiny)
    for name in larger_groups(spec):
        marks = {
            leaf.mark
            for row in spec.table.rows.values()
            for a in parse_pattern(row)
            for leaf in leaves(a)
            if leaf.name == name
        }
        assert {"", READER} <= marks


def test_models_are_not_changed():
    model = normed(stream)
    before = copy.deepcopy(model.state_dict())
    infer_spec(model, SEQUENCE)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
