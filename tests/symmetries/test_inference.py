"""Symmetries inferred from the forward pass: laws over every model of the zoo, and over randomly composed modules."""

import copy
import logging
from functools import cache

import pytest
import torch
import transformers
import zoo
from architectures import ARCHITECTURES
from conftest import ONE_OF_EACH, TINY, infer_or_skip, same_tensors
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

from hf_rebasin import Alignment, Checkpoint, Status, align, check, infer_spec, merge, spec_for
from hf_rebasin.alignment.exactness import compute_outputs
from hf_rebasin.errors import CheckpointError, MismatchError, SpecError
from hf_rebasin.symmetries.detection import render_spec
from hf_rebasin.symmetries.table import table_for

ZOO = zoo.HF | zoo.MODULES


@cache
def build_and_infer(name):
    """Return a model of the zoo and the spec inferred from its forward pass, neither of which may be changed."""
    model = ZOO[name].build()
    return model, infer_spec(model, ZOO[name].inputs())


@pytest.fixture(params=ZOO)
def case(request):
    """A (model, inputs, `Family` with the expected symmetries) triple."""
    return build_and_infer(request.param)[0], ZOO[request.param].inputs(), ZOO[request.param]


@pytest.fixture
def inferred(request, case):
    """The spec inferred from the forward pass of the case."""
    return build_and_infer(request.node.callspec.params["case"])[1]


EXAMPLES = pytest.mark.parametrize("examples", [100, pytest.param(400, marks=pytest.mark.slow)])


def over_random_modules(examples):
    """Run the decorated test on this many randomly composed modules, the same ones each time."""
    options = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    return lambda law: settings(max_examples=examples, **options)(given(zoo.modules())(law))


# --- the laws -----------------------------------------------------------------------------------------------------


def test_inferred_symmetries_keep_the_function(case, inferred):
    model, inputs, family = case
    assert len(inferred.free) >= family.free, f"expected {family.why}; found {sorted(inferred.free)}"
    for seed in range(2):
        result = check(model, spec=inferred, inputs=inputs, seed=seed)
        assert result.holds, str(result)
        assert result.moved or len(inferred.free) < 2


def test_planted_alignments_come_back_exactly(case, inferred):
    model = case[0]
    planted = Alignment.random(inferred.restricted(), torch.Generator().manual_seed(7))
    moved = planted.apply(model)
    assert same_tensors(model, moved) == (not planted.moved)
    solution = align(model, moved, spec=planted.spec)
    assert solution.status is Status.EQUAL or not planted.moved
    assert same_tensors(solution.apply(moved), model)


def test_an_inferred_spec_can_be_written_as_a_spec_file(case, inferred):
    """`render_spec` refuses a text that does not mean the same; here it must not have more rows than the table."""
    text = render_spec(inferred, Checkpoint.open(case[0]))
    assert "def table(config):" in text
    rows = text[text.index("def table") : text.index("def groups")].count("\n        ")
    assert rows <= len(inferred.table.rows)
    compile(text, "<spec file>", "exec")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_written_table_is_as_short_as_one_by_hand(name):
    checkpoint = Checkpoint.open(TINY[name])
    text = render_spec(infer_or_skip(TINY[name]), checkpoint)
    rows = text[text.index("def table") : text.index("def groups")].count("\n        ")
    rows_by_hand = {tensor.row for tensor in spec_for(checkpoint).tensors}
    assert rows <= 2 * len(rows_by_hand)


@EXAMPLES
def test_randomly_composed_modules_keep_their_function(examples):
    free = []  # number of free symmetries: the law would hold for an inference that pins everything

    @over_random_modules(examples)
    def law(composed):
        model, inputs = composed
        assume(compute_outputs(model, inputs)[0].any())  # not so where all units of a layer are dead
        spec = infer_spec(model, inputs)
        free.append(len(spec.free))
        result = check(model, spec=spec, inputs=inputs)
        assert result.holds, f"{result}\n{model.structure}\n{dict(spec.table.rows)}"

    law()
    assert sum(free) > len(free)


