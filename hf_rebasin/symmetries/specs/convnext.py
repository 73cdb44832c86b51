"""ConvNeXt: one stream per stage, through depthwise convolutions, channel LayerNorm and scaled MLP branches."""

MODEL_TYPES = ("convnext",)
PREFIX = "convnext."


def table(config):
    layer = "encoder.stages.*.layers.*."
    last = f"stage.{len(config.depths) - 1}"
    rows = {
        "embeddings.patch_embeddings.weight": "stage.0, _, _, _",
        "embeddings.patch_embeddings.bias": "stage.0",
        "embeddings.layernorm.{weight,bias}": "stage.0",
        layer + "dwconv.weight": "stage.*, _, _, _",
        layer + "layernorm.{weight,bias}": "stage.*",
        layer + "pwconv1.weight": "ff.*.*, stage.*'",
        layer + "pwconv1.bias": "ff.*.*",
        layer + "pwconv2.weight": "stage.*, ff.*.*'",
        layer + "{dwconv,pwconv2}.bias": "stage.*",
        layer + "layer_scale_parameter": "stage.*~",
        "layernorm.{weight,bias}": last,
        "classifier.weight": f"label, {last}'",
        "classifier.bias": "label",
        "hidden_states_norms.stage*.{weight,bias}": "_",
    }
    for stage in range(1, len(config.depths)):  # a stage first reads the previous stage
        start, before = f"encoder.stages.{stage}.downsampling_layer.", f"stage.{stage - 1}"
        rows[start + "0.{weight,bias}"] = before
        rows[start + "1.weight"] = f"stage.{stage}, {before}', _, _"
        rows[start + "1.bias"] = f"stage.{stage}"
    return rows


def groups(config):
    features = [name.removeprefix("stage") for name in config.out_features or ()]  # the stem shares the first stream
    outputs = {  # classes that output feature maps; an unknown class is treated as a bare model
        "ConvNextForImageClassification": [],
        "ConvNextBackbone": [0 if name == "stem" else int(name) - 1 for name in features],
    }
    bare = [len(config.depths) - 1]
    held = {f"stage.{i}": "held" for i in outputs.get((config.architectures or [None])[0], bare)}
    ff = "scaled" if config.hidden_act == "relu" else "permutation"
    return {"label": "held", "stage.*": "permutation", "ff.*.*": ff} | held


_TINY = dict(num_stages=3, hidden_sizes=[8, 12, 16], depths=[2, 1, 2], patch_size=2, image_size=32)
TINY = [
    dict(architectures=["ConvNextForImageClassification"], num_labels=5, **_TINY),
    dict(architectures=["ConvNextForImageClassification"], num_labels=5, layer_scale_init_value=0.0, **_TINY),
    dict(architectures=["ConvNextModel"], **_TINY),
    dict(architectures=["ConvNextBackbone"], out_features=["stage1", "stage3"], **_TINY),
]
