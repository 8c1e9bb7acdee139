"""The language model of VeOmni's published performance figure, which names no model: the figure's tokens/s and MFU fit
a dense model of 80 layers, hidden size 8192 and a vocabulary of 152,064, which is Qwen2-72B (72.7 B parameters).

omnicompile plan benchmarks/models/dense_72b.py --gpus 128
"""


def build():
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return AutoModelForCausalLM.from_config(config, dtype="bfloat16")
