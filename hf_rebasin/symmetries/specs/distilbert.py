"""DistilBERT: post-LayerNorm encoder, so the residual stream can only be permuted."""

MODEL_TYPES = ("distilbert",)
PREFIX = "distilbert."
HEADS = tuple(
    f"DistilBertFor{task}"
    for task in ("MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering")
)


def _architecture(config):
    return (config.architectures or ["DistilBertModel"])[0]


def sizes(config):
    return {"head.*": config.n_heads}


def table(config):
    layer = "transformer.layer.*."
    pooled = _architecture(config).endswith(("SequenceClassification", "MultipleChoice"))
    mlm = "residual" if config.tie_word_embeddings else "mlm"  # the projector is the embedding
    return {
        "embeddings.word_embeddings.weight": "vocab, residual",
        "embeddings.position_embeddings.weight": "_, residual",
        "embeddings.LayerNorm.{weight,bias}": "residual",
        layer + "attention.q_lin.weight": "(head.* qk.*), residual'",
        layer + "attention.q_lin.bias": "(head.* qk.*)",
        layer + "attention.k_lin.weight": "(head.* qk.*'), residual'",
        layer + "attention.k_lin.bias": "(head.* qk.*')",
        layer + "attention.v_lin.weight": "(head.* ov.*), residual'",
        layer + "attention.v_lin.bias": "(head.* ov.*)",
        layer + "attention.out_lin.weight": "residual, (head.* ov.*')",
        layer + "ffn.lin1.weight": "ff.*, residual'",
        layer + "ffn.lin1.bias": "ff.*",
        layer + "ffn.lin2.weight": "residual, ff.*'",
        layer + "{attention.out_lin,ffn.lin2}.bias": "residual",
        layer + "{sa_layer_norm,output_layer_norm}.{weight,bias}": "residual",
        "vocab_transform.weight": f"{mlm}, residual'",
        "vocab_transform.bias": mlm,
        "vocab_layer_norm.{weight,bias}": mlm,
        "vocab_projector.weight": f"vocab, {mlm}'",
        "vocab_projector.bias": "vocab",
        "pre_classifier.weight": "pool, residual'",
        "pre_classifier.bias": "pool",
        "classifier.weight": "label, pool'" if pooled else "label, residual'",
        "classifier.bias": "label",
        "qa_outputs.weight": "_, residual'",
        "qa_outputs.bias": "_",
    }


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = "permutation" if _architecture(config) in HEADS else "held"
    return {
        "vocab": "held",
        "label": "held",
        "residual": free,
        "pool": "scaled" if free != "held" else "held",  # a ReLU follows
        "mlm": "permutation",
        "head.*": "permutation",
        "qk.*": "invertible in head.*",
        "ov.*": "invertible in head.*",
        "ff.*": "scaled" if config.activation == "relu" else "permutation",
    }


def reasons(config):
    return {"residual": "each LayerNorm writes to the stream itself, and no reader could take its gain"}


_TINY = dict(n_layers=2, dim=24, hidden_dim=20, n_heads=4, max_position_embeddings=16, vocab_size=97)
TINY = [
    dict(architectures=["DistilBertModel"], **_TINY),
    dict(architectures=["DistilBertForMaskedLM"], **_TINY),
    dict(architectures=["DistilBertForMaskedLM"], tie_word_embeddings=False, **_TINY),
    dict(architectures=["DistilBertForSequenceClassification"], num_labels=3, **_TINY),
    dict(architectures=["DistilBertForTokenClassification"], num_labels=3, **_TINY),
    dict(architectures=["DistilBertForQuestionAnswering"], **_TINY),
]
