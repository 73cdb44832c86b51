"""Run experiments 1 and 2 of Re-basin via implicit Sinkhorn differentiation (Guerrero Peña et al. 2023).

    python scripts/benchmarks/sinkhorn_rebasin.py [planted] [convolutions] [barriers] [testbed]

planted       tanh MLPs with planted permutations, by Sinkhorn re-basin from P = I and by weight matching
convolutions  VGG11 and ResNet18 with random weights and planted permutations, by both methods
barriers      an MLP, a VGG and a ResNet trained from three seeds on scikit-learn's digits: loss and accuracy on 25
              points of the line after every method; OUT/curves.png
testbed       the MLPs of scripts/benchmarks/testbed.py, widths 64 and 512: Sinkhorn re-basin on the midpoint's loss

By default all four, in Markdown. Models that are not in DIR (OUT/models by default; folders KIND-SEED) are trained
there first. Only permutations are used, as in the paper (arXiv 2212.12042): a tanh would also allow signs, and a ReLU
scales.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import testbed
import torch
from barrier import format_markdown, log_progress, measure_path, train
from planted_mlps import PAPER, TARGETS, make_networks, make_table
from rebasin_package import ResNet18
from torch import Tensor, nn
from tqdm import tqdm

from hf_rebasin import Alignment, Spec, Table, align, infer_spec, spec_for
from hf_rebasin.demo.experiments import MLP_TABLE
from hf_rebasin.evaluation.barrier import Curve
from hf_rebasin.solving.solution import Solution

KINDS = {"mlp64": "MLP, two hidden layers", "vgg": "VGG", "resnet": "ResNet"}
SEEDS = 3

# --- networks --------------------------------------------------------------------------------------------------------

VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def make_vgg(layout: Sequence[int | str], *, norm: bool, inputs: int) -> nn.Sequential:
    """Return a VGG (Simonyan and Zisserman 2014, arXiv 1409.1556) for small images, with one linear layer."""
    layers: list[nn.Module] = []
    for width in layout:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class SmallVGG(nn.Module):
    """Four convolutions with BatchNorm for 8 × 8 images, with the test bed's signature."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_vgg((16, "M", 32, "M", 64, 64), norm=True, inputs=1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(pixel_values)
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


# --- experiment 1: planted permutations ------------------------------------------------------------------------------

FEW, MANY = 50, 300  # steps


def run_planted(arguments: argparse.Namespace) -> None:
    """Print nine cells of tanh MLPs 1-10-…-10-1 beside the paper's table 1."""
    rows = [
        ["weights", "hidden", f"exact in {FEW}", f"exact in {MANY}", "most steps", "L1", "paper: L1"],
    ]
    rows[0] += ["WM: exact", "WM: L1", "paper, WM: L1", "s", "WM: s"]
    for hidden in arguments.hidden:
        for task in TARGETS:
            recoveries = []
            states = make_networks(task, hidden, arguments.pairs)
            for k, state in enumerate(tqdm(states, desc=f"{task}, {hidden} hidden", leave=False, disable=None)):
                g = Alignment.random(spec_for(state, make_table(hidden)), torch.Generator().manual_seed(1000 + k))
                moved = g.apply(state)
                recoveries.append(
                    [*recover(state, moved, hidden, align_by_l2), *recover(state, moved, hidden, align_by_matching)]
                )
            steps, l1, seconds, _, matching_l1, matching_seconds = zip(*recoveries, strict=True)
            exact = [n for n, distance in zip(steps, l1, strict=True) if distance == 0]
            shares = [sum(n <= limit for n in exact) for limit in (FEW, MANY)] + [sum(d == 0 for d in matching_l1)]
            few, many, matched = (f"{count / len(states):.0%}" for count in shares)
            row = [task, str(hidden), few, many, str(max(exact, default=0)), f"{1000 * mean(l1):.2f}", "0.00"]
            row += [matched, f"{1000 * mean(matching_l1):.2f}", f"{PAPER[task, hidden]:.2f}"]
            rows.append([*row, f"{sum(seconds):.0f}", f"{sum(matching_seconds):.0f}"])
    print("## Experiment 1: planted permutations of MLPs\n")
    print(f"{arguments.pairs} pairs per cell; L1: mean × 1000.\n\n{format_markdown(rows, left=1)}\n", flush=True)


def align_by_l2(fixed: dict[str, Tensor], moving: dict[str, Tensor], spec: Table) -> Solution:
    options: dict[str, Any] = dict(start="identity", cost="l2", steps=MANY, check_every=1, patience=MANY)
    return align(fixed, moving, spec=spec, solver="sinkhorn", groups="permutation", **options)


def align_by_matching(fixed: dict[str, Tensor], moving: dict[str, Tensor], spec: Table) -> Solution:
    return align(fixed, moving, spec=spec, groups="permutation")


