"""Measure the time it takes to infer the symmetries of large models, without their weights.

    OMP_NUM_THREADS=1 python scripts/benchmarks/inference.py [NAME ...]

Each model is built from its configuration alone, on the meta device. The first run is not counted, as it imports
modules lazily. The baseline is the same forward pass on the same shapes without tracing.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
import transformers as hf

from hf_rebasin import infer_spec
from hf_rebasin.modules.forward import example_inputs, run_module

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "bert-base": lambda: hf.BertForMaskedLM(hf.BertConfig()),
    "vit-base": lambda: hf.ViTForImageClassification(hf.ViTConfig()),
    "resnet-50": lambda: hf.ResNetForImageClassification(hf.ResNetConfig()),
    "t5-base": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    ),
    "llama-70b": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        )
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(MODELS))
    names = parser.parse_args().names or list(MODELS)
    for i, name in enumerate([names[0], *names]):
        with torch.device("meta"):
            model = MODELS[name]().eval()
        inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
        on_meta = {k: (x.float() if x.is_floating_point() else x).to("meta") for k, x in inputs.items()}
        start = time.perf_counter()
        with torch.no_grad():
            run_module(model, on_meta)
        forward = time.perf_counter() - start
        start = time.perf_counter()
        spec = infer_spec(model)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if i:
            print(
                f"{name:10}  {seconds:5.2f} s, {seconds / forward:4.1f} × the forward pass on shapes; {spec}; peak "
                f"{peak:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
