"""Exports: every choice of a plan is accounted for; every key is the target's own, with a value that it takes."""

from __future__ import annotations

import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from target_keys import known, takes

from omnicompile.cluster import Cluster
from omnicompile.errors import InputError, PlanError
from omnicompile.export import TARGETS, Export, Outcome, export_plan
from omnicompile.export.choices import choices_of
from omnicompile.export.training import option_names
from omnicompile.export.veomni import nested
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Overlap, Plan, Sharding, Stack
from omnicompile.recipe import STEP_FIELDS
from omnicompile.recipes import Recipe, recipes
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload

POWERS = st.sampled_from((1, 2, 4))
BLOCKS = st.builds(
    BlockPlan,
    sharding=st.sampled_from(Sharding),
    recompute=st.sampled_from(Recompute),
    offload=st.booleans(),
    reshard=st.booleans(),
    frozen=st.booleans(),
)


def plan_of(mesh: Mesh, blocks: dict[str, BlockPlan], **more: Any) -> Plan:
    laid_out = {
        name: replace(block, sp=mesh.sp, layout=Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH)
        for name, block in blocks.items()
    }
    return Plan("net.py", Cluster(mesh.world, gpus_per_node=1), Workload(), mesh, laid_out, **more)


def simple(mesh: Mesh | None = None, **choices: Any) -> Plan:
    return plan_of(mesh or Mesh(dp_shard=8), {"text": BlockPlan(**choices)})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans with all choices that a target may be given, without the axes that one of them lacks."""
    mesh = Mesh(dp_replicate=draw(POWERS), dp_shard=draw(POWERS), sp=draw(POWERS))
    names = draw(st.sampled_from((("text",), ("vision", "text"), ("audio", "vision", "text"))))
    return plan_of(
        mesh,
        {name: draw(BLOCKS) for name in names},
        micro_batch=draw(POWERS),
        accumulation=draw(POWERS),
        loss_head=draw(st.sampled_from(LossHead)),
        offload_optimizer=draw(st.booleans()),
        param_dtype=draw(st.sampled_from(("bfloat16", "float32", "float16"))),
        reduce_dtype=draw(st.sampled_from(("bfloat16", "float32"))),
        overlap=Overlap(draw(st.booleans()), replica_sums=draw(st.booleans())),
    )


def exported(plan: Plan, target: str) -> Export | None:
    """None where the target refuses the plan as a whole."""
    try:
        return export_plan(plan, target)
    except PlanError as error:
        assert "--pin" in str(error)
        return None


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_a_rule_for_every_choice_there_is(target: str) -> None:
    wanted = {f"mesh.{f.name}" for f in fields(Mesh)} | {f"block.{f.name}" for f in fields(BlockPlan)}
    wanted |= {f"step.{name}" for name in STEP_FIELDS} | {"machine.gpus", "machine.gpus_per_node", "sample.seq_len"}
    wanted |= {f"overlap.{f.name}" for f in fields(Overlap)}
    rules = set(TARGETS[target].rules)
    assert wanted <= rules
    # What few plans change is refused by default.
    assert rules - wanted <= {f"stack.{f.name}" for f in fields(Stack)} | {f"train.{name}" for name in option_names()}


@pytest.mark.parametrize("target", TARGETS)
@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_every_choice_is_accounted_for(target: str, plan: Plan) -> None:
    export = exported(plan, target)
    if export is None:
        return
    assert [line.choice for line in export.lines] == [choice.title for choice in choices_of(plan)]
    assert all(line.said.why for line in export.lost)
    assert sum(len(export.of(outcome)) for outcome in Outcome) == len(export.lines)
    for line in export.lost:  # the file itself says what it does not hold
        assert f"{line.said.outcome.value} {line.choice}={line.value}: {line.said.why}" in export.text
    for key, value in ((key, value) for line in export.lines for key, value in line.said.keys.items()):
        assert export.keys[key] == value


@pytest.mark.parametrize("target", ["veomni", "torchtitan", "megatron"])
@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_keys_are_the_targets_own(target: str, plan: Plan) -> None:
    export = exported(plan, target)
    if export is None:
        return
    objects = ("loss", "activation_checkpoint") if target == "torchtitan" else ()  # tests/export/test_torchtitan.py
    for key, value in export.keys.items():
        if key not in objects:
            assert key in known(target)["keys"], key
            assert takes(known(target)["keys"][key], value), (key, value)


@pytest.mark.parametrize("target", ["veomni", "torchtitan", "megatron"])
def test_the_version_named_is_that_of_the_keys(target: str) -> None:
    assert TARGETS[target].version == known(target)["version"]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_of_the_zoo_is_exported(recipe: Recipe) -> None:
    plan = recipe.load()
    exports = {target: export_plan(plan, target) for target in TARGETS}
    assert all(export.lines and len(export.lost) < len(export.lines) for export in exports.values())
    assert exports["veomni"].keys["train.global_batch_size"] == plan.global_batch
    assert exports["torchtitan"].keys["training.global_batch_size"] == plan.global_batch
    assert exports["megatron"].keys["--global-batch-size"] == plan.global_batch


def test_the_values_that_are_checked_are_told_apart() -> None:
    assert takes("int", 4) and not takes("int", True) and not takes("int", "4")
    assert takes("Optional[Literal['full', 'selective']]", "full") and not takes("Literal['full']", "none")
    assert takes("Optional[List[str]]", ["a"]) and not takes("Optional[list[int]]", ["a"])


def test_veomni_holds_the_mesh() -> None:
    plan = simple(Mesh(dp_replicate=2, dp_shard=8, sp=4, ep=8), sharding=Sharding.HSDP, recompute=Recompute.FULL, ep=8)
    export = export_plan(replace(plan, accumulation=2, loss_head=LossHead.CHUNKED), "veomni")
    assert export.lost == []
    data = yaml.safe_load(export.text)
    accelerator = data["train"]["accelerator"]
    degrees = {name: accelerator[f"{name}_size"] for name in ("dp_replicate", "dp_shard", "ulysses", "ep")}
    assert degrees == {"dp_replicate": 2, "dp_shard": 8, "ulysses": 4, "ep": 8}
    assert data["train"]["global_batch_size"] == 2 * 8 * 2
    assert data["train"]["gradient_checkpointing"]["enable"] is True
    assert data["model"]["ops_implementation"]["cross_entropy_loss_implementation"] == "chunk_loss"


@pytest.mark.parametrize("target", ["veomni", "torchtitan", "accelerate"])
def test_sharding_over_all_data_ranks_makes_one_axis_of_two(target: str) -> None:
    """FSDP over dp_replicate x dp_shard is no replication there; HSDP keeps the two apart."""
    for sharding, degrees in ((Sharding.FSDP, {1, 8}), (Sharding.HSDP, {2, 4})):
        keys = export_plan(simple(Mesh(dp_replicate=2, dp_shard=4), sharding=sharding), target).keys
        found = {key: value for key, value in keys.items() if "replicate" in key or "shard_" in key}
        del found[next(key for key in found if "reshard" in key)]
        assert set(found.values()) == degrees and len(found) == 2


def test_one_way_of_sharding_is_told() -> None:
    plan = plan_of(Mesh(dp_shard=8), {"vision": BlockPlan(sharding=Sharding.REPLICATE), "text": BlockPlan()})
    for target in ("veomni", "torchtitan", "accelerate"):
        lost = {line.choice: line.said.why for line in export_plan(plan, target).lost}
        assert "sharded over 8 ranks, as text, and not whole on every rank" in lost["vision.sharding"]
    # on one replica HSDP is FSDP: nothing is lost
    same = plan_of(Mesh(dp_shard=8), {"vision": BlockPlan(sharding=Sharding.HSDP), "text": BlockPlan()})
    assert "vision.sharding" not in {line.choice for line in export_plan(same, "veomni").lost}


def test_an_axis_that_a_target_lacks_is_one_error() -> None:
    for target, mesh, what in (
        ("veomni", Mesh(tp=2), "tensor parallelism"),
        ("veomni", Mesh(pp=2), "pipeline parallelism"),
        ("veomni", Mesh(cp=2), "ring context parallelism"),
        ("accelerate", Mesh(pp=2), "pipeline parallelism"),
        ("accelerate", Mesh(sp=2, cp=2), "at once"),
    ):
        with pytest.raises(PlanError, match=what):
            export_plan(simple(mesh), target)
    with pytest.raises(PlanError, match="only beside sharded parameters"):
        export_plan(simple(Mesh(sp=2, dp_shard=2), sharding=Sharding.REPLICATE), "accelerate")


def test_what_another_stack_does_is_refused_by_name() -> None:
    plan = replace(simple(), stack=Stack(gemm_dtype="float8"))
    for target in TARGETS:
        assert ("stack.gemm_dtype", "float8") in {(line.choice, line.value) for line in export_plan(plan, target).lost}


def test_megatron_holds_what_is_its_own_way() -> None:
    """Choices that are priced only, because Megatron's users run them."""
    stack = Stack(pipeline_chunks=2, tp_overlap=True, overlap_gradients=True)
    plan = replace(simple(Mesh(tp=4, pp=2, dp_shard=2), sharding=Sharding.ZERO1), stack=stack)
    export = export_plan(plan, "megatron")
    assert export.lost == []
    wanted = {
        "--tensor-model-parallel-size": 4,
        "--sequence-parallel": True,
        "--tp-comm-overlap": True,
        "--pipeline-model-parallel-size": 2,
        "--num-virtual-stages-per-pipeline-rank": 2,
        "--use-distributed-optimizer": True,
        "--overlap-grad-reduce": True,
        "--overlap-param-gather": True,
    }
    assert wanted.items() <= export.keys.items()
    assert all(takes(known("megatron")["keys"][key], value) for key, value in export.keys.items())
    whole = replace(plan, stack=replace(stack, tp_sequence=False))
    assert "--sequence-parallel" not in export_plan(whole, "megatron").keys


