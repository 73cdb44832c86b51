"""Example inputs, how a module is called with them, and what of its answer counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, OptionError

# A tensor, a sequence of positional arguments, or a mapping of keyword arguments.
Inputs: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"

# What transformers models hand out beside what they compute: moving a model moves these. (The auxiliary loss adds up,
# by number, experts of different layers.)
INNER = re.compile(
    r"(^|_)hidden_states$|attentions$|past_key_values$|cache_params$|_model_output$|router_logits$|^aux_loss$"
)


def run(module: nn.Module, inputs: Inputs) -> Any:
    """What a module gives for its inputs."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)


def mask_in(batch: Any) -> Tensor | None:
    """Which positions of a batch are looked at; None where nothing is said of it."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def own_loss(module: nn.Module, batch: Any) -> Tensor:
    """What a module says is its loss, for a batch with labels in it."""
    return loss_in(module, run(module, batch), batch)


def loss_in(module: nn.Module, said: Any, batch: Any) -> Tensor:
    """The same of what it said already.

    Raises:
        OptionError: there is none.
    """
    found = _said(said, "loss", batch, 0)
    if found is None:
        raise OptionError(
            f"{type(module).__name__} gives no loss for these batches; put labels in them, or give loss="
        )
    return found


def says_a_loss(module: nn.Module, batch: Any) -> bool:
    """Whether a module gives a loss for a batch."""
    with evaluating(module):
        return _said(run(module, batch), "loss", batch, 0) is not None


def logits_in(said: Any, batch: Any) -> Tensor | None:
    """The scores that go with the labels of a batch; None where there are none."""
    return _said(said, "logits", batch, 1)


def _said(said: Any, name: str, batch: Any, place: int) -> Tensor | None:
    """By its name, or by its place in the tuple that is given for labels."""
    found = said.get(name) if isinstance(said, Mapping) else getattr(said, name, None)
    if found is None and isinstance(batch, Mapping) and "labels" in batch and isinstance(said, tuple):
        found = said[place] if len(said) > place else None
    return cast("Tensor | None", found)


def refuse_read_once(data: Iterable[Any]) -> None:
    """Raise OptionError for an iterator."""
    if iter(data) is data:
        raise OptionError(
            f"data is a {type(data).__name__}, which can be read once; give what can be read several times, such as a "
            "list or a DataLoader"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; afterwards every part has the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def outputs_in(said: Any) -> Iterator[Tensor]:
    """The tensors a model computes, in whatever its forward pass returned.

    Of a transformers model's answer, inner states (hidden states of every layer, attentions, caches, and the encoder's
    last state beside logits) do not count where there is anything else.

    Raises:
        CheckpointError: an object in which no tensors can be found.
    """
    if isinstance(said, Tensor):
        yield said
    elif isinstance(said, Mapping):
        answers = {str(key): value for key, value in said.items() if value is not None}
        if hasattr(said, "to_tuple"):
            inner = {key for key in answers if INNER.search(key)}
            if "last_hidden_state" not in answers:
                inner.add("encoder_last_hidden_state")
            answers = {key: value for key, value in answers.items() if key not in inner} or answers
        for value in answers.values():
            yield from outputs_in(value)
    elif isinstance(said, tuple | list):
        for one in said:
            yield from outputs_in(one)
    elif hasattr(said, "__dict__"):
        yield from outputs_in(vars(said))
    elif said is not None and not isinstance(said, int | float | complex | str | bytes):
        raise CheckpointError(f"the model returns a {type(said).__name__}, in which no tensors can be found")


def answers(said: Any, mask: Tensor | None) -> list[Tensor]:
    """What counts of a model's answer: numbers that are no loss, at positions that are looked at.

    Where there is one number for every position, positions are what is chosen among, and all of them stay.
    """
    found = [x for x in outputs_in(said) if x.dim() and x.is_floating_point()]
    if mask is None:
        return found
    by_position = [x.dim() > mask.dim() and x.shape[: mask.dim()] == mask.shape for x in found]
    return [x[mask.bool().to(x.device)] if each else x for x, each in zip(found, by_position, strict=True)]


def has_no_head(said: Any) -> bool:
    """Whether an answer is a transformers model's, and no scores of anything: hidden states, embeddings."""
    if not hasattr(said, "to_tuple") or not isinstance(said, Mapping):
        return False
    return not any("logits" in str(key) and not INNER.search(str(key)) for key in said)


def no_classes(module: nn.Module) -> bool:
    """Whether a model's configuration says that its outputs are no scores of classes of which one is right."""
    kind = getattr(getattr(module, "config", None), "problem_type", None)
    return kind in ("regression", "multi_label_classification")


def example_inputs(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs for a transformers model: tokens where there is a vocabulary, images where there are channels.

    Raises:
        CheckpointError: a kind of model whose inputs have to be given.
    """
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    kind = (getattr(config, "architectures", None) or [""])[0]
    inputs: dict[str, Tensor] = {}
    if getattr(text, "vocab_size", None) and not kind.endswith("ForImageClassification"):
        length = min(16, getattr(text, "max_position_embeddings", None) or 16)
        several = 2 if getattr(text, "pad_token_id", None) is not None or vision is not config else 1
        inputs["input_ids"] = torch.randint(text.vocab_size, (several, length), generator=generator)
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < text.vocab_size:
            inputs["input_ids"][:, -1] = end  # some take what they say from there
    if getattr(vision, "num_channels", None):
        size = getattr(vision, "image_size", 64)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if math.prod(sides) * vision.num_channels > 10**7:
            raise CheckpointError(f"its configuration says images of {sides}, too large to try; give inputs (inputs=)")
        pixels = torch.randn(2, vision.num_channels, *sides, generator=generator, dtype=torch.float64)
        inputs["pixel_values"] = pixels
        if any("MaskedImageModeling" in name for name in getattr(config, "architectures", None) or []):
            patches = math.prod(side // config.patch_size for side in sides)
            inputs["bool_masked_pos"] = torch.arange(2 * patches).reshape(2, patches) % 3 == 0
    encoder_only = kind.endswith(("EncoderModel", "ForTokenClassification"))  # T5 counts as both there, too
    if "input_ids" in inputs and getattr(config, "is_encoder_decoder", False) and not encoder_only:
        inputs["decoder_input_ids"] = inputs["input_ids"].roll(1, -1)
    if not inputs:
        raise CheckpointError(f"no inputs are known for model_type {config.model_type!r}; give them (inputs=)")
    return inputs
