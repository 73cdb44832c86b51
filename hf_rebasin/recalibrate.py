"""BatchNorm statistics of a merged model: an average of two models has none of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import OptionError
from .inputs import Inputs, run


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Inputs]) -> int:
    """Recompute running mean and variance of every BatchNorm layer, in place: their cumulative average over batches.

    Args:
        model: any module; its mode and its BatchNorm momenta are restored.
        batches: inputs of its forward pass: tensors, positional arguments, or mappings of keyword arguments.

    Returns:
        The number of BatchNorm layers; with none, no batch is read.

    Raises:
        OptionError: there are BatchNorm layers and no batches. Whatever fails, the statistics stay as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    training, momenta = [m.training for m in model.modules()], [m.momentum for m in norms]
    stream = iter(batches)
    batch = next(stream, None)
    if batch is None:
        raise OptionError("no batch came, so there is nothing to take statistics of; is the iterator used up?")
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()  # only these: dropout stays off
        while batch is not None:
            run(model, batch)
            batch = next(stream, None)
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            norm.load_state_dict(buffers, strict=False)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode
    return len(norms)
