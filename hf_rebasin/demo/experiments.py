"""The demo: train models apart on scikit-learn's digits, align and merge them, and report the results.

Nothing is downloaded. Three architectures are trained from three seeds each: an MLP and a ResNet, where permutations
suffice, and a ViT, whose residual stream has to be rotated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from tqdm import tqdm

from ..alignment.exactness import compute_outputs
from ..checkpoints.checkpoint import Checkpoint
from ..errors import OptionError, nearest
from ..evaluation.barrier import Curve
from ..evaluation.interpolation import interpolate
from ..evaluation.metrics import Measured, evaluate
from ..merging.merge import merge
from ..merging.recalibration import recalibrate
from ..recipes.assessment import moved_families, weight_similarities
from ..reports import pairs
from ..reports.measurements import Exactness, Likeness, Line, TableRow, with_excess
from ..reports.report import Report
from ..solving.align import align
from ..solving.solution import Solution
from ..symmetries.table import Table
from ..text import columns
from .digits import (
    load_splits,
    make_evaluation_batches,
    make_statistics_batches,
    make_training_batches,
    write_digits,
    write_processor,
)


class MLP(nn.Module, PyTorchModelHubMixin):
    """Two hidden layers on 8 × 8 images; not a transformers model, so its symmetries come from `MLP_TABLE`."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.net(pixel_values)
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


