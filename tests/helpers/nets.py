"""Small modules shared by the tests of layers and statistics."""

import torch
from torch import nn

from hf_rebasin import Checkpoint
from hf_rebasin.modules.layerwise import NormStatistics, change_in_order


def make_pair(make):
    """Return two modules of one kind with different weights, in float64."""
    modules = []
    for seed in range(2):
        torch.manual_seed(seed)
        modules.append(make().double().eval())
    return modules


def draw_normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recompute_statistics(model, data):
    """Return a copy of a model whose BatchNorm statistics are those of `data` in evaluation mode."""
    copy = Checkpoint.open(model).model()
    change_in_order([copy], data, lambda step: step.norm and NormStatistics(step.norm, step.name))
    return copy


class Net(nn.Module):
    """A module with given submodules that computes `call(net, x)`."""

    def __init__(self, call, **parts):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.call(self, x)
