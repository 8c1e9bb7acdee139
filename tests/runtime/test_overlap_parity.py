"""Every way of overlapping, alone and together, gives loss and gradients of one process within 1e-5: a dense
vision-language model and a mixture of experts with images, on two and four gloo processes.

On eight ranks in one process: tests/passes/test_overlap_parity.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from passes.models import image_batch, stacked_mixture_vl_model, vision_language_model
from tiny_models import make_plan, reference_gradients, run_ranks, worst_error

from omnicompile.plan import Mesh, Overlap, Sharding
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize

NONE = Overlap(exchanges=False)
ALONE = {
    "exchanges": Overlap(),
    "head groups": replace(NONE, head_groups=2),
    "expert chunks": replace(NONE, expert_chunks=2),
    "prefetch": replace(NONE, prefetch=2),
    "replica sums": replace(NONE, replica_sums=True),
}
TOGETHER = Overlap(head_groups=2, expert_chunks=2, prefetch=2, replica_sums=True)
WAYS = {"none": NONE} | ALONE | {"together": TOGETHER}
GRIDS = [[(1, 4, 8), (1, 8, 8)], [(1, 8, 8), (1, 8, 4)]]
MODELS = {"dense": vision_language_model, "mixture": stacked_mixture_vl_model}
MESHES = {
    ("dense", 2): Mesh(sp=2),
    ("mixture", 2): Mesh(sp=2, ep=2),
    ("dense", 4): Mesh(dp_replicate=2, sp=2),
    ("mixture", 4): Mesh(dp_replicate=2, sp=2, ep=2),
}


def ways(kind: str) -> list[str]:
    return [name for name in WAYS if kind == "mixture" or name != "expert chunks"]


def errors(rank: int, world: int, kind: str) -> dict[str, dict[str, float]]:
    """By way of overlapping: errors of the loss and of the worst gradient."""
    model, mesh = MODELS[kind](), MESHES[kind, world]
    batches = [image_batch(seed, GRIDS[seed]) for seed in range(mesh.data_ranks)]
    want_loss, want = reference_gradients(model, batches)
    model.zero_grad()
    found = {}
    for name in ways(kind):
        overlap = WAYS[name] if kind == "mixture" else replace(WAYS[name], expert_chunks=1)
        plan = replace(make_plan(("text", "vision"), mesh, Sharding.HSDP), overlap=overlap)
        module = parallelize(MODELS[kind](), plan, "cpu", batches[0], "step")
        assert isinstance(module, ParallelModule)
        loss = module(**batches[rank // mesh.sp]).loss
        loss.backward()
        got = {parameter: module.full_gradient(parameter) for parameter in want}
        found[name] = {"loss": abs(loss.item() - want_loss) / abs(want_loss), "gradient": worst_error(got, want)}
    return found


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", list(MODELS))
def test_equal_to_one_process(kind: str, world: int) -> None:
    for found in run_ranks(errors, world, kind):
        assert list(found) == ways(kind)
        for name, error in found.items():
            assert max(error.values()) < 1e-5, (name, error)
