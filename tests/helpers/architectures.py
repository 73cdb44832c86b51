"""Tiny models of many transformers architectures: each a class and the settings of its configuration."""

TEXT = dict(
    vocab_size=51,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    pad_token_id=0,
)
DECODER = TEXT | dict(num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
GATED = DECODER | dict(head_dim=8)
IMAGE = dict(
    image_size=16,
    patch_size=8,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
)
SEQ2SEQ = dict(
    vocab_size=51,
    d_model=16,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=20,
    max_position_embeddings=24,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=2,
)
SOUND = dict(
    vocab_size=21,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8),
    conv_stride=(4, 2),
    conv_kernel=(4, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    feat_proj_dropout=0.0,
    mask_time_prob=0.0,
    mask_time_length=2,
)
EXPERTS = GATED | dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12)
CLASSES = dict(num_labels=3)

# name: (class, settings)
ARCHITECTURES = {
    # --- text encoders
    "bert": ("BertForMaskedLM", TEXT),
    "roberta": ("RobertaForSequenceClassification", TEXT | CLASSES),
    "distilbert": (
        "DistilBertForMaskedLM",
        dict(vocab_size=51, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24),
    ),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        TEXT | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, conv_kernel_size=3),
    ),
    "albert": ("AlbertForMaskedLM", TEXT | dict(embedding_size=8)),
    "electra": ("ElectraForMaskedLM", TEXT | dict(embedding_size=8)),
    "xlnet": ("XLNetLMHeadModel", dict(vocab_size=51, d_model=16, n_layer=2, n_head=2, d_inner=24)),
    "mpnet": ("MPNetForMaskedLM", TEXT),
    "modernbert": ("ModernBertForMaskedLM", TEXT | dict(global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)),
    "deberta": (
        "DebertaForMaskedLM",
        TEXT | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=4),
    ),
    "squeezebert": ("SqueezeBertForMaskedLM", TEXT | dict(embedding_size=16, q_groups=2, k_groups=2, v_groups=2)),
    "funnel": (
        "FunnelForMaskedLM",
        dict(vocab_size=51, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=24),
    ),
    "canine": ("CanineForSequenceClassification", TEXT | CLASSES | dict(num_hash_buckets=16, num_hash_functions=4)),
    "layoutlmv3": (
        "LayoutLMv3ForTokenClassification",
        TEXT
        | CLASSES
        | dict(max_2d_position_embeddings=16, coordinate_size=2, shape_size=4, input_size=16, patch_size=8),
    ),
    # --- text decoders
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=51, n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=24)),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        TEXT | dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=4),
    ),
    "gptj": ("GPTJForCausalLM", dict(vocab_size=51, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=24)),
    "gpt-neox": ("GPTNeoXForCausalLM", TEXT),
    "llama": ("LlamaForCausalLM", DECODER),
    "llama-tied": ("LlamaForCausalLM", DECODER | dict(tie_word_embeddings=True)),
    "llama-classes": ("LlamaForSequenceClassification", DECODER | CLASSES),
    "mistral": ("MistralForCausalLM", DECODER),
    "qwen2": ("Qwen2ForCausalLM", DECODER | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", GATED),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "opt": ("OPTForCausalLM", TEXT | dict(ffn_dim=24, word_embed_proj_dim=8)),
    "gemma": ("GemmaForCausalLM", GATED),
    "gemma2": ("Gemma2ForCausalLM", GATED | dict(sliding_window=8)),
    "gemma3": ("Gemma3ForCausalLM", GATED | dict(sliding_window=8)),
    "falcon": ("FalconForCausalLM", dict(vocab_size=51, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
    "bloom": ("BloomForCausalLM", dict(vocab_size=51, hidden_size=16, n_layer=2, n_head=2)),
    "mpt": ("MptForCausalLM", dict(vocab_size=51, d_model=16, n_layers=2, n_heads=2, max_seq_len=24)),
    "olmo2": ("Olmo2ForCausalLM", DECODER),
    "cohere": ("CohereForCausalLM", DECODER | dict(use_qk_norm=True)),
    "mamba": ("MambaForCausalLM", dict(vocab_size=51, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "mamba2": (
        "Mamba2ForCausalLM",
        dict(vocab_size=51, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1),
    ),
    "rwkv": ("RwkvForCausalLM", dict(vocab_size=51, hidden_size=16, num_hidden_layers=2, context_length=16)),
    "recurrent-gemma": ("RecurrentGemmaForCausalLM", DECODER | dict(lru_width=16, head_dim=8)),
    "zamba2": (  # layers with shared weights, each with its own adapter
        "Zamba2ForCausalLM",
        dict(vocab_size=51, hidden_size=16, num_hidden_layers=2, layers_block_type=["mamba", "hybrid"])
        | dict(num_attention_heads=2, num_key_value_heads=2, intermediate_size=24, attention_head_dim=16)
        | dict(mamba_d_state=4, n_mamba_heads=2, mamba_headdim=16, mamba_ngroups=1, num_mem_blocks=1, adapter_rank=4),
    ),
    # --- mixtures of experts
    "mixtral": ("MixtralForCausalLM", GATED | dict(num_local_experts=3, num_experts_per_tok=2)),
    "qwen2-moe": ("Qwen2MoeForCausalLM", EXPERTS | dict(shared_expert_intermediate_size=8)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", EXPERTS | dict(mlp_only_layers=[0])),
    "olmoe": ("OlmoeForCausalLM", EXPERTS),
    "gpt-oss": ("GptOssForCausalLM", GATED | dict(num_local_experts=3, num_experts_per_tok=2, sliding_window=8)),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        DECODER
        | dict(num_key_value_heads=2, moe_intermediate_size=12, n_routed_experts=4, n_shared_experts=1, n_group=2)
        | dict(topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8)
        | dict(qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8),
    ),
    "llama4": (
        "Llama4ForCausalLM",
        GATED | dict(intermediate_size_mlp=24, num_local_experts=3, interleave_moe_layer_step=2),
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        dict(vocab_size=51, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8)
        | dict(intermediate_size=24, num_local_experts=3),
    ),
    "jamba": (
        "JambaForCausalLM",
        DECODER
        | dict(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4)
        | dict(expert_layer_period=2, expert_layer_offset=1, num_experts=3, use_mamba_kernels=False),
    ),
    # --- text encoder-decoders
    "t5": (
        "T5ForConditionalGeneration",
        dict(vocab_size=51, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "bart-classes": ("BartForSequenceClassification", SEQ2SEQ | CLASSES),
    "marian": ("MarianMTModel", SEQ2SEQ | dict(decoder_vocab_size=51)),
    "pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ),
    "m2m-100": ("M2M100ForConditionalGeneration", SEQ2SEQ),
    "longt5": (
        "LongT5ForConditionalGeneration",
        dict(vocab_size=51, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        dict(vocab_size=51, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, num_experts=3)
        | dict(decoder_start_token_id=0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    ),
    "bert-to-bert": (  # a configuration composed of two others
        "EncoderDecoderModel",
        dict(
            encoder=TEXT | dict(model_type="bert"),
            decoder=TEXT | dict(model_type="bert", is_decoder=True, add_cross_attention=True),
        ),
    ),
    # --- images
    "vit": ("ViTForImageClassification", IMAGE | CLASSES),
    "deit": ("DeiTForImageClassificationWithTeacher", IMAGE | CLASSES),
    "dinov2": ("Dinov2ForImageClassification", IMAGE | CLASSES | dict(mlp_ratio=2)),
    "beit": ("BeitForImageClassification", IMAGE | CLASSES | dict(use_relative_position_bias=True)),
    "swin": (
        "SwinForImageClassification",
        dict(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4) | CLASSES,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3])
        | dict(strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16)
        | CLASSES,
    ),
    "resnet": (
        "ResNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic") | CLASSES,
    ),
    "regnet": (
        "RegNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], groups_width=4) | CLASSES,
    ),
    "convnext": ("ConvNextForImageClassification", dict(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2) | CLASSES),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        dict(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2) | CLASSES,
    ),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", dict(depth_multiplier=0.1, min_depth=4) | CLASSES),
    "efficientnet": (
        "EfficientNetForImageClassification",
        dict(in_channels=[8, 8], out_channels=[8, 16], strides=[1, 2], kernel_sizes=[3, 3], expand_ratios=[1, 2])
        | dict(num_block_repeats=[1, 1], depthwise_padding=[], hidden_dim=24, width_coefficient=1.0)
        | dict(depth_coefficient=1.0, depth_divisor=8)
        | CLASSES,
    ),
    "dinov3": ("DINOv3ViTModel", IMAGE),  # without register tokens, so one tensor is empty
    "hiera": (
        "HieraForImageClassification",
        dict(image_size=[32, 32], embed_dim=4, depths=[1, 1], num_heads=[1, 2], num_query_pool=1) | CLASSES,
    ),
    "levit": (
        "LevitForImageClassificationWithTeacher",
        dict(image_size=64, hidden_sizes=[8, 16, 16], num_attention_heads=[1, 2, 2], depths=[1, 1, 1])
        | dict(key_dim=[4, 4, 4])
        | CLASSES,
    ),
    "vit-mae": (
        "ViTMAEForPreTraining",
        IMAGE
        | dict(decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
        | dict(decoder_intermediate_size=16),
    ),
    "detr": (
        "DetrForObjectDetection",
        {k: x for k, x in SEQ2SEQ.items() if k not in ("vocab_size", "forced_eos_token_id")}
        | dict(num_queries=3, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
        | dict(
            backbone_config=dict(
                model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
            )
        )
        | CLASSES,
    ),
    "sam": (
        "SamModel",
        dict(
            vision_config=dict(hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2)
            | dict(image_size=16, patch_size=4, window_size=2, global_attn_indexes=[1], mlp_dim=24, num_pos_feats=4),
            prompt_encoder_config=dict(hidden_size=8, image_size=16, patch_size=4, mask_input_channels=4),
            mask_decoder_config=dict(hidden_size=8, mlp_dim=12, num_hidden_layers=2, num_attention_heads=2)
            | dict(iou_head_hidden_dim=8),
        ),
    ),
    # --- images and text
    "clip": (
        "CLIPModel",
        dict(text_config=TEXT, vision_config=IMAGE, projection_dim=8),
    ),
    "clip-vision": ("CLIPVisionModelWithProjection", IMAGE | dict(projection_dim=8)),
    "siglip": ("SiglipModel", dict(text_config=TEXT, vision_config=IMAGE)),
    "llava": (
        "LlavaForConditionalGeneration",
        dict(
            text_config=DECODER | dict(model_type="llama"),
            vision_config=IMAGE | dict(model_type="clip_vision_model"),
            image_token_index=50,
        ),
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        dict(
            text_config=GATED | dict(model_type="gemma"),
            vision_config=IMAGE | dict(model_type="siglip_vision_model"),
            projection_dim=16,
            image_token_index=50,
        ),
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        dict(
            text_config=DECODER
            | dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)),
            vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=4),
            image_token_id=50,
            video_token_id=49,
            vision_start_token_id=48,
            vision_end_token_id=47,
        ),
    ),
    "vit-to-gpt2": (
        "VisionEncoderDecoderModel",
        dict(
            encoder=IMAGE | dict(model_type="vit"),
            decoder=dict(model_type="gpt2", vocab_size=51, n_embd=16, n_layer=1, n_head=2, n_positions=24)
            | dict(add_cross_attention=True),
        ),
    ),
    # --- audio
    "whisper": (
        "WhisperForConditionalGeneration",
        {k: x for k, x in SEQ2SEQ.items() if k not in ("max_position_embeddings", "forced_eos_token_id")}
        | dict(num_mel_bins=8, max_source_positions=12, max_target_positions=12),
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND),
    "hubert": ("HubertForCTC", SOUND),
    "encodec": (
        "EncodecModel",
        dict(num_filters=2, hidden_size=8, upsampling_ratios=[2, 2], num_lstm_layers=1, codebook_size=8)
        | dict(codebook_dim=8),
    ),
}
