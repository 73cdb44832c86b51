"""BERT, RoBERTa, XLM-RoBERTa: post-LayerNorm encoders, so the residual stream can only be permuted."""

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
PREFIX = ("bert.", "roberta.")

# `classifier.weight` reads the pooler in some classes and the stream in others; in an unknown class both are held.
POOLED = (
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
)
STREAM = tuple(
    f"{family}For{task}"
    for family in ("Bert", "Roberta", "XLMRoberta")
    for task in ("MaskedLM", "TokenClassification", "QuestionAnswering", "SequenceClassification")
    if (family, task) != ("Bert", "SequenceClassification")
)


def _architecture(config):
    return (config.architectures or ["BertModel"])[0]


def sizes(config):
    return {"head.*": config.num_attention_heads}


def table(config):
    layer = "encoder.layer.*."
    classifier = "pool'" if _architecture(config) in POOLED else "residual'"
    mlm = "residual" if config.tie_word_embeddings else "mlm"  # the decoder is the embedding
    return {
        "embeddings.word_embeddings.weight": "vocab, residual",
        "embeddings.{position,token_type}_embeddings.weight": "_, residual",
        "embeddings.LayerNorm.{weight,bias}": "residual",
        layer + "attention.self.query.weight": "(head.* qk.*), residual'",
        layer + "attention.self.query.bias": "(head.* qk.*)",
        layer + "attention.self.key.weight": "(head.* qk.*'), residual'",
        layer + "attention.self.key.bias": "(head.* qk.*')",
        layer + "attention.self.value.weight": "(head.* ov.*), residual'",
        layer + "attention.self.value.bias": "(head.* ov.*)",
        layer + "attention.output.dense.weight": "residual, (head.* ov.*')",
        layer + "intermediate.dense.weight": "ff.*, residual'",
        layer + "intermediate.dense.bias": "ff.*",
        layer + "output.dense.weight": "residual, ff.*'",
        layer + "{attention.output,output}.dense.bias": "residual",
        layer + "{attention.output,output}.LayerNorm.{weight,bias}": "residual",
        "pooler.dense.weight": "pool, residual'",
        "pooler.dense.bias": "pool",
        "classifier.weight": f"label, {classifier}",
        "classifier.bias": "label",
        "classifier.dense.weight": "pool, residual'",
        "classifier.dense.bias": "pool",
        "classifier.out_proj.weight": "label, pool'",
        "classifier.out_proj.bias": "label",
        "lm_head.dense.weight": f"{mlm}, residual'",
        "lm_head.dense.bias": mlm,
        "lm_head.layer_norm.{weight,bias}": mlm,
        "lm_head.{bias,decoder.bias}": "vocab",
        "lm_head.decoder.weight": f"vocab, {mlm}'",
        "qa_outputs.weight": "_, residual'",
        "qa_outputs.bias": "_",
        "cls.seq_relationship.weight": "_, pool'",
        "cls.seq_relationship.bias": "_",
        "cls.predictions.transform.dense.weight": f"{mlm}, residual'",
        "cls.predictions.transform.dense.bias": mlm,
        "cls.predictions.transform.LayerNorm.{weight,bias}": mlm,
        "cls.predictions.{bias,decoder.bias}": "vocab",
        "cls.predictions.decoder.weight": f"vocab, {mlm}'",
    }


def groups(config):
    free = "permutation" if _architecture(config) in POOLED + STREAM else "held"
    return {
        "vocab": "held",
        "label": "held",
        "residual": free,
        "pool": free,
        "mlm": "permutation",
        "head.*": "permutation",
        "qk.*": "invertible in head.*",
        "ov.*": "invertible in head.*",
        "ff.*": "scaled" if config.hidden_act == "relu" else "permutation",
    }


def reasons(config):
    return {"residual": "each LayerNorm writes to the stream itself, and no reader could take its gain"}


_TINY = dict(
    num_hidden_layers=2,
    hidden_size=24,
    intermediate_size=20,
    num_attention_heads=4,
    max_position_embeddings=20,
    vocab_size=97,
)
TINY = [
    dict(architectures=["BertModel"], **_TINY),
    dict(architectures=["BertForMaskedLM"], **_TINY),
    dict(architectures=["BertForMaskedLM"], tie_word_embeddings=False, **_TINY),
    dict(architectures=["BertForPreTraining"], **_TINY),
    dict(architectures=["BertForSequenceClassification"], num_labels=3, **_TINY),
    dict(architectures=["BertForTokenClassification"], num_labels=3, **_TINY),
    dict(architectures=["BertForQuestionAnswering"], **_TINY),
    *(
        dict(model_type="roberta", architectures=[f"Roberta{task}"], pad_token_id=1, **{**_TINY, **more})
        for task, more in (
            ("Model", {}),
            ("ForMaskedLM", {}),
            ("ForMaskedLM", dict(tie_word_embeddings=False)),
            ("ForSequenceClassification", dict(num_labels=3)),
            ("ForTokenClassification", dict(num_labels=3)),
            ("ForQuestionAnswering", {}),
        )
    ),
    dict(model_type="xlm-roberta", architectures=["XLMRobertaForMaskedLM"], pad_token_id=1, **_TINY),
]
