"""Measure the time and peak memory of operations on data, for more and more batches, each in a process of its own.

    python scripts/benchmarks/running_statistics.py [--batches 16 64 256] [--width 128] [--layers 3] [--what NAME ...]

The operations are activation statistics, refit and REPAIR of two GPT-2s with random weights, at 64 tokens per batch;
and BatchNorm statistics of a ResNet, in one pass and exact, with 8 images of 32 × 32 per batch. Peak memory is what a
process takes beyond its loaded models; it must not depend on the number of batches. Batches are made on demand. All of
it takes three minutes on one thread; `--width 768 --layers 12` is GPT-2 small, and takes hours at 256 batches.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

OPERATIONS = ("activation statistics", "refit", "REPAIR", "BatchNorm, one pass", "BatchNorm, exact")


def make_text_models(width: int, layers: int) -> list[Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=width, n_layer=layers, n_head=width // 64, n_positions=64, vocab_size=8192)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval())
    return models


def make_image_model() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = dict(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic")
    return ResNetForImageClassification(ResNetConfig(**sizes)).eval()


class Batches:
    """A number of batches, made on demand."""

    def __init__(self, count: int, make: Callable[[Any], dict[str, Any]]):
        self.count, self.make = count, make

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        for seed in range(self.count):
            yield self.make(torch.Generator().manual_seed(seed))


def make_tokens(generator: Any) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.randint(8192, (1, 64), generator=generator)}


def make_images(generator: Any) -> dict[str, Any]:
    import torch

    return {"pixel_values": torch.randn(8, 3, 32, 32, generator=generator)}


def prepare(operation: str, width: int, layers: int) -> Callable[[int], Any]:
    """Load the models of an operation; return it as a function of the number of batches."""
    from hf_rebasin import Checkpoint, spec_for
    from hf_rebasin.merging.merge import combine
    from hf_rebasin.merging.methods import refit
    from hf_rebasin.merging.recalibration import recalibrate, repair
    from hf_rebasin.solving.activations import collect_statistics
    from hf_rebasin.symmetries.table import canonical_view

    if operation.startswith("BatchNorm"):
        model = make_image_model()
        return lambda count: recalibrate(model, Batches(count, make_images), exact=operation.endswith("exact"))
    models = make_text_models(width, layers)
    checkpoints = [Checkpoint.open(model) for model in models]
    if operation == "activation statistics":
        spec = spec_for(models[0]).restricted()
        module, names = canonical_view(checkpoints[0], spec.table).module()
        states = [checkpoint.state(spec.table.prefix) for checkpoint in checkpoints]
        return lambda count: collect_statistics(spec, module, names, states, Batches(count, make_tokens))
    average = combine(checkpoints, "linear")
    finish = refit.finish if operation == "refit" else repair
    return lambda count: finish(average, checkpoints, Batches(count, make_tokens))


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_cell(operation: str, count: int, width: int, layers: int) -> None:
    import torch

    torch.set_num_threads(1)
    run = prepare(operation, width, layers)
    loaded, start = peak_memory(), time.perf_counter()
    run(count)
    print(json.dumps({"seconds": time.perf_counter() - start, "loaded": loaded, "above": peak_memory() - loaded}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--width", type=int, default=128, help="width of the GPT-2s, in heads of 64")
    parser.add_argument("--layers", type=int, default=3, help="layers of the GPT-2s")
    parser.add_argument("--what", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        measure_cell(arguments.cell[0], int(arguments.cell[1]), arguments.width, arguments.layers)
        return
    print(f"{'':24}" + "".join(f"{count:>12} batches" for count in arguments.batches))
    for operation in arguments.what:
        results = []
        for count in arguments.batches:
            sizes = ["--width", str(arguments.width), "--layers", str(arguments.layers)]
            command = [sys.executable, __file__, "--cell", operation, str(count), *sizes]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
        cells = "".join(f"{result['seconds']:>9.1f} s {result['above']:>6.0f} MB" for result in results)
        print(f"{operation:24}{cells}", flush=True)


if __name__ == "__main__":
    main()
