"""ViT and DeiT: pre-LayerNorm encoder, by on-disk names (module names changed in transformers 5.9)."""

MODEL_TYPES = ("vit", "deit")
PREFIX = ("vit.", "deit.")
HEADS = (
    "ViTForImageClassification",
    "ViTForMaskedImageModeling",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForMaskedImageModeling",
)


def sizes(config):
    return {"head.*": config.num_attention_heads}


def table(config):
    layer = "encoder.layer.*."
    return {
        "embeddings.{cls_token,mask_token,distillation_token,position_embeddings}": "_, _, residual",
        "embeddings.patch_embeddings.projection.weight": "residual, _, _, _",
        "embeddings.patch_embeddings.projection.bias": "residual",
        layer + "{layernorm_before,layernorm_after}.weight": "residual~",
        layer + "{layernorm_before,layernorm_after}.bias": "residual",
        layer + "attention.attention.query.weight": "(head.* qk.*), residual'",
        layer + "attention.attention.query.bias": "(head.* qk.*)",
        layer + "attention.attention.key.weight": "(head.* qk.*'), residual'",
        layer + "attention.attention.key.bias": "(head.* qk.*')",
        layer + "attention.attention.value.weight": "(head.* ov.*), residual'",
        layer + "attention.attention.value.bias": "(head.* ov.*)",
        layer + "attention.output.dense.weight": "residual, (head.* ov.*')",
        layer + "intermediate.dense.weight": "ff.*, residual'",
        layer + "intermediate.dense.bias": "ff.*",
        layer + "output.dense.weight": "residual, ff.*'",
        layer + "{attention.output,output}.dense.bias": "residual",
        "layernorm.weight": "residual~",
        "layernorm.bias": "residual",
        "pooler.dense.weight": "_, residual'",
        "pooler.dense.bias": "_",
        "{classifier,cls_classifier,distillation_classifier}.weight": "label, residual'",
        "{classifier,cls_classifier,distillation_classifier}.bias": "label",
        "decoder.0.weight": "_, residual', _, _",
        "decoder.0.bias": "_",
    }


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = (config.architectures or ["ViTModel"])[0] in HEADS
    return {
        "label": "held",
        "residual": "centred" if free else "held",
        "head.*": "permutation",
        "qk.*": "invertible in head.*",
        "ov.*": "invertible in head.*",
        "ff.*": "scaled" if config.hidden_act == "relu" else "permutation",
    }


def norms(config):
    return {
        "encoder.layer.*.layernorm_before": "encoder.layer.*.attention.attention.{query,key,value}",
        "encoder.layer.*.layernorm_after": "encoder.layer.*.intermediate.dense",
        "layernorm": "{pooler.dense,classifier,cls_classifier,distillation_classifier,decoder.0}",
    }


_TINY = dict(
    num_hidden_layers=2, hidden_size=24, intermediate_size=20, num_attention_heads=4, image_size=16, patch_size=4
)
TINY = [
    dict(architectures=["ViTForImageClassification"], num_labels=5, **_TINY),
    dict(architectures=["ViTModel"], **_TINY),
    dict(architectures=["ViTForMaskedImageModeling"], encoder_stride=4, **_TINY),
    dict(model_type="deit", architectures=["DeiTForImageClassification"], num_labels=5, **_TINY),
    dict(model_type="deit", architectures=["DeiTForImageClassificationWithTeacher"], num_labels=5, **_TINY),
]
