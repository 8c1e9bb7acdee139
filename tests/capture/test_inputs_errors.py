"""What is refused when example inputs are made, and what a model's constraints say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from omnicompile.capture.inputs import (
    AudioConstraints,
    ImageConstraints,
    InputRequest,
    input_constraints,
    make_inputs,
)
from omnicompile.errors import CaptureError

transformers = pytest.importorskip("transformers")


def _tiny_vlm() -> nn.Module:
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4}
    with torch.device("meta"):
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
        return transformers.Qwen2VLForConditionalGeneration(config)


def test_a_model_without_a_configuration_needs_inputs_of_its_own() -> None:
    with pytest.raises(CaptureError, match=r"Linear, which has no Hugging Face configuration.*inputs\(\)"):
        make_inputs(nn.Linear(2, 2), InputRequest(8))


def test_placeholders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CaptureError, match="a sequence of 100 tokens cannot hold its images"):
        make_inputs(_tiny_vlm(), InputRequest(100, images=2, image_grid=(20, 20)))


def test_a_grid_that_merging_does_not_divide_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"\(5, 4\) is not a multiple of \(2, 2\)"):
        make_inputs(_tiny_vlm(), InputRequest(100, images=1, image_grid=(5, 4)))


def test_a_text_longer_than_learned_positions_is_refused() -> None:
    tower: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=tower, vision_config=tower))
    assert input_constraints(model).max_seq_len == 64
    with pytest.raises(CaptureError, match="at most 64 text tokens, got 65"):
        make_inputs(model, InputRequest(65, images=2))


def test_a_forward_that_rejects_every_guess_names_the_inputs() -> None:
    model = _tiny_vlm()
    model.model.visual.patch_embed.proj = nn.Linear(7, 64, device="meta")
    named = r"cannot guess the image inputs \(image_grid_thw, pixel_values\).*inputs\(\)"
    with pytest.raises(CaptureError, match=named):
        make_inputs(model, InputRequest(100, images=1, image_grid=(4, 4)))


def test_nearest_sizes_keep_to_the_constraints() -> None:
    assert ImageConstraints(14, multiple=(2, 2)).nearest_grid(900, 10) == (64, 2)
    assert ImageConstraints(16, grid=(24, 24)).nearest_grid(900, 10) == (24, 24)
    assert AudioConstraints(multiple=200).nearest_frames(9.2) == 1000
    assert AudioConstraints(frames=3000).nearest_frames(1) == 3000
