"""Every backend gives the loss and gradients of one process, on two gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
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
from torch import Tensor

from omnicompile.plan import Mesh
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize

GRIDS = [[(1, 4, 8), (1, 8, 8)], [(1, 6, 16)]]


def batch_of(kind: str, seed: int) -> dict[str, Tensor]:
    return image_batch(seed, GRIDS[seed % 2]) if kind == "vlm" else text_batch(seed)


def errors(rank: int, world: int, kind: str, mesh: Mesh, backend: str) -> list[tuple[float, float]]:
    """(difference of the losses, worst error of a gradient) of two batches with different images."""
    model = vision_language_model(1) if kind == "vlm" else mixture_model(1)
    blocks = ("text", "vision") if kind == "vlm" else ("text",)
    module: Any = parallelize(model, make_plan(blocks, mesh), "cpu", batch_of(kind, 0), backend)
    assert isinstance(module, ParallelModule)
    found = []
    for seed in (0, 1):
        module.zero_grad()
        loss = module(**batch_of(kind, seed)).loss
        loss.backward()
        want, gradients = reference_gradients(model, [batch_of(kind, seed)])
        got = {name: module.full_gradient(name) for name in gradients}
        found.append((abs(loss.item() - want), worst_error(got, gradients)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["step", "aot_eager", "inductor", "torch.compile"])
@pytest.mark.parametrize("kind, mesh", [("vlm", Mesh(sp=2)), ("moe", Mesh(sp=2, ep=2))])
def test_equal_to_one_process(kind: str, mesh: Mesh, backend: str) -> None:
    for found in run_ranks(errors, 2, kind, mesh, backend):
        for loss, gradient in found:
            assert loss < 1e-5
            assert gradient < 1e-5


def compilations(rank: int, world: int, layers: int, backend: str) -> list[int]:
    """Graphs given to the compiler after each of two training steps."""
    model, batch = dense_model(layers), text_batch(rank)
    module: Any = parallelize(model, make_plan(("text",), Mesh(dp_shard=world)), "cpu", batch, backend)
    assert isinstance(module, ParallelModule)
    counts = []
    for _ in range(2):
        module(**batch).loss.backward()
        counts.append(module.compilations)
    return counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "backend, depths",
    [
        ("inductor", (2, 8, 32)),
        ("torch.compile", (2, 8)),
        ("aot_eager", (2, 8, 32)),  # the same graphs as torch.compile, without the minutes that 32 layers take there
    ],
)
def test_the_number_of_compilations_does_not_grow_with_depth(backend: str, depths: tuple[int, ...]) -> None:
    """Of regions, the first and the last layer have their own around the collectives, and two layers are these two:
    from three on there are those of a layer between them too."""
    shallow, *deeper = (run_ranks(compilations, 2, layers, backend) for layers in depths)
    assert all(counts == deeper[0] for counts in deeper)
    middle = 1 if backend == "inductor" else 0
    for few, many in zip(shallow, deeper[0]):
        assert few[0] <= many[0] <= few[0] + middle
    for first, second in shallow:
        assert 0 < first == second