MLP_TABLE = Table(
    rows={
        "net.1.weight": "hidden.1, _",
        "net.1.bias": "hidden.1",
        "net.3.weight": "hidden.2, hidden.1'",
        "net.3.bias": "hidden.2",
        "net.5.weight": "_, hidden.2'",
        "net.5.bias": "_",
    },
    groups={"hidden.*": "permutation"},
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One architecture, and how it is trained (AdamW, one cycle, clipped gradients)."""

    title: str
    build: Callable[[], nn.Module]
    steps: int
    lr: float
    weight_decay: float
    table: Table | None = None
    note: str = ""


def _build_mlp(width: int) -> Callable[[], nn.Module]:
    return lambda: MLP(width)


def _build_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=64, hidden_sizes=[128, 256], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def _build_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    return ViTForImageClassification(config)


EXPERIMENTS = {
    "mlp": Experiment(
        title="MLP 64-64-64-10", build=_build_mlp(64), steps=2000, lr=1e-3, weight_decay=0.05, table=MLP_TABLE
    ),
    "mlp512": Experiment(
        title="MLP 64-512-512-10", build=_build_mlp(512), steps=2000, lr=1e-3, weight_decay=0.05, table=MLP_TABLE
    ),
    "resnet": Experiment(
        title="ResNet (64, 128, 256 channels)", build=_build_resnet, steps=800, lr=1e-3, weight_decay=1.0
    ),
    "vit": Experiment(
        title="ViT (4 layers, width 64)",
        build=_build_vit,
        steps=2000,
        lr=3e-3,
        weight_decay=0.05,
        note="permutations alone do not bring transformers together: their residual streams are rotated against each "
        "other. Here the stream is rotated and the bases of heads are changed, too; without data that helps part of "
        "the way",
    ),
}
DEFAULT_KINDS = ("mlp", "resnet", "vit")


def train_model(kind: str, seed: int) -> nn.Module:
    """Train one model from one seed: it determines the initialisation, the order of the data and the noise."""
    experiment = EXPERIMENTS[kind]
    torch.manual_seed(seed)
    model, generator = experiment.build().train(), torch.Generator().manual_seed(1000 + seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decayed = [{"params": matrices, "weight_decay": experiment.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decayed, lr=experiment.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, experiment.lr, experiment.steps, pct_start=0.1)
    for _, batch in zip(range(experiment.steps), make_training_batches(generator), strict=False):
        loss = model(**batch)[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _train_to(kind: str, seed: int, folder: Path) -> None:
    """Train a model in its own process, on one thread: two threads on a busy machine are slower than one."""
    torch.set_num_threads(1)
    _disable_progress_bars()
    model: Any = train_model(kind, seed)
    model.save_pretrained(folder)


def _disable_progress_bars() -> None:
    """Switch off transformers' progress bars and warnings for loading and saving these tiny models."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@dataclass(frozen=True, kw_only=True)
class DemoPair:
    """Results of aligning and merging one pair: losses and accuracies on the line between them, before and after."""

    kind: str
    seeds: tuple[int, int]
    plain: Curve
    aligned: Curve
    refitted: Mapping[str, Measured]
    difference: float
    seconds: float
    solution: Solution
    likeness: tuple[Likeness, ...]

    @property
    def ratio(self) -> float:
        """Aligned barrier ÷ plain barrier."""
        return self.aligned.barrier / self.plain.barrier


def compare_pair(
    kind: str, seeds: tuple[int, int], a: nn.Module, b: nn.Module, points: int = 25
) -> tuple[DemoPair, Any]:
    """Align b to a and measure the lines from a to b and to the moved b; return the results and the moved model."""

    def prepare(model: nn.Module) -> object:
        return recalibrate(model, make_statistics_batches())

    start = time.perf_counter()
    solution = align(a, b, spec=EXPERIMENTS[kind].table, seed=0)
    moved = solution.apply(b)
    seconds = time.perf_counter() - start
    inputs = {"pixel_values": load_splits()[1][0]}
    before, after = (compute_outputs(model, inputs)[0] for model in (b, moved))
    plain = interpolate(a, b, make_evaluation_batches(), points=points, prepare=prepare)
    aligned = interpolate(a, moved, make_evaluation_batches(), points=points, prepare=prepare)
    images = list(make_statistics_batches())
    refitted = {
        name: evaluate(merge([a, other], "refit", data=images).model(), make_evaluation_batches())
        for name, other in (("plain", b), ("aligned", moved))
    }
    pair = DemoPair(
        kind=kind,
        seeds=seeds,
        plain=plain,
        aligned=aligned,
        refitted=refitted,
        difference=(before - after).abs().max().item(),
        seconds=seconds,
        solution=solution,
        likeness=tuple(weight_similarities(solution, *map(Checkpoint.open, (a, b, moved)))),
    )
    return pair, moved


def make_demo_report(pairs: Sequence[DemoPair], out: Path) -> Report:
    """Make a report of all pairs on one page."""
    return Report(
        title="Models trained from different seeds on scikit-learn's digits",
        pairs=tuple(_report_pair(pair, out) for pair in pairs),
        data="500 held-out digits; refitted on 1297 unlabelled ones, BatchNorm statistics recomputed in every model",
        versions={name: version(name) for name in ("hf_rebasin", "torch", "transformers", "scikit-learn")},
        command="hf-rebasin demo",
    )


def _report_pair(pair: DemoPair, out: Path) -> pairs.Pair:
    names = [str(out / pair.kind / f"seed-{seed}") for seed in pair.seeds]
    ends = tuple(
        TableRow(name, loss=pair.plain.loss[i], metrics={"accuracy": pair.plain.accuracy[i]})
        for name, i in zip(names, (0, -1), strict=True)
    )
    rows, lines = [], []
    for role, curve in (("plain", pair.plain), ("aligned", pair.aligned)):
        control, name = role == "plain", f"{role} average"
        loss, accuracy = curve.middle["loss"], {"accuracy": curve.middle["accuracy"]}
        rows.append(TableRow(name, control=control, loss=loss, metrics=accuracy, barrier=curve.barrier))
        fitted = pair.refitted[role]
        rows.append(
            TableRow(
                f"{name}, refitted",
                "unlabelled inputs",
                control=control,
                loss=fitted.loss,
                metrics=dict(fitted.metrics),
            )
        )
        lines.append(Line(role, role, at=curve.at, loss=curve.loss, metrics=dict(curve.metrics)))
    return pairs.Pair(
        fixed=names[0],
        moving=names[1],
        ends=ends,
        rows=with_excess(ends, rows),
        lines=tuple(lines),
        likeness=pair.likeness,
        moved=tuple(moved_families([pair.solution])),
        exactness=Exactness(difference=pair.difference, dtype="float32"),
        seconds=dict(pair.solution.seconds),
        status=pair.solution.status.value,
        architecture=EXPERIMENTS[pair.kind].title,
    )


TABLE_HEADER = (
    "pair",
    "ends",
    "plain average",
    "aligned average",
    "plain refitted",
    "aligned refitted",
    "plain barrier",
    "aligned barrier",
    "ratio",
    "max|Δ output|",
    "align s",
)


def make_table_row(pair: DemoPair) -> tuple[str, ...]:
    """Make one row of the demo's table, with accuracies in per cent and barriers in test loss."""
    ends = " ".join(f"{100 * pair.plain.accuracy[i]:.1f}" for i in (0, -1))
    return (
        f"{pair.seeds[0]}-{pair.seeds[1]}",
        f"{ends} %",
        f"{100 * pair.plain.middle['accuracy']:.1f} %",
        f"{100 * pair.aligned.middle['accuracy']:.1f} %",
        *(f"{100 * pair.refitted[name].metrics['accuracy']:.1f} %" for name in ("plain", "aligned")),
        f"{pair.plain.barrier:.3f}",
        f"{pair.aligned.barrier:.3f}",
        f"{pair.ratio:.2f}",
        f"{pair.difference:.1e}",
        f"{pair.seconds:.1f}",
    )


def run_demo(
    out: Path, kinds: Sequence[str] = DEFAULT_KINDS, seeds: int = 3, say: Callable[[str], Any] = print
) -> list[DemoPair]:
    """Train, align, merge and report; leaves `out/KIND/{seed-0, seed-1, aligned-1, merged}` and `out/report.html`.

    The images are in `out/digits`, and transformers models come with an image processor, so that every command that
    takes data can be tried on them.

    Raises:
        OptionError: an unknown kind, or fewer than two seeds.
    """
    for kind in kinds:
        if kind not in EXPERIMENTS:
            raise OptionError(f"the demo has no model {kind!r}{nearest(kind, EXPERIMENTS)}")
    if seeds < 2:
        raise OptionError(f"a pair needs two seeds, got {seeds}")
    load_splits()  # raises here if scikit-learn is missing, before any process starts
    _disable_progress_bars()
    start = time.perf_counter()
    jobs = [
        (kind, seed) for kind in sorted(kinds, key=lambda k: -EXPERIMENTS[k].steps * len(k)) for seed in range(seeds)
    ]
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_train_to, kind, seed, out / kind / f"seed-{seed}") for kind, seed in jobs]
        for future in tqdm(
            futures, desc=f"training {len(jobs)} models on {workers} cores", unit="model", disable=None
        ):
            future.result()
    say(f"trained {len(jobs)} models from {seeds} seeds each in {time.perf_counter() - start:.0f} s\n")
    write_digits(out / "digits")
    all_pairs = []
    for kind in kinds:
        experiment = EXPERIMENTS[kind]
        model_class: Any = type(experiment.build())
        with redirect_stdout(StringIO()):  # huggingface_hub prints a line for every model that it loads
            models = [model_class.from_pretrained(out / kind / f"seed-{seed}").eval() for seed in range(seeds)]
        pairs = []
        for a, b in tqdm(list(combinations(range(seeds), 2)), desc=f"aligning {kind}", leave=False, disable=None):
            pair, moved = compare_pair(kind, (a, b), models[a], models[b])
            pairs.append(pair)
            if (a, b) == (0, 1):
                moved.save_pretrained(out / kind / "aligned-1")
                merged = merge([models[0], moved]).model()
                recalibrate(merged, make_statistics_batches())
                merged.save_pretrained(out / kind / "merged")
        if experiment.table is None:
            for folder in (out / kind).iterdir():
                write_processor(folder)
        say(experiment.title)
        for line in columns([TABLE_HEADER, *map(make_table_row, pairs)], right=range(1, len(TABLE_HEADER))):
            say(f"  {line}")
        if experiment.note:
            say(f"  note: {experiment.note}")
        say(f"  {out / kind / 'merged'} loads with {model_class.__name__}.from_pretrained\n")
        all_pairs += pairs
    page = make_demo_report(all_pairs, out).save(out / "report.html")[-1]
    say(
        "Accuracies and barriers (the highest rise of the test loss over the line between the ends, 25 points)\n"
        "are on 500 held-out digits; BatchNorm statistics are recomputed in every model, ends and plain average\n"
        "included. Refitted: every layer, on unlabelled images, of the plain average (the control)\n"
        f"and of the aligned one. Curves, and what was moved: {page}. {time.perf_counter() - start:.0f} s in all."
    )
    return all_pairs
