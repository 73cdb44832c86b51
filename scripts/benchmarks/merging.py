"""Measure the time and peak memory of merge methods on bfloat16 Llamas from disk to disk, in processes of their own.

    python scripts/benchmarks/merging.py [--methods ties slerp] [--models 2 3] [--sizes 1 4] [--runs 3]
                                         [--mergekit COMMAND] [--align] [--folder DIR]

The models are fine-tunes (the base and little noise) of random numbers, in shards of 500 MB; nothing is downloaded.
Every method runs with one recipe, which mergekit reads as well if COMMAND (its mergekit-yaml) is given. Three programs
take turns, so that other load on the machine affects all of them: a bare loop that averages safetensors files, this
package, and mergekit. Prints medians over the runs, and the medians of the ratios to the loop and to mergekit in the
same run. Methods for a base and one model run on these two.

A first run, which fills the file cache, computes in float32 and compares the results: how many numbers differ from
mergekit's (of `linear`, also from the loop's), and how many by more than one unit in the last place of bfloat16.
Methods with random numbers are not compared. --align also measures aligning and merging two models of 1.1 billion
parameters, which takes some minutes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
SHAPES = {
    "0.1": (512, 1376, 6, 8, 4),
    "1": (1536, 4096, 16, 12, 4),
    "4": (2560, 8192, 24, 20, 4),
    "align": (2048, 5632, 22, 32, 4),
}
FINE_TUNES = "abcdefgh"
LOOP, OURS, MERGEKIT = "loop", "hf-rebasin", "mergekit"
# Parameters of all methods that have them; mergekit has no default for `weight` and `t`.
PARAMETERS = {"weight": 0.5, "density": 0.5, "t": 0.5}
OWN_PARAMETERS = {"nearswap": {"t": 0.001}}  # where 0.5 would leave nothing to do
FLOAT32_ERROR = 1e-8  # of sums of numbers below 0.1, which is more than a unit of bfloat16 if they cancel


class Measurement(NamedTuple):
    """Wall and processor time in seconds, and peak memory in GB, of one process."""

    wall: float
    cpu: float
    peak: float


def make_models(size: str, folder: Path, count: int) -> None:
    """Save a base and fine-tunes of it, or two unrelated models to be aligned."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, groups = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for name in FINE_TUNES[:count] if size == "align" else ("base", *FINE_TUNES[:count]):
        base = torch.Generator().manual_seed(ord(name) if size == "align" else 0)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02, generator=base) if parameter.dim() > 1 else parameter.data.fill_(1)
            if name != "base":
                parameter.data.add_(torch.empty_like(parameter).normal_(0, 0.002))
        model.save_pretrained(folder / name, max_shard_size="500MB")


def write_recipes(folder: Path, count: int, names: Sequence[str]) -> dict[str, bool]:
    """Write a recipe for every method that can merge so many models, in bfloat16 and (for a comparison) in float32.

    Returns:
        `{method: whether it draws random numbers}`.
    """
    from hf_rebasin import registry

    random = {}
    for name in names or registry.names("merge method"):
        method = registry.merge_method(name)
        values = {**PARAMETERS, **OWN_PARAMETERS.get(name, {})}
        own = {parameter: value for parameter, value in values.items() if parameter in method.per_model}
        shared = {parameter: value for parameter, value in values.items() if parameter in method.parameters}
        number = count_models(name, count, own | shared)
        if method.finish is not None or not number:
            continue
        models = FINE_TUNES[:number]
        recipe = {
            "merge_method": name,
            "base_model": str(folder / (models[0] if method.base == "none" else "base")),
            "models": [{"model": str(folder / model), "parameters": own} for model in models],
            "parameters": shared,
            "dtype": "bfloat16",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        recipe |= {"dtype": "float32", "out_dtype": "bfloat16"}
        (folder / f"{name}_float32.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        random[name] = "uniforms" in inspect.signature(method.merge).parameters
    return random


def count_models(name: str, count: int, values: Mapping[str, float]) -> int:
    """Return how many models a method merges beside its base, if it has one; 0 if it cannot merge so many."""
    from hf_rebasin import registry
    from hf_rebasin.errors import OptionError
    from hf_rebasin.merging.parameters import resolve_method

    for number in (count, count - 1) if registry.merge_method(name).base == "required" else (count,):
        try:
            resolve_method(name, values).refuse_unfit(number)
            return number
        except OptionError as error:
            problem = error
    print(f"{name} is left out: {problem}", file=sys.stderr)
    return 0


def average_in_loop(out: Path, models: Sequence[Path]) -> None:
    """Average files of the same name one after the other, as a bare script would."""
    from contextlib import ExitStack

    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir()
    for file in sorted(models[0].glob("*.safetensors")):
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(model / file.name, "pt")) for model in models]
            merged = {
                key: (sum(part.get_tensor(key).float() for part in opened) / len(opened)).bfloat16()
                for key in opened[0].keys()  # noqa: SIM118 (not a mapping)
            }
            save_file(merged, out / file.name, metadata={"format": "pt"})