# --- the contents of a spec ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention written out, in which `mix` acts on queries and keys of shape (batch, heads, tokens, units)."""

    def __init__(self, mix=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 12)
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.o, self.head = nn.Linear(12, 12), nn.Linear(12, 3)
        self.mix = mix or (lambda x: x)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (f(x).view(*x.shape[:2], 4, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.mix(q), self.mix(k)
        y = (q @ k.mT).softmax(-1) @ v
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


TOKENS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


def test_names_marks_and_contexts():
    spec = infer_spec(Attention(), TOKENS)
    assert spec.table.rows["q.weight"] == "(head qk), residual'"
    assert spec.table.rows["k.weight"] == "(head qk'), residual'"
    assert spec.table.rows["v.weight"] == "(head ov), residual'"
    assert spec.table.rows["o.weight"] == "residual, (head ov')"
    assert spec.table.rows["head.weight"] == "_, residual'"
    assert {name: s.group for name, s in spec.symmetries.items()} == {
        "residual": "invertible",  # nothing but linear maps reads it
        "head": "permutation",
        "qk": "invertible in head",
        "ov": "invertible in head",
    }


def test_activations_carry_symmetries():
    spec = infer_spec(Attention(), TOKENS)
    assert spec.activations["embed"] == "_, _, residual"
    assert spec.activations["v"] == "_, _, (head ov)"
    assert "head" not in spec.activations, "outputs carry no symmetry"
    model = TINY["bert-1-BertForMaskedLM"]
    activations = infer_spec(model).activations
    assert activations["bert.encoder.layer.1.intermediate"] == "_, _, intermediate.1"
    assert activations["bert.encoder.layer.1.attention.self.query"] == "_, _, (head.1 qk.1)"


def test_activations_move_along_their_symmetries():
    """The output of a module, permuted along its symmetry, equals the output of the moved model's module."""
    model = Attention().double()
    spec = infer_spec(model, TOKENS).restricted()
    moved = (g := Alignment.random(spec, torch.Generator().manual_seed(1))).apply(model)
    activations = {}
    for name, network in (("before", model), ("after", moved)):
        network.embed.register_forward_hook(lambda m, a, out, name=name: activations.setdefault(name, out))
        network(TOKENS.double())
    torch.testing.assert_close(activations["after"], activations["before"][..., g["residual"].order])
    assert not torch.equal(activations["after"], activations["before"])


@pytest.mark.parametrize(
    ("mix", "group"),
    [
        (lambda x: x * torch.arange(3), None),  # tells units apart
        (lambda x: x + x.mean(1, keepdim=True), "invertible"),  # mixes the units of different heads
        (lambda x: x.softmax(1), "permutation"),
        (lambda x: x - x.cumsum(1), "permutation"),
        (lambda x: x + x.flip(1), "permutation"),
        (lambda x: nn.functional.layer_norm(x.movedim(1, -1), (4,)).movedim(-1, 1), "permutation"),
        (lambda x: nn.functional.layer_norm(x, (3,)), "permutation in head"),
        (lambda x: x.softmax(-1), "permutation in head"),
        (lambda x: x * x.square().sum(1, keepdim=True).sqrt(), "permutation"),
        (lambda x: x * x.square().sum((1, 3), keepdim=True).sqrt(), "permutation in head"),
    ],
)
def test_inner_axes_are_nested_only_where_no_activation_mixes_the_outer_ones(mix, group):
    model = Attention(mix).double()
    spec = infer_spec(model, TOKENS)
    assert (spec.symmetries["qk"].group if "qk" in spec.symmetries else None) == group
    for seed in range(3):
        assert check(model, spec=spec, inputs=TOKENS, seed=seed).holds


class Between(nn.Module):
    """Two linear layers with an operation between them."""

    def __init__(self, op):
        super().__init__()
        self.op, self.first, self.second = op, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.op(self.first(x)))


def test_an_unknown_operation_pins_and_is_named():
    model = Between(lambda x: torch.fft.fft(x).real)
    spec = infer_spec(model, torch.randn(2, 5))
    assert spec.free == frozenset()
    assert "_fft_r2c in the model, which has no rule" in spec.pins["first.bias"][0]
    assert spec.pins["first.weight"][0] == spec.pins["second.weight"][1]


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda x: x.roll(1, -1), "roll in the model: has an order"),
        (lambda x: x[..., torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], "index in the model: rows are looked up by number"),
        (lambda x: x * torch.arange(8.0), "mul in the model, with an input or a constant"),
        (lambda x: x.sort(-1).values, "sort in the model"),
    ],
)
def test_reasons_name_the_operation(op, reason):
    spec = infer_spec(Between(op), torch.randn(2, 5))
    assert spec.free == frozenset()
    assert spec.pins["first.bias"] == (reason,)
    assert spec.pins["second.bias"] == ("an output of the model",)


