"""Models with the number of permutation symmetries each of them has, counted on paper.

A free symmetry is a set of axes that may be permuted together without changing any output: the units of a hidden
layer; the residual stream; the heads of one attention; the query-key units inside its heads, in a separate order for
each head; and so on. Axes of size 1 do not count. Outputs (every tensor that a model returns), inputs, tokens,
positions, pixels and kernels are held.

`HF` has tiny transformers models, `MODULES` plain torch modules, and `modules()` composes modules at random.
`python tests/helpers/zoo.py` builds them all and prints them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_rebasin.alignment.exactness import compute_outputs
from hf_rebasin.modules.forward import run_module

Inputs = tuple[Tensor, ...] | dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model with its inputs and its number of symmetries.

    Args:
        build: function that returns the model, always the same: float64, eval mode, random, far from initialisation.
        inputs: function that returns positional inputs (a tuple) or keyword arguments (a dict), always the same.
        free: number of symmetries that can be permuted.
        why: explanation of that number.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    free: int
    why: str


HF: dict[str, Family] = {}
MODULES: dict[str, Family] = {}


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator, inputs: Inputs | None = None) -> nn.Module:
    """Randomise every parameter at a scale that saturates nothing; set float64 and eval mode.

    The statistics of batch norms become those of random data like the inputs, with noise; without inputs, plain noise.
    """

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model.double().eval()
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if len(shape) > 1:
            fan = parameter.numel() / max(shape[0], shape[1])
            parameter.copy_(1.2 / math.sqrt(fan) * noise(*shape))
        else:
            parameter.copy_(1 + 0.4 * noise(*shape) if name.endswith("weight") else 0.5 * noise(*shape))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and inputs is not None:
        for norm in norms:
            norm.momentum = 1.0

        def noise_like(x: Any) -> Any:
            return noise(16, *x.shape[1:]) if isinstance(x, Tensor) and x.is_floating_point() else x

        is_dict = isinstance(inputs, dict)
        batch = {k: noise_like(x) for k, x in inputs.items()} if is_dict else tuple(map(noise_like, inputs))
        run_module(model.train(), batch)
        model.eval()
    for norm in norms:
        mean, var = norm.running_mean, norm.running_var
        if mean is not None and var is not None:
            mean.add_(0.3 * (mean.std() if inputs is not None else 1) * noise(*mean.shape))
            var.mul_(0.6 + 0.8 * torch.rand(var.shape, generator=generator, dtype=torch.float64)).add_(1e-3)
    return model


@torch.no_grad()
def row_order_matters(model: nn.Module, inputs: Inputs, seed: int = 0) -> dict[str, bool]:
    """For each matrix, whether outputs change when its rows (its first axis longer than 1) are permuted at random."""
    generator = torch.Generator().manual_seed(seed)
    before = compute_outputs(model, inputs)[0]
    matters = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter.numel() < 2:
            continue
        axis = next(i for i, n in enumerate(parameter.shape) if n > 1)
        n = parameter.shape[axis]
        order = torch.randperm(n, generator=generator)
        if (order == torch.arange(n)).all():
            order = order.flip(0)
        kept = parameter.detach().clone()
        parameter.copy_(parameter.index_select(axis, order))
        matters[name] = bool((compute_outputs(model, inputs)[0] - before).abs().max() > 1e-4 * before.abs().max())
        parameter.copy_(kept)
    return matters


def tokens(vocabulary: int, length: int, batch: int = 2, seed: int = 0, lowest: int = 0) -> Tensor:
    return torch.randint(lowest, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def reals(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """One random tensor for each shape, with a batch dimension of 2 before it."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


# --- transformers ----------------------------------------------------------------------------------------------------


def _hf(
    name: str,
    architecture: str,
    inputs: Callable[[], dict[str, Any]],
    free: int,
    why: str,
    change: Callable[[nn.Module], None] = lambda model: None,
    **config: Any,
) -> None:
    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, architecture)
        torch.manual_seed(0)
        model = cls(cls.config_class(**config))
        change(model)
        return randomise(model, torch.Generator().manual_seed(1), inputs())

    HF[name] = Family(build, inputs, free, why)


