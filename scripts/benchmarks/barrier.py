"""Measure barriers between models trained from different seeds: as they are, and after every kind of alignment.

    python scripts/benchmarks/barrier.py [KIND ...] [--methods NAME ...] [--fine-tune STEPS] [--models DIR]
        [--out barrier]

KIND is one of the test bed's (testbed.py): mlp64 mlp512 resnet vit gpt2 llama bert. Each method is applied to all
three pairs of three seeds, and measured at 25 evenly spaced points on the line. A barrier is the highest rise above
the straight line between the ends, of the test loss and of the error rate. Models that are not in DIR (OUT/models by
default; folders KIND-SEED) are trained there first, all of them in half an hour on one thread. Writes OUT/barrier.md,
barrier.json with every number, and barrier.png.

With --fine-tune, the midpoint of two models is trained for that many steps, and the plain average also for as many
steps as any method took in total.

Methods that make one model instead of a path (refit, REPAIR) have no barrier but an *excess*: the loss of the midpoint
above the mean of the ends. It is given for every method.

Every moved or merged model is written to disk and read again before it is measured; "own" is its test loss minus that
of the original model. BatchNorm statistics are recomputed in every model on a line, ends included. Refit and REPAIR
compute them from the unlabelled batches that they use for everything else.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import testbed
import torch
from torch import nn

from hf_rebasin import Alignment, Checkpoint, align, distil
from hf_rebasin.compat.in_memory import merge_modules
from hf_rebasin.demo.experiments import MLP_TABLE
from hf_rebasin.evaluation.barrier import Curve
from hf_rebasin.evaluation.interpolation import interpolate
from hf_rebasin.evaluation.metrics import Measured
from hf_rebasin.merging.merge import combine
from hf_rebasin.merging.methods import refit
from hf_rebasin.merging.recalibration import recalibrate, repair
from hf_rebasin.solving.solution import Solution
from hf_rebasin.solving.solvers.learned import Solver as Learned
from hf_rebasin.symmetries.table import Table

TUNED = ("plain", "full", "learned")
SEEDS, POINTS = 3, 25
FEW_BATCHES = 16  # unlabelled, for activation matching, refit and REPAIR
MANY_BATCHES = 64  # unlabelled, for descents and as a control
LABELLED_BATCHES = 1000  # labelled, for descents, which repeat them
TITLES = {
    "mlp64": "MLP, width 64",
    "mlp512": "MLP, width 512",
    "resnet": "ResNet",
    "vit": "ViT",
    "gpt2": "GPT-2",
    "llama": "Llama",
    "bert": "BERT",
}

PERMUTABLE = ("mlp64", "mlp512", "resnet")  # kinds that permutations alone bring together

# --- methods ---------------------------------------------------------------------------------------------------------

Moved = tuple[Checkpoint, float]  # a model aligned with another, and the seconds it took


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the tables: a function (fixed, moving) that aligns one model with another, and the kinds it is for."""

    move: Callable[[Path, Path], Moved]
    colour: str
    kinds: Sequence[str] = tuple(TITLES)
    steps: int = 0  # of gradient descent on labelled training batches
    finish: Callable[..., Checkpoint] | None = None  # (merge, models, data) → one model, instead of a path
    merge: str = "linear"
    batches: int = FEW_BATCHES  # that `finish` uses


def keep_plain(fixed: Path, moving: Path) -> Moved:
    return Checkpoint.open(moving), 0.0


def align_permutations(fixed: Path, moving: Path) -> Moved:
    solution, seconds = match_weights(fixed, moving, "permutation")
    return solution.apply(moving), seconds


def align_full(fixed: Path, moving: Path) -> Moved:
    solution, seconds = match_weights(fixed, moving, "full")
    return solution.apply(moving), seconds


def align_full_with_four_starts(fixed: Path, moving: Path) -> Moved:
    """Full alignment with the best of four starts instead of two."""
    solution, seconds = match_weights(fixed, moving, "full", starts=4)
    return solution.apply(moving), seconds


def align_rotations_only(fixed: Path, moving: Path) -> Moved:
    """Only the rotations of the full alignment; the seconds are those of all of it."""
    solution, seconds = match_weights(fixed, moving, "full")
    return extract_rotations(solution).apply(moving), seconds


