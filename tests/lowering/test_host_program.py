"""What the host computes for each batch again: as little as its values need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import dense_model, image_batch, mixture_model, text_batch, vision_language_model
from torch import Tensor, nn

from omnicompile.lowering.host_program import HostProgram, fake_copy
from omnicompile.torch_compat import new_fake_mode


def program_of(model: nn.Module) -> HostProgram:
    mode = new_fake_mode()
    return HostProgram(fake_copy(model, mode), mode)


@pytest.mark.parametrize("build", [dense_model, mixture_model])
def test_the_work_of_a_batch_does_not_grow_with_depth(build: Any) -> None:
    traced = []
    for layers in (2, 5):
        program = program_of(build(layers))
        whole = program.learn(text_batch(0))
        again = program.replay(text_batch(1))
        assert len(again.crossings) == len(whole.crossings)
        traced.append(len(again.calls))
        assert len(again.calls) < 0.3 * len(whole.calls)
    assert traced[0] == traced[1]


def test_what_images_decide_is_computed_for_each_batch() -> None:
    program = program_of(vision_language_model())
    first = program.learn(image_batch(0, [(1, 4, 8), (1, 8, 8)]))
    other = program.replay(image_batch(1, [(1, 8, 8), (1, 4, 8)]))
    fresh = program_of(vision_language_model()).learn(image_batch(1, [(1, 8, 8), (1, 4, 8)]))
    assert any(not torch.equal(a.value, b.value) for a, b in zip(first.crossings, other.crossings))
    for ours, want in zip(other.crossings, fresh.crossings, strict=True):
        assert torch.equal(ours.value, want.value)
        assert ours.bounds_only == want.bounds_only


class Picks(nn.Module):
    """No host work happens in it."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return x.index_select(2, places)


class Twice(nn.Module):
    """Attention within segments; then rows are picked where segments start."""

    def __init__(self) -> None:
        super().__init__()
        self.picks = Picks()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        out, _ = torch.ops.omnicompile.attention(x, x, x, bounds, bounds, None, 8, 8, False, 1.0, 0, 0.0)
        return self.picks(out, bounds)


def test_bounds_with_another_use_are_not_lengthened() -> None:
    """Nor where that use is in a submodule that is not entered again."""
    program = program_of(Twice())
    batch = {"x": torch.zeros(1, 2, 8, 4), "lengths": torch.tensor([3, 4])}
    found = [program.learn(batch), program.replay(batch)]
    assert len(found[1].calls) < len(found[0].calls)  # `picks` was not entered
    for recording in found:
        assert [crossing.bounds_only for crossing in recording.crossings] == [False]
