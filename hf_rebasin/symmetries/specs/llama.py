"""Llama, Mistral, Qwen2: RMSNorm decoders, grouped-query attention, RoPE on the pairs (i, i + d/2), gated MLP."""

MODEL_TYPES = ("llama", "mistral", "qwen2")
PREFIX = ("model.", "transformer.")  # the question-answering class has another base prefix
HEADS = tuple(
    f"{family}For{task}"
    for family in ("Llama", "Mistral", "Qwen2")
    for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
)


def sizes(config):
    return {
        "kv.*": config.num_key_value_heads,
        "group.*": config.num_attention_heads // config.num_key_value_heads,
    }


def table(config):
    attn, mlp = "layers.*.self_attn.", "layers.*.mlp."
    return {
        "embed_tokens.weight": "vocab, residual",
        "{norm,layers.*.input_layernorm,layers.*.post_attention_layernorm}.weight": "residual~",
        attn + "q_proj.weight": "(kv.* group.* turn.* pair.*), residual'",
        attn + "q_proj.bias": "(kv.* group.* turn.* pair.*)",
        attn + "k_proj.weight": "(kv.* turn.*' pair.*), residual'",
        attn + "k_proj.bias": "(kv.* turn.*' pair.*)",
        attn + "v_proj.weight": "(kv.* ov.*), residual'",
        attn + "v_proj.bias": "(kv.* ov.*)",
        attn + "o_proj.weight": "residual, (kv.* group.* ov.*')",
        mlp + "gate_proj.weight": "ff.*~, residual'",
        mlp + "gate_proj.bias": "ff.*~",
        mlp + "up_proj.weight": "ff.*, residual'",
        mlp + "up_proj.bias": "ff.*",
        mlp + "down_proj.weight": "residual, ff.*'",
        "layers.*.{self_attn.o_proj,mlp.down_proj}.bias": "residual",
        "lm_head.weight": "vocab, residual'",
        "score.weight": "label, residual'",
        "score.bias": "label",
        "qa_outputs.weight": "_, residual'",
        "qa_outputs.bias": "_",
    }


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = (config.architectures or ["LlamaModel"])[0] in HEADS
    return {
        "vocab": "held",
        "label": "held",
        "residual": "orthogonal" if free else "held",
        "kv.*": "permutation",
        "group.*": "permutation in kv.*",
        "ov.*": "invertible in kv.*",
        "pair.*": "held",
        "turn.*": "rotary in kv.* pair.*",
        "ff.*": "nonzero",
    }


def norms(config):
    return {
        "layers.*.input_layernorm": "layers.*.self_attn.{q,k,v}_proj",
        "layers.*.post_attention_layernorm": "layers.*.mlp.{gate,up}_proj",
        "norm": "{lm_head,score,qa_outputs}",
    }


_TINY = dict(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=20,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=97,
    bos_token_id=0,
    eos_token_id=0,
)
TINY = [
    dict(architectures=["LlamaForCausalLM"], **_TINY),
    dict(architectures=["LlamaForCausalLM"], tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **_TINY),
    dict(architectures=["LlamaModel"], **_TINY),
    dict(architectures=["LlamaForSequenceClassification"], num_labels=3, pad_token_id=0, **_TINY),
    dict(architectures=["LlamaForTokenClassification"], num_labels=3, **_TINY),
    dict(architectures=["LlamaForQuestionAnswering"], **_TINY),
    dict(architectures=["LlamaForCausalLM"], **(_TINY | dict(num_key_value_heads=1, num_attention_heads=4))),
    dict(model_type="mistral", architectures=["MistralForCausalLM"], head_dim=6, **_TINY),
    dict(model_type="mistral", architectures=["MistralForTokenClassification"], num_labels=3, **_TINY),
    dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True, **_TINY),
    dict(model_type="qwen2", architectures=["Qwen2Model"], **_TINY),
    dict(model_type="qwen2", architectures=["Qwen2ForQuestionAnswering"], **_TINY),
]
