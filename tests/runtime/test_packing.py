"""Whole images dealt out to ranks: packing, the order of their features, and training on two processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import image_batch, make_plan, run_ranks, text_batch, vision_language_model, worst_error
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.plan import Layout, Mesh, Plan
from omnicompile.recompute import Recompute
from omnicompile.runtime.budget import Budget
from omnicompile.runtime.packing import Dealing, pack
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize
from omnicompile.support import not_executable

EXAMPLE = [(1, 8, 8), (1, 8, 8)]  # a budget of 64 patches for each of two ranks
BATCHES = [
    [(1, 4, 4), (1, 4, 8), (1, 8, 4), (1, 4, 12)],  # full, out of order
    [(1, 2, 2), (1, 6, 8)],  # below the budget on both ranks
    [(1, 8, 8)],  # one rank has only a dummy image
    None,  # no image
]


@pytest.mark.parametrize(
    ("sizes", "ranks", "capacity"),
    [([16, 32, 32, 48], 2, 64), ([], 2, 8), ([5, 4, 3, 3, 3], 2, 9), ([7, 6, 5, 4, 3, 2, 1], 4, 7), ([8] * 64, 8, 64)],
)
def test_every_image_is_on_one_rank_within_its_room(sizes: list[int], ranks: int, capacity: int) -> None:
    found = pack(sizes, ranks, capacity)
    assert found is not None and sorted(i for images in found for i in images) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in images) <= capacity for images in found)


def test_what_does_not_fit_is_not_packed() -> None:
    assert pack([6, 6, 6], 2, 9) is None
    assert pack([10], 2, 9) is None


def test_features_come_back_in_the_order_of_the_batch() -> None:
    dealing = Dealing.of([[2], [0, 1]], [4, 8, 12])
    patches = torch.cat([torch.full((size,), image) for image, size in enumerate(dealing.sizes)])
    batch = {"pixels": patches, "grid": torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 6]])}
    dealt = dealing.dealt(batch, "pixels", "grid")
    assert dealt["pixels"][:12].tolist() == [2] * 12 and dealt["grid"][0].tolist() == [1, 2, 6]
    assert torch.equal(dealt["pixels"][dealing.way_back(24)], patches)
    assert torch.equal(dealt["pixels"].view(6, 4)[dealing.way_back(6)].flatten(), patches)


def batch_of(seed: int, grids: list[tuple[int, int, int]] | None) -> dict[str, Tensor]:
    return text_batch(seed, 60) if grids is None else image_batch(seed, grids, 60)


@pytest.mark.parametrize("grids", BATCHES, ids=str)
def test_a_batch_filled_for_two_ranks_has_the_same_loss(grids: list[tuple[int, int, int]] | None) -> None:
    model = vision_language_model()
    budget = Budget.of(model, image_batch(0, EXAMPLE, 96), 2)
    filled = budget.fill(batch_of(1, grids))
    torch.testing.assert_close(model(**filled.batch).loss, model(**batch_of(1, grids)).loss)
    bounds = budget.dealt(filled)["image_grid_thw"].prod(-1).cumsum(0).tolist()
    assert 64 in bounds and bounds[-1] == 128


def test_images_that_fit_on_no_rank_are_refused_with_the_remedy() -> None:
    budget = Budget.of(vision_language_model(), image_batch(0, EXAMPLE, 96), 2)
    with pytest.raises(InputError, match=r"2 ranks with room for 64 patches.*one has 80.*larger budget.*'sequence'"):
        budget.fill(batch_of(0, [(1, 8, 10)]))
    with pytest.raises(InputError, match=r"do not fit \(they have 48, 48, 32\)"):
        budget.fill(batch_of(0, [(1, 6, 8), (1, 6, 8), (1, 4, 8)]))
    with pytest.raises(InputError, match=r"over sp=2 deals out .* has 68: make it 72"):
        Budget.of(vision_language_model(), image_batch(0, [(1, 2, 34)]), 2)


def images_plan(recompute: Recompute = Recompute.NONE) -> Plan:
    plan = make_plan(("text", "vision"), Mesh(sp=2), recompute=recompute)
    return replace(plan, blocks=plan.blocks | {"vision": replace(plan.blocks["vision"], layout=Layout.IMAGES)})


def test_the_runtime_takes_such_a_plan() -> None:
    assert not_executable(images_plan()) == ()


def compare(model: nn.Module, module: ParallelModule, batch: dict[str, Tensor]) -> tuple[float, float]:
    """(difference of the losses, worst error of a gradient)"""
    module.zero_grad(), model.zero_grad()
    loss = module(**batch).loss
    loss.backward()
    want = model(**batch).loss
    want.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    got = {name: module.full_gradient(name) for name in gradients}
    return abs(loss.item() - want.item()), worst_error(
        {n: zero[n] if g is None else g for n, g in got.items()}, gradients
    )


def everything(rank: int, world: int) -> dict[str, Any]:
    model = vision_language_model()
    module = parallelize(model, images_plan(Recompute.SELECTIVE), "cpu", image_batch(0, EXAMPLE, 96))
    assert isinstance(module, ParallelModule)
    found: dict[str, Any] = {"errors": [compare(model, module, batch_of(i, g)) for i, g in enumerate(BATCHES)]}
    try:
        module(**batch_of(0, [(1, 8, 10)]))
    except Exception as error:
        found["refused"] = str(error)
    found["captures"], found["programs"] = len(module.engine._captures), len(module.engine._programs)
    code = next(iter(module.engine._programs.values())).program.gm.code
    found["in encoder"] = code.partition("masked_scatter")[0].count("all_to_all(")
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_on_any_images() -> None:
    for found in run_ranks(everything, 2):
        for loss, gradient in found["errors"]:
            assert loss < 1e-5 and gradient < 1e-5
        assert found["captures"] == found["programs"] == 1
        assert "one has 80" in found["refused"]
        assert found["in encoder"] <= 2  # to cut features and text for the scatter: none in the encoder itself