def recover(
    fixed: dict[str, Tensor], moving: dict[str, Tensor], hidden: int, solve: Callable[..., Solution]
) -> tuple[int, float, float]:
    """Align a pair; return (steps, remaining mean L1 distance, seconds)."""
    start = time.perf_counter()
    solution = solve(fixed, moving, make_table(hidden))
    seconds = time.perf_counter() - start
    back, n = solution.apply(moving), sum(t.numel() for t in fixed.values())
    return count_steps(solution), sum((back[k] - t).abs().sum().item() for k, t in fixed.items()) / n, seconds


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "VGG11": lambda: make_vgg(VGG11, norm=False, inputs=3),
    "VGG11-BN": lambda: make_vgg(VGG11, norm=True, inputs=3),
    "ResNet18": lambda: ResNet18(10),
}


def run_convolutions(arguments: argparse.Namespace) -> None:
    """Print results for random weights, planted permutations and cost L1."""
    rows = [["network", "pair", "exact", "steps", "s", "s a step", "WM: exact", "WM: s"]]
    for name in arguments.networks:
        for pair in range(arguments.few):
            log_progress(f"{name}, pair {pair}")
            torch.manual_seed(pair)
            model = CONVOLUTIONS[name]().eval()
            spec = infer_spec(model, torch.randn(2, 3, 32, 32))
            moved = Alignment.random(spec, torch.Generator().manual_seed(1000 + pair)).apply(model)
            cells = []
            for options in (
                dict(solver="sinkhorn", start="identity", cost="l1", lr=10.0, steps=25, check_every=1),
                {},
            ):
                limits = dict(patience=25) if options else {}
                start = time.perf_counter()
                solution = align(model, moved, spec=spec, groups="permutation", progress=True, **options, **limits)
                seconds, steps = time.perf_counter() - start, count_steps(solution)
                cells += [
                    "yes" if have_equal_states(model, solution.apply(moved)) else "no",
                    str(steps),
                    f"{seconds:.1f}",
                ]
            exact, steps, seconds, matched, _, matching = cells
            a_step = f"{float(seconds) / int(steps):.2f}"
            rows.append([name, str(pair), exact, steps, seconds, a_step, matched, matching])
    print("## Experiment 1: planted permutations of VGG and ResNet\n")
    print("32 × 32 pixels, random weights, cost L1, learning rate 10, at most 25 steps.\n")
    print(f"{format_markdown(rows, left=1)}\n", flush=True)


def count_steps(solution: Solution) -> int:
    """Return the number of steps: all are in the history, after the identity and the start."""
    return len(solution.history) - 2


