"""The interface of Sinkhorn re-basin: its snippets with only the import changed, and the promises of each class."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
import zoo
from torch import nn

from hf_rebasin import Alignment, RebasinNet, infer_spec, matching
from hf_rebasin.compat import sinkhorn_rebasin as rebasin_net
from hf_rebasin.compat import sinkhorn_rebasin_losses as loss
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError, SpecError, UnknownNameError
from hf_rebasin.loss import DistCosineLoss, DistL1Loss, DistL2Loss, MidLoss, RndLoss
from hf_rebasin.modules.forward import output_tensors, run_module

# From the authors' slides and from the example of their package, with `rebasin` replaced by `hf_rebasin`.
SLIDES = """
from hf_rebasin import RebasinNet
modelA = MLP(input_size = 28 * 28, num_classes = 10)
pi_modelA = RebasinNet(modelA, input_shape = (1, 28 * 28))
"""
PLANTED = """
from hf_rebasin.loss import DistL2Loss
from hf_rebasin import RebasinNet, matching

pi_modelA = RebasinNet(modelA, input_shape=(1, 1))
pi_modelA.random_init()
pi_modelA.eval()
modelB = deepcopy(pi_modelA())
target = [p.data.clone() for p in pi_modelA.p]

pi_modelA = RebasinNet(modelA, input_shape=(1, 1))
pi_modelA.identity_init()
pi_modelA.train()
criterion = DistL2Loss(modelB)
optimizer = torch.optim.AdamW(pi_modelA.p.parameters(), lr=0.1)
for iteration in range(300):
    pi_modelA.train()
    loss_training = criterion(pi_modelA())
    optimizer.zero_grad()
    loss_training.backward()
    optimizer.step()

    pi_modelA.eval()
    loss_validation = criterion(pi_modelA())
    if loss_validation == 0:
        break

pi_modelA.eval()
estimated = [matching(p.data.clone()) for p in pi_modelA.p]
"""

FAMILIES = ("mlp", "vgg", "resnet", "group_norm_nested", "weight_norm_old", "experts", "mha", "encoder_pre", "lstm")
TOKENS = ("char_gpt", "gpt2")  # with tied heads
ALL = zoo.MODULES | zoo.HF


class MLP(nn.Module):
    def __init__(self, input_size, num_classes, hidden=12):
        super().__init__()
        self.hidden, self.output = nn.Linear(input_size, hidden), nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.output(torch.tanh(self.hidden(x)))


def planted_mlp(seed, depth):
    torch.manual_seed(seed)
    widths = [1, *[10] * depth]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(10, 1))


def tiny(seed=0, norm=True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 2))
    model(torch.randn(8, 3))  # for its BatchNorm statistics
    return model


def snapshot(model):
    """Return all properties of a module, to compare with later."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    return state, flags, [id(p) for p in model.parameters()], [p.grad for p in model.parameters()]


def unchanged(model, before):
    state, *rest = snapshot(model)
    return all(torch.equal(state[key], tensor) for key, tensor in before[0].items()) and rest == list(before[1:])


