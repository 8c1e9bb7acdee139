"""A plan from a layout that somebody states: what is not stated has its plainest value, nothing is searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from omnicompile.cluster import Cluster
from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, Layout, Mesh, Overlap, Plan, Stack
from omnicompile.planner.pins import BLOCK_FIELDS, Pins, parse_pins
from omnicompile.planner.rules import frozen_blocks, has_experts, sequence_refusal
from omnicompile.program import Block, Program
from omnicompile.support import not_executable
from omnicompile.workload import Workload


def given_plan(
    program: Program, cluster: Cluster, workload: Workload, layout: Mapping[str, str], name: str = ""
) -> Plan:
    """layout: as pins (`sp`, `ep`, `dp_replicate`, `micro_batch`, `loss_head`, `text.recompute`, ...); a block's field
    without the name of a block goes for all.

    Not stated: sp, ep and dp_replicate are 1, dp_shard is what is left of the GPUs, micro_batch is 1 and accumulation
    follows from the batch; blocks are fsdp, split along the sequence if sp > 1 (an encoder that cannot be is
    replicated), and recompute nothing. Raises PlanError for unknown keys and values, and a mesh of another size than
    the cluster.
    """
    pins = parse_pins(_for_all_blocks(layout, program), program)
    mesh = _mesh(pins, cluster)
    samples = workload.global_batch or cluster.gpus
    micro_batch = int(pins.step.get("micro_batch", 1))
    accumulation = int(pins.step.get("accumulation", max(1, samples // (micro_batch * mesh.data_ranks))))
    step = {key: value for key, value in pins.step.items() if key not in ("micro_batch", "accumulation", "priced")}
    frozen = frozen_blocks(program, workload.freeze)
    blocks = {block.name: _block(program, block, mesh, pins, block.name in frozen) for block in program.blocks}
    plan = Plan(name or program.source, cluster, workload, mesh, blocks, micro_batch, accumulation)
    plan = replace(plan, **step, stack=Stack(**pins.stack), overlap=Overlap(**pins.overlap))
    return replace(plan, notes=tuple(f"priced, not executable yet: {choice}" for choice in not_executable(plan)))


def _for_all_blocks(layout: Mapping[str, str], program: Program) -> dict[str, str]:
    """A block's own value goes before one for all."""
    pins: dict[str, str] = {}
    layout = _attention_again(layout)
    mesh = {f.name for f in fields(Mesh)}
    for key, value in layout.items():
        if key in BLOCK_FIELDS and key not in mesh:
            pins |= {f"{block.name}.{key}": value for block in program.blocks}
    return pins | {key: value for key, value in layout.items() if key not in BLOCK_FIELDS or key in mesh}


def _attention_again(layout: Mapping[str, str]) -> Mapping[str, str]:
    """`recompute=core_attention`: nothing but attention runs again in the backward."""
    again = [key for key, value in layout.items() if key.endswith("recompute") and value == "core_attention"]
    return {**layout, **dict.fromkeys(again, "none"), "stack.recompute_attention": "true"} if again else layout


def _mesh(pins: Pins, cluster: Cluster) -> Mesh:
    degrees = dict(pins.mesh)
    if "dp_shard" not in degrees:
        others = Mesh(**{**degrees, "dp_shard": 1}).world
        if cluster.gpus % others:
            raise PlanError(f"the other degrees of the mesh, {others} in all, do not divide {cluster.gpus} GPUs")
        degrees["dp_shard"] = cluster.gpus // others
    return Mesh(**degrees)


def _block(program: Program, block: Block, mesh: Mesh, pins: Pins, frozen: bool) -> BlockPlan:
    stated = pins.blocks.get(block.name, {})
    layout = stated.get("layout", _default_layout(program, block, mesh))
    sp = mesh.sp if layout in (Layout.SEQUENCE, Layout.IMAGES) else 1
    ep = mesh.ep if has_experts(program, block.name) else 1
    return replace(BlockPlan(layout=layout, sp=sp, ep=ep, frozen=frozen), **stated)


def _default_layout(program: Program, block: Block, mesh: Mesh) -> Layout:
    if mesh.sp == 1:
        return Layout.BATCH
    cut = block.kind != "encoder" or sequence_refusal(program, block, mesh.sp) is None
    return Layout.SEQUENCE if cut else Layout.REPLICATED
