"""Alignment by gradients: costs on weights and on data, over groups and families."""

import pytest
import torch
from conftest import FIRST, TINY, other_seed, run_script, same_tensors
from torch import nn

from hf_rebasin import Alignment, Checkpoint, Status, Table, align, infer_spec, merge, spec_for
from hf_rebasin.alignment.gauge import fold_state
from hf_rebasin.checkpoints.canonical import CanonicalView
from hf_rebasin.compat.in_memory import merge_modules
from hf_rebasin.errors import CheckpointError, OptionError, RecipeError, UnknownNameError
from hf_rebasin.modules.divergence import Divergence
from hf_rebasin.modules.forward import example_inputs, output_tensors, run_module
from hf_rebasin.modules.functional import use_batch_statistics
from hf_rebasin.recipes.recipe import Recipe
from hf_rebasin.solving.gradient_descent import UNLABELLED_NOTE

TABLE = Table(
    {
        "0.weight": "h.0, _",
        "0.bias": "h.0",
        "2.weight": "h.1, h.0'",
        "2.bias": "h.1",
        "4.weight": "_, h.1'",
        "4.bias": "_",
    },
    {"h.*": "permutation"},
)


def mlp(seed, width=10):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def squares(module, batch):
    """Return a loss for any module: the mean square of its outputs."""
    return torch.stack(
        [x.double().square().mean() for x in output_tensors(run_module(module, batch)) if x.is_floating_point()]
    ).mean()


def inputs_of(model):
    inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
    return {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}


@pytest.mark.parametrize("solver", ["sinkhorn", "straight_through"])
@pytest.mark.parametrize("cost", ["l2", "l1", "cosine"])
def test_planted_permutations_come_back_from_the_identity(solver, cost):
    a = mlp(0)
    b = Alignment.random(infer_spec(a, torch.zeros(1, 2)), torch.Generator().manual_seed(1)).apply(a)
    options = {"solver": solver, "spec": TABLE, "start": "identity", "check_every": 1}
    solution = align(a, b, cost=cost, **options)
    assert solution.status is Status.EQUAL
    assert same_tensors(solution.apply(b), a)
    assert align(a, mlp(1), cost=cost, steps=2, **options).status is not Status.EQUAL


@pytest.mark.parametrize("family", FIRST)
def test_the_loss_is_that_of_the_merge(family):
    """Over all groups, the models that a descent computes with have the same function as the merged checkpoint."""
    model = TINY[FIRST[family]]
    other, batch = other_seed(model), inputs_of(model)
    try:
        CanonicalView(Checkpoint.open(model)).module()
    except CheckpointError as error:
        pytest.skip(str(error))
    start = "weight_matching" if family in ("gpt2", "llama") else "identity"  # which is cheaper
    options = {"start": start, "cost": "mid", "steps": 3, "check_every": 1, "checks": 1}
    solution = align(model, other, solver="learned", data=[batch], loss=squares, **options)
    halfway = merge([solution.apply(other), model]).model(torch.float64)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in halfway.modules()):
        for module in halfway.modules():  # as the descent does
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    with torch.no_grad():
        assert squares(halfway, batch).item() == pytest.approx(-solution.objective, rel=2e-5)
    if solution.alignment.moved:  # there is more than permutations, which `learned` keeps
        assert solution.objective >= max(solution.history[:2])
        assert solution.history[0] != pytest.approx(solution.objective, rel=1e-3)


def test_the_loss_at_the_identity_is_that_of_the_plain_average():
    a, b = mlp(0), mlp(1)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))

    def loss(module, batch):
        return (module(batch) - 1).square().mean()

    solution = align(a, b, solver="sinkhorn", spec=TABLE, data=[x], loss=loss, cost="mid", steps=1)
    assert solution.history[0] == pytest.approx(-loss(merge_modules([a, b], "linear"), x).item(), rel=1e-5)
    between = align(a, b, solver="sinkhorn", spec=TABLE, data=[x], loss=loss, cost="rnd", interval=(0.2, 0.2), steps=1)
    assert between.history[0] == pytest.approx(-loss(merge_modules([a, b], "lerp", t=0.2), x).item(), rel=1e-5)
    assert between.history[0] != pytest.approx(solution.history[0], rel=1e-5)


