"""Stages of a pipeline, and the time and memory of 1F1B."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "planner"))

import synthetic

from omnicompile.cluster import Cluster
from omnicompile.cost_model.pipeline import pace, stages
from omnicompile.cost_model.step_model import StepModel
from omnicompile.plan import Plan
from omnicompile.planner.given import given_plan
from omnicompile.planner.predict import predict, simulate
from omnicompile.program import Program, Run
from omnicompile.workload import Workload


def plan_of(program: Program, layout: dict[str, str], gpus: int = 16, samples: int = 64) -> Plan:
    return given_plan(program, Cluster(gpus), Workload(program.sample.seq_len, global_batch=samples), layout)


def layer_counts(program: Program, layout: dict[str, str]) -> list[int]:
    parts = stages(program, plan_of(program, layout))
    return [sum(r.count for r in s.program.runs if s.program.segment(r.segment).role == "layer") for s in parts]


def with_layers(count: int) -> Program:
    program = synthetic.dense_lm()
    layer = next(s for s in program.segments if s.role == "layer")
    segments = tuple(replace(s, count=count) if s is layer else s for s in program.segments)
    runs = tuple(Run(r.segment, count) if r.segment == layer.name else r for r in program.runs)
    return replace(program, segments=segments, runs=runs)


def test_layers_are_dealt_out_evenly() -> None:
    assert layer_counts(with_layers(32), {"pp": "4"}) == [8, 8, 8, 8]
    assert layer_counts(with_layers(11), {"pp": "4"}) == [3, 3, 3, 2]
    # embedding and loss head count as a layer each where that makes it even
    assert layer_counts(with_layers(126), {"pp": "8", "pipeline_chunks": "8"}) == [15, *[16] * 6, 15]


@pytest.mark.parametrize("layout", [{"pp": "2"}, {"pp": "8"}, {"pp": "4", "pipeline_chunks": "2"}])
def test_stages_are_the_program_in_pieces(layout: dict[str, str]) -> None:
    program = synthetic.moe_lm()
    parts = stages(program, plan_of(program, layout))
    assert sum(part.program.param_count for part in parts) == program.param_count
    order = [run.segment for part in parts for run in part.program.runs for _ in range(run.count)]
    assert order == [run.segment for run in program.runs for _ in range(run.count)]


def test_a_tied_weight_is_held_by_both_of_its_stages() -> None:
    program = synthetic.dense_lm()
    table, head = program.segments[0].params[0], program.segments[-1]
    tied = replace(head.params[-1], shape=table.shape, tied_to=table.name)
    program = replace(program, segments=(*program.segments[:-1], replace(head, params=(*head.params[:-1], tied))))
    parts = stages(program, plan_of(program, {"pp": "2"}))
    assert sum(part.program.param_count for part in parts) == program.param_count + table.numel


def test_micro_batches_in_flight() -> None:
    program = with_layers(32)

    def held(layout: dict[str, str], samples: int = 64) -> list[float]:
        return [part.in_flight for part in stages(program, plan_of(program, layout, samples=samples))]

    assert held({"pp": "4"}) == [4, 3, 2, 1]
    assert held({"pp": "4"}, samples=8) == [2, 2, 2, 1]  # only two micro-batches there are
    # Megatron-LM's warm-up of an interleaved pipeline: (chunks - 1) * stages + 2 per following stage, and one at work
    assert held({"pp": "4", "pipeline_chunks": "2"}) == [11 / 2, 9 / 2, 7 / 2, 5 / 2]


def test_equal_stages_take_the_published_time() -> None:
    for chunks in (1, 4):
        found = pace([2.0] * 8, [2.0] * 8, 16, chunks, 0.0)
        assert found.seconds == pytest.approx((16 + 7 / chunks) * 2.0)
    sends = pace([2.0] * 8, [2.0] * 8, 16, 1, 0.1)
    assert sends.passing == pytest.approx(0.1 * (2 * 7 + 2 * 15))


def test_the_slowest_stage_sets_the_pace() -> None:
    found = pace([1.0, 3.0, 1.0], [1.0, 3.5, 1.0], 4, 1, 0.0)
    assert found.slowest == 1 and found.work == pytest.approx(12.5) and found.bubble == pytest.approx(2.0)


def test_a_pipeline_saves_parameters_and_pays_with_bubbles() -> None:
    program = with_layers(32)
    model = StepModel(program, Cluster(16))
    flat = simulate(program, plan_of(program, {"sharding": "zero1"}), model).prediction
    deep = simulate(program, plan_of(program, {"sharding": "zero1", "pp": "8"}), model).prediction
    assert flat is not None and deep is not None
    assert deep.memory["parameters"] < 0.4 * flat.memory["parameters"]
    assert deep.time["exposed pipeline_bubble"] > 0 and "exposed pipeline_bubble" not in flat.time
    parts = sum(seconds for kind, seconds in deep.time.items() if not kind.startswith("hidden"))
    assert parts == pytest.approx(deep.step_seconds)


def test_seconds_of_a_block_are_of_the_stage_that_has_most_of_it() -> None:
    program = synthetic.vision_language_7b()
    layout = {"sharding": "zero1", "pp": "4", "micro_batch": "1"}
    plan = given_plan(program, Cluster(16), Workload(program.sample.seq_len, global_batch=16), layout)
    found = predict(plan, StepModel(program, Cluster(16)))
    assert found.block_time["vision"] > 0  # only the first stages have any
