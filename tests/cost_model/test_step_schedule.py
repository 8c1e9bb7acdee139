"""The schedule of a training step: what communicates, what is hidden, and how work divides."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "planner"))

import synthetic

from omnicompile.cluster import Cluster
from omnicompile.cost_model import timeline
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.cost_model.step_layout import block_groups, make_group
from omnicompile.cost_model.step_model import StepModel, segment_gradients
from omnicompile.cost_model.step_numbers import Evaluator
from omnicompile.cost_model.step_schedule import Step, build_step
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Overlap, Plan, Sharding
from omnicompile.program import Program, Recompute, Sym
from omnicompile.workload import Workload

CLUSTER = Cluster(16)


def make_plan(program: Program, mesh: Mesh, micro_batch: int = 1, accumulation: int = 1, **choices: object) -> Plan:
    """A plan that gives every block the same `choices`; encoders included."""
    layout = Layout.BATCH if mesh.sp == 1 else Layout.SEQUENCE
    block = replace(BlockPlan(layout=layout, sp=mesh.sp), **choices)  # type: ignore[arg-type]
    blocks = {b.name: block for b in program.blocks}
    return Plan("m", CLUSTER, Workload(program.sample.seq_len), mesh, blocks, micro_batch, accumulation)


def step_of(program: Program, plan: Plan) -> Step:
    return build_step(program, plan, StepModel(program, CLUSTER))


def seconds(step: Step) -> dict[str, float]:
    return timeline.simulate(step.last).by_kind


def counts(step: Step, kind: str) -> int:
    return sum(loop.count for loop in step.last.loops for task in loop.tasks if task.kind == kind)


def test_fully_sharded_layers_are_gathered_twice_and_reduced_once() -> None:
    program = synthetic.dense_lm()  # embedding, 32 layers, head: 34 units
    step = step_of(program, make_plan(program, Mesh(dp_shard=16)))
    assert counts(step, "all_gather") == 2 * 34 - 1  # the head is kept from its forward to its backward
    assert counts(step, "reduce_scatter") == 34
    assert counts(step, "all_reduce") == counts(step, "all_to_all") == 0


def test_without_resharding_layers_are_gathered_once() -> None:
    program = synthetic.dense_lm()
    assert counts(step_of(program, make_plan(program, Mesh(dp_shard=16), reshard=False)), "all_gather") == 34


def test_replicated_parameters_only_reduce() -> None:
    program = synthetic.dense_lm()
    step = step_of(program, make_plan(program, Mesh(dp_shard=16), sharding=Sharding.REPLICATE))
    assert counts(step, "all_gather") == counts(step, "reduce_scatter") == 0
    assert counts(step, "all_reduce") == 1  # once the backward is over, in one buffer


def test_hybrid_sharding_reduces_over_replicas_in_the_last_micro_step_only() -> None:
    program = synthetic.dense_lm()
    plan = make_plan(program, Mesh(dp_replicate=2, dp_shard=8), accumulation=4, sharding=Sharding.HSDP)
    step = step_of(program, plan)
    kinds = {task.kind for loop in step.micro.loops for task in loop.tasks}
    assert counts(step, "all_reduce") == 1 and step.accumulation == 4
    assert "reduce_scatter" in kinds and "all_reduce" not in kinds and "optimizer" not in kinds


def test_gathers_hide_behind_compute() -> None:
    program = synthetic.dense_lm()
    result = timeline.simulate(step_of(program, make_plan(program, Mesh(dp_shard=16))).last)
    assert result.exposed["all_gather"] < 0.1 * result.by_kind["all_gather"]


def test_ulysses_exchanges_around_every_attention() -> None:
    program = synthetic.dense_lm()
    step = step_of(program, make_plan(program, Mesh(dp_shard=4, sp=4), micro_batch=4))
    assert counts(step, "all_to_all") == 32 * 8  # query, key, value and result, forward and backward
    again = make_plan(program, Mesh(dp_shard=4, sp=4), micro_batch=4, recompute=Recompute.FULL)
    assert counts(step_of(program, again), "all_to_all") == 32 * 12
    at_once = replace(make_plan(program, Mesh(dp_shard=4, sp=4), micro_batch=4), overlap=Overlap(exchanges=False))
    assert counts(step_of(program, at_once), "all_to_all") == 32 * 4  # those of query, key and value together


def test_experts_exchange_tokens() -> None:
    program = synthetic.moe_lm()
    step = step_of(program, make_plan(program, Mesh(dp_shard=16, ep=8), ep=8))
    assert counts(step, "all_to_all") == 48 * 4  # dispatch and combine, forward and backward


def test_sequence_parallelism_divides_work() -> None:
    program = synthetic.dense_lm(65536)
    whole = seconds(step_of(program, make_plan(program, Mesh(dp_shard=16))))
    split = seconds(step_of(program, make_plan(program, Mesh(dp_shard=4, sp=4))))
    assert split["compute"] == pytest.approx(whole["compute"] / 4, rel=0.1)


def test_dealing_out_images_pays_for_imbalance() -> None:
    program = synthetic.vision_language_7b()  # 2 images a sample
    alone = StepModel(program, CLUSTER, replace(load_hardware("h100"), contention_factor=0.0))

    def vision_seconds(layout: Layout, sp: int, micro_batch: int) -> float:
        plan = make_plan(program, Mesh(dp_shard=16 // sp, sp=sp), micro_batch=micro_batch)
        own = sp if layout is not Layout.REPLICATED else 1
        vision = replace(plan.blocks["vision"], layout=layout, sp=own)
        step = build_step(program, replace(plan, blocks=plan.blocks | {"vision": vision}), alone)
        tasks = [(t, loop.count) for loop in step.last.loops for t in loop.tasks if t.block == "vision"]
        return sum(t.seconds * count for t, count in tasks if t.stream == "compute" and t.kind == "compute")

    whole = vision_seconds(Layout.REPLICATED, 4, 1)
    assert vision_seconds(Layout.IMAGES, 4, 1) == pytest.approx(whole / 2, rel=0.2)  # 2 images on 4 ranks
    assert vision_seconds(Layout.IMAGES, 4, 2) == pytest.approx(whole / 2, rel=0.2)  # 4 images on 4 ranks


def test_recompute_and_offload_add_their_own_work() -> None:
    program = synthetic.dense_lm()
    none = seconds(step_of(program, make_plan(program, Mesh(dp_shard=16))))
    full = seconds(step_of(program, make_plan(program, Mesh(dp_shard=16), recompute=Recompute.FULL)))
    moved = seconds(step_of(program, make_plan(program, Mesh(dp_shard=16), offload=True)))
    assert "recompute" not in none and full["recompute"] > 0.2 * none["compute"]
    assert moved["offload"] > 0


def test_chunked_loss_head_is_never_faster() -> None:
    program = synthetic.dense_lm()
    plan = make_plan(program, Mesh(dp_shard=16))
    full = timeline.simulate(step_of(program, plan).last)
    chunked = timeline.simulate(step_of(program, replace(plan, loss_head=LossHead.CHUNKED)).last)
    assert chunked.seconds >= full.seconds


def test_frozen_encoder_has_no_backward() -> None:
    program = synthetic.vision_language_7b()
    gradients = segment_gradients(program, frozenset({"vision"}))
    assert not any(gradients[s.name].any for s in program.block_segments("vision"))
    plan = make_plan(program, Mesh(dp_shard=16))
    frozen = replace(plan, blocks=plan.blocks | {"vision": replace(plan.blocks["vision"], frozen=True)})
    trained_vision, frozen_vision = (
        sum(loop.count for loop in step_of(program, p).last.loops for t in loop.tasks if t.block == "vision")
        for p in (plan, frozen)
    )
    assert frozen_vision < 0.6 * trained_vision


def test_frozen_backbone_passes_gradients_through() -> None:
    program = synthetic.vision_language_7b()
    gradients = segment_gradients(program, frozenset({"text"}))
    layers = gradients["text.layers"]
    assert layers.input and not layers.weight
    assert not gradients["text.embed"].any


def test_groups_know_their_nodes() -> None:
    assert make_group(8, 1, 16, 8).per_node == 8
    assert make_group(16, 1, 16, 8).per_node == 8
    assert make_group(2, 8, 16, 8).per_node == 1
    assert make_group(4, 2, 16, 8).per_node == 4
    assert make_group(3, 1, 24, 8).per_node == 1  # groups of three straddle nodes
    groups = block_groups(Mesh(dp_replicate=2, dp_shard=4, sp=2, ep=4), BlockPlan(Sharding.HSDP, ep=4), 8)
    assert (groups.shard.size, groups.replica.size, groups.sequence.size) == (8, 2, 2)
    assert (groups.expert_shard.size, groups.expert_replica.size) == (2, 2)


def test_evaluator_agrees_with_sympy() -> None:
    import sympy

    expressions = [
        Sym.S * 3 + Sym.N**2,
        sympy.ceiling(Sym.S / 7) * Sym.B,
        sympy.Max(Sym.S, Sym.N) / 2,
        sympy.sqrt(Sym.S),
    ]
    values = {Sym.S: 100.0, Sym.N: 30.0, Sym.B: 2.0}
    expected = [float(e.subs(values)) for e in expressions]
    assert Evaluator(expressions)(values) == pytest.approx(expected)


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
def test_all_compute_of_a_layer_is_slowed_by_collectives_that_outlast_it(recompute: Recompute) -> None:
    program = synthetic.dense_lm()
    plan = make_plan(program, Mesh(dp_shard=16), recompute=recompute)
    hardware = load_hardware("h100")
    link = replace(hardware.inter_link, bytes_per_second=hardware.inter_link.bytes_per_second / 1e4)
    found = []
    for factor in (0.0, 0.3):
        model = StepModel(program, CLUSTER, replace(hardware, inter_link=link, contention_factor=factor))
        loops = [loop for loop in build_step(program, plan, model).last.loops if loop.count > 1]
        found.append([sum(task.seconds for task in loop.tasks if task.stream == "compute") for loop in loops])
    assert len(found[0]) == 2  # the layers' forward and backward
    assert found[1] == pytest.approx([1.3 * time for time in found[0]])
