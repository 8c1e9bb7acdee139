"""What a configuration leaves open is filled for a capture, and noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from omnicompile.capture.inputs import input_constraints
from omnicompile.capture.inputs.probe import stated_rows
from omnicompile.capture.inputs.stand_ins import placeholders_filled

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def _idefics(**more: Any) -> nn.Module:
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT, "pad_token_id": 0}, vision_config={**VISION, **more}, scale_factor=2
    )
    with torch.device("meta"):
        return transformers.Idefics3ForConditionalGeneration(config)


def _voxtral(**more: Any) -> nn.Module:
    audio = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.VoxtralConfig(text_config={"model_type": "llama", **TEXT}, audio_config=audio, **more)
    with torch.device("meta"):
        return transformers.VoxtralForConditionalGeneration(config)


def test_an_unset_placeholder_gets_a_free_id_meanwhile_and_a_note() -> None:
    model = _voxtral()
    assert model.config.audio_token_id is None
    with placeholders_filled(model) as notes:
        assert model.config.audio_token_id == 999
        assert notes == ("the configuration sets no audio_token_id: planned with 999, a free id of the vocabulary",)
    assert model.config.audio_token_id is None


def test_a_placeholder_that_is_set_stays() -> None:
    model = _voxtral(audio_token_id=7)
    with placeholders_filled(model) as notes:
        assert (model.config.audio_token_id, notes) == (7, ())


def test_an_image_size_that_merging_does_not_divide_is_replaced_by_the_nearest_and_noted() -> None:
    images = input_constraints(_idefics(image_size=224, patch_size=32)).images
    assert images is not None and images.grid == (8, 8)
    assert images.note.endswith("planned at 256 x 256")
    images = input_constraints(_idefics(image_size=256, patch_size=32)).images
    assert images is not None and (images.grid, images.note) == ((8, 8), "")


def test_errors_tell_how_many_features_a_model_wants_placeholders_for() -> None:
    told = ValueError("Image features and image tokens do not match: tokens: 46, features 1334")
    assert stated_rows(told, 46) == 1334
    added = RuntimeError("The size of tensor a (2944) must match the size of tensor b (85376) at dimension 0")
    assert stated_rows(added, 46) == 1334
    assert stated_rows(RuntimeError("The size of tensor a (100) must match the size of tensor b (7)"), 46) == 0
    assert stated_rows(RuntimeError("something else"), 46) == 0
