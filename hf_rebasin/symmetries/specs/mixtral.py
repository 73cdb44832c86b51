"""Mixtral: a Llama whose experts are separate keys; router rows follow their order, and each has its own units."""

MODEL_TYPES = ("mixtral",)
PREFIX = ("model.", "transformer.")  # the question-answering class has another base prefix
HEADS = tuple(
    f"MixtralFor{task}" for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
)


def sizes(config):
    return {
        "kv.*": config.num_key_value_heads,
        "group.*": config.num_attention_heads // config.num_key_value_heads,
    }


def table(config):
    attn, moe = "layers.*.self_attn.", "layers.*.block_sparse_moe."
    return {
        "embed_tokens.weight": "vocab, residual",
        "{norm,layers.*.input_layernorm,layers.*.post_attention_layernorm}.weight": "residual~",
        attn + "q_proj.weight": "(kv.* group.* turn.* pair.*), residual'",
        attn + "k_proj.weight": "(kv.* turn.*' pair.*), residual'",
        attn + "v_proj.weight": "(kv.* ov.*), residual'",
        attn + "o_proj.weight": "residual, (kv.* group.* ov.*')",
        moe + "gate.weight": "expert.*, residual'",
        moe + "experts.<expert.*>.w1.weight": "ff.*~, residual'",
        moe + "experts.<expert.*>.w3.weight": "ff.*, residual'",
        moe + "experts.<expert.*>.w2.weight": "residual, ff.*'",
        "lm_head.weight": "vocab, residual'",
        "score.weight": "label, residual'",
        "score.bias": "label",
        "qa_outputs.weight": "_, residual'",
        "qa_outputs.bias": "_",
    }


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = (config.architectures or ["MixtralModel"])[0] in HEADS
    return {
        "vocab": "held",
        "label": "held",
        "residual": "orthogonal" if free else "held",
        "kv.*": "permutation",
        "group.*": "permutation in kv.*",
        "ov.*": "invertible in kv.*",
        "pair.*": "held",
        "turn.*": "rotary in kv.* pair.*",
        "expert.*": "permutation",
        "ff.*": "nonzero in expert.*",
    }


def norms(config):
    moe = "layers.*.block_sparse_moe."
    return {
        "layers.*.input_layernorm": "layers.*.self_attn.{q,k,v}_proj",
        "layers.*.post_attention_layernorm": [moe + "gate", moe + "experts.*.{w1,w3}"],
        "norm": "{lm_head,score,qa_outputs}",
    }


_TINY = dict(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=20,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_local_experts=4,
    vocab_size=97,
    bos_token_id=0,
    eos_token_id=0,
    experts_implementation="eager",  # grouped matrix products do not support float64
)
TINY = [
    dict(architectures=["MixtralForCausalLM"], **_TINY),
    dict(architectures=["MixtralForCausalLM"], tie_word_embeddings=True, head_dim=6, num_experts_per_tok=1, **_TINY),
    dict(architectures=["MixtralModel"], **_TINY),
    dict(architectures=["MixtralForSequenceClassification"], num_labels=3, pad_token_id=0, **_TINY),
    dict(architectures=["MixtralForTokenClassification"], num_labels=3, **_TINY),
    dict(architectures=["MixtralForQuestionAnswering"], **_TINY),
]
