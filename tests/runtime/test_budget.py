"""Batches are filled up to the budget without changing their loss."""

from __future__ import annotations

import pytest
import torch
from tiny_models import IMAGE, image_batch, text_batch, vision_language_model

from omnicompile.errors import InputError
from omnicompile.runtime.budget import Budget

FULL = [(1, 4, 8), (1, 8, 8)]


@pytest.mark.parametrize("grids", [None, [(1, 4, 4)], [(1, 6, 12)], [(1, 4, 8), (1, 8, 8)]])
def test_a_filled_batch_has_the_budget_s_size_and_the_same_loss(grids: list[tuple[int, int, int]] | None) -> None:
    model = vision_language_model()
    budget = Budget.of(model, image_batch(0, FULL))
    batch = text_batch(5, 38) if grids is None else image_batch(5, grids, 40)
    filled = budget.fill(batch).batch
    assert filled["input_ids"].shape == (1, 64) and filled["pixel_values"].shape[0] == 96
    assert int(filled["image_grid_thw"].prod(1).sum()) == 96
    assert int((filled["input_ids"] == IMAGE).sum()) == 24
    torch.testing.assert_close(model(**filled).loss, model(**batch).loss)


def test_a_batch_larger_than_the_budget_is_refused() -> None:
    budget = Budget.of(vision_language_model(), image_batch(0, [(1, 4, 8)]))
    with pytest.raises(InputError, match="larger in patches than the budget"):
        budget.fill(image_batch(0, FULL))
    with pytest.raises(InputError, match="longer than the budget"):
        budget.fill(text_batch(0, 80))


def test_a_batch_without_room_for_the_dummy_image_is_refused() -> None:
    budget = Budget.of(vision_language_model(), image_batch(0, FULL))
    with pytest.raises(InputError, match="24 dummy tokens do not fit"):
        budget.fill(text_batch(0, 60))


def test_padding_on_the_left_is_refused() -> None:
    budget = Budget.of(vision_language_model(), text_batch(0, 64))
    mask = torch.ones(1, 40, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(InputError, match="pad on the right"):
        budget.fill(text_batch(0, 40) | {"attention_mask": mask})
