"""Barriers between models trained from different seeds: as they are, and after every kind of alignment.

    python scripts/benchmarks/barrier.py [KIND ...] [--methods NAME ...] [--fine-tune STEPS] [--models DIR]
        [--out barrier]

KIND is one of the test bed's (testbed.py): mlp64 mlp512 resnet vit gpt2 llama bert. All three pairs of three seeds, 25
even points on the line. A barrier is the highest rise above the straight line between the ends, of the test loss and
of the error rate. What is not in DIR (OUT/models by default; folders KIND-SEED) is trained there first, all of it in
half an hour on one thread. Writes OUT/barrier.md, barrier.json with every number, and barrier.png.

With --fine-tune, what is halfway between two models is trained on for so many steps, and the plain average for as many
as any method had in all.

Methods that make one model and no path (refit, REPAIR) have no barrier but an *excess*: the loss halfway above the
mean of the ends. It stands in the row of every method.

Every moved or merged model is written to disk and read again before it is measured; "own" is its test loss minus that
of the model before the move. BatchNorm statistics are recomputed in every model on a line: the ends, and the plain
averages. Those of refit and REPAIR are of the same unlabelled batches as all else they do.
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
from hf_rebasin.compat.in_memory import merged
from hf_rebasin.demo.experiments import MLP_TABLE
from hf_rebasin.evaluation.interpolation import Curve, interpolate
from hf_rebasin.evaluation.metrics import Measured
from hf_rebasin.merging.merge import combine
from hf_rebasin.merging.methods import refit
from hf_rebasin.merging.recalibration import recalibrate, repair
from hf_rebasin.solving.solution import Solution
from hf_rebasin.solving.solvers.learned import Solver as Learned
from hf_rebasin.symmetries.table import ROTATING, Table

TUNED = ("plain", "full", "learned")
SEEDS, POINTS = 3, 25
LOOKED_AT = 16  # unlabelled batches, by activation matching, refit and REPAIR
MORE = 64  # unlabelled batches that a descent goes through, and a control's
BATCHES = 1000  # labelled ones that a descent goes through, round after round
TITLES = {
    "mlp64": "MLP, width 64",
    "mlp512": "MLP, width 512",
    "resnet": "ResNet",
    "vit": "ViT",
    "gpt2": "GPT-2",
    "llama": "Llama",
    "bert": "BERT",
}

NARROW = ("mlp64", "mlp512", "resnet")  # that permutations bring together

# --- methods ---------------------------------------------------------------------------------------------------------

Moved = tuple[Checkpoint, float]  # a model moved towards another, and the seconds it took to find out how


@dataclass(frozen=True)
class Method:
    """A row of the tables: what moves one model towards another (fixed, moving), and for which kinds."""

    move: Callable[[Path, Path], Moved]
    colour: str
    kinds: Sequence[str] = tuple(TITLES)
    steps: int = 0  # of gradients, on labelled training batches
    finish: Callable[..., Checkpoint] | None = None  # of (merge, models, data); it makes one model, and no path
    merge: str = "linear"
    batches: int = LOOKED_AT  # that `finish` looks at


def plain(fixed: Path, moving: Path) -> Moved:
    return Checkpoint.open(moving), 0.0


def permutations(fixed: Path, moving: Path) -> Moved:
    solution, seconds = aligned(fixed, moving, "permutation")
    return solution.apply(moving), seconds


def full(fixed: Path, moving: Path) -> Moved:
    solution, seconds = aligned(fixed, moving, "full")
    return solution.apply(moving), seconds


def full_of_four(fixed: Path, moving: Path) -> Moved:
    """The highest objective of four starts instead of two."""
    solution, seconds = aligned(fixed, moving, "full", starts=4)
    return solution.apply(moving), seconds


def rotation_alone(fixed: Path, moving: Path) -> Moved:
    """A part of the full alignment, whose seconds these are."""
    solution, seconds = aligned(fixed, moving, "full")
    return rotation_of(solution).apply(moving), seconds


@cache
def activations(fixed: Path, moving: Path) -> Moved:
    """By what the two say to a few batches, without labels."""
    kind = fixed.name.rpartition("-")[0]
    groups = "permutation" if kind in NARROW else "full"
    data = without_labels(kind)
    start = time.perf_counter()
    solution = align(
        testbed.load(kind, fixed),
        moving,
        solver="activation_matching",
        spec=mlp_table(moving),
        groups=groups,
        data=data,
    )
    return solution.apply(Checkpoint.open(moving)), time.perf_counter() - start


def sinkhorn_mid(fixed: Path, moving: Path) -> Moved:
    """Permutations through doubly stochastic matrices, by the loss halfway."""
    return descended(fixed, moving, "sinkhorn", "permutation", "mid")


def sinkhorn_rnd(fixed: Path, moving: Path) -> Moved:
    """The same, by the loss at random places."""
    return descended(fixed, moving, "sinkhorn", "permutation", "rnd")


def straight_through(fixed: Path, moving: Path) -> Moved:
    """Permutations, by the gradient of their matrices as if these were free."""
    return descended(fixed, moving, "straight_through", "permutation", "mid")


@cache
def learned(fixed: Path, moving: Path) -> Moved:
    """Rotations, bases and scales, from the full alignment."""
    return descended(fixed, moving, "learned", "full", "rnd")


STRAIGHT = {"start": "activation_matching", "steps": 1000, "starts": 3}


def straight_unlabelled(fixed: Path, moving: Path) -> Moved:
    """Permutations by what the two say to unlabelled batches, the best of three descents from activation matching."""
    return descended(fixed, moving, "straight_through", "permutation", "mid", labels=False, **STRAIGHT)


def learned_unlabelled(fixed: Path, moving: Path) -> Moved:
    """Rotations, bases and scales by the same; of a ResNet scales, after its permutations."""
    start = {"solver": "straight_through", **STRAIGHT} if fixed.name.startswith("resnet") else "weight_matching"
    return descended(fixed, moving, "learned", "full", "rnd", labels=False, start=start)


def refitted_and_distilled(merged: Checkpoint, models: Sequence[Checkpoint], data: list[testbed.Batch]) -> Checkpoint:
    return distil(refit.finish(merged, models, data), models, data)


def distilled_for_long(merged: Checkpoint, models: Sequence[Checkpoint], data: list[testbed.Batch]) -> Checkpoint:
    """For as many steps as `learned` takes, and at a rate that is good for small models."""
    return distil(merged, models, data, steps=Learned().steps, rate=1e-3)


METHODS = {
    "plain": Method(plain, "#808080"),
    "permutations": Method(permutations, "#d55e00"),
    "rotation alone": Method(rotation_alone, "#009e73", ("llama",)),
    "full, 4 starts": Method(full_of_four, "#cc79a7"),
    "full": Method(full, "#0072b2"),
    "activations": Method(activations, "#882255"),
    "straight-through": Method(straight_through, "#f0e442", NARROW),
    "sinkhorn, mid": Method(sinkhorn_mid, "#56b4e9", NARROW),
    "sinkhorn, rnd": Method(sinkhorn_rnd, "#000000", NARROW),
    "learned": Method(learned, "#e69f00", ("vit", "gpt2", "llama", "bert"), steps=Learned().steps),
    "straight-through, no labels": Method(straight_unlabelled, "#661100", ("resnet",)),
    "learned, no labels": Method(learned_unlabelled, "#999933", ("vit", "gpt2", "llama", "bert", "resnet")),
    "permutations + REPAIR": Method(permutations, "#d55e00", NARROW, finish=repair),
    "activations + REPAIR": Method(activations, "#882255", NARROW, finish=repair),
    "refit of plain": Method(plain, "#808080", finish=refit.finish, merge="refit"),
    "refit of full": Method(full, "#0072b2", finish=refit.finish, merge="refit"),
    "refit": Method(activations, "#117733", finish=refit.finish, merge="refit"),
    f"refit of plain, {MORE} batches": Method(plain, "#808080", finish=refit.finish, merge="refit", batches=MORE),
    "distilled refit of plain": Method(plain, "#808080", finish=refitted_and_distilled, batches=MORE),
    "distilled refit of full": Method(full, "#0072b2", finish=refitted_and_distilled, batches=MORE),
    "distilled refit": Method(activations, "#117733", finish=refitted_and_distilled, batches=MORE),
    "distilled plain, 1000 steps": Method(plain, "#808080", finish=distilled_for_long, batches=MORE),
    "distilled full, 1000 steps": Method(full, "#0072b2", finish=distilled_for_long, batches=MORE),
}


@cache
def aligned(fixed: Path, moving: Path, groups: str, starts: int = 2) -> tuple[Solution, float]:
    start = time.perf_counter()
    solution = align(fixed, moving, spec=mlp_table(moving), groups=groups, starts=starts)
    return solution, time.perf_counter() - start


def descended(
    fixed: Path, moving: Path, solver: str, groups: str, cost: str, *, labels: bool = True, **knobs: Any
) -> Moved:
    """By gradients of the loss in between, on training batches; or without labels, of KL."""
    kind, spec = fixed.name.rpartition("-")[0], mlp_table(moving)
    start = time.perf_counter()
    data = training(kind, BATCHES) if labels else for_a_descent(kind)
    given = {"solver": solver, "spec": spec, "groups": groups, "data": data, "cost": cost, **knobs}
    solution = align(testbed.load(kind, fixed), moving, **given)
    return solution.apply(Checkpoint.open(moving)), time.perf_counter() - start


def mlp_table(folder: Path) -> Table | None:
    """Of the test bed's MLPs; all else has one, or shows its symmetries."""
    return None if (folder / "config.json").exists() else replace(MLP_TABLE, groups={"hidden.*": "scaled"})  # ReLU


