"""Batches and small modules that tests of layers and statistics share."""

import torch

from hf_rebasin.modules.forward import example_inputs


def batches_of(model, count=4):
    """Inputs for a TINY model, each from another seed."""

    def batch(seed):
        inputs = example_inputs(model.config, torch.Generator().manual_seed(seed))
        return {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}

    return [batch(seed) for seed in range(count)]
