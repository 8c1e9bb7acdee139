"""A step from inside adds up to what is predicted of it."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from omnicompile.cluster import Cluster
from omnicompile.plan import Plan
from omnicompile.planner.api import plan_program
from omnicompile.planner.given import given_plan
from omnicompile.planner.picture import picture_of
from omnicompile.planner.predict import simulate
from omnicompile.program import Program
from omnicompile.workload import Workload
from tests.planner import synthetic

LAYOUTS = [
    {"sp": "2", "recompute": "selective"},
    {"sp": "2", "ep": "4", "dp_replicate": "2", "sharding": "hsdp"},
    {"dp_replicate": "2", "sharding": "hsdp", "micro_batch": "1", "recompute": "full"},
    {"pp": "2", "recompute": "full"},
]


def priced(layout: dict[str, str]) -> tuple[Program, Plan]:
    program = synthetic.omni_moe(8192)
    return program, simulate(program, given_plan(program, Cluster(16), Workload(8192), layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: ",".join(layout))
def test_transfers_add_up_to_the_step(layout: dict[str, str]) -> None:
    program, plan = priced(layout)
    assert plan.prediction is not None
    seconds: dict[str, float] = defaultdict(float)
    for transfer in picture_of(plan, program).transfers:
        assert transfer.block in plan.blocks and transfer.count > 0 and transfer.purpose
        seconds[f"exposed {transfer.kind}"] += transfer.exposed
        seconds[f"hidden {transfer.kind}"] += transfer.hidden
    told = {kind: value for kind, value in plan.prediction.time.items() if kind.split()[0] in ("exposed", "hidden")}
    for kind in seconds.keys() | {kind for kind in told if "pipeline" not in kind}:
        assert seconds[kind] == pytest.approx(told.get(kind, 0.0), rel=1e-9, abs=1e-9), kind


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: ",".join(layout))
def test_memory_adds_up_by_block_and_kind(layout: dict[str, str]) -> None:
    program, plan = priced(layout)
    prediction, memory = plan.prediction, picture_of(plan, program).memory
    assert prediction is not None
    for name, kinds in memory.items():
        assert sum(kinds.values()) == pytest.approx(prediction.block_memory[name])
    for kind, value in prediction.memory.items():
        if kind not in ("context", "allocator slack"):
            assert sum(kinds.get(kind, 0.0) for kinds in memory.values()) == pytest.approx(value)


def test_stretches_tile_the_step_in_the_order_of_the_model() -> None:
    program, plan = priced({"dp_replicate": "2", "sharding": "hsdp"})
    picture = picture_of(plan, program)
    assert [(s.phase, s.block) for s in picture.stretches] == [
        ("forward", "audio"), ("forward", "vision"), ("forward", "text"),
        ("backward", "text"), ("backward", "vision"), ("backward", "audio"), ("update", ""),
    ]  # fmt: skip
    assert all(a.end == b.start for a, b in pairwise(picture.stretches))
    assert picture.stretches[-1].end == picture.seconds == max(task.end for task in picture.tasks)


def test_gathers_belong_to_the_block_whose_parameters_they_bring() -> None:
    program = synthetic.vision_language_7b()
    plan = plan_program(program, Cluster(8), Workload(8192), {"text.sharding": "fsdp", "vision.sharding": "replicate"})
    blocks = {t.block for t in picture_of(plan.plans[0], program).transfers if t.purpose == "parameters"}
    assert blocks == {"text"}


def test_flows_between_blocks() -> None:
    program, plan = priced({"dp_replicate": "2", "sharding": "hsdp"})
    flows = {(flow.source, flow.target): flow.nbytes for flow in picture_of(plan, program).flows}
    assert list(flows) == [("vision", "text"), ("audio", "text")]
    assert flows["vision", "text"] == 2 * 1024 * 2048 * 2  # images, patches after merging, width, bytes
