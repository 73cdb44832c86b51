"""Linear maps of a module: linear layers, transformers' Conv1D and convolutions are one thing, y = x W + b.

The samples x of a convolution are the patches of its input, group by group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

PIECE = 1 << 22  # numbers: so many are unfolded at a time of what a convolution reads


@dataclass(frozen=True)
class Affine:
    """A linear map of a module."""

    name: str
    module: Any

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.module, _ConvNd)

    @property
    def groups(self) -> int:
        return int(self.module.groups) if self.is_convolution else 1

    @property
    def matrix(self) -> Tensor:
        """Its weight, (groups, in, out)."""
        weight = self.module.weight.detach()
        if self.is_convolution:
            return weight.unflatten(0, (self.groups, -1)).flatten(2).mT
        return weight[None] if is_conv1d(self.module) else weight.mT[None]

    @property
    def bias(self) -> Tensor | None:
        """(groups, out)"""
        bias = self.module.bias
        return None if bias is None else bias.detach().reshape(self.groups, -1)

    def write(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Change its weight, (groups, in, out), and its bias, (groups, out), in place."""
        weight = self.module.weight.detach()
        weight.copy_((matrix[0] if is_conv1d(self.module) else matrix.mT).reshape(weight.shape))
        if bias is not None:
            self.module.bias.detach().copy_(bias.reshape(-1))

    def samples(self, x: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """What it reads, (groups, many, in), piece by piece: patches are many times what they are cut from."""
        if not self.is_convolution:
            yield _looked_at(x, mask)[None]
            return
        x = self._padded(x)
        places = prod(
            (size - (k - 1) * dilation - 1) // stride + 1
            for size, k, dilation, stride in zip(
                x.shape[2:], self.module.kernel_size, self.module.dilation, self.module.stride, strict=True
            )
        )
        images = max(1, PIECE // max(1, places * x.shape[1] * prod(self.module.kernel_size)))
        yield from map(self._patches, x.split(images))

    def answers(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """What it gives, (groups, many, out)."""
        if not self.is_convolution:
            return _looked_at(y, mask)[None]
        return self._batched(y).unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)

    def explains(self, x: Tensor, y: Tensor) -> bool:
        """Whether it gave what a linear map gives: classes derived from one, and hooks, may do what they like."""
        if self.is_convolution:
            x, y = self._batched(x)[:1], self._batched(y)[:1]
        elif not x.is_floating_point() or x.shape[-1] != self.matrix.shape[1]:
            return False
        read, given = torch.cat(list(self.samples(x)), 1).double(), self.answers(y).double()
        said = read @ self.matrix.double()
        said = said if self.bias is None else said + self.bias.double()[:, None]
        return said.shape == given.shape and not (said - given).norm() > 0.05 * given.norm()  # NaN is refused later

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.module.kernel_size) + 2 else x[None]

    def _padded(self, x: Tensor) -> Tensor:
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return functional.pad(self._batched(x), conv._reversed_padding_repeated_twice, mode=mode)

    def _patches(self, x: Tensor) -> Tensor:
        conv, spatial = self.module, len(self.module.kernel_size)
        for i in range(spatial):
            window = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
            x = x.unfold(2 + i, window, conv.stride[i])[..., :: conv.dilation[i]]
        # (batch, channels, places …, patch …) to (groups, batch, places …, channels of a group, patch …)
        x = x.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, 2 + spatial)
        return x.flatten(1, 1 + spatial).flatten(2)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer, whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_matrix(module: nn.Module) -> bool:
    """Whether it is one that is no convolution."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _looked_at(x: Tensor, mask: Tensor | None) -> Tensor:
    """(many, n), without the positions that a mask leaves out; these may have been laid end to end."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or (x.shape[:-1] != mask.shape and x.shape[:-1] != (mask.numel(),)):
        return flat
    return flat[mask.reshape(-1).bool()]


def is_affine(module: nn.Module) -> bool:
    """Whether it is one of these; a transposed convolution is none."""
    if isinstance(module, _ConvNd):
        return not module.transposed
    return is_matrix(module)
