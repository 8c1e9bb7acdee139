"""DeepSeek-V3 as published (671 B parameters, 37 B active per token; 256 experts, 8 per token, and a shared one).
Without its multi-token-prediction module, which transformers does not build.

omnicompile plan omnicompile.recipes.models.deepseek_v3:build --gpus 512
"""


def build():
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_shared_experts=1,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype="bfloat16")
