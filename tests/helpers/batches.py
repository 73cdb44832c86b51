"""Batches shared by the tests of layers and statistics."""

import torch

from hf_rebasin.modules.forward import example_inputs


def make_batches(model, count=4):
    """Return batches of inputs for a TINY model, each from its own seed."""

    def make_batch(seed):
        inputs = example_inputs(model.config, torch.Generator().manual_seed(seed))
        return {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}

    return [make_batch(seed) for seed in range(count)]
