"""Batches are filled up to the budget without changing their loss."""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE, image_batch, text_batch, vision_language_model
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from omnicompile.errors import InputError
from omnicompile.lowering.graph_capture import CapturedForward, LoweredInputs, capture_forward
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


LENGTH = 24


def packed_row(lengths: list[int]) -> dict[str, Tensor]:
    ids = text_batch(sum(lengths), sum(lengths))["input_ids"]
    return {"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


@cache
def packed_graph(window: bool) -> tuple[Budget, CapturedForward, LoweredInputs]:
    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5 if window else None, use_cache=False,
    )  # fmt: skip
    model = MistralForCausalLM(config).float()
    row = packed_row([LENGTH - 1, 1])
    return Budget.of(model, row), *capture_forward(model, row, segments=LENGTH)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, LENGTH), min_size=1).filter(lambda found: sum(found) <= LENGTH), st.booleans())
@example([LENGTH], False)
@example([LENGTH], True)
@example([LENGTH - 1], True)
@example([1], True)
def test_any_packed_row_runs_the_graph(lengths: list[int], window: bool) -> None:
    """Also one sample that fills the row, which transformers gives no mask for."""
    budget, captured, inputs = packed_graph(window)
    filled = budget.fill(packed_row(lengths)).batch
    assert all(value.shape == (1, LENGTH) for value in filled.values())
    values = inputs.prepare(filled)
    (bounds,) = {tuple(v.tolist()) for name, v in values.items() if name in captured.host and v.dtype == torch.int32}
    ends = [0, *accumulate(lengths)]
    want = ends if ends[-1] == LENGTH else ends[:-1] if lengths[-1] == 1 else ends
    assert sorted({*bounds}) == sorted({*want, LENGTH})


def test_padding_goes_on_from_a_last_token_that_is_padding_already() -> None:
    budget, _, _ = packed_graph(False)
    filled = budget.fill(packed_row([5, 1])).batch["position_ids"]
    assert filled[0].tolist() == [0, 1, 2, 3, 4, *range(LENGTH - 5)]
    filled = budget.fill(packed_row([5])).batch["position_ids"]
    assert filled[0].tolist() == [0, 1, 2, 3, 4, *range(LENGTH - 5)]


def test_positions_of_several_axes_begin_anew_too() -> None:
    model, row = vision_language_model(), packed_row([9, 6])
    axes = row["position_ids"].expand(4, 1, -1)
    budget = Budget.of(model, row | {"position_ids": axes})
    filled = budget.fill({k: v[..., :9] for k, v in (row | {"position_ids": axes}).items()}).batch["position_ids"]
    assert filled.tolist() == [[[*range(9), *range(6)]]] * 4