def have_equal_states(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# --- experiment 2: barriers ------------------------------------------------------------------------------------------

GRADIENTS: dict[str, dict[str, Any]] = {  # descents
    "straight-through": dict(solver="straight_through", cost="mid"),
    "Sinkhorn L2": dict(solver="sinkhorn", cost="l2"),
    "Sinkhorn Mid": dict(solver="sinkhorn", cost="mid"),
    "Sinkhorn Rnd": dict(solver="sinkhorn", cost="rnd"),
}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "weight matching": {},
    **{name: dict(start="identity", **options) for name, options in GRADIENTS.items()},
    "straight-through from WM": GRADIENTS["straight-through"],
    "Sinkhorn Mid from WM": GRADIENTS["Sinkhorn Mid"],
    "Sinkhorn Rnd from WM": GRADIENTS["Sinkhorn Rnd"],
}
COLOURS = ("#808080", "#000000", "#cc79a7", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#0072b2", "#009e73")


def make_batches(kind: str) -> list[testbed.Batch]:
    """Return a batch of noisy images for each step of a descent."""
    stream = testbed.make_batches(kind, "train", torch.Generator().manual_seed(99))
    return [batch for _, batch in zip(range(300), stream, strict=False)]


def load_models(kind: str, folder: Path) -> list[nn.Module]:
    """Return a model per seed, trained first if it is missing."""
    models = []
    for seed in range(SEEDS):
        path = folder / f"{kind}-{seed}"
        if kind != "vgg":
            if not path.exists():
                train(kind, seed, path)
            models.append(testbed.load(kind, path))
            continue
        if not path.exists():
            path.mkdir(parents=True)
            torch.save(train_vgg(seed).state_dict(), path / "model.pt")
        model = SmallVGG().eval()
        model.load_state_dict(torch.load(path / "model.pt"))
        models.append(model)
    return models


def train_vgg(seed: int, steps: int = 600) -> nn.Module:
    log_progress(f"training vgg-{seed}: {steps} steps")
    torch.manual_seed(seed)
    model, generator = SmallVGG().train(), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _, batch in zip(range(steps), testbed.make_batches("vgg", "train", generator), strict=False):
        loss = model(**batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def find_symmetries(kind: str, model: nn.Module) -> Spec | Table:
    return MLP_TABLE if kind.startswith("mlp") else infer_spec(model, {"pixel_values": testbed.digits()[1][0][:2]})


def run_barriers(arguments: argparse.Namespace) -> None:
    """Print and plot loss and accuracy on the line between networks trained independently."""
    curves: dict[str, dict[str, list[Curve]]] = {}
    seconds: dict[str, list[float]] = {}
    for kind in arguments.kinds:
        networks, data = load_models(kind, arguments.models), make_batches(kind)
        spec, curves[kind] = find_symmetries(kind, networks[0]), {}
        for name, options in METHODS.items():
            for i, j in combinations(range(SEEDS), 2):
                log_progress(f"{kind}, {name}, pair {i}–{j}")
                a, b = networks[i], networks[j]
                start = time.perf_counter()
                if options is not None:
                    more = descent_options(arguments, options, data) if options else {}
                    b = align(a, b, spec=spec, groups="permutation", progress=True, **options, **more).apply(b)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                curves[kind].setdefault(name, []).append(measure_path(a, b, kind))
    print("## Experiment 2: barriers between networks trained independently\n")
    print("Test loss barrier of the pairs 0–1, 0–2, 1–2, and the lowest accuracy at a midpoint.\n")
    rows = [["", *(KINDS[kind] for kind in curves), "mean s"]]
    for name in METHODS:
        cells = [
            " ".join(f"{c.barrier:.3f}" for c in curves[kind][name])
            + f" ({min(c.middle['accuracy'] for c in curves[kind][name]):.1%})"
            for kind in curves
        ]
        rows.append([name, *cells, f"{mean(seconds[name]):.1f}"])
    print(f"{format_markdown(rows, left=1)}\n", flush=True)
    plot(curves, arguments.out / "curves.png")


def descent_options(
    arguments: argparse.Namespace, options: dict[str, Any], data: list[testbed.Batch]
) -> dict[str, Any]:
    """Return the options that descents share; costs of weights alone take no data."""
    limits = dict(steps=arguments.steps, lr=arguments.lr, check_every=10, patience=arguments.steps, weight_decay=0.01)
    return limits if options["cost"] == "l2" else limits | dict(data=data, checks=20)


def plot(curves: dict[str, dict[str, list[Curve]]], file: Path) -> None:
    """Plot test loss above and accuracy below: the mean over pairs, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(curves), figsize=(4.2 * len(curves), 6.4), squeeze=False, sharex=True)
    where = torch.linspace(0, 1, 25).numpy()
    for column, (kind, methods) in zip(axes.T, curves.items(), strict=True):
        for (name, paths), colour in zip(methods.items(), COLOURS, strict=True):
            for axis, values in zip(
                column, ([path.loss for path in paths], [path.accuracy for path in paths]), strict=True
            ):
                lines = torch.tensor(values)
                style = "--" if name.endswith("WM") else "-"
                axis.plot(where, lines.mean(0).numpy(), color=colour, linestyle=style, linewidth=1.8, label=name)
                axis.fill_between(where, lines.amin(0), lines.amax(0), color=colour, alpha=0.08, linewidth=0)
        column[0].set_title(KINDS[kind], fontsize=10)
        column[1].set_xticks([0, 0.5, 1], ["fixed", "½", "moving"])
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test loss")
    axes[1, 0].set_ylabel("accuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(file, dpi=150)


TARGET = {"mlp64": 0.02, "mlp512": 0.005}
SETTING: dict[str, Any] = dict(solver="sinkhorn", cost="mid", checks=20, patience=30, weight_decay=0.01)


def run_testbed(arguments: argparse.Namespace) -> None:
    """Print one setting for all pairs of both widths, beside weight matching."""
    rows = [["", "pair", "plain", "weight matching", "Sinkhorn Mid", "target", "s"]]
    for kind, target in TARGET.items():
        networks, data = load_models(kind, arguments.models), make_batches(kind)
        for i, j in combinations(range(SEEDS), 2):
            log_progress(f"{kind}, pair {i}–{j}")
            a, b = networks[i], networks[j]
            matched = align(a, b, spec=MLP_TABLE).apply(b)
            start = time.perf_counter()
            descended = align(a, b, spec=MLP_TABLE, data=data, progress=True, **SETTING).apply(b)
            seconds = time.perf_counter() - start
            cells = [f"{measure_path(a, model, kind).barrier:.4f}" for model in (b, matched, descended)]
            rows.append([kind, f"{i}–{j}", *cells, f"{target}", f"{seconds:.0f}"])
    print("## MLPs of the test bed\n")
    print(f"Test loss barrier, 25 points.\n\n{format_markdown(rows, left=2)}\n", flush=True)


# --- all -------------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "planted": run_planted,
    "convolutions": run_convolutions,
    "barriers": run_barriers,
    "testbed": run_testbed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--pairs", type=int, default=50, help="pairs of MLPs per cell")
    parser.add_argument("--hidden", type=int, nargs="+", default=[2, 4, 8], choices=[2, 4, 8])
    parser.add_argument("--few", type=int, default=3, help="pairs of VGG and ResNet")
    parser.add_argument("--networks", nargs="+", default=list(CONVOLUTIONS), choices=CONVOLUTIONS)
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of models for the barriers"
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of every descent of the barriers")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of these descents")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="folder of the trained models; missing ones are trained"
    )
    parser.add_argument("--out", type=Path, default=Path("sinkhorn"), help="folder of the plot")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - SECTIONS.keys():
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    import transformers

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.models = arguments.models or arguments.out / "models"
    for name in arguments.sections or SECTIONS:
        start = time.perf_counter()
        SECTIONS[name](arguments)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