def _text(vocabulary: int, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": tokens(vocabulary, 7, lowest=3)} | more


def _image(side: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": reals((3, side, side))[0]}


_LAYERS = "residual + 2 × (heads + qk + ov + ff)"
_BERT = dict(
    vocab_size=97,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=20,
    max_position_embeddings=19,
    type_vocab_size=3,
)
_hf(
    "bert",
    "BertForMaskedLM",
    _text(97),
    9,
    f"{_LAYERS}; the decoder is the embedding, so what the head's transform writes is the residual stream too",
    **_BERT,
)
_hf(
    "bert_untied",
    "BertForMaskedLM",
    _text(97),
    10,
    f"{_LAYERS} + mlm (the head's transform, read by a decoder of its own)",
    tie_word_embeddings=False,
    **_BERT,
)
_hf(
    "vit",
    "ViTForImageClassification",
    _image(12),
    9,
    _LAYERS,
    hidden_size=30,
    num_hidden_layers=2,
    num_attention_heads=5,
    intermediate_size=26,
    image_size=12,
    patch_size=4,
    num_labels=7,
)
_hf(
    "gpt2",
    "GPT2LMHeadModel",
    _text(53, use_cache=False),
    9,
    _LAYERS,
    vocab_size=53,
    n_embd=28,
    n_layer=2,
    n_head=4,
    n_inner=22,
    n_positions=17,
    bos_token_id=0,
    eos_token_id=0,
)
_hf(
    "llama",
    "LlamaForCausalLM",
    _text(61, use_cache=False),
    9,
    "residual + 2 × (kv + query group + ov + ff); qk held by RoPE",
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=20,
    max_position_embeddings=32,
)
_OPT = dict(
    vocab_size=67,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    ffn_dim=26,
    max_position_embeddings=16,
)
_hf("opt", "OPTForCausalLM", _text(67, use_cache=False), 9, _LAYERS, **_OPT)
_hf(
    "opt_projected",
    "OPTForCausalLM",
    _text(67, use_cache=False),
    10,
    f"embedding (of another width, read by the tied head) + {_LAYERS}",
    word_embed_proj_dim=20,
    do_layer_norm_before=False,
    **_OPT,
)
_hf(
    "biogpt",
    "BioGptForCausalLM",
    _text(47, use_cache=False),
    9,
    _LAYERS,
    vocab_size=47,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=26,
    max_position_embeddings=16,
)
_hf(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _text(71, use_cache=False),
    9,
    "residual + 2 × (heads + the half of qk that RoPE does not rotate + ov + ff)",
    vocab_size=71,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=26,
    rotary_pct=0.5,
    max_position_embeddings=32,
)
_PHI = dict(
    vocab_size=73,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
    original_max_position_embeddings=32,
    pad_token_id=0,
    eos_token_id=0,
)
_hf(
    "phi3",
    "Phi3ForCausalLM",
    _text(73, use_cache=False),
    9,
    "residual + 2 × (kv + query group + ov + ff); qk held by RoPE; qkv and gate-up are fused",
    hidden_size=24,
    intermediate_size=22,
    **_PHI,
)
_hf(
    "phi3_partial",
    "Phi3ForCausalLM",
    _text(73, use_cache=False),
    11,
    "residual + 2 × (kv + query group + the third of qk that RoPE does not rotate, one order per kv head + ov + ff)",
    hidden_size=36,
    intermediate_size=22,
    partial_rotary_factor=0.67,
    **_PHI,
)


def _sequence_to_sequence() -> dict[str, Any]:
    return {"input_ids": tokens(59, 7, lowest=2), "decoder_input_ids": tokens(59, 5, seed=1), "use_cache": False}


def _untie(*names: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name in names:
            owner = model.get_submodule(name)
            owner.weight = nn.Parameter(owner.weight.detach().clone())

    return change


_T5 = dict(
    vocab_size=59,
    d_model=28,
    d_kv=5,
    d_ff=22,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    pad_token_id=0,
    decoder_start_token_id=0,
)
_T5_COUNT = (
    "encoder heads (one bias for all layers) + decoder heads (likewise) + 2 × cross heads + 6 × (qk + ov) + 4 × ff"
)
_STREAM = "one residual, as one embedding serves both stacks"
_hf("t5", "T5ForConditionalGeneration", _sequence_to_sequence, 21, f"{_STREAM} + {_T5_COUNT}", **_T5)
_hf(
    "t5_v1_1",
    "T5ForConditionalGeneration",
    _sequence_to_sequence,
    21,
    f"{_STREAM}, though the head is untied + {_T5_COUNT}, gated",
    _untie("lm_head"),
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    **_T5,
)
_hf(
    "t5_separate",
    "T5ForConditionalGeneration",
    _sequence_to_sequence,
    22,
    f"{_T5_COUNT} + encoder residual + decoder residual (it has an embedding and a head of its own)",
    _untie("lm_head", "decoder.embed_tokens"),
    **_T5,
)


def _image_and_text() -> dict[str, Any]:
    ids = tokens(44, 7, lowest=3)
    ids[0, 4], ids[1, 6] = 44, 44  # the end token, whose hidden state is the text embedding
    return {"input_ids": ids, "pixel_values": reals((3, 8, 8))[0]}


_hf(
    "clip",
    "CLIPModel",
    _image_and_text,
    18,
    "2 towers × (residual + 2 × (heads + qk + ov + ff)); the embeddings are outputs: held",
    text_config=dict(
        vocab_size=45,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=26,
        max_position_embeddings=13,
        bos_token_id=0,
        eos_token_id=44,
        pad_token_id=1,
    ),
    vision_config=dict(
        hidden_size=30, num_hidden_layers=2, num_attention_heads=5, intermediate_size=22, image_size=8, patch_size=4
    ),
    projection_dim=18,
)
_hf(
    "resnet_basic",
    "ResNetForImageClassification",
    _image(32),
    6,
    "2 × (stream of a stage + 2 × hidden); the stem writes the first stage's stream",
    embedding_size=6,
    hidden_sizes=[6, 10],
    depths=[2, 2],
    layer_type="basic",
    num_labels=7,
)
_hf(
    "resnet_bottleneck",
    "ResNetForImageClassification",
    _image(32),
    11,
    "stem + 2 × (stream of a stage + 2 blocks × 2 hidden); every stage begins with a shortcut convolution",
    embedding_size=7,
    hidden_sizes=[12, 20],
    depths=[2, 2],
    layer_type="bottleneck",
    num_labels=8,
)
_hf(
    "convnext",
    "ConvNextForImageClassification",
    _image(32),
    5,
    "2 streams (with norms, depthwise kernels and layer scales) + 3 × ff",
    hidden_sizes=[8, 10],
    depths=[2, 1],
    num_stages=2,
    patch_size=4,
    num_labels=7,
)
_hf(
    "mobilenet_v2",
    "MobileNetV2ForImageClassification",
    _image(64),
    25,
    "first convolution (with its depthwise) + 7 streams (of widths 2, 3, 4, 8, 12, 20, 40) + 16 × expansion + last "
    "convolution",
    depth_multiplier=0.125,
    depth_divisible_by=1,
    min_depth=2,
    expand_ratio=3.0,
    finegrained_output=False,
    image_size=64,
    num_labels=7,
)
_hf(
    "efficientnet",
    "EfficientNetForImageClassification",
    _image(32),
    14,
    "stem (the first block does not expand) + 3 streams + 4 × expansion + 5 × squeeze + last convolution",
    width_coefficient=0.25,
    depth_coefficient=1.0,
    depth_divisor=1,
    in_channels=[32, 16, 24],
    out_channels=[16, 24, 40],
    strides=[1, 2, 2],
    kernel_sizes=[3, 3, 5],
    num_block_repeats=[1, 2, 2],
    expand_ratios=[1, 3, 3],
    squeeze_expansion_ratio=0.5,
    hidden_dim=320,
    image_size=32,
    num_labels=7,
)
_hf(
    "mamba",
    "MambaForCausalLM",
    _text(43, use_cache=False),
    7,
    "residual + 2 × (inner channels, of the gate too + states + time step rank)",
    vocab_size=43,
    hidden_size=24,
    num_hidden_layers=2,
    state_size=5,
    time_step_rank=3,
    residual_in_fp32=False,
)
_hf(
    "swin",
    "SwinForImageClassification",
    _image(32),
    18,
    "2 streams (merging patches lays the first end to end 4 times) + 4 × (heads with their bias table + qk + ov + ff)",
    image_size=32,
    patch_size=4,
    embed_dim=12,
    depths=[2, 2],
    num_heads=[3, 4],
    window_size=4,
    mlp_ratio=1.5,
    num_labels=7,
)


# --- plain modules ---------------------------------------------------------------------------------------------------


def _zoo(
    name: str, inputs: Callable[[], tuple[Tensor, ...]], free: int, why: str, *args: Any, **kwargs: Any
) -> Callable[[Any], Any]:
    """Add the decorated module to the zoo."""

    def add(cls: Any) -> Any:
        def build() -> nn.Module:
            torch.manual_seed(0)
            return randomise(cls(*args, **kwargs), torch.Generator().manual_seed(1), inputs())

        MODULES[name] = Family(build, inputs, free, why)
        return cls

    return add


def _reals(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: reals(*shapes)


def _head(width: int, labels: int) -> tuple[nn.Module, ...]:
    """Global average pooling and a linear map."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, labels)


def _conv(a: int, b: int, kernel: int = 3, **more: Any) -> tuple[nn.Module, ...]:
    """Convolution, batch norm, ReLU."""
    more = {"padding": kernel // 2, "bias": False} | more
    return nn.Conv2d(a, b, kernel, **more), nn.BatchNorm2d(b), nn.ReLU()


@_zoo("mlp", _reals((5,)), 2, "2 hidden layers, batch norms with them")
class MLP(nn.Sequential):
    def __init__(self) -> None:
        hidden = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU()
        super().__init__(*hidden, nn.Linear(9, 4))


@_zoo("vgg", _reals((3, 6, 6)), 3, "2 convolutions + hidden linear; the flattened pixels are held, channels are not")
class VGG(nn.Sequential):
    def __init__(self) -> None:
        features = *_conv(3, 6), *_conv(6, 8), nn.MaxPool2d(2), nn.Flatten()
        super().__init__(*features, nn.Linear(8 * 9, 10), nn.ReLU(), nn.Linear(10, 4))


@_zoo("squeeze_excite", _reals((3, 6, 6)), 3, "stream (its gates with it) + hidden convolution + squeeze")
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, 8))
        self.body = nn.Sequential(*_conv(8, 6), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.reduce, self.expand = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.head = nn.Sequential(*_head(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        gate = self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(F.relu(x + y * gate))


class DenseLayer(nn.Module):
    def __init__(self, width: int, middle: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, middle, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(middle), nn.Conv2d(middle, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


@_zoo(
    "densenet", _reals((3, 8, 8)), 8, "stem + 3 × (bottleneck + growth) + transition; concatenated features stay apart"
)
class DenseNet(nn.Sequential):
    def __init__(self) -> None:
        first = nn.Conv2d(3, 6, 3, padding=1), DenseLayer(6, 7, 4), DenseLayer(10, 8, 4)
        transition = nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 9, 1), nn.AvgPool2d(2)
        super().__init__(*first, *transition, DenseLayer(9, 11, 5), nn.BatchNorm2d(14), nn.ReLU(), *_head(14, 3))


@_zoo("group_norm", _reals((3, 5, 5)), 4, "2 × (groups + channels in groups)")
class GroupNormed(nn.Sequential):
    def __init__(self) -> None:
        first = nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU()
        super().__init__(*first, nn.Conv2d(12, 10, 3), nn.GroupNorm(2, 10), nn.ReLU(), *_head(10, 4))


@_zoo("group_norm_nested", _reals((3, 5, 5)), 3, "2 groups + 2 groups in each + 3 channels in each of those")
class NestedGroupNorms(nn.Sequential):
    def __init__(self) -> None:
        norms = nn.GroupNorm(2, 12), nn.Tanh(), nn.GroupNorm(4, 12), nn.ReLU()
        super().__init__(nn.Conv2d(3, 12, 3), *norms, *_head(12, 4))


@_zoo("instance_norm", _reals((3, 6, 6)), 2, "2 convolutions; one group, or one channel in each, restricts nothing")
class InstanceNormed(nn.Sequential):
    def __init__(self) -> None:
        first = nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU()
        super().__init__(*first, nn.Conv2d(6, 7, 3), nn.GroupNorm(1, 7), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3))


@_zoo("autoencoder", _reals((1, 8, 8)), 3, "3 hidden convolutions, two of them before a transposed one")
class Autoencoder(nn.Sequential):
    def __init__(self) -> None:
        down = nn.Conv2d(1, 6, 4, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 4, 2, 1), nn.ReLU()
        super().__init__(
            *down, nn.ConvTranspose2d(8, 5, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(5, 1, 4, 2, 1), nn.Sigmoid()
        )


@_zoo("unet", _reals((3, 6, 6)), 4, "skip + bottom + up + last hidden; the concatenation keeps skip and up apart")
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Sequential(*_conv(3, 6)), nn.Sequential(nn.MaxPool2d(2), *_conv(6, 8))
        self.up, self.out = nn.ConvTranspose2d(8, 5, 2, 2), nn.Sequential(*_conv(11, 7), nn.Conv2d(7, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([self.up(self.bottom(skip)), skip], dim=1))


@_zoo("grouped_conv", _reals((3, 5, 5)), 4, "groups + inputs in groups + outputs in groups + last convolution")
class GroupedConv(nn.Sequential):
    def __init__(self) -> None:
        grouped = nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 15, 3, padding=1, groups=3), nn.ReLU()
        super().__init__(*grouped, nn.Conv2d(15, 7, 1), nn.ReLU(), *_head(7, 4))


@_zoo("depthwise_separable", _reals((3, 6, 6)), 2, "2 widths; depthwise kernels go with them")
class DepthwiseSeparable(nn.Sequential):
    def __init__(self) -> None:
        first = *_conv(3, 6), *_conv(6, 6, groups=6), *_conv(6, 9, 1)
        super().__init__(*first, *_conv(9, 9, groups=9, stride=2), *_head(9, 4))


@_zoo("depth_multiplier", _reals((3, 5, 5)), 3, "channels + 3 outputs for each channel + last convolution")
class DepthMultiplier(nn.Sequential):
    def __init__(self) -> None:
        first = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 15, 3, groups=5), nn.ReLU()
        super().__init__(*first, nn.Conv2d(15, 7, 1), nn.ReLU(), *_head(7, 4))


@_zoo(
    "channel_shuffle",
    _reals((3, 5, 5)),
    5,
    "groups of the first (b) + its inputs in groups + groups of the second (a) + its outputs in groups + the channels "
    "that remain between them: 2 in each (b, a)",
)
class ChannelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.first, self.second = nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 15, 1, groups=3)
        self.head = nn.Sequential(*_head(15, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.stem(x))))
        x = x.view(x.shape[0], 2, 6, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.head(F.relu(self.second(x)))


@_zoo("pixel_shuffle", _reals((1, 4, 4)), 2, "hidden + the channels before the shuffle; their 4 pixels are held")
class PixelShuffled(nn.Sequential):
    def __init__(self) -> None:
        first = nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 12, 3, padding=1), nn.PixelShuffle(2)
        super().__init__(*first, nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1))


@_zoo(
    "channel_convolution", _reals((3, 5, 5)), 1, "last convolution; a convolution along the channels holds the others"
)
class ChannelConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.along = nn.Sequential(*_conv(3, 8)), nn.Conv1d(1, 1, 3, padding=1)
        self.rest = nn.Sequential(*_conv(8, 6), *_head(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.along(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return self.rest(x * gate[:, :, None, None])


class BasicBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or a != b:
            self.downsample = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


@_zoo("resnet", _reals((3, 8, 8)), 6, "2 × (stream + 2 × hidden)")
class ResNet(nn.Sequential):
    def __init__(self) -> None:
        stages = BasicBlock(6, 6), BasicBlock(6, 6), BasicBlock(6, 8, 2), BasicBlock(8, 8)
        super().__init__(*_conv(3, 6), *stages, *_head(8, 4))


@_zoo("global_pool", _reals((3, 6, 6)), 2, "2 convolutions")
class GlobalPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.adaptive_max_pool2d(F.relu(self.b(F.gelu(self.a(x)))), 1).flatten(1))


@_zoo("prelu", _reals((3, 6, 6)), 2, "2 convolutions; the slopes of the first go with it")
class PReLUNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 5, 3), nn.PReLU(), *_head(5, 4))


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, n, width))


class FusedBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.gamma = (
            nn.LayerNorm(width),
            FusedAttention(width, heads),
            nn.Parameter(ones(width)),
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


@_zoo("fused_vit", _reals((3, 12, 12)), 9, _LAYERS, depth=2)
@_zoo(
    "registers",
    _reals((3, 12, 12)),
    6,
    "residual + heads + qk + ov + ff + the 4 register tokens, which have no positions and are not read out",
    depth=1,
    registers=4,
)
class FusedViT(nn.Module):
    def __init__(self, depth: int, registers: int = 0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(ones(1, 1, 24)), nn.Parameter(ones(1, 10, 24))
        self.registers = nn.Parameter(ones(1, registers, 24)) if registers else None
        self.blocks = nn.Sequential(*(FusedBlock(24, 3, 20) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (
            y.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for y in self.c_attn(self.ln_1(x)).split(c, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.ln_2(x))


@_zoo("char_gpt", lambda: (tokens(23, 7),), 9, f"{_LAYERS}; the head is the embedding")
class CharGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(23, 24), nn.Embedding(9, 24)
        self.h = nn.ModuleList([CausalBlock(24, 4, 20) for _ in range(2)])
        self.ln_f, self.head = nn.LayerNorm(24, bias=False), nn.Linear(24, 23, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


@_zoo("weight_norm", _reals((5,)), 2, "2 hidden layers; each length belongs to a row")
class WeightNormed(nn.Sequential):
    def __init__(self) -> None:
        norm = torch.nn.utils.parametrizations.weight_norm
        first = norm(nn.Linear(5, 8)), nn.ReLU(), norm(nn.Linear(8, 7)), nn.Tanh()
        super().__init__(*first, norm(nn.Linear(7, 3)))


@_zoo("weight_norm_old", _reals((3, 6, 6)), 2, "2 convolutions; each length belongs to an output channel")
class WeightNormedByHook(nn.Sequential):
    def __init__(self) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, but in many checkpoints
            a, b = (nn.utils.weight_norm(nn.Conv2d(*sizes, 3)) for sizes in ((3, 6), (6, 7)))
        super().__init__(a, nn.ReLU(), b, nn.ReLU(), *_head(7, 4))


@_zoo("mha", _reals((6, 5)), 5, "embedding + heads + qk + ov + output projection")
@_zoo("mha_weights", _reals((6, 5)), 5, "as above: the returned weights are means over the heads", weights=True)
class MHA(nn.Module):
    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.embed, self.out, self.weights = nn.Linear(5, 12), nn.Linear(12, 4), weights
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        y, weights = self.attn(x, x, x)
        return (self.out(y), weights) if self.weights else self.out(y)


@_zoo("encoder_post", _reals((6, 5)), 9, _LAYERS, norm_first=False)
@_zoo("encoder_pre", _reals((6, 5)), 9, _LAYERS, norm_first=True)
class Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 12), nn.Linear(12, 4)
        layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(x)))


@_zoo("einsum_attention", _reals((6, 5)), 4, "residual + heads + qk + ov")
class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 12), nn.Linear(12, 4)
        self.q, self.k = nn.Parameter(ones(3, 12, 4)), nn.Parameter(ones(3, 12, 4))
        self.v, self.o = nn.Parameter(ones(3, 12, 6)), nn.Parameter(ones(3, 6, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (torch.einsum("bnd,hde->bhne", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhne,bhme->bhnm", q, k).div(4**0.5).softmax(-1)
        return self.out(x + torch.einsum("bhnm,bhme,hed->bnd", weights, v, self.o))


@_zoo("channel_attention", _reals((6, 5)), 4, "residual + heads + units of q and of the output + units of k and of v")
class ChannelAttention(nn.Module):
    """Attention between channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 4)
        self.qkv, self.proj, self.temperature = nn.Linear(12, 36), nn.Linear(12, 12), nn.Parameter(ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (2 * q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        y = (weights @ v).permute(0, 3, 1, 2).reshape(b, n, width)
        return self.out((x + self.proj(y)).mean(1))


@_zoo("rope", _reals((6, 5)), 3, "residual + heads + ov; qk held by rotations of pairs", "rope")
@_zoo("alibi", _reals((6, 5)), 3, "residual + qk in heads + ov in heads; heads have different slopes: held", "alibi")
class PositionedAttention(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.embed, self.out = how, nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.k, self.v, self.o = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * x.new_tensor([1.0, 0.3])
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n = x.shape[1]
        q, k, v = (f(x).view(-1, n, 5, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias: Tensor | float = 0.0
        if self.how == "rope":
            q, k = self.rotate(q), self.rotate(k)
        else:
            distance = torch.arange(n, dtype=x.dtype)[None, :] - torch.arange(n, dtype=x.dtype)[:, None]
            bias = 0.5 ** torch.arange(5, dtype=x.dtype)[:, None, None] * distance
        y = ((q @ k.mT) / 2 + bias).softmax(-1) @ v
        return self.out(x + self.o(y.transpose(1, 2).flatten(2)))


@_zoo("sinusoid", _reals((6, 5)), 1, "ff; constants that vary by feature are added to the stream: held")
class Sinusoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.ff = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * 10.0 ** -torch.arange(0, 2, 0.5)
        x = self.embed(x) + torch.cat([angle.sin(), angle.cos()], -1).to(x)
        return self.out(x + self.ff(self.norm(x)))


@_zoo("latents", _reals((6, 5)), 5, "4 learned queries (their mean is read) + residual + qk + ov + ff")
class Latents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(ones(4, 12))
        self.q, self.k, self.v, self.o = nn.Linear(12, 8), nn.Linear(5, 8), nn.Linear(5, 7), nn.Linear(7, 12)
        self.ff = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 12))
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(self.latents) @ self.k(x).mT / 8**0.5).softmax(-1)
        z = self.latents + self.o(weights @ self.v(x))
        return self.out((z + self.ff(z)).mean(1))


@_zoo(
    "mixer", _reals((3, 8, 8)), 5, "channels + 2 × (hidden of the tokens + hidden of the channels); tokens are pixels"
)
class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def mlp(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Linear(b, a))

        self.patches, self.out = nn.Conv2d(3, 10, 4, 4), nn.Linear(10, 5)
        self.norms = nn.ModuleList([nn.LayerNorm(10) for _ in range(4)])
        self.mlps = nn.ModuleList([mlp(4, 6), mlp(10, 9), mlp(4, 7), mlp(10, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for i, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            x = x + (mlp(norm(x)) if i % 2 else mlp(norm(x).mT).mT)
        return self.out(x.mean(1))


@_zoo("experts", _reals((5,)), 2, "experts (with their gates) + units in experts")
class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.bias = nn.Linear(5, 4), nn.Parameter(ones(4, 5, 6)), nn.Parameter(ones(4, 6))
        self.down = nn.Parameter(ones(4, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("bi,eih->beh", x, self.up) + self.bias)
        return torch.einsum("be,beh,eho->bo", self.gate(x).softmax(-1), hidden, self.down)


@_zoo("branches", _reals((5,)), 3, "hidden of each branch + their sum")
class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 9))
        self.b = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 9))
        self.out = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x) + self.b(x)))


@_zoo("in_place", _reals((5,)), 2, "the sum + the units written beside it")
class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 6), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        F.relu_(y)
        z = x.new_zeros(x.shape[0], 14)
        z[:, :8] = y
        z[:, 8:] = self.c(x)
        z[:, 8:].tanh_()
        return self.out(z)


@_zoo("glu", _reals((5,)), 2, "2 gated layers, the halves of each permute alike")
class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 14), nn.Linear(7, 18), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).chunk(2, dim=-1)
        return self.out(F.glu(self.b(a * b.sigmoid())))


