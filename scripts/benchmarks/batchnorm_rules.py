"""Measure ways to combine the variances of BatchNorm layers in a merge when there are no data to recompute them.

    python scripts/benchmarks/batchnorm_rules.py [--models DIR]

Running means are averaged; each rule combines the running variances of two models, with shares of one half:

    mean         the mean of the variances, which is what a merge does
    mixture      the variance of the mixture of both models' activations: mean of variances + variance of means
    deviations   the square of the mean standard deviation
    independent  the variance of the mean of two independent units: Σ wᵢ² vᵢ
    weights      the mean of the variances × ‖mean kernel‖² ÷ mean of ‖kernel‖², unit by unit, for the convolution
                 before the layer: as much as the kernels of the two models cancel each other, so do their outputs
    data         recomputed on the training images, for comparison

Networks: the demo's ResNet, the test bed's narrow ResNet and the small VGG of sinkhorn_rebasin.py, three seeds each,
pairs 0-1, 0-2, 1-2, as they are (plain) and aligned by weight matching; and pairs of fine-tunes, on noisy and on
turned digits, of each of the demo's three ResNets. Prints accuracy and loss on 500 test images of every midpoint.
Models that are not in DIR (by default `batchnorm_rules`) are trained there first, in five minutes on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import testbed
import torch
from barrier import format_markdown, log_progress, train, training_images
from sinkhorn_rebasin import SmallVGG, find_symmetries, train_vgg
from torch import Tensor, nn

from hf_rebasin import align, recalibrate
from hf_rebasin.compat.in_memory import merge_modules
from hf_rebasin.demo.experiments import train_model
from hf_rebasin.modules.layerwise import keeps_statistics

SEEDS = 3
FINE_TUNING = dict(steps=300, lr=1e-3)

# (running means, running variances, kernels), (models, channels, …) each -> the variance of the merge
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
RULES: dict[str, Rule] = {
    "mean": lambda means, variances, kernels: variances.mean(0),
    "mixture": lambda means, variances, kernels: variances.mean(0) + means.var(0, correction=0),
    "deviations": lambda means, variances, kernels: variances.sqrt().mean(0).square(),
    "independent": lambda means, variances, kernels: variances.sum(0) / len(variances) ** 2,
    "weights": lambda means, variances, kernels: (
        variances.mean(0) * kernels.mean(0).square().sum(1) / kernels.square().sum(2).mean(0)
    ),
}


def load_models(folder: Path) -> dict[str, list[Any]]:
    """Return the models of every network by seed, trained first if they are missing."""
    from transformers import ResNetForImageClassification

    models: dict[str, list[Any]] = {"demo's ResNet": [], "narrow ResNet": [], "VGG": []}
    for seed in range(SEEDS):
        wide, narrow, vgg = (folder / f"{kind}-{seed}" for kind in ("demo", "resnet", "vgg"))
        if not wide.exists():
            log_progress(f"training {wide.name}")
            train_model("resnet", seed).save_pretrained(wide)
        if not narrow.exists():
            train("resnet", seed, narrow)
        if not vgg.exists():
            vgg.mkdir(parents=True)
            torch.save(train_vgg(seed).state_dict(), vgg / "model.pt")
        models["demo's ResNet"].append(ResNetForImageClassification.from_pretrained(wide).eval())
        models["narrow ResNet"].append(testbed.load("resnet", narrow))
        small = SmallVGG().eval()
        small.load_state_dict(torch.load(vgg / "model.pt"))
        models["VGG"].append(small)
    return models


def fine_tune(base: Any, change: Callable[[Tensor], Tensor], seed: int) -> Any:
    """Return a copy of a ResNet that was trained on with changed images."""
    from copy import deepcopy

    model, generator = deepcopy(base).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), FINE_TUNING["lr"], weight_decay=0.05)
    batches = testbed.make_batches("resnet", "train", generator)
    for _, batch in zip(range(int(FINE_TUNING["steps"])), batches, strict=False):
        loss = model(pixel_values=change(batch["pixel_values"]), labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def make_pairs(models: dict[str, list[Any]]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield (kind of pair, pair, first model, second model)."""
    for kind, seeds in models.items():
        spec = find_symmetries("", seeds[0]) if kind == "VGG" else None
        for i, j in combinations(range(SEEDS), 2):
            yield f"{kind}, plain", f"{i}-{j}", seeds[i], seeds[j]
            yield f"{kind}, aligned", f"{i}-{j}", seeds[i], align(seeds[i], seeds[j], spec=spec).apply(seeds[j])
    for seed, base in enumerate(models["demo's ResNet"]):
        log_progress(f"fine-tuning seed {seed}")
        noisy = fine_tune(base, lambda x: x + 0.5 * torch.randn(x.shape, generator=torch.Generator()), 10 + seed)
        turned = fine_tune(base, lambda x: x.rot90(1, (2, 3)), 20 + seed)
        yield "fine-tunes of demo's ResNet", f"of {seed}", noisy, turned


def apply_rule(merged: nn.Module, models: tuple[nn.Module, nn.Module], rule: Rule) -> None:
    """Set the running variances of a merge by a rule."""
    parts: list[dict[str, Any]] = [dict(model.named_modules()) for model in models]
    convolution = ""
    for name, part in merged.named_modules():
        if isinstance(part, nn.Conv2d):
            convolution = name  # in these networks, a layer follows the convolution that it reads
        elif keeps_statistics(part):
            norms = [by_name[name] for by_name in parts]
            means, variances = (
                torch.stack([getattr(norm, field).double() for norm in norms])
                for field in ("running_mean", "running_var")
            )
            kernels = torch.stack([by_name[convolution].weight.detach().double().flatten(1) for by_name in parts])
            part.get_buffer("running_var").copy_(rule(means, variances, kernels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("batchnorm_rules"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [["", "pair", *RULES, "data"]]
    for kind, pair, a, b in make_pairs(load_models(arguments.models)):
        cells = []
        for rule in RULES.values():
            merged = merge_modules([a, b], "linear")
            apply_rule(merged, (a, b), rule)
            cells.append(testbed.evaluate(merged, "resnet"))
        recalibrate(merged, training_images())
        cells.append(testbed.evaluate(merged, "resnet"))
        rows.append([kind, pair, *(f"{accuracy:.1%} {loss:.3f}" for loss, accuracy in cells)])
        log_progress(" ".join(rows[-1]))
    print("Accuracy and loss of the midpoint on 500 test digits.\n")
    print(format_markdown(rows, left=2))


if __name__ == "__main__":
    main()
