"""Qwen2-VL-7B-Instruct as published (8.29 B parameters, of which 0.7 B are the vision tower).

omnicompile plan examples/qwen2_vl_7b.py --gpus 8
"""


def build():
    from transformers import AutoModelForImageTextToText, Qwen2VLConfig

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return AutoModelForImageTextToText.from_config(config, dtype="bfloat16")
