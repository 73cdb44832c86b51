"""Merge small made-up models with the command line, and print the SHA-256 of every file that it writes.

    python tests/helpers/outputs.py FOLDER [NAME ...]

Run it before and after a change that should not affect the results, and compare what it prints. The values of the
models are whole numbers divided by 256, so the inputs are the same bytes on every machine.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

LABELS = {"id2label": {i: str(i) for i in range(4)}, "label2id": {str(i): i for i in range(4)}}
TEXT = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 1}
CONFIGS = {
    "vit": transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=24,
        architectures=["ViTForImageClassification"],
        **LABELS,
    ),
    "resnet": transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        architectures=["ResNetForImageClassification"],
        **LABELS,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=16,
        n_head=2,
        n_layer=2,
        n_positions=16,
        architectures=["GPT2LMHeadModel"],
        **TEXT,
    ),
    "mixtral": transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        architectures=["MixtralForCausalLM"],
        **TEXT,
    ),
}
IMAGE_KINDS = ("vit", "resnet")
MODELS = {"vit": 3, "resnet": 2, "gpt2": 2, "mixtral": 2}  # how many of each kind
REPOSITORY = "org/outputs"
COMMANDS = {  # OUT is the name of the output
    "linear": "merge vit-0 vit-1 vit-2 --no-align -p weights=[1,2,3] -o OUT",
    "slerp": "merge vit-0 vit-1 --no-align --method slerp -p t=0.3 -o OUT",
    "aligned": "merge vit-0 vit-1 -o OUT",
    "permuted": "merge resnet-0 resnet-1 --groups permutation -o OUT",
    "refit": "merge vit-0 vit-1 -o OUT --data digits -d split=train --refit",
    "recalibrated": "merge resnet-0 resnet-1 -o OUT --data digits -d split=train -e split=test -e points=3",
    "sharded": "merge gpt2-0 gpt2-1 -o OUT --max-shard-size 9KB --dtype bfloat16",
    "experts": "merge mixtral-0 mixtral-1 -o OUT",
    "tied": "merge gpt2-0 gpt2-1 --keep-tied -o OUT",
    "alignment": "align vit-0 vit-1 -o OUT --alignment OUT.safetensors",
    "published": f"merge vit-0 vit-1 -o OUT --push-to {REPOSITORY} --license mit",
}


@torch.no_grad()
def make_model(kind, seed):
    """Return a model whose values are whole numbers divided by 256, from a linear congruential generator."""
    config = CONFIGS[kind]
    model = getattr(transformers, config.architectures[0])(config).eval()
    state = seed * 7919 + 12345
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        values = []
        for _ in range(tensor.numel()):
            state = (state * 1103515245 + 12345) % (1 << 31)
            values.append((state >> 8) % 257 - 128)
        drawn = torch.tensor(values, dtype=torch.float32).reshape(tensor.shape) / 256
        is_scale = tensor.dim() == 1 and not name.endswith("bias")  # of a norm, or a running statistic
        tensor.copy_(drawn.abs() + 0.5 if is_scale else drawn)
    return model


def make_inputs(folder, kinds=tuple(MODELS)):
    """Write the models of some kinds, with image processors, and the images that the commands read."""
    for kind in kinds:
        for seed in range(MODELS[kind]):
            make_model(kind, seed).save_pretrained(folder / f"{kind}-{seed}")
            if kind in IMAGE_KINDS:
                processor = transformers.ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5])
                processor.save_pretrained(folder / f"{kind}-{seed}")
    for split, count in (("train", 24), ("test", 16)):
        for k in range(count):
            values = torch.tensor([(k * 37 + i * 11 + (i * i) % 7) % 256 for i in range(64)], dtype=torch.uint8)
            class_folder = folder / "digits" / split / str(k % 4)
            class_folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.reshape(8, 8).numpy()).save(class_folder / f"{k}.png")


def write_output(folder, name, command):
    """Run a command in a folder of inputs; return {output/file: SHA-256} of the files it writes."""
    arguments = [word.replace("OUT", name) for word in command.split()]
    process = subprocess.run(
        [sys.executable, "-m", "hf_rebasin", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {process.stdout}{process.stderr}")
    files = sorted(file for file in (folder / name).rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in [*files, *folder.glob(f"{name}.safetensors")]
    }


def main():
    from minihub import MiniHub

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}; by default all")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - COMMANDS.keys():
        parser.error(f"unknown outputs: {', '.join(sorted(unknown))}")
    folder, hub = arguments.folder, MiniHub().start()
    folder.mkdir(parents=True)
    os.environ.update(
        HF_ENDPOINT=hub.url,
        HF_TOKEN=hub.token,
        HF_HOME=str(folder.resolve() / "cache"),
        HF_HUB_DISABLE_XET="1",
        OMP_NUM_THREADS="1",
        DISABLE_SAFETENSORS_CONVERSION="1",
    )
    make_inputs(folder)
    for name in arguments.names or COMMANDS:
        digests = write_output(folder, name, COMMANDS[name])
        if name == "published":
            for file in hub.repo(REPOSITORY).files("main")[1]:
                digests[f"hub/{file}"] = hashlib.sha256(hub.content(REPOSITORY, file, "main")).hexdigest()
        for file, digest in digests.items():
            print(digest, file)


if __name__ == "__main__":
    main()
