"""A packed row gives the losses of its samples alone: in the plain model, through the anchors, and distributed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    dense_model,
    image_batch,
    make_plan,
    mixture_model,
    reference_gradients,
    run_ranks,
    text_batch,
    vision_language_model,
    worst_error,
)
from torch import Tensor, nn
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sliding_window_causal_mask_function,
)

import omnicompile
from omnicompile.anchors.huggingface import anchored
from omnicompile.anchors.masks import anchor_mask, segment_bounds
from omnicompile.capture.inputs.facts import Facts
from omnicompile.plan import Layout, Mesh

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])


def test_a_packed_mask_is_handed_on_as_bounds() -> None:
    packed = packed_sequence_compatibility_function(causal_mask_function, POSITIONS, SEGMENTS)
    mask = anchor_mask(batch_size=1, q_length=8, kv_length=8, mask_function=packed, allow_is_causal_skip=False)
    assert mask is not None and mask.tolist() == [0, 3, 8] and mask.dtype == torch.int32


def test_a_window_within_packed_segments_is_handed_on_as_bounds() -> None:
    packed = packed_sequence_compatibility_function(sliding_window_causal_mask_function(2), POSITIONS, SEGMENTS)
    bounds = segment_bounds(packed, 8, 2)
    assert bounds is not None and bounds.tolist() == [0, 3, 8]
    assert segment_bounds(packed, 8, None) is None and segment_bounds(packed, 8, 3) is None


def test_masks_that_are_more_than_segments_stay_whole() -> None:
    packed = packed_sequence_compatibility_function(causal_mask_function, POSITIONS, SEGMENTS)
    blocks = or_masks(packed, blockwise_overlay(torch.tensor([[-1, -1, -1, -1, 0, 0, -1, -1]])))
    holes = and_masks(packed, lambda b, h, q, k: (q - k) != 3)
    for function in (blocks, holes):
        assert segment_bounds(function, 8, None) is None
        mask = anchor_mask(batch_size=1, q_length=8, kv_length=8, mask_function=function, allow_is_causal_skip=False)
        assert mask is not None and mask.shape == (1, 1, 8, 8)
    two = anchor_mask(batch_size=2, q_length=8, kv_length=8, mask_function=causal_mask_function, allow_is_causal_skip=False)
    assert two is not None and two.shape == (2, 1, 8, 8)