# --- what is easily mistaken for a symmetry --------------------------------------------------------------------------


class Net(nn.Module):
    """An arbitrary forward pass over the given layers and parameters."""

    def __init__(self, forward, **parts):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (kind, *shape) in parts.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)) if kind == P else kind(*shape))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
        self.run = forward
        self.double().eval()

    def forward(self, x):
        return self.run(self, x)


L, P = nn.Linear, "p"
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SEQUENCE = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
IDS = torch.tensor([[0, 2, 1, 4], [3, 3, 0, 1]])


def one_hot(s, x):
    return s.o((nn.functional.one_hot(IDS, 5).double() @ s.w).relu())


def sinusoid(s, x):
    table = torch.zeros(x.shape[1], 6, dtype=x.dtype)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.arange(1, 4)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return s.o((s.a(x) + table).relu())


def scattered(s, x):
    return s.o(s.a(x).relu() * x.new_zeros(6).scatter_(0, torch.tensor([1, 3]), 1.0))


def put(s, x):
    z = x.new_zeros(6)
    z[torch.tensor([0, 2])] = 1.0
    return s.o(s.a(x).relu() * z)


def diagonal(s, x):
    z = torch.zeros(6, 6, dtype=x.dtype)
    z.diagonal().add_(1.0)
    z.diagonal(1).add_(2.0)
    return s.o(s.a(x).relu() @ z)


def written_by_numpy(s, x):
    z = x.new_zeros(6)
    z.numpy()[:] = range(6)
    return s.o(s.a(x).relu() * z)


def summed(reduce):
    return lambda s, x: reduce(s.a(x).view(-1, 4, 3)).relu().sum(-1, keepdim=True)


def padded_shortcut(s, x):
    h = s.a(x).relu()
    y = torch.cat([h, torch.zeros_like(h)], 1)
    y = y + s.f(y)
    u, v = y.chunk(2, 1)
    return s.o(s.g(u).relu()) + (v * torch.arange(1.0, 5)).relu().sum(1, keepdim=True)


def read_in_groups(join):
    def forward(s, x):
        y = s.a(x).tanh()
        y = nn.functional.linear(y, join(s.c)).tanh() + y
        return s.k(y[:, :, None]).flatten(1).tanh()

    return forward


def into_a_view(s, x):
    z = x.new_zeros(5, 6)
    z[:].addmm_(s.a(x), s.w)
    return s.o(z.relu() * s.b(x))


def out_argument(s, x):
    z = x.new_zeros(5, 6)
    torch.mm(s.a(x), s.w, out=z[:])
    return s.o(z.relu() * s.b(x))


LAYER = dict(a=(L, 3, 6), o=(L, 6, 2))
GROUPS = dict(a=(L, 3, 6), c=(P, 3, 6), k=(nn.Conv1d, 6, 2, 1, 1, 0, 1, 2))
VIEW = dict(a=(L, 3, 4), w=(P, 4, 6), b=(L, 3, 6), o=(L, 6, 2))


