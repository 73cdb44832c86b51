"""Compare our incremental learning on rotated images with common methods, and with learning all tasks at once.

    python scripts/benchmarks/incremental_learning.py [--seeds 3] [--tasks 20] [--out DIR] [--images digits|fashion]

This is experiment 3 of Re-basin via implicit Sinkhorn differentiation (Guerrero Peña et al. 2023, arXiv 2212.12042)
on scikit-learn's digits, or on Fashion-MNIST where Debian's package dataset-fashion-mnist is installed. Task k is the
same images rotated by k · 180° / 19. An MLP with 256 hidden units learns the first task (AdamW, 1e-3); from there,
every method sees one task after the other, in the same batches and for as many epochs, and is tested on all tasks.

    fine-tune  SGD 0.01, as in all methods but ours
    EWC        λ 100 · Σ F (θ − θ of the task)² over the previous tasks; F from the gradients of batches
    LwF        α 1, T 0.5: the predictions for the new images of the model before the task are kept
    A-GEM      a gradient that would raise the loss on the memory is projected until it does not
    replay     fine-tune on new batches and the memory's, to show how much of our result is due to the memory
    ours       `hf_rebasin.solving.incremental.learn` on the batches of `replay`, with the settings of the paper; "π
               held" has π = identity, so that only δ is learned
    free δ     ours without weight decay of δ, and its gradient clipped at 1, which is almost never reached
    joint      all tasks at once, AdamW 1e-3, as many epochs: nothing to forget

The memory holds 5 images per class of every previous task. With every batch of the new task, methods that use it get
as many images drawn from it. Accuracy is the mean over tasks after the last episode; forgetting is the best accuracy
before the last episode minus the accuracy after it, averaged over all tasks but the last. Writes OUT/incremental.md,
incremental.json with every number, and incremental.png.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from hf_rebasin import Spec, infer_spec
from hf_rebasin.solving.incremental import learn

HIDDEN, CLASSES, PER_CLASS = 256, 10, 5
BATCH, EPOCHS = 20, 5
SHOWN = (1, 5, 10, 15)
PAPER = {  # accuracy in percent and forgetting on rotated MNIST, each with its standard deviation
    "fine-tune": (46.28, 1.01, 0.52, 0.01),
    "EWC": (59.92, 1.71, 0.34, 0.02),
    "LwF": (61.86, 3.66, 0.29, 0.06),
    "A-GEM": (68.47, 0.90, 0.28, 0.01),
    "ours": (78.14, 0.50, 0.12, 0.01),
    "joint": (90.84, 4.30, 0.00, 0.00),
}
Batch = tuple[Tensor, Tensor]  # images (n, pixels) in [0, 1], labels (n,)

# --- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    train: Batch
    test: Batch


def digits() -> tuple[Any, Any, Any, Any]:
    """Return 1297 training and 500 test images with labels, enlarged to the 28 × 28 pixels of the paper."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = ndimage.zoom(images.reshape(-1, 8, 8) / 16, (1, 3.5, 3.5), order=1)
    order = np.random.default_rng(1234).permutation(len(images))
    images, labels = images[order], labels[order]
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def find_fashion() -> Path | None:
    """Return the folder in which a package has installed the four files of Fashion-MNIST, or None."""
    for pattern in ("*fashion-mnist*", "dataset*/*fashion-mnist*", "*fashion-mnist*/*"):
        for file in sorted(Path("/usr/share").glob(f"{pattern}/train-images*.gz")):
            return file.parent
    return None


def fashion() -> tuple[Any, Any, Any, Any]:
    """Return the first 3000 training and 1000 test images of Fashion-MNIST, 28 × 28 pixels, with labels."""
    if (folder := find_fashion()) is None:
        sys.exit("no Fashion-MNIST in /usr/share; install the package dataset-fashion-mnist, or take --images digits")

    def read(name: str, skip: int) -> Any:
        (file,) = folder.glob(f"{name}*.gz")
        return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=skip)

    arrays: list[Any] = []
    for name, count in (("train", 3000), ("t10k", 1000)):
        arrays.append(read(f"{name}-images", 16).reshape(-1, 28, 28)[:count] / 255)
        arrays.append(read(f"{name}-labels", 8)[:count].astype(np.int64))
    return tuple(arrays)


