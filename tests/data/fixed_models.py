"""Tiny models that take items of fixed size (images, clips of sound, videos), and samples for them of known sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omnicompile.data import Sample

ITEM = 120
TEXT = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip


def llava() -> nn.Module:
    """Images of 16 x 16 pixels, 16 tokens each."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=ITEM, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=16,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).float().train()


def voxtral() -> nn.Module:
    """Clips of 32 frames of 8 bands, 4 tokens each, through an encoder like Whisper's."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    audio = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_mel_bins": 8, "max_source_positions": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    config = VoxtralConfig(audio_config=audio, text_config=TEXT, audio_token_id=ITEM)
    return VoxtralForConditionalGeneration(config).float().train()


def onevision() -> nn.Module:
    """Videos of 3 frames of 16 x 16 pixels, 4 tokens a frame and one more."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"}, vision_config=VISION, image_token_id=121, video_token_id=ITEM,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config).float().train()


@dataclass(frozen=True)
class Kind:
    """name: of the forward's argument. shape: of one item. tokens: that it takes. word: for it in reports."""

    build: Callable[[], nn.Module]
    name: str
    shape: tuple[int, ...]
    tokens: int
    word: str
    block: str

    def encode(self, sample: Sample) -> dict[str, Any]:
        """`text` says the number of the sample and of its text tokens; `images` are as many as there are items."""
        number, length = map(int, (sample.text or "").split())
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1, 100, (length,), generator=generator).tolist()
        for place in range(len(sample.images)):
            at = 2 + place * (self.tokens + 2)
            ids[at:at] = [ITEM] * self.tokens
        labels = [-100 if token == ITEM else token for token in ids]
        given: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if sample.images:
            given[self.name] = torch.randn(len(sample.images), *self.shape, generator=generator)
        return given


KINDS = {
    "images": Kind(llava, "pixel_values", (3, 16, 16), 16, "images", "vision"),
    "sound": Kind(voxtral, "input_features", (8, 32), 4, "clips", "audio"),
    "video": Kind(onevision, "pixel_values_videos", (3, 3, 16, 16), 13, "videos", "vision"),
}


def records(count: int, every: int = 3) -> list[dict[str, Any]]:
    """Texts of 9 to 31 tokens, every third with one item, or two."""
    return [
        {"text": f"{n} {9 + n * 7 % 23}", "images": [0] * (1 + n // every % 2) if n % every == 0 else []}
        for n in range(count)
    ]