@cache
def match_activations(fixed: Path, moving: Path) -> Moved:
    """Activation matching on a few unlabelled batches."""
    kind = fixed.name.rpartition("-")[0]
    groups = "permutation" if kind in PERMUTABLE else "full"
    data = unlabelled_batches(kind)
    start = time.perf_counter()
    solution = align(
        testbed.load(kind, fixed),
        moving,
        solver="activation_matching",
        spec=table_for(moving),
        groups=groups,
        data=data,
    )
    return solution.apply(Checkpoint.open(moving)), time.perf_counter() - start


def align_sinkhorn_mid(fixed: Path, moving: Path) -> Moved:
    """Permutations relaxed to doubly stochastic matrices, minimising the loss at the midpoint."""
    return descend(fixed, moving, "sinkhorn", "permutation", "mid")


def align_sinkhorn_rnd(fixed: Path, moving: Path) -> Moved:
    """Permutations relaxed to doubly stochastic matrices, minimising the loss at random points."""
    return descend(fixed, moving, "sinkhorn", "permutation", "rnd")


def align_straight_through(fixed: Path, moving: Path) -> Moved:
    """Permutations by straight-through gradients, minimising the loss at the midpoint."""
    return descend(fixed, moving, "straight_through", "permutation", "mid")


@cache
def align_learned(fixed: Path, moving: Path) -> Moved:
    """Rotations, bases and scales, learned from the full alignment on."""
    return descend(fixed, moving, "learned", "full", "rnd")


STRAIGHT_THROUGH = {"start": "activation_matching", "steps": 1000, "starts": 3}


def align_straight_through_unlabelled(fixed: Path, moving: Path) -> Moved:
    """Permutations that minimise a divergence on unlabelled batches: the best of three descents from activations."""
    return descend(fixed, moving, "straight_through", "permutation", "mid", labels=False, **STRAIGHT_THROUGH)


def align_learned_unlabelled(fixed: Path, moving: Path) -> Moved:
    """Rotations, bases and scales learned on unlabelled batches; for a ResNet scales, after its permutations."""
    start = (
        {"solver": "straight_through", **STRAIGHT_THROUGH} if fixed.name.startswith("resnet") else "weight_matching"
    )
    return descend(fixed, moving, "learned", "full", "rnd", labels=False, start=start)


def refit_and_distil(merged: Checkpoint, models: Sequence[Checkpoint], data: list[testbed.Batch]) -> Checkpoint:
    return distil(refit.finish(merged, models, data), models, data)


def distil_for_long(merged: Checkpoint, models: Sequence[Checkpoint], data: list[testbed.Batch]) -> Checkpoint:
    """Distil for as many steps as `align_learned` takes, at a rate that suits small models."""
    return distil(merged, models, data, steps=Learned().steps, rate=1e-3)


METHODS = {
    "plain": Method(move=keep_plain, colour="#808080"),
    "permutations": Method(move=align_permutations, colour="#d55e00"),
    "rotation alone": Method(move=align_rotations_only, colour="#009e73", kinds=("llama",)),
    "full, 4 starts": Method(move=align_full_with_four_starts, colour="#cc79a7"),
    "full": Method(move=align_full, colour="#0072b2"),
    "activations": Method(move=match_activations, colour="#882255"),
    "straight-through": Method(move=align_straight_through, colour="#f0e442", kinds=PERMUTABLE),
    "sinkhorn, mid": Method(move=align_sinkhorn_mid, colour="#56b4e9", kinds=PERMUTABLE),
    "sinkhorn, rnd": Method(move=align_sinkhorn_rnd, colour="#000000", kinds=PERMUTABLE),
    "learned": Method(
        move=align_learned, colour="#e69f00", kinds=("vit", "gpt2", "llama", "bert"), steps=Learned().steps
    ),
    "straight-through, no labels": Method(move=align_straight_through_unlabelled, colour="#661100", kinds=("resnet",)),
    "learned, no labels": Method(
        move=align_learned_unlabelled, colour="#999933", kinds=("vit", "gpt2", "llama", "bert", "resnet")
    ),
    "permutations + REPAIR": Method(move=align_permutations, colour="#d55e00", kinds=PERMUTABLE, finish=repair),
    "activations + REPAIR": Method(move=match_activations, colour="#882255", kinds=PERMUTABLE, finish=repair),
    "refit of plain": Method(move=keep_plain, colour="#808080", finish=refit.finish, merge="refit"),
    "refit of full": Method(move=align_full, colour="#0072b2", finish=refit.finish, merge="refit"),
    "refit": Method(move=match_activations, colour="#117733", finish=refit.finish, merge="refit"),
    f"refit of plain, {MANY_BATCHES} batches": Method(
        move=keep_plain, colour="#808080", finish=refit.finish, merge="refit", batches=MANY_BATCHES
    ),
    "distilled refit of plain": Method(
        move=keep_plain, colour="#808080", finish=refit_and_distil, batches=MANY_BATCHES
    ),
    "distilled refit of full": Method(
        move=align_full, colour="#0072b2", finish=refit_and_distil, batches=MANY_BATCHES
    ),
    "distilled refit": Method(move=match_activations, colour="#117733", finish=refit_and_distil, batches=MANY_BATCHES),
    "distilled plain, 1000 steps": Method(
        move=keep_plain, colour="#808080", finish=distil_for_long, batches=MANY_BATCHES
    ),
    "distilled full, 1000 steps": Method(
        move=align_full, colour="#0072b2", finish=distil_for_long, batches=MANY_BATCHES
    ),
}


