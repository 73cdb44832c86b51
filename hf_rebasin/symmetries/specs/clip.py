"""CLIP: a pre-LayerNorm text tower, and a vision tower whose stream starts with a norm; also each tower alone."""

MODEL_TYPES = ("clip", "clip_text_model", "clip_vision_model")
FREE = ("CLIPModel", "CLIPForImageClassification")


def prefix(config):
    return {
        "clip": "clip.",
        "clip_text_model": ("clip.", "text_model."),
        "clip_vision_model": ("clip.", "vision_model."),
    }[config.model_type]


def _towers(config):
    """Return {tower: (its configuration, prefix of its keys)}."""
    if config.model_type == "clip":
        return {"text": (config.text_config, "text_model."), "vision": (config.vision_config, "vision_model.")}
    return {config.model_type.split("_")[1]: (config, "")}


def sizes(config):
    return {f"{name}.head.*": tower.num_attention_heads for name, (tower, _) in _towers(config).items()}


def _layers(t, prefix):
    layer = f"{prefix}encoder.layers.*."
    return {
        layer + "{layer_norm1,layer_norm2}.weight": f"{t}.residual~",
        layer + "{layer_norm1,layer_norm2}.bias": f"{t}.residual",
        layer + "self_attn.q_proj.weight": f"({t}.head.* {t}.qk.*), {t}.residual'",
        layer + "self_attn.q_proj.bias": f"({t}.head.* {t}.qk.*)",
        layer + "self_attn.k_proj.weight": f"({t}.head.* {t}.qk.*'), {t}.residual'",
        layer + "self_attn.k_proj.bias": f"({t}.head.* {t}.qk.*')",
        layer + "self_attn.v_proj.weight": f"({t}.head.* {t}.ov.*), {t}.residual'",
        layer + "self_attn.v_proj.bias": f"({t}.head.* {t}.ov.*)",
        layer + "self_attn.out_proj.weight": f"{t}.residual, ({t}.head.* {t}.ov.*')",
        layer + "mlp.fc1.weight": f"{t}.ff.*, {t}.residual'",
        layer + "mlp.fc1.bias": f"{t}.ff.*",
        layer + "mlp.fc2.weight": f"{t}.residual, {t}.ff.*'",
        layer + "{self_attn.out_proj,mlp.fc2}.bias": f"{t}.residual",
    }


def table(config):
    rows = {
        "logit_scale": "",
        "text_projection.weight": "_, text.residual'",
        "visual_projection.weight": "_, vision.residual'",
        "classifier.weight": "label, vision.residual'",
        "classifier.bias": "label",
    }
    for tower, (_, at) in _towers(config).items():
        rows |= _layers(tower, at)
        if tower == "text":
            rows |= {
                at + "embeddings.token_embedding.weight": "vocab, text.residual",
                at + "embeddings.position_embedding.weight": "_, text.residual",
                at + "final_layer_norm.weight": "text.residual~",
                at + "final_layer_norm.bias": "text.residual",
            }
        else:
            rows |= {
                at + "embeddings.class_embedding": "vision.residual",
                at + "embeddings.patch_embedding.weight": "vision.residual, _, _, _",
                at + "embeddings.position_embedding.weight": "_, vision.residual",
                at + "{pre_layrnorm,post_layernorm}.weight": "vision.residual~",
                at + "{pre_layrnorm,post_layernorm}.bias": "vision.residual",
            }
    return rows


def groups(config):
    # a tower alone outputs its last hidden states, with or without a projection, and so may any other class
    free = (config.architectures or [None])[0] in FREE
    # a norm that writes to the stream keeps its gain, which no reader could absorb
    kinds = {"vocab": "held", "label": "held"}
    for t, (tower, _) in _towers(config).items():
        stream = "centred" if t == "text" else "permutation"
        kinds |= {
            f"{t}.residual": stream if free else "held",
            f"{t}.head.*": "permutation",
            f"{t}.qk.*": f"invertible in {t}.head.*",
            f"{t}.ov.*": f"invertible in {t}.head.*",
            f"{t}.ff.*": "scaled" if tower.hidden_act == "relu" else "permutation",
        }
    return kinds


def norms(config):
    readers = {}
    for tower, (_, at) in _towers(config).items():
        layer = f"{at}encoder.layers.*."
        readers[layer + "layer_norm1"] = layer + "self_attn.{q,k,v}_proj"
        readers[layer + "layer_norm2"] = layer + "mlp.fc1"
        if tower == "text":
            readers[at + "final_layer_norm"] = "text_projection"
    return readers


def reasons(config):
    towers = _towers(config)
    why = "the stream begins with a LayerNorm, and no reader could take its gain, as it writes to the stream"
    return {"vision.residual": why} if "vision" in towers else {}


_TEXT = dict(
    num_hidden_layers=2,
    hidden_size=24,
    intermediate_size=20,
    num_attention_heads=4,
    max_position_embeddings=12,
    vocab_size=97,
    bos_token_id=0,
    eos_token_id=1,
    projection_dim=10,
)
_VISION = dict(
    num_hidden_layers=2,
    hidden_size=30,
    intermediate_size=22,
    num_attention_heads=5,
    image_size=12,
    patch_size=4,
    projection_dim=10,
)
_BOTH = dict(text_config=_TEXT, vision_config=_VISION, projection_dim=10)
TINY = [
    dict(architectures=["CLIPModel"], **_BOTH),
    dict(architectures=["CLIPForImageClassification"], num_labels=3, **_BOTH),
    dict(model_type="clip_text_model", architectures=["CLIPTextModel"], **_TEXT),
    dict(model_type="clip_text_model", architectures=["CLIPTextModelWithProjection"], **_TEXT),
    dict(model_type="clip_vision_model", architectures=["CLIPVisionModel"], **_VISION),
    dict(model_type="clip_vision_model", architectures=["CLIPVisionModelWithProjection"], **_VISION),
]
