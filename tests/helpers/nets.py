"""Small modules that tests of layers and statistics share."""

import torch
from torch import nn

from hf_rebasin import Checkpoint
from hf_rebasin.modules.layerwise import NormStatistics, change_in_order


def two(make):
    """Two modules of one kind, in float64."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(make().double().eval())
    return found


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_statistics_of(model, data):
    """A copy, its BatchNorm statistics those of data in evaluation mode."""
    copy = Checkpoint.open(model).model()
    change_in_order([copy], data, lambda step: step.norm and NormStatistics(step.norm, step.name))
    return copy


class Net(nn.Module):
    """`call(net, x)` of some parts."""

    def __init__(self, call, **parts):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.call(self, x)