@cache
def match_weights(fixed: Path, moving: Path, groups: str, starts: int = 2) -> tuple[Solution, float]:
    start = time.perf_counter()
    solution = align(fixed, moving, spec=table_for(moving), groups=groups, starts=starts)
    return solution, time.perf_counter() - start


def descend(
    fixed: Path, moving: Path, solver: str, groups: str, cost: str, *, labels: bool = True, **options: Any
) -> Moved:
    """Align by gradients of the loss in between on labelled batches, or of a divergence on unlabelled ones."""
    kind, spec = fixed.name.rpartition("-")[0], table_for(moving)
    start = time.perf_counter()
    data = training_batches(kind, LABELLED_BATCHES) if labels else unlabelled_descent_batches(kind)
    settings = {"solver": solver, "spec": spec, "groups": groups, "data": data, "cost": cost, **options}
    solution = align(testbed.load(kind, fixed), moving, **settings)
    return solution.apply(Checkpoint.open(moving)), time.perf_counter() - start


def table_for(folder: Path) -> Table | None:
    """Return the table of the test bed's MLPs; None for other models, whose symmetries are known or inferred."""
    return None if (folder / "config.json").exists() else replace(MLP_TABLE, groups={"hidden.*": "scaled"})  # ReLU


def unlabelled_batches(kind: str, count: int = FEW_BATCHES) -> list[testbed.Batch]:
    """Return training batches without labels."""
    return [{k: x for k, x in batch.items() if k != "labels"} for batch in training_batches(kind, count)]


def unlabelled_descent_batches(kind: str) -> list[testbed.Batch]:
    """Return unlabelled batches for a descent: larger ones for a ResNet, whose BatchNorm uses batch statistics."""
    if kind != "resnet":
        return unlabelled_batches(kind, MANY_BATCHES)
    images = torch.cat([batch["pixel_values"] for batch in unlabelled_batches(kind, 4 * MANY_BATCHES)])
    return [{"pixel_values": x} for x in images.split(4 * testbed.BATCH)]


def training_batches(kind: str, count: int, seed: int = 5) -> list[testbed.Batch]:
    """Return labelled training batches."""
    return list(islice(testbed.make_batches(kind, "train", torch.Generator().manual_seed(seed)), count))


def extract_rotations(solution: Solution) -> Alignment:
    """Return the part of a full alignment that rotates the residual stream."""
    alignment = solution.alignment
    rotations = {name: g for name, g in alignment.elements.items() if alignment.spec.symmetries[name].rotates}
    return replace(alignment, elements=rotations)


# --- measuring -------------------------------------------------------------------------------------------------------

Result = dict[str, Any]  # of one pair by one method