@_zoo("tied_to_input", _reals((6,)), 1, "second hidden layer; the input is added to the first: held")
class TiedToInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(x + F.relu(self.a(x)))))


@_zoo("shared_linear", _reals((5,)), 1, "hidden; one map applied twice reads and writes it")
class SharedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.out = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.shared(self.shared(self.a(x).tanh()).tanh()))


@_zoo("tied_autoencoder", _reals((5,)), 1, "hidden; one matrix writes and, transposed, reads it")
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(ones(7, 5))
        self.hidden_bias, self.bias = nn.Parameter(ones(7)), nn.Parameter(ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.kernel, self.hidden_bias)), self.kernel.t(), self.bias)


@_zoo("siamese", _reals((5,), (5,)), 2, "hidden + embedding, which the last map reads twice")
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 8), nn.Tanh())
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.cat([self.encoder(x), self.encoder(y)], -1))


@_zoo("bilinear", _reals((5,), (4,)), 3, "both factors + the product")
class BilinearNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(4, 7)
        self.product, self.out = nn.Bilinear(6, 7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(F.relu(self.product(F.relu(self.a(x)), F.relu(self.b(y)))))


@_zoo("maxout", _reals((5,)), 2, "units + pieces in units")
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).view(-1, 4, 3).amax(-1))