@pytest.mark.parametrize(
    ("forward", "parts", "inputs", "most"),
    [
        (one_hot, dict(w=(P, 5, 6), o=(L, 6, 3)), X, 1),
        (sinusoid, LAYER, SEQUENCE, 0),
        (scattered, LAYER, X, 0),
        (put, LAYER, X, 0),
        (diagonal, LAYER, X, 0),
        (written_by_numpy, LAYER, X, 0),
        (summed(lambda y: y.amax(1)), dict(a=(L, 3, 12)), X, 2),
        (summed(lambda y: y.mean(1)), dict(a=(L, 3, 12)), X, 2),
        (summed(lambda y: y.max(1).values), dict(a=(L, 3, 12)), X, 1),
        (summed(lambda y: y.sort(1).values[:, 3]), dict(a=(L, 3, 12)), X, 1),
        (padded_shortcut, dict(a=(L, 3, 4), f=(L, 8, 8), g=(L, 4, 5), o=(L, 5, 1)), X, 2),
        (read_in_groups(lambda c: torch.cat([c, c.tanh()])), GROUPS, X, 1),
        (read_in_groups(lambda c: c.repeat(2, 1)), GROUPS, X, 1),
        (read_in_groups(lambda c: torch.stack([c, c.tanh()]).flatten(0, 1)), GROUPS, X, 1),
        (into_a_view, VIEW, X, 2),
        (out_argument, VIEW, X, 2),
        (lambda s, x: s.o((x.new_zeros(6) + s.a(x)).relu()), LAYER, X, 1),
    ],
)
def test_writes_copies_and_sums_invent_nothing(forward, parts, inputs, most):
    model = Net(forward, **parts)
    spec = infer_spec(model, inputs)
    assert len(spec.free) <= most, dict(spec.table.rows)
    for seed in range(4):
        assert check(model, spec=spec, inputs=inputs, seed=seed).holds, dict(spec.table.rows)


PICKED = torch.tensor([[0, 4], [1, 3]])
QKV = dict(k=(L, 3, 3), v=(L, 3, 6), o=(L, 6, 2))


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (lambda s, x: s.o(s.r(x)[0]), dict(r=(nn.LSTM, 3, 6), o=(L, 6, 2))),
        (lambda s, x: s.o(s.r(x)[0]), dict(r=(nn.GRU, 3, 6), o=(L, 6, 2))),
        (lambda s, x: s.o(nn.functional.scaled_dot_product_attention(x, s.k(x), s.v(x))), QKV),
        (lambda s, x: s.o(s.b(IDS)), dict(b=(nn.EmbeddingBag, 5, 6), o=(L, 6, 2))),
        (lambda s, x: s.o(s.a(x).gather(1, PICKED[..., None].expand(-1, -1, 6)).relu()), LAYER),
        (lambda s, x: s.o(s.a(x)[x[..., 0] > 0].relu().sum(0)), LAYER),
        (
            lambda s, x: s.o(s.a(x).index_put((torch.tensor([0]), torch.tensor([2])), s.m).relu()),
            LAYER | dict(m=(P, 6)),
        ),
    ],
)
def test_common_operations_keep_their_symmetries(forward, parts):
    model = Net(forward, **parts)
    spec = infer_spec(model, SEQUENCE)
    assert spec.free, dict(spec.pins)
    for seed in range(2):
        assert check(model, spec=spec, inputs=SEQUENCE, seed=seed).holds, dict(spec.table.rows)


def test_positions_that_only_longer_inputs_read_are_held():
    """On short inputs the last rows of a position table could be permuted, but longer inputs read them."""
    model = Net(lambda s, x: s.o((s.e(x) + s.p[: x.shape[1]]).relu().mean(1)), e=(L, 3, 6), p=(P, 7, 6), o=(L, 6, 2))
    spec = infer_spec(model, SEQUENCE[:, :3])
    assert spec.pins["p"][0] is not None
    assert len(spec.free) == 1
    for seed in range(2):
        assert check(model, spec=spec, inputs=SEQUENCE, seed=seed).holds


def test_layers_may_have_the_names_of_axes_matched_by_string():
    model = Net(lambda s, x: s.o(s.label(x).relu() * s.vocab(x)), label=(L, 3, 6), vocab=(L, 3, 6), o=(L, 6, 2))
    assert not {"label", "vocab"} & set(infer_spec(model, X).symmetries)


