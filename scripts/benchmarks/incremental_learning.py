"""Incremental learning on rotated images: ours, four methods that others use, and all tasks at once.

    python scripts/benchmarks/incremental_learning.py [--seeds 3] [--tasks 20] [--out DIR] [--images digits|fashion]

Experiment 3 of Re-basin via implicit Sinkhorn differentiation (Guerrero Peña et al. 2023, arXiv 2212.12042) at the
size of scikit-learn's digits, or of Fashion-MNIST where Debian's package dataset-fashion-mnist is installed. Task k is
the same images turned by k · 180° / 19. An MLP with 256 hidden units learns the first task (AdamW, 1e-3); from there
every method sees one task after the other, in the same batches and for as many epochs, and is tested on all.

    fine-tune  SGD 0.01, as have all but ours
    EWC        λ 100 · Σ F (θ − θ of the task)² over the tasks before; F from the gradients of batches
    LwF        α 1, T 0.5: what the model before the task says of the new images is kept
    A-GEM      a gradient that would raise the loss on the memory is projected until it does not
    replay     fine-tune on new batches with the memory's, to tell what of ours is due to the memory
    ours       `hf_rebasin.solving.incremental.learn` on the batches of `replay`, its settings those of the paper; "π
               held" is the same with π = identity, so that δ alone is left
    free δ     the same without weight decay of δ, its gradient clipped at 1, which is almost never reached
    joint      all tasks at once, AdamW 1e-3, as many epochs: nothing to forget

The memory holds 5 images per class of every task before. Methods that use it get, with every batch of the new task, as
many images drawn from it. Accuracy is the mean over tasks after the last episode; forgetting the mean over all tasks
but the last of the best accuracy before the last episode minus that after it. Writes OUT/incremental.md,
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
    """1297 and 500 images, made 28 × 28 pixels large as in the paper, with their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = ndimage.zoom(images.reshape(-1, 8, 8) / 16, (1, 3.5, 3.5), order=1)
    order = np.random.default_rng(1234).permutation(len(images))
    images, labels = images[order], labels[order]
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def fashion_folder() -> Path | None:
    """Where a package has put Fashion-MNIST, in the four compressed files it is published as."""
    for place in ("*fashion-mnist*", "dataset*/*fashion-mnist*", "*fashion-mnist*/*"):
        for file in sorted(Path("/usr/share").glob(f"{place}/train-images*.gz")):
            return file.parent
    return None


def fashion() -> tuple[Any, Any, Any, Any]:
    """The first 3000 and 1000 images of Fashion-MNIST, of 28 × 28 pixels, with their labels."""
    if (folder := fashion_folder()) is None:
        sys.exit("no Fashion-MNIST in /usr/share; install the package dataset-fashion-mnist, or take --images digits")

    def read(name: str, skip: int) -> Any:
        (file,) = folder.glob(f"{name}*.gz")
        return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=skip)

    found: list[Any] = []
    for name, count in (("train", 3000), ("t10k", 1000)):
        found.append(read(f"{name}-images", 16).reshape(-1, 28, 28)[:count] / 255)
        found.append(read(f"{name}-labels", 8)[:count].astype(np.int64))
    return tuple(found)


SETS = {"digits": digits, "fashion": fashion}


def turned(images: Any, degrees: float) -> Tensor:
    """Every image rotated about its middle, flat."""
    x = ndimage.rotate(images, degrees, axes=(1, 2), reshape=False, order=1)
    return torch.tensor(x.reshape(len(x), -1), dtype=torch.float32)


def tasks_of(images: str, count: int) -> list[Task]:
    x, y, x_test, y_test = SETS[images]()
    labels, labels_test = torch.tensor(y), torch.tensor(y_test)
    angles = np.linspace(0, 180, count)
    return [Task((turned(x, angle), labels), (turned(x_test, angle), labels_test)) for angle in angles]


