"""Qwen3-30B-A3B as published (30.5 B parameters, 3.3 B active per token; 128 experts, 8 per token).

omnicompile plan examples/qwen3_30b_a3b.py --gpus 64
"""


def build():
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
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
