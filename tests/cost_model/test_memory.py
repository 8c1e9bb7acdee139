"""Memory of a plan: state by sharding, activations by policy, and agreement with the timeline."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "planner"))

import synthetic

from omnicompile.cluster import Cluster
from omnicompile.cost_model import timeline
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.cost_model.memory import KINDS, MemoryLayout, Table
from omnicompile.cost_model.step_model import StepModel
from omnicompile.cost_model.step_schedule import build_step
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Plan, Sharding
from omnicompile.program import Program, Recompute
from omnicompile.workload import Workload

CLUSTER = Cluster(16)


def make_plan(program: Program, mesh: Mesh, micro_batch: int = 1, **choices: object) -> Plan:
    layout = Layout.BATCH if mesh.sp == 1 else Layout.SEQUENCE
    block = replace(BlockPlan(layout=layout, sp=mesh.sp), **choices)  # type: ignore[arg-type]
    blocks = {b.name: block for b in program.blocks}
    return Plan("m", CLUSTER, Workload(program.sample.seq_len), mesh, blocks, micro_batch)


def table(program: Program, plan: Plan, model: StepModel) -> Table:
    """Bytes (kind, moment), all blocks together."""
    frozen = frozenset(name for name, block in plan.blocks.items() if block.frozen)
    trains = {name: gradient.any for name, gradient in model.gradients(frozen).items()}
    layout = MemoryLayout(program, trains)
    parts = [
        layout.work_bytes(name, cost.work) + layout.weights_bytes(name, cost.weights, plan.blocks[name].reshard)
        for name, cost in model.plan_blocks(plan).items()
    ]
    return np.sum(parts, axis=0)


def peak(program: Program, plan: Plan) -> float:
    return float(table(program, plan, StepModel(program, CLUSTER)).sum(axis=0).max())


def state(program: Program, plan: Plan) -> dict[str, float]:
    blocks = StepModel(program, CLUSTER).plan_blocks(plan).values()
    return {
        name: sum(getattr(b.weights.static, name) for b in blocks) for name in ("parameters", "gradients", "optimizer")
    }


def test_fully_sharded_state_is_sixteen_bytes_per_parameter_over_all_ranks() -> None:
    program = synthetic.dense_lm()
    local = program.param_count / 16
    expected = {"parameters": 4 * local, "gradients": 4 * local, "optimizer": 8 * local}
    assert state(program, make_plan(program, Mesh(dp_shard=16))) == pytest.approx(expected)


def test_hybrid_and_replicated_state() -> None:
    program = synthetic.dense_lm()
    hybrid = state(program, make_plan(program, Mesh(dp_replicate=2, dp_shard=8), sharding=Sharding.HSDP))
    assert hybrid["optimizer"] == pytest.approx(program.param_count)
    whole = state(program, make_plan(program, Mesh(dp_shard=16), sharding=Sharding.REPLICATE))
    assert whole["parameters"] == pytest.approx(6 * program.param_count)  # master weights and a bf16 copy


def test_offloaded_optimizer_leaves_compute_weights_and_gradients() -> None:
    program = synthetic.dense_lm()
    plan = replace(make_plan(program, Mesh(dp_shard=16)), offload_optimizer=True)
    local = program.param_count / 16
    assert state(program, plan) == pytest.approx({"parameters": 2 * local, "gradients": 4 * local, "optimizer": 0.0})


def test_experts_are_sharded_by_ep_and_by_the_rest() -> None:
    program = synthetic.moe_lm()
    one = state(program, make_plan(program, Mesh(dp_shard=16)))
    spread = state(program, make_plan(program, Mesh(dp_shard=16, ep=8), ep=8))
    assert spread == pytest.approx(one)


def test_saving_less_needs_less() -> None:
    program = synthetic.dense_lm()
    peaks = [peak(program, make_plan(program, Mesh(dp_shard=16), recompute=policy)) for policy in Recompute]
    assert peaks[0] > peaks[1] > peaks[2]
    assert peak(program, make_plan(program, Mesh(dp_shard=16), offload=True)) < peaks[0]


def test_sequence_parallelism_divides_activations() -> None:
    program = synthetic.dense_lm()
    model = StepModel(program, CLUSTER)
    row = KINDS.index("activations")
    whole = table(program, make_plan(program, Mesh(dp_shard=16)), model)[row].max()
    split = table(program, make_plan(program, Mesh(dp_shard=4, sp=4)), model)[row].max()
    (layers,) = (segment for segment in program.segments if segment.count > 1)
    attention = next(op.attention for op in layers.ops if op.attention is not None)
    # Attention reads its own result before the exchange of heads for tokens, the projection after it.
    result = 2 * program.sample.seq_len * attention.heads * attention.v_head_dim * layers.count
    assert split == pytest.approx((whole + result) / 4)


def test_a_second_exchange_of_what_is_not_kept_is_no_saving() -> None:
    """With recompute of attention's surroundings its result is kept on one side alone."""
    program = synthetic.dense_lm()
    model = StepModel(program, CLUSTER)
    mesh = Mesh(dp_shard=4, sp=4)

    def layer(policy: Recompute) -> tuple[float, float]:
        units = model.plan_blocks(make_plan(program, mesh, recompute=policy))["text"].units
        (work,) = (unit.work for name, unit in units.items() if name == "text.layers")
        return work.saved, work.recomputed

    everything = sum(layer(Recompute.NONE))
    assert all(sum(layer(policy)) == pytest.approx(everything) for policy in Recompute)
    assert layer(Recompute.EXCEPT_ATTENTION)[0] < layer(Recompute.SELECTIVE)[0] < everything