def batches(data: Batch, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch in a new order."""
    for some in torch.randperm(len(data[1]), generator=generator).split(BATCH):
        yield data[0][some], data[1][some]


def together(*several: Batch) -> Batch:
    return torch.cat([x for x, _ in several]), torch.cat([y for _, y in several])


class Memory:
    """Some images of every class of every task that was seen."""

    def __init__(self) -> None:
        self.data: Batch | None = None

    def keep(self, data: Batch, generator: torch.Generator) -> None:
        order = torch.randperm(len(data[1]), generator=generator)
        some = torch.cat([order[data[1][order] == c][:PER_CLASS] for c in range(CLASSES)])
        kept = data[0][some], data[1][some]
        self.data = kept if self.data is None else together(self.data, kept)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        assert self.data is not None
        some = torch.randint(len(self.data[1]), (count,), generator=generator)
        return self.data[0][some], self.data[1][some]


@dataclass(frozen=True)
class Replayed:
    """The batches of a task, each with as many images of the memory; in a new order every time they are read."""

    data: Batch
    memory: Memory
    generator: torch.Generator

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches(self.data, self.generator):
            yield together(batch, self.memory.draw(len(batch[1]), self.generator))


# --- methods ---------------------------------------------------------------------------------------------------------


def cost(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


class FineTune:
    """SGD on one task after the other; others say what they add."""

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
        return batches(data, self.generator)

    def cost(self, batch: Batch) -> Tensor:
        return cost(self.model, batch)

    def project(self, count: int) -> None:
        """Change the gradients before a step."""

    def remember(self, data: Batch) -> None:
        """Called after every task."""


class EWC(FineTune):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): λ Σ F (θ − θₜ)² over tasks t, as one quadratic form."""

    STRENGTH = 100.0

    def __init__(self, model: nn.Module, generator: torch.Generator):
        super().__init__(model, generator)
        self.fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.pull = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def cost(self, batch: Batch) -> Tensor:
        value = cost(self.model, batch)
        for name, p in self.model.named_parameters():  # Σ F (θ − θₜ)² without what is constant in θ
            value = value + self.STRENGTH * (p * (self.fisher[name] * p - 2 * self.pull[name])).sum()
        return value

    def remember(self, data: Batch) -> None:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        for batch in batches(data, self.generator):
            for name, p, g in zip(
                names, parameters, torch.autograd.grad(cost(self.model, batch), parameters), strict=True
            ):
                share = g.square() * len(batch[1]) / len(data[1])
                self.fisher[name] += share
                self.pull[name] += share * p.detach()


class LwF(FineTune):
    """Learning without forgetting (Li and Hoiem 2016)."""

    STRENGTH, TEMPERATURE = 1.0, 0.5
    before: nn.Module

    def cost(self, batch: Batch) -> Tensor:
        said = self.model(batch[0])
        with torch.no_grad():
            then = self.before(batch[0])
        now, then = ((x / self.TEMPERATURE).log_softmax(-1) for x in (said, then))
        kept = kl_div(now, then, reduction="batchmean", log_target=True)
        return cross_entropy(said, batch[1]) + self.STRENGTH * kept

    def remember(self, data: Batch) -> None:
        self.before = copy.deepcopy(self.model)


class AGEM(FineTune):
    """Averaged gradient episodic memory (Chaudhry et al. 2019)."""

    def project(self, count: int) -> None:
        parameters = list(self.model.parameters())
        g = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        reference = torch.autograd.grad(cost(self.model, self.memory.draw(count, self.generator)), parameters)
        r = torch.cat([part.flatten() for part in reference])
        if (along := g @ r) < 0:
            g -= along / (r @ r) * r
            for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)

    def remember(self, data: Batch) -> None:
        self.memory.keep(data, self.generator)


class Replay(FineTune):
    def batches(self, data: Batch) -> Iterator[Batch]:
        return iter(Replayed(data, self.memory, self.generator))

    def remember(self, data: Batch) -> None:
        self.memory.keep(data, self.generator)


class Ours(Replay):
    def learn(self, data: Batch, **knobs: Any) -> None:
        again = Replayed(data, self.memory, self.generator)
        found = learn(self.model, again, cost, spec=self.spec(data), epochs=EPOCHS, generator=self.generator, **knobs)
        self.model = found.module

    def spec(self, data: Batch) -> Spec:
        return infer_spec(self.model, data[0][:1])


class Free(Ours):
    def learn(self, data: Batch, **knobs: Any) -> None:
        super().learn(data, delta_decay=0.0, delta_clip=1.0, **knobs)


class Held(Ours):
    def spec(self, data: Batch) -> Spec:
        found = super().spec(data)
        return found.limited(dict.fromkeys(found.symmetries, "held"))


class FreeHeld(Free, Held):
    pass


