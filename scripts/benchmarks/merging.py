"""Merging two Llamas in bfloat16 from disk to disk, as whole processes: seconds and peak memory.

    python scripts/benchmarks/merging.py [--sizes 1 4] [--runs 5] [--mergekit COMMAND] [--align] [--folder DIR]

Weights are random, nothing is downloaded. For every size (GB a model, in shards of 500 MB) the commands take turns, so
that what else the machine does falls on all of them: copying one model, a loop over safetensors files that does
nothing but average, this package, and mergekit where COMMAND (its mergekit-yaml) is given. Medians of all runs, and
the ratio to the loop. The averages are compared, number by number. --align merges two models of 1.1 billion parameters
after aligning them; that takes some minutes.
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


def make(size: str, folder: Path) -> None:
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


def loop(a: Path, b: Path, out: Path) -> None:
    """What one writes oneself: files of the same name, averaged one after the other."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir()
    for file in sorted(a.glob("*.safetensors")):
        with safe_open(file, "pt") as x, safe_open(b / file.name, "pt") as y:
            merged = {
                key: ((x.get_tensor(key).float() + y.get_tensor(key).float()) / 2).bfloat16()
                for key in x.keys()  # noqa: SIM118 (no mapping)
            }
            save_file(merged, out / file.name, metadata={"format": "pt"})


def split(a: Path, b: Path, out: Path) -> None:
    """Where the time of this package goes."""
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


def same(one: Path, other: Path) -> bool:
    import torch

    from hf_rebasin import Checkpoint
    from hf_rebasin.checkpoints.lazy import Tensors
    from hf_rebasin.checkpoints.tensor_files import read_file

    a = Tensors({key: part for file in one.glob("*.safetensors") for key, part in read_file(file).items()})
    b = Checkpoint.open(other).tensors
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def measured(command: Sequence[str]) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak GB) of one process."""
    start = time.perf_counter()
    # nothing large is loaded here: a child's peak begins at that of its parent
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read().decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def commands(folder: Path, mergekit: str | None) -> Mapping[str, list[str]]:
    a, b, out = (str(folder / name) for name in ("a", "b", "out"))
    ours = [str(Path(sys.executable).parent / "hf-rebasin"), "merge", a, b, "--no-align", "-o", out]
    found = {
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
        (folder / f"{method}.yaml").write_text(json.dumps(recipe))
        found[f"mergekit {method}"] = [str(mergekit), str(folder / f"{method}.yaml"), out]
    return found


def table(size: str, folder: Path, runs: int, mergekit: str | None) -> None:
    subprocess.run([sys.executable, __file__, "--make", size, str(folder)], check=True, capture_output=True)
    found = commands(folder, mergekit)
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
    for run in range(runs + 1):
        for name, command in found.items():
            result = measured(command)
            if run:  # the first is for the file cache
                results[name].append(result)
            if not run and name in ("a bare loop", "hf-rebasin linear"):
                (folder / "out").rename(folder / name.split()[-1])
            shutil.rmtree(folder / "out", ignore_errors=True)
    print(f"{size} GB a model, median of {runs} runs      wall s  ÷ loop  processor s  peak GB")
    reference = statistics.median(wall for wall, _, _ in results["a bare loop"])
    for name, those in results.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*those, strict=True))
        print(f"  {name:36} {wall:8.2f} {wall / reference:7.2f} {cpu:12.2f} {peak:8.2f}")
    command = [sys.executable, __file__, "--same", str(folder / "loop"), str(folder / "linear")]
    equal = subprocess.run(command, check=False).returncode == 0
    print(f"  the averages of the loop and of hf-rebasin are {'equal' if equal else 'DIFFERENT'}, number by number")
    command = [sys.executable, __file__, "--split", str(folder / "a"), str(folder / "b"), str(folder / "out")]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"  of one run: {', '.join(f'{what} {seconds} s' for what, seconds in said.items())}", flush=True)


def align(folder: Path) -> None:
    subprocess.run([sys.executable, __file__, "--make", "align", str(folder)], check=True, capture_output=True)
    command = [str(Path(sys.executable).parent / "hf-rebasin"), "merge", *(str(folder / name) for name in "ab")]
    wall, cpu, peak = measured([*command, "-o", str(folder / "out")])
    print(f"aligning and merging 1.1 billion parameters: {wall:.0f} s, processor {cpu:.0f} s, peak {peak:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["1"], choices=list(SHAPES)[:-1], help="GB a model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit", help="its command mergekit-yaml")
    parser.add_argument("--align", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models are made; by default a temporary folder")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--loop", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--same", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--split", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make[0], Path(arguments.make[1]))
    elif arguments.loop:
        loop(*arguments.loop)
    elif arguments.same:
        sys.exit(not same(*arguments.same))
    elif arguments.split:
        split(*arguments.split)
    else:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                table(size, Path(folder), arguments.runs, arguments.mergekit)
        if arguments.align:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                align(Path(folder))


if __name__ == "__main__":
    main()