def largest_difference(model, other, inputs):
    with torch.no_grad():
        pairs = zip(output_tensors(run_module(model, inputs)), output_tensors(run_module(other, inputs)), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def weights(*rows):
    """Return a module whose only parameter is this matrix."""
    model = nn.Linear(len(rows[0]), len(rows), bias=False)
    model.weight.data = torch.tensor(rows)
    return model


# --- the snippets ----------------------------------------------------------------------------------------------------


def test_the_slides():
    scope = {"MLP": MLP}
    exec(SLIDES, scope)
    pi = scope["pi_modelA"]
    assert pi.training
    assert [p.shape for p in pi.p] == [(12, 12)]
    assert all(p.is_leaf and p.requires_grad for p in pi.p)
    x = torch.randn(5, 28 * 28)
    assert pi(x).shape == pi(x=x).shape == (5, 10)
    assert pi(x[0]).shape == (1, 10)
    assert isinstance(pi(), MLP)
    pi.eval()
    assert torch.allclose(pi(x), scope["modelA"](x), atol=1e-6)


@pytest.mark.parametrize(("seed", "depth"), [(0, 2), (1, 2), (2, 4)])
def test_planted_permutations_are_recovered(seed, depth):
    scope = {"modelA": planted_mlp(seed, depth), "deepcopy": deepcopy, "torch": torch}
    before = snapshot(scope["modelA"])
    exec(PLANTED, scope)
    assert scope["loss_validation"] == 0
    assert len(scope["target"]) == depth
    assert not all(torch.equal(p, torch.eye(10)) for p in scope["target"])
    for estimate, target in zip(scope["estimated"], scope["target"], strict=True):
        assert torch.equal(estimate, target)
    assert same(scope["pi_modelA"](), scope["modelB"])
    assert unchanged(scope["modelA"], before)


def test_without_descent_nothing_is_recovered():
    scope = {"modelA": planted_mlp(0, 2), "deepcopy": deepcopy, "torch": torch}
    exec(PLANTED.replace("lr=0.1", "lr=0.0").replace("range(300)", "range(3)"), scope)
    assert scope["loss_validation"] > 0


# --- any module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES + TOKENS)
def test_soft_with_gradients_hard_with_the_same_function(name):
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    before = snapshot(model)
    pi = RebasinNet(model, inputs=inputs, generator=torch.Generator().manual_seed(0))
    pi.random_init(torch.Generator().manual_seed(1))
    assert len(pi.p) == len(pi.symmetries) == family.free

    soft = pi()
    assert type(soft) is type(model)
    assert all(isinstance(p, nn.Parameter) for p in soft.parameters())
    assert largest_difference(model, soft.eval(), inputs) > 1e-6
    DistL2Loss(model)(soft).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pi.p)

    hard = pi.eval()()
    assert largest_difference(model, hard, inputs) < 1e-12
    assert not same(model, hard)
    assert not any(p.requires_grad for p in hard.parameters())
    assert [(key, tensor.shape) for key, tensor in hard.state_dict().items()] == [
        (key, tensor.shape) for key, tensor in model.state_dict().items()
    ]
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_statistics_move_too(name):
    family = zoo.MODULES[name]
    model, inputs = family.build(), family.inputs()
    pi = RebasinNet(model, inputs=inputs).eval()
    pi.random_init(torch.Generator().manual_seed(1))
    hard = pi()
    moved = [key for key, b in hard.named_buffers() if not torch.equal(b, dict(model.named_buffers())[key])]
    assert any("running_mean" in key for key in moved)
    assert any("running_var" in key for key in moved)
    with torch.no_grad():  # negative control: left in place
        for key in moved:
            dict(hard.named_buffers())[key].copy_(dict(model.named_buffers())[key])
    assert largest_difference(model, hard, inputs) > 1e-3


def test_a_loss_reaches_the_latents_through_the_data():
    model, (x,) = zoo.MODULES["resnet"].build(), zoo.MODULES["resnet"].inputs()
    pi = RebasinNet(model, input_shape=x.shape)
    nn.functional.cross_entropy(pi(x), torch.tensor([0, 3])).backward()
    assert all(p.grad.abs().sum() > 0 for p in pi.p)
    assert all(p.grad is None for p in pi.model.parameters())


def test_every_call_gives_a_module_of_its_own():
    model = tiny()
    before = snapshot(model)
    pi = RebasinNet(model, input_shape=(2, 3))
    first, second = pi(), pi()
    first(torch.randn(4, 3))  # changes the statistics of this one only
    with torch.no_grad():
        first[0].weight.zero_()
    assert not same(first, second)
    assert same(second, pi())
    mine = deepcopy(pi.eval()())
    for parameter in mine.parameters():
        parameter.requires_grad_().data.zero_()
    assert not any(p.requires_grad for p in pi().parameters())
    assert unchanged(model, before)
    assert same(pi.model, model)


def test_its_mode_does_not_depend_on_the_model():
    model = tiny().eval()
    pi = RebasinNet(model, input_shape=(2, 3))
    assert all(m.training for m in pi().modules())
    assert not any(m.training for m in pi.eval()().modules())
    pi.train()
    assert not any(m.training for m in model.modules())


# --- latents ---------------------------------------------------------------------------------------------------------


