"""Qwen2.5-VL-72B-Instruct as published (73.4 B parameters, of which 0.7 B are the vision tower).

omnicompile plan omnicompile.recipes.models.qwen2_5_vl_72b:build --gpus 128
"""


def build():
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    text = {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3456,
        "num_heads": 16,
        "out_hidden_size": 8192,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return AutoModelForImageTextToText.from_config(config, dtype="bfloat16")
