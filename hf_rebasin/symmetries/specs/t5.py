"""T5 and mT5: two stacks with one stream; all layers of a stack share their heads, as they share a position bias."""

MODEL_TYPES = ("t5", "mt5")
PREFIX = "transformer."
HEADS = tuple(
    f"{family}For{task}"
    for family in ("T5", "MT5")
    for task in ("ConditionalGeneration", "SequenceClassification", "TokenClassification", "QuestionAnswering")
)


def sizes(config):
    return {"encoder_head": config.num_heads, "decoder_head": config.num_heads, "cross_head.*": config.num_heads}


def _attention(key, head, inside):
    """Return the rows of one attention; `inside` distinguishes its query-key and value-output units from others."""
    return {
        f"{key}.q.weight": f"({head} {inside}_qk.*), residual'",
        f"{key}.k.weight": f"({head} {inside}_qk.*'), residual'",
        f"{key}.v.weight": f"({head} {inside}_ov.*), residual'",
        f"{key}.o.weight": f"residual, ({head} {inside}_ov.*')",
    }


def table(config):
    rows = {
        "{shared,encoder.embed_tokens,decoder.embed_tokens}.weight": "vocab, residual",
        "{encoder,decoder}.final_layer_norm.weight": "residual~",
        "{encoder,decoder}.block.*.layer.*.layer_norm.weight": "residual~",
        "lm_head.weight": "vocab, residual'",
        "classifier.weight": "label, residual'",
        "classifier.bias": "label",
        "classification_head.dense.weight": "pool, residual'",
        "classification_head.dense.bias": "pool",
        "classification_head.out_proj.weight": "label, pool'",
        "classification_head.out_proj.bias": "label",
        "qa_outputs.weight": "_, residual'",
        "qa_outputs.bias": "_",
    }
    for stack, last in (("encoder", 1), ("decoder", 2)):
        attention, ff = f"{stack}.block.*.layer.0.SelfAttention", f"{stack}.block.*.layer.{last}.DenseReluDense."
        rows |= _attention(attention, f"{stack}_head", stack)
        rows[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = f"_, {stack}_head"
        rows[ff + "{wi,wi_1}.weight"] = f"{stack}_ff.*, residual'"
        rows[ff + "wi_0.weight"] = f"{stack}_ff.*~, residual'"
        rows[ff + "wo.weight"] = f"residual, {stack}_ff.*'"
    return rows | _attention("decoder.block.*.layer.1.EncDecAttention", "cross_head.*", "cross")


def _scaled(config):
    """Whether transformers scales the inputs of a tied head, which it does not if the head is untied."""
    tied = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return tied and "ForConditionalGeneration" in str(config.architectures)


def groups(config):
    # a bare model outputs the hidden states, and so may any other class
    free = (config.architectures or ["T5Model"])[0] in HEADS
    stream = "permutation" if _scaled(config) else "orthogonal"
    ff = "nonzero" if config.is_gated_act else "scaled" if config.dense_act_fn == "relu" else "permutation"
    kinds = {
        "vocab": "held",
        "label": "held",
        "residual": stream if free else "held",
        "pool": "permutation" if free else "held",
        "encoder_head": "permutation",
        "decoder_head": "permutation",
        "cross_head.*": "permutation",
    }
    for part, head in (("encoder", "encoder_head"), ("decoder", "decoder_head"), ("cross", "cross_head.*")):
        kinds |= {f"{part}_qk.*": f"invertible in {head}", f"{part}_ov.*": f"invertible in {head}", f"{part}_ff.*": ff}
    return kinds


def norms(config):
    decoder = "decoder.block.*.layer."
    return {
        "encoder.block.*.layer.0.layer_norm": "encoder.block.*.layer.0.SelfAttention.{q,k,v}",
        "encoder.block.*.layer.1.layer_norm": "encoder.block.*.layer.1.DenseReluDense.{wi,wi_0,wi_1}",
        "encoder.final_layer_norm": [decoder + "1.EncDecAttention.{k,v}", "classifier"],
        decoder + "0.layer_norm": decoder + "0.SelfAttention.{q,k,v}",
        decoder + "1.layer_norm": decoder + "1.EncDecAttention.q",
        decoder + "2.layer_norm": decoder + "2.DenseReluDense.{wi,wi_0,wi_1}",
        "decoder.final_layer_norm": "{lm_head,qa_outputs,classification_head.dense}",
    }


def reasons(config):
    why = "rotated, its head would no longer be the embedding, and transformers scales the outputs only where it is"
    return {"residual": why} if _scaled(config) else {}


_TINY = dict(
    d_model=24,
    d_kv=5,
    d_ff=20,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    vocab_size=97,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    pad_token_id=0,
    decoder_start_token_id=0,
    initializer_factor=0.1,  # its attention is not scaled: with weights × 10, float32 would round too much
)
TINY = [
    dict(architectures=["T5ForConditionalGeneration"], **_TINY),
    dict(architectures=["T5ForConditionalGeneration"], feed_forward_proj="gated-gelu", **_TINY),
    dict(architectures=["T5Model"], **_TINY),
    dict(architectures=["T5EncoderModel"], **_TINY),
    dict(architectures=["T5ForTokenClassification"], num_labels=3, **_TINY),
    dict(model_type="mt5", architectures=["MT5ForConditionalGeneration"], feed_forward_proj="gated-gelu", **_TINY),
]