def test_the_start_is_near_the_identity():
    model = MLP(3, 2, hidden=40)
    latent, again, other = (
        RebasinNet(model, (1, 3), generator=torch.Generator().manual_seed(seed)).p[0].detach() for seed in (0, 0, 1)
    )
    assert torch.equal(latent, again)
    assert not torch.equal(latent, other)
    noise = latent - torch.eye(40)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    torch.manual_seed(5)
    seeded = RebasinNet(model, (1, 3)).p[0].detach()
    torch.manual_seed(5)
    assert torch.equal(seeded, RebasinNet(model, (1, 3)).p[0])


def test_identity_init():
    model = tiny()
    pi = RebasinNet(model, (2, 3))
    held = pi.p[0]
    pi.random_init()
    pi.identity_init()
    assert pi.p[0] is held  # an optimizer refers to it
    assert torch.equal(held, torch.eye(4))
    assert same(pi.eval()(), model)


def test_random_init_draws_permutations():
    family = zoo.MODULES["mha"]  # every head has its own order of query-key units
    pi = RebasinNet(family.build(), inputs=family.inputs())
    pi.random_init(torch.Generator().manual_seed(0))
    assert any(p.dim() == 3 for p in pi.p)
    for p in pi.p:
        assert ((p == 0) | (p == 1)).all()
        assert (p.sum(-1) == 1).all()
        assert (p.sum(-2) == 1).all()
        assert torch.equal(matching(p), p)
    before = [p.detach().clone() for p in pi.p]
    pi.random_init(torch.Generator().manual_seed(0))
    assert all(torch.equal(p, q) for p, q in zip(pi.p, before, strict=True))
    pi.random_init(torch.Generator().manual_seed(1))
    assert not all(torch.equal(p, q) for p, q in zip(pi.p, before, strict=True))


def test_by_hand():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    for parameter, value in zip(model.parameters(), ([[1.0], [2.0]], [3.0, 4.0], [[5.0, 6.0]], [7.0]), strict=True):
        parameter.data = torch.tensor(value)
    pi = RebasinNet(model, (1, 1))
    with torch.no_grad():
        pi.p[0].copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    # S of this is [[1, e], [e, 1]] / (1 + e)
    e, soft = math.e, pi()
    assert torch.allclose(soft[0].bias, torch.tensor([3 + 4 * e, 4 + 3 * e]) / (1 + e))
    assert torch.allclose(soft[0].weight, torch.tensor([[1 + 2 * e], [2 + e]]) / (1 + e))
    assert torch.allclose(soft[2].weight, torch.tensor([[5 + 6 * e, 6 + 5 * e]]) / (1 + e))
    assert torch.equal(soft[2].bias, model[2].bias)
    for changed in ({"tau": 0.5}, {"l": 2.0}):
        sharper = RebasinNet(model, (1, 1), **changed)
        sharper.load_state_dict(pi.state_dict())
        assert torch.allclose(sharper()[0].bias, torch.tensor([3 + 4 * e**2, 4 + 3 * e**2]) / (1 + e**2))
    pi.tau = 0.5
    assert torch.equal(pi()[0].bias, sharper()[0].bias)
    hard = pi.eval()()
    assert hard[0].bias.tolist() == [4, 3]
    assert hard[2].weight.tolist() == [[6, 5]]


def test_iterations_and_operators():
    model = MLP(3, 2)
    few, many = RebasinNet(model, (1, 3), n_iter=1), RebasinNet(model, (1, 3), n_iter=50)
    many.load_state_dict(few.state_dict())
    assert not torch.allclose(few().hidden.bias, many().hidden.bias, atol=1e-6)
    unrolled = RebasinNet(model, (1, 3), n_iter=50, operator="unrolled")
    unrolled.load_state_dict(few.state_dict())
    for pi in (many, unrolled):
        pi().hidden.weight.square().sum().backward()
    assert torch.allclose(many.p[0].grad, unrolled.p[0].grad, atol=1e-5)
    assert many.p[0].grad.abs().sum() > 1e-3


def test_optimizers_get_the_latents_alone():
    pi = RebasinNet(tiny(), (2, 3))
    assert [id(p) for p in pi.parameters()] == [id(p) for p in pi.p]
    assert not any(p.requires_grad for p in pi.model.parameters())