def test_a_heads_gradient_is_cast_when_its_logits_are_gone() -> None:
    """Of a large vocabulary and few rows the copy in float32 is the larger."""
    program = synthetic.dense_lm(1024)
    plan = make_plan(program, Mesh(dp_shard=16))
    (head,) = (segment for segment in program.segments if segment.logits is not None)

    def peak_of_head(plan: Plan) -> float:
        return max(StepModel(program, CLUSTER).plan_blocks(plan)["text"].units[head.name].work.backward_peaks)

    assert peak_of_head(plan) == pytest.approx(4 * head.param_count)
    assert peak_of_head(replace(plan, reduce_dtype="bfloat16")) < peak_of_head(plan)


def test_chunked_loss_head_saves_logits() -> None:
    program = synthetic.dense_lm(65536)
    plan = make_plan(program, Mesh(dp_shard=16), recompute=Recompute.FULL)
    chunked = replace(plan, loss_head=LossHead.CHUNKED)
    assert peak(program, chunked) < peak(program, plan)
    model = StepModel(program, CLUSTER)
    (head,) = (segment.name for segment in program.segments if segment.logits is not None)
    whole, parts = (model.plan_blocks(p)["text"].units[head].work.forward_peak for p in (plan, chunked))
    assert parts < 0.2 * whole


def test_frozen_block_keeps_weights_only() -> None:
    program = synthetic.vision_language_7b()
    plan = make_plan(program, Mesh(dp_shard=16))
    blocks = plan.blocks | {"vision": replace(plan.blocks["vision"], frozen=True)}
    cost = StepModel(program, CLUSTER).plan_blocks(replace(plan, blocks=blocks))["vision"]
    vision = sum(s.param_count * s.count for s in program.block_segments("vision"))
    assert cost.weights.static.total == pytest.approx(2 * vision / 16)
    assert all(unit.saved == 0 for unit in cost.work.units.values())


MESHES = [Mesh(dp_shard=16), Mesh(dp_replicate=4, dp_shard=4), Mesh(dp_shard=4, sp=4)]


@pytest.mark.parametrize(
    ("program", "mesh", "recompute", "offload"),
    list(
        itertools.product(
            [synthetic.dense_lm(), synthetic.vision_language_7b(), synthetic.moe_lm()], MESHES, Recompute, [False, True]
        )
    ),
    ids=lambda value: value.name if isinstance(value, Program) else None,
)
def test_peak_agrees_with_the_timeline(program: Program, mesh: Mesh, recompute: Recompute, offload: bool) -> None:
    """The moments bound the timeline's peak, and closely (the timeline does not count all-to-all buffers, and a
    reduction may be over before the next layer's temporaries are there; the moments do not count what is on its way to
    host memory)."""
    sharding = Sharding.HSDP if mesh.dp_replicate > 1 else Sharding.FSDP
    plan = make_plan(program, mesh, micro_batch=mesh.sp, recompute=recompute, offload=offload, sharding=sharding)
    model = StepModel(program, CLUSTER)
    by_moments = float(table(program, plan, model).sum(axis=0).max())
    by_timeline = timeline.simulate(build_step(program, plan, model).last).peak_bytes
    assert by_timeline <= by_moments * (1.07 if offload else 1.02)
    assert by_timeline >= by_moments * 0.80


