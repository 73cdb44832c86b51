"""Measure the time and peak memory of merging two bfloat16 Llamas from disk to disk, in processes of their own.

    python scripts/benchmarks/merging.py [--sizes 1 4] [--runs 5] [--mergekit COMMAND] [--align] [--folder DIR]

Weights are random, nothing is downloaded. For every size (GB per model, in shards of 500 MB) the commands take turns,
so that other load on the machine affects all of them: copying one model, a bare loop that averages safetensors files,
this package, and mergekit if COMMAND (its mergekit-yaml) is given. Prints medians over all runs, and the ratio to the
loop. The averages of the loop and of this package are compared, number by number. --align also measures aligning and
merging two models of 1.1 billion parameters, which takes some minutes.
"""

from __future__ import annotations

import argparse
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

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
SHAPES = {
    "0.1": (512, 1376, 6, 8, 4),
    "1": (1536, 4096, 16, 12, 4),
    "4": (2560, 8192, 24, 20, 4),
    "align": (2048, 5632, 22, 32, 4),
}


def make_models(size: str, folder: Path) -> None:
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
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
        model.save_pretrained(folder / name, max_shard_size="500MB")


def average_in_loop(a: Path, b: Path, out: Path) -> None:
    """Average files of the same name one after the other, as a bare script would."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir()
    for file in sorted(a.glob("*.safetensors")):
        with safe_open(file, "pt") as x, safe_open(b / file.name, "pt") as y:
            merged = {
                key: ((x.get_tensor(key).float() + y.get_tensor(key).float()) / 2).bfloat16()
                for key in x.keys()  # noqa: SIM118 (not a mapping)
            }
            save_file(merged, out / file.name, metadata={"format": "pt"})


def print_time_split(a: Path, b: Path, out: Path) -> None:
    """Print, as JSON, how the time of a merge by this package divides into steps."""
    start = time.perf_counter()
    import torch  # noqa: F401

    torched = time.perf_counter()
    from hf_rebasin import merge

    imported = time.perf_counter()
    merged = merge([a, b])
    opened = time.perf_counter()
    merged.save(out)
    done = time.perf_counter()
    steps = {"torch": torched - start, "package": imported - torched, "opening": opened - imported}
    print(json.dumps({k: round(v, 2) for k, v in (steps | {"reading, merging, writing": done - opened}).items()}))


def have_equal_tensors(first: Path, second: Path) -> bool:
    import torch

    from hf_rebasin import Checkpoint
    from hf_rebasin.checkpoints.lazy import Tensors
    from hf_rebasin.checkpoints.tensor_files import read_file

    a = Tensors({key: part for file in first.glob("*.safetensors") for key, part in read_file(file).items()})
    b = Checkpoint.open(second).tensors
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def measure_process(command: Sequence[str]) -> tuple[float, float, float]:
    """Run a command; return (wall seconds, processor seconds, peak GB) of its process."""
    start = time.perf_counter()
    # load nothing large here: a child's peak starts at that of its parent
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read().decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def make_commands(folder: Path, mergekit: str | None) -> Mapping[str, list[str]]:
    a, b, out = (str(folder / name) for name in ("a", "b", "out"))
    ours = [str(Path(sys.executable).parent / "hf-rebasin"), "merge", a, b, "--no-align", "-o", out]
    named = {
        "copying one model": ["cp", "-r", a, out],
        "a bare loop": [sys.executable, __file__, "--loop", a, b, out],
        "hf-rebasin linear": ours,
        "hf-rebasin slerp": [*ours, "--method", "slerp"],
    }
    for method in ("linear", "slerp") if mergekit else ():
        models = [{"model": model, "parameters": {"weight": 0.5}} for model in (a, b)]
        recipe: dict[str, object] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
        if method == "slerp":
            recipe |= {"base_model": a, "parameters": {"t": 0.5}}
        (folder / f"{method}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        named[f"mergekit {method}"] = [str(mergekit), str(folder / f"{method}.yaml"), out]
    return named


def print_table(size: str, folder: Path, runs: int, mergekit: str | None) -> None:
    subprocess.run([sys.executable, __file__, "--make", size, str(folder)], check=True, capture_output=True)
    named = make_commands(folder, mergekit)
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in named}
    for run in range(runs + 1):
        for name, command in named.items():
            result = measure_process(command)
            if run:  # the first run only fills the file cache
                results[name].append(result)
            if not run and name in ("a bare loop", "hf-rebasin linear"):
                (folder / "out").rename(folder / name.split()[-1])
            shutil.rmtree(folder / "out", ignore_errors=True)
    print(f"{size} GB per model, median of {runs} runs      wall s  ÷ loop  processor s  peak GB")
    reference = statistics.median(wall for wall, _, _ in results["a bare loop"])
    for name, measurements in results.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*measurements, strict=True))
        print(f"  {name:36} {wall:8.2f} {wall / reference:7.2f} {cpu:12.2f} {peak:8.2f}")
    command = [sys.executable, __file__, "--same", str(folder / "loop"), str(folder / "linear")]
    equal = subprocess.run(command, check=False).returncode == 0
    print(f"  the averages of the loop and of hf-rebasin are {'equal' if equal else 'DIFFERENT'}, number by number")
    command = [sys.executable, __file__, "--split", str(folder / "a"), str(folder / "b"), str(folder / "out")]
    steps = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"  of one run: {', '.join(f'{step} {seconds} s' for step, seconds in steps.items())}", flush=True)


def measure_alignment(folder: Path) -> None:
    subprocess.run([sys.executable, __file__, "--make", "align", str(folder)], check=True, capture_output=True)
    command = [str(Path(sys.executable).parent / "hf-rebasin"), "merge", *(str(folder / name) for name in "ab")]
    wall, cpu, peak = measure_process([*command, "-o", str(folder / "out")])
    print(f"aligning and merging 1.1 billion parameters: {wall:.0f} s, processor {cpu:.0f} s, peak {peak:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["1"], choices=list(SHAPES)[:-1], help="GB per model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit", help="path of its command mergekit-yaml")
    parser.add_argument("--align", action="store_true")
    parser.add_argument("--folder", type=Path, help="folder for temporary files, such as the models")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--loop", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--same", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--split", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_models(arguments.make[0], Path(arguments.make[1]))
    elif arguments.loop:
        average_in_loop(*arguments.loop)
    elif arguments.same:
        sys.exit(not have_equal_tensors(*arguments.same))
    elif arguments.split:
        print_time_split(*arguments.split)
    else:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                print_table(size, Path(folder), arguments.runs, arguments.mergekit)
        if arguments.align:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                measure_alignment(Path(folder))


if __name__ == "__main__":
    main()
