"""Phi-3: a Llama with fused projections; RoPE may rotate only the first part of every head."""

MODEL_TYPES = ("phi3",)
PREFIX = "model."
HEADS = ("Phi3ForCausalLM", "Phi3ForSequenceClassification", "Phi3ForTokenClassification")


def _head(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_pairs(config):
    """Return the number of query-key pairs per head that RoPE rotates; the other units are free."""
    return int(_head(config) * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)) // 2


def sizes(config):
    return {
        "kv.*": config.num_key_value_heads,
        "group.*": config.num_attention_heads // config.num_key_value_heads,
        "pair.*": _rotary_pairs(config),
    }


def table(config):
    attn, mlp = "layers.*.self_attn.", "layers.*.mlp."
    query, key = "turn.* pair.*", "turn.*' pair.*"
    if 2 * _rotary_pairs(config) < _head(config):
        query, key = f"({query} + qk.*)", f"({key} + qk.*')"
    return {
        "embed_tokens.weight": "vocab, residual",
        "{norm,layers.*.input_layernorm,layers.*.post_attention_layernorm}.weight": "residual~",
        attn + "qkv_proj.weight": f"(kv.* group.* {query}) + (kv.* {key}) + (kv.* ov.*), residual'",
        attn + "o_proj.weight": "residual, (kv.* group.* ov.*')",
        mlp + "gate_up_proj.weight": "ff.*~ + ff.*, residual'",
        mlp + "down_proj.weight": "residual, ff.*'",
        "lm_head.weight": "vocab, residual'",
        "score.weight": "label, residual'",
        "score.bias": "label",
    }


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = (config.architectures or ["Phi3Model"])[0] in HEADS
    return {
        "vocab": "held",
        "label": "held",
        "residual": "orthogonal" if free else "held",
        "kv.*": "permutation",
        "group.*": "permutation in kv.*",
        "ov.*": "invertible in kv.*",
        "pair.*": "held",
        "turn.*": "rotary in kv.* pair.*",
        "qk.*": "invertible in kv.*",
        "ff.*": "nonzero",
    }


def norms(config):
    return {
        "layers.*.input_layernorm": "layers.*.self_attn.qkv_proj",
        "layers.*.post_attention_layernorm": "layers.*.mlp.gate_up_proj",
        "norm": "{lm_head,score}",
    }


_TINY = dict(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=20,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
    original_max_position_embeddings=64,
    vocab_size=97,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
_PART = _TINY | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))
TINY = [
    dict(architectures=["Phi3ForCausalLM"], **_TINY),
    dict(architectures=["Phi3ForCausalLM"], tie_word_embeddings=True, **_PART),
    dict(architectures=["Phi3Model"], **_TINY),
    dict(architectures=["Phi3ForSequenceClassification"], num_labels=3, **_PART),
    dict(architectures=["Phi3ForTokenClassification"], num_labels=3, **_TINY),
]
