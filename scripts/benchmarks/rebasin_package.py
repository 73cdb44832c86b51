"""Compare weight matching of two ResNet-18s by this package and by the rebasin package, in one run.

    python scripts/benchmarks/rebasin_package.py [--other-python PYTHON] [--pixels 64] [--classes 1000] [--threads 1]

PYTHON is an interpreter with torch and rebasin; without it, only this package is measured. There are two pairs with
random weights: "unrelated" is drawn from two seeds, "planted" is a model and a copy with all channels permuted.
Each line is a process: the seconds it takes to align and permute the second module, the peak memory, the change of its
outputs, and the distance between the two models (parameters and statistics) before and after.
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

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """He et al. 2015 (arXiv 1512.03385), with the key names that torchvision gave it."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def make_network(seed: int, classes: int) -> ResNet18:
    """Return a model with random weights, its BatchNorm channels all different, as after training."""
    torch.manual_seed(seed)
    model = ResNet18(classes).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model


def write_pairs(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the pairs of models, as state dicts that both packages can read."""
    from hf_rebasin import Alignment, spec_for

    a = make_network(0, arguments.classes)
    spec = spec_for(a, inputs=make_images(arguments))
    torch.save(a.state_dict(), folder / "fixed.pt")
    torch.save(make_network(1, arguments.classes).state_dict(), folder / "unrelated.pt")
    order = Alignment.random(spec, torch.Generator().manual_seed(7))
    torch.save(order.apply(a).state_dict(), folder / "planted.pt")


def make_images(arguments: argparse.Namespace) -> Tensor:
    return torch.randn(2, 3, arguments.pixels, arguments.pixels, generator=torch.Generator().manual_seed(0))


def measure(package: str, pair: str, folder: Path, arguments: argparse.Namespace) -> None:
    a, b = (make_network(0, arguments.classes) for _ in "ab")
    a.load_state_dict(torch.load(folder / "fixed.pt"))
    b.load_state_dict(torch.load(folder / f"{pair}.pt"))
    x = make_images(arguments)
    with torch.no_grad():
        before, apart = b(x), distance(a, b)
    align_pair = {"rebasin": align_by_rebasin, "hf_rebasin": align_by_hf_rebasin}[package]
    small = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in "ab")
    align_pair(*small, torch.ones(1, 2))  # so that lazy imports are not measured
    start = time.perf_counter()
    moved = align_pair(a, b, x)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        change = (moved(x) - before).abs().max().item()
    print(
        json.dumps(
            {
                "seconds": round(seconds, 2),
                "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                "max|Δ output|": float(f"{change:.2g}"),
                "max|output|": float(f"{before.abs().max().item():.2g}"),
                "apart": float(f"{apart:.4g}"),
                "then": float(f"{distance(a, moved):.4g}"),
            }
        )
    )


def align_by_rebasin(a: nn.Module, b: nn.Module, x: Tensor) -> nn.Module:
    from rebasin import PermutationCoordinateDescent

    descent = PermutationCoordinateDescent(a, b, x)
    descent.calculate_permutations()
    descent.apply_permutations()
    return b


def align_by_hf_rebasin(a: nn.Module, b: nn.Module, x: Tensor) -> nn.Module:
    from hf_rebasin import align

    return align(a, b, inputs=x).apply(b)


def distance(a: nn.Module, b: nn.Module) -> float:
    """Return ‖a − b‖ over all stored tensors; 0 only if they are equal."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return sum((x.double() - y.double()).square().sum().item() for x, y in pairs) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other-python", help="an interpreter with torch and rebasin")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.make:
        write_pairs(arguments.make, arguments)
        return
    if arguments.measure:
        package, pair, folder = arguments.measure
        measure(package, pair, Path(folder), arguments)
        return
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("pixels", "classes", "threads")]
    pythons = {"hf_rebasin": sys.executable} | ({"rebasin": arguments.other_python} if arguments.other_python else {})
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, *sizes, "--make", folder], check=True)
        for pair in ("unrelated", "planted"):
            seconds = []
            for package, python in pythons.items():  # a process each, for separate peaks of memory
                command = [python, __file__, *sizes, "--measure", package, pair, folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                result = json.loads(output.splitlines()[-1])
                seconds.append(result["seconds"])
                print(f"{pair:9}  {package:10}", "  ".join(f"{k} {v}" for k, v in result.items()), flush=True)
            if len(seconds) == 2:
                print(f"{pair:9}  hf_rebasin takes {seconds[0] / seconds[1]:.2f} times as long as rebasin")


if __name__ == "__main__":
    main()
