"""Audio arguments, by the names that Hugging Face processors give them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from omnicompile.capture.inputs.facts import Facts, first_value
from omnicompile.capture.inputs.types import AudioConstraints, FloatSpec

FEATURES = ("input_features", "audio_input_features")
WAVEFORMS = ("input_values",)
MASKS = ("feature_attention_mask", "input_features_mask", "audio_attention_mask", "input_values_mask", "padding_mask")
_MEL_FIELDS = ("num_mel_bins", "n_mel_bins", "mel_bins", "feature_size", "input_feat_size", "input_size", "input_dim")
_SAMPLE_RATE = 16000
_FRAME_MULTIPLE = 8  # three stride-2 convolutions, the most that audio front ends have


def audio_argument(facts: Facts) -> str | None:
    return facts.first_argument(*FEATURES, *WAVEFORMS)


def audio_constraints(facts: Facts) -> AudioConstraints | None:
    """None for a model that takes no audio."""
    name = audio_argument(facts)
    if name is None or not has_audio_tower(facts):
        return None
    configs = facts.audio_configs
    rate = int(first_value(configs, "sampling_rate", "sample_rate") or _SAMPLE_RATE)
    if name in WAVEFORMS:
        return AudioConstraints(multiple=_hop(facts), frames_per_second=rate, waveform=True)
    window = first_value(configs, "n_window")
    if window is not None:
        return AudioConstraints(multiple=2 * int(window))
    positions = first_value(configs, "max_source_positions")
    if positions is not None:
        return AudioConstraints(frames=2 * int(positions))
    return AudioConstraints(multiple=_FRAME_MULTIPLE)


def has_audio_tower(facts: Facts) -> bool:
    """Models that can be configured without audio keep the argument and have no configuration for the tower."""
    stated = getattr(facts.config, "audio_config", "absent")
    return stated is not None


def _hop(facts: Facts) -> int:
    """Samples of a waveform per frame: the product of the strides that the configuration states."""
    hop = first_value(facts.audio_configs, "hop_length", "frame_size")
    if hop is not None:
        return int(hop)
    strides = first_value(facts.audio_configs, "patch_sizes", "downsampling_ratios", "conv_stride", "upsampling_ratios")
    return math.prod(strides) if strides is not None else 320


def audio_layouts(facts: Facts, clips: int, frames: int) -> Iterator[dict[str, Any]]:
    """Possible audio arguments for `clips` clips of `frames` frames, most specific first."""
    name = audio_argument(facts)
    assert name is not None
    shapes: list[tuple[int, ...]]
    if name in WAVEFORMS:
        shapes = [(clips, frames), (clips, 1, frames), (clips, frames, 1)]
    else:
        mel = int(first_value(facts.audio_configs, *_MEL_FIELDS) or 80)
        mel *= int(first_value(facts.audio_configs, "num_stacked_frames") or 1)
        shapes = [(clips, mel, frames), (clips, frames, mel)]
    masks = [mask for mask in MASKS if mask in facts.arguments]
    for shape in shapes:
        given: dict[str, Any] = {name: FloatSpec(shape, facts.dtype)}
        for mask in masks:
            dtype = torch.long if mask == "feature_attention_mask" else torch.bool
            given[mask] = torch.ones(clips, frames, dtype=dtype, device="cpu")
        if not masks and "audio_feature_lengths" in facts.arguments:
            given["audio_feature_lengths"] = torch.full((clips,), frames, device="cpu")
        samples = frames * int(first_value(facts.audio_configs, "hop_length") or 1)
        given |= {
            n: torch.full((clips,), samples, device="cpu") for n in facts.arguments if n.endswith("sample_lengths")
        }
        if "audio_embed_sizes" in facts.arguments:  # no less than all features of a clip
            given["audio_embed_sizes"] = torch.full((clips,), frames, device="cpu")
        yield given
    if masks:
        for shape in shapes:
            yield {name: FloatSpec(shape, facts.dtype)}
