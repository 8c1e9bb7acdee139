"""What a plan is made of, and what the planner says when there is none."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from pathlib import Path

import pytest
import synthetic
from brute import random_case

from omnicompile.cluster import Cluster
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.errors import InfeasibleError, PlanError
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Prediction, Sharding
from omnicompile.planner.api import longest_that, plan_program
from omnicompile.planner.predict import simulate
from omnicompile.program import Program
from omnicompile.support import not_executable
from omnicompile.workload import Workload


def asked(pins: dict[str, str]) -> dict[str, str]:
    """Everything that is priced may be chosen, so that the tests see the whole search."""
    return {"priced": "true"} | {k.replace("__", "."): v for k, v in pins.items()}


def best(program: Program, cluster: Cluster, workload: Workload | None = None, **pins: str) -> Plan:
    load = workload or Workload(seq_len=program.sample.seq_len)
    return plan_program(program, cluster, load, asked(pins)).plans[0]


def predicted(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def own_fields(plan: Plan) -> dict[str, str]:
    """All choices of a plan as pins."""
    pins = {f"mesh.{f.name}": str(getattr(plan.mesh, f.name)) for f in dataclasses.fields(Mesh)}
    for name in ("micro_batch", "accumulation", "loss_head", "offload_optimizer"):
        pins[name] = str(getattr(plan, name))
    for block, choices in plan.blocks.items():
        pins |= {f"{block}.{f.name}": str(getattr(choices, f.name)) for f in dataclasses.fields(BlockPlan)}
    return pins


def test_plans_a_large_vision_language_model() -> None:
    plan = best(synthetic.vision_language_72b(), Cluster(128))
    assert predicted(plan).fits
    assert plan.mesh.world == 128 and plan.global_batch == 128
    assert 0.3 < predicted(plan).mfu < 0.75
    assert set(plan.blocks) == {"vision", "text"}


def test_prediction_adds_up() -> None:
    prediction = predicted(best(synthetic.vision_language_7b(), Cluster(8)))
    waiting = sum(v for k, v in prediction.time.items() if not k.startswith("hidden "))
    assert waiting == pytest.approx(prediction.step_seconds, rel=1e-6)
    parts = sum(prediction.block_memory.values()) + prediction.memory["context"] + prediction.memory["allocator slack"]
    assert parts == pytest.approx(prediction.memory_total)


def test_accumulated_prediction_adds_up() -> None:
    program = synthetic.vision_language_7b()
    plan = best(program, Cluster(8), Workload(8192, global_batch=32), micro_batch="1", mesh__sp="1")
    assert plan.accumulation == 4
    waiting = sum(v for k, v in predicted(plan).time.items() if not k.startswith("hidden "))
    assert waiting == pytest.approx(predicted(plan).step_seconds, rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_pinning_a_plans_own_fields_returns_it(seed: int) -> None:
    case = random_case(seed, limit=10**6)
    try:
        plan = plan_program(case.program, case.cluster, case.workload).plans[0]
    except InfeasibleError:
        pytest.skip("nothing fits")
    pins = own_fields(plan)
    some = dict(random.Random(seed).sample(sorted(pins.items()), 6))
    for chosen in (pins, some):
        again = plan_program(case.program, case.cluster, case.workload, chosen).plans[0]
        assert dataclasses.replace(again, notes=()) == dataclasses.replace(plan, notes=())


def custom_hardware(folder: Path, memory_gib: float) -> str:
    """A file like h100's with another memory size."""
    source = Path(load_hardware.__code__.co_filename).parent / "hardware" / "h100.yaml"
    lines = [
        f"memory_bytes: {memory_gib * 2**30:.6e}" if line.startswith("memory_bytes:") else line
        for line in source.read_text().splitlines()
    ]
    target = folder / f"gpu{memory_gib}.yaml"
    target.write_text("\n".join(lines))
    return str(target)


