"""Linear maps of a module: linear layers, transformers' Conv1D and convolutions, all of them as y = x W + b.

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

CHUNK_ELEMENTS = 1 << 22  # elements that are unfolded at a time from the input of a convolution


@dataclass(frozen=True)
class Affine:
    """A linear map of a module.

    Args:
        name: name of the layer in the module.
        module: the layer itself.
    """

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
        """Its bias, (groups, out); None if it has none."""
        bias = self.module.bias
        return None if bias is None else bias.detach().reshape(self.groups, -1)

    def write(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Change its weight, (groups, in, out), and its bias, (groups, out), in place."""
        weight = self.module.weight.detach()
        weight.copy_((matrix[0] if is_conv1d(self.module) else matrix.mT).reshape(weight.shape))
        if bias is not None:
            self.module.bias.detach().copy_(bias.reshape(-1))

    def input_samples(self, x: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Iterate over the samples of an input, (groups, samples, in), in chunks, as patches need much memory."""
        if not self.is_convolution:
            yield _attended(x, mask)[None]
            return
        x = self._padded(x)
        positions = prod(
            (size - (k - 1) * dilation - 1) // stride + 1
            for size, k, dilation, stride in zip(
                x.shape[2:], self.module.kernel_size, self.module.dilation, self.module.stride, strict=True
            )
        )
        images = max(1, CHUNK_ELEMENTS // max(1, positions * x.shape[1] * prod(self.module.kernel_size)))
        yield from map(self._patches, x.split(images))

    def output_samples(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the samples of an output, (groups, samples, out)."""
        if not self.is_convolution:
            return _attended(y, mask)[None]
        return self._batched(y).unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)

    def explains(self, x: Tensor, y: Tensor) -> bool:
        """Whether y is what this linear map makes of x; hooks and subclasses may compute something else."""
        if self.is_convolution:
            x, y = self._batched(x)[:1], self._batched(y)[:1]
        elif not x.is_floating_point() or x.shape[-1] != self.matrix.shape[1]:
            return False
        inputs, outputs = torch.cat(list(self.input_samples(x)), 1).double(), self.output_samples(y).double()
        expected = inputs @ self.matrix.double()
        expected = expected if self.bias is None else expected + self.bias.double()[:, None]
        if expected.shape != outputs.shape:
            return False
        return not (expected - outputs).norm() > 0.05 * outputs.norm()  # NaN passes: it is refused later

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
        # (batch, channels, positions …, patch …) to (groups, batch, positions …, channels of a group, patch …)
        x = x.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, 2 + spatial)
        return x.flatten(1, 1 + spatial).flatten(2)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' linear layer Conv1D, whose weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear map that is not a convolution."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _attended(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of x, (samples, n), that a mask keeps; their positions may be flattened already."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or (x.shape[:-1] != mask.shape and x.shape[:-1] != (mask.numel(),)):
        return flat
    return flat[mask.reshape(-1).bool()]


def is_affine(module: nn.Module) -> bool:
    """Whether a module is a linear map that `Affine` supports; transposed convolutions are not."""
    if isinstance(module, _ConvNd):
        return not module.transposed
    return is_matrix(module)


def output_features(module: nn.Module) -> int | None:
    """Return the number of features that a linear map or convolution makes; None for any other module."""
    if isinstance(module, _ConvNd):
        return int(module.out_channels)
    if isinstance(module, nn.Linear):
        return int(module.out_features)
    return int(module.weight.shape[1]) if is_conv1d(module) else None  # type: ignore[index]
