"""Gradients with communication beside compute are those of one process: sums over replicas inside the backward, and
every overlap pass, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from torch import nn

from omnicompile.errors import InputError
from omnicompile.lowering.step_graph import FIRST, LAST, NEXT, ONLY
from omnicompile.plan import Mesh, Overlap, Sharding
from omnicompile.recompute import Recompute
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize

GRIDS = [(1, 4, 8), (1, 8, 8)]
ALL = Overlap(head_groups=2, expert_chunks=2, prefetch=2, replica_sums=True)


def error(module: Any, model: nn.Module, batches: list[Any], scale: float = 1.0) -> float:
    """The worst of all gradients, beside one process with all batches."""
    _, want = reference_gradients(model, batches)
    got = {name: module.full_gradient(name) for name in want}
    module.zero_grad()
    return worst_error(got, {name: scale * grad for name, grad in want.items()})


def window(module: Any, batches: list[Any], scale: float = 1.0, targets: bool = True) -> None:
    """The micro-steps of one optimizer step."""
    counted = module.count_targets(batches) if targets else None
    for i, batch in enumerate(batches):
        with module.accumulate(last=i == len(batches) - 1, targets=counted):
            (scale * module(**batch).loss).backward()


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except InputError as refused:
        return str(refused)
    return ""


def sums(rank: int, world: int, mesh: Mesh, sharding: Sharding, backend: str) -> dict[str, Any]:
    """Errors of a step without accumulation, of one whose loss is scaled, and of three micro-steps; kinds of step
    graphs, with how many gradients each sums over replicas; whether a wrong order and a wrong scale are refused."""
    model = dense_model(2)
    plan = replace(make_plan(("text",), mesh, sharding), overlap=Overlap(replica_sums=True))
    batches = [text_batch(seed) for seed in range(3 * world)]
    module: Any = parallelize(model, plan, "cpu", batches[0], backend)
    assert isinstance(module, ParallelModule)
    found: dict[str, Any] = {}
    module(**batches[rank]).loss.backward()
    found["plain"] = error(module, model, batches[:world])
    (3.0 * module(**batches[rank]).loss).backward()
    found["scaled"] = error(module, model, batches[:world], 3.0)
    mine = batches[rank::world]
    for name in ("accumulated", "accumulated again"):
        window(module, mine)
        found[name] = error(module, model, batches)
    window(module, mine[:2], 0.5, targets=False)
    want = [reference_gradients(model, batches[world * i : world * (i + 1)])[1] for i in range(2)]
    got = {name: module.full_gradient(name) for name in want[0]}
    found["halves"] = worst_error(got, {name: (want[0][name] + want[1][name]) / 2 for name in want[0]})
    module.zero_grad()
    (loaded,) = module.engine._programs.values()
    found["graphs"] = {kind: len(step.summed) for kind, step in loaded._steps.items()}
    found["parameters"] = len(module.store.local)
    found["scale refused"] = refusal(lambda: window(module, mine, 0.5))
    with module.accumulate(last=False):
        early = module(**batches[rank]).loss
    late = module(**batches[rank]).loss
    early.backward()
    found["order refused"] = refusal(late.backward)
    return found


def check(found: dict[str, Any]) -> None:
    for case in ("plain", "scaled", "accumulated", "accumulated again", "halves"):
        assert found[case] < 1e-5, case
    count = found["parameters"]
    assert count > 10 and found["graphs"] == {ONLY: count, FIRST: 0, NEXT: 0, LAST: count}
    assert "call backward() of each micro-step before the next forward" in found["order refused"]
    assert "scaled before backward()" in found["scale refused"]


@pytest.mark.timeout(600)
def test_sums_over_replicas_inside_the_backward() -> None:
    for found in run_ranks(sums, 2, Mesh(dp_replicate=2), Sharding.HSDP, "step"):
        check(found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", ["step", "inductor"])
def test_sums_over_replicas_of_shards(backend: str) -> None:
    for found in run_ranks(sums, 4, Mesh(dp_replicate=2, dp_shard=2), Sharding.HSDP, backend):
        check(found)


def everything(rank: int, world: int, kind: str, mesh: Mesh, backend: str, overlap: Overlap) -> float:
    model = vision_language_model(2) if kind == "vlm" else mixture_model(2)
    blocks = ("text", "vision") if kind == "vlm" else ("text",)
    choice = replace(make_plan(blocks, mesh, Sharding.HSDP, recompute=Recompute.SELECTIVE), overlap=overlap)
    batches = [image_batch(seed, GRIDS) if kind == "vlm" else text_batch(seed) for seed in range(mesh.data_ranks)]
    module: Any = parallelize(model, choice, "cpu", batches[0], backend)
    module(**batches[rank // mesh.sp]).loss.backward()
    return error(module, model, batches)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "kind, mesh, backend, overlap",
    [
        ("vlm", Mesh(sp=2), "step", Overlap()),
        ("vlm", Mesh(sp=2), "step", replace(ALL, expert_chunks=1)),
        ("moe", Mesh(sp=2, ep=2), "step", Overlap(expert_chunks=2)),
        ("moe", Mesh(sp=2, ep=2), "step", Overlap(expert_chunks=2, exchanges=False)),
        ("moe", Mesh(sp=2, ep=2), "inductor", ALL),
        ("vlm", Mesh(dp_replicate=2, sp=2), "step", replace(ALL, expert_chunks=1)),
        ("moe", Mesh(dp_replicate=2, sp=2, ep=2), "step", ALL),
    ],
)
def test_equal_to_one_process(kind: str, mesh: Mesh, backend: str, overlap: Overlap) -> None:
    for found in run_ranks(everything, mesh.world, kind, mesh, backend, overlap):
        assert found < 1e-5
