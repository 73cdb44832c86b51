"""Full-size models against a copy of themselves in other coordinates: is the copy brought back exactly, and how fast?

    python scripts/benchmark_planted.py [bert vit gpt2 resnet llama] [--unrelated]

Weights are random, nothing is downloaded. Every model is made and moved in one process and aligned from disk in
another, whose peak memory is printed. With --unrelated the two models are drawn from different seeds: the time a pair
takes that has nothing in common.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = {
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    "vit": ("ViTForImageClassification", "ViTConfig", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {}),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=4096,
        ),
    ),
}


def make(kind: str, folder: Path, unrelated: bool) -> None:
    import torch
    import transformers

    from hf_rebasin import Alignment, spec_for

    cls, config, options = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    model.save_pretrained(folder / "fixed")
    if unrelated:
        torch.manual_seed(1)
        getattr(transformers, cls)(model.config).save_pretrained(folder / "moving")
    else:
        alignment = Alignment.random(spec_for(folder / "fixed"), torch.Generator().manual_seed(7))
        alignment.apply(model).save_pretrained(folder / "moving")


def measure(folder: Path) -> None:
    from hf_rebasin import Checkpoint, align

    start = time.perf_counter()
    fixed, moving = Checkpoint.open(folder / "fixed"), Checkpoint.open(folder / "moving")
    solution = align(fixed, moving, seed=0)
    total = time.perf_counter() - start
    start = time.perf_counter()
    moved = solution.apply(moving).save(folder / "moved")
    apply = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    moved = Checkpoint.open(moved)
    l1 = sum((moved.tensors[k].double() - t.double()).abs().sum().item() for k, t in fixed.tensors.items())
    print(
        json.dumps(
            {
                "align s": round(total, 1),
                **{f"{what} s": round(seconds, 1) for what, seconds in solution.seconds.items()},
                "apply and save s": round(apply, 1),
                "peak GB": round(peak / 2**20, 2),
                "L1": l1,
                "status": solution.status.name,
                "sweeps": len(solution.history) - 1,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--unrelated", action="store_true")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.kinds[0], arguments.make, arguments.unrelated)
        return
    if arguments.measure:
        measure(arguments.measure)
        return
    for kind in arguments.kinds:
        # one process each, and none of them under a parent that is large itself: a child's peak begins at its parent's
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--unrelated"] if arguments.unrelated else []
            subprocess.run([sys.executable, __file__, kind, "--make", folder, *flags], check=True, capture_output=True)
            command = [sys.executable, __file__, "--measure", folder]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        said = json.loads(out.splitlines()[-1])
        print(f"{kind:7}", "  ".join(f"{k} {v}" for k, v in said.items()), flush=True)


if __name__ == "__main__":
    main()
