"""A 30B-A3B omni-modal mixture of experts after the paper's: Qwen3-30B-A3B reads what the vision and audio encoders of
Qwen2.5-Omni (675 M and 637 M parameters) put into its sequence. All parts are transformers' own, at published sizes.

The paper's image decoder is left out: it is frozen, takes part only in turning target images into tokens, and no
public configuration of it is known.

omnicompile plan benchmarks/models/omni_moe_30b_a3b.py --gpus 128 --freeze encoders
"""

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20]},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 2048,
}
AUDIO = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "max_source_positions": 1500,
    "n_window": 100,
    "output_dim": 2048,
}


def build():
    return _build(TEXT["num_hidden_layers"])


def tiny_depth():
    """Four layers of the foundation: for quick tests."""
    return _build(4)


def _build(layers):
    import torch
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextModel

    small = {"hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": TEXT["vocab_size"]}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    config = Qwen2_5OmniThinkerConfig(vision_config=VISION, audio_config=AUDIO, text_config=small | heads)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    config.text_config = Qwen3OmniMoeTextConfig(**(TEXT | {"num_hidden_layers": layers}))
    model.model.language_model = Qwen3OmniMoeThinkerTextModel(config.text_config)
    return model.to(torch.bfloat16)
