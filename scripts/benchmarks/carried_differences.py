"""Measure merges of fine-tunes of two different bases, with and without carrying their differences over.

    python scripts/benchmarks/carried_differences.py [KIND ...] [--steps STEPS] [--learned] [--models DIR]
        [--out FILE]

KIND is one of the test bed's (testbed.py): mlp512, vit or llama; by default mlp512 and vit. Bases A and B are trained
from different seeds on the same data. A is tuned for one task and B for another, then one model is merged for both:
base_model A, and the fine-tune of B names B as its own base. Tasks of the images are digits that are turned by 20° and
digits that are blurred; those of the text are the headers of Python's C sources and the pages of its reference manual.

Each pair of bases gives these models, measured by their test loss on both tasks:

    base A                   the base alone
    A, tuned                 its fine-tune alone, for the first task
    B, tuned                 the fine-tune of B alone, for the second task
    its own fine-tune        for each task the model that was tuned for it, so two models: what one merge cannot reach
    A's difference alone     a merge in which the fine-tune of B has the weight 0
    subtracted from A        the difference of the fine-tune of B is taken from A, without aligning
    not aligned              it is taken from B, without aligning
    carried by weights       it is taken from B, and A's coordinates are found by weight matching (the default)
    carried by activations   they are found by activation matching, on 16 unlabelled batches of the bases' data
    carried by learning      they are learned on 64 unlabelled batches, starting from those; only with --learned
    tuned from one base      A is tuned for both tasks, and nothing needs aligning: what carrying over could reach

The pairs are 0-1, 1-2 and 2-0. The weights of the two fine-tunes are chosen for every row of the tables, out of 20
pairs of weights, by the mean loss of another pair of bases, 3-4, that is not reported. Every merge is written to disk
and read again before it is measured. Merges of fine-tunes of one base are made with alignment switched on and off, and
compared bit for bit. Models that are not in DIR (by default `carried_differences`) are trained there first. On one
thread all of it takes 2 minutes for mlp512, 15 for vit and 30 for llama.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import barrier
import numpy as np
import testbed
import torch
from torch import Tensor, nn

from hf_rebasin import Alignment, Checkpoint, Recipe, align
from hf_rebasin.recipes.runner import run_merge

PAIRS, OTHER_PAIR = ((0, 1), (1, 2), (2, 0)), (3, 4)
WEIGHTS = tuple(product((0.4, 0.6, 0.8, 1.0), (0.2, 0.4, 0.6, 0.8, 1.0)))
METHODS: dict[str, dict[str, Any]] = {"task_arithmetic": {}, "ties": {"density": 0.5, "normalize": False}}
STEPS = {"mlp512": 300, "vit": 300, "llama": 300}
RATES = {"mlp512": 3e-4, "vit": 5e-4, "llama": 1e-3}
SINGLE = ("base A", "A, tuned", "B, tuned")
CEILING, BEST = "its own fine-tune", "tuned from one base"
ALONE, FOREIGN, PLAIN = "A's difference alone", "subtracted from A", "not aligned"
CARRIED = {
    "carried by weights": "weight_matching",
    "carried by activations": "activation_matching",
    "carried by learning": "learned",
}
LEARNED = "carried by learning"
MERGES = (ALONE, FOREIGN, PLAIN, *CARRIED, BEST)

Weights = tuple[float, float]  # of the fine-tune of A and of the other one
Losses = tuple[float, float]  # test loss on the first task and on the second one


# --- tasks -----------------------------------------------------------------------------------------------------------


@cache
def texts(task: int) -> tuple[Tensor, Tensor]:
    """Return (training bytes, test bytes) of a task: C headers (0), or pages of the reference manual (1)."""
    if task == 0:
        files = sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h"))
        documents = [file.read_bytes() for file in files]
    else:
        from pydoc_data.topics import topics

        documents = [topics[name].encode() for name in sorted(topics)]

    def join(chosen: Sequence[bytes]) -> Tensor:
        return torch.tensor(np.minimum(np.frombuffer(b"".join(chosen), np.uint8), 127).astype(np.int64))

    return join([d for i, d in enumerate(documents) if i % 10]), join(documents[::10])


def turn(images: Tensor) -> Tensor:
    """Turn images by 20°, on a dark background."""
    angle = torch.tensor(torch.pi * 20 / 180)
    matrix = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    where = torch.cat([matrix, torch.zeros(2, 1)], 1).expand(len(images), 2, 3)
    grid = nn.functional.affine_grid(where, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def blur(images: Tensor) -> Tensor:
    """Average every pixel with its eight neighbours."""
    return nn.functional.avg_pool2d(images + 1, 3, stride=1, padding=1) - 1


IMAGE_TASKS: tuple[Callable[[Tensor], Tensor], ...] = (turn, blur)
TASKS = {"mlp512": ("turned", "blurred"), "vit": ("turned", "blurred"), "llama": ("C", "manual")}


def make_batches(kind: str, task: int, split: str, generator: torch.Generator) -> Iterator[testbed.Batch]:
    """Yield batches of a task: fixed ones for "test", endless draws of `generator` for "train"."""
    if kind == "llama":
        data = texts(task)[split == "test"]
        for _ in range(16) if split == "test" else iter(int, 1):
            start = torch.randint(len(data) - testbed.CONTEXT, (testbed.BATCH,), generator=generator)
            ids = torch.stack([data[s : s + testbed.CONTEXT] for s in start])
            yield dict(input_ids=ids, labels=ids)
    else:
        for batch in testbed.make_batches(kind, split, generator):
            yield batch | dict(pixel_values=IMAGE_TASKS[task](batch["pixel_values"]))


def evaluate(model: nn.Module, kind: str) -> Losses:
    """Return the mean test losses on the two tasks."""
    model.eval()
    losses = []
    with torch.no_grad():
        for task in (0, 1):
            batches = make_batches(kind, task, "test", torch.Generator().manual_seed(7))
            losses.append(float(np.mean([model(**batch)[0].item() for batch in batches])))
    return losses[0], losses[1]


# --- models ----------------------------------------------------------------------------------------------------------


def find_base(kind: str, seed: int, folder: Path) -> Path:
    """Return the folder of a base, which is trained if it is missing."""
    out = folder / f"{kind}-{seed}"
    if not out.exists():
        barrier.train(kind, seed, out)
    return out


def find_fine_tune(kind: str, seed: int, task: int, folder: Path) -> Path:
    """Return the folder of a fine-tune (AdamW with cosine decay, clipped gradients), made if it is missing."""
    out = folder / f"{kind}-{seed}-{TASKS[kind][task]}"
    if out.exists():
        return out
    barrier.log_progress(f"tuning {out.name}")
    model = testbed.load(kind, find_base(kind, seed, folder)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[kind], betas=(0.9, 0.98), weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS[kind])
    batches = make_batches(kind, task, "train", torch.Generator().manual_seed(100 + seed))
    for _, batch in zip(range(STEPS[kind]), batches, strict=False):
        optimizer.zero_grad()
        model(**batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    partial = out.with_name(f".{out.name}.partial")
    testbed.save(model, partial)
    return partial.rename(out)


@cache
def find_alignment(kind: str, base: Path, other: Path, solver: str) -> Alignment:
    """Align a base with another one, on unlabelled data if the solver needs them."""
    spec: Any = barrier.table_for(other)
    if solver == "weight_matching":
        return align(base, other, spec=spec).alignment
    fixed = testbed.load(kind, base)
    if solver == "activation_matching":
        return align(fixed, other, solver=solver, spec=spec, data=barrier.unlabelled_batches(kind)).alignment
    data = barrier.unlabelled_descent_batches(kind)
    return align(fixed, other, solver=solver, spec=spec, data=data, cost="rnd", start="activation_matching").alignment


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two bases and their fine-tunes.

    Args:
        kind: kind of the models.
        base: base A, which stays fixed.
        other: base B.
        tuned: A tuned for the first task.
        foreign: B tuned for the second task.
        own: A tuned for the second task.
    """

    kind: str
    base: Path
    other: Path
    tuned: Path
    foreign: Path
    own: Path

    def make_recipe(self, method: str, row: str, weights: Weights, *, aligned: bool = False) -> Recipe:
        """Return the recipe of a merge."""
        second: dict[str, Any] = {"model": str(self.own if row == BEST else self.foreign)}
        if row in (ALONE, PLAIN, *CARRIED):
            second["base"] = str(self.other)
        return Recipe.from_dict(
            {
                "merge_method": method,
                "base_model": str(self.base),
                "models": [str(self.tuned), second],
                "parameters": {"weights": list(weights), **METHODS[method]},
                "align": aligned,
                "convention": "own",
            }
        )

    def merge(self, method: str, row: str, weights: Weights) -> Checkpoint:
        """Merge the fine-tunes as a row of the tables says."""
        if row not in CARRIED:
            return run_merge(self.make_recipe(method, row, weights)).checkpoint
        alignment = find_alignment(self.kind, self.base, self.other, CARRIED[row])
        stays = Alignment(alignment.spec, {})
        alignments = [stays, alignment, alignment]  # of A's fine-tune, of B's, of B
        return run_merge(self.make_recipe(method, row, weights, aligned=True), alignments=alignments).checkpoint


