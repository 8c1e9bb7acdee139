"""Plans at other sizes: which sizes, what is kept, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omnicompile.cluster import Cluster
from omnicompile.planner.api import plan_program, resized
from omnicompile.planner.sweep import affordable_points, gpu_counts, sample_lengths, sweep
from omnicompile.workload import Workload
from tests.planner import synthetic


@pytest.mark.parametrize(
    ("gpus", "node", "counts"),
    [
        (128, 8, (32, 64, 128, 256, 512)),
        (1, 8, (1, 2, 4, 8, 16)),
        (16, 8, (4, 8, 16, 32, 64)),
        (24, 8, (24, 48, 96, 192, 384)),
        (6, 6, (3, 6, 12, 24, 48)),
        (8, 8, (2, 4, 8, 16, 32)),
    ],
)
def test_gpu_counts_are_parts_of_a_node_or_whole_nodes(gpus: int, node: int, counts: tuple[int, ...]) -> None:
    assert gpu_counts(Cluster(gpus, gpus_per_node=node)) == counts
    for count in counts:
        Cluster(count, gpus_per_node=node)


def test_samples_have_room_for_their_images() -> None:
    program = synthetic.vision_language_7b(8192)  # two images of 1,024 tokens
    assert sample_lengths(program) == (2048, 4096, 8192, 16384, 32768)
    assert sample_lengths(resized(program, 2048)) == (2048, 4096, 8192, 16384, 32768)
    assert sample_lengths(program, 3) == (4096, 8192, 16384)
    assert sample_lengths(resized(program, 5001))[0] == 5001
    assert affordable_points(10**7) < affordable_points(1000)


def test_planned_points_are_the_planners_answers_and_kept_points_the_plan() -> None:
    program, cluster, workload = synthetic.vision_language_7b(), Cluster(8), Workload(8192)
    plan = plan_program(program, cluster, workload).plans[0]
    said: list[str] = []
    lengths, counts = sweep(plan, program, {}, said.append, 3)
    assert (lengths.now, counts.now) == (8192, 8)
    assert "planning for 16,384 tokens on 8 GPUs" in said
    found = {point.value: point.plan for point in lengths.planned}
    assert found[8192] is plan
    again = plan_program(resized(program, 16384), cluster, replace(workload, seq_len=16384)).plans[0]
    other = found[16384]
    assert other is not None and replace(again, notes=()) == other
    for point in (*lengths.kept, *counts.kept):
        assert point.plan is not None and point.plan.blocks == plan.blocks
        assert point.plan.mesh.world == point.plan.cluster.gpus
        assert point.plan.workload.seq_len == (point.value if point in lengths.kept else 8192)


def test_where_nothing_fits_the_leanest_plan_stands() -> None:
    program = synthetic.vision_language_72b()
    plan = plan_program(program, Cluster(32), Workload(8192)).plans[0]
    _, counts = sweep(plan, program, {}, points=5)
    smallest = counts.planned[0]
    assert smallest.value == 8 and smallest.plan is not None and not smallest.fits and smallest.reason
    prediction = smallest.plan.prediction
    assert prediction is not None and prediction.memory_total > prediction.memory_capacity


def test_pins_that_follow_from_the_gpus_are_free_at_other_counts() -> None:
    program = synthetic.vision_language_7b()
    pins = {"mesh.dp_shard": "8", "mesh.dp_replicate": "1", "text.recompute": "full"}
    plan = plan_program(program, Cluster(8), Workload(8192), pins).plans[0]
    lengths, counts = sweep(plan, program, pins, points=3)
    assert [point.value for point in counts.planned] == [4, 8, 16]
    for point in (*lengths.planned, *counts.planned):
        assert point.plan is not None and point.plan.blocks["text"].recompute.value == "full"


def test_without_a_search_only_the_choices_are_kept_and_what_they_forbid_is_told() -> None:
    program = synthetic.vision_language_7b()
    plan = plan_program(program, Cluster(8), Workload(8192), {"mesh.sp": "4"}).plans[0]
    lengths, counts = sweep(plan, program)
    assert lengths.planned == counts.planned == ()
    two = counts.kept[0]
    assert two.value == 2 and two.plan is None and "do not divide" in two.reason


def test_a_batch_that_is_given_stays() -> None:
    program = synthetic.vision_language_7b()
    plan = plan_program(program, Cluster(8), Workload(8192, global_batch=16)).plans[0]
    _, counts = sweep(plan, program, {}, points=5)
    for point in counts.planned:
        assert point.plan is None or point.plan.global_batch == 16
    assert counts.planned[-1].value == 32
