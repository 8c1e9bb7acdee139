"""Masks that the attention operator cannot stand for reach it; others are left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from omnicompile.anchors.huggingface import ATTENTION_NAME, anchored, attention_forward
from omnicompile.anchors.masks import anchor_mask

_SIZES = {"batch_size": 1, "q_length": 8, "kv_length": 8}


def test_causal_and_sliding_masks_are_the_operators_own() -> None:
    assert anchor_mask(**_SIZES, mask_function=causal_mask_function) is None
    sliding = sliding_window_causal_mask_function(4)
    assert anchor_mask(**_SIZES, mask_function=sliding, local_size=4) is None


def test_chunks_and_blocks_that_see_each_other_are_kept() -> None:
    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    mask = anchor_mask(**_SIZES, mask_function=chunked, local_size=4)
    assert mask is not None and mask.shape == (1, 1, 8, 8) and not mask[0, 0, 4, 3] and mask[0, 0, 5, 4]
    blocks = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]])))
    mask = anchor_mask(**_SIZES, mask_function=blocks, allow_is_causal_skip=False)
    assert mask is not None and mask[0, 0, 2, 4] and not mask[0, 0, 1, 4]


@pytest.mark.parametrize(("padding", "kept"), [([1] * 8, False), ([1] * 6 + [0] * 2, False), ([0] * 2 + [1] * 6, True)])
def test_padding_before_real_tokens_needs_a_mask(padding: list[int], kept: bool) -> None:
    mask = anchor_mask(**_SIZES, mask_function=causal_mask_function, attention_mask=torch.tensor([padding]).bool())
    assert (mask is not None) == kept


def test_a_mask_goes_with_a_soft_cap_and_sinks() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    module = nn.Module()
    sinks = torch.randn(4, dtype=torch.float64)
    masked, _ = attention_forward(module, query, key, value, mask, softcap=2.0, s_aux=sinks)
    anchored_, _ = attention_forward(module, query, key, value, None, softcap=2.0, s_aux=sinks)
    torch.testing.assert_close(masked, anchored_)
    with pytest.raises(NotImplementedError, match="dropout"):
        attention_forward(module, query, key, value, mask, dropout=0.1)


class _Config(PretrainedConfig):
    model_type = "tiny-own-attention"


class _OwnAttention(PreTrainedModel):
    """A class that does not work with flash attention, by its own flag."""

    config_class = _Config
    _supports_sdpa = True


class _Whole(PreTrainedModel):
    config_class = _Config
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.part = _OwnAttention(_Config())


def test_a_class_that_does_not_take_flash_attention_keeps_its_own() -> None:
    model = _Whole(_Config())
    before = model.part.config._attn_implementation
    with anchored(model):
        assert model.config._attn_implementation == ATTENTION_NAME
        assert model.part.config._attn_implementation == before != ATTENTION_NAME
    assert model.config._attn_implementation == before