def test_unknown_target_and_empty_recipe() -> None:
    with pytest.raises(InputError, match=r"--to veomi: no such framework \(did you mean veomni\?\)"):
        export_plan(simple(), "veomi")
    with pytest.raises(InputError, match="no blocks"):
        export_plan(replace(simple(), blocks={}), "veomni")


def test_megatron_arguments_are_a_shell_array(tmp_path: Path) -> None:
    plan = simple(
        Mesh(dp_replicate=2, dp_shard=2, sp=2, cp=2, tp=2), sharding=Sharding.HSDP, recompute=Recompute.SELECTIVE
    )
    export = export_plan(plan, "megatron")
    (tmp_path / "args.sh").write_text(export.text)
    script = f'source {tmp_path / "args.sh"}; printf "%s\\n" "${{PLAN_ARGS[@]}}"'
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    wanted = [word for flag, value in export.keys.items() for word in _words(flag, value)]
    assert words == wanted
    assert export.keys["--context-parallel-size"] == 4
    assert export.keys["--hierarchical-context-parallel-sizes"] == [2, 2]
    assert export.keys["--num-distributed-optimizer-instances"] == 2


def test_megatron_all_to_all_around_attention_is_exact() -> None:
    plan = simple(Mesh(dp_shard=2, sp=4), recompute=Recompute.FULL)
    export = export_plan(plan, "megatron")
    assert (export.keys["--context-parallel-size"], export.keys["--cp-comm-type"]) == (4, "a2a")
    assert export.lost == []


def _words(flag: str, value: Any) -> list[str]:
    if value is True:
        return [flag]
    return [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]


def test_dotted_keys_become_sections() -> None:
    assert nested({"train.a.b": 1, "model.c": 2, "train.d": 3}) == {"model": {"c": 2}, "train": {"a": {"b": 1}, "d": 3}}