def test_its_alignment_is_what_eval_mode_does():
    model = tiny()
    pi = RebasinNet(model, (2, 3)).eval()
    pi.random_init(torch.Generator().manual_seed(0))
    alignment = pi.alignment()
    assert isinstance(alignment, Alignment)
    assert same(alignment.apply(model), pi())


# --- matching --------------------------------------------------------------------------------------------------------


def test_matching():
    alpha = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    assert matching(alpha).tolist() == [[0, 1], [1, 0]]
    assert matching(alpha).dtype == torch.float64
    assert matching(torch.stack([alpha, -alpha])).tolist() == [[[0, 1], [1, 0]], [[1, 0], [0, 1]]]
    for wrong in (torch.zeros(2, 3), torch.zeros(2), [[1.0]]):
        with pytest.raises(OptionError, match="square"):
            matching(wrong)


# --- as any module ---------------------------------------------------------------------------------------------------


def test_a_saved_state_comes_back():
    pi = RebasinNet(tiny(0), (2, 3)).eval()
    pi.random_init(torch.Generator().manual_seed(0))
    other = RebasinNet(tiny(1), (2, 3)).eval()
    assert not same(pi(), other())
    other.load_state_dict(pi.state_dict())
    assert same(pi(), other())
    assert same(pi.train()(), other.train()())


def test_a_deep_copy_learns_by_itself():
    pi = RebasinNet(tiny(), (2, 3))
    copy = deepcopy(pi)
    assert same(pi(), copy())
    DistL2Loss(tiny(1))(copy()).backward()
    assert copy.p[0].grad is not None
    assert pi.p[0].grad is None
    copy.random_init(torch.Generator().manual_seed(3))
    assert not same(pi.eval()(), copy.eval()())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype(dtype):
    model = tiny()
    pi = RebasinNet(model, (2, 3)).to(dtype)
    pi.random_init(torch.Generator().manual_seed(0))
    assert all(p.dtype == dtype for p in (*pi.p, *pi().parameters()))
    DistL2Loss(deepcopy(model).to(dtype))(pi()).backward()
    assert pi.p[0].grad.dtype == dtype
    assert pi.p[0].grad.abs().sum() > 0
    pi.eval()
    x = torch.randn(5, 3, dtype=dtype)
    assert torch.allclose(pi(x), deepcopy(model).eval().to(dtype)(x), atol=20 * torch.finfo(dtype).eps)


def test_a_model_in_half_precision_has_latents_in_float32():
    pi = RebasinNet(tiny().bfloat16(), (2, 3))
    assert pi.p[0].dtype == torch.float32
    assert pi()[0].weight.dtype == torch.bfloat16
    assert RebasinNet(tiny().double(), (2, 3)).p[0].dtype == torch.float64


# --- what may move ---------------------------------------------------------------------------------------------------


def test_a_spec_of_ones_own_and_what_is_held():
    model = planted_mlp(0, 2)
    spec = infer_spec(model, torch.zeros(1, 1))
    first, second = spec.symmetries
    assert RebasinNet(model, spec=spec).symmetries == (first, second)
    assert RebasinNet(model, spec=spec.table).symmetries == (first, second)
    pi = RebasinNet(model, (1, 1), hold=[first])
    assert pi.symmetries == (second,)
    pi.eval().random_init(torch.Generator().manual_seed(0))
    assert torch.equal(pi()[0].weight, model[0].weight)
    assert not torch.equal(pi()[2].weight, model[2].weight)
    with pytest.raises(UnknownNameError, match="nothing"):
        RebasinNet(model, (1, 1), hold=["nothing"])
    with pytest.raises(MismatchError, match=r"'0\.weight'"):
        RebasinNet(MLP(1, 1), spec=spec)


def test_a_table_needs_no_inputs(bert):
    pi = RebasinNet(bert).eval()
    pi.random_init(torch.Generator().manual_seed(0))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        original, moved = bert(input_ids=ids), pi(input_ids=ids)
        assert torch.allclose(original.logits, moved.logits, atol=1e-10)
        assert torch.equal(moved.logits, pi(ids).logits)
    assert not same(pi(), bert)


