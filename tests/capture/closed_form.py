"""FLOPs of the zoo's models, counted by hand from their architectures. Nothing here is shared with the capture.

A multiply and an add count as two. Counted: matrix products, convolutions, attention (without the causal discount,
summed over segments) and experts. In the backward every product counts twice (gradients of its input and of its
weight), once if its input needs no gradient (pixels, spectrograms); attention costs 5 products where the forward has 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One training sample. grid: (height, width) of each image in patches. frames: spectrogram columns of each clip."""

    seq_len: int
    images: int = 0
    grid: tuple[int, int] = (0, 0)
    clips: int = 0
    frames: int = 0

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Count:
    """FLOPs of one sample."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Count:
        return Count(self.forward * times, self.backward * times)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def product(rows: float, inner: float, outer: float, input_grad: bool = True) -> Count:
    """rows x inner times inner x outer."""
    once = 2.0 * rows * inner * outer
    return Count(once, once * (2 if input_grad else 1))


def attention(pairs: float, heads: int, qk_dim: int, v_dim: int | None = None) -> Count:
    """pairs: sum over segments of queries x keys."""
    v_dim = qk_dim if v_dim is None else v_dim
    # Backward: scores again, gradient of queries, gradient of keys; gradient of weights, gradient of values.
    return Count(2.0 * pairs * heads * (qk_dim + v_dim), 2.0 * pairs * heads * (3 * qk_dim + 2 * v_dim))


def total(counts: Iterable[Count]) -> Count:
    return sum(counts, Count())


# --- Language backbones --------------------------------------------------------------------------------------------


def grouped_query_attention(c: dict[str, Any], tokens: int) -> Count:
    hidden, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim = c.get("head_dim") or hidden // heads
    return total(
        [
            product(tokens, hidden, (heads + 2 * kv) * dim),
            attention(tokens**2, heads, dim),
            product(tokens, heads * dim, hidden),
        ]
    )


def latent_attention(c: dict[str, Any], tokens: int) -> Count:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    return total(
        [
            product(tokens, hidden, c["q_lora_rank"]),
            product(tokens, c["q_lora_rank"], heads * (nope + rope)),
            product(tokens, hidden, c["kv_lora_rank"] + rope),
            product(tokens, c["kv_lora_rank"], heads * (nope + value)),
            attention(tokens**2, heads, nope + rope, value),
            product(tokens, heads * value, hidden),
        ]
    )


def gated_mlp(hidden: int, inner: int, tokens: float) -> Count:
    return product(tokens, hidden, inner) * 3


def experts(c: dict[str, Any], tokens: int, count: int) -> Count:
    router = product(tokens, c["hidden_size"], count)
    return router + gated_mlp(c["hidden_size"], c["moe_intermediate_size"], tokens * c["num_experts_per_tok"])


def decoder(c: dict[str, Any], tokens: int) -> Count:
    """Embedding look-up (free), layers, head over all positions."""
    head = product(tokens, c["hidden_size"], c["vocab_size"])
    dense = gated_mlp(c["hidden_size"], c["intermediate_size"], tokens)
    layers = c["num_hidden_layers"]
    if "kv_lora_rank" in c:
        first = c["first_k_dense_replace"]
        shared = gated_mlp(c["hidden_size"], c["moe_intermediate_size"] * c["n_shared_experts"], tokens)
        routed = experts(c, tokens, c["n_routed_experts"]) + shared
        return head + latent_attention(c, tokens) * layers + dense * first + routed * (layers - first)
    mlp = experts(c, tokens, c["num_experts"]) if "num_experts" in c else dense
    return head + (grouped_query_attention(c, tokens) + mlp) * layers


# --- Vision --------------------------------------------------------------------------------------------------------


def transformer_block(tokens: float, width: int, inner: int, pairs: float, heads: int) -> Count:
    """Queries, keys, values and output of the model's width, and a two-layer MLP."""
    return total(
        [
            product(tokens, width, 4 * width),
            attention(pairs, heads, width // heads),
            product(tokens, width, inner) * 2,
        ]
    )


def merger(patches: float, width: int, out: int) -> Count:
    """Four patches become one token through a two-layer MLP."""
    return product(patches / 4, 4 * width, 4 * width) + product(patches / 4, 4 * width, out)


def vision_2(p: Parts, s: Sample) -> Count:
    c, patches = p["vision"], s.images * s.patches
    width = c["embed_dim"]
    block = transformer_block(patches, width, 4 * width, s.images * s.patches**2, c["num_heads"])
    embed = product(patches, 3 * 2 * 14 * 14, width, input_grad=False)
    return embed + block * c["depth"] + merger(patches, width, p["text"]["hidden_size"])


def window_pairs(grid: tuple[int, int], side: int) -> int:
    """Sum of squared sizes of the windows of `side` x `side` patches of a grid; those at the edge are smaller."""

    def cuts(length: int) -> list[int]:
        return [min(side, length - start) for start in range(0, length, side)]

    return sum((h * w) ** 2 for h in cuts(grid[0]) for w in cuts(grid[1]))


def vision_25(p: Parts, s: Sample) -> Count:
    c, patches = p["vision"], s.images * s.patches
    width, heads, full = c["hidden_size"], c["num_heads"], len(c["fullatt_block_indexes"])
    dense = product(patches, width, 4 * width) + gated_mlp(width, c["intermediate_size"], patches)
    windowed = attention(s.images * window_pairs(s.grid, c["window_size"] // c["patch_size"]), heads, width // heads)
    whole = attention(s.images * s.patches**2, heads, width // heads)
    return total(
        [
            product(patches, 3 * 2 * 14 * 14, width, input_grad=False),
            dense * c["depth"],
            whole * full,
            windowed * (c["depth"] - full),
            merger(patches, width, c["out_hidden_size"]),
        ]
    )


def vision_3(p: Parts, s: Sample) -> Count:
    c, patches = p["vision"], s.images * s.patches
    width = c["hidden_size"]
    block = transformer_block(patches, width, c["intermediate_size"], s.images * s.patches**2, c["num_heads"])
    mergers = 1 + len(c["deepstack_visual_indexes"])
    embed = product(patches, 3 * 2 * 16 * 16, width, input_grad=False)
    return embed + block * c["depth"] + merger(patches, width, c["out_hidden_size"]) * mergers


# --- Audio ---------------------------------------------------------------------------------------------------------


def audio_25(p: Parts, s: Sample) -> Count:
    """Chunks of 200 frames: two convolutions (the second of stride 2), attention within a chunk, pooling by 2."""
    c, width = p["audio"], p["audio"]["d_model"]
    chunk = 2 * c["n_window"]
    lengths = [min(chunk, s.frames - start) for start in range(0, s.frames, chunk)]
    padded = len(lengths) * min(chunk, s.frames) * s.clips
    tokens = s.clips * sum(ceil(n / 2) for n in lengths)
    pairs = s.clips * sum(ceil(n / 2) ** 2 for n in lengths)
    block = transformer_block(tokens, width, c["encoder_ffn_dim"], pairs, c["encoder_attention_heads"])
    return total(
        [
            product(padded, 3 * c["num_mel_bins"], width, input_grad=False),
            product(padded / 2, 3 * width, width),
            block * c["encoder_layers"],
            product(tokens / 2, width, c["output_dim"]),
        ]
    )


def audio_3(p: Parts, s: Sample) -> Count:
    """Chunks of 100 frames: three 2-D convolutions of stride 2 (128 x 100 to 16 x 13), attention within 8 chunks."""
    c, width, channels = p["audio"], p["audio"]["d_model"], p["audio"]["downsample_hidden_size"]
    chunk = 2 * c["n_window"]
    chunks = s.clips * ceil(s.frames / chunk)
    per_clip = s.frames // chunk * 13 + ceil(ceil(ceil(s.frames % chunk / 2) / 2) / 2)
    window = 13 * (c["n_window_infer"] // chunk)
    spans = [min(window, per_clip - start) for start in range(0, per_clip, window)]
    tokens, pairs = s.clips * per_clip, s.clips * sum(n * n for n in spans)
    block = transformer_block(tokens, width, c["encoder_ffn_dim"], pairs, c["encoder_attention_heads"])
    return total(
        [
            product(chunks * 64 * 50, 9, channels, input_grad=False),
            product(chunks * 32 * 25, 9 * channels, channels),
            product(chunks * 16 * 13, 9 * channels, channels),
            product(chunks * 13, 16 * channels, width),
            block * c["encoder_layers"],
            product(tokens, width, width),
            product(tokens, width, c["output_dim"]),
        ]
    )


# --- Whole models --------------------------------------------------------------------------------------------------


def text_only(p: Parts, s: Sample) -> Count:
    return decoder(p["text"], s.seq_len)


def with_encoders(*encoders: Callable[[Parts, Sample], Count]) -> Callable[[Parts, Sample], Count]:
    return lambda p, s: total([decoder(p["text"], s.seq_len), *(encode(p, s) for encode in encoders)])


def janus(p: Parts, s: Sample) -> Count:
    """Vision tower of 24 x 24 patches and a two-layer projector; the generation heads take no part in the loss."""
    c, tokens = p["vision"], s.images * 24 * 24
    width, out = c["hidden_size"], p["text"]["hidden_size"]
    block = transformer_block(tokens, width, 4 * width, s.images * (24 * 24) ** 2, c["num_attention_heads"])
    return total(
        [
            product(tokens, 3 * 16 * 16, width, input_grad=False),
            block * c["num_hidden_layers"],
            product(tokens, width, out),
            product(tokens, out, out),
            decoder(p["text"], s.seq_len),
        ]
    )


def whisper(p: Parts, s: Sample) -> Count:
    """Encoder of 1500 positions; decoder with cross attention. One text per clip."""
    c = p["whisper"]
    width, heads, sound, text = c["d_model"], c["encoder_attention_heads"], 1500, s.seq_len
    cross = total(
        [
            product(text, width, 2 * width),
            product(sound, width, 2 * width),
            attention(text * sound, heads, width // heads),
        ]
    )
    encoder = transformer_block(sound, width, c["encoder_ffn_dim"], sound**2, heads)
    decoder_layer = transformer_block(text, width, c["decoder_ffn_dim"], text**2, heads) + cross
    return total(
        [
            product(2 * sound, 3 * c["num_mel_bins"], width, input_grad=False),
            product(sound, 3 * width, width),
            encoder * c["encoder_layers"],
            decoder_layer * c["decoder_layers"],
            product(text, width, c["vocab_size"]),
        ]
    )


def siglip(p: Parts, s: Sample) -> Count:
    """Two towers; the image is pooled by one learned query. One text per image."""
    v, t, patches, text = p["vision"], p["text"], 27 * 27, s.seq_len
    width, inner, heads = v["hidden_size"], v["intermediate_size"], v["num_attention_heads"]
    pooling = total(
        [
            product(1, width, 2 * width),
            product(patches, width, 2 * width),
            attention(patches, heads, width // heads),
            product(1, width, inner) * 2,
        ]
    )
    return total(
        [
            product(patches, 3 * 14 * 14, width, input_grad=False),
            transformer_block(patches, width, inner, patches**2, heads) * v["num_hidden_layers"],
            pooling,
            transformer_block(text, width, inner, text**2, heads) * t["num_hidden_layers"],
            product(1, width, width),
            product(1, width, 1),
        ]
    )


def custom(_: Parts, s: Sample) -> Count:
    """examples/custom_model.py: a ViT of 24 x 24 patches, a projector, 16 decoder layers."""
    tokens, text = s.images * 576, s.seq_len
    backbone = {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 6144,
        "num_hidden_layers": 16, "vocab_size": 32000,
    }  # fmt: skip
    return total(
        [
            product(tokens, 3 * 14 * 14, 1024, input_grad=False),
            transformer_block(tokens, 1024, 4096, s.images * 576**2, 16) * 24,
            product(tokens, 1024, 2048),
            product(tokens, 2048, 2048),
            decoder(backbone, text),
        ]
    )


BY_FAMILY: dict[str, Callable[[Parts, Sample], Count]] = {
    "dense": text_only,
    "moe": text_only,
    "mla": text_only,
    "qwen2_vl": with_encoders(vision_2),
    "qwen25_vl": with_encoders(vision_25),
    "qwen3_vl": with_encoders(vision_3),
    "qwen25_omni": with_encoders(vision_25, audio_25),
    "qwen3_omni": with_encoders(vision_3, audio_3),
    "janus": janus,
    "whisper": whisper,
    "siglip": siglip,
    "custom": custom,
}


def count(family: str, parts: Parts, sample: Sample) -> Count:
    """Forward and backward FLOPs of one sample of a model of the zoo."""
    return BY_FAMILY[family](parts, sample)