def without_labels(kind: str, count: int = LOOKED_AT) -> list[testbed.Batch]:
    """A few training batches."""
    return [{k: x for k, x in batch.items() if k != "labels"} for batch in training(kind, count)]


def for_a_descent(kind: str) -> list[testbed.Batch]:
    """The same, of a ResNet four in one, as BatchNorm goes by the batch then."""
    if kind != "resnet":
        return without_labels(kind, MORE)
    images = torch.cat([batch["pixel_values"] for batch in without_labels(kind, 4 * MORE)])
    return [{"pixel_values": x} for x in images.split(4 * testbed.BATCH)]


def training(kind: str, count: int, seed: int = 5) -> list[testbed.Batch]:
    """Labelled training batches."""
    return list(islice(testbed.batches(kind, "train", torch.Generator().manual_seed(seed)), count))


def rotation_of(solution: Solution) -> Alignment:
    """What a full alignment does to the residual stream; all else stays as it is."""
    found = solution.alignment
    rotations = {name: g for name, g in found.elements.items() if found.spec.symmetries[name].kind in ROTATING}
    return replace(found, elements=rotations)


# --- measuring -------------------------------------------------------------------------------------------------------

Result = dict[str, Any]  # one pair by one method


def measure(kind: str, folder: Path, methods: Sequence[str]) -> Iterator[Result]:
    """Every pair by every method, the plain average first; the models are `folder`/KIND-SEED."""
    paths = [folder / f"{kind}-{seed}" for seed in range(SEEDS)]
    models = [testbed.load(kind, path) for path in paths]
    own = [testbed.evaluate(model, kind)[0] for model in models]  # with the statistics they were saved with
    baselines: dict[tuple[int, int], Curve] = {}
    for method in methods:
        for a, b in combinations(range(SEEDS), 2):
            checkpoint, seconds = METHODS[method].move(paths[a], paths[b])
            moved = reloaded(checkpoint, kind)
            row: Result = {"kind": kind, "method": method, "pair": (a, b), "align_seconds": seconds}
            if METHODS[method].finish is None:
                curve = measured(models[a], moved, kind)
                baseline = baselines.setdefault((a, b), curve)
                change = testbed.evaluate(moved, kind)[0] - own[b]
                row |= along(curve, baseline) | {"own": change}
                middle = curve.middle["loss"], curve.middle["accuracy"]
            else:
                baseline, start = baselines[a, b], time.perf_counter()
                checkpoint = finished(METHODS[method], models[a], moved, kind)
                row["align_seconds"] += time.perf_counter() - start
                middle = testbed.evaluate(reloaded(checkpoint, kind), kind)
            ends, plain_middle = (baseline.loss[0] + baseline.loss[-1]) / 2, baseline.middle["loss"]
            yield row | {
                "excess": middle[0] - ends,
                "excess_ratio": ratio(middle[0] - ends, plain_middle - ends),
                "middle_loss": middle[0],
                "middle_accuracy": middle[1],
            }


