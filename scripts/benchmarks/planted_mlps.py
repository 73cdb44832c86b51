"""Recover the planted permutations of Sinkhorn re-basin (Peña et al., arXiv 2212.12042, table 1) by weight matching.

    python scripts/benchmarks/planted_mlps.py [--pairs 50]

The models are tanh MLPs 1-10-…-10-1 with 2, 4 and 8 hidden layers: at initialisation (Rnd), or trained on a polynomial
of degree 3, (x − 3)³ on [2, 4], or of degree 1, x + 3 on [−4, −2] (100 points, noise 0.05). Each is paired with a
permuted copy of itself. A pair is recovered if the L1 distance after alignment is exactly 0. Our results are printed
beside the paper's mean L1 × 1000 of weight matching and of its own method.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import torch
from torch import Tensor

from hf_rebasin import Alignment, Table, align, spec_for

WIDTH = 10
TARGETS = {
    "Rnd": None,
    "Pol3": (lambda x: (x - 3) ** 3, 2.0, 4.0),
    "Pol1": (lambda x: x + 3, -4.0, -2.0),
}
PAPER = {  # mean L1 × 1000 of weight matching in the paper; its own method has 0.00 everywhere
    ("Rnd", 2): 6.05,
    ("Rnd", 4): 4.12,
    ("Rnd", 8): 0.50,
    ("Pol3", 2): 0.57,
    ("Pol3", 4): 0.07,
    ("Pol3", 8): 0.01,
    ("Pol1", 2): 0.27,
    ("Pol1", 4): 0.0,
    ("Pol1", 8): 0.0,
}


def make_table(hidden: int) -> Table:
    rows = {}
    for i in range(hidden + 1):
        out, into = (f"hidden.{i}" if i < hidden else "_"), (f"hidden.{i - 1}'" if i else "_")
        rows |= {f"{i}.weight": f"{out}, {into}", f"{i}.bias": out}
    return Table(rows, {"hidden.*": "permutation"})


def make_networks(task: str, hidden: int, pairs: int) -> list[dict[str, Tensor]]:
    """Return `pairs` networks with PyTorch's default initialisation, trained together as one batch of matrices."""
    generator = torch.Generator().manual_seed(hidden)
    sizes = [1, *[WIDTH] * hidden, 1]
    parameters = []
    for n_in, n_out in pairwise(sizes):
        bound = n_in**-0.5
        parameters.append(torch.empty(pairs, n_out, n_in).uniform_(-bound, bound, generator=generator))
        parameters.append(torch.empty(pairs, n_out, 1).uniform_(-bound, bound, generator=generator))
    if TARGETS[task] is not None:
        target, low, high = TARGETS[task]
        x = torch.empty(pairs, 1, 100).uniform_(low, high, generator=generator)
        y = target(x) + 0.05 * torch.randn(x.shape, generator=generator)
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.Adam(parameters, 1e-2)
        for _ in range(1000):
            h = x
            for i in range(0, len(parameters), 2):
                h = parameters[i] @ h + parameters[i + 1]
                h = torch.tanh(h) if i < len(parameters) - 2 else h
            loss = (h - y).square().mean((1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [
        {
            f"{i // 2}.{'bias' if i % 2 else 'weight'}": (p[k, :, 0] if i % 2 else p[k]).detach().clone()
            for i, p in enumerate(parameters)
        }
        for k in range(pairs)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50)
    pairs = parser.parse_args().pairs
    print(
        f"{'task':5} {'hidden':>6} {'recovered':>10} {'mean L1 ×1000':>14} {'paper WM':>9} {'paper SRB':>10} {'s':>6}"
    )
    for hidden in (2, 4, 8):
        for task in TARGETS:
            states = make_networks(task, hidden, pairs)
            start, distances = time.perf_counter(), []
            for k, state in enumerate(states):
                g = Alignment.random(spec_for(state, make_table(hidden)), torch.Generator().manual_seed(1000 + k))
                moved = g.apply(state)
                back = align(state, moved, spec=make_table(hidden)).apply(moved)
                n = sum(t.numel() for t in state.values())
                distances.append(sum((back[key] - t).abs().sum().item() for key, t in state.items()) / n)
            recovered = sum(d == 0 for d in distances)
            print(
                f"{task:5} {hidden:6} {f'{recovered}/{pairs}':>10} {1000 * sum(distances) / pairs:14.2f} "
                f"{PAPER[task, hidden]:9.2f} {0:10.2f} {time.perf_counter() - start:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
