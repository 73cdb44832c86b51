"""MobileNetV2: narrow linear streams between wide blocks, whose depthwise convolutions keep their channels."""

from itertools import pairwise

MODEL_TYPES = ("mobilenet_v2",)
PREFIX = "mobilenet_v2."
_WIDTHS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
_STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


def _width(config, channels):
    step, scaled = config.depth_divisible_by, round(channels * config.depth_multiplier)
    width = max(config.min_depth or step, int(scaled + step / 2) // step * step)
    return width + step if width < 0.9 * scaled else width


def _streams(config):
    """Number the streams before every block and after the last: a block with a skip connection keeps its stream."""
    widths, streams, reduction = [_width(config, channels) for channels in _WIDTHS], [0], 2
    for i, full_stride in enumerate(_STRIDES):
        stride = 1 if reduction == config.output_stride else full_stride
        reduction *= stride
        streams.append(streams[-1] if stride == 1 and widths[i] == widths[i + 1] else i + 1)
    return streams


def _norm_rows(keys, axis):
    return {
        f"{keys}.normalization.{{weight,bias}}": axis,
        f"{keys}.normalization.{{running_mean,running_var}}": f"{axis}~",
        f"{keys}.normalization.num_batches_tracked": "",
    }


def table(config):
    streams = _streams(config)
    stem = "first" if config.first_layer_is_expansion else "expanded"
    rows = {
        "conv_stem.first_conv.convolution.weight": "first~, _, _, _",
        "conv_stem.expand_1x1.convolution.weight": "expanded~, first', _, _",
        "conv_stem.conv_3x3.convolution.weight": f"{stem}', 1, _, _",
        "conv_stem.reduce_1x1.convolution.weight": f"stream.0~, {stem}', _, _",
        "layer.*.conv_3x3.convolution.weight": "wide.*', 1, _, _",
        "conv_1x1.convolution.weight": f"last~, stream.{streams[-1]}', _, _",
        "classifier.weight": "label, last'",
        "classifier.bias": "label",
        "segmentation_head.conv_pool.convolution.weight": f"pool~, stream.{streams[-1]}', _, _",
        "segmentation_head.conv_aspp.convolution.weight": f"aspp~, stream.{streams[-1]}', _, _",
        "segmentation_head.conv_projection.convolution.weight": "projection~, pool' + aspp', _, _",
        "segmentation_head.classifier.convolution.weight": "label, projection', _, _",
        "segmentation_head.classifier.convolution.bias": "label",
    }
    for i, (before, after) in enumerate(pairwise(streams)):
        rows[f"layer.{i}.expand_1x1.convolution.weight"] = f"wide.{i}~, stream.{before}', _, _"
        rows[f"layer.{i}.reduce_1x1.convolution.weight"] = f"stream.{after}~, wide.{i}', _, _"
    for stream in dict.fromkeys(streams[1:]):
        written = ",".join(str(i) for i, after in enumerate(streams[1:]) if after == stream)
        rows |= _norm_rows(f"layer.{{{written}}}.reduce_1x1", f"stream.{stream}")
    for keys, axis in (
        ("conv_stem.first_conv", "first"),
        ("conv_stem.{expand_1x1,conv_3x3}", stem),
        ("conv_stem.reduce_1x1", "stream.0"),
        ("layer.*.{expand_1x1,conv_3x3}", "wide.*"),
        ("conv_1x1", "last"),
        *((f"segmentation_head.conv_{part}", part) for part in ("pool", "aspp", "projection")),
    ):
        rows |= _norm_rows(keys, axis)
    return rows


def groups(config):
    # ReLU6 does not commute with scales; a stream has no activation, so it may change sign, too
    wide = "scaled" if config.hidden_act == "relu" else "permutation"
    # a bare model outputs the last feature maps, and so may any other class; the segmentation class does not use them
    free = (config.architectures or [None])[0] == "MobileNetV2ForImageClassification"
    return {
        "label": "held",
        "first": wide,
        "expanded": wide,
        "stream.*": "nonzero",
        "wide.*": wide,
        "last": wide if free else "held",
        "pool": "scaled",
        "aspp": "scaled",
        "projection": "scaled",
    }


_TINY = dict(
    depth_multiplier=0.125,
    depth_divisible_by=1,
    min_depth=2,
    expand_ratio=2.0,
    finegrained_output=False,
    image_size=64,
)
TINY = [
    dict(architectures=["MobileNetV2ForImageClassification"], num_labels=5, **_TINY),
    dict(architectures=["MobileNetV2Model"], first_layer_is_expansion=False, hidden_act="relu", **_TINY),
    dict(architectures=["MobileNetV2ForSemanticSegmentation"], num_labels=5, output_stride=16, **_TINY),
]