def reloaded(checkpoint: Checkpoint, kind: str) -> nn.Module:
    """Written to disk, and read again."""
    with tempfile.TemporaryDirectory() as scratch:
        model: nn.Module = testbed.load(kind, checkpoint.save(Path(scratch) / "model"))
    return model


def finished(method: Method, fixed: nn.Module, moved: nn.Module, kind: str) -> Checkpoint:
    """One model halfway, made with a few unlabelled batches."""
    assert method.finish is not None
    models = [Checkpoint.open(fixed), Checkpoint.open(moved)]
    return method.finish(combine(models, method.merge), models, without_labels(kind, method.batches))


def along(curve: Curve, plain: Curve) -> Result:
    """What a path has to show, beside the plain average's."""
    return {
        "loss_barrier": curve.barrier,
        "loss_ratio": ratio(curve.barrier, plain.barrier),
        "error_barrier": curve.error_barrier,
        "error_ratio": ratio(curve.error_barrier, plain.error_barrier),
        "loss": curve.loss,
        "accuracy": curve.accuracy,
    }


def measured(a: nn.Module, b: nn.Module, kind: str) -> Curve:
    """BatchNorm statistics are recomputed in every model of the line, ends included."""

    def measure(model: nn.Module) -> Measured:
        loss, accuracy = repaired(model, kind)
        return Measured(loss, {"accuracy": accuracy})

    return interpolate(a, b, measure, points=POINTS)


