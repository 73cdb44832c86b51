"""Run the command line on broken and hostile recipes, models and alignments, drawn by seed.

    python scripts/fuzz.py [recipe | checkpoint] [--cases 2000] [--seed 0]

Every case has to end with a message: no traceback, no code of the input run, nothing written outside the output
folder, nothing left behind. The script prints how many cases were refused and how many succeeded, by mutation. If a
case violates this, it prints the command that repeats that case, and exits with status 1.
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


def summarise(outcomes: Iterable[Any]) -> Iterator[str]:
    """Yield the lines of a table with a row per mutation."""
    rows: dict[str, list[int]] = {}
    for outcome in outcomes:
        for name in outcome.mutations:
            row = rows.setdefault(name, [0, 0, 0, 0])
            for i, applies in enumerate((True, outcome.status != 0, outcome.status == 0, bool(outcome.violations))):
                row[i] += applies
    table = [(name, *map(str, row)) for name, row in sorted(rows.items())]
    return columns([("mutation", "cases", "refused", "succeeded", "violations"), *table], right=range(1, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="kind of the inputs; by default both")
    parser.add_argument("--cases", type=int, default=2000, help="number of cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; the others count up from it")
    arguments = parser.parse_args()
    tests = Path(__file__).resolve().parent.parent / "tests"
    sys.path[:0] = [str(tests), str(tests / "helpers")]
    import conftest  # noqa: F401 (a local Hub instead of the real one, one thread)
    from fuzzing import build_inputs, run_case

    start, outcomes = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="hf-rebasin-fuzz-") as folder:
        good = build_inputs(Path(folder) / "good")
        for kind in [arguments.kind] if arguments.kind else KINDS:
            for seed in tqdm(range(arguments.seed, arguments.seed + arguments.cases), desc=kind, unit=" cases"):
                outcome = run_case(kind, seed, good, Path(folder) / "case")
                outcomes.append(outcome)
                if outcome.violations:
                    tqdm.write(f"\n{outcome}")
    bad = sum(bool(outcome.violations) for outcome in outcomes)
    refused = sum(outcome.status != 0 for outcome in outcomes)
    print("\n".join(summarise(outcomes)))
    print(
        f"\n{len(outcomes)} cases in {time.perf_counter() - start:.0f} s: {refused} refused, "
        f"{len(outcomes) - refused} succeeded, {bad} with violations"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
