"""`parallelize(kernels=...)` on gloo processes, the CPU reference of every operator in the place of the model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_models import (
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

from omnicompile.errors import InputError
from omnicompile.plan import LossHead, Mesh, Plan
from omnicompile.runtime.agreement import found_by_first
from omnicompile.runtime.mesh import control_group
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize

LAYERS = "rms_norm=reference,swiglu=reference,rope=reference,attention=reference,grouped_mm=reference"
ALL = f"{LAYERS},cross_entropy=reference,linear_cross_entropy=reference"
GRIDS = [[(1, 4, 4), (1, 8, 4)], [(1, 8, 4), (1, 4, 4)]]
PLANS = {
    "moe": (("text",), Mesh(dp_shard=2, ep=2), LossHead.FULL),
    "vlm": (("text", "vision"), Mesh(sp=2), LossHead.CHUNKED),
}
EXPECTED = {
    "moe": {"rms_norm", "swiglu", "rope", "cross_entropy"},
    "vlm": {"rms_norm", "swiglu", "rope", "linear_cross_entropy"},
}


def plan_of(kind: str, mesh: Mesh | None = None) -> Plan:
    blocks, usual, head = PLANS[kind]
    return replace(make_plan(blocks, mesh or usual), loss_head=head)


def batches_of(kind: str, ranks: int) -> list[dict[str, Tensor]]:
    return [text_batch(r) if kind == "moe" else image_batch(r, GRIDS[r]) for r in range(ranks)]


def compare(kind: str, mesh: Mesh, rank: int) -> tuple[float, float, set[str]]:
    """Relative error of the loss, worst error of a gradient, and the operators in the graph that ran."""
    model = mixture_model() if kind == "moe" else vision_language_model()
    batches = batches_of(kind, mesh.data_ranks)
    want_loss, want = reference_gradients(model, batches)
    module = parallelize(model, plan_of(kind, mesh), "cpu", batches[0], kernels=ALL)
    assert isinstance(module, ParallelModule)
    loss = module(**batches[rank // mesh.sp]).loss
    loss.backward()
    worst = worst_error({name: module.full_gradient(name) for name in want}, want)
    names = {str(n.target) for p in module.engine._programs.values() for n in p.program.gm.graph.nodes}
    found = {name for name in set().union(*EXPECTED.values()) if f"omnicompile.{name}.default" in names}
    return abs(loss.item() - want_loss) / abs(want_loss), worst, found


def everything(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {kind: compare(kind, mesh, rank) for kind, (_, mesh, _) in PLANS.items()}
    agree = found_by_first(control_group())
    found["agreed"] = agree(lambda: f"rank {rank}")

    def fails() -> str:
        raise ValueError(f"of rank {rank}")

    try:
        agree(fails)
    except ValueError as error:
        found["failed"] = str(error)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANS)
def test_loss_and_gradients_are_those_of_the_plain_model(results: list[dict[str, Any]], kind: str) -> None:
    for loss, gradient, operators in (part[kind] for part in results):
        assert operators == EXPECTED[kind]
        assert loss <= 1e-5 and gradient <= 1e-5


@pytest.mark.slow
def test_all_ranks_have_what_the_first_found(results: list[dict[str, Any]]) -> None:
    assert [part["agreed"] for part in results] == ["rank 0", "rank 0"]
    assert [part["failed"] for part in results] == ["of rank 0", "of rank 0"]


def one_process(rank: int, world: int) -> tuple[float, float, set[str]]:
    return compare("moe", Mesh(), rank)


@pytest.mark.slow
def test_one_process_runs_the_plan_for_the_sake_of_its_kernels() -> None:
    ((loss, gradient, operators),) = run_ranks(one_process, 1)
    assert operators == EXPECTED["moe"] and loss <= 1e-5 and gradient <= 1e-5


def test_kernels_are_checked_before_anything_is_started() -> None:
    model = mixture_model()
    with pytest.raises(InputError, match="did you mean liger"):
        parallelize(model, plan_of("moe"), "cpu", text_batch(0), kernels="rms_norm=ligr")
    with pytest.raises(InputError, match="give parallelize the plan"):
        parallelize(model, None, "cpu", text_batch(0), kernels={"rms_norm": "reference"})
