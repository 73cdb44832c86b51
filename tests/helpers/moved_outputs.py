"""Outputs of models before and after they are moved; making the models once saves most of the time."""

from functools import cache

import torch

from hf_rebasin import Checkpoint
from hf_rebasin.alignment.action import act
from hf_rebasin.alignment.exactness import compute_outputs, example_inputs
from hf_rebasin.errors import CheckpointError
from hf_rebasin.symmetries.table import canonical_view


@cache
def unmoved(model):
    """Return (checkpoint, inputs, outputs, whether float32 is used inside) for a model."""
    inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
    return Checkpoint.open(model), inputs, *compute_outputs(model, inputs)


@cache
def workbench(model):
    """Return a copy of the model and its tensors by disk keys; None if those combine several parameters."""
    copy = Checkpoint.open(model).model()
    try:
        _, disk = Checkpoint.open(copy).skeleton()
    except CheckpointError:
        return copy, None
    state = copy.state_dict()
    return copy, {disk[key]: state[key] for key in disk}


@torch.no_grad()
def outputs_moved(model, spec, elements):
    """Return the outputs of a moved model; the copy is reused, as making it takes longer than everything else."""
    checkpoint, inputs, *_ = unmoved(model)
    moved = canonical_view(checkpoint, spec.table).with_state(act(spec, elements, checkpoint.state(spec.table.prefix)))
    copy, places = workbench(model)
    if places is None:
        copy = moved.model()
    else:
        for key, place in places.items():
            place.copy_(moved.tensors[key])
    return compute_outputs(copy, inputs)[0]
