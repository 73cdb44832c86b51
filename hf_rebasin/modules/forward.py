"""Example inputs for a module, forward passes, and what of their outputs counts."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, OptionError
from .linear_maps import is_matrix, output_features

logger = logging.getLogger(__name__)

# A tensor, a sequence of positional arguments, or a mapping of keyword arguments.
Inputs: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"

# Internal states that transformers models return in addition to what they compute: moving a model moves these, too.
# (The auxiliary loss adds up experts of different layers by their number.)
INTERNAL_OUTPUTS = re.compile(
    r"(^|_)hidden_states$|attentions$|^past_|past_key_values$|cache_params$|_cache$|^state$|^mems$"
    r"|_model_output$|router_logits$|^aux_loss$"
)


def run_module(module: nn.Module, inputs: Inputs) -> Any:
    """Run a forward pass and return whatever the module returns."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)


def attention_mask_of(batch: Any) -> Tensor | None:
    """Return the attention mask of a batch; None if it has none."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch; None if it has none, or only one number."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels if isinstance(labels, Tensor) and labels.dim() else None


def compute_own_loss(module: nn.Module, batch: Any) -> Tensor:
    """Compute the loss that a module itself returns for a batch with labels."""
    return loss_from_outputs(module, run_module(module, batch), batch)


def loss_from_outputs(module: nn.Module, outputs: Any, batch: Any) -> Tensor:
    """Return the loss in a module's outputs.

    Raises:
        OptionError: there is none.
    """
    loss = _output_field(outputs, "loss", batch, 0)
    if loss is None:
        raise OptionError(
            f"{type(module).__name__} returns no loss for these batches; put labels in them, or give loss="
        )
    return loss


def returns_loss(module: nn.Module, batch: Any) -> bool:
    """Whether a module returns a loss for a batch."""
    with evaluation_mode(module):
        return _output_field(run_module(module, batch), "loss", batch, 0) is not None


def logits_from_outputs(outputs: Any, batch: Any) -> Tensor | None:
    """Return the logits in a module's outputs; None if there are none."""
    return _output_field(outputs, "logits", batch, 1)


def _output_field(outputs: Any, name: str, batch: Any, position: int) -> Tensor | None:
    """Find a field by its name, or by its position in the tuple that is returned for a batch with labels."""
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    if value is None and isinstance(batch, Mapping) and "labels" in batch and isinstance(outputs, tuple):
        value = outputs[position] if len(outputs) > position else None
    return cast("Tensor | None", value)


