"""Compare the implicit gradient of the Sinkhorn operator with its unrolled gradient and with a dense solve.

    python scripts/benchmarks/sinkhorn.py [--sizes 64 768 3072] [--types float32 float64] [--temperature 1]

Logits are I + 0.1 · randn, the upstream gradient is randn. Each line is for one n and dtype: the seconds of the
forward pass, of forward and backward (implicit and unrolled), and of `torch.linalg.solve` alone on the dense (2n − 1)²
system with the same gradient; every time is the least of a few runs. "ratio" is the time of implicit forward and
backward divided by the dense solve's. Differences are ‖gradient − reference‖ / ‖reference‖: of the implicit gradient
to the dense and the unrolled one of its dtype, and of the implicit and the dense gradient to the dense one in float64
from the same P.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_rebasin.alignment.elements.sinkhorn import sinkhorn


def time_fastest(run: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the fastest run, the one that other processes disturbed least."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def compute_gradient(x: Tensor, upstream: Tensor, temperature: float, implicit: bool) -> Tensor:
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(sinkhorn(x, temperature, implicit=implicit), x, upstream)
    return grad


def make_dense_system(p: Tensor, upstream: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return [[diag r, P], [Pᵀ, diag c]] without its last row and column (v_n = 0), and its right-hand side."""
    n, h = len(p), p * upstream / temperature
    system = torch.cat([p.sum(1), p.sum(0)]).diag()
    system[:n, n:], system[n:, :n] = p, p.T
    return system[:-1, :-1].contiguous(), torch.cat([h.sum(1), h.sum(0)])[:-1]


def solve_dense_gradient(p: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    n, uv = len(p), torch.linalg.solve(*make_dense_system(p, upstream, temperature))
    return p * (upstream / temperature - uv[:n, None] - torch.cat([uv[n:], uv.new_zeros(1)]))


def time_dense_solve(system: tuple[Tensor, Tensor], repeats: int) -> float:
    return time_fastest(lambda: torch.linalg.solve(*system), repeats)


def relative_difference(a: Tensor, reference: Tensor) -> float:
    return float((a.double() - reference).norm() / reference.double().norm())


def measure(n: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, str]:
    torch.manual_seed(0)
    x = torch.eye(n, dtype=dtype) + 0.1 * torch.randn(n, n, dtype=dtype)
    upstream, temperature = torch.randn(n, n, dtype=dtype), arguments.temperature
    repeats = arguments.repeats if n > 1000 else 5 * arguments.repeats
    forward = time_fastest(lambda: sinkhorn(x, temperature), repeats)
    implicit = time_fastest(lambda: compute_gradient(x, upstream, temperature, True), repeats)
    unrolled = time_fastest(lambda: compute_gradient(x, upstream, temperature, False), repeats)
    p = sinkhorn(x, temperature)
    dense = time_dense_solve(make_dense_system(p, upstream, temperature), repeats)
    reference = solve_dense_gradient(p, upstream, temperature)
    exact = solve_dense_gradient(p.double(), upstream.double(), temperature)
    grad = compute_gradient(x, upstream, temperature, True)
    return {
        "forward": f"{forward:.4f} s",
        "+ backward": f"{implicit:.4f} s",
        "unrolled": f"{unrolled:.4f} s",
        "dense solve": f"{dense:.4f} s",
        "ratio": f"{implicit / dense:.3f}",
        "to dense": f"{relative_difference(grad, reference):.1e}",
        "to unrolled": f"{relative_difference(grad, compute_gradient(x, upstream, temperature, False)):.1e}",
        "of float64: implicit": f"{relative_difference(grad, exact):.1e}",
        "dense": f"{relative_difference(reference, exact):.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 768, 3072])
    parser.add_argument("--types", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of the largest sizes; small sizes get five times as many"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for dtype in arguments.types:
        for n in arguments.sizes:
            cells = measure(n, getattr(torch, dtype), arguments)
            print(f"{n:5} {dtype}", "  ".join(f"{name} {cell}" for name, cell in cells.items()), flush=True)


if __name__ == "__main__":
    main()