@_zoo("rnn", _reals((6, 5)), 1, "hidden state")
class RNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.out = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 7, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(self.i(x[:, t]) + self.h(h))
        return self.out(h)


@_zoo("lstm", _reals((4, 5)), 1, "hidden and cell state, with their 4 gates")
class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.out = nn.Linear(5, 28), nn.Linear(7, 28), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 7)
        for step in x.unbind(1):
            i, f, g, o = (self.i(step) + self.h(h)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


@_zoo("gru_cell", _reals((4, 5)), 1, "hidden state, with its 3 gates")
class GRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.out(h)


@_zoo("bag", lambda: (tokens(11, 5),), 1, "embedding")
class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids).mean(1))


@_zoo("layer_norm_2d", _reals((3, 5)), 2, "both axes of the norm, one from either side")
class LayerNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.out = nn.Linear(5, 6), nn.Linear(3, 4), nn.LayerNorm([6, 4]), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh().transpose(1, 2))
        return self.out(F.gelu(self.norm(x)).flatten(1))


# --- modules composed at random --------------------------------------------------------------------------------------

_SIZES = st.sampled_from((2, 3, 4, 4, 6, 6, 8, 12))
_MIXING = ("attention", "conv", "another conv", "depthwise", "conv transpose")
_ACTIVATIONS = st.sampled_from((nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU))