def refuse_read_once(data: Iterable[Any]) -> None:
    """Raise OptionError for an iterator, which can be read only once."""
    if iter(data) is data:
        raise OptionError(
            f"data is a {type(data).__name__}, which can be read once; give what can be read several times, such as a "
            "list or a DataLoader"
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, without gradients; afterwards every submodule has the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def output_tensors(outputs: Any) -> Iterator[Tensor]:
    """Iterate over the tensors that a model computes, in whatever its forward pass returned.

    Internal states of a transformers model (hidden states of every layer, attentions, caches, and the encoder's last
    state next to logits) do not count where there is anything else.

    Raises:
        CheckpointError: an object in which no tensors can be found.
    """
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        fields = {str(key): value for key, value in outputs.items() if value is not None}
        if hasattr(outputs, "to_tuple"):
            internal = {key for key in fields if INTERNAL_OUTPUTS.search(key)}
            if "last_hidden_state" not in fields:
                internal.add("encoder_last_hidden_state")
            fields = {key: value for key, value in fields.items() if key not in internal} or fields
        for value in fields.values():
            yield from output_tensors(value)
    elif isinstance(outputs, tuple | list):
        for value in outputs:
            yield from output_tensors(value)
    elif hasattr(outputs, "__dict__"):
        yield from output_tensors(vars(outputs))
    elif outputs is not None and not isinstance(outputs, int | float | complex | str | bytes):
        raise CheckpointError(f"the model returns a {type(outputs).__name__}, in which no tensors can be found")


def attended_outputs(module: nn.Module, outputs: Any, batch: Any) -> list[Tensor]:
    """Return the floating-point outputs with their classes last, at the positions that the attention mask keeps.

    Scalars such as a loss do not count. An output with only one number per position keeps all positions, as the model
    chooses among them.
    """
    mask, labels = attention_mask_of(batch), labels_of(batch)
    tensors = [x for x in output_tensors(outputs) if x.dim() and x.is_floating_point()]
    tensors = [x.movedim(class_axis(module, x, labels), -1) for x in tensors]
    if mask is None:
        return tensors
    by_position = [x.dim() > mask.dim() and x.shape[: mask.dim()] == mask.shape for x in tensors]
    return [x[mask.bool().to(x.device)] if masked else x for x, masked in zip(tensors, by_position, strict=True)]


def class_axis(module: nn.Module, scores: Tensor, labels: Tensor | None = None) -> int:
    """Return the axis of a module's output that runs over classes.

    A model of transformers has its classes last or, in images (batch, classes, height, width), second. Any other
    module may say it by an attribute `class_axis`. Otherwise its classes are last where labels have the shape of all
    other axes; second, as `torch.nn.CrossEntropyLoss` reads (batch, classes, positions …), where they have that of
    all but the second. Without labels that tell, they are the axis of the two that is as long as the last layer with
    such a number of outputs; a layer of both lengths has its outputs last if it is linear, and second if it is a
    convolution. Where no layer tells either, they are second. The log says what was taken.

    Raises:
        OptionError: an attribute `class_axis` that is not an axis of these outputs.

    Example: a convolution makes 5 scores at each of 7 positions.

        >>> net = torch.nn.Conv1d(3, 5, 1)
        >>> class_axis(net, net(torch.zeros(2, 3, 7)))
        1
    """
    last = scores.dim() - 1
    if last < 2:
        return last
    if hasattr(module, "base_model_prefix"):  # a model of transformers
        return 1 if last > 2 else last
    declared = getattr(module, "class_axis", None)
    if declared is not None:
        if not isinstance(declared, int) or not -last <= declared <= last or declared == 0:
            raise OptionError(
                f"class_axis of {type(module).__name__} is {declared!r}, and its outputs are {tuple(scores.shape)}; "
                f"give the axis of the classes, 1 to {last}, or -1 for the last one"
            )
        return declared % scores.dim()
    axis, evidence = _find_class_axis(module, scores, labels)
    why = evidence or "as torch.nn.CrossEntropyLoss reads them; if that is wrong, set class_axis of the module"
    if (kind := (type(module), axis, why)) not in _logged:
        _logged.add(kind)
        log, name = logger.info if evidence else logger.warning, type(module).__name__
        log("%s: the classes of outputs %s are taken to be axis %d, %s", name, [*scores.shape], axis, why)
    return axis


_logged: set[tuple[type, int, str]] = set()  # which class has which axis, and why


def _find_class_axis(module: nn.Module, scores: Tensor, labels: Tensor | None) -> tuple[int, str]:
    """Return the axis of the classes, second or last, and what tells; empty if nothing does."""
    shape, last = scores.shape, scores.dim() - 1
    if labels is not None:
        fitting = [axis for axis in (1, last) if labels.shape == (*shape[:axis], *shape[axis + 1 :])]
        if len(fitting) == 1:
            return fitting[0], "by the shape of the labels"
    for name, part in reversed(list(module.named_modules())):
        made = [axis for axis in (1, last) if shape[axis] == output_features(part)]
        if made:
            axis = made[0] if len(made) == 1 else last if is_matrix(part) else 1  # of two, where its outputs are
            return axis, f"of which {name or 'the module'} makes {shape[axis]}"
    return 1, ""


def has_no_head(outputs: Any) -> bool:
    """Whether a transformers model returned hidden states or embeddings only, and no scores."""
    if not hasattr(outputs, "to_tuple") or not isinstance(outputs, Mapping):
        return False
    return not any("logits" in str(key) and not INTERNAL_OUTPUTS.search(str(key)) for key in outputs)


def has_no_classes(module: nn.Module) -> bool:
    """Whether a model's configuration says that its outputs are not scores of classes of which one is right."""
    problem_type = getattr(getattr(module, "config", None), "problem_type", None)
    return problem_type in ("regression", "multi_label_classification")


def example_inputs(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw random inputs for a transformers model: waves if it strides over them, else tokens and images, or either.

    Raises:
        CheckpointError: a model whose kind of inputs is not known, so that they have to be given.
    """
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    inputs: dict[str, Tensor] = {}
    waves = getattr(config, "conv_stride", None) and getattr(config, "conv_kernel", None)  # Wav2Vec2 and its kind
    if waves and not getattr(config, "is_encoder_decoder", False):
        length = 12  # frames, of which convolutions make one from as many samples as their kernels span
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            length = (length - 1) * stride + kernel
        return {"input_values": torch.randn(2, length, generator=generator, dtype=torch.float64)}
    if getattr(text, "vocab_size", None) and not architecture.endswith("ForImageClassification"):
        longest = getattr(text, "max_position_embeddings", None) or 16
        length = min(16, int(longest)) if longest > 0 else 16  # -1, as XLNet has it, stands for none
        rows = 2 if getattr(text, "pad_token_id", None) is not None or vision is not config else 1
        inputs["input_ids"] = torch.randint(text.vocab_size, (rows, length), generator=generator)
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < text.vocab_size:
            inputs["input_ids"][:, -1] = end  # some models pool their output there
    if getattr(vision, "num_channels", None):
        size = getattr(vision, "image_size", 64)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if math.prod(sides) * vision.num_channels > 10**7:
            raise CheckpointError(
                f"its configuration says images of {sides}, too large to try; in Python, give inputs (inputs=)"
            )
        pixels = torch.randn(2, vision.num_channels, *sides, generator=generator, dtype=torch.float64)
        inputs["pixel_values"] = pixels
        if any("MaskedImageModeling" in name for name in getattr(config, "architectures", None) or []):
            patches = math.prod(side // config.patch_size for side in sides)
            inputs["bool_masked_pos"] = torch.arange(2 * patches).reshape(2, patches) % 3 == 0
    # T5's encoder and token classifier declare `is_encoder_decoder`, too
    encoder_only = architecture.endswith(("EncoderModel", "ForTokenClassification"))
    if "input_ids" in inputs and getattr(config, "is_encoder_decoder", False) and not encoder_only:
        inputs["decoder_input_ids"] = inputs["input_ids"].roll(1, -1)
    if not inputs:
        raise CheckpointError(
            f"no inputs are known for model_type {config.model_type!r}; in Python, give them (inputs=)"
        )
    return inputs
