"""OPT: pre-LayerNorm decoder with ReLU; OPT-350m is post-LayerNorm, its embedding narrower than its stream."""

MODEL_TYPES = ("opt",)
PREFIX = "model."
HEADS = ("OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering")


def _class(config):
    return (config.architectures or ["OPTModel"])[0]


def _words(config):
    """Return the axis the embedding writes, and the final output axis as it is written and as it is read."""
    if config.word_embed_proj_dim == config.hidden_size:
        return "residual", "residual", "residual'"
    if _class(config) == "OPTForCausalLM" and config.tie_word_embeddings:
        return "word", "word'", "word"  # the head is the embedding, so its input moves as the dual
    return "word", "said", "said'"


def sizes(config):
    return {"head.*": config.num_attention_heads}


def table(config):
    layer = "decoder.layers.*."
    word, written, read = _words(config)
    return {
        "decoder.embed_tokens.weight": f"vocab, {word}",
        "decoder.embed_positions.weight": "_, residual",
        "decoder.project_in.weight": f"residual, {word}'",
        layer + "{self_attn_layer_norm,final_layer_norm}.weight": "residual~",
        layer + "{self_attn_layer_norm,final_layer_norm}.bias": "residual",
        layer + "self_attn.q_proj.weight": "(head.* qk.*), residual'",
        layer + "self_attn.q_proj.bias": "(head.* qk.*)",
        layer + "self_attn.k_proj.weight": "(head.* qk.*'), residual'",
        layer + "self_attn.k_proj.bias": "(head.* qk.*')",
        layer + "self_attn.v_proj.weight": "(head.* ov.*), residual'",
        layer + "self_attn.v_proj.bias": "(head.* ov.*)",
        layer + "self_attn.out_proj.weight": "residual, (head.* ov.*')",
        layer + "fc1.weight": "ff.*, residual'",
        layer + "fc1.bias": "ff.*",
        layer + "fc2.weight": "residual, ff.*'",
        layer + "{self_attn.out_proj,fc2}.bias": "residual",
        "decoder.final_layer_norm.weight": "residual~",
        "decoder.final_layer_norm.bias": "residual",
        "decoder.project_out.weight": f"{written}, residual'",
        "lm_head.weight": f"vocab, {read}",
        "score.weight": f"label, {read}",
        "qa_outputs.weight": f"_, {read}",
        "qa_outputs.bias": "_",
    }


def groups(config):
    # norms are named by their gains, and without a final norm the heads read the stream itself
    normed = config.do_layer_norm_before and not config._remove_final_layer_norm
    stream = "centred" if normed and config.layer_norm_elementwise_affine else "permutation"
    # a bare model outputs the hidden states, and so may any other class
    free, projected = _class(config) in HEADS, config.word_embed_proj_dim != config.hidden_size
    return {
        "vocab": "held",
        "label": "held",
        "word": "invertible",
        "said": "invertible" if free else "held",
        "residual": stream if free or projected else "held",
        "head.*": "permutation",
        "qk.*": "invertible in head.*",
        "ov.*": "invertible in head.*",
        "ff.*": "scaled" if config.activation_function == "relu" else "permutation",
    }


def norms(config):
    layer = "decoder.layers.*."
    projected = config.word_embed_proj_dim != config.hidden_size
    return {
        layer + "self_attn_layer_norm": layer + "self_attn.{q,k,v}_proj",
        layer + "final_layer_norm": layer + "fc1",
        "decoder.final_layer_norm": "decoder.project_out" if projected else "{lm_head,score,qa_outputs}",
    }


def reasons(config):
    if not config.do_layer_norm_before:
        return {"residual": "each LayerNorm writes to the stream itself, and no reader could take its gain"}
    if config._remove_final_layer_norm:
        return {"residual": "without a last norm the head reads the stream as it is"}
    return {} if config.layer_norm_elementwise_affine else {"residual": "its norms have no gains to be told by"}


_TINY = dict(
    num_hidden_layers=2,
    hidden_size=24,
    ffn_dim=20,
    num_attention_heads=4,
    max_position_embeddings=16,
    vocab_size=97,
    pad_token_id=1,
)
_350M = _TINY | dict(do_layer_norm_before=False, word_embed_proj_dim=18)
TINY = [
    dict(architectures=["OPTForCausalLM"], **_TINY),
    dict(architectures=["OPTForCausalLM"], **_350M),
    dict(architectures=["OPTForCausalLM"], tie_word_embeddings=False, word_embed_proj_dim=18, **_TINY),
    dict(architectures=["OPTModel"], **_TINY),
    dict(architectures=["OPTModel"], **_350M),
    dict(architectures=["OPTForSequenceClassification"], num_labels=3, **_350M),
    dict(architectures=["OPTForQuestionAnswering"], enable_bias=False, layer_norm_elementwise_affine=False, **_TINY),
]