def repaired(model: nn.Module, kind: str) -> tuple[float, float]:
    """(test loss, accuracy) of a model whose BatchNorm statistics, if it has any, are recomputed first, in place."""
    recalibrate(model, training_images())
    return testbed.evaluate(model, kind)


def training_images() -> Iterator[testbed.Batch]:
    for x in testbed.digits()[0][0].split(128):
        yield {"pixel_values": x}


def ratio(value: float, plain: float) -> float:
    return value / plain if plain else math.nan


def train(kind: str, seed: int, folder: Path) -> None:
    def log(step: int, loss: float) -> None:
        say(f"training {folder.name}: step {step} of {testbed.STEPS[kind]}, loss {loss}")

    partial = folder.with_name(f".{folder.name}.partial")
    testbed.save(testbed.train(kind, seed, log), partial)
    partial.rename(folder)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def tuned(kind: str, folder: Path, methods: Sequence[str], steps: int) -> Iterator[Result]:
    """Models halfway, fine-tuned by as many steps; the plain average also by as many as any method had in all."""
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
                halfway = merged([moved, models[a]], "linear")
                loss, accuracy = fine_tuned(halfway, kind, count)
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


def fine_tuned(model: nn.Module, kind: str, steps: int) -> tuple[float, float]:
    """(test loss, accuracy) after so many steps, in place: AdamW 1e-3 down to 0 by a cosine, gradients cut at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for batch in training(kind, steps, seed=6):
        optimizer.zero_grad()
        model(**batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return repaired(model, kind)


# --- showing ---------------------------------------------------------------------------------------------------------

COLUMNS = {  # of the table of one kind: what is above, and how it is written
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


def worst(results: Sequence[Result], column: str) -> float | None:
    """Over all pairs; None where there is none of it."""
    values = [result[column] for result in results if column in result]
    return min(values) if column == "middle_accuracy" else max(values, key=abs, default=None)


def written(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def by_method(results: Sequence[Result], kind: str) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        if result["kind"] == kind:
            found.setdefault(result["method"], []).append(result)
    return found


def table(results: Sequence[Result], kind: str) -> str:
    """Every pair by every method, and the worst of all pairs."""
    rows, methods = [["method", "pair", *(title for title, _ in COLUMNS.values())]], by_method(results, kind)
    for method, found in methods.items():
        for r in found:
            pair = "{}–{}".format(*r["pair"])
            rows.append([method, pair, *(written(form, r.get(column)) for column, (_, form) in COLUMNS.items())])
        rows.append([method, "worst", *(written(form, worst(found, c)) for c, (_, form) in COLUMNS.items())])
    return f"## {TITLES[kind]}\n\n{ends(methods['plain'])}\n\n{markdown(rows, left=2)}"


def tuned_table(results: Sequence[Result], kind: str) -> str:
    """Mean and worst excess over pairs, of every method at every number of steps."""
    rows = [["halfway", "fine-tuning", "steps in all", "excess: mean", "worst", "accuracy"]]
    found: dict[tuple[int, str, int], list[Result]] = {}
    for r in results:
        if r["kind"] == kind:
            found.setdefault((r["steps"], r["method"], r["fine_tuning"]), []).append(r)
    for (steps, method, count), of in sorted(found.items()):
        mean = sum(r["excess"] for r in of) / len(of)
        accuracy = min(r["accuracy"] for r in of)
        cells = [method, str(count), str(steps), f"{mean:.4f}", f"{worst(of, 'excess'):.4f}", f"{accuracy:.2%}"]
        rows.append(cells)
    return f"Fine-tuned, test loss above the mean of the ends:\n\n{markdown(rows, left=1)}"


def ends(results: Sequence[Result]) -> str:
    """The models that were merged, and which of them did not train well enough to say much."""
    found = {r["pair"][i]: (r["kind"], r["loss"][-i], r["accuracy"][-i]) for r in results for i in (0, 1)}
    lines = [
        f"- seed {seed}: loss {loss:.4f}, accuracy {accuracy:.2%}"
        + ("" if testbed.is_trained(kind, loss, accuracy) else " (**failed to train: misses the floor of its kind**)")
        for seed, (kind, loss, accuracy) in sorted(found.items())
    ]
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    """One row per kind: the highest loss barrier of all pairs, without a path the excess, and the lowest accuracy."""
    methods = list(dict.fromkeys(r["method"] for r in results))
    rows = [["", *methods]]
    for kind in dict.fromkeys(r["kind"] for r in results):
        of = by_method(results, kind)
        cells = [
            f"{worst(of[m], 'excess' if METHODS[m].finish else 'loss_barrier'):.3f} "
            f"({worst(of[m], 'middle_accuracy'):.1%})"
            if m in of
            else ""
            for m in methods
        ]
        rows.append([TITLES[kind], *cells])
    above = (
        "Highest loss barrier of all pairs, of refit and REPAIR the excess halfway (lowest accuracy in the middle):"
    )
    return f"{above}\n\n{markdown(rows, left=1)}"


def markdown(rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first columns are flush left, as legible in the terminal as on a page."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def plot(results: Sequence[Result], file: Path) -> None:
    """Test loss along the line, one panel per kind: every pair thin, the mean over pairs thick."""
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
        for method, found in by_method(results, kind).items():
            colour = METHODS[method].colour
            if METHODS[method].finish:
                middle = sum(r["middle_loss"] for r in found) / len(found)
                (handles[method],) = axis.plot([0.5], [middle], "x", color=colour, markersize=7, markeredgewidth=2)
                continue
            for r in found:
                axis.plot(where, r["loss"], color=colour, linewidth=0.8, alpha=0.4)
            mean = torch.tensor([r["loss"] for r in found]).mean(0)
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
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(TITLES)}; by default all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="beside plain")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where the trained models are, or are to be")
    parser.add_argument("--fine-tune", type=int, default=0, metavar="STEPS", help="fine-tune what is halfway, too")
    parser.add_argument("--out", type=Path, default=Path("barrier"), help="folder of the report")
    arguments = parser.parse_args()
    kinds, folder = arguments.kinds or list(TITLES), arguments.models or arguments.out / "models"
    if unknown := set(kinds) - TITLES.keys():
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
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
        report.append(table(results, kind))
        if arguments.fine_tune:
            after += tuned(kind, folder, [m for m in chosen if m in TUNED], arguments.fine_tune)
            report[-1] += f"\n\n{tuned_table(after, kind)}"
        print(report[-1], end="\n\n", flush=True)
    print(summary(results))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "barrier.md").write_text("\n\n".join(["# Barriers", summary(results), *report]) + "\n")
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
