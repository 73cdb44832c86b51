"""Train the test bed: small models from different seeds, for measuring barriers.

    python scripts/benchmarks/testbed.py KIND SEED OUT

KIND is mlp64, mlp512, resnet or vit (scikit-learn's digits), or gpt2, llama or bert (bytes of the standard library's
Python files, so the data depend on the version of Python). Writes OUT/ (by save_pretrained; for the MLPs,
model.safetensors) and prints loss and accuracy on the test data. On one thread, gpt2, llama and bert take 3 to 5
minutes, vit takes 1, the others seconds.

Seeds and settings are frozen, not tuned, so that results of different days and methods can be compared. A model that
misses the requirements of its kind (`is_trained`) says little about merging.
"""

from __future__ import annotations

import glob
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
CONTEXT, BATCH = 64, 32
STEPS = dict(mlp64=2000, mlp512=2000, resnet=1500, vit=2000, gpt2=3000, llama=3000, bert=6000)
LEAST_ACCURACY = dict(mlp64=0.96, mlp512=0.96, resnet=0.97, vit=0.96)
HIGHEST_LOSS = dict(gpt2=1.75, llama=1.75, bert=2.0)
Batch = dict[str, Tensor]


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (training, test) sets of (images, labels): 1297 and 500 images of 8 × 8 pixels in [-1, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1234))
    return (x[order[:1297]], y[order[:1297]]), (x[order[1297:]], y[order[1297:]])


@cache
def text() -> tuple[Tensor, Tensor]:
    """Return (training bytes, test bytes); every tenth file of the standard library is test data."""
    files = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))

    def read(chosen: list[str]) -> Tensor:
        content = b"".join(Path(file).read_bytes() for file in chosen)
        return torch.tensor(np.minimum(np.frombuffer(content, np.uint8), 127).astype(np.int64))

    return read([f for i, f in enumerate(files) if i % 10]), read([f for i, f in enumerate(files) if i % 10 == 0])


def mask_tokens(ids: Tensor, generator: torch.Generator | None) -> Batch:
    """Replace 15 % of the bytes by the mask id 128, and make these the labels."""
    chosen = torch.rand(ids.shape, generator=generator) < 0.15
    return dict(input_ids=ids.masked_fill(chosen, 128), labels=ids.masked_fill(~chosen, -100))


def make_batches(
    kind: str, split: str, generator: torch.Generator | None = None, count: int | None = None
) -> Iterator[Batch]:
    """Yield keyword arguments of the model: fixed batches for "test", endless draws of `generator` for "train"."""
    if kind in ("gpt2", "llama", "bert"):
        data = text()[split == "test"]
        g = torch.Generator().manual_seed(7) if split == "test" else generator
        for _ in range(count or 8) if split == "test" else iter(int, 1):
            start = torch.randint(len(data) - CONTEXT, (BATCH,), generator=g)
            ids = torch.stack([data[s : s + CONTEXT] for s in start])
            yield mask_tokens(ids, g) if kind == "bert" else dict(input_ids=ids, labels=ids)
    else:
        x, y = digits()[split == "test"]
        if split == "test":
            yield dict(pixel_values=x, labels=y)
        while split == "train":
            i = torch.randint(len(x), (64,), generator=generator)
            yield dict(pixel_values=x[i] + 0.1 * torch.randn(x[i].shape, generator=generator), labels=y[i])


class MLP(nn.Module):
    """Two hidden layers on 8 × 8 images."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(pixel_values)
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def build(kind: str) -> Any:
    """Return a model of one kind, its weights drawn from torch's global generator."""
    import transformers as hf

    word = dict(vocab_size=130, bos_token_id=129, eos_token_id=129)
    if kind.startswith("mlp"):
        return MLP(int(kind[3:]))
    if kind == "resnet":
        return hf.ResNetForImageClassification(
            hf.ResNetConfig(
                num_channels=1,
                embedding_size=16,
                hidden_sizes=[16, 32, 64],
                depths=[1, 1, 1],
                layer_type="basic",
                num_labels=10,
            )
        )
    if kind == "vit":
        return hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=256,
                image_size=8,
                patch_size=2,
                num_channels=1,
                num_labels=10,
            )
        )
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_positions=CONTEXT,
                n_embd=64,
                n_layer=3,
                n_head=4,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                **word,
            )
        )
    if kind == "llama":
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=64,
                intermediate_size=176,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=False,
                **word,
            )
        )
    if kind == "bert":
        return hf.BertForMaskedLM(
            hf.BertConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=256,
                max_position_embeddings=CONTEXT,
                hidden_dropout_prob=0,
                attention_probs_dropout_prob=0,
                vocab_size=130,
                pad_token_id=129,
            )
        )
    raise SystemExit(f"unknown kind {kind!r}; choose from {', '.join(STEPS)}")


def save(model: Any, out: Path) -> None:
    """Write a model to a folder for `load` and, except for the MLPs, for `from_pretrained`."""
    if isinstance(model, MLP):
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), out / "model.safetensors")
    else:
        model.save_pretrained(out)


def load(kind: str, folder: Path) -> Any:
    """Read a model that `save` wrote, in evaluation mode."""
    model = build(kind)
    if isinstance(model, MLP):
        from safetensors.torch import load_file

        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
    return type(model).from_pretrained(folder).eval()


def evaluate(model: nn.Module, kind: str) -> tuple[float, float]:
    """Return (mean loss, accuracy) on the test batches."""
    model.eval()
    loss, right, n = [], 0, 0
    with torch.no_grad():
        for batch in make_batches(kind, "test"):
            out = model(**batch)
            logits, labels = out[1], batch["labels"]
            if kind in ("gpt2", "llama"):
                logits, labels = logits[:, :-1], labels[:, 1:]
            keep = labels != -100
            right += (logits.argmax(-1)[keep] == labels[keep]).sum().item()
            n += keep.sum().item()
            loss.append(out[0].item())
    return sum(loss) / len(loss), right / n


def is_trained(kind: str, loss: float, accuracy: float) -> bool:
    """Whether a model meets the requirements of its kind."""
    return loss <= HIGHEST_LOSS.get(kind, math.inf) and accuracy >= LEAST_ACCURACY.get(kind, 0)


def train(kind: str, seed: int, log: Callable[..., Any] = lambda *_: None) -> Any:
    """Train a model from a seed, which determines its initialisation, the order of the data and the noise."""
    torch.manual_seed(seed)
    model, generator = build(kind).train(), torch.Generator().manual_seed(1000 + seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    lr = 3e-3 if "mlp" not in kind else 1e-3
    decayed = [dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0)]
    optimizer = torch.optim.AdamW(decayed, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, STEPS[kind], pct_start=0.1)
    for step, batch in zip(range(STEPS[kind]), make_batches(kind, "train", generator), strict=False):
        loss = model(**batch)[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            log(step, round(loss.item(), 3))
    return model.eval()


def main(kind: str, seed: str, out: str) -> None:
    torch.set_num_threads(1)
    started = time.time()
    model = train(kind, int(seed), log=lambda *a: print(*a, flush=True))
    save(model, Path(out))
    loss, accuracy = evaluate(model, kind)
    print(f"{kind} {seed} test loss {loss:.4f} accuracy {accuracy:.4f} {time.time() - started:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
