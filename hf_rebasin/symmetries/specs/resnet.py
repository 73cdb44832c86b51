"""ResNet: one stream per stage; BatchNorm follows its convolution; ReLU commutes with positive scales."""

MODEL_TYPES = ("resnet",)
PREFIX = "resnet."


def _conv(key, out, source):
    return {
        f"{key}.convolution.weight": f"{out}~, {source}, _, _",
        f"{key}.normalization.{{weight,bias}}": out,
        f"{key}.normalization.{{running_mean,running_var}}": f"{out}~",
        f"{key}.normalization.num_batches_tracked": "",
    }


def table(config):
    # without a convolution between them, the stem and the first stage are one stream
    joined = config.embedding_size == config.hidden_sizes[0] and not config.downsample_in_first_stage
    stem = "stage.0" if joined else "stem"
    last = 2 if config.layer_type == "bottleneck" else 1
    layer = "encoder.stages.*.layers.*."
    rows = _conv("embedder.embedder", stem, "_")
    rows |= _conv(layer + "layer.0", "mid0.*.*", "stage.*'")
    for i in range(1, last):
        rows |= _conv(layer + f"layer.{i}", f"mid{i}.*.*", f"mid{i - 1}.*.*'")
    rows |= _conv(layer + f"layer.{last}", "stage.*", f"mid{last - 1}.*.*'")
    rows |= _conv(layer + "shortcut", "stage.*", "stage.*'")
    for stage in range(len(config.depths)):  # a stage first reads the previous stage
        start, before = f"encoder.stages.{stage}.layers.0.", f"stage.{stage - 1}'" if stage else f"{stem}'"
        rows[start + "layer.0.convolution.weight"] = f"mid0.{stage}.0~, {before}, _, _"
        rows[start + "shortcut.convolution.weight"] = f"stage.{stage}~, {before}, _, _"
    return rows | {"classifier.1.weight": f"label, stage.{len(config.depths) - 1}'", "classifier.1.bias": "label"}


def groups(config):
    kind = "scaled" if config.hidden_act == "relu" else "permutation"
    outputs = {  # classes that output feature maps; an unknown class is treated as a bare model
        "ResNetForImageClassification": {},
        "ResNetBackbone": {"stem": "held", **{f"stage.{i}": "held" for i in range(len(config.depths))}},
    }
    bare = {f"stage.{len(config.depths) - 1}": "held"}
    held = outputs.get((config.architectures or [None])[0], bare)
    return {"label": "held", "stem": kind, "stage.*": kind, "mid0.*.*": kind, "mid1.*.*": kind} | held


_TINY = dict(embedding_size=8, num_labels=5)
TINY = [
    dict(
        architectures=["ResNetForImageClassification"],
        layer_type="bottleneck",
        hidden_sizes=[16, 24],
        depths=[2, 2],
        **_TINY,
    ),
    dict(
        architectures=["ResNetForImageClassification"],
        layer_type="basic",
        hidden_sizes=[8, 12, 16],
        depths=[2, 2, 1],
        **_TINY,
    ),
    dict(architectures=["ResNetModel"], layer_type="basic", hidden_sizes=[12, 16], depths=[1, 2], embedding_size=8),
]