def test_inputs_caches_and_random_numbers_are_left_alone():
    x = X.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.Linear(4, 2)).double()
    assert len(infer_spec(model, x).free) == 1
    assert torch.equal(x, X)
    cache = {}

    def masked(s, x):
        if "mask" not in cache:
            cache["mask"] = torch.full((6, 6), 0.5).triu(1)
        return s.o(s.a(x).relu() @ cache["mask"].double() + torch.rand(6))

    model = Net(masked, **LAYER)
    state = torch.random.get_rng_state()
    infer_spec(model, X)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not cache["mask"].is_meta
    assert model(X).isfinite().all()


def test_unreadable_modules_are_refused():
    with pytest.raises(SpecError, match="compiled"):
        infer_spec(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), X.float())
    with pytest.raises(CheckpointError, match=r"has not initialised 0.weight, 0.bias yet; run it once"):
        infer_spec(nn.Sequential(nn.LazyLinear(3)), X.float())
    odd = nn.Sequential()
    odd.add_module("a{b}", nn.Linear(3, 4))
    with pytest.raises(SpecError, match=r"'a\{b\}.weight', 'a\{b\}.bias': names with .* cannot be written in a table"):
        infer_spec(odd, X.float())


# --- what inference needs, and what it leaves alone ---------------------------------------------------------------


def test_a_value_that_depends_on_the_weights_is_refused():
    model = Between(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(SpecError, match=r"asks for a value in the model .* that depends on the weights"):
        infer_spec(model, torch.randn(2, 5))


def test_a_value_of_the_inputs_may_be_asked_for():
    class Branches(Between):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else x[:1])

    assert infer_spec(Branches(torch.relu), torch.ones(2, 5)).free == {"first"}


def test_a_forward_pass_that_fails_is_reported():
    with pytest.raises(SpecError, match=r"Between cannot be inferred: its forward pass.*fails in first: RuntimeError"):
        infer_spec(Between(torch.relu), torch.randn(2, 7))


def test_inputs_are_required_where_none_are_known():
    with pytest.raises(MismatchError, match="give inputs"):
        infer_spec(Between(torch.relu))
    with pytest.raises(MismatchError, match="tensors only, and no forward pass"):
        spec_for(Between(torch.relu).state_dict())
    with pytest.raises(MismatchError, match="inputs"):
        check(Between(torch.relu))


def test_unused_tensors_are_held_and_reported(caplog):
    model = Between(torch.relu)
    model.spare = nn.Linear(8, 8)
    with caplog.at_level(logging.WARNING):
        spec = infer_spec(model, torch.randn(2, 5))
    assert "does not use spare.weight, spare.bias" in caplog.text
    assert spec.pins["spare.weight"] == ("the forward pass does not use it",) * 2
    assert spec.free == {"first"}