def make_pair(kind: str, seeds: tuple[int, int], folder: Path) -> Pair:
    """Return the models of a pair of seeds, which are trained if they are missing."""
    a, b = seeds
    return Pair(
        kind=kind,
        base=find_base(kind, a, folder),
        other=find_base(kind, b, folder),
        tuned=find_fine_tune(kind, a, 0, folder),
        foreign=find_fine_tune(kind, b, 1, folder),
        own=find_fine_tune(kind, a, 1, folder),
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(pair: Pair, method: str, row: str, weights: Weights) -> Losses:
    """Merge, write the merge, read it again, and return its losses on the tasks."""
    with tempfile.TemporaryDirectory() as scratch:
        out = pair.merge(method, row, weights).save(Path(scratch) / "model")
        return evaluate(testbed.load(pair.kind, out), pair.kind)


def choose_weights(pair: Pair, method: str, row: str) -> Weights:
    """Return the weights of the lowest mean loss on a pair."""
    candidates = [(weight, 0.0) for weight in dict(WEIGHTS)] if row == ALONE else WEIGHTS
    return min(candidates, key=lambda weights: sum(measure(pair, method, row, weights)))


def equals_unaligned(pair: Pair, method: str) -> bool:
    """Tell whether a merge of fine-tunes of one base stays as it is, bit for bit, when alignment is switched on."""
    states = []
    for aligned in (True, False):
        with tempfile.TemporaryDirectory() as scratch:
            merge = run_merge(pair.make_recipe(method, BEST, (0.5, 0.5), aligned=aligned)).checkpoint
            states.append((merge.save(Path(scratch) / "model") / "model.safetensors").read_bytes())
    return states[0] == states[1]


def measure_kind(kind: str, folder: Path, merges: Sequence[str]) -> dict[str, Any]:
    """Measure all pairs of a kind.

    Args:
        kind: the kind.
        folder: folder of the models.
        merges: rows of the table that are merges.

    Returns:
        `losses`: `{row: {method: [losses of every pair]}}`, those of models that are not merges under the method "";
        `weights`: `{row: {method: weights}}`; `equal`: whether merges of fine-tunes of one base stay as they are.
    """
    other = make_pair(kind, OTHER_PAIR, folder)
    pairs = [make_pair(kind, seeds, folder) for seeds in PAIRS]
    losses: dict[str, dict[str, list[Losses]]] = {row: {"": []} for row in (*SINGLE, CEILING)}
    for pair in pairs:
        for row, path in zip(SINGLE, (pair.base, pair.tuned, pair.foreign), strict=True):
            losses[row][""].append(evaluate(testbed.load(kind, path), kind))
        _, first, second = (losses[row][""][-1] for row in SINGLE)
        losses[CEILING][""].append((first[0], second[1]))
    chosen: dict[str, dict[str, Weights]] = {}
    for row in merges:
        for method in METHODS:
            weights = chosen.setdefault(row, {})[method] = choose_weights(other, method, row)
            losses.setdefault(row, {})[method] = [measure(pair, method, row, weights) for pair in pairs]
            barrier.log_progress(f"{kind} {method} {row}, weights {weights}: {losses[row][method]}")
    equal = all(equals_unaligned(pair, method) for pair in pairs for method in METHODS)
    return {"kind": kind, "losses": losses, "weights": chosen, "equal": equal}


def format_table(result: Mapping[str, Any]) -> str:
    """Format the losses of a kind: weights, the mean over the tasks of every pair and of all pairs, and every task."""
    kind, losses, chosen = result["kind"], result["losses"], result["weights"]
    rows = [["", "method", "weights", *("{}–{}".format(*pair) for pair in PAIRS), "mean", *TASKS[kind]]]
    for method in ("", *METHODS):
        for row in (row for row in losses if method in losses[row]):
            numbers = np.array(losses[row][method])
            means = [*numbers.mean(1), numbers.mean(), *numbers.mean(0)]
            weights = "{:.1f}, {:.1f}".format(*chosen[row][method]) if method else ""
            rows.append([row, method, weights, *(f"{mean:.3f}" for mean in means)])
    return f"### {barrier.TITLES[kind]}\n\n{barrier.format_markdown(rows, left=2)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["mlp512", "vit"], metavar="KIND", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--learned", action="store_true", help="learn alignments as well, which takes minutes each")
    parser.add_argument("--models", type=Path, default=Path("carried_differences"), help="folder of the models")
    parser.add_argument("--steps", type=int, help="steps that bases are trained for; by default the test bed's")
    parser.add_argument("--out", type=Path, help="JSON file for all losses")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - TASKS.keys():
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    if arguments.steps is not None:
        testbed.STEPS.update(dict.fromkeys(arguments.kinds, arguments.steps))
    import transformers

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = []
    for kind in arguments.kinds:
        merges = [row for row in MERGES if row != LEARNED or arguments.learned]
        results.append(measure_kind(kind, arguments.models, merges))
        print(format_table(results[-1]), end="\n\n", flush=True)
        print(
            "Fine-tunes of one base, alignment on and off: "
            + ("equal bit for bit." if results[-1]["equal"] else "they differ."),
            end="\n\n",
            flush=True,
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