def test_the_costs_of_weights_are_what_they_are_called():
    a, b = mlp(0), mlp(1)
    flat = [
        torch.cat([p.detach().double().flatten() for n, p in m.named_parameters() if n != "4.bias"]) for m in (a, b)
    ]
    x, y = flat
    expected = {
        "l2": (x * y).sum(),
        "l1": -(x - y).abs().sum(),
        "cosine": (x * y).sum() / (x.norm() * y.norm()) - 1,
    }
    for cost, value in expected.items():
        history = align(a, b, solver="sinkhorn", spec=TABLE, cost=cost, steps=1).history
        assert history[0] == pytest.approx(value.item(), rel=1e-5)


def test_the_users_models_are_not_touched():
    a, b = mlp(0).train(), mlp(1).train()
    a[2].weight.requires_grad_(False)
    before = [{k: t.clone() for k, t in m.state_dict().items()} for m in (a, b)]
    flags = [[p.requires_grad for p in m.parameters()] for m in (a, b)]

    def loss(module, batch):
        assert all(p is not q for p in module.parameters() for q in (*a.parameters(), *b.parameters()))
        return module(batch).square().mean()

    align(a, b, solver="sinkhorn", spec=TABLE, data=[torch.ones(3, 2)], loss=loss, steps=2, check_every=1)
    assert [[p.requires_grad for p in m.parameters()] for m in (a, b)] == flags
    assert all(m.training and all(p.grad is None for p in m.parameters()) for m in (a, b))
    assert all(
        torch.equal(t, old[k]) for m, old in zip((a, b), before, strict=True) for k, t in m.state_dict().items()
    )


@pytest.mark.parametrize("solver", ["sinkhorn", "straight_through", "learned"])
def test_no_result_is_worse_than_its_start(solver, bert):
    """A learning rate that ruins everything."""
    other, batch = other_seed(bert), inputs_of(bert)
    options = {"solver": solver, "data": [batch], "loss": squares, "steps": 3, "check_every": 1, "checks": 1}
    wild = align(bert, other, lr=50.0, smooth_lr=50.0, **options)
    assert wild.objective >= max(wild.history[:2])
    assert wild.status in (Status.STEP_LIMIT, Status.IDENTITY)


def test_patience_and_the_step_limit():
    a, b = mlp(0), mlp(1)
    options = {"solver": "sinkhorn", "spec": TABLE, "lr": 1e-9, "check_every": 1}
    settled = align(a, b, patience=3, steps=50, **options)
    assert settled.status is Status.SETTLED
    assert len(settled.history) == 2 + 3
    assert align(a, b, patience=3, steps=2, **options).status is Status.STEP_LIMIT


def test_gradients_of_both_kinds_find_the_same():
    a = mlp(0)
    b = Alignment.random(infer_spec(a, torch.zeros(1, 2)), torch.Generator().manual_seed(1)).apply(a)
    found = [
        align(a, b, solver="sinkhorn", spec=TABLE, start="identity", check_every=1, implicit=implicit)
        for implicit in (True, False)
    ]
    assert found[0].history == pytest.approx(found[1].history)
    assert len(found[0].history) < 60


def test_a_model_computes_its_own_loss(bert):
    batch = inputs_of(bert)
    labelled = {**batch, "labels": batch["input_ids"]}
    solution = align(bert, other_seed(bert), solver="learned", data=[labelled], steps=1)
    assert solution.objective >= solution.history[0]
    assert not solution.notes