def test_a_backend_that_stages_collectives_needs_more() -> None:
    """A gather on its way holds its copies; a reduction on a copy does not need what it was given."""
    program = synthetic.dense_lm()
    plan = make_plan(program, Mesh(dp_shard=16))
    hardware = load_hardware(CLUSTER.gpu)

    def bytes_with(**copies: float) -> dict[str, float]:
        changed = replace(hardware, collective=replace(hardware.collective, **copies))
        model = StepModel(program, CLUSTER, changed)
        weights = model.plan_blocks(plan)["text"].weights.units["text.layers"]
        return {"staged": weights.staged, "gathered": weights.gathered, "reducing": weights.reducing}

    plain, staged = bytes_with(), bytes_with(gather_copies=1.5, reduce_copies=1.0)
    assert plain["staged"] == 0 and staged["staged"] == 1.5 * plain["gathered"]
    assert staged["reducing"] == plain["reducing"] > 0
    assert bytes_with(reduce_copies=2.0)["reducing"] == 2 * plain["reducing"]


@pytest.mark.parametrize("sharding", [Sharding.FSDP, Sharding.HSDP, Sharding.REPLICATE])
def test_parameters_that_the_model_does_not_train_have_weights_only(sharding: Sharding) -> None:
    """As of adapters: every layer has some, and the optimizer knows of the others alone."""
    whole = synthetic.moe_lm()
    program = synthetic.untrained(whole, {"experts", "qkv", "embed", "lm_head"})
    plan = make_plan(whole, Mesh(dp_replicate=2, dp_shard=8), sharding=sharding)
    trained = sum(p.numel * s.count for s in program.segments for p in s.params if p.trained)
    shards = {Sharding.FSDP: 16, Sharding.HSDP: 8, Sharding.REPLICATE: 1}[sharding]
    copy = 2 if shards == 1 else 0
    frozen = whole.param_count - trained
    assert 0 < trained < frozen
    assert state(program, plan) == pytest.approx(
        {
            "parameters": (trained * (4 + copy) + frozen * 2) / shards,
            "gradients": 4 * trained / shards,
            "optimizer": 8 * trained / shards,
        }
    )


def test_gradients_of_untrained_parameters_are_not_reduced() -> None:
    whole = synthetic.dense_lm()
    program = synthetic.untrained(whole, {"up", "down", "qkv"})
    plan = make_plan(whole, Mesh(dp_shard=16))
    before, after = (StepModel(p, CLUSTER).plan_blocks(plan)["text"].units["text.layers"] for p in (whole, program))
    layer = next(s for s in program.segments if s.role == "layer")
    share = sum(p.numel for p in layer.params if p.trained) / layer.param_count
    assert after.weights.gathered == before.weights.gathered
    assert after.weights.owned == pytest.approx(share * before.weights.owned)
    assert after.weights.reducing == pytest.approx(share * before.weights.reducing)
    assert max(after.weights.gradients) == pytest.approx(share * max(before.weights.gradients))
    assert sum(p.seconds for p in after.weights.reduce) < sum(p.seconds for p in before.weights.reduce)
    assert after.weights.gather == before.weights.gather


def test_a_block_that_the_model_does_not_train_costs_what_a_frozen_one_costs() -> None:
    whole = synthetic.vision_language_7b()
    plan = make_plan(whole, Mesh(dp_shard=16))
    frozen = replace(plan, blocks=plan.blocks | {"vision": replace(plan.blocks["vision"], frozen=True)})
    stated = synthetic.untrained(whole, set(), block="vision")
    tables = [table(program, p, StepModel(program, CLUSTER)) for program, p in ((stated, plan), (whole, frozen))]
    assert np.array_equal(*tables)
