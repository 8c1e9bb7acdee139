"""Two gloo processes train models with a product of query, key and value together as one process does."""

from __future__ import annotations

from typing import Any

import pytest
from passes.test_split_fused_qkv import neox_model, phi_model
from tiny_models import (
    image_batch,
    make_plan,
    reference_gradients,
    run_ranks,
    text_batch,
    vision_language_model,
    worst_error,
)

from omnicompile.plan import Mesh, Sharding
from omnicompile.recompute import Recompute
from omnicompile.runtime.parallelize import parallelize

MODELS = {"vlm": vision_language_model, "neox": neox_model, "phi": phi_model}


def trained(rank: int, world: int, kind: str, sharding: Sharding, recompute: Recompute) -> tuple[float, float, int]:
    """Difference of the losses, worst error of a gradient, and how many products were split."""
    model = MODELS[kind]()
    batch = image_batch(0, [(1, 4, 8), (1, 8, 8)]) if kind == "vlm" else text_batch(0)
    blocks = ("text", "vision") if kind == "vlm" else ("text",)
    plan = make_plan(blocks, Mesh(sp=world), sharding, recompute=recompute)
    module: Any = parallelize(model, plan, "cpu", batch, "step")
    loss = module(**batch).loss
    loss.backward()
    want, gradients = reference_gradients(model, [batch])
    got = {name: module.full_gradient(name) for name in gradients}
    (loaded,) = module.engine._programs.values()
    (line,) = (line for line in loaded.program.log if line.startswith("products of query"))
    return abs(loss.item() - want), worst_error(got, gradients), int(line.split()[-2])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind, sharding, recompute",
    [
        ("vlm", Sharding.FSDP, Recompute.NONE),
        ("vlm", Sharding.REPLICATE, Recompute.FULL),
        ("neox", Sharding.FSDP, Recompute.SELECTIVE),
        ("phi", Sharding.HSDP, Recompute.EXCEPT_ATTENTION),
    ],
)
def test_equal_to_one_process(kind: str, sharding: Sharding, recompute: Recompute) -> None:
    for loss, error, split in run_ranks(trained, 2, kind, sharding, recompute):
        assert loss < 1e-5 and error < 1e-5 and split == 2