@pytest.mark.parametrize(("family", "at"), [("bert", 0.5), ("gpt2", 0.2), ("resnet", 0.2)])
def test_without_labels_the_divergence_is_minimised(family, at, request):
    """Positions that are left out do not count; BatchNorm goes by the batch in between, and not at the ends."""
    a = TINY[FIRST["gpt2"]] if family == "gpt2" else request.getfixturevalue(family)
    b, batch = other_seed(a), inputs_of(a)
    if family != "resnet":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, 9:] = 0
    between = merge([a, b], "lerp", t=at).model()
    use_batch_statistics(between)
    with torch.no_grad():
        logits = [run_module(model, batch).logits.double() for model in (a, b, between)]
    if family != "resnet":
        logits = [y[:, :9] for y in logits]
    p, q, y = (x.log_softmax(-1) for x in logits)
    mean = (1 - at) * p.exp() + at * q.exp()
    by_hand = (mean * (mean.log() - y)).sum(-1).mean().item()
    options = {
        "solver": "straight_through" if family == "resnet" else "learned",
        "start": "identity",
        "check_every": 1,
    }
    solution = align(a, b, cost="rnd", interval=(at, at), data=[batch], steps=20, **options)
    assert -solution.history[0] == pytest.approx(by_hand, rel=1e-4)
    assert solution.objective > solution.history[0]  # it fell
    assert UNLABELLED_NOTE in solution.notes


def test_a_head_without_a_partner_is_refused():
    """Its norm would be folded into it."""
    llama = TINY[FIRST["llama"]]
    other, batch = other_seed(llama).model, inputs_of(llama)
    options = {"solver": "learned", "backbone_only": True, "data": [batch], "steps": 1}
    with pytest.raises(OptionError, match="of the fixed model has no partner"):
        align(llama, other, **options)
    assert UNLABELLED_NOTE in align(llama, other, groups="permutation", **options).notes


def test_labels_are_in_all_batches_or_in_none(bert):
    batch = inputs_of(bert)
    labelled = {**batch, "labels": batch["input_ids"]}
    with pytest.raises(OptionError, match="returns a loss for 1 of the first 2 batches"):
        align(bert, other_seed(bert), solver="learned", data=[batch, labelled], checks=2, steps=1)


def test_outputs_that_cannot_be_compared_are_refused():
    options = {"solver": "sinkhorn", "start": "identity", "steps": 1}
    with pytest.raises(OptionError, match="the model returns a Tensor without any numbers"):
        align(Silent(), Silent(), spec=SILENT, data=[torch.ones(3, 2)], **options)
    with pytest.raises(OptionError, match="the cost 'mid' begins at nan"):
        align(mlp(0), mlp(1), spec=TABLE, data=[torch.full((3, 2), torch.nan)], **options)


