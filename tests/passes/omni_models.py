"""Tiny models that take images and audio, and one with images of a fixed size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .models import _build, text_batch

IMAGE, AUDIO, VIDEO = 120, 121, 119
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _omni_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    } | more  # fmt: skip


def _omni_audio(**more: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32,
        "output_dim": 32,
    } | more  # fmt: skip


def _omni_text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1,
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
    } | more  # fmt: skip


_TOKENS = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "audio_token_id": AUDIO, "audio_token_index": AUDIO,
    "video_token_id": VIDEO, "video_token_index": VIDEO, "vision_start_token_id": 122, "vision_end_token_id": 123,
    "audio_start_token_id": 124, "audio_end_token_id": 125,
}  # fmt: skip


def omni_model() -> nn.Module:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    vision = _omni_vision(window_size=16, fullatt_block_indexes=[1])
    config = Qwen2_5OmniThinkerConfig(
        text_config=_omni_text(), vision_config=vision, audio_config=_omni_audio(n_window=8), **_TOKENS
    )
    return _build(Qwen2_5OmniThinkerForConditionalGeneration, config)


def omni_mixture_model() -> nn.Module:
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    text = _omni_text(
        head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        rope_parameters=_ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    )  # fmt: skip
    vision = _omni_vision(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    audio = _omni_audio(n_window=50, n_window_infer=100, downsample_hidden_size=8)
    config = Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=vision, audio_config=audio, **_TOKENS)
    return _build(Qwen3OmniMoeThinkerForConditionalGeneration, config)


def omni_batch(seed: int, mixture: bool, length: int = 96) -> dict[str, Tensor]:
    """A row of text with two images and two audio clips."""
    batch = text_batch(seed, length)
    ids, position = batch["input_ids"], 3
    grids, frames = [(1, 4, 4), (1, 8, 4)], [100, 60] if mixture else [32, 24]
    spans = [(IMAGE, t * h * w // 4, 122, 123) for t, h, w in grids]
    spans += [(AUDIO, _audio_tokens(f, mixture), 124, 125) for f in frames]
    for token, count, start, end in spans:
        ids[0, position], ids[0, position + count + 1] = start, end
        ids[0, position + 1 : position + 1 + count] = token
        position += count + 3
    batch["labels"] = torch.where((ids == IMAGE) | (ids == AUDIO), -100, batch["labels"])
    generator = torch.Generator().manual_seed(seed + 1000)
    mask = torch.zeros(len(frames), max(frames), dtype=torch.long)
    for row, count in enumerate(frames):
        mask[row, :count] = 1
    patches = sum(t * h * w for t, h, w in grids)
    return batch | {
        "image_grid_thw": torch.tensor(grids), "pixel_values": torch.randn(patches, 96, generator=generator),
        "input_features": torch.randn(len(frames), 16, max(frames), generator=generator), "feature_attention_mask":
        mask,
    }  # fmt: skip


def _audio_tokens(frames: int, mixture: bool) -> int:
    if not mixture:
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    rest = (frames % 100 - 1) // 2 + 1
    return ((rest - 1) // 2 + 1 - 1) // 2 + 1 + (frames // 100) * 13 if frames % 100 else (frames // 100) * 13


def fixed_image_model() -> nn.Module:
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    text = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, projection_dim=32,
        depth=2, num_image_tokens=16, mlp_ratio=2.0,
    )  # fmt: skip
    codes = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=16, projection_dim=32, image_token_embed_dim=32, base_channels=32,
        latent_channels=8, channel_multiplier=[1], num_res_blocks=1,
    )  # fmt: skip
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=codes, image_token_id=IMAGE)
    return _build(JanusForConditionalGeneration, config)


def fixed_image_batch(seed: int, images: int = 2, length: int = 64) -> dict[str, Tensor]:
    batch = text_batch(seed, length)
    ids = batch["input_ids"]
    for image in range(images):
        start = 3 + image * 19
        ids[0, start : start + 16] = IMAGE
    batch["labels"] = torch.where(ids == IMAGE, -100, batch["labels"])
    generator = torch.Generator().manual_seed(seed + 1000)
    return batch | {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)}