def count_differences(first: Path, second: Path) -> tuple[int, int]:
    """Return how many numbers of two merges differ, and how many by more than one unit of bfloat16."""
    import torch
    from safetensors.torch import load_file

    a, b = (
        {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for folder in (first, second)
    )
    if a.keys() != b.keys():
        sys.exit(f"{first} and {second} have different tensors, such as {min(a.keys() ^ b.keys())}")
    differing = far = 0
    for key in a:
        for x, y in zip(a[key].flatten().split(1 << 20), b[key].flatten().split(1 << 20), strict=True):
            x, y = x.float(), y.float()
            gap = (x - y).abs()
            exponent = torch.frexp(torch.maximum(x.abs(), y.abs())).exponent
            unit = torch.ldexp(torch.ones_like(gap), exponent - 8)  # bfloat16 has 8 significant bits
            differing += int(torch.count_nonzero(gap))
            far += int(torch.count_nonzero(~(gap <= unit + FLOAT32_ERROR)))
    return differing, far


def print_time_split(out: Path, models: Sequence[Path]) -> None:
    """Print, as JSON, how the time of a merge by this package divides into steps."""
    start = time.perf_counter()
    import torch  # noqa: F401

    torched = time.perf_counter()
    from hf_rebasin import merge

    imported = time.perf_counter()
    merged = merge(models)
    opened = time.perf_counter()
    merged.save(out)
    done = time.perf_counter()
    steps = {"torch": torched - start, "package": imported - torched, "opening": opened - imported}
    print(json.dumps({k: round(v, 2) for k, v in (steps | {"reading, merging, writing": done - opened}).items()}))


def measure_process(command: Sequence[str | Path]) -> Measurement:
    """Run a command and measure its process; RuntimeError with the end of its output if it fails."""
    start = time.perf_counter()
    # load nothing large here: a child's peak starts at that of its parent
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise RuntimeError(output.read().decode(errors="replace").strip()[-2000:])
    return Measurement(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def run_self(*words: str | Path) -> str:
    """Run a step of this script that loads torch in a process of its own, and return its output."""
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def hf_rebasin() -> Path:
    """Return the path of the command line of this package."""
    return Path(sys.executable).parent / "hf-rebasin"


class Benchmark:
    """The programs that merge the models in a folder.

    Args:
        folder: folder of the models and recipes.
        count: number of models that are merged.
        mergekit: path of mergekit-yaml; None to leave it out.
    """

    def __init__(self, folder: Path, count: int, mergekit: str | None) -> None:
        self.folder, self.out = folder, folder / "out"
        self.models = [folder / name for name in FINE_TUNES[:count]]
        self.mergekit = mergekit

    def commands(self, method: str, kind: str = "") -> dict[str, list[str | Path]]:
        """Return the commands by which the programs run the recipe of a method, and that of the loop."""
        recipe = self.folder / f"{method}{kind}.yaml"
        return {
            LOOP: [sys.executable, __file__, "--loop", self.out, *self.models],
            OURS: [hf_rebasin(), "merge", recipe, "-o", self.out],
            **({MERGEKIT: [self.mergekit, recipe, self.out]} if self.mergekit else {}),
        }

    def measure(self, method: str, runs: int, *, is_random: bool) -> None:
        """Run a method by all programs in turns, and print a line for each of them."""
        measurements: dict[str, list[Measurement]] = {}
        failures: dict[str, str] = {}
        others = [name for name, fits in ((MERGEKIT, not is_random), (LOOP, method == "linear")) if fits]
        differences = ""
        for run in range(runs + 1):
            for program, command in self.commands(method, "" if run else "_float32").items():
                if program in failures:
                    continue
                try:
                    measurement = measure_process(command)
                except RuntimeError as error:
                    failures[program] = (str(error).splitlines() or ["without a message"])[-1]
                    measurements.pop(program, None)
                else:
                    if run:
                        measurements.setdefault(program, []).append(measurement)
                    elif program == OURS or program in others:
                        self.out.rename(self.folder / program)
                shutil.rmtree(self.out, ignore_errors=True)
            if not run:
                differences = self.compare(others)
        for program, own in measurements.items():
            wall, cpu, peak = (statistics.median(column) for column in zip(*own, strict=True))
            to_loop, to_mergekit = (median_ratio(own, measurements.get(other)) for other in (LOOP, MERGEKIT))
            line = f"  {method:16} {program:10} {wall:7.2f} {to_loop:>7} {to_mergekit:>11} {cpu:7.2f} {peak:8.2f}"
            print(f"{line}  {differences if program == OURS else ''}".rstrip(), flush=True)
        for program, failure in failures.items():
            print(f"  {method:16} {program:10} failed: {failure}", flush=True)

    def compare(self, others: Sequence[str]) -> str:
        """Describe how the first results differ, and remove them."""
        ours, differences = self.folder / OURS, list[str]()
        for other in others:
            if ours.exists() and (self.folder / other).exists():
                differing, far = json.loads(run_self("--differences", ours, self.folder / other))
                differences.append(f"{other}: {differing:,} ({far:,})")
        for program in (OURS, *others):
            shutil.rmtree(self.folder / program, ignore_errors=True)
        return ", ".join(differences)


def median_ratio(measurements: Sequence[Measurement], others: Sequence[Measurement] | None) -> str:
    """Return the median over the runs of the ratio of wall times; empty if there is nothing to compare with."""
    if not others:
        return ""
    return f"{statistics.median(a.wall / b.wall for a, b in zip(measurements, others, strict=True)):.2f}"


def measure_alignment(folder: Path) -> None:
    run_self("--make", "align", folder, "2")
    models = [folder / name for name in FINE_TUNES[:2]]
    command: list[str | Path] = [hf_rebasin(), "merge", *models, "-o", folder / "out"]
    wall, cpu, peak = measure_process(command)
    print(f"aligning and merging 1.1 billion parameters: {wall:.0f} s, processor {cpu:.0f} s, peak {peak:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="merge methods; by default all that need no data")
    parser.add_argument("--models", nargs="*", type=int, default=[2, 3], choices=range(2, 9), help="numbers of models")
    parser.add_argument("--sizes", nargs="*", default=["1"], choices=list(SHAPES)[:-1], help="GB per model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", metavar="COMMAND", help="path of its command mergekit-yaml")
    parser.add_argument("--align", action="store_true")
    parser.add_argument("--folder", type=Path, help="folder for temporary files, such as the models")
    for step in ("--make", "--recipes", "--loop", "--differences", "--split"):  # steps that load torch
        parser.add_argument(step, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        size, folder, count = arguments.make
        make_models(size, Path(folder), int(count))
    elif arguments.recipes:
        folder, count, *methods = arguments.recipes
        print(json.dumps(write_recipes(Path(folder), int(count), methods)))
    elif arguments.loop:
        out, *models = map(Path, arguments.loop)
        average_in_loop(out, models)
    elif arguments.differences:
        print(json.dumps(count_differences(*map(Path, arguments.differences))))
    elif arguments.split:
        out, *models = map(Path, arguments.split)
        print_time_split(out, models)
    else:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
                folder = Path(name)
                run_self("--make", size, folder, str(max(arguments.models)))
                for count in arguments.models:
                    benchmark = Benchmark(folder, count, arguments.mergekit)
                    words = (folder, str(count), *(arguments.methods or []))
                    print(f"{count} models of {size} GB, medians of {arguments.runs} runs")
                    print(f"{'':29} wall s  ÷ loop  ÷ mergekit   CPU s  peak GB  differing numbers (beyond a unit)")
                    for method, is_random in json.loads(run_self("--recipes", *words)).items():
                        benchmark.measure(method, arguments.runs, is_random=is_random)
                steps = json.loads(run_self("--split", folder / "out", *benchmark.models))
                print(
                    f"  of one average: {', '.join(f'{step} {seconds} s' for step, seconds in steps.items())}",
                    flush=True,
                )
        if arguments.align:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
                measure_alignment(Path(name))


if __name__ == "__main__":
    main()