@pytest.mark.parametrize(
    ("shape", "axis", "count"),
    [
        ((4,), None, 4),
        ((4, 1), None, 4),
        ((4, 3), None, 4),
        ((4, 3, 5), None, 20),
        ((4, 5, 3), -1, 20),
        ((4, 3, 6, 7), None, 168),
    ],
    ids=["a number each", "one number each", "classes", "positions", "tokens", "pixels"],
)
def test_what_counts_as_a_sample(shape, axis, count):
    class Shaped(nn.Linear):
        class_axis = axis

        def forward(self, x):
            return super().forward(x).reshape(shape)

    size = torch.Size(shape).numel()
    module = Shaped(2, size // 4).double()
    module_keys = {key: key for key in module.state_dict()}
    ends = [{"weight": torch.randn(size // 4, 2).double(), "bias": torch.zeros(size // 4).double()} for _ in range(2)]
    divergence, x = Divergence(module.eval(), module_keys, ends), torch.randn(4, 2).double()
    assert len(divergence.per_sample(ends[0], (0.5, 0.5), x)) == count
    assert divergence.per_sample(ends[0], (1.0, 0.0), x).abs().max() < 1e-12
    assert divergence.per_sample(ends[1], (1.0, 0.0), x).min() > 0
    assert divergence.per_sample(ends[0], (0.5, 0.5), x * torch.nan).isnan().all()


def test_hidden_states_are_not_scores():
    """Without a head squared errors are compared: softmax would not see a number added to all of them."""
    model = TINY[FIRST["bert"]]
    assert "logits" not in model(**inputs_of(model))
    module_keys = {
        key: key for key, _ in (*model.named_parameters(), *model.named_buffers()) if key in model.state_dict()
    }
    state = {key: model.state_dict()[key] for key in module_keys}
    last = f"encoder.layer.{model.config.num_hidden_layers - 1}.output.LayerNorm.bias"
    more = {**state, last: state[last] + 1}
    divergence = Divergence(model, module_keys, [state, state]).per_sample(more, (0.5, 0.5), inputs_of(model))
    assert divergence.max().item() == pytest.approx(1)


@pytest.mark.parametrize("cost", ["mid", "rnd"])
def test_the_best_of_several_starts_is_kept(cost):
    """The first equals a single start; the others see other batches, or points, and differ from it."""
    data = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    options = {"solver": "straight_through", "spec": TABLE, "data": data, "cost": cost, "steps": 7, "check_every": 1}
    one, three = (align(mlp(0), mlp(1), checks=2, starts=starts, **options) for starts in (1, 3))
    assert three.history[: len(one.history)] == one.history
    assert len(three.history) == 3 * len(one.history) - 4
    assert three.objective == max(three.history) >= one.objective
    last = [Alignment.identity(one.alignment.spec), *(x.alignment for x in (one, three))]
    assert len({round(-squares(merge([mlp(0), x.apply(mlp(1))]).model(), data[0]).item(), 9) for x in last}) > 1


def test_every_start_has_its_own_patience():
    """A later one is not ended for being behind what an earlier one reached."""
    data = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    table = Table(TABLE.rows, {"h.*": "scaled"})
    options = {
        "solver": "learned",
        "spec": table,
        "data": data,
        "cost": "mid",
        "steps": 60,
        "check_every": 1,
        "patience": 20,
    }
    one, three = (align(mlp(0), mlp(1), checks=2, starts=starts, **options) for starts in (1, 3))
    assert len(one.history) > 50
    assert len(three.history) > 140


def test_several_starts_need_something_that_differs():
    with pytest.raises(
        OptionError, match="starts = 3, but without data or noise all starts are the same; give either"
    ):
        align(mlp(0), mlp(1), solver="sinkhorn", spec=TABLE, starts=3)
    with pytest.raises(OptionError, match="without data or noise"):  # noise counts only where something permutes
        align(mlp(0), mlp(1), solver="learned", spec=TABLE, starts=3, noise=0.1)
    assert align(mlp(0), mlp(1), solver="sinkhorn", spec=TABLE, starts=3, noise=0.1, steps=2).history


def test_a_start_may_have_options():
    options = {"solver": "straight_through", "spec": TABLE, "steps": 3}
    nested = align(
        mlp(0), mlp(1), start={"solver": "sinkhorn", "start": "identity", "steps": 30, "noise": 0.2}, **options
    )
    before = align(mlp(0), mlp(1), solver="sinkhorn", spec=TABLE, start="identity", steps=30, noise=0.2)
    other = align(mlp(0), mlp(1), solver="sinkhorn", spec=TABLE, start="identity", steps=30)
    assert nested.history[1] == pytest.approx(before.objective)
    assert nested.history[1] != pytest.approx(other.objective)
    unmoved = align(mlp(0), mlp(1), start={"solver": "identity"}, **options)
    assert unmoved.history == align(mlp(0), mlp(1), start="identity", **options).history


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"solver": "sinkhorn", "stepz": 3}, "stepz: no such parameter; did you mean 'steps'"),
        ({"solver": "sinkhorn", "start": {"solver": "learned", "steps": 0}}, "steps = 0"),
        ({"stepz": 3}, "name a solver"),
        ({"solver": "identity", "stepz": 3}, "the identity has no options, such as stepz"),
        ({"solver": "sinkhorm"}, "no solver 'sinkhorm'; did you mean 'sinkhorn'"),
        (3, "start: 3 does not fit"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(start, message):
    with pytest.raises((OptionError, UnknownNameError), match=message):
        align(mlp(0), mlp(1), solver="sinkhorn", spec=TABLE, start=start)
    recipe = {"models": ["a", "b"], "align": {"solver": "sinkhorn", "start": start}}
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(recipe)


class Silent(nn.Module):
    """Returns a count, and nothing that can be compared."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x):
        return (self.out(self.into(x).tanh()) > 0).sum()


SILENT = Table(
    {"into.weight": "h, _", "into.bias": "h", "out.weight": "_, h'", "out.bias": "_"},
    {"h": "permutation"},
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "mid"}, "the cost 'mid' is a loss on data, but no data is given"),
        ({"loss": squares}, "a loss is given, but no data"),
        ({"data": iter([])}, "data is a list_iterator, which can be read once"),
        ({"data": [], "loss": squares}, "the data yielded no batch"),
        ({"data": [torch.ones(3, 2)], "loss": lambda module, batch: module(batch)}, r"a tensor of shape \(3, 1\)"),
        ({"data": [torch.ones(3, 2)], "loss": lambda module, batch: 1.0}, "the loss returned float"),
        ({"steps": 0}, "steps = 0; give 1 or more"),
        ({"interval": (0.5, 0.1)}, "interval = "),
        ({"both_ends": True}, "both_ends needs permuting='kept'"),
        ({"cost": "l3"}, "cost: 'l3' does not fit"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        align(mlp(0), mlp(1), solver="sinkhorn", spec=TABLE, **options)


def test_weight_matching_takes_no_data():
    with pytest.raises(OptionError, match="uses weights alone and takes no data"):
        align(mlp(0), mlp(1), spec=TABLE, data=[torch.ones(3, 2)])


SCRIPT = """
import sys, torch
from accelerate import Accelerator
from test_gradient_descent import TABLE, mlp
from hf_rebasin import align
accelerator = Accelerator(cpu=True)
data = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) for i in range(4)]
def loss(module, batch):
    return (module(batch) - batch.sum(1, keepdim=True)).square().mean()
for solver in ("sinkhorn", "learned"):
    table = TABLE if solver == "sinkhorn" else TABLE.__class__(TABLE.rows, {"h.*": "scaled"})
    chosen = align(mlp(0), mlp(1), spec=table, solver=solver, data=data, loss=loss, steps=6, check_every=2, checks=2,
                   cost="mid")
    chosen.alignment.save(f"{sys.argv[1]}/{solver}-{accelerator.num_processes}-{accelerator.process_index}")
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """Each takes half of the batches, and both come to the same alignment."""
    run_script(SCRIPT, tmp_path, processes=2)
    for solver in ("sinkhorn", "learned"):
        first, second = ((tmp_path / f"{solver}-2-{rank}").read_bytes() for rank in (0, 1))
        assert first == second


@pytest.mark.parametrize("centre", [False, True])
def test_a_model_with_its_gains_folded_away_is_the_same_function(centre):
    """ViT: LayerNorms in front of a rotated stream; centred, too, as no norm has a bias that it keeps there."""
    model = TINY[FIRST["vit"]]
    checkpoint, spec = Checkpoint.open(model), spec_for(model)
    prefix, inputs = spec.table.prefix, inputs_of(model)
    assert spec.gauged
    folded = (
        CanonicalView(checkpoint, prefix).with_state(fold_state(spec, checkpoint.state(prefix), centre=centre)).model()
    )
    for norm in spec.gauged:
        gain = Checkpoint.open(folded).state(prefix)[norm.gain]
        assert torch.equal(gain, torch.ones_like(gain))
    with torch.no_grad():
        torch.testing.assert_close(folded(**inputs).logits, model(**inputs).logits)