SETS = {"digits": digits, "fashion": fashion}


def rotate(images: Any, degrees: float) -> Tensor:
    """Return every image rotated about its centre, flattened."""
    x = ndimage.rotate(images, degrees, axes=(1, 2), reshape=False, order=1)
    return torch.tensor(x.reshape(len(x), -1), dtype=torch.float32)


def make_tasks(images: str, count: int) -> list[Task]:
    x, y, x_test, y_test = SETS[images]()
    labels, labels_test = torch.tensor(y), torch.tensor(y_test)
    angles = np.linspace(0, 180, count)
    return [Task((rotate(x, angle), labels), (rotate(x_test, angle), labels_test)) for angle in angles]


def shuffle_batches(data: Batch, generator: torch.Generator) -> Iterator[Batch]:
    """Yield the batches of an epoch in a new order."""
    for indices in torch.randperm(len(data[1]), generator=generator).split(BATCH):
        yield data[0][indices], data[1][indices]


def concatenate(*several: Batch) -> Batch:
    return torch.cat([x for x, _ in several]), torch.cat([y for _, y in several])


class Memory:
    """A few images of every class of every previous task."""

    def __init__(self) -> None:
        self.data: Batch | None = None

    def keep(self, data: Batch, generator: torch.Generator) -> None:
        order = torch.randperm(len(data[1]), generator=generator)
        indices = torch.cat([order[data[1][order] == c][:PER_CLASS] for c in range(CLASSES)])
        kept = data[0][indices], data[1][indices]
        self.data = kept if self.data is None else concatenate(self.data, kept)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        assert self.data is not None
        indices = torch.randint(len(self.data[1]), (count,), generator=generator)
        return self.data[0][indices], self.data[1][indices]


@dataclass(frozen=True)
class ReplayedBatches:
    """The batches of a task, each with as many images of the memory, in a new order in every epoch."""

    data: Batch
    memory: Memory
    generator: torch.Generator

    def __iter__(self) -> Iterator[Batch]:
        for batch in shuffle_batches(self.data, self.generator):
            yield concatenate(batch, self.memory.draw(len(batch[1]), self.generator))


# --- methods ---------------------------------------------------------------------------------------------------------


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


class FineTune:
    """SGD on one task after the other; the other methods derive from it."""

    def __init__(self, model: nn.Module, generator: torch.Generator):
        self.model, self.generator, self.memory = model, generator, Memory()

    def learn(self, data: Batch) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        for _ in range(EPOCHS):
            for batch in self.batches(data):
                optimizer.zero_grad()
                self.cost(batch).backward()
                self.project(len(batch[1]))
                optimizer.step()

    def batches(self, data: Batch) -> Iterator[Batch]:
        return shuffle_batches(data, self.generator)

    def cost(self, batch: Batch) -> Tensor:
        return batch_loss(self.model, batch)

    def project(self, count: int) -> None:
        """Change the gradients before an optimizer step."""

    def remember(self, data: Batch) -> None:
        """Prepare for the next task; called after every task."""


