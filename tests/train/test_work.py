"""What is counted of a micro-batch."""

from __future__ import annotations

import torch
from tiny_models import image_batch, text_batch

from omnicompile.train.flops import Work
from omnicompile.train.work import segment_lengths, work_of


def test_rows_without_positions_are_samples() -> None:
    assert segment_lengths(text_batch(0, 12, rows=2)) == [12, 12]
    found = work_of([image_batch(0, [(1, 4, 8), (1, 8, 4)]), text_batch(1, 16)])
    want = Work(tokens=80, token_squares=64**2 + 16**2, samples=2, patches=64, patch_squares=2 * 32**2, images=2)
    assert found == want


def test_packed_rows_are_told_by_their_positions_and_padding_is_left_out() -> None:
    running = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 0]])
    batch = {"input_ids": torch.zeros(1, 10, dtype=torch.int64), "position_ids": running}
    assert segment_lengths(batch) == [3, 2, 4]
    several = torch.stack([running, running, running, running])
    assert segment_lengths(batch | {"position_ids": several}) == [3, 2, 4]


def test_a_video_is_as_many_images_as_it_has_moments_and_sound_goes_by_its_mask() -> None:
    batch = text_batch(0, 8) | {"video_grid_thw": torch.tensor([[3, 2, 4]])}
    assert (work_of([batch]).images, work_of([batch]).patch_squares) == (3, 3 * 64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    sound = text_batch(0, 8) | {"input_features": torch.zeros(2, 5, 4), "feature_attention_mask": mask}
    assert (work_of([sound]).frames, work_of([sound]).clips, work_of([sound]).frame_squares) == (5, 2, 13)
    del sound["feature_attention_mask"]
    assert work_of([sound]).frames == 8
