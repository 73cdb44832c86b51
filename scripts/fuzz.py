"""Broken and hostile recipes, models and alignments at the command line, drawn by seed.

    python scripts/fuzz.py [recipe | checkpoint] [--cases 2000] [--seed 0]

Every case ends with a message: no traceback, no code of the input run, nothing written outside the output folder,
nothing left behind. Prints how many were refused and how many succeeded, for every mutation; exit status 1 if anything
was not as it must be, with the command that tries that case again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_rebasin.text import columns

KINDS = ("recipe", "checkpoint")


def summary(outcomes: Iterable[Any]) -> Iterator[str]:
    """A line for every mutation."""
    rows: dict[str, list[int]] = {}
    for outcome in outcomes:
        for name in outcome.mutations:
            row = rows.setdefault(name, [0, 0, 0, 0])
            for i, counts in enumerate((True, outcome.status != 0, outcome.status == 0, bool(outcome.violations))):
                row[i] += counts
    table = [(name, *map(str, row)) for name, row in sorted(rows.items())]
    return columns([("mutation", "cases", "refused", "succeeded", "violations"), *table], right=range(1, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="by default both")
    parser.add_argument("--cases", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next ones follow")
    asked = parser.parse_args()
    tests = Path(__file__).resolve().parent.parent / "tests"
    sys.path[:0] = [str(tests), str(tests / "helpers")]
    import conftest  # noqa: F401 (a local Hub instead of the real one, one thread)
    from fuzzing import build, case

    start, outcomes = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="hf-rebasin-fuzz-") as folder:
        good = build(Path(folder) / "good")
        for kind in [asked.kind] if asked.kind else KINDS:
            for seed in tqdm(range(asked.seed, asked.seed + asked.cases), desc=kind, unit=" cases"):
                outcome = case(kind, seed, good, Path(folder) / "case")
                outcomes.append(outcome)
                if outcome.violations:
                    tqdm.write(f"\n{outcome}")
    bad = sum(bool(outcome.violations) for outcome in outcomes)
    refused = sum(outcome.status != 0 for outcome in outcomes)
    print("\n".join(summary(outcomes)))
    print(
        f"\n{len(outcomes)} cases in {time.perf_counter() - start:.0f} s: {refused} refused, "
        f"{len(outcomes) - refused} succeeded, {bad} not as it must be"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