class Fn(nn.Module):
    """A function as a module, with a text to print."""

    def __init__(self, text: str, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.text, self.fn = text, fn

    def extra_repr(self) -> str:
        return self.text

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


class Join(nn.Module):
    """The outputs of several branches on the same input, combined."""

    def __init__(self, how: str, *branches: nn.Module) -> None:
        super().__init__()
        self.how, self.branches = how, nn.ModuleList(branches)

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "twice":
            return self.branches[0](self.branches[0](x))
        if self.how == "x + f(x)":
            return x + self.branches[0](x)
        if self.how == "x += f(x)":
            x = x.clone()
            x += self.branches[0](x)
            return x
        if self.how == "cat [x, f(x)]":
            return torch.cat([x, self.branches[0](x)], 1)
        a, b = (branch(x) for branch in self.branches)
        return {"a + b": lambda: a + b, "a σ(b)": lambda: a * b.sigmoid(), "cat [a, b]": lambda: torch.cat([a, b], 1)}[
            self.how
        ]()


class Vector(nn.Module):
    """A parameter that is multiplied with the input, or added to it."""

    def __init__(self, how: str, *shape: int) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.ones(shape))

    def extra_repr(self) -> str:
        return f"{self.how} {tuple(self.weight.shape)}"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if self.how == "×" else x + self.weight