class EWC(FineTune):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): λ Σ F (θ − θₜ)² over tasks t, as one quadratic form."""

    STRENGTH = 100.0

    def __init__(self, model: nn.Module, generator: torch.Generator):
        super().__init__(model, generator)
        self.fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.pull = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def cost(self, batch: Batch) -> Tensor:
        value = batch_loss(self.model, batch)
        for name, p in self.model.named_parameters():  # Σ F (θ − θₜ)² up to a constant
            value = value + self.STRENGTH * (p * (self.fisher[name] * p - 2 * self.pull[name])).sum()
        return value

    def remember(self, data: Batch) -> None:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        for batch in shuffle_batches(data, self.generator):
            for name, p, g in zip(
                names, parameters, torch.autograd.grad(batch_loss(self.model, batch), parameters), strict=True
            ):
                share = g.square() * len(batch[1]) / len(data[1])
                self.fisher[name] += share
                self.pull[name] += share * p.detach()


class LwF(FineTune):
    """Learning without forgetting (Li and Hoiem 2016)."""

    STRENGTH, TEMPERATURE = 1.0, 0.5
    before: nn.Module

    def cost(self, batch: Batch) -> Tensor:
        logits = self.model(batch[0])
        with torch.no_grad():
            old_logits = self.before(batch[0])
        new, old = ((x / self.TEMPERATURE).log_softmax(-1) for x in (logits, old_logits))
        kept = kl_div(new, old, reduction="batchmean", log_target=True)
        return cross_entropy(logits, batch[1]) + self.STRENGTH * kept

    def remember(self, data: Batch) -> None:
        self.before = copy.deepcopy(self.model)


class AGEM(FineTune):
    """Averaged gradient episodic memory (Chaudhry et al. 2019)."""

    def project(self, count: int) -> None:
        parameters = list(self.model.parameters())
        g = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        reference = torch.autograd.grad(batch_loss(self.model, self.memory.draw(count, self.generator)), parameters)
        r = torch.cat([part.flatten() for part in reference])
        if (along := g @ r) < 0:
            g -= along / (r @ r) * r
            for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)

    def remember(self, data: Batch) -> None:
        self.memory.keep(data, self.generator)


class Replay(FineTune):
    def batches(self, data: Batch) -> Iterator[Batch]:
        return iter(ReplayedBatches(data, self.memory, self.generator))

    def remember(self, data: Batch) -> None:
        self.memory.keep(data, self.generator)


class Rebasin(Replay):
    def learn(self, data: Batch, **options: Any) -> None:
        replayed = ReplayedBatches(data, self.memory, self.generator)
        episode = learn(
            self.model, replayed, batch_loss, spec=self.spec(data), epochs=EPOCHS, generator=self.generator, **options
        )
        self.model = episode.module

    def spec(self, data: Batch) -> Spec:
        return infer_spec(self.model, data[0][:1])


class FreeDelta(Rebasin):
    def learn(self, data: Batch, **options: Any) -> None:
        super().learn(data, delta_decay=0.0, delta_clip=1.0, **options)


class HeldPermutations(Rebasin):
    def spec(self, data: Batch) -> Spec:
        spec = super().spec(data)
        return spec.limited(dict.fromkeys(spec.symmetries, "held"))


class FreeDeltaHeldPermutations(FreeDelta, HeldPermutations):
    pass


METHODS: dict[str, tuple[Callable[[nn.Module, torch.Generator], FineTune], str]] = {
    "fine-tune": (FineTune, "#808080"),
    "EWC": (EWC, "#e69f00"),
    "LwF": (LwF, "#cc79a7"),
    "A-GEM": (AGEM, "#009e73"),
    "replay": (Replay, "#56b4e9"),
    "ours": (Rebasin, "#0072b2"),
    "ours, π held": (HeldPermutations, "#999933"),
    "free δ": (FreeDelta, "#d55e00"),
    "free δ, π held": (FreeDeltaHeldPermutations, "#000000"),
}

# --- measuring -------------------------------------------------------------------------------------------------------

Result = dict[str, Any]  # one method from one seed


def make_network(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def train_network(data: Batch, seed: int) -> nn.Module:
    """Return a new network trained on some data: the first task, or all of them."""
    torch.manual_seed(seed)
    model, generator = make_network(data[0].shape[1]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in shuffle_batches(data, generator):
            optimizer.zero_grad()
            batch_loss(model, batch).backward()
            optimizer.step()
    return model


@torch.no_grad()
def measure_accuracies(model: nn.Module, tasks: Sequence[Task]) -> list[float]:
    """Return the accuracy on the test images of every task."""
    return [(model(task.test[0]).argmax(-1) == task.test[1]).double().mean().item() for task in tasks]


def mean_forgetting(rows: Sequence[Sequence[float]]) -> float:
    """Return the best accuracy before the last episode − the one after it, averaged over all but the last task."""
    if len(rows) < 2:
        return 0.0
    table = torch.tensor(rows, dtype=torch.float64)
    return (table[:-1].amax(0) - table[-1])[:-1].mean().item()


def measure(method: str, seed: int, tasks: Sequence[Task]) -> Result:
    """Run a method through all episodes, from the network that every method of this seed starts with."""
    start = time.perf_counter()
    if method == "joint":
        rows = [measure_accuracies(train_network(concatenate(*(task.train for task in tasks)), seed), tasks)]
    else:
        make, _ = METHODS[method]
        learner = make(train_network(tasks[0].train, seed), torch.Generator().manual_seed(1000 + seed))
        rows = [measure_accuracies(learner.model, tasks)]
        for last, task in pairwise(tasks):
            learner.remember(last.train)
            learner.learn(task.train)
            rows.append(measure_accuracies(learner.model, tasks))
    return {
        "method": method,
        "seed": seed,
        "accuracy": sum(rows[-1]) / len(tasks),
        "forgetting": mean_forgetting(rows),
        "accuracies": rows,  # a row per episode, a column per task
        "seconds": time.perf_counter() - start,
    }


# --- reporting -------------------------------------------------------------------------------------------------------


def format_spread(values: Sequence[float], scale: float, digits: int) -> str:
    """Return mean ± standard deviation as text."""
    x = scale * torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.{digits}f} ± {x.std(correction=1) if len(x) > 1 else 0.0:.{digits}f}"


def format_table(results: Sequence[Result]) -> str:
    rows = [["", "accuracy, %", "forgetting", "paper: accuracy, %", "forgetting", "s"]]
    for method in dict.fromkeys(r["method"] for r in results):
        selected = [r for r in results if r["method"] == method]
        accuracy, ours = (
            format_spread([r[key] for r in selected], scale, 2)
            for key, scale in (("accuracy", 100), ("forgetting", 1))
        )
        theirs = "{:.2f} ± {:.2f}|{:.2f} ± {:.2f}".format(*PAPER[method]).split("|") if method in PAPER else ["", ""]
        rows.append([method, accuracy, ours, *theirs, f"{sum(r['seconds'] for r in selected) / len(selected):.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    cells = (
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def plot(results: Sequence[Result], file: Path) -> None:
    """Plot the accuracy of some tasks after their own and every later episode, averaged over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(results[0]["accuracies"][-1])
    shown = [task for task in SHOWN if task <= count]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.1 * len(shown), 3), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], shown, strict=True):
        for method, (_, colour) in METHODS.items():
            accuracies = [r["accuracies"] for r in results if r["method"] == method]
            if accuracies:
                mean = 100 * torch.tensor(accuracies).mean(0)[task - 1 :, task - 1]
                width = 2.2 if method == "ours" else 1.2
                axis.plot(range(task, count + 1), mean, color=colour, label=method, linewidth=width)
        axis.set_title(f"task {task}", fontsize=10)
        axis.set_xlim(1, count)
        axis.set_ylim(0, 100)
        axis.set_xlabel("episode")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("test accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(file, dpi=150)


def main() -> None:
    default_images = "digits" if find_fashion() is None else "fashion"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "joint"], choices=[*METHODS, "joint"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=20, help="number of rotations, from 0° to 180°")
    parser.add_argument("--images", default=default_images, choices=SETS, help="by default fashion if it is installed")
    parser.add_argument("--out", type=Path, default=Path("incremental"), help="folder of the report")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, results = time.perf_counter(), []
    tasks = make_tasks(arguments.images, arguments.tasks)
    for method in arguments.methods:
        for seed in range(arguments.seeds):
            results.append(measure(method, seed, tasks))
            r = results[-1]
            scores = f"{method}, seed {seed}: accuracy {r['accuracy']:.2%}, forgetting {r['forgetting']:.3f}"
            print(f"{scores}, {r['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(format_table(results))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "incremental.md").write_text(f"# Incremental learning\n\n{format_table(results)}\n")
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "images": arguments.images,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("hf_rebasin", "torch", "numpy", "scipy")},
        "seconds": time.perf_counter() - start,
    }
    (arguments.out / "incremental.json").write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    plot(results, arguments.out / "incremental.png")


if __name__ == "__main__":
    main()
