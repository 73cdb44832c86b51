"""GPT-2: pre-LayerNorm decoder. Conv1D weights are stored (in, out)."""

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
HEADS = (
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)


def sizes(config):
    return {"head.*": config.n_head}


def table(config):
    return {
        "wte.weight": "vocab, residual",
        "wpe.weight": "_, residual",
        "h.*.{ln_1,ln_2}.weight": "residual~",
        "h.*.{ln_1,ln_2}.bias": "residual",
        "h.*.attn.c_attn.weight": "residual', (head.* qk.*) + (head.* qk.*') + (head.* ov.*)",
        "h.*.attn.c_attn.bias": "(head.* qk.*) + (head.* qk.*') + (head.* ov.*)",
        "h.*.attn.c_proj.weight": "(head.* ov.*'), residual",
        "h.*.mlp.c_fc.weight": "residual', ff.*",
        "h.*.mlp.c_fc.bias": "ff.*",
        "h.*.mlp.c_proj.weight": "ff.*', residual",
        "h.*.{attn,mlp}.c_proj.bias": "residual",
        "ln_f.weight": "residual~",
        "ln_f.bias": "residual",
        "lm_head.weight": "vocab, residual'",
        "{score,classifier}.weight": "label, residual'",
        "{score,classifier}.bias": "label",
        "qa_outputs.weight": "_, residual'",
        "qa_outputs.bias": "_",
    }


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = (config.architectures or ["GPT2Model"])[0] in HEADS
    return {
        "vocab": "held",
        "label": "held",
        "residual": "centred" if free else "held",
        "head.*": "permutation",
        "qk.*": "invertible in head.*",
        "ov.*": "invertible in head.*",
        "ff.*": "scaled" if config.activation_function == "relu" else "permutation",
    }


def norms(config):
    return {
        "h.*.ln_1": "h.*.attn.c_attn",
        "h.*.ln_2": "h.*.mlp.c_fc",
        "ln_f": "{lm_head,score,classifier,qa_outputs}",
    }


_TINY = dict(n_layer=2, n_embd=24, n_inner=20, n_head=4, n_positions=16, vocab_size=97, bos_token_id=0, eos_token_id=0)
TINY = [
    dict(architectures=["GPT2LMHeadModel"], **_TINY),
    dict(architectures=["GPT2LMHeadModel"], tie_word_embeddings=False, **_TINY),
    dict(architectures=["GPT2Model"], **_TINY),
    dict(architectures=["GPT2ForSequenceClassification"], num_labels=3, pad_token_id=0, **_TINY),
    dict(architectures=["GPT2ForTokenClassification"], num_labels=3, **_TINY),
    dict(architectures=["GPT2ForQuestionAnswering"], **_TINY),
]