def measure(kind: str, folder: Path, methods: Sequence[str]) -> Iterator[Result]:
    """Measure every pair by every method, the plain average first; the models are `folder`/KIND-SEED."""
    paths = [folder / f"{kind}-{seed}" for seed in range(SEEDS)]
    models = [testbed.load(kind, path) for path in paths]
    own = [testbed.evaluate(model, kind)[0] for model in models]  # with the statistics they were saved with
    baselines: dict[tuple[int, int], Curve] = {}
    for method in methods:
        for a, b in combinations(range(SEEDS), 2):
            checkpoint, seconds = METHODS[method].move(paths[a], paths[b])
            moved = save_and_reload(checkpoint, kind)
            row: Result = {"kind": kind, "method": method, "pair": (a, b), "align_seconds": seconds}
            if METHODS[method].finish is None:
                curve = measure_path(models[a], moved, kind)
                baseline = baselines.setdefault((a, b), curve)
                change = testbed.evaluate(moved, kind)[0] - own[b]
                row |= summarise_path(curve, baseline) | {"own": change}
                middle = curve.middle["loss"], curve.middle["accuracy"]
            else:
                baseline, start = baselines[a, b], time.perf_counter()
                checkpoint = finish_merge(METHODS[method], models[a], moved, kind)
                row["align_seconds"] += time.perf_counter() - start
                middle = testbed.evaluate(save_and_reload(checkpoint, kind), kind)
            ends, plain_middle = (baseline.loss[0] + baseline.loss[-1]) / 2, baseline.middle["loss"]
            yield row | {
                "excess": middle[0] - ends,
                "excess_ratio": ratio(middle[0] - ends, plain_middle - ends),
                "middle_loss": middle[0],
                "middle_accuracy": middle[1],
            }


def save_and_reload(checkpoint: Checkpoint, kind: str) -> nn.Module:
    """Write a model to disk, and read it again."""
    with tempfile.TemporaryDirectory() as scratch:
        model: nn.Module = testbed.load(kind, checkpoint.save(Path(scratch) / "model"))
    return model


def finish_merge(method: Method, fixed: nn.Module, moved: nn.Module, kind: str) -> Checkpoint:
    """Make one model from a pair, with a few unlabelled batches."""
    assert method.finish is not None
    models = [Checkpoint.open(fixed), Checkpoint.open(moved)]
    return method.finish(combine(models, method.merge), models, unlabelled_batches(kind, method.batches))


def summarise_path(curve: Curve, plain: Curve) -> Result:
    """Return the measurements of a path, and their ratios to those of the plain average."""
    return {
        "loss_barrier": curve.barrier,
        "loss_ratio": ratio(curve.barrier, plain.barrier),
        "error_barrier": curve.error_barrier,
        "error_ratio": ratio(curve.error_barrier, plain.error_barrier),
        "loss": curve.loss,
        "accuracy": curve.accuracy,
    }


def measure_path(a: nn.Module, b: nn.Module, kind: str) -> Curve:
    """Measure the path from a to b, recomputing BatchNorm statistics in every model, ends included."""

    def measure(model: nn.Module) -> Measured:
        loss, accuracy = evaluate_recalibrated(model, kind)
        return Measured(loss, {"accuracy": accuracy})

    return interpolate(a, b, measure, points=POINTS)


def evaluate_recalibrated(model: nn.Module, kind: str) -> tuple[float, float]:
    """Recompute a model's BatchNorm statistics in place, and return its (test loss, accuracy)."""
    recalibrate(model, training_images())
    return testbed.evaluate(model, kind)


def training_images() -> Iterator[testbed.Batch]:
    for x in testbed.digits()[0][0].split(128):
        yield {"pixel_values": x}


def ratio(value: float, plain: float) -> float:
    return value / plain if plain else math.nan


def train(kind: str, seed: int, folder: Path) -> None:
    def log(step: int, loss: float) -> None:
        log_progress(f"training {folder.name}: step {step} of {testbed.STEPS[kind]}, loss {loss}")

    partial = folder.with_name(f".{folder.name}.partial")
    testbed.save(testbed.train(kind, seed, log), partial)
    partial.rename(folder)


def log_progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fine_tune_halfway(kind: str, folder: Path, methods: Sequence[str], steps: int) -> Iterator[Result]:
    """Fine-tune midpoints for `steps` steps; the plain average also for as many as any method took in total."""
    paths = [folder / f"{kind}-{seed}" for seed in range(SEEDS)]
    models = [testbed.load(kind, path) for path in paths]
    own = [testbed.evaluate(model, kind)[0] for model in models]
    before = {method: METHODS[method].steps for method in methods}
    for a, b in combinations(range(SEEDS), 2):
        for method in methods:
            checkpoint, _ = METHODS[method].move(paths[a], paths[b])
            with tempfile.TemporaryDirectory() as scratch:
                moved = testbed.load(kind, checkpoint.save(Path(scratch) / "moved"))
            counts = {0, steps}
            if method == "plain":
                counts |= {more + n for more in before.values() if more for n in (0, steps)}
            for count in sorted(counts):
                halfway = merge_modules([moved, models[a]], "linear")
                loss, accuracy = fine_tune(halfway, kind, count)
                yield {
                    "kind": kind,
                    "method": method,
                    "pair": (a, b),
                    "steps": before[method] + count,
                    "fine_tuning": count,
                    "loss": loss,
                    "excess": loss - (own[a] + own[b]) / 2,
                    "accuracy": accuracy,
                }