class Token(nn.Module):
    """A learned token before the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)


class Excite(nn.Module):
    def __init__(self, width: int, squeeze: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(width, squeeze), nn.Linear(squeeze, width)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.flatten(2).mean(2) if x.dim() > 2 else x
        gate = self.expand(F.relu(self.reduce(squeezed))).sigmoid()
        return x * gate.view(*gate.shape, *[1] * (x.dim() - 2))


class SelfAttention(nn.Module):
    """Self-attention with projections that are apart, fused, or shared by queries and keys."""

    def __init__(self, how: str, width: int, heads: int, qk: int, ov: int) -> None:
        super().__init__()
        self.how, self.heads, self.sizes = how, heads, (qk * heads, qk * heads, ov * heads)
        if how == "fused":
            self.qkv = nn.Linear(width, sum(self.sizes))
        else:
            self.q, self.v = nn.Linear(width, qk * heads), nn.Linear(width, ov * heads)
            self.k = self.q if how == "shared" else nn.Linear(width, qk * heads, bias=False)
        self.o = nn.Linear(ov * heads, width)

    def extra_repr(self) -> str:
        return f"{self.how}, {self.heads} heads"

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.sizes, -1) if self.how == "fused" else (self.q(x), self.k(x), self.v(x))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class Tied(nn.Module):
    """One matrix that writes a hidden layer and, transposed, reads it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).tanh(), self.weight.t())


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _general_steps(draw: Any, shape: tuple[int, ...]) -> dict[str, Callable[[], nn.Module]]:
    """Candidate modules for tensors of any shape (without the batch dimension)."""
    wide, last = shape[0], shape[-1]
    kept = draw(st.integers(1, wide))
    groups = draw(st.sampled_from(_divisors(wide)))

    def shuffle(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    def chunked(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * b.sigmoid()

    def written(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :kept] = x[:, :kept].tanh()
        y[:, kept:] = x[:, kept:]
        return y

    steps: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(last, draw(_SIZES), bias=draw(st.booleans())),
        "activation": lambda: draw(_ACTIVATIONS)(),
        "in place": lambda: Fn("relu_(clone)", lambda x: F.relu_(x.clone())),
        "scale": lambda: Vector("×", last),
        "shift": lambda: Vector("+", *shape),
        "softmax": lambda: Fn("softmax(-1)", lambda x: x.softmax(-1)),
        "slice": lambda: Fn(f"[:, :{kept}]", lambda x: x[:, :kept]),
        "write": lambda: Fn(f"[:, :{kept}].tanh_()", written),
        "flip": lambda: Fn("flip(1)", lambda x: x.flip(1)),
        "shuffle": lambda: Fn(f"shuffle {groups} groups", shuffle),
        "constant": lambda: Fn("+ arange", lambda x: x + torch.arange(last, dtype=x.dtype) / last),
        "prelu": lambda: nn.PReLU(wide),
        "tied": lambda: Tied(last, draw(_SIZES)),
    }
    if last > 1:
        steps["layer norm"] = lambda: nn.LayerNorm(last)
    if math.prod(shape) // groups > 1:
        steps["group norm"] = lambda: nn.GroupNorm(groups, wide)
    if wide % 2 == 0:
        steps["chunk"] = lambda: Fn("a, b = chunk(2); a σ(b)", chunked)
    return steps


def _vector_steps(draw: Any, shape: tuple[int, ...]) -> dict[str, Callable[[], nn.Module]]:
    """Candidate modules for vectors."""
    (width,) = shape
    inner = draw(st.sampled_from(_divisors(width)))
    return {
        "batch norm": lambda: nn.BatchNorm1d(width),
        "unflatten": lambda: nn.Unflatten(1, (width // inner, inner)),
        "means": lambda: Fn(f"unflatten({inner}).mean(-1)", lambda x: x.unflatten(1, (-1, inner)).mean(-1)),
        "maxima": lambda: Fn(f"unflatten({inner}).amax(1)", lambda x: x.unflatten(1, (-1, inner)).amax(1)),
        "twice": lambda: Join("twice", nn.Sequential(nn.Linear(width, width), draw(_ACTIVATIONS)())),
        "gate": lambda: Excite(width, draw(_SIZES)),
    }


def _sequence_steps(draw: Any, shape: tuple[int, ...]) -> dict[str, Callable[[], nn.Module]]:
    """Candidate modules for sequences of vectors."""
    n, width = shape
    inner = draw(st.sampled_from(_divisors(width)))

    def attention() -> nn.Module:
        how = draw(st.sampled_from(("apart", "fused", "shared")))
        sizes = [draw(st.integers(1, 4)) for _ in range(3)]
        if how == "fused" and draw(st.booleans()):
            sizes[2] = sizes[1]
        attention = SelfAttention(how, width, *sizes)
        return Join("x + f(x)", attention) if draw(st.booleans()) else attention

    steps: dict[str, Callable[[], nn.Module]] = {
        "batch norm": lambda: nn.BatchNorm1d(n),
        "transpose": lambda: Fn("transpose(1, 2)", lambda x: x.transpose(1, 2)),
        "attention": attention,
        "flatten": lambda: nn.Flatten(),
        "mean": lambda: Fn("mean(1)", lambda x: x.mean(1)),
        "mean of features": lambda: Fn("mean(-1)", lambda x: x.mean(-1)),
        "first": lambda: Fn("[:, 0]", lambda x: x[:, 0]),
        "token": lambda: Token(width),
        "heads": lambda: Fn(f"heads of {inner}", lambda x: x.unflatten(-1, (-1, inner)).transpose(1, 2).flatten(1, 2)),
        "unflatten": lambda: nn.Unflatten(2, (width // inner, inner)),
        "softmax of tokens": lambda: Fn("softmax(1)", lambda x: x.softmax(1)),
        "twice": lambda: Join("twice", nn.Linear(width, width)),
        "excite": lambda: Excite(n, draw(_SIZES)),
    }
    if n * width > 1:
        steps["layer norm of both"] = lambda: nn.LayerNorm([n, width])
    return steps


def _image_steps(draw: Any, shape: tuple[int, ...]) -> dict[str, Callable[[], nn.Module]]:
    """Candidate modules for images."""
    channels = shape[0]
    groups = draw(st.sampled_from(_divisors(channels)))

    def conv() -> nn.Module:
        kernel, stride = draw(st.sampled_from((1, 3))), draw(st.sampled_from((1, 1, 2)))
        out = draw(st.sampled_from([s for s in (2, 3, 4, 6, 8, 12) if s % groups == 0] or [channels]))
        return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=draw(st.booleans()))

    return {
        "conv": conv,
        "another conv": conv,
        "depthwise": lambda: nn.Conv2d(channels, channels * draw(st.integers(1, 2)), 3, padding=1, groups=channels),
        "conv transpose": lambda: nn.ConvTranspose2d(channels, draw(st.sampled_from((2, 3, 4))), 2, 1),
        "batch norm": lambda: nn.BatchNorm2d(channels),
        "max pool": lambda: nn.MaxPool2d(2, ceil_mode=True),
        "mean pool": lambda: nn.AdaptiveAvgPool2d(draw(st.integers(1, 2))),
        "means": lambda: Fn("mean((2, 3))", lambda x: x.mean((2, 3))),
        "flatten": lambda: nn.Flatten(),
        "flatten pixels": lambda: nn.Flatten(2),
        "patches": lambda: Fn("flatten(2).transpose(1, 2)", lambda x: x.flatten(2).transpose(1, 2)),
        "channels last": lambda: Fn("permute(0, 2, 3, 1)", lambda x: x.permute(0, 2, 3, 1)),
        "scale of channels": lambda: Vector("×", channels, 1, 1),
        "excite": lambda: Excite(channels, draw(_SIZES)),
    }


def _shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(module.double().eval()(torch.zeros(2, *shape, dtype=torch.float64)).shape[1:])


def _fit(shape: tuple[int, ...], target: tuple[int, ...]) -> list[nn.Module]:
    """Modules that map one shape to another, as locally as possible."""
    if shape == target:
        return []
    if len(shape) == len(target) and shape[:-1] == target[:-1]:
        return [nn.Linear(shape[-1], target[-1])]
    if len(shape) == len(target) == 3 and shape[1:] == target[1:]:
        return [nn.Conv2d(shape[0], target[0], 1)]
    return [nn.Flatten(), nn.Linear(math.prod(shape), math.prod(target)), nn.Unflatten(1, target)]


def _compose(draw: Any, shape: tuple[int, ...], depth: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    """Draw a chain of modules for inputs of a shape; return it and the shape of its output."""
    chain: list[nn.Module] = []
    for _ in range(draw(st.sampled_from((4, 5, 6, 7, 3, 2, 1))) if depth == 0 else draw(st.integers(1, 3))):
        own, any_shape = (
            (_vector_steps, _sequence_steps, _image_steps)[len(shape) - 1](draw, shape),
            _general_steps(draw, shape),
        )
        mixing = [k for k in _MIXING if k in own] or ["linear"]  # drawn often, or hidden layers would be rare
        steps = own | any_shape
        if depth < 2:

            def branch(target: tuple[int, ...] | None, shape: tuple[int, ...] = shape) -> nn.Sequential:
                body, end = _compose(draw, shape, depth + 1)
                return nn.Sequential(*body, *(_fit(end, target) if target is not None else ()))

            def beside(shape: tuple[int, ...] = shape) -> nn.Module:
                target = (draw(_SIZES), *shape[1:])
                how = draw(st.sampled_from(("cat [x, f(x)]", "cat [a, b]", "a + b", "a σ(b)")))
                return Join(how, *(branch(target) for _ in range(1 if "x" in how else 2)))

            steps |= {
                "residual": lambda shape=shape: Join(draw(st.sampled_from(("x + f(x)", "x += f(x)"))), branch(shape)),
                "branches": beside,
            }
        joins = ["residual", "branches"] if depth < 2 else []
        kinds = [mixing, mixing, sorted(any_shape), sorted(own), sorted(own), *([joins] if joins and chain else [])]
        names = draw(st.sampled_from(kinds))
        step = steps[draw(st.sampled_from(names))]()
        after = _shape(step, shape)
        if not 0 < math.prod(after) <= 400 or len(after) > 3:
            continue
        chain.append(step)
        shape = after
    return chain, shape


class Composed(nn.Sequential):
    """A random composition; `structure` describes it, and `seed` made its parameters."""

    structure: str
    seed: int


@st.composite
def modules(draw: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Compose (module, inputs) at random, with small sizes of which many are equal."""
    side = st.integers(2, 4)
    shape = draw(st.one_of(st.tuples(_SIZES), st.tuples(side, _SIZES), st.tuples(_SIZES, side, side)))
    start = shape
    body, shape = _compose(draw, shape, 0)
    if draw(st.integers(0, 4)):  # without a head nearly all axes are outputs, and held
        pooled = draw(st.sampled_from(("", "first", "last"))) if len(shape) > 1 else ""
        if pooled:
            first = pooled == "first"
            axes = tuple(range(2, len(shape) + 1)) if first else tuple(range(1, len(shape)))
            body.append(Fn(f"mean({axes})", lambda x: x.mean(axes)))
            shape = shape[:1] if first else shape[-1:]
        body += [nn.Flatten(), nn.Linear(math.prod(shape), draw(st.integers(1, 4)))]
    model = Composed(*body)
    model.seed = draw(st.integers(0, 2**16))
    model.structure = f"inputs {start}, seed {model.seed}: {model}"
    randomise(model, torch.Generator().manual_seed(model.seed))
    inputs = reals(start, seed=model.seed)
    out = compute_outputs(model, inputs)[0]
    assume(bool(torch.isfinite(out).all()) and bool(out.any()))
    return model, inputs


def main() -> None:
    import time

    began = time.monotonic()
    for name, family in [*HF.items(), *MODULES.items()]:
        model, inputs = family.build(), family.inputs()
        out, matters = compute_outputs(model, inputs)[0], row_order_matters(model, inputs)
        insensitive = [key for key, changes in matters.items() if not changes]
        assert torch.isfinite(out).all(), name
        assert out.any(), name
        size = sum(p.numel() for p in model.parameters())
        print(f"{name:20} {size:7} parameters, outputs ~ {out.std():8.3g}, {family.free:2} free: {family.why}")
        if insensitive:
            count = f"{len(insensitive)} of {len(matters)}"
            print(f"{'':20} permuting the rows of {count} changes no output: {', '.join(insensitive)}")
    print(f"{len(HF)} + {len(MODULES)} in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
