"""Ten merges of small made-up models, by the command line, and the SHA-256 of every file that they write.

    python tests/helpers/outputs.py FOLDER [NAME ...]

What is written must not depend on how the code is arranged: run this before and after a change, and compare what it
prints. The models are made from whole numbers, so that they are the same bytes on every machine.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

LABELS = {"id2label": {i: str(i) for i in range(4)}, "label2id": {str(i): i for i in range(4)}}
TEXT = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 1}
CONFIGS = {
    "vit": transformers.ViTConfig(
        **{"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_attention_heads": 2},
        **{"num_hidden_layers": 2, "intermediate_size": 24, "architectures": ["ViTForImageClassification"]},
        **LABELS,
    ),
    "resnet": transformers.ResNetConfig(
        **{"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
        **{"architectures": ["ResNetForImageClassification"]},
        **LABELS,
    ),
    "gpt2": transformers.GPT2Config(
        **{"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 16, "architectures": ["GPT2LMHeadModel"]},
        **TEXT,
    ),
    "mixtral": transformers.MixtralConfig(
        **{"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
        **{"architectures": ["MixtralForCausalLM"]},
        **TEXT,
    ),
}
OUTPUTS = {
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
    "published": "merge vit-0 vit-1 -o OUT --push-to org/outputs --license mit",
}


@torch.no_grad()
def make_model(kind, seed):
    """A model whose every value is a small whole number times a power of two, drawn by a generator of whole numbers."""
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
        tensor.copy_(drawn.abs() + 0.5 if tensor.dim() == 1 and not name.endswith("bias") else drawn)
    return model


def make_inputs(folder):
    """The models and images that the merges read."""
    from PIL import Image

    for kind in CONFIGS:
        for seed in range(3 if kind == "vit" else 2):
            make_model(kind, seed).save_pretrained(folder / f"{kind}-{seed}")
            if kind in ("vit", "resnet"):
                transformers.ViTImageProcessorPil(
                    do_resize=False, image_mean=[0.5], image_std=[0.5]
                ).save_pretrained(folder / f"{kind}-{seed}")
    for split, rows in (("train", 24), ("test", 16)):
        for row in range(rows):
            values = torch.tensor([(row * 37 + i * 11 + (i * i) % 7) % 256 for i in range(64)], dtype=torch.uint8)
            place = folder / "digits" / split / str(row % 4)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.reshape(8, 8).numpy()).save(place / f"{row}.png")


def write_outputs(folder, names=tuple(OUTPUTS), hub=None):
    """{output/file: SHA-256} of what the command line writes for each of the names."""
    sums = {}
    for name in names:
        words = [word.replace("OUT", name) for word in OUTPUTS[name].split()]
        done = subprocess.run([sys.executable, "-m", "hf_rebasin", *words], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        files = sorted(file for file in (folder / name).rglob("*") if file.is_file())
        for file in [*files, *folder.glob(f"{name}.safetensors")]:
            sums[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
        if name == "published":
            for file in hub.repo("org/outputs").files("main")[1]:
                sums[f"hub/{file}"] = hashlib.sha256(hub.content("org/outputs", file, "main")).hexdigest()
    return sums


if __name__ == "__main__":
    from minihub import MiniHub

    hub = MiniHub().start()
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HOME=str(target / "cache"), HF_HUB_DISABLE_XET="1",
                      OMP_NUM_THREADS="1", DISABLE_SAFETENSORS_CONVERSION="1")
    make_inputs(target)
    for file, digest in write_outputs(target, sys.argv[2:] or tuple(OUTPUTS), hub).items():
        print(digest, file)