def fine_tune(model: nn.Module, kind: str, steps: int) -> tuple[float, float]:
    """Train a model in place (AdamW, 1e-3 with cosine decay, clipped gradients); return (test loss, accuracy)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for batch in training_batches(kind, steps, seed=6):
        optimizer.zero_grad()
        model(**batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return evaluate_recalibrated(model, kind)


# --- reporting -------------------------------------------------------------------------------------------------------

COLUMNS = {  # of the table of one kind: heading and format
    "loss_barrier": ("loss barrier", "{:.4f}"),
    "loss_ratio": ("÷ plain", "{:.3f}"),
    "error_barrier": ("error barrier", "{:.2%}"),
    "error_ratio": ("÷ plain", "{:.3f}"),
    "excess": ("middle: excess", "{:.4f}"),
    "excess_ratio": ("÷ plain", "{:.3f}"),
    "middle_loss": ("loss", "{:.4f}"),
    "middle_accuracy": ("accuracy", "{:.2%}"),
    "own": ("own", "{:+.1e}"),
    "align_seconds": ("align s", "{:.1f}"),
}


def worst_value(results: Sequence[Result], column: str) -> float | None:
    """Return the worst value over all pairs; None if no pair has one."""
    values = [result[column] for result in results if column in result]
    return min(values) if column == "middle_accuracy" else max(values, key=abs, default=None)


def format_value(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def group_by_method(results: Sequence[Result], kind: str) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result["kind"] == kind:
            groups.setdefault(result["method"], []).append(result)
    return groups


def format_table(results: Sequence[Result], kind: str) -> str:
    """Format a table of every pair by every method, and the worst of all pairs."""
    rows, methods = [["method", "pair", *(title for title, _ in COLUMNS.values())]], group_by_method(results, kind)
    for method, pairs in methods.items():
        for r in pairs:
            pair = "{}–{}".format(*r["pair"])
            rows.append([method, pair, *(format_value(form, r.get(column)) for column, (_, form) in COLUMNS.items())])
        rows.append(
            [method, "worst", *(format_value(form, worst_value(pairs, c)) for c, (_, form) in COLUMNS.items())]
        )
    return f"## {TITLES[kind]}\n\n{describe_ends(methods['plain'])}\n\n{format_markdown(rows, left=2)}"


def format_tuned_table(results: Sequence[Result], kind: str) -> str:
    """Format a table of the mean and worst excess over pairs, by method and number of steps."""
    rows = [["halfway", "fine-tuning", "steps in all", "excess: mean", "worst", "accuracy"]]
    groups: dict[tuple[int, str, int], list[Result]] = {}
    for r in results:
        if r["kind"] == kind:
            groups.setdefault((r["steps"], r["method"], r["fine_tuning"]), []).append(r)
    for (steps, method, count), group in sorted(groups.items()):
        mean = sum(r["excess"] for r in group) / len(group)
        accuracy = min(r["accuracy"] for r in group)
        cells = [
            method,
            str(count),
            str(steps),
            f"{mean:.4f}",
            f"{worst_value(group, 'excess'):.4f}",
            f"{accuracy:.2%}",
        ]
        rows.append(cells)
    return f"Fine-tuned, test loss above the mean of the ends:\n\n{format_markdown(rows, left=1)}"


def describe_ends(results: Sequence[Result]) -> str:
    """List the models that were merged, and mark those that did not train well enough to say much."""
    models = {r["pair"][i]: (r["kind"], r["loss"][-i], r["accuracy"][-i]) for r in results for i in (0, 1)}
    lines = [
        f"- seed {seed}: loss {loss:.4f}, accuracy {accuracy:.2%}"
        + (
            ""
            if testbed.is_trained(kind, loss, accuracy)
            else " (**failed to train: misses the requirements of its kind**)"
        )
        for seed, (kind, loss, accuracy) in sorted(models.items())
    ]
    return "\n".join(lines)


def summarise(results: Sequence[Result]) -> str:
    """Format a table with a row per kind: the highest barrier (without a path, excess) and the lowest accuracy."""
    methods = list(dict.fromkeys(r["method"] for r in results))
    rows = [["", *methods]]
    for kind in dict.fromkeys(r["kind"] for r in results):
        groups = group_by_method(results, kind)
        cells = [
            f"{worst_value(groups[m], 'excess' if METHODS[m].finish else 'loss_barrier'):.3f} "
            f"({worst_value(groups[m], 'middle_accuracy'):.1%})"
            if m in groups
            else ""
            for m in methods
        ]
        rows.append([TITLES[kind], *cells])
    above = (
        "Highest loss barrier of all pairs, of refit and REPAIR the excess halfway (lowest accuracy in the middle):"
    )
    return f"{above}\n\n{format_markdown(rows, left=1)}"


def format_markdown(rows: Sequence[Sequence[str]], left: int) -> str:
    """Format a Markdown table, aligned for the terminal, with its first columns flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def plot(results: Sequence[Result], file: Path) -> None:
    """Plot the test loss along the line, one panel per kind: pairs as thin lines, their mean as a thick one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(r["kind"] for r in results))
    across = min(len(kinds), 4)
    down = math.ceil(len(kinds) / across)
    size = (3.3 * across, 2.7 * down + 0.5)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    where = torch.linspace(0, 1, POINTS).tolist()
    handles = {}
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for method, pairs in group_by_method(results, kind).items():
            colour = METHODS[method].colour
            if METHODS[method].finish:
                middle = sum(r["middle_loss"] for r in pairs) / len(pairs)
                (handles[method],) = axis.plot([0.5], [middle], "x", color=colour, markersize=7, markeredgewidth=2)
                continue
            for r in pairs:
                axis.plot(where, r["loss"], color=colour, linewidth=0.8, alpha=0.4)
            mean = torch.tensor([r["loss"] for r in pairs]).mean(0)
            (handles[method],) = axis.plot(where, mean, color=colour, linewidth=2.2)
        axis.set_title(TITLES[kind], fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=0)
        axis.set_xticks([0, 0.5, 1], ["fixed", "½", "moving"])
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("test loss")
    for axis in list(axes.flat)[len(kinds) :]:
        axis.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"one of {', '.join(TITLES)}; by default all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="methods beside plain")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="folder of the trained models; missing ones are trained"
    )
    parser.add_argument(
        "--fine-tune", type=int, default=0, metavar="STEPS", help="also fine-tune the midpoints for so many steps"
    )
    parser.add_argument("--out", type=Path, default=Path("barrier"), help="folder of the report")
    arguments = parser.parse_args()
    kinds, folder = arguments.kinds or list(TITLES), arguments.models or arguments.out / "models"
    if unknown := set(kinds) - TITLES.keys():
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}; choose from {', '.join(TITLES)}")
    import transformers

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    start, results, report = time.perf_counter(), [], []
    after: list[Result] = []
    for kind in kinds:
        for seed in range(SEEDS):
            if not (folder / f"{kind}-{seed}").exists():
                train(kind, seed, folder / f"{kind}-{seed}")
        chosen = [m for m in METHODS if (m == "plain" or m in arguments.methods) and kind in METHODS[m].kinds]
        for result in measure(kind, folder, chosen):
            results.append(result)
        report.append(format_table(results, kind))
        if arguments.fine_tune:
            after += fine_tune_halfway(kind, folder, [m for m in chosen if m in TUNED], arguments.fine_tune)
            report[-1] += f"\n\n{format_tuned_table(after, kind)}"
        print(report[-1], end="\n\n", flush=True)
    print(summarise(results))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "barrier.md").write_text("\n\n".join(["# Barriers", summarise(results), *report]) + "\n")
    about: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("hf_rebasin", "torch", "transformers", "numpy", "scipy")},
        "seconds": time.perf_counter() - start,
    }
    (arguments.out / "barrier.json").write_text(
        json.dumps(about | {"results": results, "fine_tuned": after}, indent=1) + "\n"
    )
    plot(results, arguments.out / "barrier.png")


if __name__ == "__main__":
    main()
