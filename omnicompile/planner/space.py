"""The search space: meshes, micro-batches and the choices for each block, everything refused with a reason.

Only one of several equal plans is listed: parameters sharded over one rank are "replicate", and dp_replicate > 1 only
occurs with a block that is sharded inside replicas (hsdp).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from omnicompile.cluster import Cluster
from omnicompile.cost_model.step_price import DTYPE_BYTES
from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Overlap, Sharding
from omnicompile.planner.pins import Pins, refuse_priced_only
from omnicompile.planner.rules import (
    block_refusal,
    expert_counts,
    frozen_blocks,
    has_experts,
    mesh_refusal,
    overlap_refusal,
)
from omnicompile.program import Program, Recompute
from omnicompile.support import block_on_request
from omnicompile.workload import Workload


@dataclass(frozen=True)
class Point:
    """One mesh and micro-batch, and what overlaps; within it each block is chosen."""

    mesh: Mesh
    micro_batch: int
    accumulation: int
    overlap: Overlap = field(default_factory=Overlap)


@dataclass
class Space:
    """Everything that may be planned for a program on a cluster, under the user's pins."""

    program: Program
    cluster: Cluster
    workload: Workload
    pins: Pins
    frozen: frozenset[str] = field(init=False)
    refused: dict[str, str] = field(init=False, default_factory=dict)
    points: tuple[Point, ...] = field(init=False)

    def __post_init__(self) -> None:
        refuse_priced_only(self.pins)
        self.frozen = frozen_blocks(self.program, self.workload.freeze)
        for name, pinned in self.pins.blocks.items():
            if pinned.get("frozen", name in self.frozen) != (name in self.frozen):
                raise PlanError(
                    f"pin {name}.frozen: what is frozen is part of the workload (--freeze) and of the model"
                )
        for key in ("param_dtype", "reduce_dtype"):
            if self.pins.step.get(key, "bfloat16") not in DTYPE_BYTES:
                raise PlanError(f"pin {key}={self.pins.step[key]}: must be one of {', '.join(DTYPE_BYTES)}")
        self.points = tuple(self._points())

    @property
    def global_batch(self) -> int:
        return self.workload.global_batch or self.cluster.gpus

    @property
    def loss_heads(self) -> list[LossHead]:
        heads = any(s.logits is not None for s in self.program.segments)
        allowed = [h for h in LossHead if self.pins.allows_step("loss_head", h)]
        return allowed if heads or "loss_head" in self.pins.step else [LossHead.FULL]

    @property
    def offload_optimizer(self) -> list[bool]:
        flags = (False, True) if self.priced or "offload_optimizer" in self.pins.step else (False,)
        return [flag for flag in flags if self.pins.allows_step("offload_optimizer", flag)]

    @property
    def priced(self) -> bool:
        """Whether what is planned on request only is considered too (what is pinned always is)."""
        return bool(self.pins.step.get("priced", False))

    def _points(self) -> list[Point]:
        points = []
        for mesh in self._meshes():
            if self.global_batch % mesh.data_ranks:
                self._refuse(
                    f"{mesh.data_ranks} data ranks",
                    f"a batch of {self.global_batch} samples does not divide among {mesh.data_ranks} data ranks",
                )
                continue
            samples = self.global_batch // mesh.data_ranks
            for micro_batch in divisors(samples):
                accumulation = samples // micro_batch
                allowed = self.pins.allows_step("micro_batch", micro_batch)
                if allowed and self.pins.allows_step("accumulation", accumulation):
                    overlaps = self._overlaps(mesh, accumulation)
                    points += [Point(mesh, micro_batch, accumulation, overlap) for overlap in overlaps]
        return points

    def _overlaps(self, mesh: Mesh, accumulation: int) -> list[Overlap]:
        """Ways to overlap that may differ in time on this mesh, finer ones (`refine`) left out; pinned ones always."""
        choices: dict[str, tuple[Any, ...]] = {
            "replica_sums": (False, True) if mesh.world > 1 else (False,),
        }
        choices |= {name: (value,) for name, value in self.pins.overlap.items()}
        pinned = Overlap(**self.pins.overlap)
        if reason := overlap_refusal(self.program, mesh, pinned):
            self._refuse(reason.partition(":")[0], reason)
            return []
        return [Overlap(**dict(zip(choices, values))) for values in itertools.product(*choices.values())]

    def _meshes(self) -> list[Mesh]:
        meshes = []
        gpus = self.cluster.gpus
        for sp in divisors(gpus):
            for replicas, ep in itertools.product(divisors(gpus // sp), self._expert_degrees()):
                mesh = Mesh(dp_replicate=replicas, dp_shard=gpus // sp // replicas, sp=sp, ep=ep)
                if not self.pins.allows_mesh(mesh):
                    continue
                if reason := mesh_refusal(self.program, self.cluster, mesh):
                    self._refuse(f"sp={sp}" if "ep=" not in reason else f"ep={ep}", reason)
                    continue
                meshes.append(mesh)
        return meshes

    def _expert_degrees(self) -> list[int]:
        counts = expert_counts(self.program)
        pinned = [self.pins.mesh["ep"]] if "ep" in self.pins.mesh else []
        return sorted({1, *pinned, *(d for count in counts for d in divisors(count))})

    def _refuse(self, what: str, reason: str) -> None:
        self.refused.setdefault(what, reason)

    def work_options(self, block: str, mesh: Mesh) -> list[BlockPlan]:
        """Layouts, recompute and offload of a block (sharding left at its default)."""
        layouts = self._layouts(block, mesh)
        ep = mesh.ep if has_experts(self.program, block) else 1
        pinned = self.pins.blocks.get(block, {})
        options = []
        for layout, recompute, offload in itertools.product(layouts, Recompute, (False, True)):
            sp = mesh.sp if layout in (Layout.SEQUENCE, Layout.IMAGES) else 1
            plan = BlockPlan(
                Sharding.FSDP, layout, sp, ep, recompute, offload, pinned.get("reshard", True), block in self.frozen
            )
            if not self._pins_allow(block, plan) or not self._considered(block, plan):
                continue
            if reason := block_refusal(self.program, mesh, block, plan):
                self._refuse(f"{block} {layout} sp={mesh.sp}", reason)
                continue
            options.append(plan)
        return options

    def _layouts(self, block: str, mesh: Mesh) -> list[Layout]:
        if mesh.sp == 1:
            return [Layout.BATCH]
        described = self.program.block(block)
        if described.kind != "encoder":
            return [Layout.SEQUENCE]
        return [Layout.SEQUENCE, *([Layout.IMAGES] if described.units else []), Layout.REPLICATED]

    def _considered(self, block: str, plan: BlockPlan) -> bool:
        """False for a plan with something that is planned on request only and that nobody asked for."""
        pinned = self.pins.blocks.get(block, {})
        return self.priced or all(key.partition("=")[0] in pinned for key in block_on_request(plan))

    def _pins_allow(self, block: str, plan: BlockPlan) -> bool:
        pinned = {k: v for k, v in self.pins.blocks.get(block, {}).items() if k != "sharding"}
        return Pins(blocks={block: pinned}).allows_block(block, plan)

    def shardings(self, block: str, mesh: Mesh) -> list[Sharding]:
        """Shardings of a block's parameters that differ from each other on this mesh."""
        allowed = [Sharding.REPLICATE] if mesh.world == 1 else [Sharding.FSDP, Sharding.REPLICATE]
        if mesh.dp_replicate > 1 and mesh.dp_shard * mesh.sp > 1:
            allowed.append(Sharding.HSDP)
        wanted = self.pins.blocks.get(block, {}).get("sharding")
        if wanted is None:
            return allowed
        if wanted is Sharding.ZERO1:
            raise PlanError(f"pin {block}.sharding=zero1: not executable yet; `omnicompile simulate` prices it")
        if wanted is Sharding.FSDP and mesh.world == 1:
            return [Sharding.FSDP]
        return [wanted] if wanted in allowed else []

    def needs_replicas(self, mesh: Mesh) -> bool:
        """Plans without hsdp on this mesh equal those with dp_replicate = 1, and only the latter are listed."""
        return mesh.dp_replicate > 1 and "dp_replicate" not in self.pins.mesh and "dp_shard" not in self.pins.mesh


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def empty_space_reason(space: Space) -> str:
    """One line on why no plan is left to choose from."""
    reasons = list(dict.fromkeys(space.refused.values()))
    pins = f" with {space.pins.describe()}" if space.pins else ""
    detail = f": {'; '.join(reasons[:3])}" if reasons else ""
    return f"no plan for {space.cluster.gpus} GPUs and {space.global_batch} samples per step{pins}{detail}"
