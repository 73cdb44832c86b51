"""The Sinkhorn operator: its values, and its implicit gradient compared with three others."""

import warnings

import pytest
import torch
from torch import Tensor

from hf_rebasin.alignment.elements import sinkhorn as sinkhorn_operator
from hf_rebasin.alignment.elements.sinkhorn import sinkhorn
from hf_rebasin.errors import OptionError, RebasinError

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=["cholesky", "conjugate gradients"])
def method(request, monkeypatch):
    """Either method of solving, at any size."""
    monkeypatch.setattr(sinkhorn_operator, "DIRECT_UP_TO", 10**9 if request.param == "cholesky" else 0)
    return request.param


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(x: Tensor, upstream: Tensor, *options: float, implicit: bool = True) -> Tensor:
    x = x.detach().clone().requires_grad_()
    sinkhorn(x, *options, implicit=implicit).backward(upstream)
    return x.grad


def by_definition(x: Tensor, temperature: float, iterations: int) -> Tensor:
    z = x / temperature
    for _ in range(iterations):
        z = z - z.logsumexp(-2, keepdim=True)
        z = z - z.logsumexp(-1, keepdim=True)
    return z.exp()


def by_dense_solve(p: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    """The (2n − 1)² system of the paper, v_n = 0."""
    n, h = len(p), p * upstream / temperature
    system = torch.cat([torch.cat([p.sum(1).diag(), p], 1), torch.cat([p.T, p.sum(0).diag()], 1)])
    uv = torch.linalg.solve(system[:-1, :-1], torch.cat([h.sum(1), h.sum(0)])[:-1])
    return h - p * (uv[:n, None] + torch.cat([uv[n:], uv.new_zeros(1)]))


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "temperature"), [(0.1, 1.0), (1.0, 1.0), (3.0, 0.3), (30.0, 0.1), (1e4, 1.0)])
def test_it_is_the_iteration_of_the_definition(scale, temperature, dtype):
    x = draw(2, 17, 17, scale=scale, dtype=dtype)
    rounding = torch.finfo(dtype).eps * (10 + float(x.abs().max()) / temperature)  # of the exponents
    for iterations in (1, 2, 20):
        p = sinkhorn(x, temperature, iterations)
        assert (p - by_definition(x, temperature, iterations)).abs().max() <= 10 * rounding
        assert (p.sum(-1) - 1).abs().max() <= 10 * torch.finfo(dtype).eps
        assert torch.equal(
            sinkhorn(x, temperature, iterations, implicit=False), by_definition(x, temperature, iterations)
        )


def test_columns_sum_to_one_when_it_has_converged():
    assert (sinkhorn(draw(30, 30)).sum(0) - 1).abs().max() <= 1e-10
    assert (sinkhorn(draw(30, 30), 0.05).sum(0) - 1).abs().max() >= 1e-2  # here it has not


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_vectors_move_into_the_exponents(dtype):
    """Two rows that prefer the same column; the entries that decide between the others underflow."""
    low = 3 * float(torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64).log())
    x = torch.tensor([[0, low, low - 1], [1, low - 2, low], [2, 1, 0]], dtype=torch.float64)
    p = sinkhorn(x.to(dtype), 1.0, 4000)
    expected = by_definition(x, 1.0, 4000)
    assert 0.05 < expected[0, 1] < 0.95  # exp(low) underflows to 0, but the entry converges to a middle value
    assert (p - expected).abs().max() <= 4 * abs(low) * torch.finfo(dtype).eps