def test_the_model_is_left_alone(case):
    model, inputs, _ = case
    training = model.training
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = {id(p) for p in model.parameters()}
    names = [sorted(vars(part)) for part in model.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    infer_spec(model, inputs)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert parameters == {id(p) for p in model.parameters()}
    assert names == [sorted(vars(part)) for part in model.modules()]
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    assert torch.backends.mha.get_fastpath_enabled()
    model.train(training)


def test_no_weights_are_needed():
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(TINY["bert-1-BertForMaskedLM"].config)
    assert infer_spec(model).table.rows == infer_spec(TINY["bert-1-BertForMaskedLM"]).table.rows
    with torch.device("meta"):
        plain = Between(torch.relu)
    assert infer_spec(plain, torch.randn(2, 5)).free == {"first"}


# --- everything else works with inferred specs --------------------------------------------------------------------


def test_a_family_without_a_table_from_folder_to_merge(tmp_path):
    model = zoo.HF["biogpt"].build()
    assert table_for(model.config) is None
    a = Checkpoint.open(model).save(tmp_path / "a")
    planted = Alignment.random(spec_for(a).restricted(), torch.Generator().manual_seed(0))
    moved = planted.apply(a).save(tmp_path / "b")
    assert not same_tensors(a, moved)
    assert check(moved).holds
    solution = align(a, moved, groups="permutation")
    assert solution.status is Status.EQUAL
    aligned = solution.apply(moved)
    assert same_tensors(aligned, a)
    merged = merge([a, aligned]).save(tmp_path / "m")
    assert same_tensors(transformers.BioGptForCausalLM.from_pretrained(merged, dtype=torch.float64), model)
    loaded = Alignment.load(solution.alignment.save(tmp_path / "alignment.safetensors"))
    assert same_tensors(loaded.apply(moved), a)


def test_a_state_dict_beside_a_module():
    model = Attention().double()
    g = Alignment.random(infer_spec(model, TOKENS).restricted(), torch.Generator().manual_seed(3))
    moved = g.apply(dict(model.state_dict()))
    for fixed, moving in ((model, moved), (dict(model.state_dict()), g.apply(model))):
        solution = align(fixed, moving, inputs=TOKENS, groups="permutation")
        assert solution.status is Status.EQUAL
        assert type(solution.apply(moving)) is type(moving)


def test_modules_merge_to_modules():
    a, b = Attention(), Attention()
    with torch.no_grad():
        b.embed.weight.mul_(3)
    merged = merge([a, align(a, b, inputs=TOKENS).apply(b)]).model()
    assert type(merged) is Attention
    torch.testing.assert_close(merged.embed.weight, 2 * a.embed.weight)


def test_tensors_beyond_those_of_the_class_are_kept(tmp_path):
    model = zoo.HF["biogpt"].build()
    checkpoint = Checkpoint.open(model)
    larger = Checkpoint({**checkpoint.tensors, "extra.weight": torch.ones(3, 3)}, checkpoint.config)
    spec = spec_for(larger.save(tmp_path / "larger"))
    assert spec.pins["extra.weight"] == ("no part of its class",) * 2
    assert spec.free == spec_for(checkpoint).free


def test_tokens_and_labels_keep_their_names():
    assert infer_spec(zoo.HF["biogpt"].build()).table.rows["embed_tokens.weight"] == "vocab, residual"
    assert infer_spec(TINY["vit-0-ViTForImageClassification"]).table.rows["classifier.bias"] == "label"


# --- traps that other packages fall into: each with the naive treatment, which must be detected -------------------


def relative_change(model, inputs, state):
    """The largest change of a model's outputs under another state dict, relative to the largest output."""
    before, _ = compute_outputs(model, inputs)
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    after, _ = compute_outputs(other, inputs)
    return ((before - after).abs().max() / before.abs().max()).item()


def move_model(name, seed=0):
    """Return a model of the zoo, its inputs, a random alignment, and the state dict moved by it."""
    model, inputs = zoo.MODULES[name].build(), zoo.MODULES[name].inputs()
    spec = infer_spec(model, inputs).restricted()  # the traps are those of permutations
    g = Alignment.random(spec, torch.Generator().manual_seed(seed))
    state = {key: tensor.clone() for key, tensor in g.apply(model).state_dict().items()}
    assert relative_change(model, inputs, state) < 1e-10
    return model, inputs, g, state


def test_trap_running_statistics_stay_behind():
    model, inputs, _, state = move_model("mlp")
    unmoved = {key: tensor for key, tensor in model.state_dict().items() if "running" in key}
    assert unmoved
    assert relative_change(model, inputs, state | unmoved) > 1e-3


def test_trap_flattened_places_taken_for_channels():
    """conv → flatten → linear: columns are (channel, place), not (place, channel)."""
    model, inputs, g, state = move_model("vgg")
    (key,) = (k for k, row in g.spec.table.rows.items() if "(" in row)
    name = next(leaf for leaf in g.spec.table.rows[key].split(", ")[1].strip("()").split(" "))
    order = g[name.rstrip("'")].order
    weight = model.state_dict()[key]
    places = weight.shape[1] // len(order)
    assert places > 1
    rows = next(g[n].order for n in [g.spec.table.rows[key].split(",")[0]] if n in g.elements)
    naive = weight[rows].view(len(weight), places, len(order))[:, :, order].reshape(weight.shape)
    assert relative_change(model, inputs, state | {key: naive}) > 1e-3


def test_trap_grouped_convolutions_permuted_freely():
    """Input channels of a grouped convolution stay in their groups, in one order for all outputs of a group."""
    model, inputs, _, state = move_model("grouped_conv")
    first, grouped = model[0], model[2]
    assert grouped.groups > 1
    order = torch.randperm(grouped.in_channels, generator=torch.Generator().manual_seed(1))
    naive = {f"0.{name}": tensor[order] for name, tensor in first.state_dict().items()}
    assert relative_change(model, inputs, model.state_dict() | naive) > 1e-3
    swapped = {"2.weight": state["2.weight"].flip(1)}
    assert relative_change(model, inputs, state | swapped) > 1e-3


def test_trap_tied_weights_moved_apart():
    model, inputs, g, state = move_model("char_gpt")
    (target,) = g.spec.ties
    assert g.spec.ties[target] in g.spec.shapes
    assert target not in g.spec.shapes
    naive = model.state_dict()[target]
    untied = copy.deepcopy(model)
    owner, _, name = target.rpartition(".")
    setattr(untied.get_submodule(owner), name, nn.Parameter(naive.clone()))
    before, _ = compute_outputs(untied, inputs)
    untied.load_state_dict(state | {target: naive})
    after, _ = compute_outputs(untied, inputs)
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


def test_trap_tied_weights_counted_once():
    spec = infer_spec(zoo.MODULES["char_gpt"].build(), zoo.MODULES["char_gpt"].inputs())
    stored = [key for tensor in spec.tensors for key in tensor.keys.values()]
    assert len(stored) == len(set(stored))
    assert not set(stored) & set(spec.ties)


def test_trap_queries_permuted_across_heads():
    model = Attention().double()
    with torch.no_grad():
        for weight in (model.q.weight, model.k.weight):
            weight.mul_(10)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    state = model.state_dict()
    keys = [f"{module}.{name}" for module in "qk" for name in ("weight", "bias")]
    naive = {key: state[key][order] for key in keys}
    assert relative_change(model, TOKENS.double(), state | naive) > 1e-2
    within = torch.cat([3 * h + torch.randperm(3, generator=torch.Generator().manual_seed(h)) for h in range(4)])
    correct = {key: state[key][within] for key in keys}
    assert relative_change(model, TOKENS.double(), state | correct) < 1e-10


def test_trap_class_tokens_and_positions_move_and_merge():
    model, _, g, state = move_model("fused_vit")
    for key in ("cls_token", "pos_embed"):
        assert torch.equal(state[key], model.state_dict()[key][..., g["residual"].order])
        assert not torch.equal(state[key], model.state_dict()[key])
    merged = merge([model, {key: 3 * tensor for key, tensor in model.state_dict().items()}])
    torch.testing.assert_close(merged.tensors["cls_token"], 2 * model.state_dict()["cls_token"])


def test_trap_alignment_changes_no_outputs(case, inferred):
    """Aligning a model to another one does not change its own function."""
    model, inputs, _ = case
    other = copy.deepcopy(Checkpoint.open(model).model())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    solution = align(other, model, spec=inferred)
    before, float32_inside = compute_outputs(model, inputs)
    after, _ = compute_outputs(solution.apply(model), inputs)
    assert (before - after).abs().max() <= (1e-5 if float32_inside else 1e-10) * before.abs().max()


@pytest.mark.parametrize("name", ["rwkv", "xlnet"])
def test_a_memory_of_what_was_read_is_not_an_output(name):
    """RWKV returns its state and XLNet its memories, which move with the stream; XLNet has positions without limit."""
    kind, settings = ARCHITECTURES[name]
    owner = getattr(transformers, kind)
    model = owner(owner.config_class(**settings)).double().eval()
    returned = model(torch.zeros(1, 4, dtype=torch.int64))
    assert "state" in returned or "mems" in returned
    assert check(model).holds
