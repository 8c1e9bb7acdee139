"""Qwen3-235B-A22B as published (235 B parameters, 22 B active per token; 128 experts, 8 per token).

omnicompile plan omnicompile.recipes.models.qwen3_235b_a22b:build --gpus 128
"""


def build():
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        router_aux_loss_coef=0.001,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return AutoModelForCausalLM.from_config(config, dtype="bfloat16")
