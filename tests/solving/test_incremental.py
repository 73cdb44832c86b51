"""One episode of incremental learning: what it does to a module, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_rebasin import infer_spec
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError
from hf_rebasin.solving.incremental import learn

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].sum(1) > 0).long() + (X[:, 3] > 1).long()
BATCHES = [(X[:30], Y[:30]), (X[30:], Y[30:])]


def cost(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def total_cost(module):
    return cost(module, (X, Y)).item()


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def run_episode(module, batches=BATCHES, loss=cost, **options):
    return learn(module, batches, loss, **(dict(inputs=X[:1], epochs=2) | options))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("training", [True, False])
def test_the_given_module_stays_as_it_is(module, training):
    module.train(training)
    module[0].eval()
    module[3].weight.requires_grad_(False)
    before, modes = copy.deepcopy(module), [part.training for part in module.modules()]
    places = [p.data_ptr() for p in module.parameters()]
    episode = run_episode(module)
    for each in (module, episode.module):
        assert [part.training for part in each.modules()] == modes
        assert [p.requires_grad for p in each.parameters()] == [p.requires_grad for p in before.parameters()]
    assert same(module, before)
    assert [p.data_ptr() for p in module.parameters()] == places
    assert all(p.grad is None for each in (module, episode.module) for p in each.parameters())
    assert not {p.data_ptr() for p in episode.module.parameters()} & set(places)
    assert not same(episode.module, module)


def test_the_cost_falls(module):
    module.eval()
    episode = run_episode(module, epochs=30, delta_clip=1.0, delta_decay=0.0, alpha=0.5)
    assert len(episode.history) == 30
    assert episode.history[-1] < 0.7 * episode.history[0]
    assert total_cost(run_episode(module, epochs=30, delta_clip=1.0, alpha=0.0, lr=0.0).module) < total_cost(module)


def test_without_delta_and_alpha_nothing_changes(module):
    episode = run_episode(module, alpha=0.0, delta_lr=0.0)
    assert same(episode.module, module)
    assert not same(run_episode(module, alpha=0.0).module, module)


def test_all_the_way_to_the_permuted_module_is_the_same_function(module):
    module.eval()
    episode = run_episode(module, alpha=1.0, delta_lr=0.0, epochs=5, noise=1.0)
    assert episode.alignment.moved
    assert not same(episode.module, module)
    assert same(episode.module, episode.alignment.apply(module))
    torch.testing.assert_close(episode.module(X), module(X))
    half = run_episode(module, alpha=0.5, delta_lr=0.0, epochs=5, noise=1.0)
    assert (half.module(X) - module(X)).abs().max() > 1e-3


def test_the_step_is_the_formula(module):
    """(1 − α)θ + α·π(θ) + δ, where δ is what another α leaves."""
    delta = run_episode(module, alpha=0.0, noise=1.0)
    episode = run_episode(module, alpha=0.3, noise=1.0)
    moved = episode.alignment.apply(module).state_dict()
    assert episode.alignment.moved
    for name, own in module.state_dict().items():
        if own.is_floating_point():
            step = delta.module.state_dict()[name] - own
            torch.testing.assert_close(episode.module.state_dict()[name], 0.7 * own + 0.3 * moved[name] + step)


def test_frozen_parameters_get_no_delta(module):
    module[0].requires_grad_(False)
    episode = run_episode(module, alpha=0.0).module
    assert torch.equal(episode[0].weight, module[0].weight)
    assert not torch.equal(episode[3].weight, module[3].weight)


def test_delta_is_bounded(module):
    """A step is no longer than learning rate × clip, and β pulls δ back."""
    episode = run_episode(module, alpha=0.0, delta_lr=0.05, delta_clip=1e-3, delta_decay=0.0, delta_noise=0.0)
    steps = [(b - a).abs().max().item() for a, b in zip(module.parameters(), episode.module.parameters(), strict=True)]
    assert 0 < max(steps) <= 4 * 0.05 * 1e-3 * 1.01  # 2 epochs of 2 batches

    def size(beta):
        episode = run_episode(module, alpha=0.0, delta_clip=1.0, delta_decay=0.0, epochs=20, beta=beta).module
        return sum(
            (b - a).square().sum().item() for a, b in zip(module.parameters(), episode.parameters(), strict=True)
        )

    assert size(5.0) < 0.5 * size(0.0)


def test_one_generator_one_result(module):
    def result(seed):
        return run_episode(module, noise=1.0, generator=torch.Generator().manual_seed(seed))

    assert same(result(1).module, result(1).module)
    assert result(1).history == result(1).history
    assert not same(result(1).module, result(2).module)
    assert same(run_episode(module).module, run_episode(module).module)


def test_symmetries_by_a_spec_or_a_table(module):
    spec = infer_spec(module, X[:1])
    by_inference = run_episode(module)
    assert same(run_episode(module, inputs=None, spec=spec).module, by_inference.module)
    assert same(run_episode(module, inputs=None, spec=spec.table).module, by_inference.module)


def test_a_transformers_model(bert):
    from hf_rebasin.alignment.exactness import compute_outputs

    ids = torch.randint(4, 40, (2, 7), generator=torch.Generator().manual_seed(0))

    def own(model, batch):
        return model(input_ids=batch, labels=batch).loss

    episode = learn(bert, [ids], own, epochs=1, alpha=1.0, delta_lr=0.0, noise=1.0)
    assert episode.alignment.moved
    for a, b in zip(
        compute_outputs(bert, dict(input_ids=ids)), compute_outputs(episode.module, dict(input_ids=ids)), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert bert.training == episode.module.training
    tied = episode.module.get_output_embeddings().weight is episode.module.get_input_embeddings().weight
    assert tied == (bert.get_output_embeddings().weight is bert.get_input_embeddings().weight)
    assert learn(bert, [ids], own, epochs=2).history[-1] > 0


def test_half_precision(module):
    module = module.eval().to(torch.bfloat16)
    episode = run_episode(module, [(x.bfloat16(), y) for x, y in BATCHES], inputs=X[:1].bfloat16())
    assert {p.dtype for p in episode.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(alpha=1.5), OptionError, "alpha = 1.5; .*between 0 and 1"),
        (dict(beta=-1), OptionError, "beta = -1; give 0 or more"),
        (dict(epochs=0), OptionError, "epochs = 0; give 1 or more"),
        (dict(delta_lr=float("nan")), OptionError, "delta_lr = nan"),
        (dict(batches=[]), OptionError, "the batches are empty"),
        (dict(batches=iter(BATCHES)), OptionError, "can be read only once"),
        (dict(loss=lambda module, batch: module(batch[0])), OptionError, r"shape \(30, 3\); it has to return one"),
        (dict(loss=lambda module, batch: torch.tensor(1.0)), OptionError, "no gradient"),
        (dict(inputs=None), MismatchError, "give inputs"),
        (dict(spec=infer_spec(nn.Linear(6, 2), X[:1])), MismatchError, r"'0.weight' is \(8, 6\) here, and is unknown"),
    ],
)
def test_errors_say_what_to_do(module, options, error, message):
    with pytest.raises(error, match=message):
        run_episode(module, **options)


def test_what_cannot_learn_is_refused(module):
    frozen = nn.Sequential(nn.Linear(6, 3)).requires_grad_(False)
    with pytest.raises(OptionError, match="nothing that permutes"):
        run_episode(frozen)
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        run_episode(module)