METHODS: dict[str, tuple[Callable[[nn.Module, torch.Generator], FineTune], str]] = {
    "fine-tune": (FineTune, "#808080"),
    "EWC": (EWC, "#e69f00"),
    "LwF": (LwF, "#cc79a7"),
    "A-GEM": (AGEM, "#009e73"),
    "replay": (Replay, "#56b4e9"),
    "ours": (Ours, "#0072b2"),
    "ours, π held": (Held, "#999933"),
    "free δ": (Free, "#d55e00"),
    "free δ, π held": (FreeHeld, "#000000"),
}

# --- measuring -------------------------------------------------------------------------------------------------------

Result = dict[str, Any]  # one method from one seed


def network(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def trained(data: Batch, seed: int) -> nn.Module:
    """A new network that has learned some data: the first task, or all of them."""
    torch.manual_seed(seed)
    model, generator = network(data[0].shape[1]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in batches(data, generator):
            optimizer.zero_grad()
            cost(model, batch).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracies(model: nn.Module, tasks: Sequence[Task]) -> list[float]:
    """On the test images of every task."""
    return [(model(t.test[0]).argmax(-1) == t.test[1]).double().mean().item() for t in tasks]


def forgetting(rows: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks but the last of max over episodes before the last − after it; rows are episodes."""
    if len(rows) < 2:
        return 0.0
    table = torch.tensor(rows, dtype=torch.float64)
    return (table[:-1].amax(0) - table[-1])[:-1].mean().item()


def measure(method: str, seed: int, tasks: Sequence[Task]) -> Result:
    """One method after all episodes, from the network that every method of this seed begins with."""
    start = time.perf_counter()
    if method == "joint":
        rows = [accuracies(trained(together(*(task.train for task in tasks)), seed), tasks)]
    else:
        make, _ = METHODS[method]
        learner = make(trained(tasks[0].train, seed), torch.Generator().manual_seed(1000 + seed))
        rows = [accuracies(learner.model, tasks)]
        for last, task in pairwise(tasks):
            learner.remember(last.train)
            learner.learn(task.train)
            rows.append(accuracies(learner.model, tasks))
    return {
        "method": method,
        "seed": seed,
        "accuracy": sum(rows[-1]) / len(tasks),
        "forgetting": forgetting(rows),
        "accuracies": rows,  # after every episode, of every task
        "seconds": time.perf_counter() - start,
    }


# --- showing ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], scale: float, digits: int) -> str:
    """Mean ± standard deviation."""
    x = scale * torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.{digits}f} ± {x.std(correction=1) if len(x) > 1 else 0.0:.{digits}f}"


def table(results: Sequence[Result]) -> str:
    rows = [["", "accuracy, %", "forgetting", "paper: accuracy, %", "forgetting", "s"]]
    for method in dict.fromkeys(r["method"] for r in results):
        of = [r for r in results if r["method"] == method]
        accuracy, ours = (
            spread([r[what] for r in of], scale, 2) for what, scale in (("accuracy", 100), ("forgetting", 1))
        )
        theirs = "{:.2f} ± {:.2f}|{:.2f} ± {:.2f}".format(*PAPER[method]).split("|") if method in PAPER else ["", ""]
        rows.append([method, accuracy, ours, *theirs, f"{sum(r['seconds'] for r in of) / len(of):.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    cells = (
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def plot(results: Sequence[Result], file: Path) -> None:
    """The accuracy of some tasks after every episode from their own on, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(results[0]["accuracies"][-1])
    shown = [task for task in SHOWN if task <= count]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.1 * len(shown), 3), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], shown, strict=True):
        for method, (_, colour) in METHODS.items():
            of = [r["accuracies"] for r in results if r["method"] == method]
            if of:
                mean = 100 * torch.tensor(of).mean(0)[task - 1 :, task - 1]
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
    found = "digits" if fashion_folder() is None else "fashion"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "joint"], choices=[*METHODS, "joint"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=20, help="how many rotations, from 0° to 180°")
    parser.add_argument("--images", default=found, choices=SETS, help="by default fashion where it is installed")
    parser.add_argument("--out", type=Path, default=Path("incremental"), help="folder of the report")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, results = time.perf_counter(), []
    tasks = tasks_of(arguments.images, arguments.tasks)
    for method in arguments.methods:
        for seed in range(arguments.seeds):
            results.append(measure(method, seed, tasks))
            r = results[-1]
            said = f"{method}, seed {seed}: accuracy {r['accuracy']:.2%}, forgetting {r['forgetting']:.3f}"
            print(f"{said}, {r['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(results))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "incremental.md").write_text(f"# Incremental learning\n\n{table(results)}\n")
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
