"""Align full-size models with a copy of themselves in other coordinates: is it recovered exactly, and how fast?

    python scripts/benchmarks/planted.py [bert vit gpt2 resnet llama …] [--unrelated] [--groups full]

Weights are random, with gains and biases far from 1 and 0; nothing is downloaded. Each model is made and moved in one
process, and aligned from disk in another, whose peak memory is printed. By default the copy is permuted, and has to be
recovered bit for bit (L1 = 0). With --groups full, random elements of its full groups are applied to it, and the
result is compared by ‖θ_A - ĝ θ_B‖ / ‖θ_A‖ ("distance") and by the loss barrier on the line to it. With --unrelated,
the two models are drawn from different seeds, to measure the time for a pair that has nothing in common.
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
    "tinyllama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=4096,
        ),
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=4096,
            tie_word_embeddings=True,
        ),
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=16, vocab_size=4096),
    ),
}
PERMUTED = ("bert", "vit", "gpt2", "resnet", "llama")


def make_models(kind: str, folder: Path, unrelated: bool, groups: str, layers: int | None) -> None:
    import torch
    import transformers

    from hf_rebasin import Alignment, spec_for

    cls, config, options = KINDS[kind]
    if layers is not None:
        options = options | {"n_layer" if kind == "gpt2" else "num_hidden_layers": layers}
    torch.manual_seed(0)
    model = perturb_vectors(getattr(transformers, cls)(getattr(transformers, config)(**options)))
    model.save_pretrained(folder / "fixed")
    if unrelated:
        torch.manual_seed(1)
        perturb_vectors(getattr(transformers, cls)(model.config)).save_pretrained(folder / "moving")
    else:
        spec = spec_for(folder / "fixed")
        spec = spec.restricted() if groups == "permutation" else spec
        alignment = Alignment.random(spec, torch.Generator().manual_seed(7))
        alignment.apply(folder / "fixed").save(folder / "moving")


def perturb_vectors(model):
    """Add noise to a model's vectors, as if it had been trained; return the model."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn_like(parameter)
            parameter.data += 0.2 * noise if name.endswith("weight") else 0.1 * noise
    return model


def loss_barrier(a, b) -> float:
    """Return the barrier of the loss on random inputs, over five points on the line from a to b."""
    import torch

    from hf_rebasin.evaluation.interpolation import interpolate
    from hf_rebasin.modules.forward import example_inputs

    inputs = example_inputs(a.config, torch.Generator().manual_seed(0))
    labels = (
        inputs["input_ids"] if "input_ids" in inputs else torch.zeros(len(inputs["pixel_values"]), dtype=torch.int64)
    )
    return interpolate(a, b, [{**inputs, "labels": labels}], points=5).barrier


def measure(folder: Path, groups: str) -> None:
    import torch

    from hf_rebasin import Checkpoint, align

    torch.set_num_threads(2)
    start = time.perf_counter()
    fixed, moving = Checkpoint.open(folder / "fixed"), Checkpoint.open(folder / "moving")
    solution = align(fixed, moving, seed=0, groups=groups)
    total = time.perf_counter() - start
    start = time.perf_counter()
    moved = solution.apply(moving).save(folder / "moved")
    apply = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    moved = Checkpoint.open(moved)
    l1 = square = size = 0.0
    for key, tensor in fixed.tensors.items():
        difference = moved.tensors[key].double() - tensor.double()
        l1 += difference.abs().sum().item()
        square += difference.square().sum().item()
        size += tensor.double().square().sum().item()
    print(
        json.dumps(
            {
                "align s": round(total, 1),
                **{f"{step} s": round(seconds, 1) for step, seconds in solution.seconds.items()},
                "apply and save s": round(apply, 1),
                "peak GB": round(peak / 2**20, 2),
                "L1": l1,
                **(
                    {"distance": (square / size) ** 0.5, "barrier": loss_barrier(fixed, moved)}
                    if groups == "full"
                    else {}
                ),
                "status": solution.status.name,
                "sweeps": len(solution.history) - 1,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=PERMUTED, help=f"of {', '.join(KINDS)}")
    parser.add_argument("--unrelated", action="store_true")
    parser.add_argument("--layers", type=int, help="number of layers, instead of as many as the model has")
    parser.add_argument("--groups", choices=("permutation", "full"), default="permutation")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_models(arguments.kinds[0], arguments.make, arguments.unrelated, arguments.groups, arguments.layers)
        return
    if arguments.measure:
        measure(arguments.measure, arguments.groups)
        return
    for kind in arguments.kinds:
        # a process each, with a small parent: a child's peak memory starts at that of its parent
        with tempfile.TemporaryDirectory() as folder:
            layers = [] if arguments.layers is None else ["--layers", str(arguments.layers)]
            flags = ["--groups", arguments.groups, *layers, *(["--unrelated"] if arguments.unrelated else [])]
            subprocess.run([sys.executable, __file__, kind, "--make", folder, *flags], check=True, capture_output=True)
            command = [sys.executable, __file__, "--measure", folder, "--groups", arguments.groups]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        print(f"{kind:7}", "  ".join(f"{k} {v}" for k, v in result.items()), flush=True)


if __name__ == "__main__":
    main()
