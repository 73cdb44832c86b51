"""What looks at data, as whole processes: seconds and peak memory, for more and more batches.

    python scripts/benchmarks/running_statistics.py [--batches 16 64 256] [--width 128] [--layers 3] [--what NAME ...]

Activation statistics, refit and REPAIR of two GPT-2s of random weights, 64 tokens a batch; BatchNorm statistics of a
ResNet, in one pass and exact, with 8 images of 32 × 32 a batch. Peak memory is what a process takes above what it had
when its models were loaded; it must not hang on how many batches there are. Batches are made when they are asked for.
The whole takes three minutes on one thread; `--width 768 --layers 12` is GPT-2 small, and takes hours at 256 batches.
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

WHAT = ("activation statistics", "refit", "REPAIR", "BatchNorm, one pass", "BatchNorm, exact")


def text_models(width: int, layers: int) -> list[Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=width, n_layer=layers, n_head=width // 64, n_positions=64, vocab_size=8192)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval())
    return models


def image_model() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = dict(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic")
    return ResNetForImageClassification(ResNetConfig(**sizes)).eval()


class Batches:
    """So many of them, made when they are asked for."""

    def __init__(self, count: int, make: Callable[[Any], dict[str, Any]]):
        self.count, self.make = count, make

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        for seed in range(self.count):
            yield self.make(torch.Generator().manual_seed(seed))


def tokens(generator: Any) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.randint(8192, (1, 64), generator=generator)}


def images(generator: Any) -> dict[str, Any]:
    import torch

    return {"pixel_values": torch.randn(8, 3, 32, 32, generator=generator)}


def prepared(what: str, width: int, layers: int) -> Callable[[int], Any]:
    """The operation on so many batches, its models loaded."""
    from hf_rebasin import Checkpoint, spec_for
    from hf_rebasin.merging.merge import combine
    from hf_rebasin.merging.methods import refit
    from hf_rebasin.merging.recalibration import recalibrate, repair
    from hf_rebasin.solving.activations import collect

    if what.startswith("BatchNorm"):
        model = image_model()
        return lambda count: recalibrate(model, Batches(count, images), exact=what.endswith("exact"))
    models = text_models(width, layers)
    checkpoints = [Checkpoint.open(model) for model in models]
    if what == "activation statistics":
        spec = spec_for(models[0]).restricted()
        module, names = checkpoints[0].computing(spec.table.prefix)
        states = [checkpoint.state(spec.table.prefix) for checkpoint in checkpoints]
        return lambda count: collect(spec, module, names, states, Batches(count, tokens))
    average = combine(checkpoints, "linear")
    finish = refit.finish if what == "refit" else repair
    return lambda count: finish(average, checkpoints, Batches(count, tokens))


def peak() -> float:
    """MB, of this process up to now."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def cell(what: str, count: int, width: int, layers: int) -> None:
    import torch

    torch.set_num_threads(1)
    do = prepared(what, width, layers)
    loaded, start = peak(), time.perf_counter()
    do(count)
    print(json.dumps({"seconds": time.perf_counter() - start, "loaded": loaded, "above": peak() - loaded}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--width", type=int, default=128, help="of the GPT-2s, in heads of 64")
    parser.add_argument("--layers", type=int, default=3, help="of the GPT-2s")
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        cell(arguments.cell[0], int(arguments.cell[1]), arguments.width, arguments.layers)
        return
    print(f"{'':24}" + "".join(f"{count:>12} batches" for count in arguments.batches))
    for what in arguments.what:
        found = []
        for count in arguments.batches:
            sizes = ["--width", str(arguments.width), "--layers", str(arguments.layers)]
            command = [sys.executable, __file__, "--cell", what, str(count), *sizes]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
        cells = "".join(f"{one['seconds']:>9.1f} s {one['above']:>6.0f} MB" for one in found)
        print(f"{what:24}{cells}", flush=True)


if __name__ == "__main__":
    main()