def test_statistics_can_be_taken_anew():
    model = tiny()
    pi = RebasinNet(model, (2, 3)).eval()
    pi.random_init(torch.Generator().manual_seed(0))
    model(torch.randn(8, 3) + 5)
    model.eval()
    x = torch.randn(4, 3)
    assert not torch.allclose(pi(x), model(x), atol=1e-3)
    pi.update_batchnorm(model)
    assert torch.allclose(pi(x), model(x), atol=1e-6)
    with pytest.raises(MismatchError, match="BatchNorm"):
        pi.update_batchnorm(MLP(3, 2))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_shape": (1, 4)}, SpecError, r"input_shape = \(1, 4\).*batch"),
        ({"input_shape": ()}, OptionError, "sizes of one batch"),
        ({"input_shape": (1, 0)}, OptionError, "sizes of one batch"),
        ({"input_shape": (1, 3.0)}, OptionError, "sizes of one batch"),
        ({"input_shape": 3}, OptionError, "sizes of one batch"),
        ({"input_shape": "13"}, OptionError, "sizes of one batch"),
        ({"input_shape": (1, 3), "inputs": torch.zeros(1, 3)}, OptionError, "both"),
        ({}, MismatchError, "inputs"),
        ({"inputs": torch.zeros(1, 4)}, SpecError, "cannot be inferred"),
        ({"input_shape": (1, 3), "operator": "explicit"}, OptionError, "did you mean 'implicit'"),
        ({"input_shape": (1, 3), "permutation_type": "mat"}, OptionError, "mat_mul"),
        ({"input_shape": (1, 3), "tau": 0}, OptionError, "tau = 0"),
        ({"input_shape": (1, 3), "l": -1.0}, OptionError, "l = -1"),
        ({"input_shape": (1, 3), "n_iter": 0}, OptionError, "n_iter = 0"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        RebasinNet(MLP(3, 2), **options)


def test_wrong_models_are_refused():
    with pytest.raises(OptionError, match="dict"):
        RebasinNet({}, (1, 3))
    with pytest.raises(SpecError, match=r"nothing to permute.*output"):
        RebasinNet(nn.Linear(3, 4), (1, 3))
    numbers = zoo.MODULES["bag"].build()
    with pytest.raises(SpecError, match="inputs="):
        RebasinNet(numbers, (1, 3))
    packed = MLP(3, 2)
    packed.hidden.register_buffer("qweight", torch.zeros(2))
    with pytest.raises(CheckpointError, match="quantised"):
        RebasinNet(packed, (1, 3))


def test_a_model_stored_in_another_form_is_refused(monkeypatch):
    monkeypatch.setattr(rebasin_net, "module_names", lambda model: None)
    with pytest.raises(CheckpointError, match="stores its tensors in another form"):
        RebasinNet(MLP(3, 2), (1, 3))


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (DistL2Loss, (1 + 4 + 0 + 9) / 4),
        (DistL1Loss, (1 + 2 + 0 + 3) / 4),
        (DistCosineLoss, (1 - (0 + 3 + 4 + 4) / math.sqrt((1 + 9 + 4 + 16) * (0 + 1 + 4 + 1))) / 4),
    ],
)
def test_distances_by_hand(kind, value):
    a, b = weights([1.0, 3.0], [2.0, 4.0]), weights([0.0, 1.0], [2.0, 1.0])
    assert kind(a)(b).item() == pytest.approx(value, rel=1e-6)
    assert kind(a)(a).item() == pytest.approx(0, abs=1e-7)
    other = kind(b)
    other.set_model(a)
    assert other.modela is a
    assert other(b).item() == pytest.approx(value, rel=1e-6)
    kind(a)(b).backward()
    assert b.weight.grad.abs().sum() > 0
    assert a.weight.grad is None


@pytest.mark.parametrize("kind", [DistL2Loss, DistL1Loss, DistCosineLoss])
def test_distances_are_means_over_all_weights(kind):
    """The sums over several tensors are added, then divided by the number of all weights."""
    a, b = (nn.Sequential(*models) for models in ([weights([1.0, 2.0]), weights([3.0])], [weights([5.0, 1.0])] * 2))
    b[1] = weights([-4.0])
    parts = [kind(x)(y).item() * n for x, y, n in zip(a, b, (2, 1), strict=True)]
    assert kind(a)(b).item() == pytest.approx(sum(parts) / 3, rel=1e-6)


