"""Barriers of small models trained apart on scikit-learn's digits: plain, and aligned by weight matching.

    python scripts/benchmark_barrier.py [mlp mlp512 resnet vit] [--models DIR]

All three pairs of three seeds, 25 points on the line, BatchNorm statistics recomputed in every model. Losses and
accuracies on 500 held-out digits. "own" is the largest change of a moved model's own test loss.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import combinations
from pathlib import Path

import torch

from hf_rebasin import demo
from hf_rebasin.text import columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["mlp", "mlp512"], help=f"of {', '.join(demo.EXPERIMENTS)}")
    parser.add_argument("--models", type=Path, help="keep the trained models here, and use those that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.models or Path(scratch)
        for kind in arguments.kinds:
            kind_class = type(demo.EXPERIMENTS[kind].build())
            models = []
            for seed in range(3):
                if not (folder / kind / f"seed-{seed}").exists():
                    demo.train(kind, seed).save_pretrained(folder / kind / f"seed-{seed}")
                models.append(kind_class.from_pretrained(folder / kind / f"seed-{seed}").eval())
            rows = [("pair", "plain", "aligned", "ratio", "own", "max|Δ output|")]
            for a, b in combinations(range(3), 2):
                pair, moved = demo.compare(kind, (a, b), models[a], models[b])
                own = abs(demo.evaluate(moved)[0] - demo.evaluate(models[b])[0])
                cells = (pair.plain.barrier, pair.aligned.barrier, pair.ratio)
                rows.append((f"{a}-{b}", *(f"{x:.4f}" for x in cells), f"{own:.1e}", f"{pair.difference:.1e}"))
            print(demo.EXPERIMENTS[kind].title)
            print("\n".join(columns(rows, right=range(1, 6))), flush=True)


if __name__ == "__main__":
    main()
