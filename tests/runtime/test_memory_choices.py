"""Two gloo processes that recompute and chunk the loss head train as one process does."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from tiny_models import make_plan, mixture_model, reference_gradients, run_ranks, text_batch, worst_error

from omnicompile.plan import LossHead, Mesh
from omnicompile.recompute import Recompute
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize


def errors_and_warnings(rank: int, world: int, backend: str, mesh: Mesh) -> tuple[float, float, list[str]]:
    model = mixture_model()
    plan = replace(make_plan(("text",), mesh, recompute=Recompute.FULL), loss_head=LossHead.CHUNKED)
    batches = [text_batch(seed) for seed in range(mesh.data_ranks)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = parallelize(model, plan, "cpu", text_batch(0), backend=backend)
    assert isinstance(module, ParallelModule)
    loss = module(**batches[rank // mesh.sp]).loss
    loss.backward()
    want, gradients = reference_gradients(model, batches)
    got = {name: module.full_gradient(name) for name in gradients}
    said = [str(item.message) for item in caught if "the plan" in str(item.message)]
    return abs(loss.item() - want), worst_error(got, gradients), said


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(sp=2), Mesh(dp_shard=2, ep=2)], ids=["sp", "ep"])
def test_a_step_graph_does_both(mesh: Mesh) -> None:
    for loss_error, worst, said in run_ranks(errors_and_warnings, 2, "step", mesh):
        assert loss_error < 1e-5
        assert worst < 1e-5
        assert said == []


@pytest.mark.slow
def test_a_backend_without_step_graph_says_that_it_keeps_everything() -> None:
    for loss_error, worst, said in run_ranks(errors_and_warnings, 2, "eager", Mesh(sp=2)):
        assert max(loss_error, worst) < 1e-5
        assert any('use backend="inductor" or "step"' in line for line in said)
