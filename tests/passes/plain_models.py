"""Models that are no Hugging Face classes, or use cross attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import _build, text_batch


class PlainLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        return x + self.down(F.gelu(self.up(x)))


class PlainModel(nn.Module):
    """A hand-written decoder: learned positions, layer norms, torch's own attention, tied head."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, vocab: int = 128, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(PlainLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits)


class Output(dict[str, Tensor]):
    @property
    def loss(self) -> Tensor:
        return self["loss"]


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return PlainModel().train()


def speech_model() -> nn.Module:
    """An encoder of audio whose output a decoder reads by cross attention."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=128, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=32,
        max_target_positions=64, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, dropout=0.0,
    )  # fmt: skip
    return _build(WhisperForConditionalGeneration, config)


def speech_batch(seed: int, length: int = 32) -> dict[str, Tensor]:
    batch = text_batch(seed, length)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 16, 64, generator=generator)
    return {"input_features": features, "decoder_input_ids": batch["input_ids"], "labels": batch["labels"]}
