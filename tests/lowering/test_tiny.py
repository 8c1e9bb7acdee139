"""Tiny copies keep the structure of the model that they are copies of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omnicompile.capture.source import ModelSource, load_model_source
from omnicompile.errors import InputError
from omnicompile.lowering.tiny import tiny_copy
from omnicompile.lowering.tiny_config import LEVELS, shrink


def _config() -> object:
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "attention_dropout": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=151655)


def test_widths_stay_tied_and_sections_add_up() -> None:
    small = shrink(_config(), LEVELS[0])
    text, vision = small.text_config, small.vision_config
    head = text.hidden_size // text.num_attention_heads
    assert vision.hidden_size == text.hidden_size
    assert sum(text.rope_parameters["mrope_section"]) == head // 2
    assert vision.embed_dim % vision.num_heads == 0
    assert text.num_attention_heads % text.num_key_value_heads == 0 and text.num_key_value_heads > 1
    assert (text.num_hidden_layers, vision.depth) == (2, 2)


def test_special_tokens_are_in_the_tiny_vocabulary_and_distinct() -> None:
    small = shrink(_config(), LEVELS[0])
    ids = [small.image_token_id, small.video_token_id, small.vision_start_token_id]
    assert len(set(ids)) == 3 and max(ids) < small.text_config.vocab_size


def test_randomness_is_off_and_the_original_is_left() -> None:
    config = _config()
    assert shrink(config, LEVELS[0]).text_config.attention_dropout == 0.0
    assert config.text_config.attention_dropout == 0.1  # type: ignore[attr-defined]


def test_kinds_of_layers_survive() -> None:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(vision_config={"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]})
    vision = shrink(config, LEVELS[0]).vision_config
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth
    assert max(vision.fullatt_block_indexes) < vision.depth


def _file(folder: Path, text: str) -> ModelSource:
    path = folder / "model.py"
    path.write_text("import torch\nfrom torch import nn\n" + text)
    return load_model_source(str(path))


NET = """
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Embedding(64, width), nn.Linear(width, 64)
    def forward(self, input_ids, labels):
        return nn.functional.cross_entropy(self.b(self.a(input_ids)).flatten(0, 1), labels.flatten())
def build():
    return Net(1 << 20)
def inputs():
    ids = torch.arange(32)[None]
    return {"input_ids": ids, "labels": ids}
"""


def test_a_large_model_of_ones_own_needs_tiny(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"add def tiny\(\)"):
        tiny_copy(_file(tmp_path, NET))


def test_tiny_of_the_file_is_taken(tmp_path: Path) -> None:
    tiny = tiny_copy(_file(tmp_path, NET + "def tiny():\n    return Net(16)\n"))
    assert sum(p.numel() for p in tiny.model.parameters()) < 10_000
    assert next(tiny.model.parameters()).dtype == torch.float64
    first, second = tiny.batch(0), tiny.batch(1)
    assert first["labels"].shape == second["labels"].shape
    assert int((first["labels"] == -100).sum()) != int((second["labels"] == -100).sum())


def test_heads_may_keep_their_width_and_widths_their_ratios() -> None:
    whole = shrink(_config(), next(level for level in LEVELS if "whole heads" in level)).text_config
    assert whole.hidden_size // whole.num_attention_heads == 128
    assert whole.rope_parameters["mrope_section"] == [16, 24, 24]
    from transformers import PretrainedConfig

    projector = PretrainedConfig(hidden_size=1024, num_attention_heads=16, projector_hidden_size=4096)
    small = shrink(projector, next(level for level in LEVELS if "ratios" in level))
    assert small.projector_hidden_size == 4 * small.hidden_size


def test_state_space_heads_fill_the_expanded_width() -> None:
    from transformers import PretrainedConfig

    config = PretrainedConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_hidden_layers=4,
        mamba_expand=2,
        mamba_n_heads=128,
        mamba_d_head=64,
    )
    small = shrink(config, LEVELS[0])
    assert small.mamba_n_heads * small.mamba_d_head == 2 * small.hidden_size
