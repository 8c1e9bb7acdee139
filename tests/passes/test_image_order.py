"""Encoders that take images in the order of the ranks that work on them give features in the order of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.passes import lower_forward
from omnicompile.passes.rank_program import check_alignment
from omnicompile.passes.simulate import run_ranks
from omnicompile.plan import Layout, Mesh
from omnicompile.runtime.packing import Dealing, dealt_values, pack, with_spans

from .models import IMAGE, block_plans, image_batch, stacked_mixture_vl_model, vision_language_model, windowed_model
from .parity import captured_for, program_of, reference, relative_errors, shifted_targets, whole_values

GRIDS = [(1, 4, 4), (1, 4, 8), (1, 8, 4), (1, 4, 12)]  # 16, 32, 32 and 48 patches for ranks of 64


@pytest.mark.slow
@pytest.mark.parametrize("model", [vision_language_model, windowed_model, stacked_mixture_vl_model])
def test_loss_and_gradients_with_images_in_another_order(model: Callable[[], nn.Module]) -> None:
    built, mesh, batch = model(), Mesh(sp=2), image_batch(3, GRIDS)
    want_loss, want = reference(built, [batch])
    captured, inputs = captured_for(built, batch)
    tokens = batch["labels"].shape[1]
    original = program_of(captured, built, mesh, block_plans(mesh, vision=Layout.IMAGES), tokens)
    program = lower_forward(original)
    values = inputs.prepare(batch)
    with pytest.raises(InputError, match="an image lies across patch 64"):
        check_alignment(program, values)

    sizes = [t * h * w for t, h, w in GRIDS]
    by_rank = pack(sizes, 2, 64)
    assert by_rank is not None
    dealing = Dealing.of(by_rank, sizes)
    assert dealing.order != (0, 1, 2, 3)
    dealt = dealing.dealt(batch, "pixel_values", "image_grid_thw")
    dealt = with_spans(dealt, [sizes[i] // 4 for i in dealing.order], "input_ids", "mm_token_type_ids", IMAGE)
    values |= whole_values(original, captured, built) | dealt_values(program, dealing, inputs.prepare(dealt))
    targets = torch.tensor(float(shifted_targets(batch)))
    orders = {n: replace(spec, kind="host") if spec.kind == "order" else spec for n, spec in program.inputs.items()}

    def whole(name: str, data_rank: int) -> Tensor:
        return values.get(name, targets)

    losses, got, _ = run_ranks(replace(program, inputs=orders), whole)
    assert abs(sum(losses) - want_loss) < 1e-5 * want_loss
    assert max(relative_errors(got, want).values()) < 1e-5
