"""GPT-NeoX and Pythia: queries, keys and values interleaved per head; RoPE rotates only part of every head."""

MODEL_TYPES = ("gpt_neox",)
PREFIX = "gpt_neox."
HEADS = (
    "GPTNeoXForCausalLM",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXForQuestionAnswering",
)


def _rotary_pairs(config):
    """Return the number of query-key pairs per head that RoPE rotates; the other units are free."""
    head = config.hidden_size // config.num_attention_heads
    return int(head * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)) // 2


def sizes(config):
    return {"head.*": config.num_attention_heads, "pair.*": _rotary_pairs(config)}


def table(config):
    attn = "layers.*.attention."
    query, key = "turn.* pair.*", "turn.*' pair.*"
    if 2 * _rotary_pairs(config) * config.num_attention_heads < config.hidden_size:
        query, key = f"{query} + qk.*", f"{key} + qk.*'"
    qkv = f"(head.* ({query} + {key} + ov.*))"
    return {
        "embed_in.weight": "vocab, residual",
        "{final_layer_norm,layers.*.input_layernorm,layers.*.post_attention_layernorm}.weight": "residual~",
        "{final_layer_norm,layers.*.input_layernorm,layers.*.post_attention_layernorm}.bias": "residual",
        attn + "query_key_value.weight": f"{qkv}, residual'",
        attn + "query_key_value.bias": qkv,
        attn + "dense.weight": "residual, (head.* ov.*')",
        "layers.*.mlp.dense_h_to_4h.weight": "ff.*, residual'",
        "layers.*.mlp.dense_h_to_4h.bias": "ff.*",
        "layers.*.mlp.dense_4h_to_h.weight": "residual, ff.*'",
        "layers.*.{attention.dense,mlp.dense_4h_to_h}.bias": "residual",
        "embed_out.weight": "vocab, residual'",
        "{score,classifier}.weight": "label, residual'",
        "classifier.bias": "label",
        "qa_outputs.weight": "_, residual'",
        "qa_outputs.bias": "_",
    }


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = (config.architectures or ["GPTNeoXModel"])[0] in HEADS
    return {
        "vocab": "held",
        "label": "held",
        "residual": "centred" if free else "held",
        "head.*": "permutation",
        "pair.*": "held",
        "turn.*": "rotary in head.* pair.*",
        "qk.*": "invertible in head.*",
        "ov.*": "invertible in head.*",
        "ff.*": "scaled" if config.hidden_act == "relu" else "permutation",
    }


def norms(config):
    return {
        "layers.*.input_layernorm": "layers.*.attention.query_key_value",
        "layers.*.post_attention_layernorm": "layers.*.mlp.dense_h_to_4h",
        "final_layer_norm": "{embed_out,score,classifier,qa_outputs}",
    }


_TINY = dict(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=20,
    num_attention_heads=4,
    max_position_embeddings=16,
    vocab_size=97,
    bos_token_id=0,
    eos_token_id=0,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
)
_WHOLE = _TINY | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0))
TINY = [
    dict(architectures=["GPTNeoXForCausalLM"], **_TINY),
    dict(architectures=["GPTNeoXForCausalLM"], use_parallel_residual=False, **_TINY),
    dict(architectures=["GPTNeoXForCausalLM"], **_WHOLE),
    dict(architectures=["GPTNeoXModel"], **_TINY),
    dict(architectures=["GPTNeoXForSequenceClassification"], num_labels=3, pad_token_id=0, **_TINY),
    dict(architectures=["GPTNeoXForTokenClassification"], num_labels=3, **_TINY),
    dict(architectures=["GPTNeoXForQuestionAnswering"], **_TINY),
]
