"""The choices of a plan, one by one, and what several targets need to know of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from omnicompile.plan import BlockPlan, Mesh, Plan, Sharding
from omnicompile.recipe import STEP_FIELDS
from omnicompile.train.options import TrainOptions


@dataclass(frozen=True)
class Choice:
    """One choice. section: machine, sample, mesh, block, step, train, or one of the plan for what is seldom changed.
    block: of which block, for section "block". options: all training options, for section "train"."""

    section: str
    name: str
    value: Any
    block: str = ""
    options: TrainOptions | None = None

    @property
    def rule(self) -> str:
        """The name under which a target's table has it."""
        return f"{self.section}.{self.name}"

    @property
    def title(self) -> str:
        """As pins and recipes name it."""
        return f"{self.block}.{self.name}" if self.block else self.rule


def choices_of(plan: Plan) -> list[Choice]:
    """Every choice of a plan. Sections with defaults (software stack and the like) give what differs from those."""
    found = [Choice("machine", name, getattr(plan.cluster, name)) for name in ("gpus", "gpus_per_node")]
    found.append(Choice("sample", "seq_len", plan.workload.seq_len))
    found += [Choice("mesh", f.name, getattr(plan.mesh, f.name)) for f in fields(Mesh)]
    for block, choices in plan.blocks.items():
        found += [Choice("block", f.name, getattr(choices, f.name), block) for f in fields(BlockPlan)]
    found += [Choice("step", name, getattr(plan, name)) for name in STEP_FIELDS]
    return found + _changed_sections(plan)


def _changed_sections(plan: Plan) -> list[Choice]:
    found = []
    for section in fields(Plan):
        value = getattr(plan, section.name)
        if section.name in ("cluster", "workload", "mesh", "prediction") or not is_dataclass(value):
            continue
        found += [
            Choice(section.name, f.name, getattr(value, f.name))
            for f in fields(value)
            if getattr(value, f.name) != f.default
        ]
    return found


def main_block(plan: Plan) -> str:
    """The block that takes most of the step: a target with one setting for the whole model follows it."""
    time = plan.prediction.block_time if plan.prediction is not None else {}
    return max(plan.blocks, key=lambda name: (time.get(name, 0.0), not plan.blocks[name].frozen, name == "text"))


def shards(plan: Plan, sharding: Sharding) -> int:
    """Ranks that share one copy of the parameters."""
    mesh = plan.mesh
    if sharding in (Sharding.REPLICATE, Sharding.ZERO1):
        return 1
    copies = mesh.dp_replicate if sharding is Sharding.HSDP else 1
    return mesh.data_ranks * mesh.sp * mesh.cp // copies


def data_degrees(plan: Plan) -> tuple[int, int]:
    """(replicas, shards) of the data ranks, where one way of sharding the main block is the way of all."""
    mesh, sharding = plan.mesh, plan.blocks[main_block(plan)].sharding
    if sharding is Sharding.HSDP:
        return mesh.dp_replicate, mesh.dp_shard
    return (1, mesh.data_ranks) if sharding is Sharding.FSDP else (mesh.data_ranks, 1)


def torchrun(plan: Plan) -> str:
    """The launcher's command for the cluster of the plan."""
    cluster = plan.cluster
    return f"torchrun --nnodes {cluster.nodes} --nproc-per-node {min(cluster.gpus, cluster.gpus_per_node)}"