def test_the_example_of_the_docstring():
    p = sinkhorn(torch.log(torch.tensor([[3.0, 1.0], [1.0, 3.0]])))
    torch.testing.assert_close(p, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


# The gradient


@pytest.mark.parametrize("n", [5, 10, 64])
@pytest.mark.parametrize("iterations", [20, 100])
def test_gradient_is_that_of_the_iterations(n, iterations, method):
    for x in (draw(n, n, seed=n), torch.eye(n).double() + draw(n, n, seed=n, scale=0.1)):
        upstream = draw(n, n, seed=n + 1)
        implicit = gradient(x, upstream, 1.0, iterations)
        assert relative_distance(implicit, gradient(x, upstream, 1.0, iterations, implicit=False)) <= 1e-10


def test_gradient_is_of_the_converged_map(method):
    """At a low temperature 20 iterations have not converged, which the comparison shows."""
    x, upstream = draw(10, 10), draw(10, 10, seed=1)
    assert relative_distance(gradient(x, upstream, 0.2, 20), gradient(x, upstream, 0.2, 20, implicit=False)) > 1e-3
    assert (
        relative_distance(gradient(x, upstream, 0.2, 3000), gradient(x, upstream, 0.2, 3000, implicit=False)) <= 1e-10
    )


@pytest.mark.parametrize("n", [5, 10, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_gradient_is_that_of_the_dense_system(n, temperature, method):
    """Converged or not: own row and column sums."""
    x, upstream = draw(n, n), draw(n, n, seed=1)
    p = sinkhorn(x, temperature)
    assert relative_distance(gradient(x, upstream, temperature), by_dense_solve(p, upstream, temperature)) <= 1e-10


def test_gradient_is_that_of_finite_differences(method):
    x, upstream, h = draw(5, 5), draw(5, 5, seed=1), 1e-5
    expected = torch.empty_like(x)
    for i in range(25):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += h
        down.view(-1)[i] -= h
        change = sinkhorn(up, 0.7, 400) - sinkhorn(down, 0.7, 400)
        expected.view(-1)[i] = (change * upstream).sum() / (2 * h)
    assert relative_distance(gradient(x, upstream, 0.7, 400), expected) <= 1e-8
    assert torch.autograd.gradcheck(lambda t: sinkhorn(t, 0.7, 400), draw(2, 4, 4).requires_grad_())


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.1])
def test_float32_gradient_is_as_good_as_the_dense_one(temperature, method):
    x = torch.eye(64) + draw(64, 64, scale=0.1, dtype=torch.float32)
    upstream = draw(64, 64, seed=1, dtype=torch.float32)
    p = sinkhorn(x, temperature)
    exact = by_dense_solve(p.double(), upstream.double(), temperature)
    wrong = (gradient(x, upstream, temperature) - exact).norm()
    assert wrong <= max(2 * (by_dense_solve(p, upstream, temperature) - exact).norm(), 1e-6 * exact.norm())


def test_conjugate_gradients_converge_where_they_should_and_say_so_where_not():
    def solve(x, **options):
        p = sinkhorn(x, **options)
        return sinkhorn_operator._conjugate_gradients(sinkhorn_operator._System(p, draw(*x.shape, seed=1)))

    assert solve(draw(300, 300)) is not None
    assert solve(torch.eye(300).double() + draw(300, 300, scale=0.1), temperature=0.1) is not None
    assert solve(draw(300, 300), temperature=0.02) is None  # then the other method is taken
    x, upstream = draw(300, 300), draw(300, 300, seed=1)
    p = sinkhorn(x, 0.02)
    direct = sinkhorn_operator._by_cholesky(p, upstream) / 0.02
    torch.testing.assert_close(gradient(x, upstream, 0.02), direct)


# Hard inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 6, 300])
@pytest.mark.parametrize("peak", [5, 50, 500])
def test_saturated(peak, n, dtype, method):
    """S is 0 up to rounding, or exactly where exp underflows off the diagonal. A gradient of a constant is 0."""
    x, upstream = peak * torch.eye(n, dtype=dtype), draw(n, n, dtype=dtype)
    assert (sinkhorn(x, 0.1) - torch.eye(n, dtype=dtype)).abs().max() <= 1e-21
    assert gradient(x, upstream, 0.1).abs().max() <= 100 * torch.finfo(dtype).eps * upstream.abs().max() / 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(20))
def test_huge_values(seed, dtype, method):
    n = 2 + seed
    x = 1e4 * draw(n, n, seed=seed).sign().to(dtype)
    for logits in (x, draw(n, n, seed=seed, scale=1e4, dtype=dtype), torch.full_like(x, -1e4)):
        upstream = draw(n, n, seed=seed + 1, dtype=dtype)
        assert sinkhorn(logits, 0.1).isfinite().all()
        grad = gradient(logits, upstream, 0.1)
        assert grad.isfinite().all()
        assert grad.abs().max() <= 10 * n * upstream.abs().max() / 0.1  # no quotient of roundings got through


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_the_sum_does_not_depend_on_x(temperature, dtype, method):
    """Its upstream gradient is one number, expanded."""
    x = draw(2, 20, 20, dtype=dtype).requires_grad_()
    sinkhorn(x, temperature).sum().backward()
    assert x.grad.abs().max() <= 100 * torch.finfo(dtype).eps / temperature


