"""Published models at their published sizes, from configurations written out here: nothing is downloaded.

Sizes are those of each model's config.json on its hub. `small` builds keep every width and shorten the depth, for
captures that trace each layer.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Entry:
    """A model of the zoo. published: the figure that its publisher states, source: where. parts: the configuration
    dictionaries by part, which the closed-form count reads. shallow: depths by part where every layer is traced."""

    name: str
    family: str
    make: Callable[[dict[str, dict[str, Any]]], nn.Module]
    parts: dict[str, dict[str, Any]]
    params: int
    published: str
    source: str
    shallow: dict[str, dict[str, Any]]

    def build(self) -> nn.Module:
        """The model on the meta device, in bfloat16."""
        return self._made(self.parts)

    def small_parts(self) -> dict[str, dict[str, Any]]:
        return {part: sizes | self.shallow.get(part, {}) for part, sizes in self.parts.items()}

    def build_small(self) -> nn.Module:
        return self._made(self.small_parts())

    def _made(self, parts: dict[str, dict[str, Any]]) -> nn.Module:
        with torch.device("meta"):
            return self.make(parts).to(torch.bfloat16)


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


# --- Language models -----------------------------------------------------------------------------------------------

_LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip

_QWEN2_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_parameters": _rope(1e6, mrope_section=[16, 24, 24]),
}  # fmt: skip

_QWEN2_72B = _QWEN2_7B | {
    "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip

_MROPE3 = _rope(5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)

_QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6, "rope_parameters": _MROPE3,
}  # fmt: skip

_QWEN3_30B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip

_QWEN3_OMNI_TEXT = _QWEN3_30B | {
    "vocab_size": 152064, "intermediate_size": 768,
    "rope_parameters": _rope(1e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
}  # fmt: skip

_DEEPSEEK_V3 = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip

_JANUS_TEXT = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6,
}  # fmt: skip

# --- Encoders ------------------------------------------------------------------------------------------------------

_QWEN2_VISION = {
    "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip

_QWEN25_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip

_QWEN3_VISION = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip

_QWEN25_AUDIO = {
    "num_mel_bins": 128, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
    "d_model": 1280, "max_source_positions": 1500, "n_window": 100, "output_dim": 3584,
}  # fmt: skip

_QWEN3_AUDIO = {
    "num_mel_bins": 128, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
    "d_model": 1280, "max_source_positions": 1500, "n_window": 50, "n_window_infer": 800, "conv_chunksize": 500,
    "downsample_hidden_size": 480, "output_dim": 2048,
}  # fmt: skip

_WHISPER = {
    "vocab_size": 51866, "num_mel_bins": 128, "encoder_layers": 32, "decoder_layers": 32,
    "encoder_attention_heads": 20, "decoder_attention_heads": 20, "d_model": 1280, "encoder_ffn_dim": 5120,
    "decoder_ffn_dim": 5120, "max_source_positions": 1500, "max_target_positions": 448,
}  # fmt: skip

_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}

_JANUS_VISION = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16, "image_size": 384,
    "mlp_ratio": 4.0, "projection_dim": 4096, "depth": 2, "num_image_tokens": 576,
}  # fmt: skip

_JANUS_VQ = {
    "embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "projection_dim": 4096, "image_token_embed_dim": 4096,
    "num_patches": 24,
}  # fmt: skip

# --- Builders ------------------------------------------------------------------------------------------------------


def _llama(parts):
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**parts["text"], rope_parameters=scaling))


def _qwen2_vl(parts):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = parts["vision"] | {"hidden_size": parts["text"]["hidden_size"]}
    config = Qwen2VLConfig(text_config=parts["text"], vision_config=vision, tie_word_embeddings=False)
    return Qwen2VLForConditionalGeneration(config)


def _qwen25_vl(parts):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(text_config=parts["text"], vision_config=parts["vision"], tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(parts):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(text_config=parts["text"], vision_config=parts["vision"], tie_word_embeddings=False)
    return Qwen3VLForConditionalGeneration(config)


def _qwen3_vl_moe(parts):
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(text_config=parts["text"], vision_config=parts["vision"], tie_word_embeddings=False)
    return Qwen3VLMoeForConditionalGeneration(config)


_OMNI_IDS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "audio_end_token_id": 151648}


def _qwen25_omni(parts):
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(
        text_config=parts["text"], vision_config=parts["vision"], audio_config=parts["audio"], **_OMNI_IDS
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen3_omni(parts):
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    config = Qwen3OmniMoeThinkerConfig(
        text_config=parts["text"], vision_config=parts["vision"], audio_config=parts["audio"], **_OMNI_IDS
    )
    return Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _qwen3_moe(parts):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**parts["text"], rope_parameters=_rope(1e6)))


def _deepseek_v3(parts):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**parts["text"]))


def _janus(parts):
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    config = JanusConfig(
        text_config=LlamaConfig(**parts["text"]),
        vision_config=JanusVisionConfig(**parts["vision"]),
        vq_config=JanusVQVAEConfig(**parts["generation"]),
        image_token_id=100581,
        tie_word_embeddings=False,
    )
    return JanusForConditionalGeneration(config)


def _whisper(parts):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(WhisperConfig(**parts["whisper"]))


def _siglip(parts):
    from transformers import SiglipConfig, SiglipModel

    text = parts["text"] | {"vocab_size": 32000, "max_position_embeddings": 64}
    vision = parts["vision"] | {"image_size": 384, "patch_size": 14}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def _custom(_parts):
    return runpy.run_path(str(EXAMPLES / "custom_model.py"))["build"]()


# --- The zoo -------------------------------------------------------------------------------------------------------

_HUB = "safetensors metadata of {} on the Hugging Face hub"
_SHORT_TEXT = {"num_hidden_layers": 6}
_SHORT_WINDOWED = {"depth": 6, "fullatt_block_indexes": [2, 5]}
_SHORT_DEEPSTACK = {"depth": 6, "deepstack_visual_indexes": [1, 3, 4]}
_SHORT_AUDIO = {"encoder_layers": 6}

ENTRIES = (
    Entry("Llama-3.1-8B", "dense", _llama, {"text": _LLAMA_8B}, 8_030_261_248, "8.03 B",
          _HUB.format("meta-llama/Llama-3.1-8B"), {"text": _SHORT_TEXT}),
    Entry("Qwen3-30B-A3B", "moe", _qwen3_moe, {"text": _QWEN3_30B}, 30_532_122_624, "30.5 B",
          "model card of Qwen/Qwen3-30B-A3B", {"text": _SHORT_TEXT}),
    Entry("DeepSeek-V3", "mla", _deepseek_v3, {"text": _DEEPSEEK_V3}, 671_026_404_352, "671 B",
          "DeepSeek-V3 technical report (without the multi-token-prediction module)", {"text": _SHORT_TEXT}),
    Entry("Qwen2-VL-7B", "qwen2_vl", _qwen2_vl, {"text": _QWEN2_7B, "vision": _QWEN2_VISION}, 8_291_375_616, "8.29 B",
          _HUB.format("Qwen/Qwen2-VL-7B-Instruct"), {"text": _SHORT_TEXT, "vision": {"depth": 6}}),
    Entry("Qwen2-VL-72B", "qwen2_vl", _qwen2_vl, {"text": _QWEN2_72B, "vision": _QWEN2_VISION}, 73_405_560_320,
          "73.4 B", _HUB.format("Qwen/Qwen2-VL-72B-Instruct"), {"text": _SHORT_TEXT, "vision": {"depth": 6}}),
    Entry("Qwen2.5-VL-7B", "qwen25_vl", _qwen25_vl, {"text": _QWEN2_7B, "vision": _QWEN25_VISION}, 8_292_166_656,
          "8.29 B", _HUB.format("Qwen/Qwen2.5-VL-7B-Instruct"), {"text": _SHORT_TEXT, "vision": _SHORT_WINDOWED}),
    Entry("Qwen3-VL-8B", "qwen3_vl", _qwen3_vl,
          {"text": _QWEN3_8B, "vision": _QWEN3_VISION | {"out_hidden_size": 4096}}, 8_767_123_696, "8.77 B",
          _HUB.format("Qwen/Qwen3-VL-8B-Instruct"), {"text": _SHORT_TEXT, "vision": _SHORT_DEEPSTACK}),
    Entry("Qwen3-VL-30B-A3B", "qwen3_vl", _qwen3_vl_moe,
          {"text": _QWEN3_30B | {"rope_parameters": _MROPE3}, "vision": _QWEN3_VISION | {"out_hidden_size": 2048}},
          31_070_754_032, "31.1 B", _HUB.format("Qwen/Qwen3-VL-30B-A3B-Instruct"),
          {"text": _SHORT_TEXT, "vision": _SHORT_DEEPSTACK}),
    Entry("Qwen2.5-Omni-7B thinker", "qwen25_omni", _qwen25_omni,
          {"text": _QWEN2_7B, "vision": _QWEN25_VISION, "audio": _QWEN25_AUDIO}, 8_931_813_888, "8.93 B",
          "17.9 GB of bfloat16 weights of Tevatron/Qwen2.5-Omni-7B-Thinker on the Hugging Face hub",
          {"text": _SHORT_TEXT, "vision": _SHORT_WINDOWED, "audio": _SHORT_AUDIO}),
    Entry("Qwen3-Omni-30B-A3B thinker", "qwen3_omni", _qwen3_omni,
          {"text": _QWEN3_OMNI_TEXT, "vision": _QWEN3_VISION | {"out_hidden_size": 2048}, "audio": _QWEN3_AUDIO},
          31_719_205_488, "31.7 B",
          "Qwen3-Omni technical report: 30 B text, 540 M vision, 650 M audio; Captioner, the thinker alone, on the hub",
          {"text": _SHORT_TEXT, "vision": _SHORT_DEEPSTACK, "audio": _SHORT_AUDIO}),
    Entry("Janus-Pro-7B", "janus", _janus, {"text": _JANUS_TEXT, "vision": _JANUS_VISION, "generation": _JANUS_VQ},
          7_407_773_323, "7.42 B", "14.84 GB of bfloat16 weights of deepseek-ai/Janus-Pro-7B on the hub, which hold an "
          "unused attention-pooling head of 12.6 M in the vision tower that transformers leaves out",
          {"text": _SHORT_TEXT, "vision": {"num_hidden_layers": 6}}),
    Entry("Whisper-large-v3", "whisper", _whisper, {"whisper": _WHISPER}, 1_543_490_560, "1.54 B",
          _HUB.format("openai/whisper-large-v3"), {"whisper": {"encoder_layers": 6, "decoder_layers": 6}}),
    Entry("SigLIP-so400m", "siglip", _siglip, {"text": _SIGLIP, "vision": _SIGLIP}, 877_960_498, "878 M",
          _HUB.format("google/siglip-so400m-patch14-384"), {"text": _SHORT_TEXT, "vision": _SHORT_TEXT}),
    Entry("examples/custom_model.py", "custom", _custom, {}, 1_246_147_584, "1.25 B", "its own docstring", {}),
)  # fmt: skip

ZOO = {entry.name: entry for entry in ENTRIES}