def test_a_cosine_with_zeros():
    assert DistCosineLoss(weights([0.0, 0.0]))(weights([1.0, 0.0])).item() == pytest.approx(0.5)


def test_the_middle_by_hand():
    a, b, x, y = weights([1.0, 3.0]), weights([3.0, 1.0]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1)
    assert MidLoss(a)(b, x, y).item() == 4  # 2²
    assert MidLoss(a, criterion=nn.L1Loss())(b, x, y).item() == 2
    MidLoss(a)(b, x, y).backward()
    assert b.weight.grad.tolist() == [[2, 0]]  # 2 · 2 · x, and half of it comes from b
    assert MidLoss(b)(b, x, y).item() == 9


def test_a_random_place_by_hand():
    a, b, x, y = weights([1.0]), weights([3.0]), torch.ones(1, 1), torch.zeros(1, 1)
    criterion = RndLoss(a, criterion=lambda output, target: (output - target).sum())
    torch.manual_seed(0)
    values = [criterion(b, x, y).item() for _ in range(50)]
    torch.manual_seed(0)
    assert values == pytest.approx([3 - 2 * torch.rand(()).item() for _ in range(50)], rel=1e-6)
    assert min(values) < 1.2
    assert max(values) > 2.8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [DistL2Loss, DistL1Loss, DistCosineLoss, MidLoss, RndLoss])
def test_losses_change_no_model(kind, training):
    fixed, model, pi = tiny(0), tiny(1), RebasinNet(tiny(2), (2, 3))
    fixed.train(training)[0].bias.requires_grad_(False)
    criterion = kind(fixed)
    more = (torch.randn(5, 3), torch.randn(5, 2)) if kind in (MidLoss, RndLoss) else ()
    before = snapshot(fixed), snapshot(model), snapshot(pi.model)
    criterion.train(not training)
    criterion.double()
    for moving in (model.eval(), model.train(), pi()):
        criterion(moving, *more)
    value = criterion(pi(), *more)
    value.backward()
    assert pi.p[0].grad.abs().sum() > 0
    criterion(pi.eval()(), *more)
    assert unchanged(fixed, before[0])
    assert unchanged(model, before[1])
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_interpolated_models_use_batch_statistics():
    a, b, x, y = tiny(0), tiny(1), 5 * torch.randn(6, 3) + 3, torch.randn(6, 2)
    middle = deepcopy(a).train()
    with torch.no_grad():
        for p, q, r in zip(middle.parameters(), a.parameters(), b.parameters(), strict=True):
            p.copy_((q + r) / 2)
    value = nn.functional.mse_loss(middle(x), y).item()
    for moving in (b.train(), b.eval()):
        assert MidLoss(a)(moving, x, y).item() == pytest.approx(value, rel=1e-5)
    assert nn.functional.mse_loss(middle.eval()(x), y).item() != pytest.approx(value, rel=1e-2)


def test_losses_take_the_inputs_that_inference_takes(bert):
    ids = {"input_ids": torch.arange(6)[None]}
    criterion = MidLoss(bert, criterion=lambda output, target: (output.logits - target).abs().max())
    with torch.no_grad():
        assert criterion(bert, ids, bert(**ids).logits).item() < 1e-10


def test_losses_refuse_models_that_do_not_match():
    a = MLP(3, 2)
    for kind in (DistL2Loss, MidLoss):
        more = (torch.zeros(1, 3), torch.zeros(1, 2)) if kind is MidLoss else ()
        with pytest.raises(OptionError, match="set_model"):
            kind()(a, *more)
        with pytest.raises(OptionError, match="dict"):
            kind({})
        with pytest.raises(MismatchError, match=r"hidden.weight is \(12, 3\)"):
            kind(a)(MLP(4, 2), *more)
        with pytest.raises(MismatchError, match=r"4 parameters .*, 6 in"):
            kind(a)(planted_mlp(0, 2), *more)


def test_losses_are_exported():
    import hf_rebasin

    for name in ("DistL2Loss", "DistL1Loss", "DistCosineLoss", "MidLoss", "RndLoss"):
        assert getattr(hf_rebasin, name) is getattr(loss, name)