def test_batches_are_their_elements(method):
    x, upstream = draw(2, 3, 7, 7), draw(2, 3, 7, 7, seed=1)
    x[0, 0], x[1, 1] = 500 * torch.eye(7), 300 * x[1, 1]
    x[1, 2] = draw(7, 7).sign() * 1e4
    p, grad = sinkhorn(x), gradient(x, upstream)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(p[i, j], sinkhorn(x[i, j]), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad[i, j], gradient(x[i, j], upstream[i, j]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implicit", [True, False])
def test_one_by_one_and_empty(implicit, method):
    x = torch.tensor([[[3.0]], [[-1e4]]], requires_grad=True)
    p = sinkhorn(x, 0.1, implicit=implicit)
    assert p.tolist() == [[[1.0]], [[1.0]]]
    (2 * p).sum().backward()
    assert x.grad.abs().max() <= 1e-5
    for shape in ((0, 4, 4), (3, 0, 0), (0, 0)):
        empty = torch.empty(shape, requires_grad=True)
        p = sinkhorn(empty, implicit=implicit)
        assert p.shape == shape
        p.sum().backward()
        assert empty.grad.shape == shape


def test_strided_inputs(method):
    base, upstream = draw(9, 9, 4), draw(4, 9, 9, seed=1)
    for x in (base.permute(2, 0, 1), base.permute(2, 1, 0), draw(9, 18)[:, ::2], draw(9, 1).expand(9, 9)):
        up = (upstream if x.ndim == 3 else upstream[0]).mT
        before = x.clone()
        torch.testing.assert_close(sinkhorn(x), sinkhorn(x.contiguous()), rtol=1e-13, atol=1e-15)
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(sinkhorn(leaf), leaf, up)
        torch.testing.assert_close(grad, gradient(x.contiguous(), up.contiguous()), rtol=1e-11, atol=1e-14)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_come_back_and_halves_are_computed_wider(dtype, method):
    x = draw(40, 40).to(dtype).requires_grad_()
    p = sinkhorn(x)
    assert p.dtype == dtype
    assert torch.equal(p, sinkhorn(x.detach().float()).to(dtype))
    p[0, 0].backward()
    assert x.grad.dtype == dtype


def test_autocast_does_not_reach_inside(method):
    x, upstream = draw(300, 300, dtype=torch.float32), draw(300, 300, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p, grad = sinkhorn(x), gradient(x, upstream)
    assert torch.equal(p, sinkhorn(x))
    assert torch.equal(grad, gradient(x, upstream))


def test_used_twice_and_differentiated_once():
    x = draw(6, 6).requires_grad_()
    once = gradient(x, draw(6, 6, seed=1))
    p = sinkhorn(x)
    upstream = draw(6, 6, seed=1)
    for _ in range(2):
        (grad,) = torch.autograd.grad(p, x, upstream, retain_graph=True)  # nothing saved is overwritten
        assert torch.equal(grad, once)
    (grad,) = torch.autograd.grad((p * upstream.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    twice = torch.autograd.gradgradcheck(lambda t: sinkhorn(t, implicit=False), draw(3, 3).requires_grad_())
    assert twice


def test_descent_finds_a_permutation():
    """Gradient descent finds the permutation that maps one matrix to another."""
    w, order = draw(8, 3), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    x = torch.eye(8).double().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (sinkhorn(x) @ w - w[order]).square().sum().backward()
        optimizer.step()
    assert torch.equal(sinkhorn(x).argmax(-1), order)


# Refusals


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_is_refused(entry, implicit):
    x = torch.zeros(2, 3, 3)
    x[1, 0, 2] = entry
    with pytest.raises(OptionError, match="not finite: all must be"):
        sinkhorn(x, 0.1, implicit=implicit)
    assert issubclass(OptionError, RebasinError)
    assert issubclass(OptionError, ValueError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.eye(3), 0.0), "temperature 0.0: must be positive"),
        ((torch.eye(3), -1.0), "temperature -1.0: must be positive"),
        ((torch.eye(3), float("nan")), "temperature nan: must be positive"),
        ((torch.eye(3), float("inf")), "temperature inf: must be positive"),
        ((torch.eye(3), 1.0, 0), "0 iterations: must be a whole number"),
        ((torch.eye(3), 1.0, 2.5), "2.5 iterations: must be a whole number"),
        ((torch.ones(2, 3),), r"x of shape \(2, 3\): must be"),
        ((torch.ones(3),), r"x of shape \(3,\): must be"),
        ((torch.ones(3, 3, dtype=torch.long),), "x of dtype torch.int64: must be"),
    ],
)
def test_refusals(arguments, says):
    with pytest.raises(OptionError, match=says):
        sinkhorn(*arguments)


def test_no_warnings(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(draw(2, 5, 5), draw(2, 5, 5, seed=1))