def test_more_memory_is_never_slower() -> None:
    program, workload = synthetic.vision_language_7b(16384), Workload(16384)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for memory in (30.0, 40.0, 60.0, 100.0, 200.0):
            cluster = Cluster(8, custom_hardware(Path(folder), memory))
            seconds.append(predicted(best(program, cluster, workload)).step_seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_alternatives_are_slower_and_say_why() -> None:
    program = synthetic.vision_language_7b()
    result = plan_program(program, Cluster(8), Workload(8192), top=3)
    times = [predicted(plan).step_seconds for plan in result.plans]
    assert times == sorted(times) and len(result.lost_because) == 3
    assert result.lost_because[0] == "" and "slower" in result.lost_because[1]


def test_sequence_parallelism_above_the_heads_is_refused_with_the_reason() -> None:
    with pytest.raises(PlanError, match="28 attention heads, which sp=8 does not divide"):
        best(synthetic.vision_language_7b(), Cluster(8), mesh__sp="8")


def test_key_value_heads_may_be_fewer_than_sp_ranks() -> None:
    program = synthetic.vision_language_72b()  # 64 heads, 8 key/value heads
    assert best(program, Cluster(128), mesh__sp="16").mesh.sp == 16


def test_encoder_layouts_can_be_pinned_by_name_or_by_degree() -> None:
    program = synthetic.vision_language_7b()
    assert best(program, Cluster(8), mesh__sp="4", vision__layout="images").blocks["vision"].sp == 4
    assert best(program, Cluster(8), mesh__sp="4", vision__sp="1").blocks["vision"].layout is Layout.REPLICATED


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"audio.sp": "1"}, "no block 'audio'"),
        ({"text.colour": "1"}, "no field 'colour'"),
        ({"text.recompute": "some"}, "none, selective, except_attention, full"),
        ({"mesh.tp": "2"}, "not executable yet"),
        ({"mesh.sp": "0"}, "at least 1"),
        ({"mesh.sp": "3"}, "no plan for 8 GPUs"),
        ({"mesh.ep": "2"}, "the model has no experts"),
        ({"vision.frozen": "true"}, "--freeze"),
        ({"param_dtype": "int3"}, "bfloat16"),
    ],
)
def test_impossible_pins_are_refused_in_one_line(pins: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan_program(synthetic.vision_language_7b(), Cluster(8), Workload(8192), pins)
    assert "\n" not in str(caught.value)


def test_infeasible_says_what_is_short_and_what_would_fit() -> None:
    with pytest.raises(InfeasibleError, match=r"GiB too much.*What would fit: 8 GPUs") as caught:
        best(synthetic.vision_language_72b(), Cluster(4))
    assert "\n" not in str(caught.value)


def test_infeasible_pins_are_named() -> None:
    with pytest.raises(InfeasibleError, match="leaving out the pins"):
        best(synthetic.vision_language_7b(196608), Cluster(8), text__recompute="none", text__offload="false")


def test_experts_are_spread_over_ranks() -> None:
    plan = best(synthetic.moe_lm(), Cluster(32), mesh__ep="8")
    assert plan.blocks["text"].ep == 8


def test_freezing_encoders_saves_memory_and_time() -> None:
    program = synthetic.vision_language_7b()
    pins = {"mesh__sp": "2", "vision__layout": "sequence", "text__recompute": "full", "text__offload": "false"}
    pins |= {"micro_batch": "1", "vision__sharding": "fsdp", "text__sharding": "fsdp", "loss_head": "chunked"}
    pins["offload_optimizer"] = "false"
    pins |= {"mesh__dp_replicate": "1"}
    pins_frozen = dict(pins)
    pins |= {"vision__recompute": "none", "vision__offload": "false"}
    trained = predicted(best(program, Cluster(8), Workload(8192), **pins))
    frozen = predicted(best(program, Cluster(8), Workload(8192, freeze=("encoders",)), **pins_frozen))
    assert frozen.step_seconds < trained.step_seconds
    assert frozen.memory_total < trained.memory_total


def test_a_block_that_the_model_does_not_train_is_planned_as_frozen() -> None:
    program = synthetic.vision_language_7b()
    stated = synthetic.untrained(program, set(), block="vision")
    plan, frozen = best(stated, Cluster(8)), best(program, Cluster(8), Workload(8192, freeze=("vision",)))
    assert plan.blocks["vision"].frozen and plan.workload.freeze == ()
    assert dataclasses.replace(plan, workload=frozen.workload) == frozen
    trained = {name: dataclasses.replace(block, frozen=False) for name, block in plan.blocks.items()}
    with pytest.raises(PlanError, match="by the model's own requires_grad it is True"):
        simulate(stated, dataclasses.replace(plan, blocks=trained))


def test_adapters_leave_room_that_a_whole_model_does_not() -> None:
    """Of parameters that the model does not train there is no gradient and no optimizer state."""
    program = synthetic.vision_language_72b()
    with pytest.raises(InfeasibleError):
        best(program, Cluster(4))
    names = {p.name for s in program.segments for p in s.params} - {"norm"}
    assert predicted(best(synthetic.untrained(program, names), Cluster(4))).fits


def test_simulate_refuses_what_cannot_run() -> None:
    program = synthetic.vision_language_7b()
    blocks = {name: BlockPlan(Sharding.FSDP) for name in ("vision", "text")}
    plan = Plan("m", Cluster(8), Workload(8192), Mesh(dp_shard=8), blocks)
    assert predicted(simulate(program, plan)).step_seconds > 0
    with pytest.raises(PlanError, match="the mesh has 4 ranks"):
        simulate(program, dataclasses.replace(plan, mesh=Mesh(dp_shard=4)))
    with pytest.raises(PlanError, match="samples"):
        simulate(program, dataclasses.replace(plan, micro_batch=3))
    with pytest.raises(PlanError, match="layout"):
        simulate(program, dataclasses.replace(plan, mesh=Mesh(dp_shard=4, sp=2), micro_batch=2))


@pytest.mark.parametrize("limit", [1024, 5000, 1 << 20])
def test_longest_that_fits(limit: int) -> None:
    assert longest_that(lambda n: n <= limit) == limit // 1024 * 1024
    assert longest_that(lambda n: False) is None


def test_what_cannot_be_executed_is_chosen_only_when_asked_for() -> None:
    program, cluster, load = synthetic.vision_language_7b(), Cluster(8), Workload(65536)
    freely = plan_program(program, cluster, load, {}).plans[0]
    assert not not_executable(freely)
    asked_for = plan_program(program, cluster, load, {"text.offload": "true"}).plans[0]
    assert asked_for.blocks["text"].offload
    assert not any("not executable" in note for note in asked_for.notes)
    widened = plan_program(program, cluster, load, {"priced": "true"}).plans[0]
    assert predicted(widened).step_seconds <= predicted(freely).step_seconds
