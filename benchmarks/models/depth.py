"""Qwen2-VL-72B with other numbers of layers in its language model, all else equal: how planning grows with depth.

omnicompile plan benchmarks/models/depth.py:layers_28 --gpus 128
"""

TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 8192,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def layers_2():
    return _build(2)


def layers_28():
    return _build(28)


def layers_80():
    return _build(80)


def _build(layers):
    from transformers import AutoModelForImageTextToText, Qwen2VLConfig

    text = TEXT | {"num_hidden_layers": layers}
    config = Qwen2VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False)
    return AutoModelForImageTextToText.from_config(config, dtype="bfloat16")
